"""Functions made again and again with other values in them: each arrives with its own, and with nothing of another's."""

from __future__ import annotations

import gc
import importlib
import math
import sys
import threading
import weakref
import wsgiref
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.serialization import pickling
from cloud.serialization.functions import Function, FunctionCache
from cloud.serialization.namespace import Namespace
from tests import sample_functions as sample

ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)

COUNT = 0
SCALE = 10
LISTED = [1]


class Counted:
    """Has a method, and can be called."""

    def count(self) -> int:
        return 1

    def __call__(self) -> int:
        return 2


def over(value: Any) -> Callable[[], Any]:
    return lambda: value


def with_default(value: Any) -> Callable[..., Any]:
    return lambda x=value: x


def scaled(value: int) -> Callable[[], Any]:
    return lambda: (SCALE, math.sqrt(value), sample.__name__)


def listed(value: int) -> Callable[[], Any]:
    return lambda: (LISTED, value)


def counting(value: int) -> Callable[[], Any]:
    def function() -> int:
        global COUNT
        COUNT += value
        return COUNT

    return function


def rebinding(value: int) -> Callable[[], Any]:
    def function() -> int:
        nonlocal value
        value += 1
        return value

    return function


def parsed(value: int) -> Callable[[], Any]:
    return lambda: (wsgiref.headers, value)


MAIN = """
SCALE = 10
def helper(x):
    return x * SCALE
def over(value):
    return lambda: (helper(value), SCALE)
def rebinding(value):
    def function():
        nonlocal value
        value += 1
        return value
    return function
def named(x=1):
    return x
"""


@pytest.fixture
def cache() -> FunctionCache:
    return FunctionCache()


@pytest.fixture
def program() -> Namespace:
    """Where the functions of a program are made."""
    made = namespace()
    exec(MAIN, made.variables)
    return made


def namespace() -> Namespace:
    return Namespace({"__builtins__": __builtins__, "__name__": "__main__"})


def is_variant(function: Function) -> bool:
    return function.payload[:1] == b"V"


def sent(cache: FunctionCache, functions: list[Any], program: Namespace | None = None) -> tuple[list[bool], list[Any]]:
    """Which of them went as variants, and what they give in one worker."""
    worker = namespace()
    made = [cache.get(function, program) for function in functions]
    return [is_variant(each) for each in made], [pickling.loads(each.payload, worker)() for each in made]


@pytest.mark.parametrize("make", [over, with_default])
@given(first=VALUES, values=st.lists(VALUES, min_size=1, max_size=4))
def test_each_has_its_own_values(make: Callable[[Any], Any], first: Any, values: list[Any]) -> None:
    _, found = sent(FunctionCache(), [make(value) for value in (first, *values)])
    assert [repr(each) for each in found] == [repr(value) for value in (first, *values)]


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1, True), (1, 1.0), ((0.0,), (-0.0,)), ("", b"")])
def test_equal_values_are_not_taken_for_the_same(cache: FunctionCache, one: Any, other: Any) -> None:
    functions = [over(one), over(other), over(one), over(other)]
    assert [repr(each) for each in sent(cache, functions)[1]] == [repr(one), repr(other)] * 2


def test_functions_of_modules_are_variants_of_the_first(cache: FunctionCache) -> None:
    variants, found = sent(cache, [scaled(n) for n in (1, 4, 9)])
    assert variants == [False, True, True]
    assert found == [(10, n, "tests.sample_functions") for n in (1, 2, 3)]


def test_functions_of_the_program_are_variants_of_the_first(cache: FunctionCache, program: Namespace) -> None:
    variants, found = sent(cache, [program.variables["over"](n) for n in (1, 2, 3)], program)
    assert variants == [False, True, True]
    assert found == [(10, 10), (20, 10), (30, 10)]


def test_what_is_sent_again_is_not_packed_again(cache: FunctionCache) -> None:
    functions = [over(1), over(2)]
    payloads = [cache.get(functions[at], None).payload for at in (0, 1, 1, 1)]
    assert payloads[1] is payloads[2] is payloads[3]


def test_workers_keep_only_what_is_sent_again(cache: FunctionCache, program: Namespace) -> None:
    one, other = program.variables["over"](1), program.variables["over"](2)
    made = [cache.get(function, program) for function in (one, other, other, other)]
    assert [each.reusable for each in made] == [True, False, True, True]
    assert made[2] is made[3]


def test_jobs_of_variants_are_expected_to_take_as_long(cache: FunctionCache) -> None:
    first = cache.get(over(1), None)
    second = cache.get(over(2), None)
    second.took(0.25, 1)
    assert (first.mean_s, cache.get(over(3), None).mean_s) == (0.25, 0.25)


def test_jobs_of_the_same_code_are_expected_to_take_as_long(cache: FunctionCache) -> None:
    held: list[int] = []
    kinds: list[Callable[[], Any]] = [
        lambda: lambda: held,
        lambda: partial(over(held), 1),
        lambda: held.append,
        lambda: Counted().count,
        lambda: Counted(),
    ]
    for seconds, kind in enumerate(kinds, 1):
        first = cache.get(kind(), None)
        assert first.mean_s == 0.0
        first.took(seconds, 1)
        again = cache.get(kind(), None)
        assert again is not first
        assert (again.mean_s, again.name) == (seconds, first.name)


def test_what_is_known_of_code_keeps_none_of_it_alive(cache: FunctionCache) -> None:
    variables: dict[str, Any] = {"__name__": "__main__"}
    exec("class Kind:\n def __call__(self): pass\ndef function(x=[1]): pass", variables)
    cache.get(variables["Kind"](), None)
    cache.get(variables["function"], None)
    left = [weakref.ref(variables["Kind"]), weakref.ref(variables["function"].__code__)]
    variables.clear()
    gc.collect()
    assert [each() for each in left] == [None, None]


def test_what_is_known_of_code_keeps_no_bytes_alive(cache: FunctionCache) -> None:
    payload = cache.get(partial(print, [bytes(10_000)]), None).payload
    assert len(payload) > 10_000
    assert sys.getrefcount(payload) == 2


# --- what else may differ ---------------------------------------------------------------------------------------------


def renamed(function: Any) -> None:
    function.__name__ = "renamed"


def moved(function: Any) -> None:
    function.__module__ = "elsewhere"


def documented(function: Any) -> None:
    function.__doc__ = "Another."


def annotated(function: Any) -> None:
    function.__annotations__ = {"return": 2}


def requalified(function: Any) -> None:
    function.__qualname__ = "other.<locals>.<lambda>"


def attributed(function: Any) -> None:
    function.note = "noted"


def with_keyword_defaults(function: Any) -> None:
    function.__kwdefaults__ = {"x": 1}


@pytest.mark.parametrize(
    "change", [renamed, moved, documented, annotated, requalified, attributed, with_keyword_defaults]
)
@pytest.mark.parametrize("value", [1, 2])
def test_what_else_differs_is_noticed(cache: FunctionCache, change: Callable[[Any], None], value: int) -> None:
    def parts(function: Any) -> tuple[Any, ...]:
        own = (function.__name__, function.__module__, function.__doc__, function.__qualname__, function.__dict__)
        return *own, function.__annotations__, function.__kwdefaults__, function()

    plain, changed = [over(n) for n in (0, 1)], over(value)
    change(changed)
    worker = namespace()
    for function in (*plain, changed, over(value)):
        assert parts(pickling.loads(cache.get(function, None).payload, worker)) == parts(function)


@pytest.mark.parametrize("change", [renamed, moved, documented, annotated, requalified])
def test_what_all_variants_have_arrives(cache: FunctionCache, change: Callable[[Any], None]) -> None:
    functions = [over(n) for n in range(3)]
    for function in functions:
        change(function)
    made = [cache.get(function, None) for function in functions]
    found = pickling.loads(made[2].payload, namespace())
    assert is_variant(made[2])
    for name in ("__name__", "__module__", "__doc__", "__annotations__", "__qualname__"):
        assert getattr(found, name) == getattr(functions[2], name)


def test_annotations_arrive_and_are_each_functions_own(cache: FunctionCache) -> None:
    def make(value: int) -> Callable[[int], int]:
        def function(x: int) -> int:
            return x + value

        return function

    worker = namespace()
    made = [cache.get(make(n), None) for n in range(3)]
    found = [pickling.loads(each.payload, worker) for each in made]
    found[1].__annotations__["x"] = "changed"
    assert is_variant(made[2])
    assert found[2].__annotations__ == make(0).__annotations__


def itself() -> Callable[[int], Any]:
    def function(n: int = 3) -> Any:
        return function(n - 1) if n else "end"

    return function


def test_cells_with_other_things_travel_as_ever(cache: FunctionCache) -> None:
    cell = [1]
    functions = [over(0), over(1), over(cell), over(len), over(over(5)), over(2)]
    variants, found = sent(cache, functions)
    assert variants == [False, True, False, False, False, True]
    assert found[2] == [1]
    assert found[2] is not cell
    assert (found[3], found[4](), found[5]) == (len, 5, 2)
    assert sent(cache, [itself(), itself()]) == ([False, False], ["end", "end"])


def test_an_empty_cell_stays_empty(cache: FunctionCache) -> None:
    def make(*, empty: bool) -> Callable[[], Any]:
        value = 1
        function = lambda: value  # noqa: E731
        if empty:
            del value
        return function

    made = [cache.get(make(empty=empty), None) for empty in (False, True)]
    with pytest.raises(NameError):
        pickling.loads(made[1].payload, namespace())()


def test_a_list_in_a_closure_is_taken_as_it_is_then(cache: FunctionCache) -> None:
    cell = [1]
    function = over(cell)
    payloads = [cache.get(function, None).payload]
    cell.append(2)
    payloads.append(cache.get(function, None).payload)
    assert [pickling.loads(each, namespace())() for each in payloads] == [[1], [1, 2]]


# --- globals ----------------------------------------------------------------------------------------------------------


def test_a_changed_global_of_a_module_is_noticed(cache: FunctionCache, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [cache.get(scaled(n), None) for n in (1, 4)]
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 11)
    made += [cache.get(scaled(n), None) for n in (1, 4)]
    worker = namespace()
    assert [pickling.loads(each.payload, worker)()[0] for each in made] == [10, 10, 11, 11]


def test_a_list_among_the_globals_of_a_module_is_taken_as_it_is_then(
    cache: FunctionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LISTED", [1])
    made = [cache.get(listed(1), None), cache.get(listed(2), None)]
    LISTED.append(2)
    made.append(cache.get(listed(3), None))
    assert [pickling.loads(each.payload, namespace())()[0] for each in made] == [[1], [1], [1, 2]]


def test_what_is_registered_to_travel_by_value_may_change(
    cache: FunctionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(sample)
    try:
        assert sent(cache, [scaled(1), scaled(4)])[0] == [False, False]
    finally:
        cloudpickle.unregister_pickle_by_value(sample)


def test_globals_of_a_module_begin_anew_for_each_job(cache: FunctionCache) -> None:
    worker = namespace()
    made = [cache.get(counting(n), None) for n in (1, 2, 3)]
    assert [is_variant(each) for each in made] == [False, True, True]
    assert not any(each.reusable for each in made)
    assert [pickling.loads(each.payload, worker)() for each in (*made, *made)] == [1, 2, 3, 1, 2, 3]
    assert COUNT == 0


def test_submodules_imported_since_are_imported_there_too(
    cache: FunctionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wsgiref.headers", raising=False)
    before = [cache.get(parsed(n), None) for n in (1, 2)]
    importlib.import_module("wsgiref.headers")

    after = [cache.get(parsed(n), None) for n in (3, 4)]
    assert [b"wsgiref.headers" in each.payload for each in (*before, *after)] == [False, False, True, True]


def test_a_helper_defined_anew_is_noticed_and_so_is_its_return(cache: FunctionCache, program: Namespace) -> None:
    variables, made = program.variables, []
    helper = variables["helper"]
    for n in (1, 2):
        made.append(cache.get(variables["over"](n), program))
    exec("def helper(x):\n    return -x\n", variables)
    for n in (3, 4):
        made.append(cache.get(variables["over"](n), program))
    variables["helper"] = helper
    for n in (5, 6):
        made.append(cache.get(variables["over"](n), program))
    worker = namespace()
    assert [is_variant(each) for each in made] == [False, True] * 3
    assert [pickling.loads(each.payload, worker)()[0] for each in made] == [10, 20, -3, -4, 50, 60]
    # What variants are made from is there from before, and the worker has had other definitions since.
    assert [pickling.loads(made[at].payload, worker)()[0] for at in (1, 3, 1)] == [20, -4, 20]


def test_a_global_that_a_job_has_set_stays_for_variants(cache: FunctionCache, program: Namespace) -> None:
    worker = namespace()
    made = [cache.get(program.variables["over"](n), program) for n in (1, 2, 3)]
    for each in made[:2]:
        pickling.loads(each.payload, worker)()
    worker.variables["SCALE"] = 7
    assert pickling.loads(made[2].payload, worker)() == (21, 7)


def test_namespaces_of_one_process_are_kept_apart(cache: FunctionCache, program: Namespace) -> None:
    made = [cache.get(program.variables["over"](n), program) for n in (1, 2)]
    workers = [namespace(), namespace()]
    found = [pickling.loads(made[1].payload, worker) for worker in workers]
    assert [each.__globals__ is worker.variables for each, worker in zip(found, workers, strict=True)] == [True, True]


def test_a_function_found_by_its_name_travels_as_a_name(cache: FunctionCache, program: Namespace) -> None:
    named = program.variables["named"]
    cache.get(named, program)
    named.__defaults__ = (2,)
    made = cache.get(named, program)
    worker = namespace()
    assert pickling.loads(made.payload, worker) is worker.variables["named"]
    assert worker.variables["named"]() == 2


def test_a_function_that_rebinds_its_variables_begins_anew_for_each_job(
    cache: FunctionCache, program: Namespace
) -> None:
    for make in (rebinding, program.variables["rebinding"]):
        function = make(0)
        assert [cache.get(function, program).reusable for _ in range(3)] == [False] * 3
        assert sent(cache, [function, make(5), make(5)], program)[1] == [1, 6, 6]


# --- bounds -----------------------------------------------------------------------------------------------------------


def many(n: int) -> list[FunctionType]:
    """Functions of as many codes."""
    variables: dict[str, Any] = {"__name__": "tests.made"}
    lines = [f"def make_{k}(value):\n    return lambda: (value, {k})" for k in range(n)]
    exec("\n".join(lines), variables)
    return [variables[f"make_{k}"] for k in range(n)]


def test_bases_are_kept_up_to_a_number(cache: FunctionCache) -> None:
    worker = namespace()
    makers = many(200)
    for make in makers:
        cache.get(make(0), None)
    for k, make in enumerate(makers):
        assert pickling.loads(cache.get(make(1), None).payload, worker)() == (1, k)
    assert 0 < len(worker.bases) <= 64


def test_large_bases_are_not_kept(cache: FunctionCache) -> None:
    variables: dict[str, Any] = {"__name__": "tests.made", "TEXT": "x" * (1 << 20)}
    exec("def make(value):\n    return lambda: (value, len(TEXT))", variables)
    worker = namespace()
    made = [cache.get(variables["make"](n), None) for n in (1, 2)]
    assert is_variant(made[1])
    assert pickling.loads(made[1].payload, worker)() == (2, 1 << 20)
    assert not worker.bases


def test_threads_do_not_get_each_others_values(cache: FunctionCache) -> None:
    wrong: list[Any] = []

    def run(first: int) -> None:
        for n in range(first, first + 2000):
            found = pickling.loads(cache.get(over(n), None).payload)()
            if found != n:
                wrong.append((n, found))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(10_000 * k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
