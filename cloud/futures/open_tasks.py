"""The futures of one executor whose tasks have not ended, as far as anybody has looked.

Nobody need be told of an end: now and then all are looked at in one go, since each question takes the engine's lock.
Those that have ended get their outcomes, and are decoded when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from cloud.errors import BackendClosed, JobNotFound
from cloud.jobs import DONE

if TYPE_CHECKING:
    from cloud.backends.base import Backend
    from cloud.futures.future import Future

__all__ = ["OpenTasks"]

_MIN_OPEN: Final = 256
_MIN_ASKED: Final = 16


class OpenTasks:
    """Futures by the backends of their jobs and by jid."""

    def __init__(self) -> None:
        self._by_backend: dict[Backend, dict[int, Future[Any]]] = {}
        self._n_worth_looking = _MIN_OPEN
        self._n_asked = 0

    def of(self, backend: Backend) -> dict[int, Future[Any]] | None:
        """Those of a backend; None before ``begin``."""
        return self._by_backend.get(backend)

    def begin(self, backend: Backend) -> dict[int, Future[Any]]:
        """The first is about to be submitted there."""
        return self._by_backend.setdefault(backend, {})

    def __iter__(self) -> Iterator[Future[Any]]:
        return iter([future for found in list(self._by_backend.values()) for future in list(found.values())])

    def __len__(self) -> int:
        return sum(map(len, list(self._by_backend.values())))

    def drop(self, future: Future[Any]) -> None:
        """It has its value."""
        backend, jid = future.job
        found = self._by_backend.get(backend)
        if found is not None:
            found.pop(jid, None)

    def added(self, found: dict[int, Future[Any]]) -> None:
        """One more. Looks when they have doubled since the last look: its cost is a share of that of submitting."""
        if len(found) > self._n_worth_looking:
            self.keep_ended()

    def asked(self) -> None:
        """Somebody wants the result of a task. After a share of all he will want those of others, too."""
        self._n_asked += 1
        if self._n_asked > _MIN_ASKED + len(self) // 8:
            self.keep_ended()

    def keep_ended(self) -> None:
        """Give outcomes to those that have ended, and drop them; but not those of whose end others have to be told."""
        for backend, found in list(self._by_backend.items()):
            with suppress(JobNotFound, BackendClosed):  # each by itself, when it is asked for
                jids = list(found)
                codes = backend.statuses(jids)
                ended = [jid for jid, code in zip(jids, codes, strict=True) if code >= DONE]
                for jid, segment in zip(ended, backend.outcomes(ended), strict=True):
                    future = found.get(jid)
                    if future is not None:  # else another thread was quicker
                        future.keep(segment)
                        if not future.watched:
                            found.pop(jid, None)
        self._n_worth_looking = max(_MIN_OPEN, 2 * len(self))
        self._n_asked = 0

    def wait(self) -> None:
        """Block until all have ended. What was deleted by somebody else is waited for by itself."""
        for backend, found in list(self._by_backend.items()):
            with suppress(JobNotFound, BackendClosed):
                backend.wait(list(found), None, stop_on_error=False)
        self.keep_ended()
