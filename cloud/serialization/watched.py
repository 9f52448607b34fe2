"""What must still hold for the bytes of a pickled function to be right: what it refers to, found as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType

from cloud.serialization import unchanged
from cloud.serialization.facts import global_names, importable, imports_as, sends_modules
from cloud.serialization.flat import ATOMS, CONTAINERS, pickle_flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeAlias

    Values: TypeAlias = tuple[tuple[Any, ...] | None, tuple[Any, ...]]
    Watched: TypeAlias = list[tuple[Any, Any]]
    """((what has ``get``, a name), what that is to give): compared by identity."""

_MAX_COMPARED: Final = 1000
"""Containers of more are not compared with what was sent: to find that they are large takes as long as sending them."""

_MAX_DEPTH: Final = 8
MISSING: Final = object()


def values_of(function: FunctionType) -> Values:
    """What functions of one definition may differ in: defaults, contents of cells. ValueError if a cell is empty."""
    closure = function.__closure__
    return function.__defaults__, () if closure is None else tuple([cell.cell_contents for cell in closure])


def watch(function: Any, variables: dict[str, Any], watched: Watched, depth: int) -> Watched | None:
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
    if function.__dict__ or function.__kwdefaults__ or depth > _MAX_DEPTH:
        return None
    try:
        contents = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:
        return None
    if not all(constant(value) for value in (*contents, *(function.__defaults__ or ()))):
        return None
    return _watch_names(global_names(function.__code__, variables), variables, watched, depth)


def _watch_names(names: Iterable[str], variables: dict[str, Any], watched: Watched, depth: int) -> Watched | None:
    for name in names:
        if name not in variables:
            # A global defined later must be noticed.
            watched.append(((variables, name), MISSING))
            continue
        value = variables[name]
        where = ((variables, name), value)
        if any(seen[0][1] == name and seen[1] is value for seen in watched):
            continue
        watched.append(where)
        if type(value) in ATOMS or isinstance(value, ModuleType):
            continue
        if type(value) is FunctionType and value.__closure__:
            return None
        if isinstance(value, type) and value.__module__ == "__main__":
            if _watch_class(name, variables, watched, depth) is None:
                return None
            continue
        if isinstance(value, FunctionType | BuiltinFunctionType | type):
            if watch(value, variables, watched, depth + 1) is None:
                return None
            if type(value) is FunctionType and value.__globals__ is variables:
                view = _FunctionView(value)
                watched += [((view, name), view.get(name, None)) for name in _REPLACED]
            continue
        if type(value) in CONTAINERS and len(value) > _MAX_COMPARED:
            return None
        content = pickle_flat(value)
        if not isinstance(content, bytes):
            return None
        watched.append(((_ValueView(value, content), name), content))
    return watched


def _watch_class(name: str, variables: dict[str, Any], watched: Watched, depth: int) -> Watched | None:
    definition = unchanged.known(name, variables)
    if definition is None or depth > _MAX_DEPTH:
        return None
    watched.append(((_ClassView(definition, variables), name), definition))
    return _watch_names(definition.references, variables, watched, depth + 1)


def watch_elsewhere(function: FunctionType, main: dict[str, Any]) -> Watched | None:
    """As ``watch`` for a function that is not of ``__main__`` and cannot be imported: its globals go with it."""
    variables = function.__globals__
    if variables is main or function.__dict__ or function.__kwdefaults__ or sends_modules():
        return None
    try:
        defaults, cells = values_of(function)
    except ValueError:
        return None
    if not constant(cells) or not constant(defaults):
        return None
    watched: Watched = []
    for name in (*global_names(function.__code__, variables), "__path__"):
        value = variables.get(name, MISSING)
        watched.append(((variables, name), value))
        if value is MISSING or type(value) in ATOMS:
            continue
        if isinstance(value, ModuleType):
            if not importable(value.__name__):
                return None
            _watch_submodules(value.__name__, function.__code__.co_names, watched)
        elif not isinstance(value, FunctionType | BuiltinFunctionType | type) or not imports_as(
            value, value.__module__, value.__qualname__
        ):
            return None
    return watched


def _watch_submodules(package: str, names: Iterable[str], watched: Watched) -> None:
    # cloudpickle has those imported where the job runs, if they are here.
    for name in names:
        full = f"{package}.{name}"
        found = sys.modules.get(full, MISSING)
        watched.append(((sys.modules, full), found))
        if found is not MISSING:
            _watch_submodules(full, names, watched)


_REPLACED: Final = ("__code__", "__defaults__", "__kwdefaults__", "__dict__")


class _FunctionView:
    """Looks like a dict to the comparison: the parts of a helper function that may be replaced in place."""

    __slots__ = ("function",)

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def get(self, name: str, default: Any) -> Any:
        return getattr(self.function, name) or None  # an empty dict is one that nobody has set anything in


class _ClassView:
    """Looks like a dict to the comparison: a class of ``__main__`` as long as it is as it was pickled."""

    __slots__ = ("definition", "variables")

    def __init__(self, definition: unchanged.Definition, variables: dict[str, Any]) -> None:
        self.definition = definition
        self.variables = variables

    def get(self, name: str, default: Any) -> Any:
        value = self.variables.get(name)
        return self.definition if self.definition.is_still(value, self.variables) else default


class _ValueView:
    """Looks like a dict to the comparison: a small value as long as it has in it what it had."""

    __slots__ = ("content", "value")

    def __init__(self, value: Any, content: bytes) -> None:
        self.value = value
        self.content = content

    def get(self, name: str, default: Any) -> Any:
        return self.content if pickle_flat(self.value) == self.content else default


def constant(value: Any) -> bool:
    """True for an atom, and for a tuple of what is constant."""
    kind = type(value)
    if kind in ATOMS:
        return True
    if kind is tuple:
        return all(constant(each) for each in value)
    return False
