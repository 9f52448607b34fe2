"""What can be sent and what comes back: every kind of callable and value, always by value."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import itertools
import math
import operator
import os.path
import pathlib
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from cloud.errors import JobFailed, SerializationError
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.jobs import FailsToDump, FailsToLoad, Gate, Point


def once(api: ModuleType, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return api.result(api.call(function, *args, **kwargs))


# --- callables --------------------------------------------------------------------------------------------------------


def test_recursive_and_mutually_recursive_local_functions(api: ModuleType) -> None:
    def factorial(n: int) -> int:
        return 1 if n == 0 else n * factorial(n - 1)

    def is_even(n: int) -> bool:
        return n == 0 or is_odd(n - 1)

    def is_odd(n: int) -> bool:
        return n != 0 and is_even(n - 1)

    assert once(api, factorial, 20) == math.factorial(20)
    assert [once(api, is_even, 10), once(api, is_odd, 10)] == [True, False]
    assert api.result(api.map(is_odd, range(4))) == [False, True, False, True]


def test_nested_closures_and_defaults(api: ModuleType) -> None:
    def outer(a: int) -> Callable[..., Any]:
        def middle(b: int, *, c: int = 3) -> Callable[..., Any]:
            def inner(d: int = 4, *args: int, **kwargs: int) -> tuple[Any, ...]:
                return a, b, c, d, args, kwargs

            return inner

        return middle(2)

    assert once(api, outer(1), 5, 6, e=7) == (1, 2, 3, 5, (6,), {"e": 7})
    assert once(api, lambda x=[1], *, y={"k": 2}: (x, y)) == ([1], {"k": 2})


def test_functions_keep_what_belongs_to_them(api: ModuleType) -> None:
    def documented(x: int) -> str:
        """The docstring."""
        return f"{documented.__doc__} {documented.note} {documented.__name__} {documented.__annotations__['x']}"  # type: ignore[attr-defined]

    documented.note = "noted"  # type: ignore[attr-defined]
    assert once(api, documented, 1) == "The docstring. noted documented int"


def test_decorated_functions(api: ModuleType) -> None:
    def doubling(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return 2 * function(*args)

        return wrapper

    @doubling
    @functools.lru_cache
    def cached(x: int) -> int:
        return x + 1

    @functools.cache
    def fibonacci(n: int) -> int:
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    assert once(api, cached, 1) == 4
    assert api.result(api.map(cached, [1, 1, 2])) == [4, 4, 6]
    assert once(api, fibonacci, 80) == 23416728348467685


def test_methods_of_every_kind(api: ModuleType) -> None:
    point = Point(2, 3)
    assert once(api, point.scaled, 2) == Point(4, 6)
    assert once(api, Point.scaled, point, 3) == Point(6, 9)
    assert once(api, Point.origin) == Point(0, 0)
    assert once(api, point.origin) == Point(0, 0)
    assert once(api, Point.norm, 3, 4) == 25
    assert once(api, point, 5) == 10
    assert once(api, Point, 1, y=2) == Point(1, 2)
    assert once(api, super(Point, point).__getattribute__, "x") == 2


def test_builtins_partials_and_operators(api: ModuleType) -> None:
    for function, args, expected in (
        (len, ("abc",), 3),
        (dict, ([(1, 2)],), {1: 2}),
        (int, ("ff", 16), 255),
        ("a,b".split, (",",), ["a", "b"]),
        ([3, 1].__getitem__, (0,), 3),
        (str.upper, ("x",), "X"),
        (dict.fromkeys, ("ab",), {"a": None, "b": None}),
        (operator.itemgetter(1), ("xy",), "y"),
        (operator.attrgetter("x"), (Point(8),), 8),
        (operator.methodcaller("scaled", 2), (Point(1),), Point(2)),
        (functools.partial(sample.add, b=5), (1,), 6),
        (functools.partial(functools.partial(jobs.two, 1), 2), (), (1, 2)),
        (functools.partial(lambda a, b: a - b, 10), (3,), 7),
        (functools.reduce, (operator.mul, [2, 3, 4]), 24),
        (math.sqrt, (9,), 3.0),
        (np.add, (np.arange(2), 1), None),
        (np.float64, (2,), 2.0),
        (type, (1,), int),
    ):
        found = once(api, function, *args)
        assert np.array_equal(found, [1, 2]) if function is np.add else found == expected, function


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_made_at_run_time(api: ModuleType) -> None:
    class Base:
        n = 1

        def value(self) -> int:
            return self.n

    class Child(Base):
        __slots__ = ("extra",)

        def __init__(self, extra: int = 0) -> None:
            self.extra = extra

        def value(self) -> int:
            return super().value() + self.extra

        @property
        def twice(self) -> int:
            return 2 * self.value()

        @classmethod
        def made(cls, extra: int) -> Child:
            return cls(extra)

        @staticmethod
        def fixed() -> str:
            return "fixed"

    made = type("Made", (Child,), {"n": 10, "__module__": __name__})
    assert once(api, Child(4).value) == 5
    assert once(api, lambda each: each.twice, Child(4)) == 10
    assert once(api, Child.made, 2).value() == 3
    assert once(api, Child.fixed) == "fixed"
    assert once(api, made, 1).value() == 11
    back = once(api, sample.identity, Child(7))
    assert type(back) is Child
    assert back.extra == 7
    assert once(api, sample.identity, Child) is Child
    assert [type(each) for each in api.result(api.map(Child, range(3)))] == [Child] * 3


def test_run_time_records_and_enums(api: ModuleType) -> None:
    class Color(enum.Enum):
        RED = 1
        BLUE = "b"

    class Flags(enum.Flag):
        A = enum.auto()
        B = enum.auto()

    class Pair(NamedTuple):
        a: int
        b: int = 2

    @dataclasses.dataclass(frozen=True)
    class Record:
        x: int
        ys: list[int] = dataclasses.field(default_factory=list)

    Row = collections.namedtuple("Row", "c d")
    assert once(api, sample.identity, Color.RED) is Color.RED
    assert once(api, lambda color: color is Color.BLUE, Color.BLUE) is True
    assert once(api, sample.identity, Flags.A | Flags.B) == Flags.A | Flags.B
    assert once(api, Pair, 1) == Pair(1)
    assert type(once(api, Pair, 1)) is Pair
    assert once(api, Record, 1, ys=[2]) == Record(1, [2])
    assert once(api, lambda row: row._replace(c=5), Row(1, 2)) == Row(5, 2)


def test_a_class_that_refers_to_itself(api: ModuleType) -> None:
    class Node:
        made: list[Node] = []

        def __init__(self, parent: Node | None = None) -> None:
            self.parent = parent
            self.children: list[Node] = []
            if parent is not None:
                parent.children.append(self)

        def root(self) -> Node:
            return self if self.parent is None else Node.root(self.parent)

    root = Node()
    leaf = Node(Node(root))
    back = once(api, sample.identity, leaf)
    assert type(back) is Node
    assert back.root().children[0].children[0] is back
    assert once(api, lambda node: len(node.root().children), leaf) == 1


# --- values -----------------------------------------------------------------------------------------------------------

VALUES = [
    2**200,
    -0.0,
    1 + 2j,
    "ünïcode \0 \U0001f600",
    bytearray(b"ab"),
    frozenset({1, 2}),
    {"a": [1, {2: (3,)}]},
    range(3, 10, 2),
    slice(1, None, 2),
    NotImplemented,
    datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    datetime.timedelta(seconds=3),
    decimal.Decimal("1.10"),
    fractions.Fraction(1, 3),
    uuid.UUID(int=5),
    pathlib.PurePosixPath("a/b"),
    re.compile("a+", re.IGNORECASE),
    collections.OrderedDict(a=1),
    collections.defaultdict(list, a=[1]),
    collections.Counter("aab"),
    collections.deque([1, 2], maxlen=2),
    SimpleNamespace(a=1),
    ValueError("a value, not raised", 3),
    Point(1, 2),
    int,
    os.path,
    len,
    jobs.returns,
    Point.origin,
    np.int16(3),
    np.datetime64("2020-01-02"),
]


def test_values_go_and_come_back(api: ModuleType) -> None:
    for value in VALUES:
        for found in (once(api, sample.identity, value), api.result(api.map(sample.identity, [[value], 0]))[0][0]):
            assert (type(found), repr(found)) == (type(value), repr(value))
            assert found == value or isinstance(value, ValueError)


def test_arrays_go_and_come_back(api: ModuleType) -> None:
    for array in (
        np.arange(6).reshape(2, 3),
        np.zeros(0),
        np.array(["a", "b"]),
        np.arange(200_000.0)[::2],
        np.array(3),
    ):
        found = once(api, sample.identity, array)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
        assert found.flags.writeable


@pytest.mark.parametrize("n_bytes", [1 << 10, (1 << 16) - 8, 1 << 16, 100_000, (1 << 18) - 8, 1 << 18, 1 << 20])
def test_arrays_of_any_size_and_order_go_and_come_back(api: ModuleType, n_bytes: int) -> None:
    array = np.arange(n_bytes // 8, dtype=np.int64)
    plain, columns, every_other = array, np.asfortranarray(array[: n_bytes // 64 * 8].reshape(-1, 8)), array[::2]
    large = np.ones(100_000)
    for value in (plain, columns, every_other, [plain, large], {"a": columns, "b": b"x" * n_bytes}, bytearray(n_bytes)):
        jids = [api.call(sample.identity, value), *api.map(sample.identity, [value, value])]
        jids.append(api.call(lambda value=value: value))
        for found in api.result(jids):
            assert type(found) is type(value)
            for one, other in zip(_parts(found), _parts(value), strict=True):
                assert one == other if isinstance(one, bytes | bytearray) else np.array_equal(one, other)


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]


def test_identity_within_one_call_is_kept(api: ModuleType) -> None:
    shared: list[Any] = []
    shared.append(shared)
    found = once(api, lambda a, b, *, c: [a, b, c, a is b, b is c, a[0] is a], shared, shared, c=shared)
    assert found[3:] == [True, True, True]
    assert found[0] is found[1] is found[2] is found[0][0]


def test_functions_and_modules_are_values(api: ModuleType) -> None:
    k = 3
    made = once(api, lambda n: lambda x: x * n * k, 2)
    assert made(5) == 30
    assert once(api, lambda function, *args: function(*args), lambda x: x + k, 4) == 7
    assert once(api, lambda module: module.sqrt(16), math) == 4.0
    assert once(api, lambda: itertools.islice) is itertools.islice
    assert api.result(api.map(lambda function: function(10), [lambda x: x + 1, abs, lambda x: x - k])) == [11, 10, 7]


# --- by value ---------------------------------------------------------------------------------------------------------

module_level = ["as imported"]


def test_later_changes_reach_later_submissions_only(api: ModuleType, one_slot: None, gate: Gate) -> None:
    api.call(gate.hold)
    gate.await_begun()
    captured, n, attributes = [0], 1, SimpleNamespace(v=0)

    def look(argument: Any, default: list[int] = [0]) -> tuple[Any, ...]:  # noqa: B006
        return list(captured), n, attributes.v, argument.v, list(default), list(module_level)

    def submit() -> list[int]:
        return [api.call(look, attributes), *api.map(look, [attributes] * 2)]

    expected, submitted = [], []
    try:
        for step in range(3):
            expected += [look(attributes)] * 3
            submitted += submit()
            captured.append(step)
            n += 1
            attributes.v += 1
            look.__defaults__[0].append(step)  # type: ignore[index]
            module_level.append(str(step))
        gate.open()
        assert api.result(submitted) == expected
    finally:
        del module_level[1:]


def test_a_function_s_code_may_be_replaced(api: ModuleType) -> None:
    def helper() -> int:
        return 1

    def uses() -> int:
        return helper()

    assert once(api, uses) == 1
    helper.__code__ = (lambda: 2).__code__
    assert once(api, uses) == 2
    uses.__code__ = (lambda: 3).__code__.replace(co_freevars=uses.__code__.co_freevars)
    assert once(api, uses) == 3


def test_a_job_changes_nothing_here(api: ModuleType) -> None:
    captured = [1]

    def change(argument: list[int]) -> list[int]:
        captured.append(2)
        argument.append(3)
        return captured + argument

    given = [0]
    assert once(api, change, given) == [1, 2, 0, 3]
    assert (captured, given) == ([1], [0])
    assert once(api, change, given) == [1, 2, 0, 3]


def test_an_array_that_jobs_change_and_keep_comes_back_as_it_was_when_they_ended(api: ModuleType) -> None:
    array = np.arange(60_000.0)

    def change(array: Any, n: int) -> Any:
        change.__dict__.setdefault("kept", []).append(array)
        for each in change.__dict__["kept"]:
            each += n
        return array

    found = [once(api, change, array, n) for n in range(1, 4)]
    found += api.result(api.map(change, [array] * 3, [7] * 3))
    for result, n in zip(found, (1, 2, 3, 7, 7, 7), strict=True):
        assert np.array_equal(result, array + n)
        result -= 1000
    assert np.array_equal(array, np.arange(60_000.0))


# --- what cannot be sent ----------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_pickled_are_named(api: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        for args, kwargs, text in (
            ((FailsToDump(),), {}, r"argument 1.*FailsToDump"),
            ((1, [2, {"k": (3, FailsToDump())}]), {}, r"argument 2\[1\]\['k'\]\[1\] is .*FailsToDump"),
            ((), {"x": SimpleNamespace(file=file)}, r"argument 'x'.file is _io.TextIOWrapper"),
            ((x for x in "ab"), {}, r"argument 1.*generator"),
            ((lambda: file,), {}, r"argument 1 -> closure variable 'file'"),
        ):
            args = args if isinstance(args, tuple) else (args,)
            with pytest.raises(SerializationError, match=text):
                api.call(sample.keywords, *args, **kwargs)
    assert api.find() == []


def test_a_function_that_cannot_be_pickled_is_named(api: ModuleType) -> None:
    stuck = FailsToDump()
    for submit in (
        lambda: api.call(lambda: stuck),
        lambda: api.map(lambda x: stuck, [1]),
        lambda: api.starmap(lambda x: stuck, [(1,)]),
    ):
        with pytest.raises(SerializationError, match=r"the function cannot be pickled.* closure variable 'stuck'"):
            submit()
    assert api.find() == []


def test_what_cannot_be_loaded_is_an_error_of_its_job(api: ModuleType) -> None:
    failing = FailsToLoad("cannot be loaded")
    for jid in (
        api.call(sample.identity, failing),
        api.call(failing),
        api.call(lambda: failing),
        api.map(sample.identity, [failing])[0],
        api.map(lambda x: failing, [1])[0],
    ):
        with pytest.raises(JobFailed, match="ValueError: cannot be loaded") as caught:
            api.result(jid, timeout=10)
        assert isinstance(caught.value.__cause__, ValueError)
    assert api.result(api.map(sample.identity, [1, failing, 2]), ignore_errors=True)[::2] == [1, 2]


def test_a_result_that_cannot_be_loaded_here_is_an_error_of_the_reader(api: ModuleType) -> None:
    bad, good = api.call(sample.ununpicklable_result), api.call(sample.square, 3)
    for get in (lambda: api.result(bad), lambda: api.result([good, bad]), lambda: next(api.iresult(bad))):
        with pytest.raises(
            SerializationError, match=r"cannot be rebuilt here \(ValueError: while unpickling\)"
        ) as caught:
            get()
        assert (caught.value.jid, caught.value.status) == (bad, "done")
        assert str(caught.value.__cause__) == "while unpickling"
    assert api.status(bad) == "done"
    found = api.result([bad, good], ignore_errors=True)
    assert (type(found[0]), found[1]) == (SerializationError, 9)
    assert [value for _, value in api.iresult_unordered([good])] == [9]


def test_what_is_too_large_is_refused(api: ModuleType, configure: Callable[..., None]) -> None:
    configure(max_transmit_data=10_000)
    big = b"x" * 20_000
    for submit in (
        lambda: api.call(sample.size, big),
        lambda: api.map(sample.size, [b"", big]),
        lambda: api.call(lambda: big),
        lambda: api.call(sample.keywords, k=big),
    ):
        with pytest.raises(
            SerializationError, match=r"^Excessive data \(\d+ bytes\) transmitted.*10000 bytes"
        ) as caught:
            submit()
        assert (caught.value.size_bytes > 20_000, caught.value.limit_bytes) == (True, 10_000)  # type: ignore[attr-defined]
    assert api.find() == []
    with pytest.raises(JobFailed, match=r"Excessive data \(\d+ bytes\) transmitted: the result") as failed:
        api.result(api.call(sample.big, 20_000))
    assert isinstance(failed.value.__cause__, SerializationError)
    assert once(api, sample.big, 5_000) == b"x" * 5_000
    with pytest.raises(JobFailed, match="Excessive data"):
        api.result(api.map(sample.big, [1, 20_000]))
