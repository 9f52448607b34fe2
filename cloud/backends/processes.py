"""The local backend over worker processes: ``cloud.mp``."""

from __future__ import annotations

from collections.abc import Callable

from cloud.backends.ahead import preload_now
from cloud.backends.local import LocalBackend
from cloud.backends.requests import Requests
from cloud.configuration import Settings, usable_cores
from cloud.engine.clock import RealClock
from cloud.engine.engine import Engine
from cloud.engine.executor.processes import ProcessExecutor
from cloud.engine.executor.template import TemplateProcess
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.serialization.shared import get_memory_ahead


def open_processes(
    settings: Settings, *, jids: Callable[[], JidSource], template: TemplateProcess | None = None
) -> LocalBackend:
    """Worker processes of this machine, as the settings say.

    Args:
        settings: Those.
        jids: Gives what numbers the jobs.
        template: Already started; else the first job starts one.
    """
    executor = ProcessExecutor(
        settings.num_procs or usable_cores(),
        capture=settings.redirect_job_output,
        output_limit_bytes=settings.output_limit_bytes,
        grace_s=settings.kill_grace_s,
        max_transmit_bytes=settings.max_transmit_data,
        preload=preload_now(),
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
    get_memory_ahead()
    return backend
