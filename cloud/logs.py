"""The messages of this package: the logger 'Cloud' and those below it, as the settings say.

Owns how ``save_log``, ``log_filename``, ``log_level`` and ``print_log_level`` are carried out; what is worth a message
is the business of whoever logs. Nothing imports `logging` before there is a message, or a setting that asks for it:
that import costs every program 10 ms.

::

    logger("Cloud.x").error(…) ──► 'Cloud' ─┬─► stderr, from print_log_level on, unless the program configured logging
                                            ├─► the program's own handlers, as if the message had propagated
                                            └─► log_filename, from log_level on, with save_log
"""

from __future__ import annotations

import os
import sys
import time
from _thread import RLock

from cloud.configuration import Settings, home_path, load_settings
from cloud.settings import SETTINGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from typing import Final

__all__ = ["LogFile", "configure", "logger"]

_ROOT: Final = "Cloud"
_HANDLER: Final = "cloud.logs"
_FORMAT: Final = "[%(asctime)s] - [%(levelname)s] - %(name)s: %(message)s"
#: Lower than any level that a program would set: tells ours from one of the program's.
_ALL: Final = 1
_MAX_BYTES: Final = 512 * 1024
_N_OLD: Final = 7


def logger(name: str = _ROOT) -> logging.Logger:
    """Return the logger of that name, 'Cloud' or below it, set up for the settings in force.

    Ask anew for each message: a commit may have changed the settings. Thread-safe. Never raises: settings that
    cannot be read count as the defaults.

    Source: PiCloud client 2.1.1, names, format and file of its log.
    """
    import logging

    _log.ensure()
    return logging.getLogger(name)


def configure(settings: Settings | None) -> None:
    """Make these the settings in force; None has them read anew when there is a message.

    Sets the logger up at once if a setting asks for more than errors on stderr, or if the program uses `logging`:
    then there may be messages that do not come through `logger`. Creates no file.
    """
    _log.configure(settings)


class LogFile:
    """A log that any number of processes append to, as a stream for a logging handler.

    No descriptor stays open between messages, so that a forked child shares none. Each message is one write to the
    end of the file. A file that would grow too large becomes ``path.1``, that one ``path.2``, and so on.

    Args:
        path: The file; its folder is made with it. Both are for their owner only.
        max_bytes: Size from which on the file is put aside.
        n_old: How many of those put aside are kept.
    """

    def __init__(self, path: str, *, max_bytes: int = _MAX_BYTES, n_old: int = _N_OLD) -> None:
        # Not when the first file is full: a child forked by another thread in the middle of an import waits for ever
        # for that module.
        import filelock

        self._filelock = filelock
        self.path = path
        self._max_bytes = max_bytes
        self._n_old = n_old
        self._failed = False

    def write(self, text: str) -> None:
        """Append one message. A failure is reported once, on the other ways that messages take, and never raised."""
        content = text.encode("utf-8", "backslashreplace")
        try:
            if not self._append(content, only_if_room=True):
                self._rotate(len(content))
                self._append(content, only_if_room=False)
            self._failed = False
        except OSError as exc:
            if not self._failed:
                self._failed = True
                logger().error("the log file %s cannot be written: %s", self.path, exc.strerror)

    def flush(self) -> None:
        """Nothing: a message is handed to the system as it is written."""

    def _append(self, content: bytes, *, only_if_room: bool) -> bool:
        descriptor = self._open()
        try:
            size = os.fstat(descriptor).st_size
            if only_if_room and size and size + len(content) > self._max_bytes:
                return False
            while content:
                content = content[os.write(descriptor, content) :]
            return True
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            return os.open(self.path, flags, 0o600)

    def _rotate(self, n_bytes: int) -> None:
        lock = self._filelock.FileLock(f"{self.path}.lock", timeout=0, mode=0o600)
        try:
            lock.acquire()
        except self._filelock.Timeout:
            return  # Another process is at it. Whichever file we meet now, our message is appended to it whole.
        try:
            if os.path.getsize(self.path) + n_bytes <= self._max_bytes:
                return  # another process was faster
            for number in range(self._n_old - 1, 0, -1):
                if os.path.exists(f"{self.path}.{number}"):
                    os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
            os.replace(self.path, f"{self.path}.1")
        except FileNotFoundError:
            pass  # somebody removed the file: there is room again
        finally:
            lock.release()


class _Stderr:
    """Standard error as it is at each message: programs and tests replace ``sys.stderr``."""

    def write(self, text: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(text)

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()


class _Log:
    """What is set up on the logger 'Cloud', and for which settings."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._settings: Settings | None = None
        self._handlers: list[logging.Handler] = []
        self._sees_all = False
        self._level_before = 0

    def configure(self, settings: Settings | None) -> None:
        with self._lock:
            self._take_down()
            self._settings = settings
            if settings is not None and (_asks_for_more(settings) or "logging" in sys.modules):
                self._set_up(settings)

    def ensure(self) -> None:
        with self._lock:
            if self._handlers:
                return
            if self._settings is None:
                from cloud.errors import CloudException

                try:
                    self._settings = load_settings()
                except CloudException:
                    self._settings = Settings()
            self._set_up(self._settings)

    def forked(self) -> None:
        # Its owner may be a thread that does not exist here.
        self._lock = RLock()

    def _set_up(self, settings: Settings) -> None:
        import logging

        formatter = logging.Formatter(_FORMAT)
        formatter.converter = time.gmtime
        formatter.default_time_format, formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"
        console = logging.StreamHandler(_Stderr())
        console.setLevel(settings.print_log_level)
        console.addFilter(lambda record: not logging.root.handlers)
        self._handlers = [console]
        if settings.save_log:
            file = logging.StreamHandler(LogFile(home_path(settings.log_filename)))
            file.setLevel(settings.log_level)
            self._handlers.append(file)
        cloud = logging.getLogger(_ROOT)
        if _asks_for_more(settings):
            # Our handlers must see every message. Propagation would show them to the program's, whatever its level.
            self._handlers.append(self._program_handler())
            self._sees_all = True
            self._level_before = cloud.level
            cloud.setLevel(_ALL)
            cloud.propagate = False
        for handler in [handler for handler in cloud.handlers if handler.name == _HANDLER]:
            cloud.removeHandler(handler)  # of this module loaded another time
        for handler in self._handlers:
            handler.set_name(_HANDLER)
            handler.setFormatter(formatter)
            cloud.addHandler(handler)

    def _take_down(self) -> None:
        if not self._handlers:
            return
        import logging

        cloud = logging.getLogger(_ROOT)
        for handler in self._handlers:
            cloud.removeHandler(handler)
            handler.close()
        self._handlers = []
        if self._sees_all:
            self._sees_all = False
            cloud.propagate = True
            if cloud.level == _ALL:  # the program may have set another since
                cloud.setLevel(self._level_before)

    def _program_handler(self) -> logging.Handler:
        import logging

        log = self

        class _Program(logging.Handler):
            """Hands messages to the handlers of the root logger, if it would have seen them by propagation."""

            def emit(self, record: logging.LogRecord) -> None:
                if record.levelno >= log._program_level(record.name):
                    # Test runners put theirs on both loggers.
                    given = logging.getLogger(_ROOT).handlers
                    for handler in logging.root.handlers:
                        if handler not in given and record.levelno >= handler.level:
                            handler.handle(record)

        return _Program()

    def _program_level(self, name: str) -> int:
        """The level in force for a logger, had 'Cloud' the level that the program gave it."""
        import logging

        found: logging.Logger | None = logging.getLogger(name)
        while found is not None:
            level = found.level
            if found.name == _ROOT and level == _ALL:
                level = self._level_before
            if level:
                return level
            found = found.parent
        return 0


def _asks_for_more(settings: Settings) -> bool:
    return settings.save_log or settings.print_log_level != SETTINGS["print_log_level"].default


_log: Final = _Log()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_log.forked)
