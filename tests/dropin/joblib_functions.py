"""What joblib's tasks of these tests run."""

from __future__ import annotations

import os
import time
from typing import Any

from joblib import Parallel, delayed, effective_n_jobs

from tests.integration.jobs import note


def square(x: int) -> int:
    return x * x


def fail_if_three(x: int) -> int:
    if x == 3:
        raise KeyError(x, "three")
    return x


def exit_if_three(x: int) -> int:
    if x == 3:
        os._exit(5)
    return x


def describe(array: Any) -> tuple[str, bool, tuple[int, ...], float, int]:
    """Kind, whether it is writable, shape, sum, and the process that says so."""
    return type(array).__name__, array.flags.writeable, array.shape, float(array.sum()), os.getpid()


def change(array: Any) -> float:
    array[0] += 1
    return float(array[0])


def inner(n_jobs: int | None, n: int) -> list[int]:
    return list(Parallel(n_jobs=n_jobs)(delayed(square)(i) for i in range(n)))


def inner_array(array: Any) -> list[Any]:
    return list(Parallel(n_jobs=2)(delayed(describe)(array) for _ in range(2)))


def inner_n_jobs() -> int:
    return int(effective_n_jobs(None))


def sleep_noted(witness: str, seconds: float) -> None:
    note(witness, "pid", os.getpid())
    time.sleep(seconds)


def fail_when_noted(witness: str) -> None:
    while not os.path.exists(witness):
        time.sleep(0.01)
    raise KeyError("noted")


def environment(name: str) -> str | None:
    return os.environ.get(name)


def pid(_: Any = None) -> int:
    time.sleep(0.02)
    return os.getpid()
