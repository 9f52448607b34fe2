"""A job's surroundings: import path, current directory, environment, signal handlers, logging level.

A job sees those of its submission. What it changes is put back before the next job.
"""

from __future__ import annotations

import os
import sys

from cloud.engine.signals import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def snapshot() -> tuple[Any, ...]:
    """The surroundings of this process now: what a submission sends along.

    Returns:
        (sys.path, current directory or "" if it was removed, environment as bytes, root logging level or None). In a
        server's worker, whose own surroundings all its jobs have, (None, "", {}, root logging level).
    """
    if _KEPT_TO:
        return None, "", {}, log_level()
    return sys.path[:], current_directory(), dict(raw_environ()), log_level()


def unchanged_since(before: tuple[Any, ...]) -> bool:
    """True when ``snapshot()`` would equal an earlier one; made to be asked for every submission."""
    path, cwd, environ, level = before
    try:
        # As raw_environ and log_level have it, without calling them: this takes a sixth of a small call as it is.
        logging = sys.modules.get("logging")
        return bool(
            sys.path == path
            and os.environ._data == environ  # type: ignore[attr-defined]
            and os.getcwd() == cwd
            and (level is None if logging is None else logging.root.level == level)
        )
    except (AttributeError, OSError):
        return snapshot() == before


def raw_environ() -> Any:
    """The environment as bytes; not a copy."""
    # os.environ decodes every value at every look; the dict behind it can be compared as it is.
    return getattr(os.environ, "_data", None) or dict(os.environb)


def current_directory() -> str:
    """The current directory; "" if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def log_level() -> int | None:
    """That of the root logger, if logging is imported."""
    # Another thread may just be importing it.
    root = getattr(sys.modules.get("logging"), "root", None)
    return None if root is None else root.level


def thread_defaults(n_cores: int, n_slots: int) -> dict[str, str]:
    """Thread counts for numeric libraries, unless the user's environment sets them."""
    threads = str(max(1, n_cores // max(1, n_slots)))
    return dict.fromkeys(_THREAD_VARIABLES, threads)


_KEPT_TO: Final[list[Surroundings]] = []
"""Of a worker that keeps to its own surroundings."""


def are_own() -> bool:
    """True in a server's worker, whose own surroundings all its jobs have."""
    return bool(_KEPT_TO)


class Surroundings:
    """Applies and restores surroundings in a worker process.

    Args:
        dirty: A one-item list; set to True by any change that ``restore`` would undo.
        defaults: Environment variables set where a submission's environment lacks them.
        own: Jobs see this process's import path, directory and environment, not those of their submission.
        forked: The program's own functions are here: what they were given before leaves no notes.
    """

    def __init__(self, dirty: list[bool], defaults: dict[str, str], *, own: bool = False, forked: bool = False) -> None:
        self._dirty = dirty
        self._forked = forked
        self._variables = os.environ
        self._defaults = _as_bytes(defaults)
        self.path: list[str] = sys.path[:]
        self._cwd = ""
        self._environ: dict[bytes, bytes] = dict(raw_environ())
        self._changed = False
        self._handlers: dict[int, Any] = {}
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._set_mask = signal.pthread_sigmask
        self._set_timer = signal.setitimer
        self._signals_changed = False
        self._kept_environ: dict[bytes, bytes | None] | None = None
        self._kept_path: tuple[list[str], bool] = [], False
        self._kept_cwd = ""
        self._own = (self.path, current_directory(), self._environ)
        if own:
            self._cwd = self._own[1]
            _KEPT_TO[:] = [self]
        self._watch()

    def _watch(self) -> None:
        # A look at directory, environment and handlers after each job, or each that prints, would cost more than a
        # small job does: the calls that change them leave a note instead.
        dirty = self._dirty

        def note() -> None:
            self._changed = dirty[0] = True

        def noting(function: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                note()
                return function(*args, **kwargs)

            wrapper.__name__ = wrapper.__qualname__ = function.__name__
            wrapper.__doc__ = function.__doc__
            wrapper.__module__ = function.__module__
            return wrapper

        for name in ("chdir", "fchdir", "putenv", "unsetenv"):
            # In both modules: a builtin that is itself the job's function was pickled as posix.chdir.
            wrapper = noting(getattr(os, name))
            setattr(os, name, wrapper)
            setattr(sys.modules[os.name], name, wrapper)
        for name in ("pthread_sigmask", "alarm", "setitimer"):
            function = getattr(signal, name)
            wrapper = noting(function)
            setattr(signal, name, wrapper)
            if getattr(sys.modules.get("signal"), name, None) is function:
                setattr(sys.modules["signal"], name, wrapper)  # else it calls what stands here
        set_handler = signal.signal

        def noting_signal(signalnum: Any, handler: Any) -> Any:
            note()
            before = set_handler(signalnum, handler)
            self._handlers.setdefault(int(signalnum), before)
            return before

        signal.signal = noting_signal
        self._set_handler = set_handler
        os.register_at_fork(after_in_child=lambda: dirty.__setitem__(0, True))

    def apply(self, surroundings: tuple[Any, ...], extras: dict[str, str] | None = None) -> None:
        """Take over the surroundings of a submission; only its logging level, where jobs see the worker's own.

        Args:
            surroundings: As from ``snapshot``; with None as the path, the worker's own are meant.
            extras: Environment variables besides.

        Raises:
            OSError: The directory cannot be entered; the rest is applied.
        """
        path, cwd, environ, level = surroundings
        if path is None or _KEPT_TO:
            path, cwd, environ = self._own
        environ = {**self._defaults, **environ, **_as_bytes(extras or {})}
        if self._kept_environ is not None:
            kept = {**environ, **self._kept_environ}
            environ = {name: value for name, value in kept.items() if value is not None}
            new, first = self._kept_path
            path = [*new, *path] if first else [*path, *new]
            cwd = self._kept_cwd or cwd
        self.path = path
        if sys.path != path:
            sys.path[:] = path
            # What importlib.invalidate_caches does for these; since Python 3.12 it first loads importlib.metadata.
            for finder in sys.path_importer_cache.values():
                if finder is not None and hasattr(finder, "invalidate_caches"):
                    finder.invalidate_caches()
            sys.path_importer_cache.clear()
        self._environ = environ
        self._restore_environ()
        if level is not None:
            _log_to_stderr(level)
        if cwd and cwd != self._cwd:
            self._cwd = ""
            os.chdir(cwd)
            self._cwd = cwd

    def keep(self) -> None:
        """What was changed since ``apply`` stays, for this worker's life: an initializer did it."""
        before, now = self._environ, dict(raw_environ())
        if os.environ is not self._variables:
            now = _as_bytes(dict(os.environ))  # what it put in the place of ours
        self._kept_environ = {name: now.get(name) for name in {*before, *now} if before.get(name) != now.get(name)}
        new = [each for each in sys.path if each not in self.path]
        self._kept_path = new, bool(new) and sys.path[0] in new
        cwd = current_directory()
        self._kept_cwd = cwd if cwd != self._cwd else ""
        self.path, self._environ, self._cwd = sys.path[:], now, cwd
        self._restore_environ()
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._handlers.clear()
        self._changed = self._dirty[0] = False

    def restore(self) -> None:
        """Undo what a job changed."""
        if sys.path != self.path:
            sys.path[:] = self.path
        if not (self._changed or self._forked or os.environ is not self._variables):
            return
        moved = bool(self._cwd) and current_directory() != self._cwd
        if moved:
            try:
                os.chdir(self._cwd)
                moved = False
            except OSError:
                pass  # removed meanwhile; perhaps it is there again after the next job
        self._restore_environ()
        self._set_mask(signal.SIG_SETMASK, self._blocked)
        # An alarm left over would end the worker in the middle of another job.
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            self._set_timer(timer, 0)
        while self._handlers:
            number, handler = self._handlers.popitem()
            if handler is not None:
                self._set_handler(number, handler)
        self._changed = moved  # here: what puts things back leaves notes, too

    def _restore_environ(self) -> None:
        if os.environ is not self._variables:
            os.environ = self._variables  # noqa: B003 - a job put something else there
        now, wanted = raw_environ(), self._environ
        if now == wanted:
            return
        for name in [name for name in now if name not in wanted]:
            del os.environb[name]
        for name, value in wanted.items():
            if now.get(name) != value:
                os.environb[name] = value


def _as_bytes(environ: dict[str, str]) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}


def _log_to_stderr(level: int) -> None:
    import logging

    root = logging.root
    if root.level != level:
        root.setLevel(level)
    if not root.handlers:
        # Resolves sys.stderr at each record, as the job's stream is replaced between jobs.
        class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
            @property
            def stream(self) -> Any:
                return sys.stderr

            @stream.setter
            def stream(self, value: Any) -> None:
                pass

        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(levelname)s:%(name)s:%(message)s"))
        root.addHandler(handler)
