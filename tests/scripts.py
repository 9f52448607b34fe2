"""Runs a user's program in an interpreter of its own, in each of the ways users start programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Literal

REPO = Path(__file__).resolve().parent.parent

Mode = Literal["script", "-c", "-m", "stdin", "zip"]
MODES: tuple[Mode, ...] = ("script", "-c", "-m", "stdin", "zip")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptResult:
    """How a program ended; a negative ``returncode`` is minus the number of the signal that ended it."""

    stdout: str
    stderr: str
    returncode: int


class ScriptRunner:
    """Runs programs in ``folder``, which is also their working directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self,
        source: str,
        *,
        args: Sequence[str] = (),
        mode: Mode = "script",
        check: bool = True,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        name: str = "program",
    ) -> ScriptResult:
        """Run ``source`` (dedented) and wait for the program itself, not for what it may have left running.

        Args:
            source: The program's text.
            args: Its command line arguments.
            mode: How it is started: a file, ``python -c``, ``python -m``, standard input or a zip file.
            check: Fail the test unless the program exits with 0.
            timeout: Seconds, after which the program and its process group are killed and the test fails.
            env: Variables to set beside the test's own environment.
            name: Of the program's file, without its suffix: what tracebacks show.
        """
        command, stdin = self._command(dedent(source), mode, name)
        # Files, not pipes: a worker that outlives the program would keep a pipe open, and this call waiting.
        out, err, given = (self.folder / name for name in (".stdout", ".stderr", ".stdin"))
        given.write_text(stdin, encoding="utf-8")
        with out.open("wb") as out_file, err.open("wb") as err_file, given.open("rb") as in_file:
            process = subprocess.Popen(
                [sys.executable, *command, *args],
                stdin=in_file,
                stdout=out_file,
                stderr=err_file,
                cwd=self.folder,
                env=program_environment(env),
                start_new_session=True,
            )
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"the program did not end within {timeout} s\n{_transcript(out, err)}") from None
        if check and returncode != 0:
            raise AssertionError(f"the program exited with {returncode}\n{_transcript(out, err)}")
        return ScriptResult(stdout=_text(out), stderr=_text(err), returncode=returncode)

    def _command(self, source: str, mode: Mode, name: str) -> tuple[list[str], str]:
        match mode:
            case "-c":
                return ["-c", source], ""
            case "stdin":
                return ["-"], source
            case "zip":
                with zipfile.ZipFile(self.folder / f"{name}.zip", "w") as archive:
                    archive.writestr("__main__.py", source)
                return [f"{name}.zip"], ""
            case "script" | "-m":
                (self.folder / f"{name}.py").write_text(source, encoding="utf-8")
                return ([f"{name}.py"] if mode == "script" else ["-m", name]), ""
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")


def program_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test's environment, with this checkout importable first and ``extra`` on top."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _transcript(out: Path, err: Path) -> str:
    return f"--- its stdout ---\n{_text(out)}\n--- its stderr ---\n{_text(err)}"
