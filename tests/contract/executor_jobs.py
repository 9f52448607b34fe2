"""Jobs of the suite of executors.

Workers import this module, and each test starts its own: it imports nothing that costs time.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from typing import Any

from tests.contract.jobs import Gate, note, notes


class Buffer:
    """Travels beside the pickle if it is large."""

    def __init__(self, data: Any) -> None:
        self.data = bytes(data)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Buffer, (pickle.PickleBuffer(self.data),)


def plus_one(x: int) -> int:
    return x + 1


def add(x: int, y: int) -> int:
    return x + y


def when(sleep_s: float) -> tuple[float, float]:
    began = time.time()
    time.sleep(sleep_s)
    return began, time.time()


def fail(text: str) -> None:
    raise ValueError(text)


def fail_until(path: str, n: int) -> int:
    note(path, "tried")
    if len(notes(path)) < n:
        raise ValueError("not yet")
    return len(notes(path))


def show(text: str) -> None:
    print(text)
    print(text.upper(), file=sys.stderr)


def note_and_sleep(path: str, s: float) -> None:
    note(path, "begun")
    time.sleep(s)
    note(path, "ended")


def finally_note(path: str) -> None:
    note(path, "begun")
    try:
        time.sleep(3600)
    finally:
        note(path, "finally")


def end_process(path: str) -> int:
    note(path, "begun")
    if len(notes(path)) < 2:
        os.kill(os.getpid(), 9)
    return len(notes(path))


def ignore_kill(path: str) -> None:
    note(path, "begun")
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            pass


def print_and_hold(gate: Gate, text: str) -> None:
    print(text, flush=True)
    gate.hold()
