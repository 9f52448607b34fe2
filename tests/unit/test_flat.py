"""Pickles of builtin values and numpy's: which values they take, and that what comes back is what went."""

from __future__ import annotations

import pickle
import sys
import threading
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.serialization import flat
from cloud.serialization.flat import CONTAINERS, pickle_each, pickle_flat, pickle_together

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
    return found if found is None or isinstance(found, bytes) else b"".join(found)


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
        np.array([None, 1]),
        np.zeros(3, dtype=[("a", "i4")]),
        np.zeros(3, dtype=">i4"),
        np.zeros(3, dtype="M8[s]"),
        np.zeros(3, dtype=np.dtype("i4", metadata={"unit": "m"})),
        np.zeros((4, 4))[:, ::2],
        np.ma.zeros(3),
        np.zeros(100_000),
        np.str_("text"),
        np.longdouble(1),
        np.dtype("i4"),
        np.datetime64("2026-11-22"),
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


def test_one_that_refused_something_is_used_again_unless_it_took_much_before() -> None:
    flat._idle.clear()
    assert pickle_flat([["text"], Own]) is None
    assert len(flat._idle) == 1
    assert content(["little"]) == pickle.dumps(["little"], 5)
    assert pickle_flat([*range(1000), *map(str, range(1000)), Own]) is None
    assert not flat._idle


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


DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4), (2, 0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_as_they_were(dtype: str, shape: tuple[int, ...], order: Any) -> None:
    array = np.asarray(np.random.default_rng(1).integers(0, 2, shape), dtype=dtype, order=order)
    packed = content(array)
    assert packed is not None
    back = pickle.loads(packed)
    assert type(back) is np.ndarray
    assert back.dtype is array.dtype
    assert back.shape == array.shape
    assert back.flags.c_contiguous == array.flags.c_contiguous
    assert back.flags.f_contiguous == array.flags.f_contiguous
    assert back.flags.writeable
    assert np.array_equal(back, array)


def test_an_array_that_cannot_be_written_comes_back_so_as_with_plain_pickle() -> None:
    array = np.arange(5)
    array.flags.writeable = False
    packed = content([array])
    assert packed is not None
    assert pickle.loads(packed)[0].flags.writeable is pickle.loads(pickle.dumps(array, 5)).flags.writeable is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_come_back_as_they_were(dtype: str) -> None:
    kind = np.dtype(dtype).type
    for value in (0, 1, *((-0.0, 0.1, float("inf")) if dtype.startswith("float") else ())):
        number = kind(value)
        packed = content([number])
        assert packed is not None
        [back] = pickle.loads(packed)
        assert type(back) is kind
        assert back.tobytes() == number.tobytes()


def test_the_same_array_stays_the_same_and_views_are_copies() -> None:
    array = np.arange(6)
    packed = content([array, array, array[:3]])
    assert packed is not None
    one, other, view = pickle.loads(packed)
    assert one is other
    one[0] = 9
    assert view[0] == 0


def test_who_says_how_arrays_are_pickled_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import copyreg

    assert pickle_flat([np.arange(3)]) is not None
    monkeypatch.setitem(copyreg.dispatch_table, np.ndarray, lambda array: (list, ()))
    assert pickle_flat([np.arange(3)]) is None


@given(st.lists(st.lists(VALUES)))
def test_many_are_pickled_as_each_is_by_itself(values: list[Any]) -> None:
    assert pickle_each(values) == [content(value) for value in values]


def test_many_end_before_the_first_that_is_not_flat_or_is_large() -> None:
    little = [[1], ["text"], {"a": np.arange(2)}]
    for other in ([Own()], [bytes(100_000)], [str(number) for number in range(10_000)]):
        pickles = pickle_each([*little, other, [2]])
        assert pickles == [content(value) for value in little]
    assert pickle_each([]) == []
    assert Own.asked == 0


@given(st.lists(st.one_of(ATOMS, VALUES), max_size=20))
def test_together_each_is_as_by_itself(values: list[Any]) -> None:
    found = pickle_together(values, 1 << 20)
    # An object that occurs twice may be in two values.
    if found is not None:
        assert pickle.loads(found) == values


@given(st.randoms(use_true_random=False))
def test_what_two_values_refer_to_is_not_pickled_together(random: Random) -> None:
    made: list[Any] = [1, "text", np.float64(0.5)]
    for _ in range(random.randint(1, 12)):
        inner = random.choices(made, k=random.randint(0, 3))
        keys = [each for each in inner if isinstance(each, int | str)]
        makers: list[Callable[[], Any]] = [
            lambda inner=inner: inner,
            lambda inner=inner: tuple(inner),
            lambda inner=inner: dict(enumerate(inner)),
            lambda keys=keys: set(keys),
            lambda: np.arange(2),
        ]
        made.append(random.choice(makers)())
    values = random.choices(made, k=random.randint(1, 5))
    found = pickle_together(values, 1 << 20)
    if found is None:
        return
    seen: set[int] = set()
    loaded = pickle.loads(found)
    for value in loaded:
        own = set(map(id, _changeable(value)))
        assert seen.isdisjoint(own)
        seen |= own


def _changeable(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict | set | np.ndarray):
        yield value
    if isinstance(value, tuple | list):
        for each in value:
            yield from _changeable(each)
    if isinstance(value, dict):
        for each in value.values():
            yield from _changeable(each)


def test_records_and_arrays_are_pickled_together_and_what_is_not_flat_or_large_is_not() -> None:
    values = [{"a": [1, (2, [3])], "b": {4}}, [np.arange(3)], (np.float64(1), ["c"])]
    found = pickle_together(values, 1000)
    assert found is not None
    assert str(pickle.loads(found)) == str(values)
    assert pickle_together(values, 50) is None
    assert pickle_together([*values, [bytes(1 << 17)]], 1 << 17) is None
    assert pickle_together([*values, Own()], 1000) is None
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert pickle_together([deep], 1 << 20) is None
    looped: list[Any] = []
    looped.append(looped)
    assert pickle_together([looped], 1000) is None
    assert Own.asked == 0


def test_what_is_immutable_may_be_in_many_and_is_looked_at_once() -> None:
    row = tuple(range(500))
    for _ in range(4):
        row = (row,) * 500
    scalar = np.float64(0.5)
    values = [{"cube": row, "scale": scalar, "number": number} for number in range(3)]
    found = pickle_together(values, 1 << 18)
    assert found is not None
    assert pickle.loads(found)[2]["number"] == 2
    with_list = (1, ([],))
    assert pickle_together([[with_list], [with_list]], 1 << 18) is None
    assert pickle_together([[with_list], [(1, ([],))]], 1 << 18) is not None
    array = np.arange(3)
    assert pickle_together([[array], (array,)], 1 << 18) is None


def test_what_is_not_builtin_or_cannot_be_told_is_not_pickled_together() -> None:
    class Changing(dict):  # type: ignore[type-arg]
        pass

    assert pickle_together([Changing()], 1000) is None
    weird = type("Weird", (type,), {"__hash__": lambda cls: 1 // 0})("Weird", (), {})
    assert pickle_together([[weird()]], 1000) is None


def test_nothing_is_shared_between_many() -> None:
    inner = [1]
    one, other = (pickle.loads(each) for each in pickle_each([[inner], [inner]]))
    one[0].append(2)
    assert other == [[1]]
