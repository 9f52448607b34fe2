"""The local backend over worker processes of its own: for one pool or executor."""

from __future__ import annotations

from collections.abc import Callable

from cloud.backends.ahead import preload_now
from cloud.backends.local import LocalBackend
from cloud.backends.requests import Requests
from cloud.configuration import Settings
from cloud.engine.clock import RealClock
from cloud.engine.engine import Engine
from cloud.engine.executor.pooled import PooledProcesses
from cloud.engine.executor.template import TemplateProcess
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.engine.worker.pooled import Inherited
from cloud.serialization import pickling
from cloud.serialization.namespace import CopiedNamespace, Namespace
from cloud.serialization.shared import get_memory_ahead

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_DISMISS_S: Final = 6.0


class PoolBackend(LocalBackend):
    """Worker processes of one pool.

    Args:
        engine: Over ``workers``.
        workers: Its executor.
        namespace: Given when the workers are forked from this process.
    """

    namespace: Namespace | None = None

    def __init__(self, engine: Engine, workers: PooledProcesses, namespace: Namespace | None) -> None:
        super().__init__("pool", engine, "multiprocessing")
        self._workers = workers
        self.namespace = namespace

    @property
    def surroundings(self) -> tuple[int, bytes]:
        """(id, pickled) of this process's surroundings as they are now."""
        return self._contexts.current()

    def dismiss(self) -> None:
        # In good order: their queues hand over what they hold, and processes they started with multiprocessing end.
        with self.engine.lock:
            if not self.engine.closed:
                self._workers.dismiss()

    def wait_for_workers(self) -> None:
        self.engine.wait_until(lambda: not self._workers.n_workers, _DISMISS_S)


def open_pool(
    settings: Settings,
    n: int,
    *,
    jids: Callable[[], JidSource],
    initializer: Callable[..., Any] | None,
    initargs: tuple[Any, ...],
    max_jobs_per_worker: int,
    capture: bool,
    fork: bool,
    template: TemplateProcess | None = None,
) -> PoolBackend:
    """Worker processes of a pool; with an initializer they start at once. See ``current.open_pool``."""
    payload: bytes | None = None
    if initializer is not None and not fork:
        try:
            payload = pickling.dumps((initializer, initargs), share=True)
        except Exception:  # noqa: BLE001 - whatever refuses to be pickled, inheritance hands it on
            fork = True
            if template is not None:
                template.end()
                template = None
    namespace = CopiedNamespace() if fork else None
    workers = PooledProcesses(
        n,
        initializer=payload,
        inherited=Inherited(initializer, initargs) if fork else None,
        max_tasks=max_jobs_per_worker,
        capture=capture,
        output_limit_bytes=settings.output_limit_bytes,
        grace_s=settings.kill_grace_s,
        preload=preload_now(),
        template=template,
    )
    engine = Engine(MemoryStore(jids()), workers, RealClock(), max_nesting=settings.max_nesting)
    backend = PoolBackend(engine, workers, namespace)
    engine.serve_requests(Requests(backend))
    get_memory_ahead()
    if initializer is not None:
        with engine.lock:
            workers.start(backend.surroundings)
    return backend
