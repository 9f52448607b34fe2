"""Captures what simulated jobs print, at the level of ``sys.stdout``: each job's own, in one process."""

from __future__ import annotations

import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Tail:
    """The last part of a stream of text.

    Args:
        limit_bytes: How much of its end is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, text: str) -> None:
        """Append."""
        part = text.encode("utf-8", "backslashreplace")
        self._parts.append(part)
        self._size += len(part)
        if self._size > 2 * self._limit:
            self._parts = [self.value()]
            self._size = len(self._parts[0])

    def value(self) -> bytes:
        """What is kept."""
        return b"".join(self._parts)[-self._limit :]


class _Here(threading.local):
    tails: tuple[Tail, Tail] | None = None


_here = _Here()


def enter_job(tails: tuple[Tail, Tail]) -> None:
    """From now on what this thread prints goes to these (stdout, stderr)."""
    _here.tails = tails


class _Stream:
    """Stands for ``sys.stdout`` or ``sys.stderr``; in all but simulated jobs it is what stood there before."""

    def __init__(self, before: Any, index: int) -> None:
        self.before = before
        self._index = index

    def write(self, text: str) -> int:
        tails = _here.tails
        if tails is None:
            return 0 if self.before is None else int(self.before.write(text))
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        tails[self._index].add(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if _here.tails is None and self.before is not None:
            self.before.flush()

    def isatty(self) -> bool:
        return _here.tails is None and self.before is not None and bool(self.before.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)


class Capture:
    """The replacement of ``sys.stdout`` and ``sys.stderr`` while a simulation is open."""

    def __init__(self) -> None:
        self._streams = (_Stream(sys.stdout, 0), _Stream(sys.stderr, 1))
        self._hook = sys.breakpointhook
        sys.stdout, sys.stderr = self._streams
        sys.breakpointhook = self._break

    def renew(self) -> None:
        """Stand before streams that the program has put in place since (pytest does, for each test)."""
        if sys.stdout is not self._streams[0]:
            self._streams[0].before, sys.stdout = sys.stdout, self._streams[0]
        if sys.stderr is not self._streams[1]:
            self._streams[1].before, sys.stderr = sys.stderr, self._streams[1]

    def _break(self, *args: Any, **kwargs: Any) -> Any:
        if _here.tails is None or self._hook is not sys.__breakpointhook__:
            return self._hook(*args, **kwargs)
        # A debugger in a job talks to the terminal, not to the job's captured output.
        import pdb

        pdb.Pdb(stdin=sys.__stdin__, stdout=sys.__stdout__).set_trace(sys._getframe(1))
        return None

    def close(self) -> None:
        """Put back what stood there. Idempotent."""
        if sys.stdout is self._streams[0]:
            sys.stdout = self._streams[0].before
        if sys.stderr is self._streams[1]:
            sys.stderr = self._streams[1].before
        if sys.breakpointhook == self._break:
            sys.breakpointhook = self._hook
