"""Which results of a pool are still to come."""

from __future__ import annotations

import threading

from cloud.pool.open_tasks import OpenTasks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, Protocol

    from cloud.client.cloud import Cloud

    class Open(Protocol):
        """A result, or an iterator over results.

        Attributes:
            submitted: False while more of its jobs may come.
        """

        @property
        def submitted(self) -> bool: ...

        def ready(self) -> bool:
            """True when all of it has ended."""

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


__all__ = ["Ledger"]

_MIN_KEPT: Final = 256


class Ledger:
    """Keeps results until they have ended: ``join`` waits for what nobody else remembers.

    Attributes:
        singles: Single tasks without callbacks.
    """

    def __init__(self) -> None:
        self.singles = OpenTasks(deletes=True)
        self._lock = threading.Lock()
        self._others: set[Any] = set()
        self._n_kept = _MIN_KEPT

    def add(self, result: Open) -> None:
        """One more. Now and then takes those that have ended out of the backend, and drops them."""
        self._others.add(result)
        if len(self._others) > self._n_kept:
            with self._lock:
                if len(self._others) > self._n_kept:
                    self._secure_ended()
                    self._n_kept = max(_MIN_KEPT, 2 * len(self._others))

    def drop(self, result: Open) -> None:
        """This one has its value."""
        self._others.discard(result)

    def open(self) -> list[Open]:
        """Those that may not have ended."""
        return [*self.singles, *self._others]

    def _secure_ended(self) -> None:
        for result in list(self._others):
            if result.ready():
                result.secure()
                self._others.discard(result)
