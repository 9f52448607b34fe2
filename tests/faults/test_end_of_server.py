"""A server that is killed leaves no worker, and the next one can tell."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.unit.served import eventually

SERVER = """
import fcntl, os, sys, time
from cloud.engine.executor.setup import WorkerSetup
from tests.unit.served import ServedHouse

lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
house = ServedHouse(WorkerSetup(sys.argv[2], lock_fd=lock))

def stubborn(path):
    import signal
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = os.fork()
    if not child:
        os.setsid()
        time.sleep(600)
    with open(path + ".new", "w") as file:
        file.write(f"{os.getpid()} {child}")
    os.rename(path + ".new", path)
    time.sleep(600)

house.call(stubborn, sys.argv[3])
print("up", flush=True)
time.sleep(600)
"""


def test_the_lock_is_free_once_no_worker_is_left(tmp_path: Path) -> None:
    lock, scratch, told = tmp_path / "lock", tmp_path / "scratch", tmp_path / "told"
    scratch.mkdir()
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SERVER, str(lock), str(scratch), str(told)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE) as server:
        try:
            eventually(told.exists, "the job did not begin")
            pids = [int(each) for each in told.read_text().split()]
            fd = os.open(lock, os.O_RDWR)
            assert not locked(fd)
            for pid in pids:
                assert str(lock) not in opened_by(pid)
        finally:
            server.send_signal(signal.SIGKILL)
    fcntl.flock(fd, fcntl.LOCK_EX)
    # At once: whoever got the lock may start workers.
    assert [pid for pid in pids if alive(pid)] == []
    os.close(fd)


def locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def opened_by(pid: int) -> list[str]:
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(each))
    return found


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
