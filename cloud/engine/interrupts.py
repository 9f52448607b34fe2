"""Holds signal handlers back while the main thread changes the engine's state.

Python runs a handler between any two instructions of the main thread, and a handler may raise: Ctrl-C does, so do
many timeouts made of SIGALRM. One that raised between the two halves of an event would lose a job for ever. While
handlers are held back the first only leaves a note; they run, and may raise, when the change is whole.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident, get_native_id

from cloud.engine.signals import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

_get_handler: Final = signal.getsignal
_set_handler: Final = signal.signal

_NAMES: Final = (
    "SIGINT SIGTERM SIGALRM SIGUSR1 SIGUSR2 SIGHUP SIGQUIT SIGVTALRM SIGPROF SIGCHLD SIGCONT SIGTSTP SIGWINCH SIGIO"
)
_NUMBERS: Final = tuple(int(getattr(signal, name)) for name in _NAMES.split() if hasattr(signal, name))


def _main_ident() -> int | None:
    # Where threads have numbers like those of processes, no more is needed than what is loaded already.
    if "threading" not in sys.modules and get_native_id() == os.getpid():
        return get_ident()
    import threading

    return threading.main_thread().ident


_MAIN_IDENT: Final = [_main_ident()]


def forget_main_thread() -> None:
    """After a fork in a thread, that thread is the child's main thread; ``threading`` may not know it yet."""
    _MAIN_IDENT[0] = get_ident()


class Handlers:
    """The program's signal handlers; ``with handlers:`` holds them back. Reentrant; no effect in other threads.

    Attributes:
        wake: Called when a handler is held back, to end what the main thread sleeps in.
    """

    __slots__ = ("_custom", "_depth", "_held", "_pending", "_seen", "wake")

    def __init__(self) -> None:
        self._depth = 0
        self._seen: tuple[Any, ...] = ()
        self._custom: list[tuple[int, Any]] = []
        self._held: list[tuple[int, Any]] = []
        self._pending: list[tuple[int, Any]] = []
        self.wake: Callable[[], None] | None = None

    def __enter__(self) -> None:
        if get_ident() != _MAIN_IDENT[0]:
            return
        if not self._depth:
            held = self._held
            try:
                # Most often they are as they were the last time: comparing is cheaper than sorting them out.
                now = tuple(map(_get_handler, _NUMBERS))
                if now != self._seen:
                    # Neither a default, which is an int, nor something that C code has set.
                    self._custom = [each for each in zip(_NUMBERS, now, strict=True) if callable(each[1])]
                    self._seen = now
                for each in self._custom:
                    held.append(each)
                    _set_handler(each[0], self._note)
            except BaseException:
                # A handler that is not yet held back has raised.
                self._restore()
                raise
        self._depth += 1

    def __exit__(self, *exc_info: object) -> None:
        if get_ident() != _MAIN_IDENT[0]:
            return
        self._depth -= 1
        if not self._depth:
            try:
                self._restore()
            finally:
                if self._pending:
                    self._run_pending()

    @property
    def waiting(self) -> bool:
        """True when a handler of this thread is held back now."""
        return bool(self._pending) and get_ident() == _MAIN_IDENT[0]

    def wake_by(self, wake: Callable[[], None] | None) -> None:
        """Set ``wake``, in the main thread."""
        if get_ident() == _MAIN_IDENT[0]:
            self.wake = wake

    def abandon(self) -> None:
        """In a forked child: the thread that holds handlers back may not exist here."""
        self._depth = 0
        self._pending.clear()
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        for held, handler in self._held:
            if held == number and (number, handler) not in self._pending:
                self._pending.append((number, handler))
        if self.wake is not None:
            self.wake()

    def _restore(self) -> None:
        held = self._held
        try:
            while held:
                number, handler = held[-1]
                _set_handler(number, handler)
                held.pop()
        finally:
            # A handler just restored may have raised already.
            if held:
                self._restore()

    def _run_pending(self) -> None:
        number, handler = self._pending.pop(0)
        try:
            handler(number, sys._getframe(2))
        finally:
            if self._pending:
                self._run_pending()


class Changing:
    """``with changing:`` holds the engine's lock, and signal handlers back. Reentrant."""

    __slots__ = ("_handlers", "_lock")

    def __init__(self, lock: Any, handlers: Handlers) -> None:
        self._lock = lock
        self._handlers = handlers

    def __enter__(self) -> None:
        self._handlers.__enter__()
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()
        self._handlers.__exit__()
