"""The tree of exceptions: complete, drawn as it is, and able to travel."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from cloud import errors
from cloud.errors import CloudException, ConfigurationError, KilledException, StoredFileError
from cloud.serialization.exceptions import dumps_exception, loads_exception
from cloud.serialization.namespace import Namespace


def family(root: type[BaseException]) -> list[type[BaseException]]:
    """The class and everything below it that the module defines."""
    found: list[type[BaseException]] = [root]
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            found += family(child)
    return found


ERRORS = family(CloudException)


def example(cls: type[BaseException]) -> CloudException:
    """An instance with every field set to something that is not its default."""
    if issubclass(cls, ConfigurationError):
        error: CloudException = cls(["first problem", "second problem"])
    elif issubclass(cls, StoredFileError):
        error = cls("what happened", "file name")
    else:
        assert issubclass(cls, CloudException)
        error = cls("what happened")
    error.jid, error.status, error.retry, error.hint = 7, "error", True, "do this"
    # Fields that only this class has, at whatever value; travelling must keep them.
    for name in inspect.get_annotations(cls):
        setattr(error, name, 11)
    return error


def drawn() -> dict[str, tuple[str | None, list[str]]]:
    """The tree in the module's docstring: name -> parent in the drawing, and builtins named in brackets."""
    found: dict[str, tuple[str | None, list[str]]] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^( {4}[│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))?(?: |$)", line)
        if match is None:
            continue
        indent, name, builtin = match.groups()
        while path and path[-1][0] >= len(indent):
            path.pop()
        found[name] = (path[-1][1] if path else None, [builtin] if builtin else [])
        path.append((len(indent), name))
    return found


def test_every_error_is_exported() -> None:
    assert sorted(cls.__name__ for cls in [*ERRORS, KilledException]) == sorted(errors.__all__)


def test_the_drawing_shows_every_error_below_its_parent() -> None:
    in_code = {
        cls.__name__: next((base.__name__ for base in cls.__bases__ if base in ERRORS), None)
        for cls in [*ERRORS, KilledException]
    }
    assert {name: parent for name, (parent, _) in drawn().items()} == in_code


def test_the_drawing_names_the_builtin_that_catches_an_error_too() -> None:
    for name, (_, builtins) in drawn().items():
        cls = getattr(errors, name)
        others = [base.__name__ for base in cls.__bases__ if base not in ERRORS]
        assert others == (builtins or (["Exception"] if cls is CloudException else [])), name


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_travels_whole(cls: type[BaseException], protocol: int) -> None:
    error = example(cls)
    error.add_note("a note")
    copy = pickle.loads(pickle.dumps(error, protocol))

    assert type(copy) is cls
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    assert (copy.jid, copy.status, copy.retry, copy.hint) == (7, "error", True, "do this")


@pytest.mark.parametrize("cls", [*ERRORS, KilledException])
def test_an_error_that_a_job_raised_keeps_its_cause(cls: type[BaseException]) -> None:
    error = cls("killed") if cls is KilledException else example(cls)
    error.__cause__ = KeyError("cause")
    content = dumps_exception(error, Namespace({}))
    assert content is not None
    copy = loads_exception(content)
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert type(copy.__cause__) is KeyError
    assert copy.__cause__.args == ("cause",)


def test_the_exception_inside_a_killed_job_travels() -> None:
    copy = pickle.loads(pickle.dumps(KilledException("Job terminated by user")))
    assert type(copy) is KilledException
    assert copy.args == ("Job terminated by user",)
