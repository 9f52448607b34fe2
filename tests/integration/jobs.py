"""What misbehaving jobs do. Light to import: every worker that replaces a killed one imports it anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any


def note(witness: str, *words: object) -> None:
    """Append one line: whole, whoever else writes."""
    fd = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())
    finally:
        os.close(fd)


def noted_square(witness: str, x: int, seconds: float = 0.0) -> int:
    note(witness, "start", x, os.getpid())
    time.sleep(seconds)
    note(witness, "end", x)
    return x * x


def meet(witness: str, n: int) -> int:
    """Return this process's id once ``n`` jobs are in here at the same time."""
    note(witness, "here", os.getpid())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with open(witness) as file:
            if len({line for line in file if line.startswith("here")}) >= n:
                return os.getpid()
        time.sleep(0.002)
    raise TimeoutError(f"fewer than {n} jobs ran at the same time")


def sleep_noted(witness: str, seconds: float = 60.0) -> None:
    note(witness, "pid", os.getpid())
    time.sleep(seconds)


# --- ends of their own ------------------------------------------------------------------------------------------------


def exit_with(code: int) -> None:
    os._exit(code)


def system_exit(code: Any) -> None:
    sys.exit(code)


def segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def abort() -> None:
    os.abort()


def double_and_die(numbers: Any, dying: str) -> Any:
    """The numbers, doubled in place. Who finds the file takes it away, and dies when that is done."""
    numbers *= 2
    with suppress(FileNotFoundError):
        os.remove(dying)
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def close_everything() -> None:
    os.closerange(0, 65536)


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


# --- left behind ------------------------------------------------------------------------------------------------------


def fork_and_return() -> int:
    return os.getpid() if os.fork() else -1


def fork_in_c_and_return() -> int:
    import ctypes

    return os.getpid() if ctypes.CDLL(None).fork() else -1


def daemonize(witness: str) -> int:
    """Start a grandchild in a session of its own, as daemons do; its pid."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        grandchild = os.fork()
        if grandchild:
            os.write(write, str(grandchild).encode())
            os._exit(0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(0, 256)
        time.sleep(600)
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    pid = int(os.read(read, 20))
    os.close(read)
    note(witness, "daemon", pid)
    return pid


def start_child(witness: str, *, own_session: bool = False) -> int:
    """Start a child process that ignores polite signals and outlives the job; its pid."""
    program = "import os, signal, time; [signal.signal(n, 1) for n in (1, 2, 15)]; os.write(1, b'x'); time.sleep(600)"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, start_new_session=own_session
    )
    assert child.stdout is not None
    child.stdout.read(1)
    child.returncode = 0  # nobody will ask
    note(witness, "child", child.pid)
    return child.pid


def start_family(witness: str, seconds: float = 0.0) -> None:
    """Leave a child, a child in its own session, and a daemon behind; then sleep."""
    start_child(witness)
    start_child(witness, own_session=True)
    daemonize(witness)
    note(witness, "worker", os.getpid())
    note(witness, "ready")
    time.sleep(seconds)


_threads: list[threading.Thread] = []


def start_thread(seconds: float) -> str:
    thread = threading.Thread(target=time.sleep, args=(seconds,))
    thread.start()
    _threads.append(thread)
    return thread.name


def thread_that_raises() -> str:
    def fail() -> None:
        raise RuntimeError("in a thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    return "fine"


# --- resources --------------------------------------------------------------------------------------------------------


def recurse(n: int = 0) -> int:
    return recurse(n + 1) + 1


def deep_list(n: int) -> list[Any]:
    outer: list[Any] = []
    for _ in range(n):
        outer = [outer]
    return outer


def use_memory(n_bytes: int, headroom_bytes: int) -> int:
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * 4096
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom_bytes, before[1]))
    try:
        return len(bytearray(n_bytes))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def print_much(n_bytes: int) -> int:
    line = "x" * 99 + "\n"
    for _ in range(n_bytes // 100):
        sys.stdout.write(line)
    print("the end")
    return n_bytes


def flood(witness: str) -> None:
    note(witness, "flooding", os.getpid())
    block = b"y" * (1 << 16)
    while True:
        os.write(1, block)
        os.write(2, block)


# --- surroundings -----------------------------------------------------------------------------------------------------


def ignore_all_signals() -> None:
    for number in signal.valid_signals():
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass


def ignore_and_sleep(witness: str) -> None:
    ignore_all_signals()
    note(witness, "deaf", os.getpid())
    time.sleep(600)


def swallow_everything(witness: str) -> None:
    note(witness, "stubborn", os.getpid())
    while True:
        try:
            time.sleep(600)
        except BaseException:
            note(witness, "swallowed")


def block_and_sleep(witness: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    note(witness, "blocked", os.getpid())
    time.sleep(600)


def compute_in_c(witness: str) -> int:
    note(witness, "computing", os.getpid())
    return sum(range(10**12))


def backtrack(witness: str) -> Any:
    import re

    note(witness, "matching", os.getpid())
    return re.match(r"(a+)+$", "a" * 64 + "b")


def stop_in_c(witness: str) -> None:
    note(witness, "stopped", os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def cleaned_up(witness: str) -> None:
    note(witness, "entered", os.getpid())
    try:
        time.sleep(600)
    finally:
        note(witness, "finally")


def surroundings() -> dict[str, Any]:
    """What a job finds, for comparison between jobs."""
    return {
        "cwd": os.getcwd(),
        "environ": dict(os.environ),
        "path": sys.path[:],
        "handlers": {int(n): repr(signal.getsignal(n)) for n in (1, 2, 10, 12, 13, 14, 15, 17)},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "timers": [signal.getitimer(n)[0] for n in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)],
        "streams": [sys.stdout.fileno(), sys.stderr.fileno(), sys.stdout.encoding, sys.stdout.closed],
        "stdin": os.readlink("/proc/self/fd/0"),
    }
