"""Functions that tests submit as jobs, importable by workers."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn


def nothing() -> None:
    """Return None."""


def identity(value: Any) -> Any:
    """Return the argument as it arrived."""
    return value


def random_bytes(n: int, seed: int) -> bytes:
    """Return ``n`` bytes that no compression makes smaller, the same for the same seed."""
    return random.Random(seed).randbytes(n)


def square(x: Any) -> Any:
    """Return ``x * x``."""
    return x * x


def add(a: Any, b: Any = 1) -> Any:
    """Return ``a + b``."""
    return a + b


def keywords(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments as they arrived."""
    return args, kwargs


def total(values: Iterable[float]) -> float:
    """Return the sum of ``values``."""
    return sum(values)


def boom(message: str = "boom") -> NoReturn:
    """Raise ``ValueError(message)``."""
    raise ValueError(message)


def boom_if(condition: object, value: Any = None) -> Any:
    """Raise ``ValueError('boom')`` if ``condition`` is true, else return ``value``."""
    if condition:
        boom()
    return value


def chained() -> NoReturn:
    """Raise a RuntimeError with a note, caused by a KeyError."""
    try:
        {}["missing"]
    except KeyError as exc:
        error = RuntimeError("outer")
        error.add_note("a note")
        raise error from exc


def grouped() -> NoReturn:
    """Raise a group of a ValueError and a TypeError."""
    raise ExceptionGroup("several", [ValueError("one"), TypeError("two")])


def sleep_then(seconds: float, value: Any = None) -> Any:
    """Sleep, then return ``value``."""
    time.sleep(seconds)
    return value


def exit_hard(code: int = 3) -> NoReturn:
    """End the worker process at once, as a crash would."""
    os._exit(code)


def exit_soft(code: int = 3) -> NoReturn:
    """Raise SystemExit, as a script's end would."""
    sys.exit(code)


def interrupt() -> NoReturn:
    """Raise KeyboardInterrupt."""
    raise KeyboardInterrupt


def die_by(signum: int = signal.SIGKILL) -> None:
    """Send the worker process a signal."""
    os.kill(os.getpid(), signum)


def print_both(out: str, err: str) -> None:
    """Write a line to standard output and one to standard error."""
    print(out)
    print(err, file=sys.stderr)


def write_descriptors(out: bytes, err: bytes) -> None:
    """Write below Python, as C code and child programs do."""
    os.write(1, out)
    os.write(2, err)


def unpicklable_result() -> Any:
    """Return what cannot become bytes."""
    return threading.Lock()


class CannotPickle(Exception):
    """An exception that carries what cannot become bytes."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class CannotRebuild(Exception):
    """An exception whose bytes cannot become it again: its constructor wants two arguments, it keeps one."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class CannotUnpickle:
    """A value that becomes bytes, and fails when they are read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return boom, ("while unpickling",)


def raise_unpicklable() -> NoReturn:
    """Raise an exception that cannot become bytes."""
    raise CannotPickle("cannot be pickled")


def raise_unrebuildable() -> NoReturn:
    """Raise an exception that cannot come back from bytes."""
    raise CannotRebuild("cannot be rebuilt", 7)


def ununpicklable_result() -> Any:
    """Return what cannot come back from bytes."""
    return CannotUnpickle()


def big(n_bytes: int) -> bytes:
    """Return that many bytes."""
    return b"x" * n_bytes


def size(data: bytes) -> int:
    """Return the length of ``data``."""
    return len(data)


def cpu(seconds: float) -> int:
    """Compute for that much processor time of this thread; return the number of rounds."""
    end = time.thread_time() + seconds
    rounds = 0
    while time.thread_time() < end:
        math.factorial(50)
        rounds += 1
    return rounds


def recurse(depth: int) -> int:
    """Recurse ``depth`` calls deep; return the depth reached."""
    return 0 if depth <= 0 else 1 + recurse(depth - 1)


def nested(depth: int) -> int:
    """Submit a job that submits a job, ``depth`` deep, each waiting for its child; return the depth reached."""
    import cloud

    return 0 if depth <= 0 else 1 + cloud.result(cloud.call(nested, depth - 1))


def worker_pid() -> int:
    """Return the id of the process that runs the job."""
    return os.getpid()


def cwd() -> str:
    """Return the current directory."""
    return os.getcwd()


def getenv(name: str) -> str | None:
    """Return an environment variable."""
    return os.environ.get(name)


def touch(path: str, text: str = "") -> None:
    """Append a line to a file: a mark that outlives the job."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def touch_and_sleep(path: str, seconds: float) -> None:
    """Append a line to a file, then sleep: tells a test that the job has begun."""
    touch(path, str(os.getpid()))
    time.sleep(seconds)


def cleanup_after(path: str, seconds: float) -> None:
    """Sleep; append 'cleaned' to a file however the sleep ends."""
    try:
        touch(path, "started")
        time.sleep(seconds)
    finally:
        touch(path, "cleaned")


def ignore_sigterm(path: str, seconds: float) -> None:
    """Ignore SIGTERM and swallow whatever is raised, for that long: the job that will not be killed politely."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    touch(path, str(os.getpid()))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except BaseException:
            continue
