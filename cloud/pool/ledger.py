"""Which results of a pool are still to come, and which jobs nobody will ask about any more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, Protocol

from cloud.backends.base import Backend
from cloud.errors import BackendClosed, JobNotFound
from cloud.jobs import DONE, Jids

__all__ = ["Ledger", "Open", "delete"]

_MIN_KEPT: Final = 256


class Open(Protocol):
    """A result, or an iterator over results."""

    def ready(self) -> bool:
        """True when all of it has ended."""

    def whom_to_ask(self) -> tuple[Backend, int] | None:
        """The one job whose state tells whether this is ready, and where it is; None if that takes more."""


class Ledger:
    """Keeps results until they have ended: ``join`` waits for what nobody else remembers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[Any] = set()
        self._n_kept = _MIN_KEPT
        self._forgotten: deque[tuple[Backend, Jids]] = deque()

    def add(self, result: Open) -> None:
        """One more. Now and then drops those that have ended."""
        self._open.add(result)
        if len(self._open) > self._n_kept or self._forgotten:
            with self._lock:
                if len(self._open) > self._n_kept:
                    self._open.difference_update(self._ended())
                    self._n_kept = max(_MIN_KEPT, 2 * len(self._open))
                while self._forgotten:
                    delete(*self._forgotten.popleft())

    def open(self) -> list[Any]:
        """Those that may not have ended."""
        return list(self._open)

    def _ended(self) -> Iterable[Open]:
        # All single tasks of a backend are looked at in one go: each look takes its lock.
        single: dict[Backend, dict[int, Open]] = {}
        ended: list[Open] = []
        for result in self.open():
            job = result.whom_to_ask()
            if job is not None:
                single.setdefault(job[0], {})[job[1]] = result
            elif result.ready():
                ended.append(result)
        for backend, results in single.items():
            try:
                codes = backend.statuses(list(results))
            except (JobNotFound, BackendClosed):
                continue  # another thread settles some meanwhile; there will be another look
            ended += [result for result, code in zip(results.values(), codes, strict=True) if code >= DONE]
        return ended

    def settled(self, result: Open, backend: Backend, jids: Jids) -> None:
        """A result has its value: its jobs are needed no more."""
        self._open.discard(result)
        delete(backend, jids)

    def forget(self, backend: Backend, jids: Jids) -> None:
        """Nobody can ask for these any more; they are deleted when there is something to ``add``."""
        # The garbage collector calls this at any moment, also while this thread is inside the engine.
        self._forgotten.append((backend, jids))


def delete(backend: Backend, jids: Jids) -> None:
    """Forget jobs whose results were taken."""
    try:
        backend.delete(jids)
    except JobNotFound:
        pass  # the user deleted them
