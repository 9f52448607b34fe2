"""Functions that captured large arrays: sent again only if something has changed, and whatever has changed is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cloud.serialization import pickling
from cloud.serialization.functions import FunctionCache
from cloud.serialization.shared import SHARE_BYTES, SharedBytes

N = SHARE_BYTES // 8 + 100_000
"""Elements of an array that travels beside its function, and is compared in several parts."""


def over(array: Any, other: Any = None) -> Any:
    def function(index: int) -> Any:
        return array[index], other

    return function


@pytest.fixture
def cache() -> Iterator[FunctionCache]:
    made = FunctionCache()
    yield made
    made._large.clear()


def test_an_unchanged_array_is_sent_once(cache: FunctionCache) -> None:
    function = over(np.arange(N))
    sent = cache.get(function, None)
    assert isinstance(sent.payload, SharedBytes)
    assert cache.get(function, None) is sent


@pytest.mark.parametrize("index", [0, 1, N // 2, N - 1])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_change_anywhere_is_noticed(cache: FunctionCache, index: int, read_only: bool) -> None:
    array = np.arange(N)
    array.flags.writeable = not read_only
    function = over(array)
    before = cache.get(function, None)
    if read_only:
        # Nothing of it is compared for as long as it is read-only; as soon as it is not, all is.
        array.flags.writeable = True
    array[index] = -1
    after = cache.get(function, None)
    assert after is not before
    assert pickling.loads(after.payload)(index) == (-1, None)
    assert pickling.loads(before.payload)(index) == (index, None)
    assert cache.get(function, None) is after


def test_a_read_only_view_of_an_array_that_is_not_is_compared(cache: FunctionCache) -> None:
    array = np.arange(N)
    view = array[:]
    view.flags.writeable = False
    function = over(view)
    before = cache.get(function, None)
    assert cache.get(function, None) is before
    array[3] = -1
    assert pickling.loads(cache.get(function, None).payload)(3) == (-1, None)


def test_another_array_of_the_same_size_in_its_place(cache: FunctionCache) -> None:
    first, second = np.zeros(N), np.ones(N)
    for array in (first, second):
        array.flags.writeable = False
    function = over(first)
    before = cache.get(function, None)
    function.__closure__[0].cell_contents = second
    assert cache.get(function, None) is not before
    function.__closure__[0].cell_contents = np.zeros(N)
    assert pickling.loads(cache.get(function, None).payload)(0) == (0.0, None)


def test_something_small_beside_it_that_changes(cache: FunctionCache) -> None:
    beside: list[int] = []
    function = over(np.zeros(N), beside)
    before = cache.get(function, None)
    beside.append(1)
    assert pickling.loads(cache.get(function, None).payload)(0) == (0.0, [1])
    assert pickling.loads(before.payload)(0) == (0.0, [])


def test_another_shape_or_type_of_the_same_bytes(cache: FunctionCache) -> None:
    array = np.zeros(N)
    function = over(array)
    cache.get(function, None)
    function.__closure__[0].cell_contents = array.reshape(2, -1)
    assert pickling.loads(cache.get(function, None).payload)(0)[0].shape == (N // 2,)
    function.__closure__[0].cell_contents = array.view(np.int64)
    assert pickling.loads(cache.get(function, None).payload)(0)[0].dtype == np.int64


def test_jobs_get_copies_of_their_own() -> None:
    import cloud.mp

    array = np.zeros(N)

    def add_one(index: int) -> float:
        array[index] += 1
        return float(array[index])

    assert cloud.mp.result([cloud.mp.call(add_one, 5) for _ in range(6)]) == [1.0] * 6
    assert array[5] == 0
    cloud.mp.close()
