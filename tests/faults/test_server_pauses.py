"""SIGSTOP of a worker and of the server: others go on, nothing happens twice when they go on, too."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloud
from tests.faults.harness import Load, Witness, Workgroup, check, eventually
from tests.faults.jobs import expected, work


@pytest.fixture
def workgroup(closed_after: None, tmp_path: Path) -> Iterator[Workgroup]:
    with Workgroup(tmp_path, "--workers", "2") as found:
        yield found


def stopped_job(tmp_path: Path, seconds: float, **options: object) -> tuple[int, int, Witness]:
    """(jid, pid of its worker, witness) of a job whose worker is stopped."""
    witness = Witness(tmp_path / "stopped")
    jid = cloud.call(work, 1, str(witness.path), seconds, **options)
    eventually(witness.running, "it did not begin")
    pid = witness.running()[0][1]
    os.kill(pid, signal.SIGSTOP)
    return jid, pid, witness


def test_others_go_on_beside_a_stopped_worker_and_it_ends_once(workgroup: Workgroup, tmp_path: Path) -> None:
    jid, pid, witness = stopped_job(tmp_path, 0.2)
    others = cloud.map(work, range(2, 12), [str(witness.path)] * 10, [0.0] * 10)
    assert cloud.result(others) == [expected(token) for token in range(2, 12)]
    assert cloud.status(jid) == "processing"
    os.kill(pid, signal.SIGCONT)
    assert cloud.result(jid) == expected(1)
    assert [what for what, token, _, _ in witness.lines() if token == 1] == ["start", "end"]


def test_a_stopped_worker_can_be_killed_and_its_late_result_is_not_recorded(
    workgroup: Workgroup, tmp_path: Path
) -> None:
    jid, pid, witness = stopped_job(tmp_path, 0.2)
    began = time.monotonic()
    cloud.kill(jid)
    assert time.monotonic() - began < 10.0
    assert cloud.status(jid) == "killed"
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass
    assert cloud.result(cloud.call(work, 2, str(witness.path), 0.0)) == expected(2)
    assert cloud.status(jid) == "killed"
    assert ("end", 1) not in [(what, token) for what, token, _, _ in witness.lines()]


def test_a_stopped_worker_does_not_outlast_its_jobs_time(workgroup: Workgroup, tmp_path: Path) -> None:
    jid, _, _ = stopped_job(tmp_path, 600.0, _max_runtime=0.02)
    with pytest.raises(cloud.CloudException, match="_max_runtime"):
        cloud.result(jid)
    assert cloud.status(jid) == "killed"


def test_a_stopped_server_is_waited_for(workgroup: Workgroup, tmp_path: Path) -> None:
    load = Load(tmp_path).start()
    eventually(load.n_seen, "no job ended")
    assert workgroup.server.process is not None
    for _ in range(3):
        os.kill(workgroup.server.process.pid, signal.SIGSTOP)
        threading.Event().wait(0.7)
        os.kill(workgroup.server.process.pid, signal.SIGCONT)
        n = load.n_seen()
        eventually(lambda n=n: load.n_seen() > n, "clients do not go on by themselves")  # type: ignore[misc]
    assert load.stop()
    found = check(load, workgroup.store)
    assert found.broken == {}
    assert found.n_refused == 0
    assert found.n_repeated == 0
