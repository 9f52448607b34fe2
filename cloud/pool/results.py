"""What ``apply_async`` and ``map_async`` return.

::

    submitted ──► secured: outcomes taken out of the backend ──► settled: decoded ──► callback ──► ready
                     by whoever asks first, the callback thread, or the pool before it closes
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from cloud.backends.base import Backend, Segment
from cloud.client.results import decode
from cloud.errors import BackendClosed, JobNotFound
from cloud.jobs import DONE, Jids
from cloud.pool.errors import original_error, timeout_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.client.cloud import Cloud
    from cloud.pool.pool import Pool

__all__ = ["ApplyResult", "MapResult"]


class ApplyResult:
    """The value of one task, once it is there.

    Source: ``multiprocessing.pool.AsyncResult``. New: ``jid``.
    """

    #: All its jobs have been, see ``ledger.Open``.
    submitted: bool = True
    #: Nobody has to tell it of its end, see ``OpenTasks``.
    watched: bool = False

    _backend: Backend | None = None
    _jids: Jids = ()
    _segments: list[Segment] | None = None
    _is_single = False
    _settled = False
    _success = True
    _value: Any = None
    _callback: Callable[[Any], object] | None = None
    _error_callback: Callable[[BaseException], object] | None = None
    # With a callback: set when that has run.
    _over: threading.Event | None = None

    def __init__(
        self,
        pool: Pool,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        if callback is not None or error_callback is not None:
            self._callback = callback
            self._error_callback = error_callback
            self._over = threading.Event()

    # --- for the pool -------------------------------------------------------------------------------------------------

    def begin(self, backend: Backend, jids: Jids) -> None:
        """Stand for these jobs from now on."""
        self._backend, self._jids = backend, jids
        self._is_single = type(jids) is tuple and self._over is None
        if self._is_single:
            self._pool.ledger.singles.add(backend, jids[0], self)
            return
        if self._over is not None:
            backend.when_final(jids, self._finish)
        self._pool.ledger.add(self)

    def fail(self, error: BaseException) -> None:
        """End with this error."""
        self._success, self._value, self._settled = False, error, True
        if self._over is not None:
            self._finish()

    def keep(self, segment: Segment) -> None:
        """See ``OpenTasks``."""
        with self._lock:
            if self._segments is None:
                self._segments = [segment]

    def keep_value(self, value: Any) -> None:
        """See ``OpenTasks``."""
        with self._lock:
            if self._segments is None:
                self._value, self._segments, self._settled = value, [], True

    def cancel(self, cloud: Cloud) -> None:
        """See ``ledger.Open``."""
        with suppress(JobNotFound):
            cloud.kill(self._jids)

    def give_up(self, error: BaseException) -> None:
        """See ``ledger.Open``."""
        if self._over is not None and not self._over.is_set():
            with self._lock:
                if not self._settled and self._segments is None:
                    self._success, self._value, self._settled = False, error, True
            if not self._pool.callbacks.is_current():
                self._over.set()

    def secure(self) -> None:
        """See ``ledger.Open``."""
        if self.ready():
            with self._lock, suppress(BackendClosed):
                self._take()

    def _take(self) -> list[Segment]:
        if self._segments is None:
            backend, jids = self._backend, self._jids
            assert backend is not None
            self._segments = backend.outcomes(jids)
            try:
                backend.delete(jids)
            except JobNotFound:
                pass  # the user deleted it
        return self._segments

    def _finish(self) -> None:
        self._pool.callbacks.put(self._run_callback)

    def _run_callback(self) -> None:
        over = self._over
        if over is None or over.is_set():
            return
        try:
            self._settle()
            callback = self._callback if self._success else self._error_callback
            if callback is not None:
                callback(self._value)
        finally:
            over.set()

    # --- asking -------------------------------------------------------------------------------------------------------

    @property
    def jid(self) -> int | range | None:
        """The job's jid, or the jids of a map's jobs; None if there are none: it could not be submitted."""
        if isinstance(self._jids, range):
            return self._jids
        return self._jids[0] if self._jids else None

    def ready(self) -> bool:
        """True when the task has ended, and its callback too. Does not block."""
        if self._over is not None:
            return self._over.is_set()
        if self._settled or self._segments is not None:
            return True
        try:
            return self._backend is not None and min(self._backend.statuses(self._jids), default=DONE) >= DONE
        except (JobNotFound, BackendClosed):
            # Another thread has just taken it, or it ended with the pool.
            return self._segments is not None

    def successful(self) -> bool:
        """True when the task ended without raising.

        Raises:
            ValueError: It has not ended.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        self._settle()
        return self._success

    def wait(self, timeout: float | None = None) -> None:
        """Block until the task has ended, or for ``timeout`` seconds; None waits for ever.

        Raises:
            BackendClosed: The pool was terminated, so that it never will.
        """
        self._wait(timeout)

    def get(self, timeout: float | None = None) -> Any:
        """Block until the task has ended, and return what it returned.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            Exception: What the task raised, with its traceback there as ``__cause__``.
            WorkerLost: Its worker process was killed, crashed or exited.
            CloudTimeoutError: It has not ended in time; this one is a ``multiprocessing.TimeoutError`` too.
            BackendClosed: The pool was terminated before it ended.
        """
        if not self._settled:
            if not self._wait(timeout):
                raise timeout_error(list(self._jids))
            self._settle()
        if self._success:
            return self._value
        raise self._value

    def _wait(self, timeout: float | None) -> bool:
        if self._over is not None:
            return self._over.wait(timeout)
        if self._segments is None and self._is_single:
            self._pool.ledger.singles.asked()
        if self._settled or self._segments is not None:
            return True
        assert self._backend is not None
        try:
            return not self._backend.wait(self._jids, timeout, stop_on_error=False)
        except (JobNotFound, BackendClosed):
            # Taken by another thread, or by the pool before it closed.
            if not self.ready():
                raise BackendClosed("the pool was terminated before this task ended") from None
            return True

    def _settle(self) -> None:
        if self._settled:
            return
        with self._lock:
            if not self._settled:
                namespace = None if self._backend is None else self._backend.namespace
                values, failures = decode(self._jids, self._take(), namespace)
                if failures:
                    self._success, self._value = False, original_error(failures[0])
                else:
                    self._value = self._shape(values)
                self._segments, self._settled = [], True
        if self._is_single:
            assert self._backend is not None
            self._pool.ledger.singles.drop(self._backend, self._jids[0])
        else:
            self._pool.ledger.drop(self)

    def _shape(self, values: list[Any]) -> Any:
        return values[0]


class MapResult(ApplyResult):
    """The values of a map, once all are there.

    Source: ``multiprocessing.pool.MapResult``.
    """

    def _shape(self, values: list[Any]) -> Any:
        return values
