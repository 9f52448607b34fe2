"""joblib's backend 'cloud'.

::

    Parallel ──► CloudBackend ──submit──► Executor(n_jobs), kept for the next Parallel
                 in a task:   ──submit──► Executor(backend="current"): the workers that run the task
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from joblib import cpu_count  # type: ignore[import-untyped]
from joblib.parallel import (  # type: ignore[import-untyped]
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from cloud.futures import Executor
from cloud.futures.watching import in_job
from cloud.joblib._arrays import SharedArrays

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.futures import Future


class KeptWorkers:
    """The workers of the last Parallel: they have imported what the next one needs."""

    def __init__(self) -> None:
        self._executor: Executor | None = None
        self._key: Any = None
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def get(self, n_jobs: int, environment: dict[str, str]) -> Executor:
        """An executor with so many workers, which have these environment variables before they import anything."""
        key = (n_jobs, environment)
        with self._lock:
            if self._executor is None or self._key != key:
                if self._executor is not None:
                    # Another thread may have tasks there: they go on.
                    self._executor.shutdown(wait=False)
                self._executor = Executor(n_jobs, initializer=_set_environment, initargs=(environment,))
                self._key = key
            return self._executor

    def shutdown(self) -> None:
        """End them when their tasks have ended. Blocks."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._executor = None


kept = KeptWorkers()


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _run(batch: Any) -> Any:
    return batch()


class CloudBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches on worker processes of this package.

    Source: ``joblib.parallel.ParallelBackendBase`` of joblib 1.3-1.6.
    """

    default_n_jobs = -1
    supports_inner_max_num_threads = True
    supports_retrieve_callback = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.parallel: Any = None
        self._executor: Executor | None = None
        self._arrays = SharedArrays(None, None)
        self._futures: set[Future[Any]] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many tasks may run at a time; negative numbers count down from all cores."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(cpu_count() + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Get the workers for one ``Parallel``; how many tasks they run at a time."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        options = {**self.backend_kwargs, **options}
        self.parallel = parallel
        self._arrays = SharedArrays(options.get("max_nbytes"), options.get("mmap_mode"))
        if in_job():
            # Its slot is free while a task waits for its own tasks: however deep, no more run at a time.
            self._executor = Executor(n_jobs, backend="current")
        else:
            self._executor = kept.get(n_jobs, self._prepare_worker_env(n_jobs))
        return n_jobs

    def submit(self, func: Any, callback: Callable[[Any], None] | None = None) -> Future[Any]:
        """Begin a batch of calls; ``callback`` gets its future when it has ended."""
        assert self._executor is not None
        future = self._executor.submit(_run, self._arrays.share(func))
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    # Of releases before 1.5.
    apply_async = submit

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """The values of a batch that has ended, or what it raised."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the batches of this Parallel, running or not; those of others go on."""
        futures = list(self._futures)
        if self._executor is not None:
            self._executor.kill(futures)
        self._futures.difference_update(futures)

    def terminate(self) -> None:
        """A Parallel is over: the workers are kept, its arrays are not."""
        self._arrays.close()
        if self._executor is not None and in_job():
            self._executor.shutdown(wait=False)
        self._executor = None
        self.reset_batch_stats()

    def get_nested_backend(self) -> tuple[ParallelBackendBase, int | None]:
        """What a Parallel in a task uses: the same workers if it asks for several jobs, else its own process."""
        return CloudBackend(nesting_level=(self.nesting_level or 0) + 1), 1

    def __reduce__(self) -> Any:
        return _rebuild, (self.nesting_level, self.inner_max_num_threads)


def _rebuild(nesting_level: int | None, inner_max_num_threads: int | None) -> CloudBackend:
    return CloudBackend(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
