"""A function made ready to travel, and which of them need not be pickled again.

A function is pickled anew for each submission unless everything it captured is immutable and unchanged: a later
change of a captured list must reach later submissions, and never an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import BuiltinFunctionType, FunctionType, ModuleType

from cloud.serialization import pickling
from cloud.serialization.facts import global_names, imports_as
from cloud.serialization.large import large_globals
from cloud.serialization.shared import Sent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

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
        mean_s: Mean runtime of its recent jobs in seconds, 0.0 while unknown.
    """

    __slots__ = ("_recent_n", "_recent_s", "mean_s", "name", "payload", "reusable", "token")

    def __init__(self, payload: bytes, name: str, *, reusable: bool = False) -> None:
        self.token = next(_tokens)
        self.payload = payload
        self.name = name
        self.reusable = reusable
        self.mean_s = 0.0
        self._recent_s = 0.0
        self._recent_n = 0.0

    def took(self, runtime_s: float, n: int) -> None:
        """Count ``n`` jobs that took so long together.

        The last milliseconds count, not the last reports: a short job that had to wait for a core must not pass for
        what a thousand others are like.
        """
        recent_s, recent_n = self._recent_s + runtime_s, self._recent_n + n
        self.mean_s = recent_s / recent_n or 1e-7
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
    """A function once pickled, and what must still hold for its bytes to be right."""

    __slots__ = ("cells", "function", "key", "watched")

    def __init__(self, key: Any, function: Function, cells: tuple[Any, ...], watched: list[tuple[Any, Any]]) -> None:
        self.key = key
        self.function = function
        self.cells = cells
        self.watched = watched


class FunctionCache:
    """Functions of this process that were pickled before. Not thread-safe by itself; its races cost a pickle only."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._large: dict[int, tuple[Any, Sent, Function]] = {}
        self._large_globals: Any = None

    def get(self, function: Callable[..., Any], namespace: pickling.Namespace | None) -> Function:
        """The function's bytes, pickled now or known to be unchanged.

        Args:
            function: Any callable.
            namespace: Where ``__main__`` lives if not in this process's own module.

        Raises:
            Exception: Whatever pickling it raises.
        """
        key = function.__code__ if type(function) is FunctionType else function
        entry = self._entries.get(id(key))
        if entry is not None and entry.key is key and _unchanged(entry, function):
            return entry.function
        self._large_globals = large_globals()
        large = self._large.get(id(key))
        sent = Sent() if large is None or large[0] is not key else large[1]
        payload = pickling.dumps(function, namespace, share=namespace is None or namespace.shares, sent=sent)
        if large is not None and sent is large[1] and payload is large[2].payload:
            return large[2]  # unchanged, to the last byte of its buffers
        variables = pickling.program_main() if namespace is None else namespace.variables
        watched = _watch(function, variables, [], 0)
        made = Function(payload, function_name(function), reusable=watched is not None)
        if watched is not None:
            if len(self._entries) >= _MAX_KEPT:
                self._entries.clear()
            cells = _cells(function) if type(function) is FunctionType else ()
            self._entries[id(key)] = _Entry(key, made, cells, watched)
        elif payload is sent.payload:
            self._large.pop(id(key), None)
            while len(self._large) >= _MAX_LARGE:
                self._large.pop(next(iter(self._large)))
            self._large[id(key)] = key, sent, made
        return made


def _cells(function: FunctionType) -> tuple[Any, ...]:
    # Everything of a function that its code does not tell, by identity.
    closure = function.__closure__
    contents: tuple[Any, ...] = () if closure is None else tuple([cell.cell_contents for cell in closure])
    return (function.__qualname__, function.__defaults__, function.__globals__, *contents)


def _unchanged(entry: _Entry, function: Any) -> bool:
    if type(function) is FunctionType:
        if function.__dict__ or function.__kwdefaults__:
            return False
        cells = entry.cells
        if cells[0] is not function.__qualname__ and cells[0] != function.__qualname__:
            return False
        if cells[1] is not function.__defaults__ or cells[2] is not function.__globals__:
            return False
        closure = function.__closure__
        if closure is not None:
            index = 3
            try:
                for cell in closure:
                    now, then = cell.cell_contents, cells[index]
                    # Equal ints and strings pickle alike; of floats -0.0 == 0.0 does not.
                    if now is not then and not (type(now) is type(then) and type(now) in (int, str) and now == then):
                        return False
                    index += 1
            except ValueError:
                return False
    for (variables, name), value in entry.watched:  # noqa: SIM110 - a generator would double the time
        if variables.get(name, _MISSING) is not value:
            return False
    return True


_MISSING: Final = object()


def _watch(
    function: Any, variables: dict[str, Any], watched: list[tuple[Any, Any]], depth: int
) -> list[tuple[Any, Any]] | None:
    """What to compare before the bytes may be used again; None if that cannot be told cheaply."""
    if type(function) is not FunctionType:
        if isinstance(function, type | BuiltinFunctionType) and imports_as(
            function, function.__module__, function.__qualname__
        ):
            return watched
        return None
    if function.__globals__ is not variables:
        imports = imports_as(function, function.__module__, function.__qualname__)
        return watched if imports else None
    if function.__dict__ or function.__kwdefaults__ or depth > 8:
        return None
    try:
        contents = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:
        return None
    if not all(_constant(value) for value in (*contents, *(function.__defaults__ or ()))):
        return None
    for name in global_names(function.__code__):
        if name not in variables:
            # A global defined later must be noticed.
            watched.append(((variables, name), _MISSING))
            continue
        value = variables[name]
        where = ((variables, name), value)
        if any(seen[0][1] == name and seen[1] is value for seen in watched):
            continue
        watched.append(where)
        if type(value) in pickling.ATOMS or isinstance(value, ModuleType):
            continue
        if type(value) is FunctionType and value.__closure__:
            return None
        if isinstance(value, FunctionType | BuiltinFunctionType | type):
            if _watch(value, variables, watched, depth + 1) is None:
                return None
            if type(value) is FunctionType and value.__globals__ is variables:
                watched.append(((_FunctionView(value), "code"), value.__code__))
                watched.append(((_FunctionView(value), "defaults"), value.__defaults__))
            continue
        return None
    return watched


class _FunctionView:
    """Looks like a dict to the comparison: the parts of a helper function that may be replaced in place."""

    __slots__ = ("function",)

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def get(self, name: str, default: Any) -> Any:
        return self.function.__code__ if name == "code" else self.function.__defaults__


def _constant(value: Any) -> bool:
    kind = type(value)
    if kind in pickling.ATOMS:
        return True
    if kind is tuple:
        return all(_constant(each) for each in value)
    return False
