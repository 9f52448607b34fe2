"""Large arguments that a job changes in place and returns: they go back in the memory they lie in, without a copy.

A job may have to be run again, so its arguments stay as they were sent, and what it writes to are copies of their
pages, each made as it is first written to. All of them at once are copied in a third of that time. So for functions
that returned what they were given, that is done before they run, into a file of its own, which is their result's then.
Half of the time of a copy goes into getting memory for it. Who has nothing to do gets that for the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cloud.serialization.memory import MemoryFile
from cloud.serialization.shared import Segment, SharedBytes, attach
from cloud.serialization.spare import MAX_BYTES, Spare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_PART_BYTES: Final = 1 << 26
"""Copied at a time: between two parts signals are seen."""

_MAX_GROWTH: Final = 4


class InPlace:
    """The large arguments of the job that runs, and which functions returned theirs."""

    def __init__(self) -> None:
        self._returning: dict[int, int] = {}  # number of a function -> bytes that it returned
        self._function = 0
        self._given: Segment | None = None
        self._is_copy = False
        self._n_returned = 0
        self._n_next = 0
        self._spare = Spare()
        # A child may write to its memory, and its parent is not to see that.
        os.register_at_fork(before=self._freeze)

    def given(self, function: int, payload: SharedBytes) -> SharedBytes:
        """The payload to load a job's arguments from.

        Args:
            function: Number of the job's function; 0 if nobody knows it again.
            payload: What was sent.
        """
        self._function, self._given, self._is_copy, self._n_returned = function, payload.segment, False, 0
        # One that returned 1 MB may only read what is a thousand times as large.
        n_bytes = payload.segment.n_bytes
        is_likely = n_bytes <= _MAX_GROWTH * self._returning.get(function, 0)
        if is_likely and (copy := _own_copy(payload.segment, self._spare.take(n_bytes))) is not None:
            self._given, self._is_copy = copy, True
            return attach(payload, copy)
        return payload

    def segment_of(self, buffers: list[memoryview]) -> Segment | None:
        """The segment that holds just these buffers of a result, and that nobody writes to any more; None without."""
        given = self._given
        if given is None or given.file is None or not buffers:
            return None
        found = given.part_of(buffers)
        self._n_returned = 0 if found is None else found.n_bytes
        # At once: finalizers of what the job leaves behind may still write to it.
        return found if given.file.is_shared and self._freeze() else None

    def end(self) -> None:
        """The job is over."""
        self._n_next = 0
        if self._given is None:
            return
        if self._n_returned and self._function:
            self._returning[self._function] = self._n_returned
            self._n_next = min(self._given.n_bytes, MAX_BYTES)
        elif self._is_copy:
            self._returning.pop(self._function, None)
        self._freeze()
        self._given = None

    def prepare(self, go_on: Callable[[], bool]) -> None:
        """Get memory for the next copy, if the last job's function may need one; as long as ``go_on()``."""
        if self._n_next:
            self._spare.get(self._n_next, go_on)

    @property
    def is_prepared(self) -> bool:
        """True while it holds such memory."""
        return self._spare.file is not None

    def give_back(self) -> None:
        """Hold it no longer."""
        self._spare.give_back()

    def forget(self, function: int) -> None:
        """The number may be another function's from now on."""
        self._returning.pop(function, None)

    def _freeze(self) -> bool:
        if self._given is None or self._given.file is None:
            return False
        try:
            self._given.file.freeze()
        except OSError:
            return False
        return True


def _own_copy(segment: Segment, file: MemoryFile | None) -> Segment | None:
    """A copy in a file that the job's changes are to be found in; None if there can be none.

    Args:
        segment: What to copy.
        file: To be used for it, and no longer than it; None for a new one.
    """
    if segment.file is None or not hasattr(os, "copy_file_range"):
        return None
    file = file or MemoryFile.create()
    if file is None:
        return None
    file.is_shared = True
    n_copied = 0
    try:
        while n_copied < segment.n_bytes:
            n = min(_PART_BYTES, segment.n_bytes - n_copied)
            n = os.copy_file_range(segment.fd, file.fd, n, segment.offset + n_copied, n_copied)
            if not n:
                return None
            n_copied += n
    except OSError:
        return None  # the limit for files is met, or no memory left
    return Segment(file, 0, segment.n_bytes)


__all__ = ["InPlace"]
