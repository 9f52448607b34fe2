"""Single tasks of a pool or an executor that have not ended, as far as anybody has looked.

Nobody need be told of an end: now and then all are looked at in one go, since each question takes the engine's lock.
Those that have ended get their outcomes, and are decoded when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from cloud.client.results import shared_values
from cloud.errors import BackendClosed, JobNotFound
from cloud.jobs import DONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.backends.base import Backend

__all__ = ["OpenTasks"]

_MIN_OPEN: Final = 256
_MIN_ASKED: Final = 16


class OpenTasks:
    """What stands for tasks, by backend and jid: futures, or results.

    Each has ``keep(segment)``, which gives it its outcome, ``keep_value(value)``, which gives it what it returned, and
    ``watched``, True when somebody else tells it of its end and has to.

    Args:
        deletes: Delete the jobs whose outcomes are taken.
    """

    def __init__(self, *, deletes: bool) -> None:
        self._deletes = deletes
        self._by_backend: dict[Backend, dict[int, Any]] = {}
        self._n_worth_looking = _MIN_OPEN
        self._n_asked = 0

    def of(self, backend: Backend) -> dict[int, Any] | None:
        """Those of a backend; None before the first."""
        return self._by_backend.get(backend)

    def __iter__(self) -> Iterator[Any]:
        return iter([each for found in list(self._by_backend.values()) for each in list(found.values())])

    def __len__(self) -> int:
        return sum(map(len, list(self._by_backend.values())))

    def add(self, backend: Backend, jid: int, single: Any) -> None:
        """One more. Looks when they have doubled since the last look: its cost is a share of that of submitting."""
        found = self._by_backend.get(backend)
        if found is None:
            found = self._by_backend.setdefault(backend, {})
        found[jid] = single
        if len(found) > self._n_worth_looking:
            self.keep_ended()

    def drop(self, backend: Backend, jid: int) -> None:
        """It has its value."""
        found = self._by_backend.get(backend)
        if found is not None:
            found.pop(jid, None)

    def asked(self) -> None:
        """Somebody wants the result of one. After a share of all he will want those of others, too."""
        self._n_asked += 1
        if self._n_asked > _MIN_ASKED and self._n_asked > len(self) // 8:
            self.keep_ended()

    def keep_ended(self) -> None:
        """Give outcomes to those that have ended, and drop them; but not those of whose end somebody has to tell."""
        for backend, found in list(self._by_backend.items()):
            with suppress(BackendClosed):  # each by itself, when it is asked for
                try:
                    self._keep_ended(backend, found)
                except JobNotFound:
                    self._drop_gone(backend, found)
        self._n_worth_looking = max(_MIN_OPEN, 2 * len(self))
        self._n_asked = 0

    def _keep_ended(self, backend: Backend, found: dict[int, Any]) -> None:
        jids = list(found)
        codes = backend.statuses(jids)
        ended = [jid for jid, code in zip(jids, codes, strict=True) if code >= DONE]
        kept, start = [], 0
        for segment in backend.outcomes(ended):
            skip, n, length, raw = segment
            values = shared_values(segment)
            for index, jid in enumerate(ended[start : start + n]):
                single = found.get(jid)
                if single is None:
                    continue  # another thread was quicker
                kept.append(jid)
                # Looked at before it is kept: from then on it is dropped by whoever settles it if it is watched.
                if not single.watched:
                    found.pop(jid, None)
                if values is None:
                    single.keep((skip + index, 1, length, raw))
                else:
                    single.keep_value(values[index])
            start += n
        if self._deletes:
            # Not all that have ended: of the others that thread may not have kept the outcome yet.
            try:
                backend.delete(kept)
            except JobNotFound:
                for jid in kept:
                    with suppress(JobNotFound):
                        backend.delete((jid,))

    def _drop_gone(self, backend: Backend, found: dict[int, Any]) -> None:
        # Deleted by the user, or by a ``get`` that was interrupted: it hears of that when it is asked for.
        for jid in list(found):
            try:
                backend.statuses((jid,))
            except JobNotFound:
                found.pop(jid, None)

    def wait(self) -> None:
        """Block until all have ended. What was deleted by somebody else is waited for by itself."""
        for backend, found in list(self._by_backend.items()):
            with suppress(JobNotFound, BackendClosed):
                backend.wait(list(found), None, stop_on_error=False)
        self.keep_ended()
