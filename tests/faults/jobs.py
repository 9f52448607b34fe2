"""What the jobs of fault tests do: leave witness of each execution in a file, and return what can be checked."""

from __future__ import annotations

import os
import time
from typing import Any


def line(path: str, *words: object) -> None:
    """Append a line in one write: it is whole, whoever is killed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    finally:
        os.close(descriptor)


def expected(token: int) -> int:
    """What the job of this token returns."""
    return token * token + 1


def work(token: int, witness: str, seconds: float) -> int:
    """Tell the witness when it begins and ends; take some time between."""
    line(witness, "start", token, os.getpid(), time.time())
    if seconds:
        time.sleep(seconds)
    line(witness, "end", token, os.getpid(), time.time())
    return expected(token)


def wait_for(path: str, value: Any) -> Any:
    """Return the value once the file is there."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return value
