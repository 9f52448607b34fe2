"""Memory for the large buffers that a program is likely to write next, got by a thread of its own meanwhile.

::

    written ──► 0.05 s ──► got, a part at a time ──► written to by the next, or given back after a second
"""

from __future__ import annotations

import os
import threading
import time

from cloud.serialization.memory import MemoryFile
from cloud.serialization.spare import MAX_BYTES, Spare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["Ahead", "ahead"]

_SOON_S: Final = 1.0
"""Who writes something large twice in that time is likely to do so again; and what is held for him is held so long."""

_AFTER_S: Final = 0.05
"""A worker begins with a copy of what was written, which takes as much of the machine."""


class Ahead:
    """The memory, and the thread that gets it: it ends when nothing large was written for a second."""

    def __init__(self) -> None:
        self._begin()
        # A child has no such thread, but perhaps what that held.
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._spare = Spare()
        self._changed = threading.Condition()
        self._wanted: list[int] | None = None  # how much: another list each time
        self._runs = False
        self._wrote_at = -_SOON_S

    def take(self, n_bytes: int) -> MemoryFile | None:
        """A file to write so much to, if one was got. What is written to it is to be told with ``wrote``."""
        with self._changed:
            self._wanted = None
            self._changed.notify()
            spare, self._spare = self._spare, Spare()
        return spare.take(n_bytes)

    def wrote(self, n_bytes: int) -> None:
        """So much was written: perhaps as much will be soon."""
        now = time.monotonic()
        is_soon, self._wrote_at = now - self._wrote_at < _SOON_S, now
        if not is_soon or n_bytes > MAX_BYTES:
            return
        with self._changed:
            self._wanted = [n_bytes]
            self._changed.notify()
            if self._runs:
                return
            self._runs = True
        try:
            threading.Thread(target=self._run, name="cloud-ahead", daemon=True).start()
        except RuntimeError:
            self._runs = False  # the interpreter is ending, or there are too many threads: then without

    def _run(self) -> None:
        while (wanted := self._wait_while(None, _SOON_S)) is not None:
            if self._wait_while(wanted, _AFTER_S) is wanted:
                self._get(wanted)
                if self._wait_while(wanted, _SOON_S) is wanted:
                    break
        with self._changed:
            self._runs = False
            spare, self._spare = self._spare, Spare()
        spare.give_back()  # without the lock: freeing it takes a while

    def _get(self, wanted: list[int]) -> None:
        self._spare.get(wanted[0], lambda: self._wanted is wanted)

    def _wait_while(self, wanted: list[int] | None, timeout_s: float) -> list[int] | None:
        """What is wanted, once that is not this any more, or after so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted is not wanted, timeout_s)
            return self._wanted


ahead: Final = Ahead()
"""The program's."""
