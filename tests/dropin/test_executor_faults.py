"""Executors and what goes wrong: workers die, tasks misbehave, programs end; nothing hangs, nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import cloud
from cloud.errors import BackendClosed, InitializerFailed, JobKilled, SerializationError, WorkerLost
from tests.dropin import pool_functions as fn
from tests.dropin.test_pool_faults import in_child, pid_of_task
from tests.integration import jobs
from tests.integration.support import Program, exists, lines_of, until

if sys.platform != "linux":
    pytest.skip("looks into /proc", allow_module_level=True)

KINDS = ("template", "fork")


@pytest.fixture
def executor(home: Path) -> Iterator[cloud.Executor]:
    with cloud.Executor(2) as executor:
        yield executor


@pytest.fixture(params=KINDS)
def any_executor(request: pytest.FixtureRequest, home: Path) -> Iterator[cloud.Executor]:
    """The same, and one whose workers are forked from this program."""
    context = multiprocessing.get_context("fork") if request.param == "fork" else None
    with cloud.Executor(2, mp_context=context) as executor:
        yield executor


# --- a worker ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV], ids=lambda number: number.name)
def test_a_killed_worker_costs_its_own_task(number: signal.Signals, executor: cloud.Executor, witness: Path) -> None:
    lost = executor.submit(jobs.sleep_noted, str(witness))
    others = [executor.submit(fn.square, i) for i in range(50)]
    os.kill(pid_of_task(witness), number)
    # Programs written for ProcessPoolExecutor catch these.
    for kind in (WorkerLost, BrokenProcessPool, futures.BrokenExecutor):
        with pytest.raises(kind, match=number.name) as raised:
            lost.result(20)
        assert raised.value.exitcode == -number  # type: ignore[attr-defined]
    assert [other.result(20) for other in others] == [i * i for i in range(50)]
    assert executor.submit(fn.square, 3).result(20) == 9


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
    task: Any, args: Any, what: str, exitcode: int, any_executor: cloud.Executor
) -> None:
    told = threading.Event()
    future = any_executor.submit(task, *args)
    future.add_done_callback(lambda future: told.set())
    # Nobody waits for it: the executor itself notices.
    assert told.wait(20)
    error = future.exception()
    assert isinstance(error, WorkerLost)
    assert isinstance(error, BrokenProcessPool)
    assert what in str(error)
    assert error.exitcode == exitcode
    assert any_executor.submit(fn.square, 3).result(20) == 9


def test_a_callback_may_ask_for_what_ended_with_it(executor: cloud.Executor) -> None:
    began, over, found = threading.Event(), threading.Event(), []

    def block(future: Any) -> None:
        began.wait(20)

    def ask(future: Any) -> None:
        found.extend(each.result(20) for each in pending)
        executor.kill(pending)
        over.set()

    # While the first callback blocks, all others end.
    executor.submit(fn.square, 0).add_done_callback(block)
    pending = [executor.submit(fn.square, i) for i in range(20)]
    pending[3].add_done_callback(ask)
    until(lambda: set(executor._work.place.cloud.status([each.jid for each in pending])) == {"done"})  # type: ignore[union-attr]
    began.set()
    assert over.wait(20)
    assert found == [i * i for i in range(20)]


def test_such_an_error_can_be_pickled(executor: cloud.Executor) -> None:
    error = executor.submit(jobs.exit_with, 3).exception(20)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.exitcode == 3


def test_it_costs_one_item_of_a_map(executor: cloud.Executor) -> None:
    results = executor.map(fn.end_if_three, range(200))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BrokenProcessPool):
        next(results)
    assert list(executor.map(fn.square, range(5))) == [0, 1, 4, 9, 16]


def test_no_task_runs_twice(any_executor: cloud.Executor, witness: Path) -> None:
    lost = [any_executor.submit(jobs.sleep_noted, str(witness)) for _ in range(2)]
    until(lambda: len(lines_of(witness)) == 2)
    for line in lines_of(witness):
        os.kill(int(line.split()[1]), signal.SIGKILL)
    assert [type(future.exception(20)).__mro__[1] for future in lost] == [WorkerLost] * 2
    assert any_executor.submit(fn.square, 3).result(20) == 9
    assert len(lines_of(witness)) == 2


def test_killing_all_idle_workers_costs_nothing(any_executor: cloud.Executor) -> None:
    for _ in range(3):
        for pid in set(any_executor.map(fn.pid_of, range(50))):
            os.kill(pid, signal.SIGKILL)
        assert any_executor.submit(fn.square, 4).result(20) == 16


# --- killing on purpose -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [jobs.sleep_noted, fn.ignore_signals, jobs.swallow_everything])
def test_a_running_task_can_be_killed(task: Any, executor: cloud.Executor, witness: Path) -> None:
    future = executor.submit(task, str(witness))
    until(lambda: lines_of(witness), "the task runs")
    assert not future.cancel()
    began = time.monotonic()
    assert future.kill()
    assert time.monotonic() - began < 5
    assert future.done()
    with pytest.raises(JobKilled):
        future.result(0)
    assert not future.kill()
    assert executor.submit(fn.square, 3).result(20) == 9


def test_one_that_waits_or_has_ended_can_be_killed_too(executor: cloud.Executor) -> None:
    done = executor.submit(fn.square, 3)
    assert done.result(20) == 9
    assert not done.kill()
    assert done.result() == 9
    pending = [executor.submit(time.sleep, 60) for _ in range(6)]
    executor.kill(pending)
    assert {type(future.exception(0)) for future in pending} == {JobKilled}


def test_killing_wakes_whoever_waits(executor: cloud.Executor, witness: Path) -> None:
    future = executor.submit(jobs.sleep_noted, str(witness))
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(type(future.exception()))),
        threading.Thread(target=lambda: found.append(futures.wait([future]).done == {future})),
    ]
    for thread in threads:
        thread.start()
    pid_of_task(witness)
    future.kill()
    for thread in threads:
        thread.join(10)
    assert sorted(map(str, found)) == sorted(map(str, [JobKilled, True]))


def test_kill_workers_wakes_whoever_waits(any_executor: cloud.Executor, witness: Path) -> None:
    running = any_executor.submit(jobs.sleep_noted, str(witness))
    other = any_executor.submit(fn.ignore_signals, str(witness))
    waiting = [any_executor.submit(time.sleep, 60) for _ in range(5)]
    results = any_executor.map(time.sleep, [60])
    ends: list[Any] = []

    def wait(ask: Callable[[], Any]) -> None:
        try:
            ends.append(ask())
        except BaseException as exc:
            closed = isinstance(exc, BackendClosed) and isinstance(exc, BrokenProcessPool)
            ends.append(closed or isinstance(exc, futures.CancelledError) or exc)

    asks = [running.result, lambda: next(results), lambda: len(futures.wait([running, other, *waiting]).done) == 7]
    threads = [threading.Thread(target=wait, args=(ask,)) for ask in asks]
    for thread in threads:
        thread.start()
    until(lambda: len(lines_of(witness)) == 2)
    began = time.monotonic()
    any_executor.kill_workers()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 9
    assert ends == [True] * 3
    assert [future.cancelled() for future in waiting] == [True] * 5
    assert isinstance(other.exception(0), BackendClosed)
    with pytest.raises(RuntimeError, match="after shutdown"):
        any_executor.submit(abs, 1)
    assert not any(exists(int(line.split()[1])) for line in lines_of(witness))


# --- what tasks raise, return and do ----------------------------------------------------------------------------------


def test_what_cannot_be_rebuilt(executor: cloud.Executor) -> None:
    with pytest.raises(cloud.CloudException, match="BadlyMade: 1 and 2"):
        executor.submit(fn.raise_badly_made).result(20)
    with pytest.raises(OSError, match="cannot be rebuilt"):
        executor.submit(fn.square, fn.Treacherous()).result(20)
    with pytest.raises(SerializationError, match="cannot be rebuilt"):
        executor.submit(fn.Treacherous).result(20)
    with pytest.raises(SerializationError, match="cannot be rebuilt here \\(SystemExit: 4"):
        executor.submit(fn.Leaving).result(20)
    future = executor.submit(fn.Leaving)
    assert futures.wait([future], 20).done == {future}
    assert isinstance(future.exception(), SerializationError)
    results = executor.map(fn.treacherous_if_one, range(3))
    assert next(results) == 0
    with pytest.raises(SerializationError, match="cannot be rebuilt"):
        next(results)
    assert executor.submit(fn.square, 3).result(20) == 9


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
        (sys.modules.clear, ()),
        (os.close, (1,)),
    ],
    ids=lambda each: getattr(each, "__qualname__", ""),
)
def test_a_task_that_misbehaves_ends_and_the_next_one_runs(task: Any, args: Any, executor: cloud.Executor) -> None:
    future = executor.submit(task, *args)
    assert futures.wait([future], 20).done == {future}
    assert [executor.submit(fn.square, i).result(20) for i in range(4)] == [0, 1, 4, 9]


def test_a_flood_of_output(program: Callable[..., Program]) -> None:
    flooding = program(
        """
        import os, cloud
        from tests.integration.jobs import print_much

        with cloud.Executor(2) as executor:
            assert executor.submit(print_much, 50_000_000).result() == 50_000_000
        os.write(2, b"over\\n")
        """,
        redirections=">/dev/null",
    )
    assert flooding.ended() == 0


# --- workers ----------------------------------------------------------------------------------------------------------


def test_an_initializer_runs_in_every_worker(witness: Path) -> None:
    with cloud.Executor(2, initializer=fn.remember_and_note, initargs=(str(witness), 1, "two")) as executor:
        pid, found = executor.submit(fn.remembered).result(20)
        assert found == [1, "two"]
        os.kill(pid, signal.SIGKILL)
        assert all(values == [1, "two"] for _, values in executor.map(fn.remembered, range(20)))
        assert str(pid) in " ".join(lines_of(witness))


def test_queues_travel_by_inheritance() -> None:
    queue = multiprocessing.get_context("fork").SimpleQueue()
    with cloud.Executor(2, initializer=fn.remember, initargs=(queue,)) as executor:
        list(executor.map(fn.put_on_shared, range(10)))
    assert sorted(queue.get() for _ in range(10)) == list(range(10))
    queue.close()


def test_an_initializer_that_raises() -> None:
    with cloud.Executor(2, initializer=fn.refuse) as executor:
        for _ in range(3):
            with pytest.raises(BrokenProcessPool, match="always fails") as raised:
                executor.submit(fn.square, 3).result(20)
            assert isinstance(raised.value, InitializerFailed)
            assert isinstance(raised.value.__cause__, ValueError)


def test_workers_are_replaced_after_so_many_tasks() -> None:
    with cloud.Executor(1, max_tasks_per_child=3) as executor:
        pids = [executor.submit(os.getpid).result(20) for _ in range(9)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]
        pids = list(executor.map(fn.pid_of, range(12), chunksize=2))
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [6, 6]


def test_one_worker_is_enough_for_one_task_after_another(executor: cloud.Executor) -> None:
    assert len({executor.submit(os.getpid).result(20) for _ in range(20)}) == 1


def test_workers_end_with_their_executor(executor: cloud.Executor) -> None:
    pids = set(executor.map(fn.pid_after, [0.1] * 4))
    assert len(pids) == 2
    executor.shutdown()
    assert not any(exists(pid) for pid in pids)


# --- forked children of the program -----------------------------------------------------------------------------------


def test_a_forked_child_uses_an_inherited_executor(any_executor: cloud.Executor) -> None:
    ours = set(any_executor.map(fn.pid_after, [0.3] * 2))
    assert len(ours) == 2
    running = any_executor.submit(fn.pid_after, 0.5)

    def use() -> None:
        assert list(any_executor.map(fn.square, range(5))) == [0, 1, 4, 9, 16]
        assert not ours & set(any_executor.map(fn.pid_of, range(20)))
        # The parent's task is not the child's, and nobody here will ever be told of its end.
        assert futures.wait([running], 5).done == {running}
        assert isinstance(running.exception(), BackendClosed)
        any_executor.shutdown()

    assert in_child(use) == 0
    assert running.result(20) in ours
    assert any_executor.submit(fn.square, 3).result(20) == 9


def test_a_forked_child_makes_an_executor_of_its_own(executor: cloud.Executor) -> None:
    assert executor.submit(fn.square, 2).result(20) == 4

    def use() -> None:
        with cloud.Executor(2) as own:
            assert own.submit(fn.square, 3).result(20) == 9

    assert in_child(use) == 0
    assert executor.submit(fn.square, 3).result(20) == 9


# --- the end of the program -------------------------------------------------------------------------------------------

BUSY = """
import multiprocessing, sys
import cloud
from tests.integration.jobs import start_family

kind, end = sys.argv[1:]
context = multiprocessing.get_context("fork") if kind == "fork" else None
executor = cloud.Executor(2, mp_context=context)
future = executor.submit(start_family, "witness", 600.0)
print("started", flush=True)
if end == "wait":
    future.result()
elif end == "map":
    import time
    try:
        list(executor.map(time.sleep, [600] * 4))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        executor.kill_workers()
        raise SystemExit(7)
"""


def ready(busy: Program) -> None:
    busy.wait_for("started")
    until(lambda: "ready" in lines_of(busy.folder / "witness"), "the task's family stands")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("end", ["wait", "fall off"])
def test_nothing_outlives_a_killed_program(kind: str, number: int, end: str, program: Callable[..., Program]) -> None:
    busy = program(BUSY, args=[kind, end])
    ready(busy)
    assert len(busy.others()) >= 5
    busy.signal(number)
    assert busy.ended() == -number
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


def test_a_program_ends_when_its_tasks_have(program: Callable[..., Program]) -> None:
    ending = program(
        """
        import sys, time, cloud

        def show(text):
            time.sleep(0.5)
            print(text, flush=True)

        kept = cloud.Executor(2)
        kept.submit(show, "task").add_done_callback(lambda future: print("callback", flush=True))
        cloud.Executor(1).submit(show, "forgotten")
        left = cloud.Executor(1)
        left.submit(show, "not waited for")
        left.shutdown(wait=False)
        raise SystemExit(3)
        """
    )
    assert ending.ended() == 3
    assert sorted(ending.text.splitlines()) == ["callback", "forgotten", "not waited for", "task"]
    ending.left_nothing(5.0)
