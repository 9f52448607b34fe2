"""Globals of ``__main__`` with large buffers: whether one is what was sent last, told without hashing it."""

from __future__ import annotations

import os
from _weakref import ref

from cloud.serialization.shared import Copy, SharedBytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final


class LargeGlobal:
    """A global of ``__main__`` with large buffers, about to be sent.

    Hashing it would take longer than sending it: its digest is any number, as long as it is equal to what had that.

    Args:
        name: Its name.
        entry: Its pickle, without the buffers.
        start, n: Which of the payload's buffers are its.
    """

    def __init__(self, name: str, entry: bytes, start: int, n: int) -> None:
        self._name = name
        self._entry = entry
        self._start = start
        self._n = n
        self._digest = b""
        self._is_known = False

    def digest_of(self, variables: dict[str, Any], buffers: list[memoryview]) -> bytes:
        """16 bytes that are the same as the last time if the value is."""
        known = large_globals().get((id(variables), self._name))
        if known is not None and known[0] == self._entry and known[1].equals(buffers):
            self._digest, self._is_known = known[2], True
        else:
            self._digest = os.urandom(16)
        return self._digest

    def keep(self, variables: dict[str, Any], payload: SharedBytes, buffers: list[memoryview]) -> None:
        """Remember what was sent under this digest."""
        if not self._is_known:
            known = large_globals()
            key = id(variables), self._name
            known.pop(key, None)
            while len(known) >= _MAX_LARGE_GLOBALS:
                known.pop(next(iter(known)))
            copy = Copy(payload.segment, buffers, self._start, self._n)
            known[key] = self._entry, copy, self._digest


_MAX_LARGE_GLOBALS: Final = 8


class _LargeGlobals(dict[tuple[int, str], tuple[bytes, Copy, bytes]]):
    """(pickle, copy of the buffers, digest) of large globals as they were sent last."""


_last_large_globals: list[ref[_LargeGlobals]] = []


def large_globals() -> _LargeGlobals:
    """Those of this process; they are kept for as long as somebody holds what this returns."""
    found = _last_large_globals[0]() if _last_large_globals else None
    if found is None:
        found = _LargeGlobals()
        _last_large_globals[:] = [ref(found)]
    return found
