"""kill -9 of workers and servers under load: what was promised is kept, and clients need not know."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloud
from tests.faults.harness import Load, Workgroup, check, eventually
from tests.faults.jobs import expected, work


@pytest.fixture
def workgroup(closed_after: None, tmp_path: Path) -> Iterator[Workgroup]:
    with Workgroup(tmp_path, "--workers", "2") as found:
        yield found


def kill_workers(load: Load, n: int, pause_s: float, workgroup: Workgroup) -> None:
    """kill -9 the worker of a running job, n times, at random moments; of no job more often than it may lose one."""
    pause = threading.Event()
    killed: Counter[int] = Counter()
    while n:
        pause.wait(workgroup.random.uniform(0.0, pause_s))
        running = load.witness.running()
        if running:
            _, pid = workgroup.random.choice(running)
            with contextlib.suppress(ProcessLookupError):
                # It may have begun another job since: stopped, it begins no more.
                os.kill(pid, signal.SIGSTOP)
                eventually(lambda pid=pid: is_stopped(pid), "it does not stop")  # type: ignore[misc]
                token = load.witness.last_begun_by(pid)
                may_lose = killed[token] < 2
                os.kill(pid, signal.SIGKILL if may_lose else signal.SIGCONT)
                killed[token] += may_lose
                n -= may_lose


def is_stopped(pid: int) -> bool:
    """True once it is, or is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except FileNotFoundError:
        return True


def test_workers_are_killed_at_random_moments(workgroup: Workgroup, tmp_path: Path) -> None:
    load = Load(tmp_path, seconds=0.05).start()
    eventually(load.n_seen, "no job ended")
    kill_workers(load, 25, 0.1, workgroup)
    fault_end = time.time()
    eventually(lambda: load.witness.first_end_after(fault_end), "no job ended after the last kill", 10.0)
    recovery_s = (load.witness.first_end_after(fault_end) or 0.0) - fault_end
    assert load.stop()
    found = check(load, workgroup.store)
    assert found.broken == {}
    assert found.n_repeated > 0
    assert recovery_s < 2.0


@pytest.mark.parametrize("group", [False, True], ids=["alone", "with its workers"])
def test_the_server_is_killed_under_load(workgroup: Workgroup, tmp_path: Path, group: bool) -> None:
    load = Load(tmp_path).start()
    pause = threading.Event()
    ready_s = []
    for _ in range(3):
        n = load.n_seen()
        eventually(lambda n=n: load.n_seen() > n, "clients do not go on by themselves")  # type: ignore[misc]
        pause.wait(workgroup.random.uniform(0.0, 0.5))
        ready_s.append(workgroup.crash(group=group))
    n = load.n_seen()
    eventually(lambda: load.n_seen() > n, "clients do not go on by themselves")
    assert load.stop()
    found = check(load, workgroup.store)
    print(ready_s, found)
    assert found.broken == {}
    assert found.n_refused == 0
    assert max(ready_s) < 10.0


def test_a_map_that_is_half_submitted_goes_on_after_a_restart(workgroup: Workgroup, tmp_path: Path) -> None:
    witness = str(tmp_path / "witness")

    def items() -> Iterator[int]:
        for token in range(40):
            if token in (10, 25):
                workgroup.crash(group=token == 25)
            yield token

    jids = cloud.map(work, items(), [witness] * 40, [0.0] * 40)
    assert len(jids) == 40
    assert cloud.result(jids) == [expected(token) for token in range(40)]
    assert cloud.find() == list(jids)


def test_a_map_whose_submitter_is_gone_waits_and_can_be_seen(workgroup: Workgroup, tmp_path: Path) -> None:
    """Nobody knows its jids, so nothing that was acknowledged is lost; jobs beside it go on after the restart."""
    witness = str(tmp_path / "witness")

    class Gone(Exception):
        pass

    def items() -> Iterator[int]:
        yield from range(4)
        eventually(Path(witness).exists, "the first items did not begin")
        workgroup.crash(group=True)
        raise Gone

    with pytest.raises(Gone):
        cloud.map(work, items(), [witness] * 40, [0.0] * 40)
    jid = cloud.call(work, 7, witness, 0.0)
    assert cloud.result(jid) == expected(7)
    assert cloud.find() == [jid]
    with workgroup.opened_store() as rows:
        assert rows("SELECT count(*) FROM batch") == [(1,)], "the map that was given up is gone"


def test_blocked_clients_go_on_by_themselves(workgroup: Workgroup, tmp_path: Path) -> None:
    witness = str(tmp_path / "witness")
    jid = cloud.call(work, 3, witness, 1.0)
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(cloud.result(jid)))
    waiting.start()
    eventually(Path(witness).exists, "it did not begin")
    workgroup.crash(group=True)
    waiting.join(30)
    assert found == [expected(3)]


def test_what_must_not_run_twice_is_an_error_after_a_crash(workgroup: Workgroup, tmp_path: Path) -> None:
    witness = str(tmp_path / "witness")
    jid = cloud.call(work, 3, witness, 600.0, _restartable=False)
    behind = cloud.call(work, 4, witness, 0.0, _depends_on=[jid], _depends_on_errors="ignore")
    eventually(Path(witness).exists, "it did not begin")
    workgroup.crash()
    with pytest.raises(cloud.CloudException, match="server stopped while it ran"):
        cloud.result(jid)
    assert cloud.result(behind) == expected(4)
    assert Path(witness).read_text().count("start 3 ") == 1


CLIENT = """
import sys, threading
from pathlib import Path
import cloud
from tests.faults.harness import Load

cloud.setkey(int(sys.argv[1]), sys.argv[2], sys.argv[3])
Load(Path(sys.argv[4])).start()
threading.Event().wait(60)
"""


def test_what_a_killed_client_was_told_is_kept(workgroup: Workgroup, tmp_path: Path) -> None:
    server, load = workgroup.server, Load(tmp_path)
    command = [sys.executable, "-c", CLIENT, str(server.api_key), server.api_secretkey, server.url, str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}) as client:
        try:
            eventually(lambda: load.n_seen() > 10, "no job ended")
        finally:
            client.kill()
    found = check(load, workgroup.store)
    assert found.broken == {}
    assert found.n_repeated == 0
