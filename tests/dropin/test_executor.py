"""``cloud.Executor`` against ``concurrent.futures.ProcessPoolExecutor``: each test runs both and compares."""

from __future__ import annotations

import asyncio
import gc
import math
import multiprocessing
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import cloud
from cloud.errors import BackendClosed, CloudTimeoutError, JobNotFound
from cloud.pool.feeding import Feed
from cloud.pool.iterators import IMapIterator
from tests.dropin import pool_functions as fn


@pytest.fixture(scope="module")
def theirs() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        list(executor.map(fn.square, range(10)))
        yield executor


@pytest.fixture
def ours(home: Any) -> Iterator[cloud.Executor]:
    with cloud.Executor(2) as executor:
        yield executor


def ended(action: Callable[[], Any]) -> Any:
    """The value, or type and arguments of what was raised."""
    try:
        return action()
    except BaseException as exc:
        return type(exc), exc.args, type(exc.__cause__)


CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (pow, (2, 8), {}),
    (fn.describe, (1, "two"), {"three": 3, "self": 4, "fn": 5}),
    (fn.fail_if_odd, (1,), {}),
    (fn.raise_chained, (), {}),
    (fn.raise_this, (SystemExit(3),), {}),
    (fn.raise_this, (KeyboardInterrupt(),), {}),
    (fn.raise_this, (GeneratorExit("over"),), {}),
    (fn.raise_this, (StopIteration(5),), {}),
    (fn.raise_this, (TimeoutError("the task's own"),), {}),
    (fn.raise_this, (ExceptionGroup("two", [KeyError(1), OSError(2)]),), {}),
    (fn.square, (), {}),
    (threading.Lock, (), {}),
    (fn.square, (threading.Lock(),), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS, ids=lambda each: getattr(each, "__name__", ""))
def test_submit(func: Any, args: Any, kwargs: Any, ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    futures_ = [executor.submit(func, *args, **kwargs) for executor in (ours, theirs)]
    values = [ended(lambda: future.result(20)) for future in futures_]
    if func is threading.Lock:
        # The same exception, from another place.
        values = [value[:2] for value in values]
    if args and type(args[0]) is type(threading.Lock()):
        values = [value[:2] for value in values]
    assert repr(values[0]) == repr(values[1])
    errors = [future.exception() for future in futures_]
    assert type(errors[0]) is type(errors[1])
    for future in futures_:
        assert (future.done(), future.running(), future.cancelled(), future.cancel()) == (True, False, False, False)


def test_the_traceback_over_there_is_the_cause(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        error = executor.submit(fn.fail_if_odd, 1).exception()
        assert error is not None
        assert 'raise KeyError(x, "odd")' in str(error.__cause__)


def test_submit_takes_its_function_by_position_only(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        with pytest.raises(TypeError):
            executor.submit(fn=fn.square, x=1)  # type: ignore[call-arg]


MAPS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (fn.square, (range(50),), {}),
    (fn.square, (range(50),), {"chunksize": 7}),
    (operator.add, (range(10), [5, 6, 7]), {}),
    (operator.add, ("abc", iter("def")), {"chunksize": 2}),
    (math.hypot, (range(3), range(3), range(3)), {}),
    (fn.square, ([],), {}),
    (fn.square, ((x for x in range(5)),), {}),
    (fn.pair, ([(1, 2), (3, 4)],), {}),
]


def test_results_of_a_map_that_are_taken_as_soon_as_they_can_be(
    ours: cloud.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = IMapIterator.add

    def add_and_be_slow(results: IMapIterator, backend: Any, jids: range) -> None:
        add(results, backend, jids)
        time.sleep(0.05)  # in which they are taken, and their jobs forgotten

    monkeypatch.setattr(IMapIterator, "add", add_and_be_slow)
    assert list(ours.map(abs, range(30))) == list(range(30))


@pytest.mark.parametrize(("func", "iterables", "options"), MAPS)
def test_map(func: Any, iterables: Any, options: Any, ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    iterables = [each if hasattr(each, "__len__") else list(each) for each in iterables]
    found = [list(executor.map(func, *map(iter, iterables), **options)) for executor in (ours, theirs)]
    assert found[0] == found[1]


def test_map_of_nothing_is_the_same_as_zip_of_nothing(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    assert list(ours.map(fn.square)) == list(theirs.map(fn.square)) == []


RANGES = [range(0), range(7), range(20_000, 0, -3), range(10**20, 10**20 + 200), range(150_000)]


@pytest.mark.parametrize("items", RANGES)
def test_map_of_a_range(items: range, ours: cloud.Executor) -> None:
    expected = [item * item for item in items]
    assert list(ours.map(fn.square, items)) == expected
    # Now it is known how long one takes, and that decides about the size of the blocks.
    assert list(ours.map(fn.square, items)) == list(ours.map(fn.square, list(items))) == expected


def test_a_function_is_pickled_once_for_a_map(ours: cloud.Executor) -> None:
    function = fn.CountsPickles()
    assert list(ours.map(function, range(10_000))) == list(range(10_000))
    assert function.n_pickled == 1


def test_a_failure_in_a_long_map_comes_in_its_place(ours: cloud.Executor) -> None:
    results = ours.map(fn.fail_if_odd, [*range(0, 100_000, 2), 1, *range(0, 100_000, 2)])
    assert [next(results) for _ in range(50_000)] == list(range(0, 100_000, 2))
    with pytest.raises(KeyError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_map_ends_with_the_first_error(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    seen = []
    for executor in (ours, theirs):
        results = executor.map(fn.fail_if_odd, [0, 2, 1, 4])
        seen.append([ended(lambda: next(results)) for _ in range(5)])
    assert seen[0] == seen[1]
    assert seen[0][:2] == [0, 2]
    assert seen[0][2][0] is KeyError
    assert seen[0][3][0] is StopIteration


def test_an_iterable_that_raises_does_so_at_once(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        with pytest.raises(LookupError, match="ends badly"):
            executor.map(fn.square, fn.items_then_error(3))


def test_an_item_that_cannot_be_pickled_fails_in_its_place(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        results = executor.map(fn.pair, [1, threading.Lock(), 3])
        assert next(results) == (1, 1)
        with pytest.raises(TypeError, match="cannot pickle '_thread.lock' object"):
            next(results)


def test_what_stands_beside_such_an_item_runs_once(ours: cloud.Executor, tmp_path: Any) -> None:
    witness = tmp_path / "witness"
    items = [(str(witness), i) for i in range(400)]
    results = ours.map(fn.note_pair, [*items[:300], threading.Lock(), *items[300:]])
    assert [next(results) for _ in range(300)] == list(range(300))
    ours.shutdown()
    lines = witness.read_text().splitlines()
    assert len(lines) == len(set(lines)) >= 300


def test_results_that_are_taken_at_once_do_not_end_the_map(
    ours: cloud.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = IMapIterator.add

    def publish_slowly(self: IMapIterator, backend: Any, jids: range) -> None:
        publish(self, backend, jids)
        time.sleep(0.1)

    monkeypatch.setattr(IMapIterator, "add", publish_slowly)
    monkeypatch.setattr("cloud.pool.feeding._INLINE_S", 0.0)
    assert list(ours.map(fn.square, range(200))) == [number * number for number in range(200)]


def test_what_goes_wrong_while_items_are_submitted_is_raised(
    ours: cloud.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Feed, "_count", lambda *_: 1 / 0)
    monkeypatch.setattr("cloud.pool.feeding._INLINE_S", 0.0)
    with pytest.raises(ZeroDivisionError):
        list(ours.map(fn.square, range(200)))


@pytest.mark.parametrize("chunksize", [0, -1])
def test_chunksize_must_be_positive(chunksize: int, ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    assert ended(lambda: ours.map(abs, [1], chunksize=chunksize)) == ended(
        lambda: theirs.map(abs, [1], chunksize=chunksize)
    )


def test_map_with_a_timeout(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        results = executor.map(time.sleep, [0, 2], timeout=0.5)
        assert next(results) is None
        with pytest.raises(TimeoutError):
            next(results)
        with pytest.raises(StopIteration):
            next(results)


def test_buffersize_reads_no_further_ahead(ours: cloud.Executor) -> None:
    n_read = [0]

    def items() -> Iterator[int]:
        while True:
            n_read[0] += 1
            yield n_read[0]

    results = ours.map(fn.square, items(), buffersize=3)
    assert n_read == [3]
    assert next(results) == 1
    assert n_read == [4]
    assert [next(results) for _ in range(5)] == [4, 9, 16, 25, 36]
    assert n_read == [9]
    for wrong, error in ((0, ValueError), (-1, ValueError), ("3", TypeError)):
        with pytest.raises(error, match="buffersize"):
            ours.map(fn.square, [1], buffersize=wrong)  # type: ignore[arg-type]


def test_iterators_and_workers_hold_on_to_nothing(ours: cloud.Executor) -> None:
    for value in ours.map(fn.make_object, range(5)):
        gone = weakref.ref(value)
        del value
        assert gone() is None
    argument = fn.Plain()
    gone = weakref.ref(argument)
    ours.submit(fn.square, 2).result()
    future = ours.submit(repr, argument)
    del argument
    future.result()
    gc.collect()
    assert gone() is None


# --- states -----------------------------------------------------------------------------------------------------------


def test_the_states_of_a_future(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        running = [executor.submit(time.sleep, 0.6) for _ in range(2)]
        # Theirs sends up to three ahead, which count as running.
        waiting = [executor.submit(time.sleep, 0) for _ in range(6)][-1]
        while not running[0].running():
            time.sleep(0.001)
        assert "state=running" in repr(running[0])
        assert "state=pending" in repr(waiting)
        assert not running[0].cancel()
        assert waiting.cancel()
        assert waiting.cancel()
        assert (waiting.cancelled(), waiting.done(), waiting.running()) == (True, True, False)
        assert "state=cancelled" in repr(waiting)
        for ask in (waiting.result, waiting.exception):
            with pytest.raises(futures.CancelledError):
                ask()
        with pytest.raises(TimeoutError):
            running[0].result(0.01)
        with pytest.raises(TimeoutError):
            running[0].exception(0)
        assert running[0].result(20) is None
        assert "state=finished returned NoneType" in repr(running[0])


def test_a_timeout_is_ours_too(ours: cloud.Executor) -> None:
    future = ours.submit(time.sleep, 0.5)
    with pytest.raises(CloudTimeoutError) as raised:
        future.result(0.01)
    assert raised.value.jid == [future.jid]


def test_a_cancelled_task_does_not_run(ours: cloud.Executor, tmp_path: Any) -> None:
    blocking = [ours.submit(time.sleep, 0.3) for _ in range(2)]
    witness = tmp_path / "witness"
    waiting = [ours.submit(fn.note_pair, (str(witness), i)) for i in range(20)]
    assert all(future.cancel() for future in waiting[1:])
    assert waiting[0].result(20) == 0
    futures.wait(blocking, 20)
    ours.shutdown()
    assert witness.read_text().splitlines() == ["0"]


def test_wait_and_as_completed(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        fast = [executor.submit(fn.fail_if_odd, i) for i in range(4)]
        slow = executor.submit(time.sleep, 1)
        done, not_done = futures.wait([*fast, slow], return_when=futures.FIRST_EXCEPTION)
        assert any(future.exception() for future in done)
        assert slow in not_done
        done, not_done = futures.wait([*fast, slow], timeout=0.3)
        assert (done, not_done) == (set(fast), {slow})
        assert set(futures.as_completed(fast, timeout=0)) == set(fast)
        with pytest.raises(TimeoutError, match=r"1 \(of 5\) futures unfinished"):
            list(futures.as_completed([*fast, slow], timeout=0.01))
        assert len(list(futures.as_completed([*fast, slow, slow], timeout=20))) == 5


def finish_unasked(executor: futures.Executor, *call: Any) -> futures.Future[Any]:
    """A future whose task has ended, and of which nobody has heard."""
    future = executor.submit(*call)
    deadline = time.monotonic() + 20
    while not future.done() and time.monotonic() < deadline:
        time.sleep(0.001)
    return future


def test_what_nobody_asked_for_is_there_at_once(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        future = finish_unasked(executor, fn.square, 3)
        assert futures.wait([future], 0).done == {future}
        assert [each.result(0) for each in futures.as_completed([finish_unasked(executor, fn.square, 3)], 0)] == [9]
        seen: list[Any] = []
        finish_unasked(executor, fn.square, 3).add_done_callback(lambda each: seen.append(each.result(0)))
        assert seen == [9]
        assert finish_unasked(executor, fn.square, 3).result(0) == 9
        assert isinstance(finish_unasked(executor, fn.fail_if_odd, 3).exception(0), KeyError)
        future = finish_unasked(executor, fn.square, 3)
        assert (future.cancel(), future.cancelled(), future.running(), future.result(0)) == (False, False, False, 9)
        assert "state=finished returned int" in repr(finish_unasked(executor, fn.square, 3))


def test_what_nobody_asked_for_outlives_the_workers(ours: cloud.Executor) -> None:
    pending = [ours.submit(fn.fail_if_odd, i) for i in range(1000)]
    ours.shutdown()
    assert [future.result(0) for future in pending[::2]] == list(range(0, 1000, 2))
    assert all(isinstance(future.exception(0), KeyError) for future in pending[1::2])


def test_tasks_that_nobody_asks_for_do_not_gather(ours: cloud.Executor) -> None:
    gone = []
    for _ in range(20):
        gone += [weakref.ref(ours.submit(fn.square, i)) for i in range(100)]
        time.sleep(0.05)
    assert sum(future() is not None for future in gone) < 600


def test_several_threads_rebuild_a_value_once(ours: cloud.Executor) -> None:
    future = ours.submit(fn.RebuiltSlowly, 0.3)
    values: list[Any] = []
    threads = [threading.Thread(target=lambda: values.append(future.result(20))) for _ in range(5)]
    for thread in threads:
        thread.start()
    futures.wait([future], 20)
    for thread in threads:
        thread.join(20)
    assert len(values) == 5
    assert {id(value) for value in values} == {id(future.result())}


def test_an_interrupted_rebuild_is_done_again(ours: cloud.Executor) -> None:
    future = ours.submit(fn.InterruptsOnce, 7)
    with pytest.raises(KeyboardInterrupt):
        future.result(20)
    assert future.result(20) == 7


def test_waiting_for_what_is_just_being_taken(ours: cloud.Executor) -> None:
    for _ in range(300):
        future = ours.submit(fn.square, 3)
        seen: list[Any] = []
        taking = threading.Thread(target=future.result, args=(20,))
        waiting = threading.Thread(target=lambda f=future, s=seen: s.append(futures.wait([f], 20).done))
        calling = threading.Thread(target=future.add_done_callback, args=(seen.append,))
        for thread in (taking, waiting, calling):
            thread.start()
        for thread in (taking, waiting, calling):
            thread.join(20)
        deadline = time.monotonic() + 20
        while len(seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert sorted(map(str, seen)) == sorted([str(future), str({future})])


def test_callbacks_run_once_whoever_ends_a_task(ours: cloud.Executor) -> None:
    seen: list[Any] = []
    pending = [ours.submit(time.sleep, 0.001) for _ in range(200)]
    for future in pending:
        future.add_done_callback(seen.append)
    threads = [threading.Thread(target=lambda part=part: [each.cancel() for each in part]) for part in (pending,) * 2]
    threads.append(threading.Thread(target=futures.wait, args=(pending, 20)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    ours.shutdown()
    assert len(seen) == len(set(seen)) == 200


def test_callbacks(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    for executor in (ours, theirs):
        seen: list[Any] = []
        over = threading.Event()
        future = executor.submit(fn.pid_after, 0.2)

        def fail(future: Any) -> None:
            raise RuntimeError("a callback that raises")

        future.add_done_callback(lambda each: seen.append((1, each is future, each.done())))
        future.add_done_callback(fail)
        future.add_done_callback(lambda each: over.set())
        assert over.wait(20)
        future.add_done_callback(lambda each: seen.append((2, each is future, each.done())))
        future.add_done_callback(fail)
        assert seen == [(1, True, True), (2, True, True)]
        cancelled = [executor.submit(time.sleep, 0.2) for _ in range(6)][-1]
        cancelled.add_done_callback(lambda each: seen.append(each.cancelled()))
        assert cancelled.cancel()
        assert seen[2:] == [True]


def test_a_callback_may_want_a_lock_that_the_waiting_thread_holds(ours: cloud.Executor) -> None:
    lock = threading.Lock()
    over = threading.Event()

    def take(future: Any) -> None:
        with lock:
            over.set()

    with lock:
        future = ours.submit(fn.pid_after, 0.1)
        future.add_done_callback(take)
        assert future.result(20)
        assert not over.is_set()
    assert over.wait(20)


def test_a_callback_may_use_the_executor(ours: cloud.Executor) -> None:
    seen: list[int] = []
    over = threading.Event()

    def again(future: Any) -> None:
        seen.append(ours.submit(fn.square, future.result()).result(20))
        over.set()

    ours.submit(fn.square, 2).add_done_callback(again)
    assert over.wait(20)
    assert seen == [16]


def test_many_threads_may_ask(ours: cloud.Executor) -> None:
    future = ours.submit(fn.pid_after, 0.3)
    impatient = [0]
    values: list[Any] = []

    def ask(timeout: float | None) -> None:
        try:
            values.append(future.result(timeout))
        except TimeoutError:
            impatient[0] += 1

    threads = [threading.Thread(target=ask, args=(timeout,)) for timeout in (0.05, None, 20, 0.1, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert impatient == [2]
    assert values == [future.result()] * 3


def test_asyncio(ours: cloud.Executor, theirs: ProcessPoolExecutor) -> None:
    async def use(executor: futures.Executor) -> list[Any]:
        loop = asyncio.get_running_loop()
        values = await asyncio.gather(*(loop.run_in_executor(executor, fn.square, i) for i in range(20)))
        failed = await asyncio.gather(loop.run_in_executor(executor, fn.fail_if_odd, 1), return_exceptions=True)
        blocking = [loop.run_in_executor(executor, time.sleep, 0.2) for _ in range(6)]
        blocking[-1].cancel()
        rest = await asyncio.gather(*blocking, return_exceptions=True)
        return [*values, *map(type, failed), *map(type, rest)]

    assert asyncio.run(use(ours)) == asyncio.run(use(theirs))


# --- ends -------------------------------------------------------------------------------------------------------------


def test_nothing_is_taken_after_shutdown() -> None:
    for cls in (cloud.Executor, ProcessPoolExecutor):
        executor = cls(1)
        executor.shutdown()
        executor.shutdown(wait=False)
        executor.shutdown()
        for use in (lambda: executor.submit(abs, 1), lambda: list(executor.map(abs, [1]))):
            with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
                use()
        with cls(1) as executor:
            assert executor.submit(abs, -1).result(20) == 1
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(abs, 1)


def test_shutdown_waits_for_all_tasks_and_callbacks(ours: cloud.Executor) -> None:
    seen: list[Any] = []
    pending = [ours.submit(fn.slow_if_zero, i) for i in range(10)]
    results = ours.map(fn.slow_if_zero, range(10))
    pending[0].add_done_callback(lambda future: (time.sleep(0.1), seen.append(future.result())))
    ours.shutdown()
    assert seen == [0]
    assert all(future.done() for future in pending)
    assert list(results) == list(range(10))


def test_shutdown_without_waiting(ours: cloud.Executor) -> None:
    pending = [ours.submit(fn.slow_if_zero, i) for i in range(10)]
    results = ours.map(fn.slow_if_zero, range(10))
    ours.shutdown(wait=False)
    assert [future.result(20) for future in pending] == list(range(10))
    assert list(results) == list(range(10))


def test_shutdown_cancels_what_has_not_begun(ours: cloud.Executor) -> None:
    pending = [ours.submit(time.sleep, 0.2) for _ in range(20)]
    while not pending[0].running():
        time.sleep(0.001)
    ours.shutdown(cancel_futures=True)
    assert all(future.done() for future in pending)
    n = sum(future.cancelled() for future in pending)
    assert 18 <= n < 20
    assert not pending[0].cancelled()


def test_a_forgotten_executor_finishes_its_work(home: Any) -> None:
    executor = cloud.Executor(2)
    pending = [executor.submit(fn.slow_if_zero, i) for i in range(10)]
    results = executor.map(fn.slow_if_zero, range(10))
    del executor
    gc.collect()
    assert [future.result(20) for future in pending] == list(range(10))
    assert list(results) == list(range(10))


@pytest.mark.parametrize(
    "options",
    [
        {"max_workers": 0},
        {"max_workers": -1},
        {"max_tasks_per_child": 0},
        {"max_tasks_per_child": 1.5},
        {"max_tasks_per_child": 1, "mp_context": multiprocessing.get_context("fork")},
        {"initializer": 3},
    ],
    ids=repr,
)
def test_what_is_refused(options: Any) -> None:
    theirs, ours = (ended(lambda: cls(**options)) for cls in (ProcessPoolExecutor, cloud.Executor))
    assert ours[0] is theirs[0]


def test_what_ours_refuses(home: Any) -> None:
    with pytest.raises(TypeError, match="max_workers must be an integer or None, not '2'"):
        cloud.Executor("2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mp_context must be a context"):
        cloud.Executor(2, "fork")
    with pytest.raises(ValueError, match="backend must be"):
        cloud.Executor(2, backend="nowhere")
    with pytest.raises(cloud.CloudException, match="initializer"):
        cloud.Executor(2, backend="mp", initializer=print)


def test_executors_and_futures_cannot_be_pickled(ours: cloud.Executor) -> None:
    future = ours.submit(abs, -1)
    for each in (ours, future):
        with pytest.raises(TypeError, match="cannot be passed between processes"):
            ours.submit(repr, each).result(20)


# --- what is new ------------------------------------------------------------------------------------------------------


def test_info(closed_after: None, ours: cloud.Executor) -> None:
    future = ours.submit(fn.square, 3)
    assert future.result(20) == 9
    assert future.info("status") == {"status": "done"}
    assert future.info()["runtime"] >= 0
    assert future.jid is not None
    # Its workers are its own, and yet it is found.
    assert cloud.info(future.jid) == {future.jid: future.info()}
    unsent = ours.submit(fn.square, threading.Lock())
    assert unsent.jid is None
    with pytest.raises(JobNotFound):
        unsent.info()


def test_jobs_of_forgotten_futures_are_forgotten(ours: cloud.Executor) -> None:
    kept = ours.submit(fn.square, 3)
    for _ in range(2000):
        ours.submit(fn.square, 3).result(20)
    assert kept.info("status") == {"status": "done"}
    assert ours._work is not None
    assert len(ours._work.place.cloud.find()) < 600


@pytest.mark.parametrize("backend", ["current", "mp", "simulator"])
def test_on_another_backend(backend: str, closed_after: None) -> None:
    with cloud.Executor(2, backend=backend) as executor:
        assert list(executor.map(fn.square, range(10))) == [x * x for x in range(10)]
        pending = [executor.submit(fn.square, i) for i in range(10)]
        assert sorted(future.result(20) for future in futures.as_completed(pending, 20)) == [x * x for x in range(10)]
        assert type(executor.submit(fn.fail_if_odd, 1).exception(20)) is KeyError
        if backend != "simulator":
            api = cloud if backend == "current" else cloud.mp
            assert api.info(pending[3].jid, "status") == {pending[3].jid: {"status": "done"}}
    # Its end is not that of the others' jobs.
    assert cloud.result(cloud.call(fn.square, 3)) == 9


def nested(n: int) -> list[int]:
    with cloud.Executor(backend="current") as executor:
        pending = [executor.submit(fn.square, i) for i in range(n)]
        return sorted(future.result() for future in futures.as_completed(pending))


def test_tasks_may_wait_for_tasks_of_the_same_workers(ours: cloud.Executor) -> None:
    assert list(ours.map(nested, [3] * 6)) == [[0, 1, 4]] * 6


def test_importing_it_is_light(run_script: Any) -> None:
    shown = run_script(
        """
        import sys, cloud
        executor = cloud.Executor(2)
        assert executor.submit(abs, -3).result() == 3
        print([name for name in ("multiprocessing", "asyncio", "cloudpickle", "joblib") if name in sys.modules])
        executor.shutdown()
        """
    )
    assert shown.stdout == "[]\n"


def test_closing_the_cloud_under_it_ends_every_wait(closed_after: None) -> None:
    executor = cloud.Executor(backend="mp")
    held = [executor.submit(time.sleep, 60) for _ in range(3)]
    told: list[Any] = []
    held[0].add_done_callback(told.append)
    waiter = threading.Thread(target=futures.wait, args=(held,))
    waiter.start()
    cloud.mp.close()
    waiter.join(20)
    assert not waiter.is_alive()
    for future in held:
        with pytest.raises(BackendClosed):
            future.result(20)
    executor.shutdown()
    assert told == [held[0]]
