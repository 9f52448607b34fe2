"""``Pool``: multiprocessing's, over the engine."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, Self

from cloud import current
from cloud.backends.base import Backend
from cloud.client.cloud import Cloud
from cloud.configuration import usable_cores
from cloud.errors import BackendClosed, JobNotFound, UnsupportedOperation
from cloud.jobs import DONE, Jids, JobOptions
from cloud.logs import logger
from cloud.pool.errors import unsent_error
from cloud.pool.feeding import Feed, extend
from cloud.pool.iterators import IMapIterator, IMapUnorderedIterator
from cloud.pool.results import ApplyResult, MapResult

__all__ = ["Pool"]

_RUN: Final = "RUN"
_CLOSE: Final = "CLOSE"
_TERMINATE: Final = "TERMINATE"
_STOP_S: Final = 2.0
_MIN_KEPT: Final = 256
_NO_KEYWORDS: Final[Mapping[str, Any]] = {}


class Pool:
    """Worker processes that run functions: ``multiprocessing.Pool``, with workers of this package.

    Whatever happens to a worker costs the task that ran there, and no other: that one raises WorkerLost. Functions and
    arguments may be lambdas, closures, classes of ``__main__``. Nothing outlives the program, however it ends.

    Args:
        processes: How many workers; None means one a usable core. They start with the first tasks, or at once if there
            is an initializer.
        initializer: Called with ``initargs`` in each worker before its first task.
        initargs: Its arguments. Locks, queues, shared values and open files may be among them: then the workers are
            forked from this program, with the dangers that has in a program with threads.
        maxtasksperchild: A worker is replaced after so many tasks, a chunk of a map counting as one.
        context: A context of multiprocessing, or None. With start method 'fork' workers are forked from this program
            as it is now; with others they are not.
        backend: None for workers of its own; 'current' for wherever ``cloud.call`` runs, 'mp', or 'simulator'. Jobs
            there share it with all others, so that there can be no initializer.

    Raises:
        ValueError: ``processes`` or ``maxtasksperchild`` is not positive, or no backend has this name.
        TypeError: ``initializer`` is not callable, ``processes`` no integer, ``context`` no context.

    Source: ``multiprocessing.pool.Pool`` of Python 3.11-3.13. New: ``backend``, ``jid`` of results.
    """

    _state = "INIT"

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        if processes is None:
            processes = usable_cores()
        elif isinstance(processes, bool) or not isinstance(processes, int):
            raise TypeError(f"processes must be an integer, not {processes!r}")
        if processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._processes = processes
        self._options = JobOptions()
        self._options.restartable, self._options.reports_late = False, True
        self._exact = maxtasksperchild is not None
        self._own = backend in (None, "simulator")
        if backend is None:
            self._cloud = current.open_pool(
                processes,
                initializer=initializer,
                initargs=tuple(initargs),
                max_jobs_per_worker=maxtasksperchild or 0,
                fork=_start_method(context) == "fork",
            )
            # Opened at once: what the workers inherit is what there is now.
            self._cloud.backend  # noqa: B018
        else:
            self._cloud = _shared_cloud(backend, processes)
            self._options.kill_process = _check_shared(initializer, maxtasksperchild)
        self._reset()
        self._state = _RUN
        _pools.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self.handler = _Handler()
        self._open: set[Any] = set()
        self._n_kept = _MIN_KEPT
        self._forgotten: deque[tuple[Backend, Jids]] = deque()

    # --- calls --------------------------------------------------------------------------------------------------------

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] = _NO_KEYWORDS) -> Any:
        """Run ``func(*args, **kwds)`` in a worker and return its value. Blocks. Errors as ``ApplyResult.get``."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = _NO_KEYWORDS,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> ApplyResult:
        """Run ``func(*args, **kwds)`` in a worker. Returns at once.

        Args:
            func: Any callable.
            args: Its arguments.
            kwds: Its keyword arguments.
            callback: Called with the value, on a thread of this pool, before the result is ready.
            error_callback: Called with the exception instead, if there is one.

        Raises:
            ValueError: The pool is not running.
        """
        self._check_running()
        result = ApplyResult(self, callback, error_callback)
        try:
            jid = self._cloud.submit(func, tuple(args), dict(kwds), self._options)
        except Exception as exc:
            result.fail(self._refusal(exc))
        else:
            self._began(result, (jid,))
        return result

    # --- maps ---------------------------------------------------------------------------------------------------------

    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """Run ``func(item)`` for each item; the values in order. Blocks until all have ended.

        Args:
            func: Any callable.
            iterable: Read to its end before the first task starts, unless it has a length.
            chunksize: Items that count as one task for ``maxtasksperchild``. How items travel is not its business:
                they are grouped by how long they run.

        Raises:
            ValueError: The pool is not running, or ``chunksize`` is less than 1.
            Exception: What a task raised, of the first item in order that did; or what the iterable raised.
        """
        values: list[Any] = self.map_async(func, iterable, chunksize).get()
        return values

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult:
        """As ``map``, without waiting; callbacks as for ``apply_async``."""
        return self._map(func, iterable, chunksize, callback, error_callback, tuples=False)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """As ``map``, each item being the arguments of one call."""
        values: list[Any] = self.starmap_async(func, iterable, chunksize).get()
        return values

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult:
        """As ``map_async``, each item being the arguments of one call."""
        return self._map(func, iterable, chunksize, callback, error_callback, tuples=True)

    def _map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callable[[list[Any]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
        *,
        tuples: bool,
    ) -> MapResult:
        self._check_running()
        if chunksize is not None:
            _check_chunksize(chunksize)
        items: Any = iterable if hasattr(iterable, "__len__") else list(iterable)
        result = MapResult(self, callback, error_callback)
        try:
            if chunksize is None:
                chunksize = max(1, -(-len(items) // (4 * self._processes)))
            if tuples:
                items = map(tuple, items)
            jids = self._submit_map(func, iter(items), chunksize, tuples=tuples)
        except Exception as exc:
            result.fail(self._refusal(exc))
        else:
            self._began(result, jids)
        return result

    def _submit_map(self, func: Callable[..., Any], items: Iterator[Any], chunksize: int, *, tuples: bool) -> range:
        writer = self._cloud.open_map(func, self._options)
        try:
            extend(writer, items, self._cloud.backend.namespace, chunksize if self._exact else 0, tuples=tuples)
            return writer.seal()
        except BaseException:
            writer.abandon()
            raise

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator:
        """Run ``func(item)`` for each item; an iterator over the values in order, each as soon as it is there.

        Returns at once. The iterable is read by a thread of its own, whether or not anybody asks for values.

        Args:
            func: Any callable.
            iterable: May be endless.
            chunksize: As for ``map``; when the iterable raises, the items of the chunk it was in are not run.

        Raises:
            ValueError: The pool is not running, or ``chunksize`` is less than 1.
        """
        results = IMapIterator(self)
        self._feed(results, func, iterable, chunksize)
        return results

    def imap_unordered(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1
    ) -> IMapUnorderedIterator:
        """As ``imap``, with the values in the order in which the tasks end."""
        results = IMapUnorderedIterator(self)
        self._feed(results, func, iterable, chunksize)
        return results

    def _feed(
        self,
        results: IMapIterator | IMapUnorderedIterator,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int,
    ) -> None:
        self._check_running()
        _check_chunksize(chunksize)
        results.feed = Feed(self._cloud, func, iterable, self._options, results, chunksize, exact=self._exact)
        self._keep(results)

    # --- keeping track ------------------------------------------------------------------------------------------------

    def _check_running(self) -> None:
        if self._state != _RUN:
            raise ValueError("Pool not running")

    def _refusal(self, error: Exception) -> Exception:
        if isinstance(error, BackendClosed) and self._state != _RUN:
            raise ValueError("Pool not running") from error
        return unsent_error(error)

    def _began(self, result: ApplyResult, jids: Jids) -> None:
        result.attach(self._cloud.backend, jids)
        self._keep(result)

    def _keep(self, result: Any) -> None:
        # Kept until it has ended: ``join`` waits for what nobody else remembers.
        self._open.add(result)
        if len(self._open) > self._n_kept or self._forgotten:
            self._tidy()

    def _tidy(self) -> None:
        with self._lock:
            if len(self._open) > self._n_kept:
                self._open.difference_update(self._ended())
                self._n_kept = max(_MIN_KEPT, 2 * len(self._open))
            while self._forgotten:
                self.delete(*self._forgotten.popleft())

    def _ended(self) -> list[Any]:
        """Open results that are ready. All single tasks are looked at in one go: each look takes a lock."""
        single: dict[int, ApplyResult] = {}
        ended = []
        for result in list(self._open):
            jid = result.jid_to_ask
            if jid:
                single[jid] = result
            elif result.ready():
                ended.append(result)
        try:
            codes = self._cloud.backend.statuses(list(single)) if single else b""
        except (JobNotFound, BackendClosed):
            return ended  # another thread settles some meanwhile; there will be another look
        return ended + [result for result, code in zip(single.values(), codes, strict=True) if code >= DONE]

    def settled(self, result: ApplyResult, backend: Backend, jids: Jids) -> None:
        """A result has its value: its jobs are needed no more."""
        self._open.discard(result)
        self.delete(backend, jids)

    def delete(self, backend: Backend, jids: Jids) -> None:
        """Forget jobs whose results were taken."""
        try:
            backend.delete(jids)
        except JobNotFound:
            pass  # the user deleted them

    def forgotten(self, backend: Backend, jids: Jids) -> None:
        """Results that nobody can ask for any more; their jobs are deleted with the next call of a method."""
        # The garbage collector calls this at any moment, also while this thread is inside the engine.
        self._forgotten.append((backend, jids))

    # --- ends ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more tasks. The workers end when all that were taken have ended."""
        if self._state == _RUN:
            self._state = _CLOSE
            self.submitted()

    def terminate(self) -> None:
        """End the workers now. Whoever waits for a task that has not ended gets BackendClosed."""
        if self._state in (_RUN, _CLOSE):
            self._state = _TERMINATE
            if self._own:
                self._cloud.close()
            error = BackendClosed("the pool was terminated before this task ended")
            for result in list(self._open):
                if not self._own:
                    result.cancel(self._cloud)
                result.give_up(error)
            self.handler.stop()

    def submitted(self) -> None:
        """An iterable was read to its end, or the pool was closed: once both are so, workers end as they become idle."""
        if self._state == _CLOSE and self._own and all(each.submitted for each in list(self._open)):
            with suppress(BackendClosed):
                self._cloud.backend.dismiss()

    def join(self) -> None:
        """Block until the workers have ended.

        Raises:
            ValueError: Neither ``close`` nor ``terminate`` was called.
            RuntimeError: Called by a callback of this pool: it would wait for itself.
        """
        if self._state == _RUN:
            raise ValueError("Pool is still running")
        if self._state not in (_CLOSE, _TERMINATE):
            raise ValueError("In unknown state")
        if self.handler.is_current():
            raise RuntimeError("a callback cannot join its own pool")
        for result in list(self._open):
            with suppress(BackendClosed):
                result.wait()
        if self._own:
            with suppress(BackendClosed):
                backend = self._cloud.backend
                backend.dismiss()
                backend.wait_for_workers()
            self._cloud.close()
        self.handler.stop()

    def __enter__(self) -> Self:
        self._check_running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.terminate()

    def __repr__(self) -> str:
        cls = type(self)
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={self._processes}>"

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __del__(self, _warn: Any = warnings.warn, _run: str = _RUN) -> None:
        if self._state == _run:
            _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)


class _Handler:
    """The thread that runs callbacks; it starts with the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, action: Callable[[], None]) -> None:
        """Do this next. Does not block."""
        self._queue.put(action)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="cloud-pool-callbacks", daemon=True)
                    self._thread.start()

    def is_current(self) -> bool:
        """True in a callback."""
        return self._thread is threading.current_thread()

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                action()
            except BaseException:  # noqa: BLE001 - a raising callback must stop neither the others nor this thread
                logger("Cloud.pool").exception("a callback of a pool raised")

    def stop(self) -> None:
        """End the thread after what is queued. Bounded: a callback that never returns is left behind."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(_STOP_S)


def _check_chunksize(chunksize: int) -> None:
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")


def _start_method(context: Any) -> str | None:
    if context is None:
        return None
    try:
        method: str = context.get_start_method()
    except AttributeError:
        raise TypeError(f"context must be a context of multiprocessing or None, not {context!r}") from None
    return method


def _shared_cloud(backend: str, processes: int) -> Cloud:
    if backend == "simulator":
        return current.open_simulator(processes)
    if backend in ("current", "mp"):
        return current.cloud() if backend == "current" else current.mp()
    raise ValueError(f"backend must be 'current', 'mp', 'simulator' or None, not {backend!r}")


def _check_shared(initializer: Any, maxtasksperchild: int | None) -> bool:
    """Whether each job is to be the last of its process."""
    if initializer is not None:
        raise UnsupportedOperation(
            "the workers of this backend run other jobs too: they cannot have an initializer",
            hint="Leave out backend=, or let the tasks themselves make what they need.",
        )
    if maxtasksperchild not in (None, 1):
        raise UnsupportedOperation(f"with backend=, maxtasksperchild can be 1 or None, not {maxtasksperchild!r}")
    return maxtasksperchild == 1


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _forked() -> None:
    # A child's pool has workers of its own; its parent's tasks are not its business.
    for pool in list(_pools):
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
