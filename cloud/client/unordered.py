"""Results in the order in which jobs finish."""

from __future__ import annotations

from collections import deque

from cloud.backends.base import Backend
from cloud.client.progress import Progress
from cloud.client.results import decode
from cloud.errors import CloudTimeoutError
from cloud.jobs import DONE, Jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ResultsAsFinished:
    """An iterator of (jid, value); see ``Cloud.iresult_unordered``. After a timeout it may be asked again."""

    def __init__(
        self, backend: Backend, jids: Jids, timeout_s: float | None, *, skip_failed: bool, progress: bool
    ) -> None:
        self._backend = backend
        self._waiting = set(jids)
        self._finals = backend.finals(jids)
        self._timeout_s = timeout_s
        self._skip_failed = skip_failed
        self._ready: deque[tuple[int, Any]] = deque()
        self._n, self._n_failed = len(self._waiting), 0
        self._display = Progress(self._n, "cloud.iresult_unordered") if progress else None

    def __iter__(self) -> ResultsAsFinished:
        return self

    def __next__(self) -> tuple[int, Any]:
        while not self._ready:
            if not self._waiting:
                if self._display is not None:
                    self._display.close()
                raise StopIteration
            self._fetch()
        return self._ready.popleft()

    def _fetch(self) -> None:
        found = self._finals.next(self._timeout_s)
        if found is None:
            raise CloudTimeoutError("iresult iterator timed out", jid=sorted(self._waiting))
        first, length, status = found
        ids = [jid for jid in range(first, first + length) if jid in self._waiting]
        self._waiting.difference_update(ids)
        self._n_failed += len(ids) if status > DONE else 0
        if self._display is not None:
            self._display.show(self._n - len(self._waiting), self._n_failed)
        values, failures = decode(ids, self._backend.outcomes(ids), self._backend.namespace)
        skipped = {id(each) for each in failures} if self._skip_failed else ()
        self._ready.extend((jid, value) for jid, value in zip(ids, values, strict=True) if id(value) not in skipped)
