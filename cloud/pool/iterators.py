"""What ``imap`` and ``imap_unordered`` return."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from cloud.backends.base import Backend, Finals
from cloud.client.results import decode
from cloud.errors import BackendClosed, CloudException, CloudTimeoutError, JobNotFound
from cloud.jobs import DONE, PROCESSING, QUEUED, WAITING, Jids
from cloud.pool.errors import original_error, timeout_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, NoReturn, Protocol

    from cloud.client.cloud import Cloud
    from cloud.pool.feeding import Feed

    class Owner(Protocol):
        """A pool, or an executor."""

        def submitted(self) -> None:
            """An iterable was read to its end."""


__all__ = ["IMapIterator", "IMapUnorderedIterator", "Raised"]

_AHEAD: Final = 1 << 16
_UNFINISHED: Final = (WAITING, QUEUED, PROCESSING)


class Raised:
    """Stands for an exception among results."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Iterator(ABC, Iterator["Any"]):
    """Results of a Feed; also its sink. Several threads may ask for the next."""

    def __init__(self, pool: Owner) -> None:
        self._pool = pool
        self._ready: deque[Any] = deque()
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None
        self.feed: Feed | None = None

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        try:
            found = self._ready.popleft()
        except IndexError:
            return self.next()
        if type(found) is Raised:
            raise found.error
        return found

    def next(self, timeout: float | None = None) -> Any:
        """The next result; blocks until it is there.

        Args:
            timeout: Seconds; None waits for ever. After a timeout iteration may go on.

        Raises:
            StopIteration: There are no more.
            Exception: What this task, or the iterable, raised; iteration may go on.
            CloudTimeoutError: Not in time; this one is a ``multiprocessing.TimeoutError`` too.
            BackendClosed: The pool was terminated.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                found = self._ready.popleft()
            except IndexError:
                self._look(deadline)
            else:
                if type(found) is Raised:
                    raise found.error
                return found

    def _look(self, deadline: float | None) -> None:
        with self._turn:
            if not self._ready:
                try:
                    self._fetch(deadline)
                except BackendClosed:
                    raise BackendClosed("the pool was terminated before this task ended") from None
                except CloudTimeoutError:
                    if not self._ready:
                        raise

    @abstractmethod
    def _fetch(self, deadline: float | None) -> None:
        """Put at least one result into ``_ready``, or raise, or find that another look is needed."""

    def _keep(self, backend: Backend, jids: Jids) -> None:
        values, failures = decode(jids, backend.outcomes(jids), backend.namespace)
        if failures:
            failed = {id(each) for each in failures}
            values = [Raised(self._raised(each)) if id(each) in failed else each for each in values]
        self._ready.extend(values)

    def _raised(self, failure: CloudException) -> BaseException:
        """What is raised for a failed job."""
        return original_error(failure)

    def _wait_for_change(self, deadline: float | None) -> None:
        """Under ``_changed``: until the feed has told something."""
        left_s = _left(deadline)
        if not self._changed.wait(left_s) and left_s is not None:
            _too_late()

    # --- for the pool -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _submitted(self) -> list[tuple[Backend, range]]:
        """Jobs whose results nobody has taken."""

    @property
    def submitted(self) -> bool:
        """True when the iterable was read to its end."""
        return self._ended

    def ready(self) -> bool:
        """True when every item has been submitted and has ended."""
        try:
            return self._ended and all(min(backend.statuses(jids)) >= DONE for backend, jids in self._submitted())
        except (JobNotFound, BackendClosed):
            return False  # taken meanwhile; there will be another look

    def wait(self) -> None:
        """Block until every item has been submitted and has ended."""
        if self.feed is not None:
            self.feed.join()
        for backend, jids in self._submitted():
            with suppress(JobNotFound):  # taken meanwhile
                backend.wait(jids, None, stop_on_error=False)

    def secure(self) -> None:
        """See ``ledger.Open``."""
        # Whoever holds the turn waits for a result, and has taken those there were.
        if self._turn.acquire(blocking=False):
            try:
                while self._submitted():
                    self._fetch(0.0)
            except (StopIteration, CloudTimeoutError, BackendClosed):
                pass  # the rest has not ended
            finally:
                self._turn.release()

    def cancel(self, cloud: Cloud) -> None:
        """See ``ledger.Open``."""
        for _, jids in self._submitted():
            with suppress(JobNotFound):
                cloud.kill(jids)

    def give_up(self, error: BaseException) -> None:
        """See ``ledger.Open``."""
        if self.feed is not None:
            self.feed.stop()
        self.end(error)

    # --- for the feed -------------------------------------------------------------------------------------------------

    @abstractmethod
    def add(self, backend: Backend, jids: range) -> None:
        """The next items are these jobs."""

    @abstractmethod
    def add_error(self, error: BaseException) -> None:
        """The next item could not be submitted."""

    def end(self, error: BaseException | None = None) -> None:
        """There are no more items; after the last result this is raised."""
        with self._changed:
            if self._ended:
                return
            self._error, self._ended = error, True
            self._changed.notify_all()
        self._pool.submitted()

    def _stop(self) -> NoReturn:
        error, self._error = self._error, None
        raise StopIteration if error is None else error


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _too_late(jids: Jids = ()) -> NoReturn:
    raise timeout_error(list(jids))


class IMapIterator(_Iterator):
    """Results in the order of the items.

    Source: ``multiprocessing.pool.IMapIterator``.
    """

    def __init__(self, pool: Owner) -> None:
        super().__init__(pool)
        self._parts: deque[tuple[Backend, range] | Raised] = deque()
        self._at = 0

    def add(self, backend: Backend, jids: range) -> None:
        with self._changed:
            self._parts.append((backend, jids))
            self._changed.notify()

    def add_error(self, error: BaseException) -> None:
        with self._changed:
            self._parts.append(Raised(error))
            self._changed.notify()

    def _submitted(self) -> list[tuple[Backend, range]]:
        return [part for part in list(self._parts) if not isinstance(part, Raised)]

    def _fetch(self, deadline: float | None) -> None:
        with self._changed:
            while not self._parts:
                if self._ended:
                    self._stop()
                self._wait_for_change(deadline)
            part = self._parts[0]
        if isinstance(part, Raised):
            self._ready.append(part)
            self._parts.popleft()
            return
        backend, jids = part
        at = self._at
        if backend.wait(jids[at : at + 1], _left(deadline), stop_on_error=False):
            _too_late(jids[at : at + 1])
        codes = backend.statuses(jids[at : at + _AHEAD])
        n = min((found for code in _UNFINISHED if (found := codes.find(code)) >= 0), default=len(codes))
        self._keep(backend, jids[at : at + n])
        self._at += n
        if self._at == len(jids):
            self._at = 0
            self._parts.popleft()
            backend.delete(jids)


class IMapUnorderedIterator(_Iterator):
    """Results in the order in which tasks end.

    Source: ``multiprocessing.pool.IMapUnorderedIterator``.
    """

    def __init__(self, pool: Owner) -> None:
        super().__init__(pool)
        self._backend: Backend | None = None
        self._finals: Finals | None = None
        self._n_left = 0
        self._blocks: list[tuple[range, list[int]]] = []

    def add(self, backend: Backend, jids: range) -> None:
        with self._changed:
            self._n_left += len(jids)
            self._blocks.append((jids, [len(jids)]))
            if self._finals is None:
                self._backend, self._finals = backend, backend.finals(jids)
            else:
                self._finals.watch(jids)
            self._changed.notify()

    def add_error(self, error: BaseException) -> None:
        self._ready.append(Raised(error))
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        super().end(error)
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()
            if self._finals is not None:
                self._finals.release()

    def _submitted(self) -> list[tuple[Backend, range]]:
        backend = self._backend
        return [] if backend is None else [(backend, jids) for jids, _ in list(self._blocks)]

    def _fetch(self, deadline: float | None) -> None:
        with self._changed:
            while self._finals is None or not self._n_left:
                if self._ready:
                    return
                if self._ended:
                    self._stop()
                self._wait_for_change(deadline)
            finals, backend = self._finals, self._backend
        assert backend is not None
        found = finals.next(_left(deadline))
        if found is None:
            if deadline is not None and time.monotonic() >= deadline:
                _too_late()
            return
        first, n, _ = found
        self._keep(backend, range(first, first + n))
        with self._changed:
            self._n_left -= n
        at = bisect_right(self._blocks, first, key=_first_of) - 1
        jids, left = self._blocks[at]
        left[0] -= n
        if not left[0]:
            del self._blocks[at]
            backend.delete(jids)


def _first_of(block: tuple[range, list[int]]) -> int:
    return block[0].start
