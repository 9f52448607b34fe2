"""What goes into a pickle, in words for reports: types, sizes, and what a function captures.

Everything is looked at, nothing is changed. Sizes are those of each part pickled by itself: parts that share an object
each count it. An object that refuses gets a note in its place, so that a report never fails where the job does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

from cloud.serialization import pickling
from cloud.serialization.facts import cell_content, global_names, imports_as
from cloud.serialization.namespace import Namespace, program_main

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Facts = dict[str, Any]


def type_name(value: object) -> str:
    """Module and name of the object's type; the name alone for builtins."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def describe_value(value: object, namespace: Namespace | None, name: str = "") -> Facts:
    """Name, type and size of one object: ``{"name", "type", "size_bytes"}``, or ``error`` for the size."""
    facts: Facts = {"name": name} if name else {}
    facts["type"] = type_name(value)
    try:
        facts["size_bytes"] = len(pickling.dumps(value, namespace))
    except Exception as exc:  # noqa: BLE001 - the object's own code may raise anything
        facts["error"] = f"{type(exc).__name__}: {exc}"
    return facts


def describe_arguments(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], namespace: Namespace | None
) -> list[Facts]:
    """One entry for each argument of a call, in order, under the names of the function's parameters."""
    named: list[tuple[str, object]] = list(zip(_names(func, len(args)), args, strict=True))
    return [describe_value(value, namespace, name) for name, value in [*named, *kwargs.items()]]


def describe_function(func: Callable[..., Any], namespace: Namespace | None) -> Facts:
    """What travels with a function.

    Returns:
        ``travels``: 'by reference' (its module is imported where the job runs) or 'by value'; ``globals``,
        ``closure``, ``defaults`` and ``bound`` (a method's object, a partial's arguments): an entry for each value
        captured, by it or by a function that it captures; ``modules``: sorted names of the modules that the job
        will import for it.
    """
    captured = _Captured(namespace)
    captured.add(func)
    return {
        "travels": "by value" if captured.by_value else "by reference",
        "globals": captured.globals,
        "closure": captured.closure,
        "defaults": captured.defaults,
        "bound": captured.bound,
        "modules": sorted(captured.modules),
    }


class _Captured:
    def __init__(self, namespace: Namespace | None) -> None:
        self._namespace = namespace
        self._variables = program_main() if namespace is None else namespace.variables
        self._seen: set[int] = set()
        self.by_value = False
        self.globals: list[Facts] = []
        self.closure: list[Facts] = []
        self.defaults: list[Facts] = []
        self.bound: list[Facts] = []
        self.modules: set[str] = set()

    def add(self, obj: object) -> None:
        """Take in a callable, or whatever else may bring functions along."""
        if id(obj) in self._seen:
            return
        self._seen.add(id(obj))
        if isinstance(obj, partial):
            self._add_partial(obj)
        elif isinstance(obj, MethodType):
            self.bound.append(describe_value(obj.__self__, self._namespace, "self"))
            self.add(obj.__func__)
        elif isinstance(obj, FunctionType):
            self._add_function(obj)
        elif isinstance(obj, type):
            self._add_class(obj)
        elif isinstance(obj, BuiltinFunctionType):
            self.modules.add(obj.__module__ or "builtins")
        elif callable(obj):
            self.bound.append(describe_value(obj, self._namespace, "self"))
            self._add_class(type(obj))

    def _add_partial(self, obj: partial[Any]) -> None:
        for index, value in enumerate(obj.args, 1):
            self.bound.append(describe_value(value, self._namespace, f"argument {index}"))
        for name, value in obj.keywords.items():
            self.bound.append(describe_value(value, self._namespace, name))
        self.add(obj.func)

    def _add_function(self, function: FunctionType) -> None:
        if self._is_reference(function, function.__globals__ is self._variables):
            self.modules.add(function.__module__)
            return
        self.by_value = True
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            content = cell_content(cell)
            if content is not None and content[0] is not function:
                self._add_value(self.closure, name, content[0])
        for name, value in _defaults(function):
            self._add_value(self.defaults, name, value)
        for name in global_names(function.__code__, function.__globals__):
            if name in function.__globals__ and not name.startswith("__"):
                self._add_value(self.globals, name, function.__globals__[name])

    def _add_class(self, cls: type) -> None:
        if self._is_reference(cls, cls.__module__ == "__main__"):
            self.modules.add(cls.__module__)
            return
        self.by_value = True
        for value in vars(cls).values():
            inner = getattr(value, "__func__", value)
            if isinstance(inner, FunctionType):
                self.add(inner)

    def _add_value(self, into: list[Facts], name: str, value: object) -> None:
        if isinstance(value, ModuleType):
            self.modules.add(value.__name__)
            return
        is_code = isinstance(value, FunctionType | BuiltinFunctionType | type)
        if is_code and self._is_reference(value, getattr(value, "__globals__", None) is self._variables):
            self.modules.add(str(value.__module__))
            return
        if (into is self.globals and any(entry["name"] == name for entry in into)) or id(value) in self._seen:
            return
        into.append(describe_value(value, self._namespace, name))
        if is_code:
            self.add(value)

    def _is_reference(self, obj: Any, of_main: bool) -> bool:
        name = getattr(obj, "__qualname__", "<unnamed>")
        return not of_main and imports_as(obj, getattr(obj, "__module__", None), name)


def _defaults(function: FunctionType) -> Iterator[tuple[str, object]]:
    values = function.__defaults__ or ()
    code = function.__code__
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    yield from zip(names, values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _names(func: Callable[..., Any], n: int) -> list[str]:
    names: tuple[str, ...] = ()
    if isinstance(func, FunctionType):
        names = func.__code__.co_varnames[: func.__code__.co_argcount]
    return [*names[:n], *(f"argument {index}" for index in range(len(names) + 1, n + 1))]
