"""Jobs of a pool or an executor that nobody will ask for again: deleted many at a time."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from cloud.errors import BackendClosed, JobNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from cloud.backends.base import Backend
    from cloud.jobs import Jids

__all__ = ["Forgotten", "delete"]

_MAX_JOBS: Final = 256


class Forgotten:
    """Such jobs, by backend. Each deletion takes the engine's lock, and holds back signal handlers."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Backend, Jids]] = deque()

    def add(self, backend: Backend, jids: Jids) -> None:
        """These too. May be called anywhere, with any lock held: deletes nothing."""
        self._jobs.append((backend, jids))

    def extend(self, jobs: Iterable[tuple[Backend, Jids]]) -> None:
        """All of these, likewise."""
        self._jobs.extend(jobs)

    def delete_if_many(self) -> None:
        """Delete them, if it is worth it."""
        if len(self._jobs) > _MAX_JOBS:
            self.delete()

    def delete(self) -> None:
        """Delete them now."""
        found: dict[Backend, list[int]] = {}
        jobs = self._jobs
        with suppress(IndexError):
            while True:
                backend, jids = jobs.popleft()
                if backend not in found:
                    found[backend] = []
                found[backend] += jids
        for backend, every in found.items():
            every.sort()  # a list lets go of its last item first; runs of jobs are deleted together
            with suppress(BackendClosed):
                delete(backend, every)

    def clear(self) -> None:
        """In a forked child: they are the parent's."""
        self._jobs.clear()


def delete(backend: Backend, jids: Jids) -> None:
    """Delete jobs, those that somebody else has deleted left out.

    Raises:
        BackendClosed: There is nothing to delete them from.
    """
    try:
        backend.delete(jids)
    except JobNotFound:
        for jid in jids:
            with suppress(JobNotFound):
                backend.delete((jid,))
