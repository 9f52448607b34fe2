"""kill -9 of workers and servers under load: what was promised is kept, and clients need not know."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloud
from tests.faults.harness import Load, Workgroup, check, eventually
from tests.faults.jobs import expected, line, work


@pytest.fixture
def workgroup(closed_after: None, tmp_path: Path) -> Iterator[Workgroup]:
    with Workgroup(tmp_path, "--workers", "2") as found:
        yield found


def kill_workers(load: Load, n: int, pause_s: float, workgroup: Workgroup) -> None:
    """kill -9 the worker of a running job, n times, at random moments."""
    pause = threading.Event()
    while n:
        pause.wait(workgroup.random.uniform(0.0, pause_s))
        running = load.witness.running()
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(workgroup.random.choice(running)[1], signal.SIGKILL)
                n -= 1


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
    for _ in range(4):
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
