"""``cloud.pool.Pool`` beside the real ``multiprocessing.Pool``: the same calls, the same ends."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.pool
import os
import pickle
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cloud
import cloud.pool
import cloud.pool_interface
from cloud.errors import CloudException, CloudTimeoutError
from cloud.pool import Pool
from cloud.serialization.memory import MemoryFile
from tests.dropin import pool_functions as fn

N = 2


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = multiprocessing.get_context("fork").Pool(N)
    with pool:
        yield pool
    pool.join()


@pytest.fixture(scope="module")
def ours() -> Iterator[Pool]:
    with Pool(N) as pool:
        fn.start_all(pool, N)
        pool.apply_async(int, callback=lambda value: None).get()
        yield pool
    pool.join()


@pytest.fixture
def own() -> Iterator[Pool]:
    """A pool of the test's own: what is cancelled in it costs a worker."""
    with Pool(N) as pool:
        yield pool
    pool.join()


def ending(call: Callable[[], Any]) -> Any:
    """The value, or the type and arguments of what was raised."""
    try:
        return call()
    except Exception as exc:
        return type(exc), exc.args


def both(ours: Any, theirs: Any, call: Callable[[Any], Any]) -> Any:
    """How a call ends, which must be the same for both pools."""
    end = ending(lambda: call(ours))
    assert end == ending(lambda: call(theirs))
    return end


# --- values -----------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Any], Any]] = {
    "map of a range": lambda p: p.map(fn.square, range(9_000, 0, -2)),
    "map of an empty range": lambda p: p.map(fn.square, range(0)),
    "imap of a range": lambda p: list(p.imap(fn.square, range(9_000, 0, -2), 7)),
    "imap_unordered of a range": lambda p: sorted(p.imap_unordered(fn.square, range(9_000))),
    "starmap of a range": lambda p: p.starmap(fn.square, range(3)),
    "apply": lambda p: p.apply(fn.describe, (1, "a"), {"key": None}),
    "apply without arguments": lambda p: p.apply(fn.describe),
    "apply with a list of arguments": lambda p: p.apply(fn.describe, [1, 2], {}),
    "apply with options as arguments": lambda p: p.apply(fn.describe, (), {"_label": 1, "_callback": 2}),
    "apply_async": lambda p: p.apply_async(fn.square, (7,)).get(),
    "a builtin": lambda p: p.apply(divmod, (17, 5)),
    "a method": lambda p: p.map("-".join, [["a", "b"], ["c"]]),
    "a class": lambda p: p.map(complex, [1, "2j"]),
    "map": lambda p: p.map(fn.square, range(50)),
    "map of nothing": lambda p: p.map(fn.square, []),
    "map of a generator": lambda p: p.map(fn.square, (i for i in range(20))),
    "map of a dict": lambda p: p.map(fn.pair, {"a": 1, "b": 2}),
    "map of text": lambda p: p.map(fn.pair, "héllo"),
    "map of mixed items": lambda p: p.map(fn.pair, [1, "a", None, [1, [2]], {"k": (1,)}, 1.5, b"x"]),
    "map with chunks": lambda p: p.map(fn.square, range(50), 7),
    "map with one chunk": lambda p: p.map(fn.square, range(5), chunksize=1000),
    "map of large items": lambda p: p.map(len, [b"x" * 1_000_000, "y" * 500_000]),
    "map_async": lambda p: p.map_async(fn.square, range(9), 2).get(),
    "starmap": lambda p: p.starmap(pow, [(2, 5), (3, 2), (10, 3)]),
    "starmap of lists": lambda p: p.starmap(pow, [[2, 5], [3, 2]]),
    "starmap of nothing": lambda p: p.starmap(pow, iter(())),
    "starmap of empty tuples": lambda p: p.starmap(fn.describe, [(), ()]),
    "starmap_async": lambda p: p.starmap_async(pow, zip([2, 3], [5, 2], strict=True), 1).get(),
    "imap": lambda p: list(p.imap(fn.square, range(50))),
    "imap of a generator": lambda p: list(p.imap(fn.square, (i for i in range(50)))),
    "imap with chunks": lambda p: list(p.imap(fn.square, range(50), 7)),
    "imap of nothing": lambda p: list(p.imap(fn.square, [])),
    "imap of slow ones": lambda p: list(p.imap(fn.slow_if_zero, [0, 1, 2, 0, 3])),
    "imap_unordered": lambda p: sorted(p.imap_unordered(fn.square, range(50))),
    "imap_unordered of a generator": lambda p: sorted(p.imap_unordered(fn.square, (i for i in range(50)), 3)),
    "imap_unordered of nothing": lambda p: list(p.imap_unordered(fn.square, iter(()))),
    # What is raised.
    "a task that raises": lambda p: p.apply(fn.fail_if_odd, (3,)),
    "a task that raises, later": lambda p: p.apply_async(fn.fail_if_odd, (3,)).get(10),
    "a map with one that raises": lambda p: p.map(fn.fail_if_odd, [0, 2, 5, 6]),
    "a starmap with one that raises": lambda p: p.starmap(divmod, [(1, 1), (1, 0)]),
    "an imap that begins with one that raises": lambda p: list(p.imap(fn.fail_if_odd, [1, 2])),
    "an imap_unordered with one that raises": lambda p: list(p.imap_unordered(fn.fail_if_odd, [2, 1])),
    "no callable": lambda p: p.apply(42)[0],
    "too many arguments": lambda p: p.apply(fn.square, (1, 2)),
    "a keyword it does not know": lambda p: p.apply(fn.square, (1,), {"y": 2}),
    "no iterable for map": lambda p: p.map(fn.square, 5),
    "no iterable for imap": lambda p: list(p.imap(fn.square, 5)),
    "an iterable that raises": lambda p: p.map(fn.square, fn.items_then_error(3)),
    "an iterable that raises at once": lambda p: p.map_async(fn.square, fn.items_then_error(0)),
    "imap with a chunksize of 0": lambda p: p.imap(fn.square, [1], 0),
    "imap_unordered with a chunksize of -1": lambda p: p.imap_unordered(fn.square, [1], -1),
    "imap without a chunksize": lambda p: ending(lambda: p.imap(fn.square, [1], None))[0],
    "join while it runs": lambda p: p.join(),
    "a pool that is pickled": lambda p: pickle.dumps(p),
    "a pool as an argument": lambda p: p.apply(fn.describe, (p,)),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_ends_as_with_multiprocessing(name: str, ours: Pool, theirs: Any) -> None:
    both(ours, theirs, CALLS[name])


ITEMS = st.lists(st.one_of(st.integers(), st.text(), st.none(), st.lists(st.integers())), max_size=40)
BRIEF = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(items=ITEMS, chunksize=st.one_of(st.none(), st.integers(1, 50)), lazily=st.booleans())
@BRIEF
def test_maps_of_anything(items: list[Any], chunksize: int | None, lazily: bool, ours: Pool, theirs: Any) -> None:
    def given_items() -> Any:
        return (each for each in items) if lazily else items

    assert both(ours, theirs, lambda p: p.map(fn.pair, given_items(), chunksize)) == [(each, each) for each in items]
    both(ours, theirs, lambda p: p.starmap(fn.pair, [(each,) for each in given_items()], chunksize))
    both(ours, theirs, lambda p: list(p.imap(fn.pair, given_items(), chunksize or 1)))
    both(ours, theirs, lambda p: sorted(map(repr, p.imap_unordered(fn.pair, given_items(), chunksize or 1))))


@given(numbers=st.lists(st.integers(0, 9), max_size=20))
@BRIEF
def test_each_item_of_an_imap_ends_by_itself(numbers: list[int], ours: Pool, theirs: Any) -> None:
    def ends(pool: Any) -> list[Any]:
        results = pool.imap(fn.fail_if_odd, numbers)
        found = []
        while (end := ending(lambda: next(results))) != (StopIteration, ()):
            found.append(end)
        return found

    both(ours, theirs, ends)


@pytest.mark.parametrize(("chunksize", "n"), [(1, 0), (1, 5), (2, 7), (4, 7), (10, 3)])
@pytest.mark.parametrize("verb", ["imap", "imap_unordered"])
def test_an_iterable_that_raises_ends_an_imap(verb: str, chunksize: int, n: int, ours: Pool, theirs: Any) -> None:
    def ends(pool: Any) -> list[Any]:
        results = getattr(pool, verb)(fn.square, fn.items_then_error(n), chunksize)
        found = []
        with pytest.raises(LookupError, match="the iterable ends badly"):
            while True:
                found.append(next(results))
        assert ending(lambda: next(results))[0] is StopIteration
        return sorted(found)

    # In what order multiprocessing tells of the error and of the items before it is chance, if order is not asked for.
    if verb == "imap":
        both(ours, theirs, ends)
    else:
        assert ends(ours) == sorted(map(fn.square, range(n - n % chunksize)))


# --- results ----------------------------------------------------------------------------------------------------------


def test_a_result_tells_how_far_it_is(ours: Pool, theirs: Any) -> None:
    for pool in (ours, theirs):
        result = pool.apply_async(time.sleep, (0.2,))
        assert not result.ready()
        with pytest.raises(ValueError, match="not ready"):
            result.successful()
        result.wait(0.01)
        assert not result.ready()
        result.wait()
        assert result.ready()
        assert result.successful()
        assert result.get() is None
        failed = pool.apply_async(fn.fail_if_odd, (1,))
        failed.wait()
        assert failed.ready()
        assert not failed.successful()


def test_a_result_is_the_same_each_time(ours: Pool, theirs: Any) -> None:
    for pool in (ours, theirs):
        result = pool.apply_async(fn.pair, ([],))
        assert result.get() is result.get()
        failed = pool.apply_async(fn.fail_if_odd, (1,))
        errors = []
        for _ in range(2):
            with pytest.raises(KeyError) as raised:
                failed.get()
            errors.append(raised.value)
        assert errors[0] is errors[1]


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_a_wait_that_takes_too_long(timeout: float, ours: Pool, theirs: Any) -> None:
    for pool in (ours, theirs):
        result = pool.apply_async(time.sleep, (0.3,))
        with pytest.raises(multiprocessing.TimeoutError):
            result.get(timeout)
        results = pool.imap(fn.slow_if_zero, [0])
        with pytest.raises(multiprocessing.TimeoutError):
            results.next(timeout=0.01)
        assert results.next(timeout=10) == 0
        unordered = pool.imap_unordered(fn.slow_if_zero, [0])
        with pytest.raises(multiprocessing.TimeoutError):
            unordered.next(0.01)
        assert unordered.next(10) == 0
        assert result.get(10) is None


def test_the_error_of_a_timeout_is_ours_too(ours: Pool) -> None:
    result = ours.apply_async(time.sleep, (0.2,))
    with pytest.raises(CloudTimeoutError) as raised:
        result.get(0.01)
    assert isinstance(raised.value, TimeoutError)
    assert raised.value.jid == [result.jid]
    assert type(pickle.loads(pickle.dumps(raised.value))) is type(raised.value)
    result.get()


def test_callbacks_run_before_a_result_is_ready(ours: Pool, theirs: Any) -> None:
    for pool in (ours, theirs):
        seen: list[Any] = []
        assert (
            pool.apply_async(fn.square, (3,), callback=seen.append, error_callback=lambda _: seen.append("no")).get()
            == 9
        )
        with pytest.raises(KeyError):
            pool.apply_async(fn.fail_if_odd, (3,), {}, lambda _: seen.append("no"), seen.append).get()
        assert pool.map_async(fn.square, [1, 2], callback=seen.append).get() == [1, 4]
        with pytest.raises(KeyError):
            pool.starmap_async(fn.fail_if_odd, [(1,), (2,)], error_callback=seen.append).get()
        assert pool.map_async(fn.square, [], callback=seen.append).get() == []
        assert seen[0] == 9
        assert (type(seen[1]), seen[1].args) == (KeyError, (3, "odd"))
        assert seen[2] == [1, 4]
        assert type(seen[3]) is KeyError
        assert seen[4:] in ([[]], [])  # multiprocessing forgets the callback of an empty map


def test_callbacks_run_on_one_thread(ours: Pool) -> None:
    threads: set[threading.Thread] = set()
    results = [
        ours.apply_async(fn.square, (i,), callback=lambda _: threads.add(threading.current_thread())) for i in range(20)
    ]
    assert [result.get() for result in results] == [i * i for i in range(20)]
    assert len(threads) == 1
    assert threads != {threading.main_thread()}


def test_an_imap_reads_ahead_unasked(ours: Pool, theirs: Any, tmp_path: Any) -> None:
    for pool in (ours, theirs):
        read = threading.Event()

        def items(read: threading.Event = read) -> Iterator[int]:
            yield from range(3)
            read.set()

        results = pool.imap(fn.square, items())
        assert read.wait(10)
        assert list(results) == [0, 1, 4]


def test_an_imap_gives_each_result_as_soon_as_it_is_there(ours: Pool, theirs: Any) -> None:
    for pool in (ours, theirs):
        more = threading.Event()

        def items(more: threading.Event = more) -> Iterator[int]:
            yield 1
            assert more.wait(10)
            yield 2

        for verb in ("imap", "imap_unordered"):
            more.clear()
            results = getattr(pool, verb)(fn.square, items())
            assert results.next(10) == 1
            more.set()
            assert list(results) == [4]


def test_an_endless_iterable(ours: Pool) -> None:
    def count() -> Iterator[int]:
        i = 0
        while not stop:
            yield i
            i += 1

    stop: list[int] = []
    results = ours.imap(fn.square, count())
    unordered = ours.imap_unordered(fn.square, count())
    assert [next(results) for _ in range(1000)] == [i * i for i in range(1000)]
    assert len({next(unordered) for _ in range(1000)}) == 1000
    stop.append(1)
    assert sum(1 for _ in results) < 100_000
    assert sum(1 for _ in unordered) < 100_000


def test_results_come_in_the_order_in_which_tasks_end(ours: Pool) -> None:
    assert list(ours.imap_unordered(fn.slow_if_zero, [0, 1, 2])) == [1, 2, 0]


def test_many_threads_use_one_pool(ours: Pool) -> None:
    found: dict[int, Any] = {}

    def use(number: int) -> None:
        found[number] = (
            ours.apply(fn.square, (number,)),
            ours.map(fn.square, range(number)),
            list(ours.imap(fn.square, range(number))),
            sorted(ours.imap_unordered(fn.square, range(number))),
        )

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, values in found.items():
        squares = [i * i for i in range(number)]
        assert values == (number * number, squares, squares, squares)
    assert len(found) == 8


def test_threads_share_an_iterator(ours: Pool) -> None:
    for results in (ours.imap(fn.square, range(2000)), ours.imap_unordered(fn.square, iter(range(2000)))):
        found: list[int] = []
        threads = [threading.Thread(target=lambda results=results: found.extend(results)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [i * i for i in range(2000)]


def test_results_nobody_asks_for_are_forgotten(ours: Pool) -> None:
    for _ in range(10):
        for _ in range(300):
            ours.apply_async(fn.square, (1,))
        ours.apply(fn.square, (1,))
    kept = [ours.apply_async(fn.square, (i,)) for i in range(600)]
    assert [result.get() for result in kept] == [i * i for i in range(600)]
    ours.imap(fn.square, range(100))
    gc.collect()
    ours.map(fn.square, range(10))
    left = ours._place.cloud.find()
    assert len(left) < 1200


def test_a_task_that_has_ended_keeps_no_memory_for_its_function() -> None:
    with Pool(1) as ours:  # one of its own, which gives back what it keeps of the last functions
        for number in range(40):
            array = np.full(1 << 17, float(number))
            assert ours.apply(lambda array=array: float(array[-1])) == number
            assert ours.apply_async(array.max).get() == number
        assert MemoryFile.n_open[0] < 20


# --- exceptions -------------------------------------------------------------------------------------------------------


def test_an_exception_brings_its_traceback(ours: Pool, theirs: Any) -> None:
    for pool in (ours, theirs):
        with pytest.raises(fn.Chained) as raised:
            pool.apply(fn.raise_chained)
        cause = raised.value.__cause__
        assert type(cause) is multiprocessing.pool.RemoteTraceback
        for text in (str(cause), cause.tb):  # type: ignore[attr-defined]
            assert "Traceback (most recent call last)" in text
            assert "in raise_chained" in text
            assert "OSError" in text
        assert raised.value.when == 42


def test_what_cannot_be_pickled_raises_what_pickling_raised(own: Pool, theirs: Any) -> None:
    for argument in (threading.Lock(), (i for i in [1]), multiprocessing.Lock()):
        for call in (
            lambda p, argument=argument: p.apply(fn.describe, (argument,)),
            lambda p, argument=argument: p.map(fn.describe, [1, argument]),
            lambda p, argument=argument: list(p.imap(fn.describe, [argument])),
        ):
            with pytest.raises((TypeError, RuntimeError)) as wanted:
                call(theirs)
            with pytest.raises(wanted.type) as raised:
                call(own)
            assert "cannot be pickled" in "".join(getattr(raised.value, "__notes__", []))
    seen: list[BaseException] = []
    with pytest.raises(TypeError):
        own.apply_async(fn.describe, (threading.Lock(),), error_callback=seen.append).get()
    assert type(seen[0]) is TypeError


def test_one_item_that_cannot_be_pickled_costs_itself(ours: Pool, theirs: Any) -> None:
    items = [1, 2, threading.Lock(), 4]

    def ends(pool: Any) -> list[str]:
        results = pool.imap(fn.describe, items)
        found = []
        for _ in items:
            end = ending(lambda: next(results))
            found.append(end if isinstance(end, str) else end[0].__name__)
        return found

    assert both(ours, theirs, ends)[2] == "TypeError"
    assert sorted(map(str, ours.imap_unordered(fn.describe, [1, 2]))) == ["(1,) []", "(2,) []"]


def test_a_result_that_cannot_be_pickled(ours: Pool, theirs: Any) -> None:
    for pool in (ours, theirs):
        with pytest.raises(multiprocessing.pool.MaybeEncodingError) as raised:
            pool.apply(threading.Lock)
        assert "cannot pickle" in raised.value.exc
        assert raised.value.value
    with pytest.raises(CloudException):
        ours.apply(threading.Lock)


# --- states -----------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Any], Any]] = {
    "apply": lambda p: p.apply(fn.square, (1,)),
    "apply_async": lambda p: p.apply_async(fn.square, (1,)),
    "map": lambda p: p.map(fn.square, [1]),
    "map_async": lambda p: p.map_async(fn.square, [1]),
    "starmap": lambda p: p.starmap(fn.square, [(1,)]),
    "starmap_async": lambda p: p.starmap_async(fn.square, [(1,)]),
    "imap": lambda p: p.imap(fn.square, [1]),
    "imap_unordered": lambda p: p.imap_unordered(fn.square, [1]),
    "with": lambda p: p.__enter__(),
}

ENDS: dict[str, list[str]] = {
    "closed": ["close"],
    "closed twice": ["close", "close"],
    "joined": ["close", "join"],
    "joined twice": ["close", "join", "join"],
    "terminated": ["terminate"],
    "terminated twice": ["terminate", "terminate", "join"],
    "closed, then terminated": ["close", "terminate", "join"],
    "terminated, then closed": ["terminate", "close", "join"],
}


@pytest.mark.parametrize("end", ENDS)
def test_an_ended_pool_takes_no_tasks(end: str) -> None:
    pools = (Pool(1), multiprocessing.get_context("fork").Pool(1))
    assert pools[0].apply(fn.square, (2,)) == pools[1].apply(fn.square, (2,))
    for pool in pools:
        for verb in ENDS[end]:
            getattr(pool, verb)()
    for use in USES.values():
        assert both(*pools, use) == (ValueError, ("Pool not running",))
    shown = [re.sub(r"[\w.]+Pool", "Pool", repr(pool)) for pool in pools]
    assert shown[0] == shown[1]
    for pool in pools:
        pool.terminate()
        pool.join()


def test_results_outlive_a_closed_pool() -> None:
    for pool in (Pool(N), multiprocessing.get_context("fork").Pool(N)):
        results = [pool.apply_async(fn.slow_if_zero, (i % 3,)) for i in range(6)]
        mapped = pool.map_async(fn.square, range(5))
        iterated = pool.imap(fn.square, (i for i in range(5)))
        unordered = pool.imap_unordered(fn.square, range(5))
        seen: list[int] = []
        pool.apply_async(fn.square, (9,), callback=seen.append)
        pool.close()
        pool.join()
        assert seen == [81]
        assert [result.get() for result in results] == [0, 1, 2, 0, 1, 2]
        assert mapped.get() == list(iterated) == sorted(unordered) == [0, 1, 4, 9, 16]
        if isinstance(pool, Pool):
            assert all(result.ready() and result.successful() for result in results)


def test_a_with_block_terminates() -> None:
    for pool in (Pool(1), multiprocessing.get_context("fork").Pool(1)):
        with pool as same:
            assert same is pool
            pool.apply_async(time.sleep, (60,))
        pool.join()


def test_repr_and_warning() -> None:
    pool = Pool(3)
    assert repr(pool) == "<cloud.pool.pool.Pool state=RUN pool_size=3>"
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool <cloud.pool.pool.Pool state=RUN"):
        del pool
        gc.collect()


WRONG: dict[str, Callable[[Any], Any]] = {
    "no processes": lambda make: make(0),
    "less than no processes": lambda make: make(-2),
    "an initializer that is none": lambda make: make(1, initializer=3),
    "no task per child": lambda make: make(1, maxtasksperchild=0),
    "less than no task per child": lambda make: make(1, maxtasksperchild=-1),
    "half a task per child": lambda make: make(1, maxtasksperchild=0.5),
    "text for tasks per child": lambda make: make(1, maxtasksperchild="2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    assert both(Pool, multiprocessing.Pool, WRONG[name])[0] in (ValueError, TypeError)


def test_wrong_arguments_that_multiprocessing_lets_through() -> None:
    with pytest.raises(TypeError, match="processes must be an integer, not 1.5"):
        Pool(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="context must be"):
        Pool(1, context="fork")
    with pytest.raises(ValueError, match="backend must be"):
        Pool(1, backend="ray")
    with Pool(1) as pool, pytest.raises(ValueError, match=re.escape("Chunksize must be 1+, not 0")):
        pool.map(fn.square, [1, 2], 0)


def test_one_worker_a_core() -> None:
    with Pool() as pool:
        assert f"pool_size={len(os.sched_getaffinity(0))}" in repr(pool)


# --- on other backends, and PiCloud's functions -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mp", "simulator", "current"])
def test_a_pool_on_another_backend(backend: str, closed_after: None, theirs: Any) -> None:
    with Pool(2, backend=backend) as pool:
        for name in CALLS:
            if "join" not in name:
                both(pool, theirs, CALLS[name])
        seen: list[int] = []
        assert pool.apply_async(fn.square, (3,), callback=seen.append).get() == 9
        assert seen == [9]
        with pytest.raises(CloudException, match="no workers of its own"):
            Pool(2, fn.remember, backend=backend)
    pool.join()
    with pytest.raises(ValueError, match="Pool not running"):
        pool.apply(fn.square, (3,))


def test_threads_that_tidy_up_at_once_take_no_result_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.pool.open_tasks._MIN_ASKED", 1)
    monkeypatch.setattr("cloud.pool.open_tasks._MIN_OPEN", 4)
    wrong: list[Any] = []

    def call(pool: Any, first: int) -> None:
        try:
            wrong.extend(n for n in range(first, first + 300) if pool.apply(fn.square, (n,)) != n * n)
        except Exception as exc:
            wrong.append(exc)

    with Pool(2) as pool:
        threads = [threading.Thread(target=call, args=(pool, 300 * k)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_terminating_a_shared_pool_kills_its_tasks_only(closed_after: None) -> None:
    import cloud.mp

    pool = Pool(backend="mp")
    result = pool.apply_async(time.sleep, (60,))
    iterated = pool.imap(time.sleep, [60])
    other = cloud.mp.call(fn.square, 5)
    pool.terminate()
    pool.join()
    for get in (result.get, iterated.next):
        with pytest.raises(CloudException):
            get()
    assert cloud.mp.result(other) == 25


def test_the_functions_run_on_the_current_cloud(closed_after: None) -> None:
    assert cloud.pool_interface.__all__ == cloud.pool.__all__
    for api in (cloud.pool, cloud.pool_interface):
        assert api.apply(fn.square, (3,)) == 9
        assert api.map(fn.square, range(5)) == list(api.imap(fn.square, range(5))) == [0, 1, 4, 9, 16]
        assert list(api.imap_unordered(fn.square, range(5), chunksize=2)) == [0, 1, 4, 9, 16]
        assert api.map_async(fn.square, range(3)).get(10) == [0, 1, 4]
        called = threading.Event()
        jids: list[int] = []

        def callback(jid: int, called: threading.Event = called, jids: list[int] = jids) -> None:
            jids.append(jid)
            called.set()

        result = api.apply_async(fn.slow_if_zero, (0,), callback)
        assert not result.ready()
        with pytest.raises(AssertionError):
            result.successful()
        with pytest.raises(CloudTimeoutError):
            result.get(0.01)
        result.wait(0.01)
        result.wait()
        assert result.ready()
        assert result.successful()
        assert called.wait(10)
        assert cloud.result(jids) == [0]
        failed = api.apply_async(fn.fail_if_odd, (1,))
        failed.wait()
        assert not failed.successful()
        with pytest.raises(CloudException, match="odd"):
            failed.get()
        assert api.AsyncResult(cloud.call(fn.square, 4)).get() == 16
        with contextlib.suppress(StopIteration):
            next(api.imap(fn.square, []))
