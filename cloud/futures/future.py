"""``Future``: a task of an Executor.

::

    job final ──► told, under the engine's lock ──► settled: decoded, waiters woken ──► callbacks
                    by the thread that waits in result(), else by the executor's callback thread

The thread that waits reads the worker's socket itself, so a result that somebody waits for passes through no other
thread. Callbacks never run on it: it may hold locks that they want.
"""

from __future__ import annotations

import threading
from concurrent import futures
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from cloud.backends.base import Backend, Segment
from cloud.client.info import info_of, keys_of
from cloud.client.results import decode
from cloud.errors import BackendClosed, CloudTimeoutError, JobKilled, JobNotFound, SerializationError
from cloud.futures.errors import lost_error, task_error
from cloud.jobs import PROCESSING

if TYPE_CHECKING:
    from cloud.futures.work import Work

__all__ = ["Future"]

T = TypeVar("T")

_GONE: Final = (BackendClosed, JobNotFound)


class Future(futures.Future[T], Generic[T]):
    """The result of one task, once it is there.

    As ``concurrent.futures.Future``. New: ``jid``, ``info`` and ``kill``. The job is kept as long as its future.

    Source: ``concurrent.futures.Future`` of Python 3.11-3.14.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work
        self._backend: Backend | None = None
        self._jids: tuple[int, ...] = ()
        # Somebody waits for it and will settle it; it is being settled, or is; its job is final; cancel() ended it.
        self._claimed = self._taken = self._ended = self._withdrawn = False
        self._defers_callbacks = False

    # --- asking -------------------------------------------------------------------------------------------------------

    @property
    def jid(self) -> int | None:
        """The job's jid; None if there is none: the task could not be pickled."""
        return self._jids[0] if self._jids else None

    def info(self, info_requested: Any = None) -> dict[str, Any]:
        """What is known of the job: what ``cloud.info`` tells, by key. Does not block.

        Args:
            info_requested: As for ``cloud.info``.

        Raises:
            JobNotFound: There is no job: the task could not be pickled, or the job was deleted.
            BackendClosed: The executor has been shut down.
        """
        keys = keys_of(info_requested)
        if self._backend is None:
            raise JobNotFound("this task was never submitted: it could not be pickled")
        return info_of(self._backend.describe(self._jids[:1])[0], keys, self._backend.now())

    def running(self) -> bool:
        """True while a worker runs the task. Does not block."""
        self._look()
        return super().running()

    def _look(self) -> None:
        if self._backend is not None and not self._ended and not self.done() and not super().running():
            with suppress(*_GONE, RuntimeError):  # it has ended meanwhile, or another thread has looked, too
                if self._backend.statuses(self._jids)[0] == PROCESSING:
                    self.set_running_or_notify_cancel()

    def __repr__(self) -> str:
        self._look()
        return super().__repr__()

    # --- waiting ------------------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> T:
        """Block until the task has ended, and return what it returned.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            Exception: What the task raised, with its traceback there as ``__cause__``.
            WorkerLost: Its worker was killed, crashed or exited; this one is a ``BrokenProcessPool`` too.
            JobKilled: It was killed.
            CancelledError: It was cancelled.
            CloudTimeoutError: It has not ended in time. It is a ``TimeoutError``, and the task goes on.
        """
        try:
            self._wait(timeout)
            return super().result(0)
        finally:
            self = None  # type: ignore[assignment]  # noqa: PLW0642 - else a raised exception would refer to itself

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``result``; what it would raise, or None."""
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout: float | None) -> None:
        if not self.wait(timeout):
            raise CloudTimeoutError("the task has not ended in time", jid=list(self._jids))

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the task has ended, for at most ``timeout`` seconds; True if it has."""
        if self._is_over():
            return True
        if self._claim():
            self._drive(timeout)
        else:
            with self._condition:
                if not self._is_over():
                    self._condition.wait(timeout)
        return self._is_over()

    def _is_over(self) -> bool:
        # done() without its lock.
        return self._state not in ("PENDING", "RUNNING")

    def _claim(self) -> bool:
        with self._work.lock:
            if self._claimed or self._taken or self._backend is None:
                return False
            self._claimed = True
            return True

    def _drive(self, timeout: float | None) -> None:
        assert self._backend is not None
        try:
            timeout_s = None if timeout is None else max(0.0, timeout)
            if not self._backend.wait(self._jids, timeout_s, stop_on_error=False):
                self._ended = True
        except _GONE:
            self._ended = True  # there will be no other word of it
        finally:
            # First given up, then looked at: whoever tells of the end looks in the other order.
            self._claimed = False
            self.settle_if_ended()

    # --- ending -------------------------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """End the task if it has not begun; True if that is so now. Callbacks run in this thread.

        One that runs is left alone: see ``kill``.
        """
        if self._backend is None or self.done():
            return super().cancel()
        if self.running():
            return False
        self._withdrawn = True
        if not self._work.withdraw(self._backend, self._jids):
            self._withdrawn = False
            return self.cancelled()
        if not self.cancelled():
            super().cancel()
        self.settle_if_ended()
        return True

    def kill(self) -> bool:
        """End the task, whether or not it has begun: its future raises JobKilled. Blocks until it has ended.

        A task that runs gets ``KilledException`` raised in it; after ``kill_grace_s`` its process is ended for certain.

        Returns:
            False if it had ended before.
        """
        if self.done():
            return False
        self._work.kill([self])
        return self.done() and not self.cancelled() and isinstance(self.exception(), JobKilled)

    # --- for the executor ---------------------------------------------------------------------------------------------

    def attach(self, backend: Backend, jids: tuple[int, ...]) -> None:
        """Stand for this job from now on."""
        self._backend, self._jids = backend, jids

    @property
    def job(self) -> tuple[Backend, int]:
        """Where its job is, and the jid."""
        assert self._backend is not None
        return self._backend, self._jids[0]

    @property
    def ended(self) -> bool:
        """True when its job is final, whether or not it is settled."""
        return self._ended

    def tell(self, first: int = 0, n: int = 0, status: int = 0) -> None:
        """Its job is final. Called under the engine's lock."""
        self._ended = True
        if not self._claimed:
            self._work.ended(self)

    def take(self) -> bool:
        """True for one caller only, who is to settle it."""
        with self._work.lock:
            if self._taken or self._claimed:
                return False
            self._taken = True
            return True

    def settle_if_ended(self) -> None:
        """Settle it here and now if its job is final and nobody else does."""
        if self._ended and self.take():
            self._defers_callbacks = True
            try:
                self.settle()
            except KeyboardInterrupt:
                # Ctrl-C while the value is rebuilt: another thread does it.
                self._taken = False
                self._work.ended(self)
                raise

    def settle(self, segment: Segment | None = None) -> None:
        """Take the outcome over; wake those who wait; run callbacks."""
        value: Any = None
        error: BaseException | None = None
        try:
            backend = self.job[0]
            segments = backend.outcomes(self._jids) if segment is None else [segment]
            values, failures = decode(self._jids, segments, backend.namespace)
            if failures:
                error = task_error(failures[0])
            else:
                value = values[0]
        except _GONE as exc:
            error = lost_error(exc, self.jid)
        except KeyboardInterrupt as exc:
            if self._defers_callbacks and threading.current_thread() is threading.main_thread():
                raise
            error = _unreadable(exc, self.jid)
        except BaseException as exc:  # noqa: BLE001 - rebuilding runs the user's code
            error = _unreadable(exc, self.jid)
        self.finish(value, error)

    def finish(self, value: Any, error: BaseException | None) -> None:
        """End with this value or error, unless it was cancelled."""
        if self._withdrawn and isinstance(error, JobKilled):
            super().cancel()
        if self._is_over() and self.cancelled():
            with suppress(RuntimeError):  # nobody is told twice
                self.set_running_or_notify_cancel()
        else:
            with suppress(futures.InvalidStateError):  # the user has set something
                if error is None:
                    self.set_result(value)
                else:
                    self.set_exception(error)
        self._work.drop(self)

    def abandon(self) -> None:
        """In a forked child: the task is the parent's."""
        self._condition = threading.Condition()
        self._callbacks().clear()
        self._waiters.clear()
        self._taken = True
        if not self._is_over():
            self.set_exception(lost_error(BackendClosed("the parent's"), self.jid))

    def _callbacks(self) -> list[Any]:
        found: list[Any] = self._done_callbacks  # type: ignore[attr-defined]
        return found

    def _invoke_callbacks(self) -> None:
        run = super()._invoke_callbacks  # type: ignore[misc]
        if not self._callbacks():
            return
        if self._defers_callbacks:
            self._work.callbacks.put(run)
        else:
            run()

    def __reduce__(self) -> Any:
        raise TypeError("futures cannot be passed between processes or pickled")

    def __del__(self) -> None:
        backend = self.__dict__.get("_backend")
        if backend is not None:
            # Not here: this may be called anywhere, with any lock held.
            self._work.forgotten.append((backend, self._jids))


def _unreadable(cause: BaseException, jid: int | None) -> SerializationError:
    # Raised here, SystemExit would end this program.
    error = SerializationError(f"the task's result cannot be rebuilt here ({type(cause).__name__}: {cause})", jid=jid)
    error.__cause__ = cause
    return error
