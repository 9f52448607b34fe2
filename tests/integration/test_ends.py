"""The end of the program, however it comes: nothing is left behind, and it comes soon."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support import Program, exists, lines_of, until

Start = Callable[..., Program]

LEFT_S = 2.0
SOON_S = 1.0
SLACK_S = 1.0

#: Two jobs run, each with a child, a child in a session of its own and a daemon; others wait.
BUSY = """
import atexit, os, signal, sys, threading, time
import cloud.mp as cloud
from tests.integration import jobs

running = cloud.map(jobs.start_family, ["witness", "witness"], [600, 600])
stubborn = cloud.call(jobs.swallow_everything, "witness")
queued = cloud.map(time.sleep, [600] * 50)
def n_ready():
    return open("witness").read().count("ready\\n") if os.path.exists("witness") else 0
while n_ready() < 2 or "stubborn" not in open("witness").read():
    time.sleep(0.01)
print("ready", flush=True)
"""

ENDS = {
    "falling off the end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "os._exit": ("os._exit(4)", 4),
    "an exception": ("raise ValueError('mine')", 1),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "Ctrl-C in a wait": (
        "threading.Timer(0.1, signal.raise_signal, [2]).start(); cloud.result(running)",
        -signal.SIGINT,
    ),
    "os.abort": ("os.abort()", -signal.SIGABRT),
    "an exit in a thread": ("threading.Thread(target=os._exit, args=(5,)).start(); time.sleep(60)", 5),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "SIGHUP": ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(60)", -signal.SIGHUP),
    "SIGTERM to sys.exit": (
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(6)); threading.Timer(0.1, os.kill, [os.getpid(), 15]).start()"
        "; cloud.result(running)",
        6,
    ),
    "exec": ("os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(0.5)'])", 0),
    "a wait in a daemon thread": ("threading.Thread(target=cloud.result, args=(running,), daemon=True).start()", 0),
    "close, then an exit": ("cloud.close(); sys.exit(7)", 7),
    "an exit while a callback runs": (
        "cloud.call(abs, 1, _callback=lambda: time.sleep(60), _priority=0); cloud.kill(stubborn); time.sleep(0.3)",
        0,
    ),
}


def left_in_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("cloud", "psm_"))}


@pytest.mark.parametrize("how", ENDS)
def test_nothing_is_left(program: Start, how: str) -> None:
    ending, code = ENDS[how]
    memory, files = left_in_memory(), set(os.listdir(tempfile.gettempdir()))
    started = program(BUSY + ending, env={"CLOUD_NUM_PROCS": "3"})
    started.wait_for("ready")
    ready_at = time.monotonic()
    assert started.ended() == code
    bound = SOON_S + SLACK_S + (2.5 if "callback" in how else 0.5 if how == "exec" else 0)
    assert time.monotonic() - ready_at < bound
    started.left_nothing(LEFT_S)
    family = [int(line.split()[1]) for line in lines_of(started.folder / "witness") if " " in line]
    assert len(family) >= 8
    until(lambda: not any(map(exists, family)), "the families are gone", limit_s=LEFT_S)
    assert left_in_memory() == memory
    assert set(os.listdir(tempfile.gettempdir())) == files
    assert sorted(os.listdir(started.folder)) == ["program.out", "program.py", "witness"]


def test_a_stopped_worker_and_a_stopped_child_are_ended_too(program: Start) -> None:
    started = program(BUSY + "time.sleep(60)", env={"CLOUD_NUM_PROCS": "3"})
    started.wait_for("ready")
    for line in lines_of(started.folder / "witness"):
        if line.startswith(("worker", "child", "daemon")):
            os.kill(int(line.split()[1]), signal.SIGSTOP)
    started.signal(signal.SIGKILL)
    started.ended()
    started.left_nothing(LEFT_S)


def test_killed_while_workers_start(program: Start) -> None:
    source = """
        import cloud.mp as cloud, time
        cloud.map(time.sleep, [600] * 20)
        print("ready", flush=True)
        time.sleep(600)
    """
    for number, delay_s in enumerate((0.0, 0.005, 0.02, 0.05, 0.1)):
        started = program(source, env={"CLOUD_NUM_PROCS": "20"})
        started.wait_for("ready")
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline:
            pass
        started.signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
        started.ended()
        started.left_nothing(LEFT_S)


def test_an_idle_program_is_killed(program: Start) -> None:
    started = program(
        """
        import cloud.mp as cloud, time
        cloud.result(cloud.map(abs, range(10)))
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    started.wait_for("ready")
    assert started.others()
    started.signal(signal.SIGKILL)
    started.ended()
    started.left_nothing(LEFT_S)


def test_a_forked_child_of_the_program_does_not_keep_the_workers(program: Start) -> None:
    # It holds copies of all descriptors; those of the engine must be closed in it.
    started = program(
        """
        import os, time
        import cloud.mp as cloud
        jids = cloud.map(time.sleep, [600] * 4)
        if os.fork() == 0:
            os.setsid()
            print("child", os.getpid(), flush=True)
            time.sleep(600)
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    started.wait_for("ready")
    child = int(started.wait_for("child")[0])
    started.signal(signal.SIGKILL)
    started.ended()
    try:
        until(lambda: set(started.others()) == {child}, "only the program's own child is left", limit_s=LEFT_S)
    finally:
        os.kill(child, signal.SIGKILL)
    started.left_nothing(LEFT_S)


def test_a_child_program_does_not_keep_the_workers(program: Start) -> None:
    started = program(
        """
        import subprocess, sys, time
        import cloud.mp as cloud
        jids = cloud.map(time.sleep, [600] * 4)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
        print("child", child.pid, flush=True)
        time.sleep(600)
        """
    )
    child = int(started.wait_for("child")[0])
    started.signal(signal.SIGKILL)
    started.ended()
    try:
        until(lambda: set(started.others()) == {child}, "only the program's own child is left", limit_s=LEFT_S)
    finally:
        os.kill(child, signal.SIGKILL)
    started.left_nothing(LEFT_S)


def test_the_end_of_a_forked_child_leaves_the_parents_workers_alone(program: Start) -> None:
    started = program(
        """
        import os, signal, sys, time
        import cloud.mp as cloud
        jid = cloud.call(lambda: time.sleep(0.5) or "done")
        for ending in (sys.exit, os._exit, lambda code: os.kill(os.getpid(), signal.SIGKILL)):
            pid = os.fork()
            if pid == 0:
                cloud.result(cloud.call(abs, -1))
                ending(0)
            os.waitpid(pid, 0)
        print(cloud.result(jid), cloud.info(jid, "attempt")[jid]["attempt"])
        """
    )
    assert started.succeeded() == "done 1\n"
    started.left_nothing(LEFT_S)


def test_close_ends_everything_and_opens_again(program: Start) -> None:
    started = program(
        """
        import os, threading, time
        import cloud.mp as cloud
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(3):
            jids = cloud.map(time.sleep, [600] * 5)
            waiters = []
            def wait():
                try: cloud.result(jids)
                except cloud.CloudException as exc: waiters.append(type(exc).__name__)
            threads = [threading.Thread(target=wait) for _ in range(3)]
            for thread in threads: thread.start()
            while cloud.status(jids[0]) != "processing": time.sleep(0.001)
            began = time.monotonic()
            assert cloud.close() is True
            assert time.monotonic() - began < 2
            for thread in threads: thread.join(5)
            assert waiters == ["BackendClosed"] * 3, waiters
            assert [thread.name for thread in threading.enumerate() if thread.name.startswith("cloud-")] == []
            assert set(os.listdir("/proc/self/fd")) == before
            assert cloud.close() is False
        print(cloud.result(cloud.call(abs, -1)))
        """
    )
    assert started.succeeded() == "1\n"
    started.left_nothing(LEFT_S)


def test_the_end_is_quick_with_many_workers(program: Start) -> None:
    started = program(
        """
        import time
        import cloud.mp as cloud
        cloud.map(time.sleep, [600] * 40)
        while len(cloud.find(status="processing")) < 40: time.sleep(0.005)
        print("ready", flush=True)
        """,
        env={"CLOUD_NUM_PROCS": "40"},
    )
    started.wait_for("ready")
    began = time.monotonic()
    assert started.ended() == 0
    assert time.monotonic() - began < SOON_S + SLACK_S
    started.left_nothing(LEFT_S)


def test_a_pipeline_ends(program: Start, tmp_path: Path) -> None:
    # Workers and template hold no copy of the program's stdout for longer than the program lives.
    import subprocess
    import sys

    from tests.scripts import program_environment

    source = "import cloud.mp as c, time; c.map(time.sleep, [600] * 4); print('out', flush=True)"
    began = time.monotonic()
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" | cat', sys.executable, source],
        env=program_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "out\n"
    assert time.monotonic() - began < 10
