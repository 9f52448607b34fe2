"""A function made ready to travel, and which of them need not be pickled again.

A function is pickled anew for each submission unless all that it refers to is known to be as it was (see ``watched``):
a later change of a captured list must reach later submissions, and never an earlier one. Of a function that is made
again and again, with other immutable values in it each time, only those are pickled.
"""

from __future__ import annotations

from _weakref import ref
from collections.abc import Callable
from functools import partial
from itertools import count
from types import FunctionType, MethodType

from cloud.serialization import pickling
from cloud.serialization.facts import rebinds
from cloud.serialization.large import large_globals
from cloud.serialization.namespace import Namespace, program_main
from cloud.serialization.shared import Sent
from cloud.serialization.variants import pack_variant, without_values
from cloud.serialization.watched import MISSING, constant, values_of, watch, watch_elsewhere

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.serialization.watched import Values, Watched

_MAX_KEPT: Final = 512
_MAX_LARGE: Final = 4
"""Functions with large buffers that are kept: each is memory as large as these."""

_RECENT_S: Final = 0.005
_tokens = count(1)


class Function:
    """A pickled function. Many jobs may share one.

    Attributes:
        token: Names it inside this process; workers keep what they loaded under it.
        payload: Opaque bytes.
        name: ``module.qualname``, for people.
        reusable: True when loading it once serves any number of calls: it captured nothing mutable.
    """

    __slots__ = ("_mean_s", "_origin", "_recent_n", "_recent_s", "name", "payload", "reusable", "token")

    def __init__(self, payload: bytes, name: str, *, reusable: bool = False) -> None:
        self.token = next(_tokens)
        self.payload = payload
        self.name = name
        self.reusable = reusable
        self._mean_s = 0.0
        self._recent_s = 0.0
        self._recent_n = 0.0
        self._origin: Function | None = None

    @property
    def mean_s(self) -> float:
        """Mean runtime of its recent jobs in seconds, or of others of the same code; 0.0 while unknown."""
        return self._mean_s or (0.0 if self._origin is None else self._origin._mean_s)

    def variant(self, payload: bytes, *, reusable: bool = False) -> Function:
        """The same code, perhaps with other values: its jobs may be expected to take as long, until it is known."""
        made = Function(payload, self.name, reusable=reusable)
        made._origin = self._origin or self
        return made

    def took(self, runtime_s: float, n: int) -> None:
        """Count ``n`` jobs that took so long together.

        The last milliseconds count, not the last reports: a short job that had to wait for a core must not pass for
        what a thousand others are like.
        """
        if self._origin is not None:
            if not self._mean_s:
                self._recent_s, self._recent_n = self._origin._recent_s, self._origin._recent_n
            self._origin.took(runtime_s, n)
        recent_s, recent_n = self._recent_s + runtime_s, self._recent_n + n
        self._mean_s = recent_s / recent_n or 1e-7
        if recent_s > _RECENT_S:
            recent_n *= _RECENT_S / recent_s
            recent_s = _RECENT_S
        self._recent_s, self._recent_n = recent_s, recent_n


def function_name(function: Any) -> str:
    """``module.qualname`` of a callable; for partials and callable objects, of what they stand for."""
    inner = getattr(function, "func", function)
    name = getattr(inner, "__qualname__", None)
    if not isinstance(name, str):
        inner, name = type(inner), type(inner).__qualname__
    module = getattr(inner, "__module__", None)
    return f"{module}.{name}" if module else name


class _Entry:
    """A function once pickled, and what must still hold for its bytes to be right.

    Attributes:
        definition: What all functions of this code must share to differ in their values only.
        last: The function as it was sent last, and the values it had: in one, for threads that change and read it.
        base: What is the same for all values; made when they first differ.
        reusable: What functions become that are sent again with the same values.
    """

    __slots__ = ("base", "definition", "key", "last", "reusable", "watched")

    def __init__(self, key: Any, function: Any, made: Function, watched: Watched) -> None:
        is_function = type(function) is FunctionType
        self.key = key
        self.definition = _definition(function) if is_function else ()
        self.last: tuple[Function, Values] = made, (values_of(function) if is_function else (None, ()))
        self.base: bytes | None = None
        self.reusable = made.reusable
        self.watched = watched

    def get(self, function: Any, namespace: Namespace | None) -> Function | None:
        """The function's bytes, if they follow from what is known."""
        for (variables, name), value in self.watched:
            if variables.get(name, MISSING) is not value:
                return None
        made, values = self.last
        if type(function) is FunctionType:
            if function.__dict__ or function.__kwdefaults__:
                return None
            if function.__closure__ or function.__defaults__ is not values[0]:
                return self._with_values(function, namespace)
            definition = self.definition
            if function.__globals__ is not definition[0] or function.__qualname__ != definition[1]:
                return None
        return made if made.reusable else self._again(made, values)

    def _again(self, made: Function, values: Values) -> Function:
        made = made.variant(made.payload, reusable=self.reusable)
        self.last = made, values
        return made

    def _with_values(self, function: FunctionType, namespace: Namespace | None) -> Function | None:
        try:
            values = defaults, cells = values_of(function)
        except ValueError:
            return None
        if not _same(self.definition, _definition(function)):
            return None
        made, then = self.last
        if defaults is then[0] and _same(cells, then[1]):
            return made if made.reusable else self._again(made, values)
        # What can be found by its name travels as a name.
        if "<" not in function.__qualname__ or not constant(cells) or not constant(defaults):
            return None
        if self.base is None:
            self.base = pickling.dumps(without_values(function), namespace)
        made = made.variant(pack_variant(self.base, defaults, cells))
        self.last = made, values
        return made


class FunctionCache:
    """Functions of this process that were pickled before. Not thread-safe by itself; its races cost a pickle only."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._large: dict[int, tuple[Any, Sent, Function]] = {}
        self._large_globals: Any = None
        self._origins: dict[int, tuple[ref[Any], Function]] = {}

    def get(self, function: Callable[..., Any], namespace: Namespace | None) -> Function:
        """The function's bytes, pickled now or known to be unchanged.

        Args:
            function: Any callable.
            namespace: Where ``__main__`` lives if not in this process's own module.

        Raises:
            Exception: Whatever pickling it raises.
        """
        key = function.__code__ if type(function) is FunctionType else function
        entry = self._entries.get(id(key))
        if entry is not None and entry.key is key and (known := entry.get(function, namespace)) is not None:
            return known
        self._large_globals = large_globals()
        large = self._large.get(id(key))
        sent = Sent() if large is None or large[0] is not key else large[1]
        payload = pickling.dumps(function, namespace, share=namespace is None or namespace.shares, sent=sent)
        if large is not None and sent is large[1] and payload is large[2].payload:
            return large[2]  # unchanged, to the last byte of its buffers
        variables = program_main() if namespace is None else namespace.variables
        watched = watch(function, variables, [], 0)
        reusable = watched is not None
        if type(function) is FunctionType:
            if watched is None:
                watched = watch_elsewhere(function, variables)
            elif function.__closure__ and rebinds(function.__code__):
                reusable = False  # each job begins with the values that it was sent
        made = self._origin(function).variant(payload, reusable=reusable)
        if watched is not None:
            if len(self._entries) >= _MAX_KEPT:
                self._entries.clear()
            self._entries[id(key)] = _Entry(key, function, made, watched)
        elif payload is sent.payload:
            self._large.pop(id(key), None)
            while len(self._large) >= _MAX_LARGE:
                self._large.pop(next(iter(self._large)))
            self._large[id(key)] = key, sent, made
        return made

    def _origin(self, function: Any) -> Function:
        """What knows how long jobs take that run the same code; it keeps nothing of the user's alive."""
        code, name = _code_of(function), function_name(function)
        known = self._origins.get(id(code))
        if known is None or known[0]() is not code or known[1].name != name:
            if len(self._origins) >= _MAX_KEPT:
                self._origins.clear()
            known = self._origins[id(code)] = ref(code), Function(b"", name)
        return known[1]


def _code_of(function: Any) -> Any:
    """What runs when it is called, whatever it is bound to; the type of what has no code of its own."""
    while type(function) is partial:
        function = function.func
    if type(function) is MethodType:
        function = function.__func__
    return function.__code__ if type(function) is FunctionType else type(function)


def _definition(function: FunctionType) -> tuple[Any, ...]:
    """The rest of what a function's code does not tell."""
    known = (
        function.__globals__,
        function.__qualname__,
        function.__name__,
        function.__module__,
        function.__doc__,
    )
    # What can be found by its name needs none; and to look at them may raise.
    annotations = function.__annotations__ if "<" in function.__qualname__ else None
    return (*known, *annotations, *annotations.values()) if annotations else known


def _same(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    if len(now) != len(then):
        return False
    for one, other in zip(now, then):  # noqa: B905 - their lengths are equal
        # Equal ints and strings pickle alike; of floats -0.0 == 0.0 does not.
        if one is not other and not (type(one) is type(other) and type(one) in (int, str) and one == other):
            return False
    return True
