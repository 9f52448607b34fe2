"""``Pool``: multiprocessing's, over the engine."""

from __future__ import annotations

import os
import warnings
from _weakrefset import WeakSet

from cloud import current
from cloud.configuration import usable_cores
from cloud.pool.opening import open_workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, Final, Self

    from cloud.backends.base import Backend
    from cloud.client.cloud import Cloud
    from cloud.pool.placing import Place
    from cloud.pool.rest import (
        ApplyResult,
        BackendClosed,
        CallbackThread,
        Feed,
        IMapIterator,
        IMapUnorderedIterator,
        Ledger,
        MapResult,
        extend,
        shared_place,
        suppress,
        unsent_error,
    )

__all__ = ["Pool"]

_RUN: Final = "RUN"
_CLOSE: Final = "CLOSE"
_TERMINATE: Final = "TERMINATE"
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
        self._exact = maxtasksperchild is not None
        self._place: Place
        if backend is None:
            given = tuple(initargs)

            def open_cloud(*, fork: bool) -> Cloud:
                return current.open_pool(
                    processes,
                    initializer=initializer,
                    initargs=given,
                    max_jobs_per_worker=maxtasksperchild or 0,
                    fork=fork,
                )

            self._place = open_workers(open_cloud, _start_method(context))
            _load_rest()
        else:
            _load_rest()
            self._place = shared_place(backend, processes, initializer, maxtasksperchild)
        self.callbacks = CallbackThread()
        self.ledger = Ledger()
        self._state = _RUN
        _pools.add(self)

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
            result.begin(*self._place.submit(func, tuple(args), dict(kwds)))
        except Exception as exc:  # noqa: BLE001 - for whoever asks for the result
            result.fail(self._refusal(exc))
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
            result.begin(*self._submit_map(func, items, chunksize, tuples=tuples))
        except Exception as exc:  # noqa: BLE001 - for whoever asks for the result
            result.fail(self._refusal(exc))
        return result

    def _submit_map(
        self, func: Callable[..., Any], items: Iterable[Any], chunksize: int, *, tuples: bool
    ) -> tuple[Backend, range]:
        backend, function = self._place.pickled(func)
        writer = self._place.open_map(backend, function)
        try:
            extend(writer, items, backend.namespace, chunksize if self._exact else 0, tuples=tuples)
            return backend, writer.seal()
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
        results.feed = Feed(self._place, func, iterable, results, chunksize, exact=self._exact)
        self.ledger.add(results)

    def _check_running(self) -> None:
        if self._state != _RUN:
            raise ValueError("Pool not running")

    def _refusal(self, error: Exception) -> Exception:
        if isinstance(error, BackendClosed) and self._state != _RUN:
            raise ValueError("Pool not running") from error
        return unsent_error(error)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more tasks. The workers end when all that were taken have ended."""
        if self._state == _RUN:
            self._state = _CLOSE
            self.submitted()

    def submitted(self) -> None:
        """An iterable was read to its end, or the pool closed; when both are so, workers end as they become idle."""
        if self._state == _CLOSE and all(each.submitted for each in self.ledger.open()):
            self._place.dismiss()

    def terminate(self) -> None:
        """End the workers now. Whoever waits for a task that has not ended gets BackendClosed."""
        if self._state in (_RUN, _CLOSE):
            self._state = _TERMINATE
            results = self.ledger.open()
            for result in results:
                result.secure()
                if self._place.shared:
                    result.cancel(self._place.cloud)
            self._place.close()
            error = BackendClosed("the pool was terminated before this task ended")
            for result in results:
                result.give_up(error)
            self.callbacks.stop()

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
        if self.callbacks.is_current():
            raise RuntimeError("a callback cannot join its own pool")
        for result in self.ledger.open():
            with suppress(BackendClosed):
                result.wait()
                result.secure()
        self._place.dismiss()
        self._place.wait_for_workers()
        self._place.close()
        self.callbacks.stop()

    def reset(self) -> None:
        """In a forked child: the tasks are the parent's, and so are the threads."""
        self.callbacks = CallbackThread()
        self.ledger = Ledger()
        self._place.reset()

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


def _load_rest() -> None:
    """Give this module the names that its methods use."""
    from cloud.pool import rest

    globals().update({name: getattr(rest, name) for name in rest.__all__})


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


_pools: WeakSet[Pool] = WeakSet()


def _forked() -> None:
    for pool in list(_pools):
        pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
