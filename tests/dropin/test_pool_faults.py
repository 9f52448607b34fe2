"""What pools are there for: workers die, tasks misbehave, programs end; nothing hangs, nothing is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.errors import BackendClosed, CloudException, JobFailed, WorkerLost
from cloud.pool import Pool
from tests.dropin import pool_functions as fn
from tests.integration import jobs
from tests.integration.support import Program, exists, lines_of, until

if sys.platform != "linux":
    pytest.skip("looks into /proc", allow_module_level=True)

KINDS = ("template", "fork")


@pytest.fixture
def pool(home: Path) -> Iterator[Pool]:
    """A pool with two workers."""
    with Pool(2) as pool:
        yield pool
    pool.join()


@pytest.fixture(params=KINDS)
def any_pool(request: pytest.FixtureRequest, home: Path) -> Iterator[Pool]:
    """The same, and one whose workers are forked from this program."""
    context = multiprocessing.get_context("fork") if request.param == "fork" else None
    with Pool(2, context=context) as pool:
        yield pool
    pool.join()


def pid_of_task(witness: Path) -> int:
    return int(until(lambda: [line for line in lines_of(witness) if line.startswith("pid")])[-1].split()[1])


# --- a worker ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV], ids=lambda number: number.name)
def test_a_killed_worker_costs_its_own_task(number: signal.Signals, pool: Pool, witness: Path) -> None:
    lost = pool.apply_async(jobs.sleep_noted, (str(witness),))
    others = [pool.apply_async(fn.square, (i,)) for i in range(50)]
    os.kill(pid_of_task(witness), number)
    with pytest.raises(WorkerLost, match=number.name) as raised:
        lost.get(20)
    assert raised.value.exitcode == -number
    assert not lost.successful()
    assert [other.get(20) for other in others] == [i * i for i in range(50)]
    assert pool.map(fn.square, range(5)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize(
    ("task", "args", "what", "exitcode"),
    [
        (jobs.exit_with, (3,), "exited with code 3", 3),
        (fn.crash, (jobs.segfault,), "SIGSEGV", -signal.SIGSEGV),
        (fn.crash, (jobs.abort,), "SIGABRT", -signal.SIGABRT),
        (jobs.kill_self, (signal.SIGKILL,), "SIGKILL", -signal.SIGKILL),
    ],
)
def test_a_task_that_ends_its_worker_costs_itself(
    task: Any, args: Any, what: str, exitcode: int, any_pool: Pool
) -> None:
    seen: list[BaseException] = []
    result = any_pool.apply_async(task, args, error_callback=seen.append)
    with pytest.raises(WorkerLost, match=what) as raised:
        result.get(20)
    assert raised.value.exitcode == exitcode
    assert seen == [raised.value]
    assert any_pool.apply(fn.square, (3,)) == 9


def test_it_costs_one_item_of_a_map(pool: Pool) -> None:
    with pytest.raises(WorkerLost):
        pool.map(fn.end_if_three, range(200))
    for verb in ("imap", "imap_unordered"):
        results = getattr(pool, verb)(fn.end_if_three, range(200))
        found, lost = [], 0
        while True:
            try:
                found.append(results.next(20))
            except WorkerLost:
                lost += 1
            except StopIteration:
                break
        assert lost == 1
        assert sorted(found) == [x for x in range(200) if x != 3]
        assert verb == "imap_unordered" or found == sorted(found)


def test_no_task_runs_twice(any_pool: Pool, witness: Path) -> None:
    result = any_pool.map_async(jobs.sleep_noted, [str(witness)] * 2)
    until(lambda: len(lines_of(witness)) == 2)
    for line in lines_of(witness):
        os.kill(int(line.split()[1]), signal.SIGKILL)
    with pytest.raises(WorkerLost):
        result.get(20)
    assert any_pool.map(fn.square, range(5)) == [0, 1, 4, 9, 16]
    assert len(lines_of(witness)) == 2


def test_killing_all_idle_workers_costs_nothing(any_pool: Pool) -> None:
    for _ in range(3):
        for pid in set(any_pool.map(fn.pid_of, range(50))):
            os.kill(pid, signal.SIGKILL)
        assert any_pool.apply(fn.square, (4,)) == 16
        assert any_pool.map(fn.square, range(100)) == [i * i for i in range(100)]


def test_killing_the_template_costs_no_more_than_the_tasks_that_run(any_pool: Pool, witness: Path) -> None:
    lost = any_pool.apply_async(jobs.sleep_noted, (str(witness),))
    pid_of_task(witness)
    os.kill(any_pool._place.cloud.backend._workers._template._pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(WorkerLost):
        lost.get(20)
    assert any_pool.map(fn.square, range(5)) == [0, 1, 4, 9, 16]


# --- what tasks raise and return --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("base")], ids=repr
)
def test_what_would_end_the_program_is_an_error_here(error: BaseException, pool: Pool) -> None:
    for call in (
        lambda: pool.apply(fn.raise_this, (error,)),
        lambda: pool.map(fn.raise_this, [error]),
        lambda: list(pool.imap(fn.raise_this, [error])),
    ):
        with pytest.raises(JobFailed, match=type(error).__name__) as raised:
            call()
        assert type(raised.value.__cause__) is type(error)
    assert pool.apply(fn.square, (3,)) == 9


def test_what_cannot_be_rebuilt(pool: Pool) -> None:
    with pytest.raises(JobFailed, match="BadlyMade: 1 and 2"):
        pool.apply(fn.raise_badly_made)
    with pytest.raises(OSError, match="cannot be rebuilt"):
        pool.apply(fn.square, (fn.Treacherous(),))
    with pytest.raises(CloudException, match="cannot be rebuilt"):
        pool.apply(fn.Treacherous)
    results = pool.imap(fn.treacherous_if_one, range(3))
    assert next(results) == 0
    with pytest.raises(CloudException, match="cannot be rebuilt"):
        next(results)
    assert next(results) == 2
    assert pool.apply(fn.square, (3,)) == 9


def test_callbacks_that_raise(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    def fail(value: Any) -> None:
        raise RuntimeError(f"callback of {value}")

    seen: list[int] = []
    results = [pool.apply_async(fn.square, (i,), callback=fail if i % 2 else seen.append) for i in range(6)]
    assert [result.get(20) for result in results] == [i * i for i in range(6)]
    pool.close()
    pool.join()
    assert sorted(seen) == [0, 4, 16]
    assert all(f"callback of {value}" in caplog.text for value in (1, 9, 25))


def test_a_callback_may_use_the_pool(pool: Pool) -> None:
    seen: list[Any] = []
    result = pool.apply_async(fn.square, (2,), callback=lambda value: seen.append(pool.apply(fn.square, (value,))))
    assert result.get(20) == 4
    assert seen == [16]


def test_a_callback_may_terminate_the_pool(pool: Pool, witness: Path) -> None:
    stuck = pool.apply_async(jobs.sleep_noted, (str(witness),))
    pid_of_task(witness)
    failed = pool.apply_async(fn.fail_if_odd, (1,), error_callback=lambda exc: pool.terminate())
    with pytest.raises(BackendClosed):
        stuck.get(20)
    with pytest.raises(KeyError):
        failed.get(20)
    joined: list[BaseException] = []

    def join(value: Any) -> None:
        try:
            other.join()
        except RuntimeError as exc:
            joined.append(exc)

    other = Pool(1)
    result = other.apply_async(fn.square, (2,), callback=join)
    other.close()
    assert result.get(20) == 4
    other.join()
    assert "cannot join its own pool" in str(joined[0])


# --- what tasks do ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "args"),
    [
        (jobs.close_everything, ()),
        (os.chdir, ("/",)),
        (jobs.start_thread, (0.05,)),
        (jobs.thread_that_raises, ()),
        (jobs.fork_and_return, ()),
        (jobs.deep_list, (100_000,)),
        (jobs.recurse, ()),
        (os.environ.clear, ()),
        (sys.path.clear, ()),
        (sys.modules.clear, ()),
        (sys.stdout.close, ()),
        (os.close, (1,)),
    ],
    ids=lambda each: getattr(each, "__qualname__", ""),
)
def test_a_task_that_misbehaves_ends_and_the_next_one_runs(task: Any, args: Any, pool: Pool) -> None:
    result = pool.apply_async(task, args)
    result.wait(20)
    assert result.ready()
    assert [pool.apply(fn.square, (i,)) for i in range(4)] == [0, 1, 4, 9]


def test_a_flood_of_output(program: Callable[..., Program]) -> None:
    flooding = program(
        """
        import os
        from cloud.pool import Pool
        from tests.integration.jobs import print_much

        if __name__ == "__main__":
            with Pool(2) as pool:
                assert pool.apply(print_much, (50_000_000,)) == 50_000_000
            pool.join()
            os.write(2, b"over\\n")
        """,
        redirections=">/dev/null",
    )
    assert flooding.ended() == 0


# --- the end of a pool ------------------------------------------------------------------------------------------------


def test_terminate_wakes_whoever_waits(any_pool: Pool, witness: Path) -> None:
    waits: dict[str, Callable[[], Any]] = {
        "get": any_pool.apply_async(jobs.sleep_noted, (str(witness),)).get,
        "queued": any_pool.apply_async(time.sleep, (60,)).get,
        "callback": any_pool.apply_async(time.sleep, (60,), callback=print).get,
        "map": any_pool.map_async(time.sleep, [60] * 5).get,
        "imap": any_pool.imap(time.sleep, [60]).next,
        "imap_unordered": any_pool.imap_unordered(time.sleep, [60]).next,
        "slow iterable": any_pool.imap(time.sleep, (threading.Event().wait(2) for _ in range(1))).next,
        "wait": any_pool.apply_async(time.sleep, (60,)).wait,
    }
    ends: dict[str, Any] = {}

    def wait(name: str) -> None:
        try:
            ends[name] = waits[name]()
        except BaseException as exc:
            ends[name] = exc

    threads = [threading.Thread(target=wait, args=(name,)) for name in waits]
    for thread in threads:
        thread.start()
    pid = pid_of_task(witness)
    began = time.monotonic()
    any_pool.terminate()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 5
    assert {name: type(end) for name, end in ends.items()} == dict.fromkeys(waits, BackendClosed)
    assert not exists(pid)


def test_terminate_ends_workers_that_ignore_signals_or_are_stopped(any_pool: Pool, witness: Path) -> None:
    any_pool.apply_async(fn.ignore_signals, (str(witness),))
    first = pid_of_task(witness)
    any_pool.apply_async(jobs.stop_self)
    began = time.monotonic()
    any_pool.terminate()
    any_pool.join()
    assert time.monotonic() - began < 5
    assert not exists(first)


def test_what_a_terminated_pool_had_finished_is_kept(pool: Pool) -> None:
    done = [pool.apply_async(fn.square, (i,)) for i in range(5)]
    mapped = pool.map_async(fn.square, range(5))
    results = pool.imap(fn.square, range(5))
    for each in (*done, mapped):
        each.wait()
    assert next(results) == 0
    until(lambda: results.ready())
    pool.terminate()
    assert [each.get() for each in done] == mapped.get() == [0, 1, 4, 9, 16]
    assert list(results) == [1, 4, 9, 16]


def test_tasks_leave_no_processes_behind(any_pool: Pool, witness: Path) -> None:
    any_pool.apply(jobs.start_family, (str(witness),))
    pids = [int(line.split()[1]) for line in lines_of(witness) if len(line.split()) == 2]
    assert any(exists(pid) for pid in pids)
    any_pool.terminate()
    any_pool.join()
    until(lambda: not any(exists(pid) for pid in pids), "what the task started ends")


# --- forked children of the program -----------------------------------------------------------------------------------


def in_child(action: Callable[[], Any]) -> int:
    """Run an action in a forked child of this process; its exit code, 0 if it raised nothing."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_uses_an_inherited_pool(any_pool: Pool) -> None:
    ours = set(any_pool.map(fn.pid_after, [0.3] * 2, chunksize=1))
    assert len(ours) == 2
    running = any_pool.apply_async(fn.pid_after, (0.3,))

    def use() -> None:
        assert any_pool.map(fn.square, range(5)) == [0, 1, 4, 9, 16]
        assert not ours & set(any_pool.map(fn.pid_of, range(20)))
        with pytest.raises(BackendClosed):
            running.get(5)
        any_pool.terminate()
        any_pool.join()

    assert in_child(use) == 0
    assert running.get(20) in ours
    assert any_pool.apply(fn.square, (3,)) == 9


def test_a_forked_child_makes_a_pool_of_its_own(pool: Pool) -> None:
    assert pool.apply(fn.square, (2,)) == 4

    def use() -> None:
        with Pool(2) as own:
            assert own.map(fn.square, range(5)) == [0, 1, 4, 9, 16]
        own.join()

    assert in_child(use) == 0
    assert pool.apply(fn.square, (3,)) == 9


def test_a_forked_child_that_uses_nothing_harms_nothing(pool: Pool) -> None:
    result = pool.apply_async(fn.pid_after, (0.2,))
    assert in_child(gc.collect) == 0
    assert result.get(20)
    assert pool.apply(fn.square, (3,)) == 9


# --- the end of the program -------------------------------------------------------------------------------------------

BUSY = """
import multiprocessing, signal, sys, threading, time
from cloud.pool import Pool
from tests.integration.jobs import start_family

if __name__ == "__main__":
    kind, end = sys.argv[1:]
    context = multiprocessing.get_context("fork") if kind == "fork" else None
    pool = Pool(2, context=context)
    result = pool.apply_async(start_family, ("witness", 600.0))
    pool.map(abs, range(10))
    print("started", flush=True)
    if end == "fall off":
        time.sleep(0.1)
    elif end == "raise":
        raise SystemExit(3)
    elif end == "wait":
        result.get()
    elif end == "map":
        try:
            with pool:
                pool.map(time.sleep, [600] * 4)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise SystemExit(7)
"""


def ready(busy: Program) -> None:
    busy.wait_for("started")
    until(lambda: "ready" in lines_of(busy.folder / "witness"), "the task's family stands")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_outlives_a_killed_program(kind: str, number: int, program: Callable[..., Program]) -> None:
    busy = program(BUSY, args=[kind, "wait"])
    ready(busy)
    assert len(busy.others()) >= 6
    busy.signal(number)
    assert busy.ended() == -number
    busy.left_nothing(5.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["fall off", "raise"])
def test_nothing_outlives_a_program_that_ends(kind: str, end: str, program: Callable[..., Program]) -> None:
    busy = program(BUSY, args=[kind, end])
    busy.wait_for("started")
    assert busy.ended() == (3 if end == "raise" else 0)
    busy.left_nothing(5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_in_a_map_ends_promptly(kind: str, program: Callable[..., Program]) -> None:
    busy = program(BUSY, args=[kind, "map"])
    ready(busy)
    began = time.monotonic()
    busy.signal(signal.SIGINT)
    busy.wait_for("interrupted")
    assert busy.ended() == 7
    assert time.monotonic() - began < 5
    busy.left_nothing(5.0)
    assert "Traceback" not in busy.text
