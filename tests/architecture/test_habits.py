"""What the package refuses, where a program can tell."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from cloud.jobs import STATUS_LABELS
from tests.architecture.modules import Module, own_modules

PICKLERS = {"_pickle", "cloudpickle", "dill", "pickle", "shelve"}
# The client over HTTP tells the server which cloudpickle its payloads are from.
PICKLING_ROOMS = ("cloud.serialization", "cloud.errors", "cloud.backends.http")

Check = Callable[[Module], Iterator[str]]


def prints(module: Module) -> Iterator[str]:
    """Output is the user's: the library logs, only the command line prints."""
    if not module.is_in("cloud.cli"):
        for call in calls(module, "print"):
            yield module.at(call)


def bare_excepts(module: Module) -> Iterator[str]:
    """``except:`` swallows what nobody thought of."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield module.at(node)


def mutable_defaults(module: Module) -> Iterator[str]:
    """A default that one call changes is changed for the next."""
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for function in module.functions():
        for default in [*function.args.defaults, *filter(None, function.args.kw_defaults)]:
            made = isinstance(default, ast.Call) and getattr(default.func, "id", "") in {
                "list",
                "dict",
                "set",
                "bytearray",
            }
            if made or isinstance(default, mutable):
                yield f"{module.at(default)} {function.name}"


def picklers(module: Module) -> Iterator[str]:
    """One room pickles; everything else handles bytes."""
    if not module.is_in(*PICKLING_ROOMS):
        for item in module.imports():
            if item.target.partition(".")[0] in PICKLERS:
                yield f"{module.at(item.line)} {item.target}"


def global_statements(module: Module) -> Iterator[str]:
    """Process-wide state lives in one place."""
    if module.name != "cloud.current":
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                yield f"{module.at(node)} {', '.join(node.names)}"


def status_strings(module: Module) -> Iterator[str]:
    """States are members of an enum; their names as text exist where users and the wire see them."""
    if not module.is_in("cloud.jobs", "cloud.wire"):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Compare):
                yield from (f"{module.at(node)} {text}" for text in compared_texts(node) if text in STATUS_LABELS)


def compared_texts(node: ast.Compare) -> Iterator[str]:
    """The strings that something is equal to, or one of; a key that is looked for in a mapping is none of them."""
    equal = any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
    for side in (node.left, *node.comparators):
        for item in side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side] if equal else []:
            if isinstance(item, ast.Constant) and isinstance(item.value, str):
                yield item.value


def backend_guesses(module: Module) -> Iterator[str]:
    """A backend declares what it can do; nobody asks what it is."""
    for name in ("hasattr", "isinstance"):
        for call in calls(module, name):
            if call.args and ast.unparse(call.args[0]).endswith("backend"):
                yield module.at(call)


def calls(module: Module, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


BAD: dict[Check, str] = {
    prints: "print(1)",
    bare_excepts: "try:\n    pass\nexcept:\n    pass",
    mutable_defaults: "def f(*, x=[]): pass",
    picklers: "def f():\n    from pickle import loads",
    global_statements: "def f():\n    global x",
    status_strings: "if status in ('done', 'x'): pass",
    backend_guesses: "hasattr(self._backend, 'x')",
}


@pytest.mark.parametrize("check", BAD, ids=lambda check: check.__name__)
def test_the_package_has_no(check: Check) -> None:
    assert [found for module in own_modules() for found in check(module)] == []


@pytest.mark.parametrize("check", BAD, ids=lambda check: check.__name__)
def test_the_check_can_fail_for(check: Check) -> None:
    assert list(check(Module.parse("cloud.client", BAD[check]))) != []
    assert list(check(Module.parse("cloud.client", "def f(x=None):\n    return x == 'word' and 'error' in x"))) == []
