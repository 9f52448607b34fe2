"""Which modules a piece of source code, or of compiled code, mentions in its imports. Runs none of it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Iterator
from types import CodeType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["absolute_names", "imported_by_code", "imported_by_source"]

_STATEMENT: Final = re.compile(rb"(?:^|[;:])[ \t]*(import|from)\b([^\n#;]*)", re.MULTILINE)
_TOP: Final = re.compile(r"(?:^|,)\s*(\w+)")
_BY_CALL: Final = (b"import_module", b"__import__")
_BY_CALL_NAMES: Final = frozenset({"import_module", "__import__"})
_DOTTED: Final = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")

Imports = tuple[tuple[int, str], ...]
"""Each import as (level, name): (0, 'pkg.mod') for ``import pkg.mod``, (1, 'mod.f') for ``from .mod import f``."""


def imported_by_source(source: bytes, known: Collection[str]) -> Imports:
    """List what a source file imports anywhere in it, also by ``importlib.import_module`` of a constant.

    Args:
        source: The file's bytes; what is no valid Python imports nothing.
        known: Top-level names nobody asks about. A file that seems to import only those is not compiled, since that
            takes a hundred times longer than looking; what it returns is then empty.
    """
    if not _mentions_others(source, known):
        return ()
    code = _compiled(source)
    found: dict[tuple[int, str], None] = {}
    for here in () if code is None else _nested(code):
        for level, names, module in _import_statements(here):
            if names is None:
                found[0, module] = None
            else:
                # What stands after 'import' may be a module too, where the base is a namespace package.
                base = f"{module}." if module else ""
                found.update(dict.fromkeys((level, f"{base}{name}") for name in names))
        if not _BY_CALL_NAMES.isdisjoint(here.co_names):
            # Which of the texts is the module's name does not matter: others are names of no module.
            texts = [each for each in here.co_consts if isinstance(each, str) and _DOTTED.fullmatch(each)]
            found.update(dict.fromkeys((0, text) for text in texts))
    return tuple(found)


def _compiled(source: bytes) -> CodeType | None:
    # Not ast.parse: in Python 3.11 two threads that build such trees at a time get SystemError, and whoever formats a
    # traceback builds one.
    import warnings

    with _compiling[0], warnings.catch_warnings():
        # An invalid escape sequence was complained about when the module was imported.
        warnings.simplefilter("ignore")
        try:
            return compile(source, "<user module>", "exec", dont_inherit=True, optimize=0)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


# Filters of warnings are one for all threads.
_compiling = [threading.Lock()]


def _renew_lock() -> None:
    _compiling[0] = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _nested(code: CodeType) -> Iterator[CodeType]:
    todo = [code]
    while todo:
        here = todo.pop()
        todo += [constant for constant in here.co_consts if isinstance(constant, CodeType)]
        yield here


def _import_statements(code: CodeType) -> Iterator[tuple[int, tuple[str, ...] | None, str]]:
    """(level, names after 'import' or None without 'from', module) of each in one code object."""
    # Each is two constants, the level and the names, and then IMPORT_NAME. dis would take many times longer.
    from opcode import EXTENDED_ARG, opmap

    load, small, imports = opmap["LOAD_CONST"], opmap.get("LOAD_SMALL_INT"), opmap["IMPORT_NAME"]
    raw, names, constants = code.co_code, code.co_names, code.co_consts
    loaded: list[object] = [0, None]
    high = 0
    for at in range(0, len(raw), 2):
        op, argument = raw[at], raw[at + 1] | high
        high = argument << 8 if op == EXTENDED_ARG else 0
        if op == load:
            loaded = [loaded[-1], constants[argument]]
        elif op == small:
            loaded = [loaded[-1], argument]
        elif op == imports:
            level, after = loaded
            yield level if isinstance(level, int) else 0, after if isinstance(after, tuple) else None, names[argument]


def _mentions_others(source: bytes, known: Collection[str]) -> bool:
    if any(each in source for each in _BY_CALL):
        return True
    for word, rest in _STATEMENT.findall(source):
        text = rest.decode("utf-8", "replace").strip()
        if text.endswith("\\"):
            return True
        tops = _TOP.findall(text if word == b"import" else text.partition(" ")[0].partition(".")[0])
        # Without a name it is a relative import, which matters in a namespace package.
        if not tops or not all(top in known for top in tops):
            return True
    return False


def imported_by_code(code: CodeType) -> list[str]:
    """List what a function imports when it runs, in the functions inside it too; absolute names only."""
    return [module for here in _nested(code) for level, _, module in _import_statements(here) if module and not level]


def absolute_names(imports: Imports, module: str, *, is_package: bool) -> list[str]:
    """Make imports of a module absolute; those that lead above the top-level package are dropped.

    Args:
        imports: From ``imported_by_source``.
        module: The module's dotted name.
        is_package: True when the file is a package's ``__init__.py``.
    """
    parts = module.split(".")
    found: list[str] = []
    for level, name in imports:
        if not level:
            found.append(name)
        elif (n := len(parts) - level + is_package) > 0:
            found.append(".".join([*parts[:n], name]))
    return found
