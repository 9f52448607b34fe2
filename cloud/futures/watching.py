"""What tells futures that their jobs are final."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from cloud import current
from cloud.errors import BackendClosed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.backends.base import Finals
    from cloud.futures.future import Future

__all__ = ["EngineWatch", "JobWatch", "Watch", "in_job"]


def in_job() -> bool:
    """True in a worker process of this package: ``cloud.call`` reaches the engine that runs this job."""
    return current.this_worker() is not None


class Watch(ABC):
    """Tells futures."""

    @abstractmethod
    def add(self, future: Future[Any]) -> None:
        """Call ``future.tell()`` from any thread when its job is final."""

    def reset(self) -> None:
        """In a forked child: those watched are the parent's."""
        return


class EngineWatch(Watch):
    """Has the engine in this process tell them."""

    def add(self, future: Future[Any]) -> None:
        backend, jid = future.job
        backend.on_each_final((jid,), future.tell)


class JobWatch(Watch):
    """Asks the engine that runs this job, on one thread for all futures, which ends when none is left.

    While it asks, the job counts as waiting and its slot is free: its tasks may need it, in whatever way the job waits
    for them.
    """

    def __init__(self) -> None:
        self._watched: dict[int, Future[Any]] = {}
        self._finals: Finals | None = None
        self._lock = threading.Lock()

    def add(self, future: Future[Any]) -> None:
        backend, jid = future.job
        with self._lock:
            self._watched[jid] = future
            if self._finals is not None:
                self._finals.watch((jid,))
                return
            self._finals = backend.finals((jid,))
            threading.Thread(target=self._run, args=(self._finals,), name="cloud-futures-watch", daemon=True).start()

    def _run(self, finals: Finals) -> None:
        while True:
            with self._lock:
                if not self._watched:
                    self._finals = None
                    return
            try:
                found = finals.next(None)
            except BackendClosed:
                found = None
                with self._lock:
                    jids = list(self._watched)
            else:
                jids = [] if found is None else list(range(found[0], found[0] + found[1]))
            for jid in jids:
                future = self._watched.pop(jid, None)
                if future is not None:
                    future.tell()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._watched.clear()
        self._finals = None
