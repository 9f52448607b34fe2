"""The tasks of one executor that have not ended, and the thread that settles those nobody waits for.

An Executor that is forgotten leaves its work behind, which goes on to its end; so does the end of the program.

Lock order: ``gate`` (submitting), then the engine's lock; a future's own, under which its value is rebuilt, and then
the engine's. No lock is held while a callback runs.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from cloud.backends.base import Backend, singly
from cloud.errors import BackendClosed, JobNotFound
from cloud.futures.errors import lost_error
from cloud.futures.future import Future
from cloud.jobs import KILLED, QUEUED, WAITING, Jids
from cloud.pool.callbacks import CallbackThread
from cloud.pool.errors import unsent_error
from cloud.pool.open_tasks import OpenTasks
from cloud.pool.placing import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.futures.mapping import MapResults
    from cloud.futures.watching import Watch

__all__ = ["Work"]

_KILL_WAIT_S: Final = 10.0
_MAX_FORGOTTEN: Final = 256


class Work:
    """What an executor has to do.

    Args:
        place: Where tasks go.
        watch: What tells futures that their jobs are final.

    Attributes:
        gate: Held while a task is submitted: none is once ``closing``.
        callbacks: Runs callbacks, and settles.
        forgotten: Jobs whose futures are gone.
        closing: No more tasks are taken.
    """

    def __init__(self, place: Place, watch: Watch) -> None:
        self.place = place
        self.gate = threading.RLock()
        self.callbacks = CallbackThread()
        self.forgotten: deque[tuple[Backend, Jids]] = deque()
        self.closing = False
        self._watch = watch
        self._open = OpenTasks(deletes=False)
        self._open_maps: set[MapResults] = set()
        self._maps: weakref.WeakSet[MapResults] = weakref.WeakSet()
        self._ended: deque[Future[Any]] = deque()
        self._scheduled = False
        self._closes_itself = False
        self._closed = False
        self._ending = threading.Lock()
        # Now: while the interpreter ends, no thread can be started.
        self.callbacks.put(_nothing)
        _works.add(self)

    # --- submitting ---------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise RuntimeError once no more tasks are taken."""
        if self.closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def submit(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        """One task. A task that cannot be pickled fails later, when asked for.

        Raises:
            RuntimeError: No more tasks are taken.
        """
        with self.gate:
            self.check_open()
            try:
                backend, jids = self.place.submit(func, args, kwargs)
            except BackendClosed as exc:
                raise RuntimeError("cannot schedule new futures after shutdown") from exc
            except Exception as exc:  # noqa: BLE001 - for whoever asks for the result
                refused: Future[Any] = Future(self)
                refused.set_exception(unsent_error(exc))
                return refused
            if self._open.of(backend) is None:
                backend.when_closed(partial(_closed, weakref.ref(self)))
            future: Future[Any] = Future(self, backend, jids)
            self._open.add(backend, jids[0], future)
            if self.place.shared:
                # Others may delete its job, or close the backend: it must have its value before.
                future.watch()
        if len(self.forgotten) > _MAX_FORGOTTEN:
            self.forget()
        return future

    def asked(self) -> None:
        """Somebody wants the result of a task."""
        self._open.asked()

    def watch(self, future: Future[Any]) -> None:
        """Have it told when its job is final."""
        self._watch.add(future)

    def begin(self, results: MapResults) -> None:
        """A map was begun."""
        self._open_maps.add(results)
        self._maps.add(results)

    def submitted(self) -> None:
        """See ``iterators``: an iterable was read to its end. Nothing to do: ``end_map`` follows."""

    # --- ending -------------------------------------------------------------------------------------------------------

    def ended(self, future: Future[Any]) -> None:
        """Its job is final, and nobody waits for it. May be called under the engine's lock."""
        self._ended.append(future)
        if not self._scheduled:
            self._scheduled = True
            self.callbacks.put(self._settle_ended)

    def _settle_ended(self) -> None:
        self._scheduled = False
        while self._ended:
            found: dict[Backend, dict[int, Future[Any]]] = {}
            with suppress(IndexError):
                while True:
                    future = self._ended.popleft()
                    backend, jid = future.job
                    found.setdefault(backend, {})[jid] = future
            for backend, by_jid in found.items():
                jids = list(by_jid)
                segments: Iterable[Any] = [None] * len(jids)
                with suppress(JobNotFound, BackendClosed):  # each by itself, then
                    segments = list(singly(backend.outcomes(jids)))
                for jid, segment in zip(jids, segments, strict=True):
                    # Taken one by one: the callback of one may ask for the result of another.
                    future = by_jid.pop(jid)
                    if segment is not None:
                        future.keep(segment)
                    future.settle(in_callback_thread=True)
                del future  # it lives as long as its user wants

    def drop(self, backend: Backend, jid: int) -> None:
        """Its future has its value."""
        self._open.drop(backend, jid)
        if self._closes_itself and not self._open:
            self._close_soon()

    def end_map(self, results: MapResults) -> None:
        """All its jobs are final. May be called under the engine's lock."""
        self._open_maps.discard(results)
        if self._closes_itself:
            self._close_soon()

    def withdraw(self, backend: Backend, jids: Jids) -> int:
        """End those jobs that have not begun; how many have."""
        with suppress(JobNotFound, BackendClosed):
            codes = backend.statuses(jids)
            waiting = [jid for jid, code in zip(jids, codes, strict=True) if code in (WAITING, QUEUED)]
            if waiting:
                backend.cancel(waiting, begun=False)
                return backend.statuses(waiting).count(KILLED)
        return 0

    def kill(self, futures: Iterable[Future[Any]]) -> None:
        """End these tasks, running or not, and settle their futures. Blocks until they have ended."""
        found: dict[Backend, list[int]] = {}
        futures = [future for future in futures if future.jid is not None]
        for future in futures:
            backend, jid = future.job
            found.setdefault(backend, []).append(jid)
        for backend, jids in found.items():
            with suppress(JobNotFound, BackendClosed):
                pending = backend.cancel(jids)
                if pending:
                    backend.wait(pending, _KILL_WAIT_S, stop_on_error=False)
        for future in futures:
            future.wait(0.0)

    def forget(self) -> None:
        """Delete the jobs whose futures are gone."""
        found: dict[Backend, list[int]] = {}
        forgotten = self.forgotten
        with suppress(IndexError):
            while True:
                backend, jids = forgotten.popleft()
                if backend not in found:
                    found[backend] = []
                found[backend] += jids
        for backend, every in found.items():
            every.sort()  # a list lets go of its last item first; runs of jobs are deleted together
            with suppress(BackendClosed):
                try:
                    backend.delete(every)
                except JobNotFound:
                    for jid in every:
                        with suppress(JobNotFound):
                            backend.delete((jid,))

    def backend_closed(self) -> None:
        """Nothing more will be heard of their jobs: those who wait for futures must not wait for ever."""
        for future in self._open:
            future.tell()

    # --- the end ------------------------------------------------------------------------------------------------------

    def cancel_pending(self) -> None:
        """End all tasks that have not begun."""
        for future in self._open:
            future.cancel()
        for results in list(self._maps):
            results.withdraw()

    def close(self) -> None:
        """Take no more tasks. Blocks until all have ended, their callbacks have run and the workers have ended."""
        self.closing = True
        with self.gate:
            pass  # whoever is submitting has done so
        while self._open or self._open_maps:
            self._open.wait()
            for future in self._open:
                future.wait()
            self._flush()  # some may be being settled there
            for results in list(self._open_maps):
                with suppress(BackendClosed):
                    results.wait()
                self._open_maps.discard(results)
        self._close()

    def close_later(self) -> None:
        """Take no more tasks, and end the workers when all have ended. Does not block: may be called anywhere."""
        self.closing = self._closes_itself = True
        if not self._closed:
            self.callbacks.put(self._watch_open)
        self._close_soon()

    def _watch_open(self) -> None:
        for future in self._open:
            future.watch()

    def end(self) -> None:
        """Take no more tasks and end the workers now. What has not begun is cancelled, what runs fails."""
        self.closing = True
        self.cancel_pending()
        if self.place.shared:
            self.kill(self._open)
        for results in list(self._maps):
            results.secure()
            if self.place.shared:
                results.cancel(self.place.cloud)
        self._open.keep_ended()
        self.place.close()
        for future in self._open:
            future.lose(lost_error(BackendClosed(), future.jid))
        for results in list(self._maps):
            results.give_up(BackendClosed("the executor was ended before this task"))
        self._open_maps.clear()
        self._close()

    def _flush(self) -> None:
        if not self._closed and not self.callbacks.is_current():
            done = threading.Event()
            self.callbacks.put(done.set)
            done.wait()

    def _close_soon(self) -> None:
        if not self._closed:
            self.callbacks.put(self._close_if_idle)

    def _close_if_idle(self) -> None:
        # If somebody waits for the end, it is he who closes, and may be waiting for this thread.
        if not self._open and not self._open_maps and self._ending.acquire(blocking=False):
            try:
                self._close_now()
            finally:
                self._ending.release()

    def _close(self) -> None:
        if self.callbacks.is_current():
            self._close_if_idle()
        else:
            with self._ending:
                self._flush()
                self._close_now()

    def _close_now(self) -> None:
        if self._closed:
            return
        self._closed = True
        for results in list(self._maps):
            results.secure()
        if self.place.shared:
            self.forget()
        self.place.dismiss()
        self.place.wait_for_workers()
        self.place.close()
        self.callbacks.stop()

    def reset(self) -> None:
        """In a forked child: the tasks are the parent's, and so are the threads."""
        self.gate = threading.RLock()
        self._ending = threading.Lock()
        self.callbacks = CallbackThread()
        if not self._closed:
            self.callbacks.put(_nothing)
        self.forgotten.clear()
        self._ended.clear()
        self._scheduled = False
        abandoned, self._open = self._open, OpenTasks(deletes=False)
        for future in abandoned:
            future.abandon()
        self._open_maps.clear()
        self._watch.reset()
        self.place.reset()


def _nothing() -> None:
    return


def _closed(work: weakref.ref[Work]) -> None:
    found = work()
    if found is not None:
        found.backend_closed()


_works: weakref.WeakSet[Work] = weakref.WeakSet()


def _forked() -> None:
    for work in list(_works):
        work.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@atexit.register
def _finish() -> None:
    # As with concurrent.futures, a program ends when its tasks have. Registered later than what ends all workers,
    # and therefore done before.
    for work in list(_works):
        work.close()
