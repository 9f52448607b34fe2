"""Facts about objects by which pickling decides: what a function refers to, and what others can import."""

from __future__ import annotations

import marshal
import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final


def cell_content(cell: CellType) -> tuple[Any] | None:
    """What the cell holds, in a tuple; None if it is empty."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return None


_codes: dict[int, tuple[CodeType, bytes, tuple[str, ...], tuple[str, ...]]] = {}


def _code_entry(code: CodeType) -> tuple[CodeType, bytes, tuple[str, ...], tuple[str, ...]]:
    entry = _codes.get(id(code))
    if entry is None or entry[0] is not code:
        if len(_codes) > 1024:
            _codes.clear()
        tree = list(_tree_of(code))
        names = tuple(dict.fromkeys(name for each in tree for name in each.co_names))
        # Not of attributes: a global that only has the name of one is none of the function's business, and may be
        # large. But of those of __main__ itself, if it may be at hand.
        at_hand = any(not _AT_HAND.isdisjoint((*each.co_names, *_texts(each), *each.co_freevars)) for each in tree)
        looked_up = names if at_hand else tuple(dict.fromkeys(name for each in tree for name in _looked_up(each)))
        # Version 2 of marshal writes no back references: those depend on reference counts, and equal code
        # must give equal bytes for digests to match.
        entry = _codes[id(code)] = (code, marshal.dumps(code, 2), looked_up, names)
    return entry


_AT_HAND: Final = frozenset({"__main__", "__name__", "__module__", "modules", "getmodule"})
"""Whose code has one of these may get at the module it is in."""


def code_bytes(code: CodeType) -> bytes:
    """The code marshalled; equal code gives equal bytes."""
    return _code_entry(code)[1]


def global_names(code: CodeType, variables: dict[str, Any]) -> tuple[str, ...]:
    """Names that the code, or code nested in it, may look up in these globals."""
    _, _, looked_up, names = _code_entry(code)
    for name in looked_up:
        value = variables.get(name)
        if type(value) is ModuleType and value.__dict__ is variables:
            return names  # the module itself, by a name of its own
    return looked_up


def globals_of(value: Any, variables: dict[str, Any]) -> list[str]:
    """Those of these globals that a function over them looks up; none for anything else."""
    if type(value) is not FunctionType or value.__globals__ is not variables:
        return []
    return [name for name in global_names(value.__code__, variables) if name in variables]


def rebinds(code: CodeType) -> bool:
    """True when the code, or code nested in it, may assign to a variable that it shares with another function."""
    from opcode import opmap

    found = not {opmap["STORE_DEREF"], opmap["DELETE_DEREF"]}.isdisjoint(code.co_code[::2])
    return found or any(rebinds(each) for each in code.co_consts if isinstance(each, CodeType))


def _tree_of(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _tree_of(constant)


def _texts(code: CodeType) -> list[str]:
    return [each for each in code.co_consts if type(each) is str]


def _looked_up(code: CodeType) -> Iterator[str]:
    from opcode import opmap

    of_globals = {opmap[name] for name in _GLOBAL_OPERATIONS if name in opmap}
    load, extended, names, high = opmap["LOAD_GLOBAL"], opmap["EXTENDED_ARG"], code.co_names, 0
    for operation, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        argument = high << 8 | low
        high = argument if operation == extended else 0
        if operation in of_globals:
            yield names[argument >> 1 if operation == load else argument]


_GLOBAL_OPERATIONS: Final = (
    *("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"),
    *("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"),  # in the bodies of classes
)


def imports_as(obj: Any, module: str | None, qualname: str) -> bool:
    """True when importing ``module`` and walking ``qualname`` gives exactly this object, here and in a worker."""
    if module is None or "<" in qualname:
        return False
    found: Any = sys.modules.get(module)
    if found is None:
        return False
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found is obj and importable(module)


_importable: dict[tuple[str, int], bool] = {}
_EVERYWHERE: Final = frozenset((*sys.builtin_module_names, *sys.stdlib_module_names))


def importable(name: str) -> bool:
    """True when another process with the same ``sys.path`` can import the module."""
    top = name.partition(".")[0]
    if top == "__main__":
        return False
    if top in _EVERYWHERE:
        return True
    module = sys.modules.get(top)
    key = (name, id(module))
    known = _importable.get(key)
    if known is None:
        known = _importable[key] = _find(top) and getattr(sys.modules.get(name), "__spec__", None) is not None
    return known


def _find(top: str) -> bool:
    # The finders, not sys.modules: a module made at run time, or loaded from a path that is not on sys.path,
    # is known here and nowhere else.
    for finder in sys.meta_path:
        find: Callable[..., Any] | None = getattr(finder, "find_spec", None)
        try:
            if find is not None and find(top, None) is not None:
                return True
        except Exception:  # noqa: S112, BLE001 - a broken finder of the user's says nothing about the others
            continue
    return False


def sends_modules() -> bool:
    """True when what can be imported travels by value, too, and may change: the program has registered modules so."""
    registered = getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", set)
    return bool(registered())
