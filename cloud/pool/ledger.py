"""Which results of a pool are still to come."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from cloud.errors import BackendClosed, JobNotFound
from cloud.jobs import DONE

if TYPE_CHECKING:
    from cloud.backends.base import Backend, Segment
    from cloud.client.cloud import Cloud

__all__ = ["Ledger", "Open"]

_MIN_KEPT: Final = 256


class Open(Protocol):
    """A result, or an iterator over results.

    Attributes:
        submitted: False while more of its jobs may come.
    """

    @property
    def submitted(self) -> bool: ...

    def ready(self) -> bool:
        """True when all of it has ended."""

    def whom_to_ask(self) -> tuple[Backend, int] | None:
        """The one job whose outcome is all it takes, and where it is; None if it takes more, or is there."""

    def keep(self, segments: list[Segment]) -> None:
        """This is the outcome of that job."""

    def wait(self) -> None:
        """Block until all of it has ended.

        Raises:
            BackendClosed: The pool was terminated.
        """

    def secure(self) -> None:
        """Take what has ended out of the backend, which may close after this."""

    def cancel(self, cloud: Cloud) -> None:
        """Kill its jobs, which run among others'."""

    def give_up(self, error: BaseException) -> None:
        """The pool has ended: whoever waits for what has not ended gets this error."""


class Ledger:
    """Keeps results until they have ended: ``join`` waits for what nobody else remembers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[Any] = set()
        self._n_kept = _MIN_KEPT

    def add(self, result: Open) -> None:
        """One more. Now and then takes those that have ended out of the backend, and drops them."""
        self._open.add(result)
        if len(self._open) > self._n_kept:
            with self._lock:
                if len(self._open) > self._n_kept:
                    self._secure_ended()
                    self._n_kept = max(_MIN_KEPT, 2 * len(self._open))

    def drop(self, result: Open) -> None:
        """This one has its value."""
        self._open.discard(result)

    def open(self) -> list[Open]:
        """Those that may not have ended."""
        return list(self._open)

    def _secure_ended(self) -> None:
        # All single tasks of a backend in one go: each question takes its lock.
        single: dict[Backend, dict[int, Any]] = {}
        for result in list(self._open):
            job = result.whom_to_ask()
            if job is not None:
                single.setdefault(job[0], {})[job[1]] = result
            elif result.ready():
                result.secure()
                self._open.discard(result)
        for backend, results in single.items():
            with suppress(JobNotFound, BackendClosed):  # another thread took one meanwhile; there will be another look
                self._secure_single(backend, results)

    def _secure_single(self, backend: Backend, results: dict[int, Any]) -> None:
        codes = backend.statuses(list(results))
        ended = [jid for jid, code in zip(results, codes, strict=True) if code >= DONE]
        for jid, segment in zip(ended, backend.outcomes(ended), strict=True):
            results[jid].keep([segment])
            self._open.discard(results[jid])
        try:
            backend.delete(ended)
        except JobNotFound:
            for jid in ended:
                with suppress(JobNotFound):
                    backend.delete((jid,))
