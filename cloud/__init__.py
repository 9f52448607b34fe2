"""Run any Python function somewhere else: on the cores of this machine, in a simulation, on a server.

::

    import cloud

    jid = cloud.call(lambda: 3 * 3)   # a job; returns at once
    cloud.result(jid)                 # 9

Importing this package loads nothing else, starts nothing and touches no file; the rest comes with the first use.
"""

from __future__ import annotations

TYPE_CHECKING = False

__version__ = "0.1.0"

if TYPE_CHECKING:
    from typing import Any

    from cloud import (
        account,
        cron,
        errors,
        files,
        mp,
        pool,
        pool_interface,
        simulator,
        wait_for,
    )
    from cloud.configuration import CloudConfig
    from cloud.current import process as _process
    from cloud.errors import CloudException, CloudTimeoutError
    from cloud.futures import Executor
    from cloud.verbs import getconfigpath, is_simulated, running_on_cloud, setkey, start_simulator

    config: CloudConfig
    finished_statuses: list[str]

    aresult = _process.cloud.aresult
    call = _process.cloud.call
    close = _process.cloud.close
    connection_info = _process.cloud.connection_info
    delete = _process.cloud.delete
    find = _process.cloud.find
    info = _process.cloud.info
    iresult = _process.cloud.iresult
    iresult_unordered = _process.cloud.iresult_unordered
    join = _process.cloud.join
    kill = _process.cloud.kill
    map = _process.cloud.map
    progress = _process.cloud.progress
    result = _process.cloud.result
    starmap = _process.cloud.starmap
    status = _process.cloud.status

__all__ = [
    "CloudException",
    "CloudTimeoutError",
    "Executor",
    "__version__",
    "account",
    "aresult",
    "call",
    "close",
    "config",
    "connection_info",
    "cron",
    "delete",
    "errors",
    "files",
    "find",
    "finished_statuses",
    "getconfigpath",
    "info",
    "iresult",
    "iresult_unordered",
    "is_simulated",
    "join",
    "kill",
    "map",
    "mp",
    "pool",
    "pool_interface",
    "progress",
    "result",
    "running_on_cloud",
    "setkey",
    "simulator",
    "starmap",
    "start_simulator",
    "status",
    "wait_for",
]

_VERBS = frozenset(
    (
        "aresult",
        "call",
        "close",
        "connection_info",
        "delete",
        "find",
        "info",
        "iresult",
        "iresult_unordered",
        "join",
        "kill",
        "map",
        "progress",
        "result",
        "starmap",
        "status",
    )
)
_FACES = frozenset(("account", "cron", "errors", "files", "mp", "pool", "pool_interface", "simulator", "wait_for"))
_SWITCHES = frozenset(("getconfigpath", "is_simulated", "running_on_cloud", "setkey", "start_simulator"))


def __getattr__(name: str) -> Any:
    # Resolved once, then kept as an ordinary global: from then on a verb costs no look-up here.
    if name in _VERBS:
        from cloud import current

        value = getattr(current.process.cloud, name)
    elif name in _FACES:
        import importlib

        return importlib.import_module(f"cloud.{name}")
    elif name in _SWITCHES:
        from cloud import verbs

        value = getattr(verbs, name)
    elif name in ("CloudException", "CloudTimeoutError"):
        from cloud import errors

        value = getattr(errors, name)
    elif name == "Executor":
        from cloud.futures import Executor

        value = Executor
    elif name == "config":
        from cloud import current

        value = current.process.config
    elif name == "finished_statuses":
        from cloud.jobs import FINISHED_LABELS

        value = FINISHED_LABELS
    else:
        raise AttributeError(f"module 'cloud' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
