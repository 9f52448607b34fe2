"""Programs under way, and the processes of a run: what the fault tests look at and shoot at."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from types import TracebackType
from typing import Any

import psutil

from cloud.backends import open_backend
from cloud.client.cloud import Cloud
from cloud.engine.store.memory import JidSource
from cloud.settings import Settings
from tests.scripts import program_environment

LIMIT_S = 20.0
"""How long a condition that must come true may take on a machine that has much else to do."""

_MARK = "PROGRAM_MARK"


def until(condition: Callable[[], Any], what: str = "", *, limit_s: float = LIMIT_S) -> Any:
    """Wait for ``condition()`` to be true and return it; fail the test when it takes too long."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what or condition}"
        time.sleep(0.002)
    return found


def lines_of(file: Path) -> list[str]:
    """The whole lines of a file that jobs append to; none when it does not exist yet."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def exists(pid: int) -> bool:
    """True while a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_cloud(n_workers: int = 2, **settings: Any) -> Cloud:
    """A Cloud of its own over worker processes, beside ``cloud.mp``."""
    return Cloud(
        "cloud",
        lambda: open_backend("mp", Settings().replace(num_procs=n_workers, **settings), jids=JidSource),
        lambda backend: None,
        lambda: 0,
    )


def executor_of(cloud: Cloud) -> Any:
    """What runs its jobs."""
    return cloud.backend.engine.executor  # type: ignore[attr-defined]


def worker_pids(cloud: Cloud) -> list[int]:
    """Process ids of the workers that are known to live."""
    return [worker.pid for worker in list(executor_of(cloud)._workers.values()) if worker.pid]


def template_pid(cloud: Cloud) -> int:
    """Process id of the template."""
    pid: int = executor_of(cloud)._template._pid
    return pid


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, of all its threads."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


class Program:
    """A user's program under way, in a folder, an interpreter and a session of its own.

    Args:
        folder: Where its file is, and where it runs.
        source: Its text; dedented.
        flags: Of the interpreter.
        args: Its command line arguments.
        env: Variables beside the test's own.
        redirections: As a shell takes them: ``>&-`` starts it with its stdout closed.
        python: The interpreter.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        *,
        flags: Sequence[str] = (),
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        redirections: str = "",
        python: str = sys.executable,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._mark = uuid.uuid4().hex
        (folder / "program.py").write_text(dedent(source))
        self._out = folder / "program.out"
        command = [python, *flags, "program.py", *args]
        if redirections:
            command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *command]
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**program_environment(env), _MARK: self._mark},
                start_new_session=True,
            )
        self.pid = self.process.pid

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if exc is not None:
            exc.add_note(f"--- the program's output ---\n{self.text}")

    @property
    def text(self) -> str:
        """Its stdout and stderr so far."""
        return self._out.read_text(errors="replace")

    def saw(self, *words: str) -> list[list[str]]:
        """The rest of each line of its output that begins with these words, split at blanks."""
        lines = [line.split() for line in lines_of(self._out)]
        return [line[len(words) :] for line in lines if line[: len(words)] == list(words)]

    def wait_for(self, *words: str, n: int = 1) -> list[str]:
        """Wait for ``n`` lines that begin with these words; the rest of the last."""

        def found() -> list[list[str]]:
            seen = self.saw(*words)
            assert len(seen) >= n or self.process.poll() is None, f"it ended before it printed {words}:\n{self.text}"
            return seen if len(seen) >= n else []

        last: list[str] = until(found, f"the program prints {' '.join(words)}")[-1]
        return last

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def ended(self, limit_s: float = LIMIT_S) -> int:
        """Wait for its end: the exit code, or minus the signal."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program did not end within {limit_s} s\n{self.text}") from None

    def succeeded(self, limit_s: float = LIMIT_S) -> str:
        """Wait for its end, which must be exit code 0; its output."""
        code = self.ended(limit_s)
        assert code == 0, f"the program ended with {code}\n{self.text}"
        return self.text

    def processes(self) -> dict[int, str]:
        """Command lines of the program's processes by pid, however far they have run from it; no zombies."""
        return {pid: command for pid, command in _marked(f"{_MARK}={self._mark}".encode()) if exists(pid)}

    def others(self) -> dict[int, str]:
        """The same without the program itself."""
        return {pid: command for pid, command in self.processes().items() if pid != self.pid}

    def left_nothing(self, limit_s: float) -> None:
        """Fail the test, and clean up, unless all its processes are gone in time."""
        try:
            until(lambda: not self.others(), "no process is left", limit_s=limit_s)
        except AssertionError as exc:
            left = self.others()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"left after {limit_s} s: {left}") from exc


def _marked(wanted: bytes) -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{name}/environ").read_bytes():
                    command = Path(f"/proc/{name}/cmdline").read_bytes()
                    yield int(name), command.replace(b"\0", b" ").decode(errors="replace")[:120]
