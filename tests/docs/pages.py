"""Markdown pages as programs: every block that can be run, at the line where it stands on the page.

A program has as many lines as its page, and each line of code keeps its number: the traceback of a failing program
names the line of the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent

_FENCE = re.compile(r"^(?P<indent>[ >]*)(?P<fence>`{3,}|~{3,})\s*(?P<info>.*?)\s*$")
_NO_RUN = re.compile(r"\bno-run\b(?::\s*(?P<reason>\S.*))?")
_EXIT = re.compile(r"\bexit=(\d+)\b")
_STEPS = '__import__("tests.docs.steps", fromlist=["steps"])'

PYTHON = ("python", "py", "python3", "pycon")
SHELL = ("sh", "bash", "shell", "console")


class UnexplainedSkip(ValueError):
    """A block is marked ``no-run`` and does not say why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block.

    Attributes:
        line: Number of its first line of content, from 1.
        language: First word after the fence, lower case.
        info: All of the words after the fence.
        text: Its content, dedented.
    """

    line: int
    language: str
    info: str
    text: str

    @property
    def is_console(self) -> bool:
        return self.language in PYTHON and self.text.lstrip().startswith(">>>")

    @property
    def is_code(self) -> bool:
        return self.language in PYTHON and not self.is_console

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL and self.text.startswith("$ cloud ")

    def skipped(self) -> bool:
        """True for ``no-run: reason``.

        Raises:
            UnexplainedSkip: The reason is missing.
        """
        match = _NO_RUN.search(self.info)
        if match is not None and match["reason"] is None:
            raise UnexplainedSkip(f"line {self.line - 1}: write `no-run: reason`, so that a reader knows why")
        return match is not None


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order; one that is never closed ends with the page."""
    opened: re.Match[str] | None = None
    content: list[str] = []
    for number, line in enumerate([*page.splitlines(), None], 1):
        match = None if line is None else _FENCE.match(line)
        if opened is None:
            opened, content = match, []
        elif line is None or (match and not match["info"] and match["fence"].startswith(opened["fence"])):
            info = opened["info"]
            language = info.split()[0].lower() if info else ""
            yield Block(line=number - len(content), language=language, info=info, text=dedent("\n".join(content)))
            opened = None
        else:
            content.append(line)


def program(page: str) -> str | None:
    """The program that runs every block of a page in order; None when there is nothing to run.

    Raises:
        UnexplainedSkip: A block is marked ``no-run`` without a reason.
    """
    lines = [""] * len(page.splitlines())
    runnable = [
        block for block in blocks(page) if (block.is_code or block.is_console or block.is_shell) and not block.skipped()
    ]
    for block in runnable:
        if block.is_code:
            for offset, line in enumerate(block.text.split("\n")):
                lines[block.line - 1 + offset] = line
        elif block.is_console:
            lines[block.line - 1] = f"{_STEPS}.console({block.text!r}, {block.line}, globals())"
        else:
            for offset, command, expected in commands(block.text):
                line_number = block.line + offset
                wanted = _EXIT.search(block.info)
                code = int(wanted[1]) if wanted else 0
                lines[line_number - 1] = f"{_STEPS}.shell({command!r}, {expected!r}, {code}, {line_number})"
    return "\n".join(lines) + "\n" if runnable else None


def commands(text: str) -> Iterator[tuple[int, str, str]]:
    """The commands of a shell block: offset of its line, command, and the output shown below it ('' when none is).

    A command begins with ``$ ``; a line that ends with a backslash goes on in the next one.
    """
    found: list[tuple[int, list[str], list[str]]] = []
    continued = False
    for offset, line in enumerate(text.split("\n")):
        if continued:
            found[-1][1].append(line)
        elif line.startswith("$ "):
            found.append((offset, [line[2:]], []))
        elif found:
            found[-1][2].append(line)
        continued = line.endswith("\\") and (continued or line.startswith("$ "))
    for offset, command, output in found:
        yield offset, "\n".join(command), "\n".join(output).strip("\n")
