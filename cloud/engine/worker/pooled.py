"""What a worker of a pool does beside running jobs: its initializer, its name in multiprocessing, a good end.

Used by ``main`` alone. Only programs that have loaded multiprocessing make their workers load it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from cloud.errors import InitializerFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Inherited:
    """What a worker that is forked from the program itself has from it.

    Attributes:
        initializer: Called with ``initargs`` before the first job; may be None.
        initargs: May hold what only inheritance can hand on: locks, queues, open files.
    """

    def __init__(self, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]) -> None:
        self.initializer = initializer
        self.initargs = initargs


class Initialization:
    """How the initializer ended. Every job asks ``check`` first."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    def run(self, load: Callable[[], tuple[Callable[..., Any] | None, tuple[Any, ...]]]) -> None:
        """Rebuild the initializer and call it. Raises nothing: what it raises is kept for the jobs."""
        try:
            function, args = load()
            if function is not None:
                function(*args)
        except BaseException as exc:  # noqa: BLE001 - whatever the user's code raises, the jobs must tell
            self._failure = exc

    def check(self) -> None:
        """Raise InitializerFailed, from what the initializer raised, if it did."""
        failure = self._failure
        if failure is not None:
            what = f"{type(failure).__name__}: {failure}"
            raise InitializerFailed(f"the pool's initializer raised in this worker process ({what})") from failure


def become_process(number: int, program_pid: int, authkey: bytes) -> None:
    """Be a process of multiprocessing: with a name, a parent, and the key that managers and listeners ask for."""
    from multiprocessing import process

    state: Any = process
    me = state.BaseProcess(name=f"CloudPoolWorker-{number}")
    me._identity = (number,)
    me._parent_pid = program_pid
    state._current_process = me
    state._children = set()
    me.authkey = authkey
    if hasattr(os, "pidfd_open"):
        # Ready when the program has ended, as the parent's sentinel is to be. If it has, so will this worker.
        state._parent_process = state._ParentProcess("MainProcess", program_pid, os.pidfd_open(program_pid))
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        # What it registers to be done after a fork and at exit is the program's, if we are forked from it.
        util._finalizer_registry.clear()
        util._run_after_forkers()


def use_tracker(fd: int) -> None:
    """Report shared memory to the program's own tracker.

    With one of its own this worker would have, at its end, everything removed that it had only looked at.
    """
    from multiprocessing import resource_tracker

    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is None:
        tracker._fd = fd
    else:
        os.close(fd)


def leave() -> None:
    """What a process of multiprocessing does before it ends: its queues hand over what they hold, its children end."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        try:
            util._exit_function()
        except Exception:  # noqa: BLE001 - a finalizer of the user's; the worker ends all the same
            sys.excepthook(*sys.exc_info())
