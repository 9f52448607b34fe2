"""The backends that the conformance suite runs on, as data: a new one is one more line here."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final

import psutil

from cloud.configuration import usable_cores
from cloud.errors import CloudException
from tests.server.running import RunningServer


def _mp() -> ModuleType:
    import cloud.mp

    return cloud.mp


def _simulator() -> ModuleType:
    import cloud

    cloud.start_simulator(force_restart=True)
    return cloud


_SERVERS: dict[tuple[str, ...], RunningServer] = {}
_FOLDERS: list[Path] = []
_MEMORY: Final = Path("/dev/shm")
_SERVER_OPTIONS: Final = {
    "CLOUD_OUTPUT_LIMIT_BYTES": "--output-limit",
    "CLOUD_KILL_GRACE_S": "--kill-grace",
    "CLOUD_MAX_NESTING": "--max-nesting",
    "CLOUD_MAX_TRANSMIT_DATA": "--max-result",
}


def server_for_settings() -> RunningServer:
    """A server that was started with what the environment asks of it; one is shared by all tests that ask the same."""
    given = [(option, os.environ[name]) for name, option in _SERVER_OPTIONS.items() if name in os.environ]
    options = tuple(word for pair in given for word in pair)
    if options not in _SERVERS:
        # Slots enough for any test; what each has is a quota of its workgroup.
        _SERVERS[options] = RunningServer(_folder() / "data", "--workers", "64", "--idle", "2", *options).start()
    return _SERVERS[options]


def _folder() -> Path:
    """A folder for a server's data. In memory where there is plenty: nobody reads again what these tests leave there.

    Each test's workgroup gets the modules of all tests, 80,000 files in a run.
    """
    for folder in () if _FOLDERS else _MEMORY.glob("server-tests-*"):
        if not psutil.pid_exists(int(folder.name.split("-")[2])):
            shutil.rmtree(folder, ignore_errors=True)  # its run was killed
    plenty = _MEMORY.is_dir() and min(psutil.virtual_memory().available, psutil.disk_usage(str(_MEMORY)).free) > 8 << 30
    _FOLDERS.append(Path(tempfile.mkdtemp(prefix=f"server-tests-{os.getpid()}-", dir=_MEMORY if plenty else None)))
    return _FOLDERS[-1]


def stop_servers() -> None:
    """End all of them, whatever jobs tests left there."""
    while _SERVERS:
        _SERVERS.popitem()[1].kill(group=True)
    while _FOLDERS:
        shutil.rmtree(_FOLDERS.pop(), ignore_errors=True)


def new_credentials() -> tuple[int, str, str]:
    """Those of a workgroup of its own, whose first job is number 1."""
    server = server_for_settings()
    slots = int(os.environ.get("CLOUD_NUM_PROCS", "0")) or usable_cores()
    return (*server.new_group(max_slots=slots), server.url)


def _http() -> ModuleType:
    import cloud
    from cloud import current

    # Made at the first use: a test sets its settings before that, and after it asked for the namespace.
    current.process.credentials = cache(new_credentials)  # type: ignore[method-assign]
    return cloud


OPENERS: Final[dict[str, Callable[[], ModuleType]]] = {"mp": _mp, "simulator": _simulator, "http": _http}
"""By name, what makes the backend current and returns the namespace whose verbs use it."""

BACKENDS: Final = tuple(OPENERS)


def close_all() -> None:
    """Close whatever `cloud` and `cloud.mp` run on, and choose nothing: as in a program that has just begun."""
    current = sys.modules.get("cloud.current")
    if hasattr(current, "process"):
        if "credentials" in vars(current.process) and current.process.cloud.opened:
            # A server's jobs would run on, and take the slots of the next test.
            with contextlib.suppress(CloudException):  # a test may have closed it
                current.process.cloud.backend.cancel(None)
        vars(current.process).pop("credentials", None)
        current.process._committed(None)


def forget_settings() -> None:
    """Make the next use read the environment and the configuration file again."""
    current = sys.modules.get("cloud.current")
    if hasattr(current, "process"):
        current.process.config._draft.clear()
        vars(current.process.config).pop("_settings", None)
