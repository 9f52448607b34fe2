"""Definitions of ``__main__`` as they were pickled last, and whether they would be pickled alike now.

A class is pickled by cloudpickle, in up to a millisecond; who sends a thousand instances of it sends it a thousand
times. It is looked at instead, part by part: what a part may be is what cannot change without being replaced. A class
with anything else in it, such as a list, is pickled anew each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
)

from cloud.serialization.facts import cell_content, global_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_ATOMS: Final = frozenset({int, str, float, bool, bytes, complex, type(None)})
_FIXED: Final = frozenset(
    {
        BuiltinFunctionType,
        ClassMethodDescriptorType,
        GetSetDescriptorType,
        MemberDescriptorType,
        MethodDescriptorType,
        WrapperDescriptorType,
    }
)
"""Types of parts that are what they are."""

_WRAPPERS: Final = frozenset({staticmethod, classmethod})
_METACLASSES: Final = frozenset(
    {"builtins.type", "abc.ABCMeta", "typing._ProtocolMeta", "enum.EnumType", "enum.EnumMeta"}
)
_OWN_BUSINESS: Final = frozenset(
    {
        *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__orig_bases__", "__parameters__"),
        *("__abstractmethods__", "_abc_impl", "__dataclass_fields__", "__dataclass_params__", "_field_defaults"),
        *("__protocol_attrs__", "__non_callable_proto_members__", "__static_attributes__", "__slotnames__"),
    }
)
"""Attributes in which Python and the standard library keep what they know of a class, and never change it."""

_MAKERS: Final = frozenset({"dataclasses", "reprlib"})
"""Modules whose functions stand around those they were given, and hold only what they need for that."""

_PRIVATE_TO: Final = frozenset({"collections", "_collections", "dataclasses", "enum"})
"""Modules whose private types are of things they put into classes."""

_MAX_DEPTH: Final = 4


class _Changeable(Exception):
    """There is a part that may change and stay the same object."""


class Definition:
    """A function or class as it was pickled.

    Attributes:
        content: The pickle.
        digest: Of the content.
        references: Names of other globals that are in it.
    """

    __slots__ = ("_parts", "_value", "content", "digest", "references")

    def __init__(self, value: Any, parts: list[Any], content: bytes, digest: bytes, references: list[str]) -> None:
        self._value = value
        self._parts = parts
        self.content = content
        self.digest = digest
        self.references = references

    def is_still(self, value: Any, variables: dict[str, Any]) -> bool:
        """Whether this is the definition of that value, which is one of these globals."""
        if value is not self._value:
            return False
        parts = _parts_of(value, variables)
        return parts is not None and len(parts) == len(self._parts) and all(map(is_, parts, self._parts))


_kept: Final[dict[tuple[int, str], Definition]] = {}
"""By whose globals, and name there: who defines a class again, as in a notebook, has the last one here only."""

_MAX_KEPT: Final = 1024


def known(name: str, variables: dict[str, Any]) -> Definition | None:
    """The definition behind a global, if it is known to be as it was pickled last."""
    found = _kept.get((id(variables), name))
    return found if found is not None and found.is_still(variables[name], variables) else None


def keep(name: str, variables: dict[str, Any], content: bytes, digest: bytes, references: list[str]) -> None:
    """Remember how a global was pickled just now, if it can be told later whether it has changed."""
    value = variables[name]
    if isinstance(value, FunctionType | type):
        parts = _parts_of(value, variables)
        if parts is not None:
            if len(_kept) >= _MAX_KEPT:
                _kept.clear()
            _kept[id(variables), name] = Definition(value, parts, content, digest, references)


def _parts_of(value: Any, variables: dict[str, Any]) -> list[Any] | None:
    """Objects that are the same ones as long as a function or class would be pickled alike."""
    parts = _Parts(variables)
    try:
        if type(value) is FunctionType:
            parts.add_function(value, 0)
        else:
            parts.add_class(value)
    except _Changeable:
        return None
    return parts.found


class _Parts:
    """What a definition consists of, as far as it can be replaced."""

    __slots__ = ("_cls", "_variables", "found")

    def __init__(self, variables: dict[str, Any]) -> None:
        self.found: list[Any] = []
        self._variables = variables
        self._cls: type | None = None

    def add_class(self, cls: Any) -> None:
        kind, own = type(cls), cls.__dict__
        if kind is not type and f"{kind.__module__}.{kind.__qualname__}" not in _METACLASSES:
            raise _Changeable
        found, self._cls = self.found, cls
        found.append(cls.__bases__)
        for base in cls.__bases__:
            found.append(self._variables.get(base.__name__))  # it travels by its name while it has that
        found += own
        found += own.values()
        found += own.get("__annotations__", {}).values()
        is_enum = kind.__module__ == "enum"
        for name, value in own.items():
            if type(value) is FunctionType:
                self.add_function(value, 0)
            elif not (name in _OWN_BUSINESS or (is_enum and (type(value) is cls or name[0] == name[-1] == "_"))):
                self._add(value, 0)

    def add_function(self, function: FunctionType, depth: int) -> None:
        found, variables, code = self.found, self._variables, function.__code__
        defaults, own = function.__defaults__, function.__globals__
        found += (code, defaults, function.__qualname__, variables.get(function.__qualname__))
        if own is variables:
            found += [name in variables for name in global_names(code)]
        elif own.get("__name__") in _MAKERS:
            return
        if function.__annotations__:
            found += function.__annotations__.values()
        if defaults:
            self._add_all(defaults, depth)
        for named in (function.__kwdefaults__, function.__dict__):
            if named:
                found += named
                self._add_all(named.values(), depth)
        for cell in function.__closure__ or ():
            content = cell_content(cell)
            self._add_all((None,) if content is None else content, depth)

    def _add_all(self, values: Iterable[Any], depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise _Changeable
        for value in values:
            self.found.append(value)
            self._add(value, depth + 1)

    def _add(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _ATOMS or kind in _FIXED or value is self._cls:
            return
        if kind is FunctionType:
            self.add_function(value, depth)
        elif kind in _WRAPPERS:
            self._add_all((value.__func__,), depth)
        elif kind is property:
            self._add_all((value.fget, value.fset, value.fdel), depth)
        elif kind is tuple:
            self._add_all(value, depth)
        elif isinstance(value, type):
            self._add_type(value)
        elif kind.__module__ == "functools" and kind.__name__ == "cached_property":
            self._add_all((value.func,), depth)
        elif kind.__module__ not in _PRIVATE_TO or not kind.__name__.startswith("_"):
            raise _Changeable

    def _add_type(self, cls: type) -> None:
        named = self._variables.get(cls.__qualname__)
        # One that ``dataclass`` made anew, with slots, may still have the one before it in its methods.
        is_before = self._cls is not None and cls.__qualname__ == self._cls.__qualname__
        if cls.__module__ == "__main__" and named is not cls and not is_before:
            raise _Changeable
        self.found.append(named)
