"""Results that lie in a job's arguments: sent as they lie there, and out of reach of who keeps the arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cloud.engine.worker.in_place import InPlace
from cloud.serialization import memory, pickling
from cloud.serialization.memory import MemoryFile
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import SHARE_BYTES, SharedBytes

N = SHARE_BYTES // 8 + 100
FUNCTION = 7


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = MemoryFile.n_open[0], memory._Mapping.n_open[0]
    yield
    assert (MemoryFile.n_open[0], memory._Mapping.n_open[0]) == before


def sent(*arrays: Any) -> SharedBytes:
    payload = pickling.dumps((arrays, {}), Namespace({}), share=True)
    assert isinstance(payload, SharedBytes)
    return payload


def run(in_place: InPlace, payload: SharedBytes, function: Callable[..., Any]) -> SharedBytes:
    """What a worker does with a job; the result as it is sent."""
    args, _ = pickling.loads(in_place.given(FUNCTION, payload))
    result = pickling.dumps_result(function(*args), Namespace({}), share=True, in_place=in_place.segment_of)
    del args
    in_place.end()
    assert isinstance(result, SharedBytes)
    return result


def file_of(payload: SharedBytes) -> MemoryFile:
    assert payload.segment.file is not None
    return payload.segment.file


def double(array: Any, *_: Any) -> Any:
    array *= 2
    return array


def numbers(n: int = N) -> Any:
    return np.arange(n, dtype=np.float64)


@pytest.fixture
def learned() -> InPlace:
    """One that has seen a job return what it was given."""
    in_place = InPlace()
    run(in_place, sent(numbers()), double)
    return in_place


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was written into files."""
    found: list[int] = []
    write = MemoryFile.write

    def counted(self: MemoryFile, content: memoryview, offset: int) -> int:
        found.append(content.nbytes)
        return write(self, content, offset)

    monkeypatch.setattr(MemoryFile, "write", counted)
    return found


def test_the_second_result_of_a_function_is_not_copied(copies: list[int]) -> None:
    in_place = InPlace()
    for n_copies in (1, 0, 0):
        payload = sent(numbers())
        copies.clear()
        result = run(in_place, payload, double)
        assert len(copies) == n_copies
        assert np.array_equal(pickling.loads(result), 2 * numbers())
        assert np.array_equal(pickling.loads(payload)[0][0], numbers()), "a second attempt gets what was sent"


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: b,
        lambda a, b: a[: len(a) - 10],
        lambda a, b: (a, b),
        lambda a, b: [b, a],
        lambda a, b: a[10:],
        lambda a, b: a[::2],
        lambda a, b: (a, a),
        lambda a, b: a.reshape(2, -1).T,
        lambda a, b: (a, np.ones(N)),
        lambda a, b: np.ones(N),
        lambda a, b: (a[:N], a[1:]),
    ],
)
def test_whatever_is_returned_is_what_arrives(learned: InPlace, function: Callable[..., Any]) -> None:
    arrays = numbers(2 * N), -numbers(2 * N)
    arrived = pickling.loads(run(learned, sent(*arrays), function))
    expected = function(*arrays)
    assert type(arrived) is type(expected)
    for one, other in zip(arrived, expected, strict=True):
        assert np.array_equal(one, other)
    if not isinstance(arrived, np.ndarray):
        arrived = arrived[0]
    arrived += 1


def test_a_part_that_is_most_of_what_was_given_is_not_copied(learned: InPlace, copies: list[int]) -> None:
    payload = sent(numbers(4 * N))
    copies.clear()
    result = run(learned, payload, lambda array: double(array)[N:])
    assert not copies
    assert np.array_equal(pickling.loads(result), 2 * numbers(4 * N)[N:])


def test_a_small_part_does_not_keep_all_of_it(learned: InPlace) -> None:
    result = run(learned, sent(numbers(4 * N)), lambda array: array[:N])
    assert os.fstat(file_of(result).fd).st_size < 16 * N


class Wiping:
    """Has an array, and wipes it as it is forgotten."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __del__(self) -> None:
        self.array[:] = -1

    def __reduce__(self) -> Any:
        return Wiping, (self.array,)


def test_what_finalizers_write_is_in_no_result(learned: InPlace) -> None:
    result = run(learned, sent(numbers()), lambda array: Wiping(double(array)))
    assert np.array_equal(pickling.loads(result).array, 2 * numbers())


def test_what_cannot_be_frozen_is_copied(learned: InPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(memory, "map_privately", refuse)
    payload = sent(numbers())
    result = run(learned, payload, double)
    assert np.array_equal(pickling.loads(result), 2 * numbers())


def test_who_returned_little_gets_much_without_a_copy(learned: InPlace) -> None:
    for n, copied in ((4, True), (8 * 5, False)):
        payload = sent(numbers(n * N))
        assert (learned.given(FUNCTION, payload) is not payload) is copied
        run(learned, payload, double)
        learned.forget(FUNCTION)
        run(learned, sent(numbers()), double)


def test_functions_that_nobody_knows_again_teach_nothing() -> None:
    in_place = InPlace()
    for _ in range(2):
        payload = sent(numbers())
        args, _ = pickling.loads(in_place.given(0, payload))
        pickling.dumps_result(double(*args), Namespace({}), share=True, in_place=in_place.segment_of)
        del args
        in_place.end()
    assert in_place.given(0, payload) is payload
    in_place.end()


def test_who_keeps_the_arguments_changes_no_result(learned: InPlace, copies: list[int]) -> None:
    kept = []

    def keep(array: Any) -> Any:
        kept.append(array)
        return double(array)

    payload = sent(numbers())
    copies.clear()
    result = run(learned, payload, keep)
    assert not copies
    arrived = pickling.loads(result)
    kept[0] += 1000
    assert np.array_equal(arrived, 2 * numbers())
    assert np.array_equal(kept[0], 2 * numbers() + 1000)
    arrived -= 5
    assert np.array_equal(pickling.loads(result), 2 * numbers())


def test_a_child_changes_no_result(learned: InPlace) -> None:
    def fork(array: Any) -> Any:
        array += 1
        child = os.fork()
        if not child:
            array[:] = 0
            os._exit(0)
        os.waitpid(child, 0)
        return double(array)

    for _ in range(2):
        assert np.array_equal(pickling.loads(run(learned, sent(numbers()), fork)), 2 * (numbers() + 1))


def test_a_function_that_no_longer_returns_it_gets_it_without_a_copy_again(learned: InPlace) -> None:
    def given_file(in_place: InPlace) -> bool:
        payload = sent(numbers())
        given = in_place.given(FUNCTION, payload)
        in_place.end()
        return file_of(given) is file_of(payload)

    run(learned, sent(numbers()), lambda array: array + 1)
    assert given_file(learned)


def test_another_function_under_the_same_number_begins_anew(learned: InPlace) -> None:
    learned.forget(FUNCTION)
    payload = sent(numbers())
    assert learned.given(FUNCTION, payload) is payload
    learned.end()


def test_without_memory_for_a_copy_it_goes_without(learned: InPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError

    monkeypatch.setattr(os, "copy_file_range", refuse)
    payload = sent(numbers())
    assert np.array_equal(pickling.loads(run(learned, payload, double)), 2 * numbers())
    assert np.array_equal(pickling.loads(payload)[0][0], numbers())


def test_without_ctypes_it_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "has_addresses", lambda: False)
    in_place = InPlace()
    for _ in range(2):
        assert np.array_equal(pickling.loads(run(in_place, sent(numbers()), double)), 2 * numbers())


def always() -> bool:
    return True


def test_memory_for_the_next_copy_is_there_already(learned: InPlace) -> None:
    assert not learned.is_prepared, "nobody has asked"
    learned.prepare(always)
    assert learned._spare.file is not None
    inode = os.fstat(learned._spare.file.fd).st_ino
    payload = sent(numbers())
    result = run(learned, payload, double)
    assert os.fstat(file_of(result).fd).st_ino == inode
    assert np.array_equal(pickling.loads(result), 2 * numbers())
    assert np.array_equal(pickling.loads(payload)[0][0], numbers())
    assert not learned.is_prepared


@pytest.mark.parametrize("n", [N - 50, 3 * N])
def test_memory_that_was_got_for_another_length_will_do(learned: InPlace, n: int) -> None:
    for _ in range(2):
        learned.prepare(always)
        result = run(learned, sent(numbers(n)), double)
        assert np.array_equal(pickling.loads(result), 2 * numbers(n))
        assert os.fstat(file_of(result).fd).st_size == result.segment.n_bytes


def test_no_memory_is_got_for_who_returns_something_else(learned: InPlace) -> None:
    run(learned, sent(numbers()), lambda array: array + 1)
    learned.prepare(always)
    assert not learned.is_prepared


def test_no_memory_is_got_after_a_small_job(learned: InPlace) -> None:
    learned.end()
    learned.prepare(always)
    assert not learned.is_prepared


def test_getting_memory_ends_when_there_is_something_to_do(learned: InPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.serialization.spare._PART_BYTES", 4096)
    left = iter([True, True, False])
    learned.prepare(lambda: next(left))
    assert learned._spare.file is not None
    assert os.fstat(learned._spare.file.fd).st_size == 2 * 4096
    result = run(learned, sent(numbers()), double)
    assert np.array_equal(pickling.loads(result), 2 * numbers())


def test_memory_is_given_back_when_nothing_comes(learned: InPlace) -> None:
    before = MemoryFile.n_open[0]
    learned.prepare(always)
    assert MemoryFile.n_open[0] == before + 1
    learned.give_back()
    assert not learned.is_prepared
    assert MemoryFile.n_open[0] == before


def test_where_there_is_no_more_memory_it_goes_without(learned: InPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    learned.prepare(always)
    assert not learned.is_prepared
    assert np.array_equal(pickling.loads(run(learned, sent(numbers()), double)), 2 * numbers())
