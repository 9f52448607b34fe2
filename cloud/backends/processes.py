"""The local backend over worker processes: ``cloud.mp``."""

from __future__ import annotations

from collections.abc import Callable

from cloud.configuration import Settings, usable_cores
from cloud.engine.executor.template import TemplateProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloud.backends.local import LocalBackend
    from cloud.engine.store.memory import JidSource

PRELOAD = ("json", "logging", "cloudpickle", "cloud.backends.worker", "cloud.current")
"""What jobs that submit jobs need."""


def open_processes(settings: Settings, *, jids: Callable[[], JidSource]) -> LocalBackend:
    """Worker processes of this machine, as the settings say; ``jids`` gives what numbers their jobs."""
    try:
        template = TemplateProcess(PRELOAD)
    except OSError:
        template = None  # what is in the way may be gone when the first job comes, which is told otherwise
    try:
        return _open(settings, jids, template)
    except BaseException:
        if template is not None:
            template.end()
        raise


def _open(settings: Settings, jids: Callable[[], JidSource], template: TemplateProcess | None) -> LocalBackend:
    # Here: the template starts meanwhile, and takes as long.
    from cloud.backends.local import LocalBackend
    from cloud.backends.requests import Requests
    from cloud.engine.clock import RealClock
    from cloud.engine.engine import Engine
    from cloud.engine.executor.processes import ProcessExecutor
    from cloud.engine.store.memory import MemoryStore

    executor = ProcessExecutor(
        settings.num_procs or usable_cores(),
        capture=settings.redirect_job_output,
        output_limit_bytes=settings.output_limit_bytes,
        grace_s=settings.kill_grace_s,
        max_transmit_bytes=settings.max_transmit_data,
        preload=PRELOAD,
        template=template,
    )
    engine = Engine(
        MemoryStore(jids()),
        executor,
        RealClock(),
        max_nesting=settings.max_nesting,
        max_kept=settings.mp_cache_size_limit,
    )
    backend = LocalBackend("mp", engine, "multiprocessing")
    engine.serve_requests(Requests(backend))
    return backend
