"""Files and functions that a reader can hold in mind."""

from __future__ import annotations

import ast

from tests.architecture.modules import Function, own_modules

MODULE_LINES = 400
# The two state machines, the store that has a method for each of their changes, and a table: each is one noun, and
# easier to check in one place.
LARGER = {
    "cloud.engine.engine": 580,
    "cloud.engine.executor.processes": 560,
    "cloud.engine.store.sqlite": 460,
    "cloud.wire": 650,
}
FUNCTION_LINES = 80


def n_lines(function: Function) -> int:
    """From ``def`` to the end, without the docstring: describing a function well must not count against it."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    described = first.end_lineno - first.lineno + 1 if has_docstring and first.end_lineno else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - described


def n_code_lines(source: str) -> int:
    """Lines that hold code: neither blank nor comment nor docstring."""
    tree = ast.parse(source)
    told: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None and first.end_lineno:
                told.update(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for number, line in lines if number not in told and line.strip() and not line.strip().startswith("#"))


def test_modules_are_small() -> None:
    sizes = {module.name: n_code_lines(module.source) for module in own_modules()}
    assert {name: size for name, size in sizes.items() if size > LARGER.get(name, MODULE_LINES)} == {}


def test_functions_are_small() -> None:
    assert {
        f"{module.at(function)} {function.name}": n_lines(function)
        for module in own_modules()
        for function in module.functions()
        if n_lines(function) > FUNCTION_LINES
    } == {}


def test_a_docstring_is_no_size() -> None:
    tree = ast.parse('def f():\n    """One\n\n    two\n    """\n    return 1\n')
    function = tree.body[0]
    assert isinstance(function, Function)
    assert n_lines(function) == 2
