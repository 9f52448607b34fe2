"""Which results of a pool are still to come."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from cloud.errors import BackendClosed, JobNotFound
from cloud.jobs import DONE

if TYPE_CHECKING:
    from cloud.backends.base import Backend
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
        """The one job whose state tells whether this is ready, and where it is; None if that takes more."""

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
                    for each in self._ended():
                        each.secure()
                        self._open.discard(each)
                    self._n_kept = max(_MIN_KEPT, 2 * len(self._open))

    def drop(self, result: Open) -> None:
        """This one has its value."""
        self._open.discard(result)

    def open(self) -> list[Open]:
        """Those that may not have ended."""
        return list(self._open)

    def _ended(self) -> list[Open]:
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
                continue  # another thread takes some meanwhile; there will be another look
            ended += [result for result, code in zip(results.values(), codes, strict=True) if code >= DONE]
        return ended
