"""What the pools of these tests run. Light to import: each worker does."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from os import chdir
from typing import Any

from tests.integration.jobs import note

STATE: list[Any] = []


def square(x: int) -> int:
    return x * x


def pid_after_a_while(_: Any = None) -> int:
    time.sleep(0.05)
    return os.getpid()


def go_to_and_tell(folder: str) -> None:
    chdir(folder)
    print(f"now in {folder}")


def start_all(pool: Any, n: int) -> None:
    """See that all workers of a pool have started: later, they would be taken for leaks of the test that runs then."""
    while len(set(pool.map(pid_after_a_while, range(2 * n), 1))) < n:
        pass


def describe(*args: Any, **kwargs: Any) -> str:
    return f"{args} {sorted(kwargs.items())}"


def pair(x: Any) -> tuple[Any, Any]:
    return x, x


def fail_if_odd(x: int) -> int:
    if x % 2:
        raise KeyError(x, "odd")
    return x


def slow_if_zero(x: int) -> int:
    if x == 0:
        time.sleep(0.2)
    return x


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def pid_of(_: Any) -> int:
    return os.getpid()


def items_then_error(n: int) -> Iterator[int]:
    yield from range(n)
    raise LookupError("the iterable ends badly")


class BadlyMade(Exception):
    """Pickles, and cannot be rebuilt."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_badly_made() -> None:
    raise BadlyMade(1, 2)


class Treacherous:
    """Can be pickled, and not rebuilt."""

    def __reduce__(self) -> Any:
        return raise_this, (OSError("cannot be rebuilt"),)


def treacherous_if_one(x: int) -> Any:
    return Treacherous() if x == 1 else x


def end_if_three(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def crash(task: Any) -> None:
    """Without the report that a forked worker makes when the program has asked for reports."""
    faulthandler.disable()
    task()


def ignore_signals(witness: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    note(witness, "pid", os.getpid())
    while True:
        time.sleep(1)


class Chained(Exception):
    """Has more than arguments."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.when = 42


def raise_chained() -> None:
    try:
        raise OSError(5, "first")
    except OSError as exc:
        raise Chained("second") from exc


def raise_this(error: BaseException) -> None:
    raise error


# --- initializers -----------------------------------------------------------------------------------------------------


def remember(*values: Any) -> None:
    STATE[:] = values


def remembered(*_: Any) -> tuple[int, list[Any]]:
    return os.getpid(), STATE


def remember_and_note(witness: str, *values: Any) -> None:
    STATE[:] = values
    note(witness, "init", os.getpid())


def settle_in(folder: str) -> None:
    """Change all that surrounds the jobs of a worker."""
    os.chdir(folder)
    os.environ["SETTLED"] = "yes"
    os.environ.pop("UNWANTED", None)
    sys.path.insert(0, folder)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def surroundings(disturb: bool) -> tuple[Any, ...]:
    seen = (
        os.getcwd(),
        os.environ.get("SETTLED"),
        os.environ.get("UNWANTED"),
        sys.path[0],
        signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN,
    )
    if disturb:
        os.chdir("/")
        os.environ["SETTLED"] = "no"
        sys.path[:] = []
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    return seen


def refuse() -> None:
    raise ValueError("this initializer always fails")


def add_to_shared(n: int) -> None:
    value = STATE[0]
    with value.get_lock():
        value.value += n


def put_on_shared(item: Any) -> None:
    STATE[0].put(item)


# --- for executors ----------------------------------------------------------------------------------------------------


class Plain:
    """An object that can be pickled and referred to weakly."""


class CountsPickles:
    """A function that knows how often it was pickled."""

    def __init__(self) -> None:
        self.n_pickled = 0

    def __call__(self, item: int) -> int:
        return item

    def __reduce__(self) -> Any:
        self.n_pickled += 1
        return CountsPickles, ()


def _interrupt_once(value: Any) -> Any:
    if REBUILT.count(value) == 0:
        REBUILT.append(value)
        raise KeyboardInterrupt
    return value


REBUILT: list[Any] = []


class InterruptsOnce:
    """Rebuilt, it is ``value``; the first attempt of a process is interrupted."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return _interrupt_once, (self.value,)


def _rebuild_slowly(seconds: float) -> Any:
    time.sleep(seconds)
    return Plain()


class RebuiltSlowly:
    """Rebuilding it takes so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> Any:
        return _rebuild_slowly, (self.seconds,)


def make_object(_: Any) -> Plain:
    return Plain()


def note_pair(pair: tuple[str, int]) -> int:
    note(pair[0], pair[1])
    return pair[1]


class Leaving:
    """Can be pickled; ends the program that rebuilds it, if that lets it."""

    def __reduce__(self) -> Any:
        return raise_this, (SystemExit(4),)
