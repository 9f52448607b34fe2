"""Words of a command line into what the commands take, each with an error that names the word and the remedy."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from cloud.cli.output import Output, UsageError

__all__ = ["Commands", "Parser", "load_function", "parse_jids", "parse_json", "split_command"]

_PIECE = re.compile(r"([0-9]+)(?:-([0-9]+))?")

Run = Callable[[argparse.Namespace, Output], int]


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors, and takes the options that every command takes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        # Without a default: the value given before a command must not be replaced by that of the command's parser.
        self.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="write one JSON document, and errors as JSON"
        )
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise UsageError(f"{message}; see '{self.prog} --help'")

    def add_commands(self, name: str) -> Commands:
        """Make a place for commands below this one."""
        return Commands(self, name)


class Commands:
    """The commands below a parser.

    Args:
        parser: Whose.
        name: How help names the place where one is written.
    """

    def __init__(self, parser: Parser, name: str) -> None:
        self._places = parser.add_subparsers(metavar=name, title="commands")

    def add(self, name: str, run: Run | None, summary: str, **kwargs: Any) -> Parser:
        """Add a command.

        Args:
            name: Of the command.
            run: Carries it out and returns the exit code; None for one that only has commands below it.
            summary: One line for help.
        """
        parser: Parser = self._places.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", **kwargs
        )
        parser.set_defaults(verb=name, run=run or _only_a_group(parser))
        return parser


def _only_a_group(parser: Parser) -> Run:
    def run(options: argparse.Namespace, output: Output) -> int:
        parser.error("a command is missing")

    return run


def split_command(words: list[str]) -> tuple[list[str], list[str] | None]:
    """Cut the words of ``cloud exec … -- COMMAND ARGS`` at the first ``--``; others are left whole.

    Returns:
        The words for our parser, and those of the command; None if there is no ``--``.
    """
    if "--" not in words:
        return words, None
    at = words.index("--")
    ours, rest = words[:at], words[at + 1 :]
    verb = next((word for word in ours if not word.startswith("-")), None)
    return (ours, rest) if verb == "exec" else (words, None)


def parse_jids(text: str) -> range | list[range]:
    """The jids of ``1-4,7``, both ends included.

    Raises:
        UsageError: It is not written so.
    """
    pieces = []
    for piece in text.split(","):
        match = _PIECE.fullmatch(piece.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 1 <= first <= last:
            raise UsageError(f"{text!r} names no jobs: write numbers and ranges, such as 1-4,7")
        pieces.append(range(first, last + 1))
    return pieces[0] if len(pieces) == 1 else pieces


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        UsageError: It is none.
    """
    try:
        return json.loads(text)
    except ValueError:
        raise UsageError(f"argument {text!r} is not JSON: write numbers as they are and text as '\"text\"'") from None


def load_function(text: str) -> Callable[..., Any]:
    """The callable that ``package.module:function`` names; modules of the current directory are found, too.

    Raises:
        UsageError: There is none.
    """
    import importlib

    module, _, path = text.partition(":")
    if not module or not path:
        raise UsageError(f"{text!r} names no function: write package.module:function")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as exc:
        raise UsageError(f"module {module!r} cannot be imported here: {type(exc).__name__}: {exc}") from exc
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise UsageError(f"module {module!r} has no {path!r}: write package.module:function") from None
    if not callable(found):
        raise UsageError(f"{text!r} is no function but {type(found).__name__}")
    function: Callable[..., Any] = found
    return function
