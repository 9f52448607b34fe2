"""What the jobs run. One module, importable everywhere, so that no system has to send code where it can send a name."""

from __future__ import annotations

import os
import time


def noop(x):
    return x


def spin(seconds):
    """Use the processor for so long: processor time, so that sharing a core is not mistaken for work."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return seconds


def length(content):
    return len(content)


def say(number):
    print("this is job", number)
    return number


def fail(number):
    raise ValueError(f"job {number} fails")


def double(array):
    """The array doubled in place. Who gets it read-only must copy it first, as a user would."""
    if not array.flags.writeable:
        array = array.copy()
    array *= 2
    return array


def paired(record):
    """A container, from a container."""
    return record["number"], record


class Table:
    """Something that can be changed, with a method: no package may send it once for all calls."""

    def __init__(self):
        self.rows = {"first": 1, "second": 2}

    def look_up(self, number, *, factor=1):
        return self.rows["first"] * number * factor


def pick(array, index):
    return float(array[index])


def block(number):
    """One megabyte."""
    import numpy as np

    return np.full(131_072, number, dtype=np.float64)


def moment(*_dependencies):
    """When it ran, on a clock that all processes of the machine share."""
    return time.monotonic_ns()


def wait_for_file(path):
    """Hold a worker until the file is there."""
    while not os.path.exists(path):
        time.sleep(0.001)
    return path


def victim(path):
    """Wait to be killed the first time; when tried again, say so."""
    if os.path.exists(path):
        return "retried"
    with open(f"{path}.new", "w", encoding="ascii") as file:
        file.write(str(os.getpid()))
    os.rename(f"{path}.new", path)
    time.sleep(60)
    return "not killed"
