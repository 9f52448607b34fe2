"""``Future``: a task of an Executor.

::

    job final ──► settled: decoded, waiters woken ──► callbacks
                     by whoever asks for it first, if nobody is to be told: nothing happens before
                     else by the executor's callback thread, which is told of the end

Most futures are only ever asked for their result. What telling others takes is made when first needed: the standard
library's ``wait``, ``as_completed`` and callbacks all begin with the future's condition. Until then a job's end costs
this process nothing, and the thread that waits in ``result`` reads the worker's socket itself.

Callbacks never run on a thread that waits: it may hold locks that they want.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress

from cloud.backends.base import Backend, Segment
from cloud.client.info import info_of, keys_of
from cloud.client.results import decode
from cloud.errors import (
    BackendClosed,
    CloudException,
    CloudTimeoutError,
    JobKilled,
    JobNotFound,
    SerializationError,
)
from cloud.futures.errors import lost_error, task_error
from cloud.jobs import DONE, PROCESSING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeVar

    from cloud.futures.work import Work

    T = TypeVar("T")

__all__ = ["Future"]

_GONE: Final = (BackendClosed, JobNotFound)
_OPEN: Final = ("PENDING", "RUNNING")
_CANCELLED: Final = ("CANCELLED", "CANCELLED_AND_NOTIFIED")


class Future(futures.Future["T"]):
    """The result of one task, once it is there.

    As ``concurrent.futures.Future``. New: ``jid``, ``info`` and ``kill``. The job is kept as long as its future.

    Source: ``concurrent.futures.Future`` of Python 3.11-3.14.
    """

    _backend: Backend | None = None

    # As the standard library begins. Its condition and lists follow when they are needed: see __getattr__.
    _state = "PENDING"
    _result: Any = None
    _exception: BaseException | None = None

    #: True once others may have to be told of its end.
    watched = False
    # Its outcome, taken out of the backend. Then: it was taken before anybody asked; somebody waits for it and will
    # settle it; its job is final; cancel() ended it; it is being settled; it is.
    _segment: Segment | None = None
    _kept = _claimed = _ended = _withdrawn = _settling = _settled = False

    def __init__(self, work: Work, backend: Backend | None = None, jids: tuple[int, ...] = ()) -> None:
        # Not super().__init__(): it makes what most futures never need.
        self._work = work
        self._backend = backend
        self._jids = jids
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name == "_condition":
            made = self.__dict__.setdefault(name, threading.Condition())
            self.watch()  # whoever waits for it must be woken
            return made
        if name in ("_waiters", "_done_callbacks"):
            return self.__dict__.setdefault(name, [])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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

    def done(self) -> bool:
        """True when the task has ended or was cancelled. Does not block."""
        return self._is_over() or (not self.watched and self._has_ended())

    def cancelled(self) -> bool:
        """True when it was cancelled."""
        return self._state in _CANCELLED

    def running(self) -> bool:
        """True while a worker runs the task. Does not block."""
        self._look()
        return self._state == "RUNNING" and not self.done()

    def _look(self) -> None:
        if self._backend is not None and self._state == "PENDING" and not self._ended:
            with suppress(*_GONE, RuntimeError):  # it has ended meanwhile, or another thread has looked, too
                if self._backend.statuses(self._jids)[0] == PROCESSING:
                    self.set_running_or_notify_cancel()

    def _is_over(self) -> bool:
        # What is known here, without the lock of the standard library's done().
        return self._state not in _OPEN

    def _has_ended(self) -> bool:
        if self._ended or self._backend is None:
            return self._ended
        try:
            return self._backend.statuses(self._jids)[0] >= DONE
        except _GONE:
            return True  # there will be no other word of it

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
            if self._kept and not self._settled:
                self.settle()
            if self._state != "FINISHED":
                self._wait(timeout)
            if self._exception is not None:
                raise self._exception
            value: T = self._result
            return value
        finally:
            self = None  # type: ignore[assignment]  # noqa: PLW0642 - else a raised exception would refer to itself

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``result``; what it would raise, or None."""
        self._wait(timeout)
        return self._exception

    def _wait(self, timeout: float | None) -> None:
        if not self.wait(timeout):
            raise CloudTimeoutError("the task has not ended in time", jid=list(self._jids))
        if self.cancelled():
            raise futures.CancelledError

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the task has ended, for at most ``timeout`` seconds; True if it has."""
        if self._is_over():
            return True
        if not self._ended:
            self._work.asked()
        if not self._ended:
            self._drive(None if timeout is None else max(0.0, timeout))
        if self._ended:
            self.settle()
        return self._is_over()

    def _drive(self, timeout_s: float | None) -> None:
        assert self._backend is not None
        self._claimed = True
        try:
            unfinished, segments = self._backend.wait_outcomes(self._jids, timeout_s, stop_on_error=False)
            if not unfinished:
                self._ended = True
                if segments is not None:
                    self._segment = segments[0]
        except _GONE:
            self._ended = True  # there will be no other word of it
        finally:
            # First given up, then looked at: whoever tells of the end looks in the other order.
            self._claimed = False

    # --- ending -------------------------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """End the task if it has not begun; True if that is so now. Callbacks run in this thread.

        One that runs is left alone: see ``kill``.
        """
        if self._has_ended():
            self.wait()
        if self._backend is None or self._is_over():
            return super().cancel()
        if self.running():
            return False
        self._withdrawn = True
        if not self._work.withdraw(self._backend, self._jids):
            self._withdrawn = False
            return self.cancelled()
        if not self.cancelled():
            super().cancel()
        self._ended = True
        self.settle()
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

    @property
    def job(self) -> tuple[Backend, int]:
        """Where its job is, and the jid."""
        assert self._backend is not None
        return self._backend, self._jids[0]

    def watch(self) -> None:
        """See that it is settled when it ends, or now, whether or not anybody asks."""
        if self.watched:
            return
        self.watched = True
        if self._backend is None or self._settled or self._settling:
            return
        try:
            self._work.watch(self)
        except _GONE:
            self._ended = True
        if self._ended:
            self.settle()

    def tell(self, first: int = 0, n: int = 0, status: int = 0) -> None:
        """Its job is final. Called under the engine's lock."""
        self._ended = True
        if not self._claimed:
            self._work.ended(self)

    def keep(self, segment: Segment) -> None:
        """This is its outcome; the backend may be closed after this."""
        self._segment = segment
        self._kept = self._ended = True

    def keep_value(self, value: T) -> None:
        """This is its value, which is immutable; the backend may be closed after this."""
        self._kept = self._ended = True
        if not self._lock.locked():  # else somebody settles it: a signal handler must not wait for what it broke into
            self.settle(value=(value, None))

    def settle(self, *, in_callback_thread: bool = False, value: tuple[T, None] | None = None) -> None:
        """Its job is final: take the outcome over, wake those who wait, have callbacks run. Blocks if others do so.

        Args:
            in_callback_thread: Callbacks run here.
            value: (what it returned, None), if that is known already.
        """
        with self._lock:
            if self._settled:
                return
            self._settling = True
            try:
                self._finish(*(value or self._outcome(may_interrupt=not in_callback_thread)))
                self._settled = True
            except KeyboardInterrupt:
                # Ctrl-C while the value is rebuilt: another thread does it, or this one when it asks again.
                self._work.ended(self)
                raise
            finally:
                self._settling = False
            self._segment = None
        if (self.watched or not self._kept) and self._backend is not None:
            self._work.drop(self._backend, self._jids[0])
        if self.watched:
            if in_callback_thread:
                self._invoke_callbacks()
            elif self._done_callbacks:
                self._work.callbacks.put(self._invoke_callbacks)

    def lose(self, error: CloudException) -> None:
        """End with this error, unless it has ended."""
        if self._kept:
            self.settle()
        with self._lock:
            if self._settled:
                return
            self._settling = True
            self._finish(None, error)
            self._settled, self._settling = True, False
        self._work.drop(*self.job)
        self._invoke_callbacks()

    def _outcome(self, *, may_interrupt: bool) -> tuple[Any, BaseException | None]:
        """The value, or the error."""
        try:
            backend = self._backend
            assert backend is not None
            segments = backend.outcomes(self._jids) if self._segment is None else [self._segment]
            values, failures = decode(self._jids, segments, backend.namespace)
            return (None, task_error(failures[0])) if failures else (values[0], None)
        except _GONE as exc:
            return None, lost_error(exc, self.jid)
        except KeyboardInterrupt as exc:
            if may_interrupt and threading.current_thread() is threading.main_thread():
                raise
            return None, _unreadable(exc, self.jid)
        except BaseException as exc:  # noqa: BLE001 - rebuilding runs the user's code
            return None, _unreadable(exc, self.jid)

    def _finish(self, value: Any, error: BaseException | None) -> None:
        """End with this value or error, unless it was cancelled, or the user has set something."""
        if self._withdrawn and isinstance(error, JobKilled):
            super().cancel()
        if not self.watched:
            # As below. Whoever makes the condition meanwhile finds the state changed, or is woken.
            self._result, self._exception = value, error
            self._state = "FINISHED"
            self._wake()
        elif self.cancelled():
            with suppress(RuntimeError):  # nobody is told twice
                self.set_running_or_notify_cancel()
        else:
            with suppress(futures.InvalidStateError):
                if error is None:
                    self.set_result(value)
                else:
                    self.set_exception(error)

    def _wake(self) -> None:
        if self.watched:
            with self._condition:
                for waiter in self._waiters:
                    waiter.add_result(self)
                self._condition.notify_all()

    def abandon(self) -> None:
        """In a forked child: the task is the parent's."""
        self._lock = threading.Lock()
        for name in ("_condition", "_waiters", "_done_callbacks", "watched"):
            self.__dict__.pop(name, None)
        self._ended = True
        self.lose(lost_error(BackendClosed("the parent's"), self.jid))

    def _invoke_callbacks(self) -> None:
        # Not while its lock is held, but then. Each is taken out: several threads may come here.
        callbacks: list[Any] = self._done_callbacks if self.watched else []
        while callbacks and not self._settling:
            with suppress(IndexError):
                callback = callbacks.pop(0)
                _call(callback, self)

    def __reduce__(self) -> Any:
        raise TypeError("futures cannot be passed between processes or pickled")

    def __del__(self) -> None:
        if self._backend is not None:
            # Not here: this may be called anywhere, with any lock held.
            self._work.forgotten.append((self._backend, self._jids))


def _call(callback: Callable[[Future[Any]], object], future: Future[Any]) -> None:
    try:
        callback(future)
    except Exception:
        logging.getLogger("concurrent.futures").exception("exception calling callback for %r", future)


def _unreadable(cause: BaseException, jid: int | None) -> SerializationError:
    # Raised here, SystemExit would end this program.
    error = SerializationError(f"the task's result cannot be rebuilt here ({type(cause).__name__}: {cause})", jid=jid)
    error.__cause__ = cause
    return error
