"""Results in the order in which jobs finish."""

from __future__ import annotations

from collections.abc import Iterator

from cloud.backends.base import Backend, Finals
from cloud.client.progress import Progress
from cloud.client.results import decode
from cloud.errors import CloudTimeoutError
from cloud.jobs import DONE, Jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def results_as_finished(
    backend: Backend, jids: Jids, timeout_s: float | None, *, skip_failed: bool, progress: bool
) -> Iterator[tuple[int, Any]]:
    """(jid, value) as jobs finish; see ``Cloud.iresult_unordered``."""
    return _iterate(backend, set(jids), backend.finals(jids), timeout_s, skip_failed, progress)


def _iterate(
    backend: Backend, waiting: set[int], finals: Finals, timeout_s: float | None, skip_failed: bool, progress: bool
) -> Iterator[tuple[int, Any]]:
    display = Progress(len(waiting), "cloud.iresult_unordered") if progress else None
    n, n_failed = len(waiting), 0
    try:
        while waiting:
            found = finals.next(timeout_s)
            if found is None:
                raise CloudTimeoutError("iresult iterator timed out", jid=sorted(waiting))
            first, length, status = found
            ids = [jid for jid in range(first, first + length) if jid in waiting]
            waiting.difference_update(ids)
            n_failed += len(ids) if status > DONE else 0
            if display is not None:
                display.show(n - len(waiting), n_failed)
            values, failures = decode(ids, backend.outcomes(ids), backend.namespace)
            skipped = {id(each) for each in failures} if skip_failed else ()
            for jid, value in zip(ids, values, strict=True):
                if id(value) not in skipped:
                    yield jid, value
    finally:
        if display is not None:
            display.close()
