"""Jobs that nobody will ask for any more: deleted many at a time, since each time takes the engine's lock."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from cloud.errors import BackendClosed, JobNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from cloud.backends.base import Backend
    from cloud.jobs import Jids

__all__ = ["Forgotten"]

_MAX_KEPT: Final = 256


class Forgotten:
    """What is to be deleted."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Backend, Jids]] = deque()

    def add(self, backend: Backend, jids: Jids) -> None:
        """Some more. May be called anywhere, with any lock held."""
        self._jobs.append((backend, jids))

    def delete_many(self) -> None:
        """Delete them if it is worth it."""
        if len(self._jobs) > _MAX_KEPT:
            self.delete()

    def delete(self) -> None:
        """Delete them."""
        found: dict[Backend, list[int]] = {}
        with suppress(IndexError):  # another thread may be doing the same
            while True:
                backend, jids = self._jobs.popleft()
                if backend not in found:
                    found[backend] = []
                found[backend] += jids
        for backend, every in found.items():
            with suppress(BackendClosed):
                try:
                    backend.delete(every)
                except JobNotFound:
                    for jid in every:
                        with suppress(JobNotFound):
                            backend.delete((jid,))

    def clear(self) -> None:
        """They are somebody else's: in a forked child, the parent's."""
        self._jobs.clear()
