"""What programs define in ``__main__``: classes that need each other, slots, enums, type variables, sentinels."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.support import Program

Start = Callable[..., Program]

# Each case has definitions of its own: what a worker has from an earlier job would hide that it lacks something.
DEFINITIONS = """
import abc, dataclasses, enum, functools, typing

class Base:
    def name(self): return type(self).__name__
class Derived(Base): pass
class Last(Derived): pass

class Error(Exception): pass
class NotThere(Error): pass
def fails(): raise NotThere("this")

class Annotated:
    def __init__(self, x): self.x = x
def annotated(x: Annotated) -> Annotated: return x

def helper(): return 7
def with_default(function=helper): return function()

class Mode(enum.Enum):
    FAST = 1
def with_mode(mode=Mode.FAST): return mode

class Part:
    def __init__(self, n): self.n = n
class Whole:
    part = Part(3)
@dataclasses.dataclass
class Inner:
    x: int = 1
@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)

class Meta(type):
    def __call__(cls, *args): return super().__call__(*args)
class Made(metaclass=Meta):
    def __init__(self, n): self.n = n

class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...
class Square(Shape):
    def __init__(self, a): self.a = a
    def area(self): return self.a ** 2

class Left: pass
class Right: left = Left()
Left.right = Right()

class Wrapped:
    def __init__(self, function): self.function = function
    def __call__(self, *args): return self.function(*args)
@Wrapped
def decorated(x): return x + 1

class Slotted:
    __slots__ = ("a", "__b")
    def __init__(self, a): self.a = self.__b = a
    def both(self): return self.a, self.__b
class Empty: __slots__ = ()
class OnEmpty(Empty):
    __slots__ = "a"
    def __init__(self, a): self.a = a
@dataclasses.dataclass(slots=True)
class Record:
    x: int
    items: list = dataclasses.field(default_factory=list)
class Pair(typing.NamedTuple):
    a: int
    b: int = 2

class Planet(enum.Enum):
    EARTH = (1.0, 2.0)
    MARS = (3.0, 4.0)
    def __init__(self, mass, radius): self.mass, self.radius = mass, radius

class Computed:
    def __init__(self, n): self.n = n
    @functools.cached_property
    def double(self): return 2 * self.n

T = typing.TypeVar("T")
P = typing.ParamSpec("P")
Number = typing.NewType("Number", int)
def first(xs: list[T]) -> T: return xs[0]
def number(n: Number) -> Number: return Number(n + 1)
def calls(function: typing.Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int: return function(*args)
class Holds(typing.Generic[T]):
    def __init__(self, value: T): self.value = value

@functools.singledispatch
def kind_of(x): return "any"
@kind_of.register
def _(x: int): return "int"
@kind_of.register(list)
def _(x): return [kind_of(each) for each in x]
class Dispatches:
    @functools.singledispatchmethod
    def look(self, x): return "any"
    @look.register
    def _(self, x: int): return "int"
def nested():
    @functools.singledispatch
    def deep(x): return x
    @deep.register
    def _(x: list): return [deep(each) for each in x]
    deep.note = "here"
    return deep

class Unhashable(type):
    __hash__ = None
    def __eq__(cls, other): return cls is other

class Sentinel:
    def __reduce__(self): return "MISSING"
MISSING = Sentinel()
def is_missing(value=MISSING): return value is MISSING
"""

HELPERS = """
def helper(): return 1
def attribute(): return getattr(helper, "later", None)
assert cloud.result(cloud.call(attribute)) is None
helper.later = 4
assert cloud.result(cloud.call(attribute)) == 4

def keyword(*, y): return y
def calling():
    try:
        return keyword()
    except TypeError:
        return "none"
assert cloud.result(cloud.call(calling)) == "none"
keyword.__kwdefaults__ = {"y": 4}
assert cloud.result(cloud.call(calling)) == 4
"""

CHECKS = """
def once(function, *args):
    return cloud.result(cloud.call(function, *args))

assert once(lambda: Derived().name()) == "Derived"
assert type(once(lambda: Last())) is Last
assert [each.name() for each in cloud.result(cloud.map(lambda cls: cls(), [Last, Derived, Base]))] == [
    "Last", "Derived", "Base"]
failed = cloud.call(fails)
cloud.join(failed, ignore_errors=True)
assert type(cloud.result(failed, ignore_errors=True).__cause__) is NotThere
assert once(annotated, Annotated(4)).x == 4
assert once(with_default) == 7
assert once(with_mode) is Mode.FAST
assert once(lambda: Whole.part.n) == 3
assert once(lambda: Outer()) == Outer()
assert once(lambda: Made(5)).n == 5
assert cloud.result(cloud.map(lambda shape: shape.area(), [Square(2), Square(3)])) == [4, 9]
assert once(lambda: type(Left.right.left).__name__) == "Left"
assert once(lambda x: decorated(x), 1) == 2
assert once(Wrapped(abs), -3) == 3

assert once(lambda value: value, Slotted(3)).both() == (3, 3)
assert once(lambda value: hasattr(value, "__dict__"), Slotted(3)) is False
assert cloud.result(cloud.map(lambda value: value, [OnEmpty(1), OnEmpty(2)]))[1].a == 2
assert once(lambda value: value, Record(1, [2])) == Record(1, [2])
assert once(lambda value: value, Pair(1)) == Pair(1, 2)

assert once(lambda: (Planet.MARS.mass, Planet((1.0, 2.0)).radius)) == (3.0, 2.0)
assert once(lambda planet: planet, Planet.EARTH) is Planet.EARTH
assert once(lambda value: (value.double, value.double), Computed(4)) == (8, 8)
assert once(lambda value: value, Computed(4)).double == 8

assert once(first, [6]) == 6
assert once(number, 1) == 2
assert once(calls, len, "ab") == 2
assert once(lambda: Holds[int](3)).value == 3
assert cloud.result(cloud.map(kind_of, [1, "a", [1, "a"]])) == ["int", "any", ["int", "any"]]
assert once(lambda x: kind_of(x), 2.0) == "any"
kind_of.register(float)(lambda x: "float")
assert once(lambda x: kind_of(x), 2.0) == "float"
assert once(Dispatches().look, 3) == "int"
assert once(nested(), [1, [2]]) == [1, [2]]
assert once(lambda function: (function.__name__, function.note), nested()) == ("deep", "here")
unhashable = Unhashable("Name", (), {})()
for verb in (
    lambda: cloud.map(id, [unhashable]), lambda: cloud.map(id, [(unhashable,)]), lambda: cloud.call(id, [unhashable])
):
    try:
        verb()
    except cloud.SerializationError as exc:
        assert "argument 1 is " in str(exc)
    else:
        raise AssertionError
made = cloud.map(lambda n: Unhashable("Name", (), {})() if n == 7 else n, range(20))
cloud.join(made, ignore_errors=True)
assert [n for n, status in enumerate(cloud.status(made)) if status != "done"] == [7]
assert "cannot be pickled" in str(cloud.result(made, ignore_errors=True)[7])

assert once(is_missing) is True
assert once(is_missing, MISSING) is True
assert once(lambda value: value, MISSING) is MISSING
assert once(lambda: MISSING) is MISSING
"""


CHANGES = """
import dataclasses, sys
import __main__ as program

class Model:
    rate = 1
@dataclasses.dataclass
class Record:
    number: int
STATE = ["a"]
NUMBER = 1
this = sys.modules[__name__]
this.noted = 5

def rates(_): return Model.rate
def states(_): return STATE[0]
def numbers(_): return NUMBER
def others(_): return (STATE[0], Model.rate, NUMBER)
def again(record): return Record(record.number + 1)
def by_alias(_): return (program.NUMBER, this.noted, sys.modules["__main__"].STATE, sys.modules[__name__].NUMBER)

def set_all(state, rate, number):
    global NUMBER
    STATE[0], Model.rate, NUMBER = state, rate, number

for function, values in ((rates, (1, 2)), (states, ("a", "b")), (numbers, (1, 2))):
    for turn in range(8):
        set_all(*(("a", 1, 1), ("b", 2, 2))[turn % 2])
        run = [function, others][turn % 2]
        assert cloud.result([cloud.call(run, 0) for _ in range(4)])[3] == (values[0] if run is function else ("b", 2, 2))
        assert set(cloud.result(cloud.map(run, range(20)))) == {values[0] if run is function else ("b", 2, 2)}

set_all("a", 1, 1)
gate = cloud.call(sum, [1])
before = [cloud.call(function, 0, _depends_on=[gate]) for function in (rates, states, numbers) for _ in range(5)]
set_all("b", 2, 2)
after = [cloud.call(function, 0) for function in (rates, states, numbers) for _ in range(5)]
assert cloud.result(after) == [2] * 5 + ["b"] * 5 + [2] * 5
assert cloud.result(before) == [1] * 5 + ["a"] * 5 + [1] * 5

assert cloud.result(cloud.map(again, [Record(n) for n in range(50)])) == [Record(n + 1) for n in range(50)]
assert cloud.result(cloud.call(by_alias, 0)) == (2, 5, ["b"], 2)
"""


@pytest.mark.parametrize("start", ["import cloud", "import cloud\ncloud.start_simulator()"], ids=["mp", "simulator"])
def test_each_job_finds_the_globals_of_its_submission(program: Start, start: str) -> None:
    program(f"{start}\n{CHANGES}").ended()


@pytest.mark.parametrize("start", ["import cloud", "import cloud\ncloud.start_simulator()"], ids=["mp", "simulator"])
def test_classes_and_values_of_the_program_go_and_come_back(program: Start, start: str) -> None:
    program(f"{start}\n{DEFINITIONS}\n{CHECKS}").ended()


@pytest.mark.parametrize("start", ["import cloud", "import cloud\ncloud.start_simulator()"], ids=["mp", "simulator"])
def test_what_is_set_on_a_helper_reaches_later_calls(program: Start, start: str) -> None:
    program(f"{start}\n{HELPERS}").ended()
