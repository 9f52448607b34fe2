"""``__all__`` is what a module offers: all of it, and nothing that is not there."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest

from tests.architecture.modules import REPO, Module, own_modules
from tests.architecture.test_layers import floor

FACES = floor("cloud")


def declared(module: Module) -> list[str] | None:
    """The names in a module's ``__all__``; None when it has none."""
    for node in module.tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            value = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return [str(name) for name in value]
    return None


DECLARING = [module for module in own_modules() if declared(module) is not None]


def named(modules: list[Module]) -> list[str]:
    return [module.name for module in modules]


def test_every_face_says_what_it_offers() -> None:
    faces = [module for module in own_modules() if module.name == "cloud.errors" or floor(module.name) == FACES]
    assert [
        module.name
        for module in faces
        if not module.name.rpartition(".")[2].startswith("_") and module not in DECLARING
    ] == []


@pytest.mark.parametrize("module", DECLARING, ids=named(DECLARING))
def test_every_name_is_there_once(module: Module) -> None:
    names = declared(module) or []
    assert len(names) == len(set(names))
    loaded = importlib.import_module(module.name)
    assert [name for name in names if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", DECLARING, ids=named(DECLARING))
def test_every_public_definition_is_offered(module: Module) -> None:
    names = declared(module) or []
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node.name for node in module.tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
    assert [name for name in public if name not in names] == []


@pytest.mark.parametrize("module", DECLARING, ids=named(DECLARING))
def test_everything_offered_is_documented(module: Module) -> None:
    loaded = importlib.import_module(module.name)
    offered = {name: getattr(loaded, name) for name in declared(module) or []}
    assert [
        name
        for name, value in offered.items()
        if (inspect.isclass(value) or inspect.isroutine(value)) and not (value.__doc__ or "").strip()
    ] == []


def test_star_imports_see_the_same() -> None:
    import cloud

    seen: dict[str, object] = {}
    exec("from cloud import *", seen)
    assert seen.keys() - {"__builtins__"} == set(cloud.__all__)


def test_the_build_can_read_the_version() -> None:
    import cloud

    assert f'\n__version__ = "{cloud.__version__}"\n' in (REPO / "cloud" / "__init__.py").read_text(encoding="utf-8")
