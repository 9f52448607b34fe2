"""Pickles of builtin values: which values they take, and that they are those of plain pickle."""

from __future__ import annotations

import pickle
import sys
import threading
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.serialization import flat
from cloud.serialization.flat import CONTAINERS, pickle_flat

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS, inner)
        | st.lists(inner).map(tuple)
        | st.sets(KEYS)
        | st.frozensets(KEYS)
        | st.binary().map(bytearray)
    ),
)
Pair = namedtuple("Pair", "a b")


def content(obj: Any) -> bytes | None:
    found = pickle_flat(obj)
    return None if found is None else b"".join(found)


@given(st.tuples(VALUES, VALUES))
def test_builtin_values_come_back_as_they_were(value: Any) -> None:
    packed = content(value)
    assert packed is not None
    assert pickle.loads(packed) == value


class Own:
    """Counts how often anything asks how it is pickled."""

    asked = 0

    def __reduce__(self) -> Any:
        Own.asked += 1
        return Own, ()


@pytest.mark.parametrize(
    "inner",
    [
        Own(),
        Own,
        len,
        lambda: 0,
        np.zeros(3),
        np.float64(1),
        1j,
        range(3),
        Pair(1, 2),
        OrderedDict(),
        defaultdict(list),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_and_not_asked(inner: Any) -> None:
    for value in ((inner,), [1, [inner]], {"a": {"b": inner}}, [0, "text" * 1000, inner]):
        assert type(value) in CONTAINERS
        assert pickle_flat(value) is None
    assert Own.asked == 0
    assert content((1, 2)) == pickle.dumps((1, 2), 5)


def test_what_is_the_same_stays_the_same() -> None:
    inner = [1]
    value: list[Any] = [inner, inner]
    value.append(value)
    packed = content(value)
    assert packed is not None
    back = pickle.loads(packed)
    assert back[0] is back[1]
    assert back[2] is back


def test_nothing_of_a_value_is_kept() -> None:
    inner = bytes(100)
    for _ in range(3):
        assert pickle_flat([inner]) is not None
        assert pickle_flat([inner, Own]) is None
    assert sys.getrefcount(inner) == 2


def test_one_that_took_much_is_not_used_again() -> None:
    flat._idle.clear()
    assert pickle_flat([str(number) for number in range(100_000)]) is not None
    assert not flat._idle
    assert pickle_flat(["little"]) is not None
    assert len(flat._idle) == 1


def test_deeper_than_the_stack_is_refused() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert pickle_flat(value) is None
    while value:
        value = value.pop()


def test_threads_do_not_meet() -> None:
    wrong: list[Any] = []

    def work(number: int) -> None:
        for _ in range(2000):
            packed = content([number] * 50)
            if packed is None or pickle.loads(packed) != [number] * 50:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
