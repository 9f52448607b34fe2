"""How far jobs are, shown: by tqdm when it is installed, else on one plain line; nothing when not at a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from cloud.jobs import DONE, Jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TextIO

_REFRESH_S: Final = 0.1


class Progress:
    """A display of n jobs.

    Args:
        n: How many there are.
        description: Shown before the bar.
        file: Where to show it; default: ``sys.stderr``. Not a terminal: nothing is shown.
    """

    def __init__(self, n: int, description: str = "jobs", file: TextIO | None = None) -> None:
        self._n = n
        self._description = description
        self._file = sys.stderr if file is None else file
        self._bar: Any = None
        self._shown = ""
        self._began = time.monotonic()
        self.visible = bool(getattr(self._file, "isatty", lambda: False)()) or _in_notebook()
        if self.visible:
            try:
                from tqdm.auto import tqdm

                self._bar = tqdm(total=n, desc=description, file=self._file, unit="job")
            except ImportError:
                self._bar = None

    def show(self, n_final: int, n_failed: int) -> None:
        """Bring the display up to date."""
        if not self.visible:
            return
        if self._bar is not None:
            if n_failed:
                self._bar.set_postfix(failed=n_failed, refresh=False)
            self._bar.update(n_final - self._bar.n)
            return
        percent = 100 * n_final // self._n if self._n else 100
        failed = f", {n_failed} failed" if n_failed else ""
        line = f"{self._description}: {n_final}/{self._n} ({percent}%){failed}, {time.monotonic() - self._began:.0f} s"
        if line != self._shown:
            self._file.write("\r" + line.ljust(len(self._shown)))
            self._file.flush()
            self._shown = line

    def close(self) -> None:
        """End the line. Idempotent."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown:
            self._file.write("\n")
            self._file.flush()
            self._shown = ""


def watch(
    statuses: Callable[[Jids], bytes | bytearray],
    wait: Callable[[float | None], list[int] | None],
    jids: Jids,
    timeout_s: float | None,
    description: str,
) -> list[int] | None:
    """Wait in short steps and show how far the jobs are; returns what the last ``wait`` returned.

    Args:
        statuses: Status codes of jids.
        wait: Waits for at most so many seconds; jids not final then.
        timeout_s: For the whole; None waits for ever.
    """
    display = Progress(len(jids), description)
    if not display.visible:
        return wait(timeout_s)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while True:
            left_s = _REFRESH_S if deadline is None else min(_REFRESH_S, max(0.0, deadline - time.monotonic()))
            unfinished = wait(left_s)
            codes = statuses(jids)
            n_final = sum(code >= DONE for code in codes)
            display.show(n_final, sum(code > DONE for code in codes))
            if not unfinished or (deadline is not None and time.monotonic() >= deadline):
                return unfinished
    finally:
        display.close()


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    if shell is None:
        return False
    active = shell.get_ipython()
    return active is not None and type(active).__name__ == "ZMQInteractiveShell"
