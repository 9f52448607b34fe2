"""Where modules come from, imported or not; finding one imports nothing and loads nothing."""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

__all__ = ["INSIDE", "Unit", "find_in", "findable", "imported"]

INSIDE: Final = ("built-in", "frozen")
"""Origins of modules that are in the interpreter itself."""


class Unit(NamedTuple):
    """What travels whole or not at all: a module, or a package that is not a namespace.

    Attributes:
        name: Dotted.
        origin: Its file, or 'built-in' or 'frozen'. None for a namespace package: no unit, but a place where units are.
        folders: Of a package; empty for a module.
    """

    name: str
    origin: str | None
    folders: tuple[str, ...]


def imported(name: str) -> Unit | None:
    """Tell where a module of ``sys.modules`` came from; None for one made at run time."""
    try:
        # Not getattr: a lazy module would load itself.
        spec = object.__getattribute__(sys.modules[name], "__dict__").get("__spec__")
    except (AttributeError, KeyError):
        return None
    return _of_spec(name, spec)


def findable(name: str) -> Unit | None:
    """Tell where ``import`` would find a top-level module, importing nothing."""
    for finder in list(sys.meta_path):
        find = getattr(finder, "find_spec", None)
        try:
            spec = None if find is None else find(name, None)
        except Exception:  # noqa: S112, BLE001 - a broken finder of the user's says nothing about the others
            continue
        if spec is not None:
            return _of_spec(name, spec)
    return None


def _of_spec(name: str, spec: Any) -> Unit | None:
    try:
        origin, locations = spec.origin, spec.submodule_search_locations
        folders = () if locations is None else tuple(each for each in locations if isinstance(each, str))
        if isinstance(origin, str) and (spec.has_location or origin in INSIDE):
            return Unit(name, origin, folders)
    except (AttributeError, TypeError, KeyError):
        return None
    return Unit(name, None, folders) if folders and origin in (None, "namespace") else None


def find_in(folders: tuple[str, ...], name: str, last: str) -> Unit | None:
    """Tell where ``import`` would find a module of a namespace package, which need not be imported itself."""
    portions: list[str] = []
    for folder in folders:
        here = os.path.join(folder, last)
        for suffix in (".py", *EXTENSION_SUFFIXES):
            if os.path.isfile(package := os.path.join(here, f"__init__{suffix}")):
                return Unit(name, package, (here,))
        for suffix in (*EXTENSION_SUFFIXES, ".py"):
            if os.path.isfile(f"{here}{suffix}"):
                return Unit(name, f"{here}{suffix}", ())
        if os.path.isdir(here):
            portions.append(here)
    return Unit(name, None, tuple(portions)) if portions else None
