"""Definitions of ``__main__``: what is pickled once for many jobs, and that no change of it is missed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

import pytest

from cloud.serialization import pickling, unchanged
from cloud.serialization.functions import FunctionCache
from cloud.serialization.namespace import Namespace

PROGRAM = """
import abc, dataclasses, enum, functools, typing

LIMIT = 3
TABLE = {"a": 1}

def helper(x):
    return x + LIMIT

def other(x):
    return x

class Base:
    rate = 1

    def scaled(self):
        return self.rate * helper(0)

class Point(Base):
    kind = "point"

    def __init__(self, x, *, y=2):
        self.x, self.y = x, y

    def norm(self, factor=1):
        return factor * abs(self.x) + super().scaled()

    @property
    def double(self):
        return 2 * self.x

    @staticmethod
    def zero():
        return 0

    @classmethod
    def origin(cls):
        return cls(0)

    @functools.cached_property
    def cached(self):
        return self.x

@dataclasses.dataclass
class Record:
    number: int
    name: str = "name"
    items: list = dataclasses.field(default_factory=list)

@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    number: int
    point: Point | None = None

class Color(enum.Enum):
    RED = 1
    BLUE = 2

class Bits(enum.Flag):
    ONE = 1
    TWO = 2

class Pair(typing.NamedTuple):
    left: int
    right: str = "right"

class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...

class Slots:
    __slots__ = ("a",)

class Own(Exception):
    pass

class Listed:
    seen = []

def closing():
    count = 1
    class Inner:
        def get(self):
            return count
    def change(value):
        nonlocal count
        count = value
    return Inner, change

Closed, change = closing()
Closed.__qualname__ = "Closed"

def uses(x):
    return Point(x).norm()
"""

ALIKE = ["Base", "Point", "Record", "Frozen", "Color", "Bits", "Pair", "Shape", "Slots", "Own", "helper", "uses"]


def run(source: str, variables: dict[str, Any]) -> None:
    exec(compile(source, "<program>", "exec", dont_inherit=True), variables)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)  # dataclasses make their methods over what they find there
    run(PROGRAM, vars(module))
    return Namespace(vars(module), key="program")


def send(program: Namespace, *names: str) -> None:
    for name in names:
        # A pickle that only refers to the global, as that of an instance does.
        pickling.dumps([program.variables[name]], program)


@pytest.mark.parametrize("name", ALIKE)
def test_what_has_not_changed_is_pickled_once(program: Namespace, name: str) -> None:
    send(program, name)
    first = unchanged.known(name, program.variables)
    assert first is not None
    send(program, name)
    assert unchanged.known(name, program.variables) is first


def set_attribute(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(variables: dict[str, Any]) -> None:
        first, *rest, last = path.split(".")
        target = variables[first]
        for name in rest:
            target = vars(target)[name] if isinstance(target, type) else getattr(target, name)
        value_now = value(variables) if callable(value) else value
        setattr(target, last, value_now)

    return change


def _note_on_red(variables: dict[str, Any]) -> None:
    variables["Color"].RED.note = "warm"


def _rename_annotation(variables: dict[str, Any]) -> None:
    annotations = variables["Record"].__annotations__
    annotations["other"] = annotations.pop("number")


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "attribute": ("Point", set_attribute("Point.kind", "other")),
    "new attribute": ("Point", set_attribute("Point.further", 1)),
    "deleted attribute": ("Point", lambda variables: delattr(variables["Point"], "kind")),
    "attribute becomes mutable": ("Point", set_attribute("Point.kind", lambda _: [])),
    "method": ("Point", set_attribute("Point.norm", lambda variables: lambda self: 7)),
    "code of a method": ("Base", set_attribute("Base.scaled.__code__", lambda _: (lambda self: 7).__code__)),
    "defaults of a method": ("Point", set_attribute("Point.norm.__defaults__", lambda _: (5,))),
    "keyword defaults": ("Point", lambda variables: variables["Point"].__init__.__kwdefaults__.update(y=9)),
    "attribute of a method": ("Point", set_attribute("Point.norm.note", 1)),
    "code of a static method": (
        "Point",
        lambda variables: setattr(variables["Point"].zero, "__code__", (lambda: 9).__code__),
    ),
    "code of a property": (
        "Point",
        lambda variables: setattr(variables["Point"].double.fget, "__code__", (lambda self: 9).__code__),
    ),
    "a base goes by another name": ("Point", lambda variables: variables.update(Base=int)),
    "annotation": ("Record", lambda variables: variables["Record"].__annotations__.update(number=str)),
    "another function under the name": ("helper", lambda variables: variables.update(helper=variables["other"])),
    "defined again": ("Record", lambda variables: run(PROGRAM, variables)),
    "a member of an enum": ("Color", _note_on_red),
    "a registered class": ("Shape", lambda variables: variables["Shape"].register(int)),
    "the name of an annotation": ("Record", _rename_annotation),
    "defaults": ("helper", set_attribute("helper.__defaults__", lambda _: (1,))),
    "attribute of a function": ("helper", set_attribute("helper.note", 1)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_no_change_is_missed(program: Namespace, what: str) -> None:
    name, change = CHANGES[what]
    send(program, name)
    assert unchanged.known(name, program.variables) is not None
    change(program.variables)
    assert unchanged.known(name, program.variables) is None


def test_what_a_method_closes_over(program: Namespace) -> None:
    send(program, "Closed")
    assert unchanged.known("Closed", program.variables) is not None
    program.variables["change"](2)
    assert unchanged.known("Closed", program.variables) is None


@pytest.mark.parametrize("value", [[], {}, set(), bytearray(), object(), threading.Event])
def test_what_may_change_and_stay_the_same_object_is_pickled_each_time(program: Namespace, value: Any) -> None:
    program.variables["Point"].kind = value if not isinstance(value, type) else [value]
    assert unchanged.parts_of(program.variables["Point"], program.variables) is None


ODD = """
TABLE = {"a": 1}

def make():
    class Made:
        x = 1
    return Made

def empty():
    if False:
        missing = 1
    def inner():
        return missing
    return inner

Local = make()
class OfLocal(Local): pass
class Bound:
    get = TABLE.get
class Annotated:
    value: Local
class Inside:
    class Part: pass
    part = Part
def default(get=TABLE.get): return get("a")
@dataclasses.dataclass
class Described:
    x: int = dataclasses.field(default=1, metadata={"unit": "m"})
class Many:
    parts = tuple(range(10_000))
"""


@pytest.mark.parametrize("name", ["OfLocal", "Bound", "Annotated", "Inside", "default", "Described", "Many"])
def test_what_cannot_be_told_is_pickled_each_time(program: Namespace, name: str) -> None:
    variables = program.variables
    run(ODD, variables)
    assert unchanged.parts_of(variables[name], variables) is None


def test_what_others_put_around_a_function_may_use_what_changes(program: Namespace) -> None:
    module: dict[str, Any] = {"__name__": "made_at_run_time"}
    exec("LEVEL = 1\ndef wrap(f):\n    def wrapper(x):\n        return f(x) + LEVEL\n    return wrapper\n", module)
    program.variables["Point"].norm = module["wrap"](program.variables["other"])
    assert unchanged.parts_of(program.variables["Point"], program.variables) is None


def test_an_empty_cell_is_not_one_with_none(program: Namespace) -> None:
    cell = CellType()
    inner = FunctionType((lambda: cell).__code__, program.variables, "inner", None, (cell,))
    inner.__qualname__ = "inner"
    before = unchanged.parts_of(inner, program.variables)
    cell.cell_contents = None
    assert before != unchanged.parts_of(inner, program.variables)


def test_nothing_is_kept_while_modules_are_sent_by_value(program: Namespace) -> None:
    import cloudpickle

    import tests.sample_functions as module

    cloudpickle.register_pickle_by_value(module)
    try:
        assert unchanged.parts_of(program.variables["Point"], program.variables) is None
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_a_name_that_appears_later_is_noticed(program: Namespace) -> None:
    variables = program.variables
    exec("def later():\n    return missing\n", variables)
    send(program, "later")
    assert unchanged.known("later", variables) is not None
    variables["missing"] = 1
    assert unchanged.known("later", variables) is None


def there(program: Namespace, obj: Any, other: Namespace) -> Any:
    return pickling.loads(pickling.dumps(obj, program), other)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_attribute("Point.norm", lambda variables: lambda self: 7), 7),
        (set_attribute("Base.rate", 10), 32),
        (lambda variables: variables.update(LIMIT=5), 7),
        (lambda variables: variables.update(helper=lambda x: 100), 102),
        (set_attribute("helper.__code__", lambda _: (lambda x: 200).__code__), 202),
    ],
    ids=["method", "base", "global", "helper", "helper in place"],
)
def test_a_job_finds_what_was_there_when_it_was_submitted(
    program: Namespace, change: Callable[[dict[str, Any]], None], expected: int
) -> None:
    functions, variables = FunctionCache(), program.variables
    before = functions.get(variables["uses"], program)
    functions.get(variables["uses"], program)
    change(variables)
    after = functions.get(variables["uses"], program)
    assert before is not after
    worker: dict[str, Any] = {"__name__": "__main__"}
    assert pickling.loads(before.payload, Namespace(worker, key="one"))(2) == 5
    worker = {"__name__": "__main__"}
    assert pickling.loads(after.payload, Namespace(worker, key="two"))(2) == expected


def test_a_function_that_uses_a_class_is_sent_once(program: Namespace) -> None:
    functions = FunctionCache()
    made = functions.get(program.variables["uses"], program)
    assert made.reusable
    assert functions.get(program.variables["uses"], program) is made


@pytest.mark.parametrize("change", ["TABLE['a'] = 2", "TABLE.clear()", "TABLE = {'a': 2}"])
def test_a_table_that_a_function_uses_is_compared(program: Namespace, change: str) -> None:
    functions, variables = FunctionCache(), program.variables
    exec("def looks():\n    return TABLE\n", variables)
    made = functions.get(variables["looks"], program)
    assert made.reusable
    assert functions.get(variables["looks"], program) is made
    exec(change, variables)
    after = functions.get(variables["looks"], program)
    assert after is not made
    worker: dict[str, Any] = {"__name__": "__main__"}
    assert pickling.loads(after.payload, Namespace(worker, key="seven"))() == variables["TABLE"]


def test_one_that_uses_a_class_with_a_list_is_not(program: Namespace) -> None:
    functions, variables = FunctionCache(), program.variables
    exec("def lists():\n    return Listed.seen\n", variables)
    made = functions.get(variables["lists"], program)
    assert not made.reusable
    variables["Listed"].seen.append(1)
    assert functions.get(variables["lists"], program) is not made


def test_globals_that_only_have_the_name_of_an_attribute_stay_here(program: Namespace) -> None:
    variables = program.variables
    exec("import threading\nnorm = threading.Lock()\nx = bytes(10_000_000)\n", variables)
    assert len(pickling.dumps(variables["uses"], program)) < 10_000
    assert there(program, variables["uses"], Namespace({"__name__": "__main__"}, key="three"))(2) == 5


def test_globals_looked_up_by_way_of_the_module_go_along(program: Namespace) -> None:
    variables = program.variables
    exec("def look():\n    import __main__\n    return __main__.TABLE\n", variables)
    worker: dict[str, Any] = {"__name__": "__main__"}
    there(program, variables["look"], Namespace(worker, key="four"))
    assert worker["TABLE"] == {"a": 1}


def test_a_class_that_is_there_already_becomes_what_it_is_here(program: Namespace) -> None:
    variables = program.variables
    worker = Namespace({"__name__": "__main__"}, key="five")
    point = there(program, variables["Point"], worker)
    assert point(3).kind == "point"
    del variables["Point"].kind
    variables["Point"].further = 1
    assert there(program, variables["Point"], worker) is point
    assert not hasattr(point, "kind")
    assert point(3).further == 1
    assert point(-3).norm() == 6


def test_an_enum_that_is_there_already_gets_what_is_new(program: Namespace) -> None:
    variables = program.variables
    worker = Namespace({"__name__": "__main__"}, key="six")
    color = there(program, variables["Color"], worker)
    variables["Color"].warm = property(lambda self: self.value == 1)
    assert there(program, variables["Color"], worker) is color
    assert color.RED.warm
    assert list(color) == [color.RED, color.BLUE]


def test_a_class_that_is_met_in_a_value_loses_nothing(program: Namespace) -> None:
    variables = program.variables
    exec("def make():\n    class Made: pass\n    return Made\nMade = make()\n", variables)
    worker = Namespace({"__name__": "__main__"}, key="eight")
    made = there(program, variables["Made"](), worker)
    type(made).count = 1
    assert type(there(program, variables["Made"](), worker)).count == 1
