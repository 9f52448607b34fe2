"""The contract of a backend: where jobs are kept and run. The client is written over it once.

Payloads, outcomes and surroundings are opaque bytes here. An unknown jid raises JobNotFound from every verb and has no
effect. Only ``wait`` and ``close`` block for jobs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from cloud.errors import CloudException
from cloud.jobs import Jids, JobOptions
from cloud.serialization.functions import Function
from cloud.serialization.namespace import Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.datalogs import DataLog
    from cloud.engine.reading import Read

Segment = tuple[int, int, int, bytes]
"""(first index in the outcome, number wanted, number it holds, packed outcome); an outcome may hold a run of items."""


def singly(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same, one for each job."""
    for skip, n, length, raw in segments:
        for index in range(skip, skip + n):
            yield index, 1, length, raw


class MapWriter(ABC):
    """A map being submitted piece by piece."""

    @abstractmethod
    def extend(self, kind: int, n: int, payload: bytes) -> None:
        """Add ``n`` items; they may start at once."""

    @abstractmethod
    def seal(self) -> range:
        """End the map; its jids."""

    @abstractmethod
    def abandon(self) -> None:
        """Give the map up: its jobs are killed and forgotten."""


class Finals(ABC):
    """Jobs as they become final."""

    @abstractmethod
    def next(self, timeout_s: float | None) -> tuple[int, int, int] | None:
        """(first jid, n, status) of the next run of jobs that is final; None if there is none in time. Blocks."""

    @abstractmethod
    def watch(self, jids: Jids) -> None:
        """These as well. A ``next`` that waits in another thread sees them."""

    @abstractmethod
    def release(self) -> None:
        """Make the ``next`` that waits in another thread return None; if none does, the next one that would wait."""


class Backend(ABC):
    """A place for jobs.

    Attributes:
        name: 'mp', 'simulator', 'worker', ….
        simulated: What ``cloud.is_simulated`` says.
        datalog: Reports what is serialised for each job, if that is asked for.
    """

    name: str
    simulated: bool = False
    datalog: DataLog | None = None

    @property
    def namespace(self) -> Namespace | None:
        """The program's ``__main__`` for the calling thread, if it is not this process's own module."""
        return None

    @abstractmethod
    def submit(self, function: Function, arguments: bytes, options: JobOptions, context: bytes | None = None) -> int:
        """Take one call; its jid. ``context``: its pickled surroundings if not those of this process now."""

    @abstractmethod
    def open_map(self, function: Function, options: JobOptions) -> MapWriter:
        """Begin a map."""

    @abstractmethod
    def wait(self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool) -> list[int] | None:
        """Block until all are final, one has failed (``stop_on_error``: None) or the time is up: jids not final."""

    def wait_outcomes(
        self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool, read: Read | None = None
    ) -> tuple[list[int] | None, list[Segment] | None]:
        """As ``wait``; and what ``outcomes`` would say, where that came with it. Else None: ask for it.

        Args:
            read: May be called, by this thread, while others still run.
        """
        return self.wait(jids, timeout_s, stop_on_error=stop_on_error), None

    @abstractmethod
    def when_final(self, jids: Jids, action: Callable[[], None], *, stop_on_error: bool = False) -> Callable[[], None]:
        """Call ``action()`` from any thread, once, when all are final or, with ``stop_on_error``, one has failed.

        Returns:
            A function that calls it off.
        """

    @abstractmethod
    def on_each_final(self, jids: Jids, notify: Callable[[int, int, int], None]) -> None:
        """Call ``notify(first jid, n, status)`` from any thread for each run of jobs that becomes final, or is."""

    @abstractmethod
    def finals(self, jids: Jids) -> Finals:
        """The same to be waited for: those final now come first."""

    @abstractmethod
    def outcomes(self, jids: Jids) -> list[Segment]:
        """Outcomes of final jobs, in order."""

    @abstractmethod
    def statuses(self, jids: Jids) -> bytes | bytearray:
        """One status code a jid."""

    @abstractmethod
    def describe(self, jids: Jids) -> list[dict[str, Any]]:
        """Facts about jobs, in order; see ``Engine.describe``. An outcome may come without its value."""

    @abstractmethod
    def select(
        self, *, label: str | None = None, status: Iterable[int] | None = None, function: str | None = None
    ) -> list[int]:
        """Jids of the jobs that match."""

    @abstractmethod
    def listing(
        self,
        *,
        label: str | None = None,
        status: Iterable[int] | None = None,
        function: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Some of the jobs that match, in short and newest first; and the ``before`` to go on with, None at the end.

        It may be that none is in reach of one call, and there are others. A job has the keys jid, status (a code),
        label, function, created, started, runtime_s and attempt; times in seconds since the epoch, None before.
        """

    @abstractmethod
    def overview(self) -> dict[str, Any]:
        """Numbers: ``counts`` of jobs by status code, ``n_slots``, ``n_used`` of them, and ``n_workers``."""

    def when_closed(self, action: Callable[[], None]) -> None:
        """Call ``action()`` after ``close``: nothing more will be heard of unfinished jobs. Never in a job."""
        return

    @abstractmethod
    def cancel(self, jids: Jids | None, *, begun: bool = True) -> list[int]:
        """Kill jobs (None: all unfinished); jids of those whose end is still to come.

        ``begun=False`` leaves those alone that have begun.
        """

    @abstractmethod
    def delete(self, jids: Jids) -> None:
        """Forget final jobs."""

    @abstractmethod
    def connection_info(self) -> dict[str, Any]:
        """What ``cloud.connection_info`` tells of it."""

    def explain(self, error: CloudException) -> None:
        """Say more about why a job failed, if this backend knows more."""
        return

    def now(self) -> float:
        """Seconds since the epoch, by the clock of its jobs."""
        return time.time()

    @abstractmethod
    def close(self) -> None:
        """End all jobs and workers. Idempotent; bounded."""

    def dismiss(self) -> None:
        """No more jobs will be submitted: workers that are nobody else's end as they become idle. Does not block."""
        return

    def wait_for_workers(self) -> None:
        """After ``dismiss``, with all jobs final: block until they have ended in good order, at most some seconds."""
        return

    def abandon(self) -> None:  # noqa: B027 - most have nothing to let go of
        """In a forked child: let go of what is the parent's."""
