"""``Executor``: concurrent.futures', over the engine."""

from __future__ import annotations

import weakref
from concurrent import futures
from functools import partial

from cloud import current
from cloud.configuration import usable_cores
from cloud.pool.opening import open_workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from cloud.futures.future import Future
    from cloud.futures.work import Work
    from cloud.pool.placing import Place

__all__ = ["Executor"]


class Executor(futures.Executor):
    """Worker processes that run functions: ``concurrent.futures.ProcessPoolExecutor``, with workers of this package.

    Whatever happens to a worker costs the task that ran there, and no other: the executor is never broken. Functions
    and arguments may be lambdas, closures, classes of ``__main__``. Nothing outlives the program, however it ends.

    Args:
        max_workers: How many workers; None means one a usable core. They start with the first tasks, or all at once
            with the first if there is an initializer.
        mp_context: A context of multiprocessing, or None. With start method 'fork' workers are forked from this
            program as it is at the first task; with others they are not.
        initializer: Called with ``initargs`` in each worker before its first task. If it raises, the tasks of that
            worker raise InitializerFailed.
        initargs: Its arguments. Locks, queues, shared values and open files may be among them: then the workers are
            forked from this program, with the dangers that has in a program with threads.
        max_tasks_per_child: A worker is replaced after so many tasks, a chunk of a map counting as one.
        backend: None for workers of its own; 'current' for wherever ``cloud.call`` runs, 'mp', or 'simulator'. Jobs
            there share it with all others, so that ``max_workers`` is not heeded and there can be no initializer.

    Raises:
        ValueError: ``max_workers`` or ``max_tasks_per_child`` is not positive, or cannot be had with this context; no
            backend has this name.
        TypeError: ``initializer`` is not callable, a number no integer, ``mp_context`` no context.
        UnsupportedOperation: That backend cannot do what is asked for.

    Source: ``concurrent.futures.ProcessPoolExecutor`` of Python 3.11-3.14. New: ``backend``, and what Future says.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        max_tasks_per_child: int | None = None,
        backend: str | None = None,
    ) -> None:
        if max_workers is None:
            max_workers = usable_cores()
        elif isinstance(max_workers, bool) or not isinstance(max_workers, int):
            raise TypeError(f"max_workers must be an integer or None, not {max_workers!r}")
        if max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        start_method = _start_method(mp_context)
        _check_max_tasks(max_tasks_per_child, start_method)
        # Read by programs that ask an executor how much it can do at a time.
        self._max_workers = max_workers
        self._exact = max_tasks_per_child is not None
        # In a worker process of this package ``cloud.call`` reaches the engine that runs this job.
        self._watches_job = backend in ("current", "mp") and current.this_worker() is not None
        self._open_place: Callable[[], Place]
        if backend is None:
            open_cloud = partial(
                current.open_pool,
                max_workers,
                name="cloud.Executor",
                initializer=initializer,
                initargs=tuple(initargs),
                max_jobs_per_worker=max_tasks_per_child or 0,
            )
            self._open_place = partial(open_workers, open_cloud, start_method)
        else:
            from cloud.pool.placing import shared_place

            place = shared_place(backend, max_workers, initializer, max_tasks_per_child)
            self._open_place = lambda: place
        self._lock = current.process.lock
        self._work: Work | None = None
        self._shut_down = False

    def _opened(self) -> Work:
        work = self._work
        if work is None:
            with self._lock:
                work = self._work
                if work is None:
                    if self._shut_down:
                        raise RuntimeError("cannot schedule new futures after shutdown")
                    place = self._open_place()
                    # While its workers start:
                    from cloud.futures.watching import EngineWatch, JobWatch
                    from cloud.futures.work import Work

                    work = self._work = Work(place, JobWatch() if self._watches_job else EngineWatch())
                    # One that is forgotten ends its workers when they have nothing more to do.
                    weakref.finalize(self, work.close_later).atexit = False
        return work

    # --- submitting ---------------------------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args, **kwargs)`` in a worker. Returns at once.

        Function and arguments are pickled now: later changes do not reach the task. If that fails, the future says so.

        Raises:
            RuntimeError: The executor was shut down.
        """
        return (self._work or self._opened()).submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Run ``fn`` once for each item, or for one item of each iterable; an iterator over the values in order.

        Returns when the iterables are read to the end of the shortest. An iterator that ends early, because a task
        raised, time is up or it was closed, takes back the tasks that have not begun.

        Args:
            fn: Any callable.
            iterables: Any number.
            timeout: Seconds from now, for all values; None waits for ever.
            chunksize: Items that count as one task for ``max_tasks_per_child``. How items travel is not its business:
                they are grouped by how long they run.
            buffersize: How many tasks may be ahead of the values taken; the iterables are read as values are taken.
                None means all.

        Raises:
            ValueError: ``chunksize`` or ``buffersize`` is less than 1.
            RuntimeError: The executor was shut down.
            Exception: What an iterable raises. From ``next``: as ``Future.result``.
        """
        # Loaded here: a program without maps need not pay for it.
        from cloud.futures.mapping import MapResults, buffered, results_of
        from cloud.pool.feeding import Feed

        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None:
            if not isinstance(buffersize, int):
                raise TypeError("buffersize must be an integer or None")
            if buffersize < 1:
                raise ValueError("buffersize must be None or > 0")
            return buffered(partial(self.submit, fn), zip(*iterables, strict=False), buffersize, timeout)
        single = len(iterables) == 1
        items: list[Any] | range
        if single:
            items = iterables[0] if type(iterables[0]) is range else list(iterables[0])
        else:
            items = list(zip(*iterables, strict=False))
        work = self._opened()
        results = MapResults(work)
        with work.gate:
            work.check_open()
            work.begin(results)
            results.feed = Feed(work.place, fn, items, results, chunksize, exact=self._exact, tuples=not single)
        return results_of(results, timeout)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; the workers end when those taken have ended.

        Args:
            wait: Block until then.
            cancel_futures: Cancel the tasks that have not begun.
        """
        with self._lock:
            self._shut_down = True
            work = self._work
        if work is None:
            return
        work.closing = True
        if cancel_futures:
            work.cancel_pending()
        if wait:
            work.close()
        else:
            work.close_later()

    def kill(self, futures: Iterable[Future[Any]]) -> None:
        """End these tasks, as ``Future.kill`` does, all at once. Blocks until they have ended."""
        if self._work is not None:
            self._work.kill(futures)

    def kill_workers(self) -> None:
        """Take no more tasks and end the workers now. Tasks that have not begun are cancelled; those that run fail.

        Their futures raise ``BackendClosed``, which is a ``BrokenProcessPool`` too, or JobKilled on a shared backend.
        """
        with self._lock:
            self._shut_down = True
            work = self._work
        if work is not None:
            work.end()

    terminate_workers = kill_workers

    def __reduce__(self) -> Any:
        raise TypeError("executors cannot be passed between processes or pickled")


def _start_method(context: Any) -> str | None:
    if context is None:
        return None
    try:
        method: str = context.get_start_method()
    except AttributeError:
        raise TypeError(f"mp_context must be a context of multiprocessing or None, not {context!r}") from None
    return method


def _check_max_tasks(n: Any, start_method: str | None) -> None:
    if n is None:
        return
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if n <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")
    if start_method == "fork":
        raise ValueError("max_tasks_per_child cannot be had with the start method 'fork'; give another mp_context")
