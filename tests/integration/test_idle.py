"""An open cloud that has nothing to do costs nothing, and one that works does not grow."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from cloud.client.cloud import Cloud
from tests.integration import jobs
from tests.integration.support import Program, cpu_s, executor_of, lines_of, template_pid, until, worker_pids
from tests.leaks import Leaks

Opener = Callable[..., Cloud]

WATCH_S = 2.0
SHARE = 0.002


def test_an_idle_cloud_uses_no_cpu(program: Callable[..., Program]) -> None:
    started = program(
        """
        import time
        import cloud.mp as cloud
        assert cloud.result(cloud.map(lambda x: print(x), range(50))) == [None] * 50
        cloud.kill(cloud.call(time.sleep, 60))
        try: cloud.result(cloud.call(time.sleep, 0.2), timeout=0.01)
        except cloud.CloudTimeoutError: pass
        cloud.join(cloud.find(), ignore_errors=True)
        print("idle", flush=True)
        time.sleep(600)
        """,
        env={"CLOUD_NUM_PROCS": "4"},
    )
    started.wait_for("idle")
    # What comes after the last job may still be done: the rest of what the template loads, one last look of all.
    pids = until(lambda: _at_rest(started), "it comes to rest")
    assert len(pids) >= 3
    used = min(_used(pids, WATCH_S) for _ in range(2))
    # The kernel counts in ticks of 10 ms: one tick is the least that can be seen.
    assert used <= max(SHARE * WATCH_S, 1 / os.sysconf("SC_CLK_TCK"))
    assert _switches(pids, 1.0) < 20


def _at_rest(started: Program) -> list[int]:
    """Its processes, once none comes or goes and none has much to do."""
    pids = list(started.processes())
    try:
        quiet = _used(pids, WATCH_S / 4) <= SHARE * WATCH_S
    except psutil.NoSuchProcess:
        return []
    return pids if quiet and list(started.processes()) == pids else []


def _used(pids: list[int], seconds: float) -> float:
    before = sum(map(cpu_s, pids))
    time.sleep(seconds)
    return sum(map(cpu_s, pids)) - before


def _switches(pids: list[int], seconds: float) -> int:
    """How often the processes were woken up: finer than ticks."""

    def count() -> int:
        return sum(
            int(line.split()[1])
            for pid in pids
            for task in os.listdir(f"/proc/{pid}/task")
            for line in Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines()
            if line.startswith("voluntary_ctxt_switches")
        )

    before = count()
    time.sleep(seconds)
    return count() - before


def test_a_long_job_costs_little(start: Opener, witness: Path) -> None:
    cloud = start(2)
    jid = cloud.call(jobs.sleep_noted, str(witness))
    until(lambda: lines_of(witness), "it runs")
    pids = [os.getpid(), template_pid(cloud), *worker_pids(cloud)]
    least = min(_used(pids, 0.5) for _ in range(3))
    assert least <= 0.04
    cloud.kill(jid)


@pytest.mark.parametrize("kind", ["calls", "maps", "kills", "crashes", "output", "closed"])
def test_nothing_piles_up(start: Opener, kind: str, witness: Path) -> None:
    cloud = start(2)

    def work(n: int) -> None:
        for _ in range(n):
            if kind == "calls":
                jids = [cloud.call(abs, -x) for x in range(20)]
            elif kind == "maps":
                jids = list(cloud.map(abs, range(50)))
            elif kind == "kills":
                jids = [cloud.call(time.sleep, 60)]
                cloud.kill(jids)
            elif kind == "crashes":
                jids = [cloud.call(jobs.exit_with, 1)]
            elif kind == "output":
                jids = [cloud.call(jobs.print_much, 10_000)]
            else:
                assert cloud.result(cloud.call(abs, -1)) == 1
                cloud.close()
                continue
            cloud.join(jids, ignore_errors=True)
            cloud.delete(jids)

    work(5)
    before = _holdings(cloud)
    work(20)
    until(lambda: all(now <= then for now, then in zip(_holdings(cloud), before, strict=True)), "no more than before")


def _holdings(cloud: Cloud) -> tuple[int, int, int]:
    gc.collect()
    n_children = sum(1 for child in psutil.Process().children(recursive=True) if child.status() != "zombie")
    n_fds = len(os.listdir("/proc/self/fd"))
    n_workers = len(executor_of(cloud)._workers)
    # Which of the two workers live depends on what came last.
    return (max(n_children, 3), max(n_fds, _FDS), max(n_workers, 2))


_FDS = len(os.listdir("/proc/self/fd")) + 20


def test_zombies_do_not_stay(start: Opener, witness: Path) -> None:
    cloud = start(2)
    for _ in range(10):
        with pytest.raises(Exception, match="code 1"):
            cloud.result(cloud.call(jobs.exit_with, 1))
    until(lambda: not _zombies(), "no zombie is left")


def _zombies() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True) if child.status() == "zombie"]


def test_a_closed_cloud_leaves_nothing(start: Opener) -> None:
    leaks = Leaks()
    cloud = start(3)
    cloud.result(cloud.map(abs, range(100)))
    cloud.call(time.sleep, 60)
    assert leaks.found() != []
    cloud.close()
    assert leaks.found_after(2.0) == []


def test_idle_workers_hold_no_large_arguments(start: Opener) -> None:
    cloud = start(2)
    large = bytes(3 << 20)
    assert cloud.result(cloud.map(len, [large] * 12)) == [len(large)] * 12
    assert cloud.result([cloud.call(len, large) for _ in range(4)]) == [len(large)] * 4
    numbers = np.ones(1 << 19)
    for _ in range(3):  # memory is got ahead for a function that returned what it was given
        assert np.array_equal(cloud.result(cloud.call(np.asarray, numbers)), numbers)
    until(lambda: not any(_large_files(pid) for pid in worker_pids(cloud)), "they let go of them")


@pytest.mark.parametrize("as_map", [False, True])
def test_memory_that_was_got_ahead_is_given_back_by_a_job_that_does_not_need_it(start: Opener, as_map: bool) -> None:
    cloud = start(1)
    numbers = np.ones(1 << 19)
    for _ in range(3):
        cloud.result(cloud.call(np.asarray, numbers))
    (pid,) = worker_pids(cloud)
    until(lambda: _held_for_long(pid), "it holds only that memory, and for a second")
    assert cloud.result(cloud.map(abs, [-1, -2]) if as_map else [cloud.call(abs, -1), cloud.call(abs, -2)]) == [1, 2]
    until(lambda: not _large_files(pid), "it lets go of it")


def _held_for_long(pid: int) -> bool:
    before = _large_files(pid)
    time.sleep(0.05)  # arguments are held for a hundredth of a second
    return len(before) == 1 and before == _large_files(pid)


def _large_files(pid: int) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    return [each.name for each in folder.iterdir() if each.exists() and each.stat().st_size >= 3 << 20]
