"""Definitions of ``__main__`` as they were pickled last, and whether they would be pickled alike now.

A class is pickled by cloudpickle, in up to a millisecond; who sends a thousand instances of it sends it a thousand
times. It is looked at instead, part by part: what a part may be is what cannot change without being replaced. A class
with anything else in it, such as a list, is pickled anew each time.
"""

from __future__ import annotations

from _abc import _get_dump  # type: ignore[import-not-found]
from _operator import is_
from collections.abc import Collection
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)

from cloud.serialization.facts import cell_content, global_names, imports_as, sends_modules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

KINDS: Final = (FunctionType, type)
"""What is a definition."""

_FIXED: Final = frozenset(
    {
        *(int, str, float, bool, bytes, complex, type(None), type(...), type(NotImplemented)),
        *(ClassMethodDescriptorType, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType),
        WrapperDescriptorType,
    }
)
"""Types of parts that are what they are."""

_WRAPPERS: Final = frozenset({staticmethod, classmethod})
_METACLASSES: Final = frozenset({"abc.ABCMeta", "typing._ProtocolMeta", "enum.EnumType", "enum.EnumMeta"})
_OWN_BUSINESS: Final = frozenset(
    {
        *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__orig_bases__", "__parameters__"),
        *("__abstractmethods__", "_abc_impl", "__dataclass_fields__", "__dataclass_params__", "_field_defaults"),
        *("__protocol_attrs__", "__non_callable_proto_members__", "__static_attributes__", "__slotnames__"),
    }
)
"""Attributes in which Python and the standard library keep what they know of a class, and never change it."""

_MAKERS: Final = frozenset({"collections", "dataclasses", "reprlib", "typing"})
"""Modules that put functions into classes, around those they were given."""

_PRIVATE_TO: Final = frozenset({"collections", "_collections", "dataclasses", "enum"})
"""Modules whose private types are of things they put into classes."""

_MAX_DEPTH: Final = 4
_MAX_PARTS: Final = 2000


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
        parts = parts_of(value, variables)
        return parts is not None and len(parts) == len(self._parts) and all(map(is_, parts, self._parts))


_kept: Final[dict[tuple[int, str], Definition]] = {}
"""By whose globals, and name there: who defines a class again, as in a notebook, has the last one here only."""

_MAX_KEPT: Final = 1024


def known(name: str, variables: dict[str, Any]) -> Definition | None:
    """The definition behind a global, if it is known to be as it was pickled last."""
    found = _kept.get((id(variables), name))
    return found if found is not None and found.is_still(variables[name], variables) else None


def parts_of(value: Any, variables: dict[str, Any]) -> list[Any] | None:
    """Objects that are the same ones as long as a function or class would be pickled alike.

    None for anything else, and if there is something in it that may change and stay the same object.
    """
    if not isinstance(value, KINDS) or sends_modules():
        return None
    parts = _Parts(variables)
    try:
        if type(value) is FunctionType:
            parts.add_function(value, 0)
        else:
            parts.add_class(value)
    except _Changeable:
        return None
    return parts.found


def keep(
    name: str, variables: dict[str, Any], parts: list[Any] | None, content: bytes, digest: bytes, references: list[str]
) -> None:
    """Remember how a global was pickled, given its parts just before."""
    if parts is not None:
        if len(_kept) >= _MAX_KEPT:
            _kept.clear()
        _kept[id(variables), name] = Definition(variables[name], parts, content, digest, references)


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
            self._add_type(base)
        found += own
        found += own.values()
        self._add_annotations(own.get("__annotations__"))
        is_enum = kind.__module__ == "enum"
        if is_enum:
            for member in cls.__members__.values():
                found += member.__dict__
                self._add_all(member.__dict__.values(), 0)
        elif kind is not type and any(reference() is not None for reference in _get_dump(cls)[0]):
            raise _Changeable  # classes were registered with it, and others may be
        if any(field.metadata for field in own.get("__dataclass_fields__", {}).values()):
            raise _Changeable
        for name, value in own.items():
            if type(value) is FunctionType:
                self.add_function(value, 0)
            elif not (name in _OWN_BUSINESS or (is_enum and (type(value) is cls or name[0] == name[-1] == "_"))):
                self._add(value, 0)

    def add_function(self, function: FunctionType, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise _Changeable
        found, variables, code = self.found, self._variables, function.__code__
        defaults, own, cells = function.__defaults__, function.__globals__, function.__closure__
        found += (code, defaults, function.__qualname__, function.__doc__, variables.get(function.__qualname__))
        contents = [cell_content(cell) for cell in cells] if cells else []
        if own is variables:
            found += [name in variables for name in global_names(code, variables)]
        else:
            module = str(own.get("__name__"))
            if module in _MAKERS or module.startswith("namedtuple_"):
                for content in contents:
                    self._add_of_maker(content, depth)
                return
            if not imports_as(function, function.__module__, function.__qualname__):
                raise _Changeable  # it travels with globals of its own
        self._add_annotations(function.__annotations__)
        if defaults:
            self._add_all(defaults, depth)
        for named in (function.__kwdefaults__, function.__dict__):
            if named:
                found += named
                self._add_all(named.values(), depth)
        for content in contents:
            found.append(content is None)  # an empty cell
            self._add_all(content or (), depth)

    def _add_of_maker(self, content: tuple[Any] | None, depth: int) -> None:
        if content is not None:
            self.found += content
            if type(content[0]) is FunctionType:
                self.add_function(content[0], depth + 1)

    def _add_annotations(self, annotations: dict[str, Any] | None) -> None:
        if annotations:
            self.found += annotations
            self._add_all(annotations.values(), 0)

    def _add_all(self, values: Collection[Any], depth: int) -> None:
        if depth > _MAX_DEPTH or len(self.found) + len(values) > _MAX_PARTS:
            raise _Changeable
        for value in values:
            self.found.append(value)
            self._add(value, depth + 1)

    def _add(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _FIXED or value is self._cls:
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
        elif kind is BuiltinFunctionType:
            # Those of modules and types. Others are methods of an object that may change.
            if not isinstance(value.__self__, ModuleType | type | None):
                raise _Changeable
        elif kind.__module__ == "functools" and kind.__name__ == "cached_property":
            self._add_all((value.func,), depth)
        elif kind.__module__ in ("typing", "types"):
            self._add_all((*getattr(value, "__args__", ()), *getattr(value, "__metadata__", ())), depth)
        elif kind.__module__ not in _PRIVATE_TO or not kind.__name__.startswith("_"):
            raise _Changeable

    def _add_type(self, cls: type) -> None:
        if cls.__module__ == "__main__":
            named = self._variables.get(cls.__qualname__)
            # One that ``dataclass`` made anew, with slots, may still have the one before it in its methods.
            is_before = self._cls is not None and cls.__qualname__ == self._cls.__qualname__
            if named is not cls and not is_before:
                raise _Changeable
            self.found.append(named)
        elif cls.__module__ != "builtins" and not imports_as(cls, cls.__module__, cls.__qualname__):
            raise _Changeable
