"""How things travel that pickle and cloudpickle get wrong or refuse: classes with slots, sentinels, sockets, ..."""

from __future__ import annotations

import copyreg
import sys
from types import MemberDescriptorType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

_OF_ENUMS: Final = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_"})
_COMMON_REDUCERS: Final = frozenset(("_reduce_method", "_reduce_method_descriptor", "_reduce_partial"))
"""The others of multiprocessing hand over sockets, connections and shared memory, or refuse to."""

_OF_DISPATCHING: Final = frozenset({"__wrapped__", "_clear_cache", "dispatch", "register", "registry"})
_TYPING: Final = frozenset({"TypeVar", "ParamSpec", "TypeVarTuple", "NewType"})


def with_slots(cls: type, arguments: tuple[Any, ...], state: Any) -> tuple[tuple[Any, ...], Any]:
    """Arguments and state of cloudpickle's for making a class, which get it the slots it has.

    Without them each instance has a ``__dict__`` there, and cannot come back to a class that has none.
    """
    variables = vars(cls)
    if "__slots__" not in variables or cls.__itemsize__:  # tuples and the like can have none
        return arguments, state
    slots = [name for name, value in variables.items() if type(value) is MemberDescriptorType]
    slots += [name for name in ("__dict__", "__weakref__") if name in variables]
    constructor, name, bases, keywords, *rest = arguments
    attributes, *others = state
    kept = {name: value for name, value in attributes.items() if type(value) is not MemberDescriptorType}
    return (constructor, name, bases, {**keywords, "__slots__": tuple(slots)}, *rest), (kept, *others)


def drop_attributes(cls: type, kept: dict[str, Any]) -> None:
    """Delete from a class that is to be as it is elsewhere what it has not there."""
    if type(cls).__module__ == "enum":
        return  # it cannot lose members
    gone = [name for name, value in vars(cls).items() if name not in kept and type(value) is not MemberDescriptorType]
    for name in gone:
        if name != "_abc_impl" and not (name[0] == name[-1] == "_"):
            delattr(cls, name)


def members_of(cls: Any) -> dict[str, dict[str, Any]]:
    """What members of an enum have beside name and value: their ``__init__`` may have set it."""
    found = {}
    for name, member in cls.__members__.items():
        own = {key: value for key, value in member.__dict__.items() if key not in _OF_ENUMS}
        if own:
            found[name] = own
    return found


def fill_members(cls: Any, members: dict[str, dict[str, Any]]) -> None:
    """Set on the members of an enum made anew what ``members_of`` found on them."""
    for name, own in members.items():
        cls.__members__[name].__dict__.update(own)


def import_module(name: str) -> ModuleType:
    """A module, imported if it was not."""
    import importlib

    return importlib.import_module(name)


def make_cached(function: Any, parameters: dict[str, Any]) -> Any:
    """What ``functools.lru_cache`` makes of a function, with nothing in it."""
    import functools

    return functools.lru_cache(**parameters)(function)


def reduce_property(obj: Any) -> Any:
    """``functools.cached_property`` has a lock before Python 3.12."""
    return (make_property, (obj.func, obj.attrname)) if hasattr(obj, "lock") else NotImplemented


def make_property(function: Callable[[Any], Any], name: str) -> Any:
    """A ``functools.cached_property`` that keeps its values under that name."""
    from functools import cached_property

    made = cached_property(function)
    made.attrname = name
    return made


def reduce_dispatching(function: Any) -> Any:
    """A function of ``functools.singledispatch``, which pickle takes for one of functools' own. None for others."""
    made_so = function.__code__.co_qualname == "singledispatch.<locals>.wrapper"
    if not (made_so and {"registry", "__wrapped__"} <= vars(function).keys()):
        return None
    own = {name: value for name, value in vars(function).items() if name not in _OF_DISPATCHING}
    state = function.__wrapped__, dict(function.registry), own
    return make_dispatching, (function.__name__,), state, None, None, fill_dispatching


def make_dispatching(name: str) -> Any:
    """One of that name that knows no type yet."""
    import functools

    def undefined(*_: Any) -> None:
        raise AssertionError("this is filled before it is called")

    undefined.__name__ = name
    return functools.singledispatch(undefined)


def fill_dispatching(function: Any, state: tuple[Any, dict[type, Any], dict[str, Any]]) -> None:
    """Let it know what is to be called for which type."""
    import functools

    wrapped, registry, own = state
    for cls, called in registry.items():
        function.register(cls, called)
    functools.update_wrapper(function, wrapped)
    vars(function).update(own)


def name_in_main(obj: Any, kind: type) -> tuple[str, Any] | None:
    """What pickles as the name of a global of ``__main__``: that name, and how the object itself is made.

    That are type variables and the like, and objects whose ``__reduce__`` says a name. Where it says how the object is
    made instead, the name is empty, as it must not be asked again. None for all others.
    """
    if kind.__module__ == "typing":
        if kind.__name__ in _TYPING and getattr(obj, "__module__", None) == "__main__":
            return obj.__name__, (make_typing, _typing_arguments(obj, kind.__name__))
        return None
    if kind.__module__ != "__main__" or kind in copyreg.dispatch_table:
        return None
    if all(getattr(kind, name) is getattr(object, name) for name in ("__reduce__", "__reduce_ex__")):
        return None
    reduced = obj.__reduce_ex__(5)
    if isinstance(reduced, str):
        return reduced, (copyreg.__newobj__, (kind,), getattr(obj, "__dict__", None) or None)  # type: ignore[attr-defined]
    return "", reduced


def reduce_handed_over(obj: Any, kind: type) -> Any:
    """What multiprocessing can hand over to another process: sockets, connections, shared memory."""
    handing_over = sys.modules.get("multiprocessing.reduction")
    if handing_over is not None:
        reducer = handing_over.ForkingPickler._extra_reducers.get(kind)
        # Not those of partials and methods, which pickle knows better by now.
        if reducer is not None and reducer.__name__ not in _COMMON_REDUCERS:
            return reducer(obj)
    return NotImplemented


def _typing_arguments(obj: Any, kind: str) -> tuple[Any, ...]:
    name = obj.__name__
    if kind == "TypeVarTuple":
        return kind, (name,), {}
    if kind == "NewType":
        return kind, (name, obj.__supertype__), {}
    keywords = {"bound": obj.__bound__, "covariant": obj.__covariant__, "contravariant": obj.__contravariant__}
    return kind, (name, *getattr(obj, "__constraints__", ())), keywords


def make_typing(kind: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A ``TypeVar``, ``ParamSpec``, ``TypeVarTuple`` or ``NewType`` of ``__main__``."""
    import typing

    made = getattr(typing, kind)(*arguments, **keywords)
    made.__module__ = "__main__"
    return made
