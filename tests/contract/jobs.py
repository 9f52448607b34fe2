"""Jobs of the conformance suite, and the files through which a test and its jobs tell each other where they stand.

Workers import this module: it imports nothing that costs time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TICK_S = 0.005


def eventually(predicate: Callable[[], Any], timeout: float = 10.0) -> Any:
    """The first true value of ``predicate()``; fails the test when none comes in ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"did not come true within {timeout} s: {predicate}"
        time.sleep(TICK_S)
    return value


class Gate:
    """Holds jobs in the middle until the test lets them go.

    Args:
        folder: Where it keeps its files.
    """

    def __init__(self, folder: Path) -> None:
        self._begun = str(folder / "begun")
        self._opened = str(folder / "opened")

    def hold(self, value: Any = None) -> Any:
        """The job: note that it has begun, wait for the gate to open, return ``value``."""
        note(self._begun, str(os.getpid()))
        while not os.path.exists(self._opened):
            time.sleep(TICK_S)
        return value

    def hold_then_note(self, path: str) -> None:
        """The job: hold; note in ``path`` whether it was let go or killed."""
        try:
            self.hold()
            note(path, "let go")
        except BaseException as exc:
            note(path, type(exc).__name__)
            raise

    def await_begun(self, n: int = 1) -> list[int]:
        """Wait until ``n`` jobs have begun; the process of each."""
        eventually(lambda: len(notes(self._begun)) >= n)
        return [int(each) for each in notes(self._begun)]

    @property
    def n_begun(self) -> int:
        """Jobs that have begun to hold."""
        return len(notes(self._begun))

    def open(self) -> None:
        """Let all jobs go, those that come later too."""
        Path(self._opened).touch()


def note(path: str, text: str = "") -> None:
    """Append a line to a file, in one write."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def notes(path: str) -> list[str]:
    """The lines noted so far."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def fail_first(path: str, n: int, value: Any = None) -> Any:
    """Fail with ``ValueError('attempt k')`` the first ``n`` times; the file counts."""
    note(path)
    attempt = len(notes(path))
    if attempt <= n:
        raise ValueError(f"attempt {attempt}")
    return value


def raise_this(error: BaseException) -> None:
    """Raise the argument."""
    raise error


def returns(value: Any) -> Any:
    """Return the argument."""
    return value


def append(values: list[Any], value: Any) -> list[Any]:
    """Append to the argument in place; return it."""
    values.append(value)
    return values


def change_and_fail_first(record: dict[str, Any]) -> list[str]:
    """Change the argument in place, and fail the first time; what it holds otherwise."""
    record["seen"].append("here")
    note(record["log"])
    if len(notes(record["log"])) == 1:
        raise ValueError("attempt 1")
    seen: list[str] = record["seen"]
    return seen


class Living:
    """Counts how many of them there are."""

    n = 0

    def __init__(self) -> None:
        Living.n += 1

    def __del__(self) -> None:
        Living.n -= 1


def n_living(record: dict[str, Any]) -> int:
    """Put a ``Living`` into the argument; how many there are then."""
    record["living"] = Living()
    return Living.n


class Tally:
    """Counts, and remembers what."""

    def __init__(self) -> None:
        self.total = 0
        self.seen: list[Any] = []

    def count(self, value: Any, *, by: int = 1) -> tuple[int, list[Any]]:
        """The total, and all that was counted."""
        self.total += by
        self.seen.append(value)
        return self.total, self.seen


def two(a: Any, b: Any) -> tuple[Any, Any]:
    """Return both arguments."""
    return a, b


def needs_one(x: int, *, k: int = 0) -> int:
    """Take one positional argument."""
    return x + k


def show(text: str, value: Any = None) -> Any:
    """Print a line; return ``value``."""
    print(text)
    return value


def show_many(n: int) -> None:
    """Write ``n`` numbered lines."""
    for index in range(n):
        sys.stdout.write(f"{index:07d}\n")


def with_reserved_parameters(_label: Any = "default", _priority: Any = "default", _mine: Any = "default") -> Any:
    """Return what arrived under the names of options."""
    return _label, _priority, _mine


class Point:
    """A value with methods of every kind."""

    def __init__(self, x: int, y: int = 0) -> None:
        self.x = x
        self.y = y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Point({self.x}, {self.y})"

    def __call__(self, n: int) -> int:
        return self.x * n

    def scaled(self, n: int) -> Point:
        """A bound method."""
        return Point(self.x * n, self.y * n)

    @classmethod
    def origin(cls) -> Point:
        """A class method."""
        return cls(0)

    @staticmethod
    def norm(x: int, y: int) -> int:
        """A static method."""
        return x * x + y * y


class FailsToLoad:
    """Becomes bytes; nothing comes back from them."""

    def __init__(self, message: str = "cannot be loaded") -> None:
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return fail_to_load, (self.message,)

    def __call__(self) -> None:
        """A job that never runs: its function cannot be rebuilt."""


def fail_to_load(message: str) -> None:
    """What unpickling of ``FailsToLoad`` comes to."""
    raise ValueError(message)


class FailsToDump:
    """Nothing becomes bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise ValueError("cannot be dumped")


class NotesDumps:
    """Notes each time it is asked for its bytes; then it waits, holds, or fails."""

    def __init__(self, path: str, *, seconds: float = 0.0, gate: Gate | None = None, fails: bool = False) -> None:
        self.path = path
        self.seconds = seconds
        self.gate = gate
        self.fails = fails

    def __reduce__(self) -> tuple[Any, ...]:
        note(self.path, "asked")
        time.sleep(self.seconds)
        if self.gate is not None:
            self.gate.hold_then_note(self.path)
        if self.fails:
            raise ValueError("cannot be dumped")
        return NotesDumps, (self.path,)


class PrintsWhenPickled:
    """Prints as it is pickled."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        print(self.text)
        return PrintsWhenPickled, (self.text,)


def of_any_kind(n: int) -> Any:
    """Values that travel in different ways, in turns; one in 13 fails, one cannot go and one cannot arrive."""
    import numpy as np

    kinds: list[Callable[[], Any]] = [
        lambda: n,
        lambda: (n, "pair"),
        lambda: {"n": n, "inner": [n, {n}]},
        lambda: None,
        lambda: Point(n, -n),
        lambda: np.arange(n, n + 3),
        lambda: b"x" * 6000 + b"%d" % n,
        lambda: [n, b"y" * 100_000],
        lambda: np.full(20_000, n),
        lambda: FailsToLoad(f"value {n}"),
        lambda: FailsToDump(),
        lambda: show(f"job {n}", (n,)),
        lambda: raise_this(ValueError(f"job {n}")),
    ]
    return kinds[n % 13]()


class SilentError(Exception):
    """An exception whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class CountsLoads:
    """Notes each time it comes back from its bytes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return load_counted, (self.path,)


def load_counted(path: str) -> CountsLoads:
    """Note that one was loaded."""
    note(path, "loaded")
    return CountsLoads(path)


def hold_at(gate: Gate, place: int, index: int) -> int:
    """Hold at one index, return at once at the others."""
    return gate.hold(index) if index == place else index  # type: ignore[no-any-return]


def descend(n: int = 0) -> tuple[int, str]:
    """Submit itself until that is refused: (how deep, what was said)."""
    import cloud
    from cloud.errors import UnsupportedOperation

    try:
        jid = cloud.call(descend, n + 1)
    except UnsupportedOperation as exc:
        return n, str(exc)
    return cloud.result(jid)  # type: ignore[no-any-return]


def ends_after_work(n: int) -> float:
    """Works for a millisecond; the moment at which it ended."""
    until = time.perf_counter() + 0.001
    while time.perf_counter() < until:
        pass
    return time.monotonic()


def fibonacci(n: int) -> int:
    """By two jobs of its own for each number above 1."""
    import cloud

    return n if n < 2 else sum(cloud.result(cloud.map(fibonacci, [n - 1, n - 2])))
