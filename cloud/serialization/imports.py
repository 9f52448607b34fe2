"""Which modules a piece of source code, or of compiled code, mentions in its imports. Runs none of it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection
from types import CodeType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["absolute_names", "imported_by_code", "imported_by_source"]

_STATEMENT: Final = re.compile(rb"(?:^|[;:])[ \t]*(import|from)\b([^\n#;]*)", re.MULTILINE)
_TOP: Final = re.compile(r"(?:^|,)\s*(\w+)")
_BY_CALL: Final = (b"import_module", b"__import__")

Imports = tuple[tuple[int, str], ...]
"""Each import as (level, name): (0, 'pkg.mod') for ``import pkg.mod``, (1, 'mod.f') for ``from .mod import f``."""


def imported_by_source(source: bytes, known: Collection[str]) -> Imports:
    """List what a source file imports anywhere in it, also by ``importlib.import_module`` of a constant.

    Args:
        source: The file's bytes; what is no valid Python imports nothing.
        known: Top-level names nobody asks about. A file that seems to import only those is not parsed, since parsing
            takes a hundred times longer than looking; what it returns is then empty.
    """
    if not _mentions_others(source, known):
        return ()
    import ast
    import warnings

    try:
        # Python 3.11 raises SystemError when two threads build trees at a time; warnings are one for all threads.
        with _parsing[0], warnings.catch_warnings():
            # An invalid escape sequence was complained about when the module was imported.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    found: dict[tuple[int, str], None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(dict.fromkeys((0, alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            # What stands after 'import' may be a module too, where the base is a namespace package.
            found.update(dict.fromkeys((node.level, f"{base}{alias.name}") for alias in node.names))
        elif isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            name = first.value if isinstance(first, ast.Constant) else None
            if called in ("import_module", "__import__") and isinstance(name, str) and name[:1] not in ("", "."):
                found[0, name] = None
    return tuple(found)


_parsing = [threading.Lock()]


def _renew_lock() -> None:
    _parsing[0] = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


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
    import dis

    found: list[str] = []
    todo = [code]
    while todo:
        here = todo.pop()
        todo += [constant for constant in here.co_consts if isinstance(constant, CodeType)]
        found += [each.argval for each in dis.get_instructions(here) if each.opname == "IMPORT_NAME" and each.argval]
    return found


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
