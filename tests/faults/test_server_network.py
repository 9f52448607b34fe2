"""A hostile network between client and server: each submission arrives once, whatever is cut, doubled or slow."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

import cloud
from tests.faults.harness import Workgroup, eventually
from tests.faults.jobs import expected, work
from tests.server.proxy import Direction, FaultProxy

STEP: Final = 97
"""Of the bytes at which is cut here; `make soak` cuts at each."""
N_READERS: Final = 200


@pytest.fixture
def workgroup(closed_after: None, tmp_path: Path) -> Iterator[Workgroup]:
    with Workgroup(tmp_path, "--workers", "2") as found:
        yield found


@pytest.fixture
def proxy(workgroup: Workgroup) -> Iterator[FaultProxy]:
    with FaultProxy(workgroup.server.port) as found:
        workgroup.use(found.url)
        yield found


def submit(token: int, witness: Path) -> int:
    return cloud.call(work, token, str(witness), 0.0, _label=f"t{token}")


def cut_at_each(proxy: FaultProxy, witness: Path, step: int, first_token: int, *, reset: bool) -> int:
    """Cut a submission at every step-th byte of its request and of its reply; how many were submitted.

    Each is told a jid, and there is one job a token.
    """
    cloud.result(submit(first_token, witness))  # what is sent once has been sent
    token = first_token
    for direction in Direction:
        proxy.cut_all()
        before = proxy.n_up, proxy.n_down
        token += 1
        submit(token, witness)
        sizes = proxy.n_up - before[0], proxy.n_down - before[1]
        size = sizes[0] if direction is Direction.UP else sizes[1]
        for at in range(first_token % step, size + 1, step):
            proxy.cut_all()
            proxy.cut_after(at, direction, reset=reset, next_only=True)
            token += 1
            submit(token, witness)
    proxy.heal()
    return token - first_token + 1


def check_once_each(workgroup: Workgroup, witness: Path, n: int) -> None:
    """As many jobs as were submitted, one of each label, each run once, with their results."""
    jids = cloud.find()
    assert len(jids) == n
    assert sorted(cloud.result(jids)) == sorted(expected(token) for token in range(1, n + 1))
    with workgroup.opened_store() as rows:
        labels = [label for (label,) in rows("SELECT label FROM batch")]
    assert sorted(labels) == sorted({f"t{token}" for token in range(1, n + 1)})
    starts = [text for text in witness.read_text().splitlines() if text.startswith("start")]
    assert len(starts) == n


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_submission_that_is_cut_anywhere_arrives_once(
    workgroup: Workgroup, proxy: FaultProxy, tmp_path: Path, reset: bool
) -> None:
    n = cut_at_each(proxy, tmp_path / "witness", STEP, 1, reset=reset)
    assert n > 10
    check_once_each(workgroup, tmp_path / "witness", n)


def test_a_map_that_is_cut_anywhere_arrives_once(workgroup: Workgroup, proxy: FaultProxy, tmp_path: Path) -> None:
    witness = str(tmp_path / "witness")
    cloud.result(cloud.call(work, 0, witness, 0.0))
    for number, at in enumerate(range(50, 2200, 400)):
        for direction in Direction:
            proxy.cut_all()
            proxy.cut_after(at, direction, next_only=True)
            tokens = range(10 * number, 10 * number + 10)
            # Slowly: it is opened, extended and sealed.
            jids = cloud.map(work, (token for token in tokens), [witness] * 10, [0.0] * 10)
            assert cloud.result(jids) == [expected(token) for token in tokens]
    n = len(cloud.find())
    assert n == 1 + 2 * 10 * len(range(50, 2200, 400))
    assert sum(text.startswith("start") for text in Path(witness).read_text().splitlines()) == n


def test_what_arrives_twice_and_late_changes_nothing(workgroup: Workgroup, proxy: FaultProxy, tmp_path: Path) -> None:
    """Each connection is played to the server again after it ended: requests come twice, and in another order."""
    witness = tmp_path / "witness"
    proxy.duplicate()
    kept = [submit(token, witness) for token in range(1, 6)]
    mapped = cloud.map(work, range(6, 12), [str(witness)] * 6, [0.0] * 6, _label="map")
    gone = submit(12, witness)
    killed = cloud.call(work, 13, str(witness), 600.0)
    assert cloud.result([*kept, *mapped, gone]) == [expected(token) for token in range(1, 13)]
    proxy.cut_all()  # the first connections are played again from here on, beside these:
    cloud.kill(killed)
    cloud.delete(gone)
    before = cloud.info([*kept, *mapped], ["status", "finished", "created", "runtime"])
    n = proxy.n_connections
    proxy.heal()
    proxy.cut_all()
    eventually(lambda: proxy.n_duplicated >= n, f"{proxy.n_duplicated} of {n} connections were played again")
    assert cloud.find() == [*kept, *mapped, killed]
    assert cloud.info([*kept, *mapped], ["status", "finished", "created", "runtime"]) == before
    assert cloud.status(killed) == "killed"
    starts = [text for text in witness.read_text().splitlines() if text.startswith("start")]
    assert len(starts) == 13


# --- slow readers -----------------------------------------------------------------------------------------------------


def loud(n_bytes: int) -> None:
    """Fill standard output, and stay."""
    print("x" * n_bytes, flush=True)
    time.sleep(600)


def slow_readers(workgroup: Workgroup, n: int, op: str, **content: object) -> list[socket.socket]:
    """Connections that ask for something, and do not read the reply."""
    found = []
    body = json.dumps(content).encode()
    for number in range(n):
        if number % 200 == 0:
            key, secret = workgroup.another_key()
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", workgroup.server.port))
        reader.sendall(
            b"POST /v1/jobs/%b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %d:%b\r\nContent-Length: %d\r\n\r\n%b"
            % (op.encode(), key, secret.encode(), len(body), body)
        )
        found.append(reader)
    return found


def measure_slow_readers(workgroup: Workgroup, n: int) -> tuple[float, float]:
    """(99th percentile of a status in seconds, resident MB of the server) while so many hardly read."""
    jid = cloud.call(loud, 60_000)
    eventually(lambda: cloud.info(jid, "stdout")[jid]["stdout"], "it printed nothing")
    readers = slow_readers(workgroup, n, "describe", jids=[[jid, jid + 1]])
    try:
        took = []
        for number in range(200):
            readers[number % n].recv(100)
            began = time.monotonic()
            assert cloud.status(jid) == "processing"
            took.append(time.monotonic() - began)
        assert workgroup.server.process is not None
        resident = psutil.Process(workgroup.server.process.pid).memory_info().rss / 1e6
    finally:
        for each in readers:
            each.close()
    return sorted(took)[len(took) * 99 // 100], resident


def test_slow_readers_slow_nobody_down(workgroup: Workgroup) -> None:
    p99_s, resident_mb = measure_slow_readers(workgroup, N_READERS)
    print(f"p99 {p99_s * 1000:.1f} ms, {resident_mb:.0f} MB")
    assert p99_s < 0.5
    assert resident_mb < 200


def test_slow_readers_of_large_results_do_not_fill_the_memory(workgroup: Workgroup) -> None:
    jid = cloud.call(os.urandom, 8_000_000)
    cloud.join(jid)
    assert workgroup.server.process is not None
    server = psutil.Process(workgroup.server.process.pid)
    readers = slow_readers(workgroup, 150, "outcomes", jids=[[jid, jid + 1]])
    try:
        begun = Counter(each.recv(12) for each in readers)
        # One workgroup may have a quarter of 1 GiB on their way.
        assert begun[b"HTTP/1.1 200"] == 33
        assert begun[b"HTTP/1.1 503"] == 150 - 33
        assert server.memory_info().rss < 400e6
        assert cloud.status(jid) == "done"
    finally:
        for each in readers:
            each.close()
