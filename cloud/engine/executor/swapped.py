"""Gives simulated jobs directories, environments and import paths of their own, in a process that has one of each.

A job's stand in for the program's while it has the turn. Meanwhile the program's own threads go on: what they submit
has the program's surroundings, and what they change they change between two turns.

::

    take turn ──► enter: the job's in place ──► the job runs ──► leave: the program's in place ──► end of the turn
                                                                             └── os.chdir, os.environ[…] = …
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from cloud.engine.worker.surroundings import current_directory, raw_environ, snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_MAX_WAIT_S: Final = 1.0
"""How long a change by the program waits for the end of a turn; a job that never hands over must not stop it."""

# In both modules: a builtin that is itself a job's function was pickled as posix.chdir.
_REAL: Final = {
    (owner, name): getattr(owner, name)
    for owner, names in (
        (os, ("chdir", "fchdir")),
        (sys.modules[os.name], ("chdir", "fchdir")),
        (type(os.environ), ("__setitem__", "__delitem__")),
    )
    for name in names
    if hasattr(owner, name)
}
_set_variable: Final = type(os.environ).__setitem__
_delete_variable: Final = type(os.environ).__delitem__
_chdir: Final = os.chdir


class _Here(threading.local):
    in_job: bool = False


_here = _Here()


class _Locks:
    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """In a forked child, where the holders are gone."""
        #: Held while a job has the turn.
        self.turn = threading.Lock()
        #: Held while surroundings are put in place.
        self.swapping = threading.Lock()


_locks = _Locks()
_program: list[tuple[Any, ...]] = []  #: the program's surroundings, while a job's stand in for them
_installing = threading.Lock()
_n_installed = [0]


class Swapped:
    """Surroundings that stand in for the process's own while a simulated job has its turn.

    What the job changes is kept for its next turn, and never seen by others.

    Args:
        context: Of the job's submission; see ``snapshot``.
        env_vars: Environment variables on top of it.
    """

    def __init__(self, context: tuple[Any, ...], env_vars: dict[str, str]) -> None:
        path, cwd, environ, _ = context
        extra = {os.fsencode(name): os.fsencode(value) for name, value in env_vars.items()}
        self._job: tuple[Any, ...] = (path, cwd, {**environ, **extra}, None)
        self._inside = False

    def enter(self) -> None:
        """Put the job's surroundings in place. Raises OSError if its directory cannot be entered."""
        with _locks.swapping:
            self._inside = True
            _program.append(snapshot())
            _put(self._job)

    def leave(self) -> None:
        """Put back those there were. Idempotent."""
        with _locks.swapping:
            if self._inside:
                self._inside = False
                self._job = snapshot()
                _put(_program[-1])
                _program.pop()


def enter_job() -> None:
    """From now on this thread's surroundings are those of the jobs it runs."""
    _here.in_job = True


@contextmanager
def turn() -> Iterator[None]:
    """While a job has the turn."""
    if _here.in_job:  # of a simulation inside a job of another
        yield
        return
    # Not for ever: the job that has the turn may wait for a job of this simulation.
    taken = _locks.turn.acquire(timeout=_MAX_WAIT_S)
    try:
        yield
    finally:
        if taken:
            _locks.turn.release()


def program_snapshot() -> tuple[Any, ...]:
    """As ``snapshot``; of the program while a job has the turn, unless asked by the job."""
    if _here.in_job:
        return snapshot()
    with _locks.swapping:
        return _program[0] if _program else snapshot()


def install() -> None:
    """Let changes by the program wait for the end of a turn, until as many calls of ``uninstall``."""
    with _installing:
        _n_installed[0] += 1
        if _n_installed[0] == 1:
            for (owner, name), function in _REAL.items():
                setattr(owner, name, _between_turns(function))


def uninstall() -> None:
    """Put the functions back."""
    with _installing:
        _n_installed[0] -= 1
        if not _n_installed[0]:
            for (owner, name), function in _REAL.items():
                setattr(owner, name, function)


def _between_turns(function: Callable[..., Any]) -> Callable[..., Any]:
    def change(*args: Any, **kwargs: Any) -> Any:
        if _here.in_job:
            return function(*args, **kwargs)
        turn = _locks.turn
        if turn.acquire(timeout=_MAX_WAIT_S):
            try:
                return function(*args, **kwargs)
            finally:
                turn.release()
        with _locks.swapping:
            job = snapshot()
            changed = function(*args, **kwargs)
            if _program:
                _program[0] = _with_changes(_program[0], job, snapshot())
            return changed

    return wraps(function)(change)


def _with_changes(program: tuple[Any, ...], before: tuple[Any, ...], after: tuple[Any, ...]) -> tuple[Any, ...]:
    path, cwd, environ, level = program
    environ = {name: value for name, value in environ.items() if name in after[2] or name not in before[2]}
    environ |= {name: value for name, value in after[2].items() if before[2].get(name) != value}
    return path, cwd if after[1] == before[1] else after[1], environ, level


def _put(surroundings: tuple[Any, ...]) -> None:
    path, cwd, environ, _ = surroundings
    if sys.path != path:
        sys.path[:] = path
    now = raw_environ()
    if now != environ:
        for name in [name for name in now if name not in environ]:
            _delete_variable(os.environ, os.fsdecode(name))
        for name, value in environ.items():
            if now.get(name) != value:
                _set_variable(os.environ, os.fsdecode(name), os.fsdecode(value))
    if cwd and cwd != current_directory():
        _chdir(cwd)


def _forked() -> None:
    _locks.renew()
    _program.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
