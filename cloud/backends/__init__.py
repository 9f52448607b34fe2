"""Where jobs are kept and run, behind one contract: here, on a virtual clock, on a server, or around the job we are."""

from __future__ import annotations

import os
import sys

from cloud.logs import configure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.backends.base import Backend


def open_backend(name: str, settings: Any, **options: Any) -> Backend:
    """Make a backend: 'mp' (worker processes), 'pool' (the same for one pool), 'simulator', 'http', 'worker' (around).

    Raises:
        ValueError: No backend has this name.
    """
    configure(settings)
    # Each is loaded when used: none should cost those who use another.
    if name in ("mp", "pool"):
        if not (hasattr(os, "fork") and hasattr(os, "posix_spawn")):
            from cloud.errors import UnsupportedOperation

            raise UnsupportedOperation(
                f"worker processes are not supported on {sys.platform}",
                hint="Call cloud.start_simulator() to run jobs in this process, or use a server.",
            )
        from cloud.backends.ahead import TemplateAhead

        if name == "pool":
            with TemplateAhead(wanted=not options["fork"]) as template:
                from cloud.backends.pools import open_pool

                return open_pool(settings, template=template, **options)
        with TemplateAhead() as template:
            from cloud.backends.processes import open_processes

            return _reporting(open_processes(settings, template=template, **options), settings, "Multiprocessing")
    if name == "simulator":
        from cloud.backends.simulator import open_simulator

        backend = open_simulator(settings, **options)
        return _reporting(backend, settings, "Simulation", forced=settings.force_serialize_logging)
    if name == "http":
        from cloud.backends.http import open_http

        return _reporting(open_http(settings, **options), settings, "HTTP")
    if name == "worker":
        from cloud.backends.worker import WorkerBackend

        return WorkerBackend(**options)
    raise ValueError(f"no backend is called {name!r}; there are 'mp', 'pool', 'simulator', 'http' and 'worker'")


def _reporting(backend: Backend, settings: Any, kind: str, *, forced: bool = False) -> Backend:
    if forced or settings.serialize_logging:
        from cloud.datalogs import DataLog

        backend.datalog = DataLog(settings, kind)
    return backend
