"""Results in the order of their jids."""

from __future__ import annotations

from cloud.backends.base import Backend
from cloud.client.progress import Progress
from cloud.client.results import decode
from cloud.errors import CloudTimeoutError
from cloud.jobs import DONE, Jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Results:
    """Results in order; a failed job's exception ends one step, not the iteration."""

    def __init__(
        self,
        backend: Backend,
        jids: Jids,
        timeout_s: float | None,
        *,
        ahead: int,
        ignore_errors: bool,
        progress: bool,
    ) -> None:
        self._backend = backend
        self._jids = jids
        self._at = 0
        self._timeout_s = timeout_s
        self._ahead = ahead
        self._ignore_errors = ignore_errors
        self._ready: list[tuple[Any, bool]] = []
        self._display = Progress(len(jids), "cloud.iresult") if progress else None
        self._n_failed = 0

    def __iter__(self) -> Results:
        return self

    def __next__(self) -> Any:
        if not self._ready:
            self._fetch()
        self._at += 1
        value, failed = self._ready.pop()
        if self._display is not None:
            self._n_failed += failed
            self._display.show(self._at, self._n_failed)
        if failed and not self._ignore_errors:
            raise value from value.__cause__
        return value

    def _fetch(self) -> None:
        if self._at >= len(self._jids):
            if self._display is not None:
                self._display.close()
            raise StopIteration
        backend = self._backend
        jid = self._jids[self._at]
        unfinished = backend.wait((jid,), self._timeout_s, stop_on_error=False)
        if unfinished:
            raise CloudTimeoutError("iresult iterator timed out", jid=unfinished)
        ids = self._jids[self._at : self._at + self._ahead]
        codes = backend.statuses(ids)
        n_final = next((index for index, code in enumerate(codes) if code < DONE), len(ids))
        ids = ids[:n_final]
        values, failures = decode(ids, backend.outcomes(ids), backend.namespace)
        failed = {id(each) for each in failures}
        self._ready = [(value, id(value) in failed) for value in reversed(values)]
