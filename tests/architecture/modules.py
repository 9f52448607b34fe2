"""The package's own sources, parsed: what each module imports, and where."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "cloud"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name.

    Attributes:
        target: As written, made absolute: ``cloud.engine.store`` for ``from cloud.engine import store``, too.
        line: Of the statement.
        in_function: The import waits for a call.
        typing_only: It stands under ``if TYPE_CHECKING``.
    """

    target: str
    line: int
    in_function: bool
    typing_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One source file; ``name`` is its dotted name, that of the package for an ``__init__.py``."""

    name: str
    is_package: bool
    source: str
    tree: ast.Module

    @classmethod
    def parse(cls, name: str, source: str, *, is_package: bool = False) -> Module:
        return cls(name=name, is_package=is_package, source=source, tree=ast.parse(source))

    def at(self, node: ast.AST | int) -> str:
        """Where: what a reader of a failing test can open."""
        line = node if isinstance(node, int) else getattr(node, "lineno", 0)
        return f"{self.name}:{line}"

    def is_in(self, *rooms: str) -> bool:
        """True when the module is one of ``rooms``, or below one."""
        return any(is_below(self.name, room) for room in rooms)

    def functions(self) -> Iterator[Function]:
        """Every function and method, nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def imports(self) -> list[Import]:
        """Every import of the file, in order."""
        found: list[Import] = []
        self._collect(self.tree, found, in_function=False, typing_only=False)
        return found

    def _collect(self, parent: ast.AST, found: list[Import], *, in_function: bool, typing_only: bool) -> None:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found += [
                    Import(target=target, line=node.lineno, in_function=in_function, typing_only=typing_only)
                    for target in self._targets(node)
                ]
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                body, rest = ast.Module(node.body, []), ast.Module(node.orelse, [])
                self._collect(body, found, in_function=in_function, typing_only=True)
                self._collect(rest, found, in_function=in_function, typing_only=typing_only)
            else:
                inside = in_function or isinstance(node, Function | ast.Lambda)
                self._collect(node, found, in_function=inside, typing_only=typing_only)

    def _targets(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = node.module or ""
        if node.level:
            parts = self.name.split(".")
            here = parts[: len(parts) - node.level + self.is_package]
            base = ".".join([*here, base]).rstrip(".")
        return [f"{base}.{alias.name}" for alias in node.names]


def is_below(name: str, room: str) -> bool:
    """True when ``name`` is ``room`` or a name inside it."""
    return name == room or name.startswith(f"{room}.")


@cache
def own_modules() -> tuple[Module, ...]:
    """Every module of the package, sorted by name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Module.parse(name, path.read_text(encoding="utf-8"), is_package=is_package))
    return tuple(found)


def own_imports(module: Module, known: frozenset[str]) -> list[tuple[Import, str]]:
    """The imports of this package's modules among a module's imports, each with the module it names."""
    found = []
    for item in module.imports():
        target = item.target
        while target and target not in known:
            target = target.rpartition(".")[0]
        if target:
            found.append((item, target))
    return found
