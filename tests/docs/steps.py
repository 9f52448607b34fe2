"""What the program of a page does at its console and shell blocks; runs in that program."""

from __future__ import annotations

import doctest
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def console(text: str, line: int, variables: dict[str, Any]) -> None:
    """Run a ``>>>`` block as part of the program: its definitions become the program's own."""
    name = Path(sys.argv[0]).stem
    test = doctest.DocTestParser().get_doctest(text, {}, name, sys.argv[0], line - 1)
    test.globs = variables
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=_OPTIONS).run(test, out=report.append, clear_globs=False)
    if result.failed:
        raise SystemExit("".join(report))


def shell(command: str, expected: str, exit_code: int, line: int) -> None:
    """Run a command of a ``$`` block; compare its output with what the page shows, if it shows any."""
    done = subprocess.run(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": f"{command_folder()}{os.pathsep}{os.environ['PATH']}"},
        check=False,
    )
    where = f'File "{sys.argv[0]}", line {line}, in $ {command}\n'
    if done.returncode != exit_code:
        raise SystemExit(f"{where}exited with {done.returncode}, not {exit_code}:\n{done.stdout}")
    if expected and not doctest.OutputChecker().check_output(f"{expected}\n", done.stdout, _OPTIONS):
        raise SystemExit(f"{where}Expected:\n{expected}\nGot:\n{done.stdout}")


def command_folder() -> Path:
    """The folder with the `cloud` command of this interpreter; in a checkout that is not installed, one made here."""
    installed = Path(sys.executable).parent
    if (installed / "cloud").exists():
        return installed
    made = Path(os.environ["HOME"]) / ".bin"
    made.mkdir(exist_ok=True)
    (made / "cloud").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cloud "$@"\n')
    (made / "cloud").chmod(0o755)
    return made
