"""Ctrl-C: it interrupts waits, and nothing else."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable

import pytest

from tests.integration.support import Program, until

Start = Callable[..., Program]


def test_ctrl_c_interrupts_a_wait_and_leaves_the_jobs_running(program: Start) -> None:
    started = program(
        """
        import os, time
        import cloud.mp as cloud
        def patient():
            while not os.path.exists("go"):
                time.sleep(0.005)
            return os.getpid()
        jids = [cloud.call(patient) for _ in range(2)]
        while cloud.status(jids) != ["processing"] * 2: time.sleep(0.001)
        for wait in (cloud.result, cloud.join, lambda jids: list(cloud.iresult(jids)), lambda jids: cloud.result(jids, timeout=60)):
            print("waiting", flush=True)
            try:
                wait(jids)
            except KeyboardInterrupt:
                print("interrupted", cloud.status(jids), flush=True)
        open("go", "w").close()
        print("values", len(set(cloud.result(jids))), [cloud.info(jid, "attempt")[jid]["attempt"] for jid in jids])
        """,
        env={"CLOUD_NUM_PROCS": "2"},
    )
    for turn in range(4):
        started.wait_for("waiting", n=turn + 1)
        # The wait begins some time after the line: strike until it is interrupted, each wait once.
        until(lambda turn=turn: _strike(started, turn), "the wait is interrupted")
    assert started.succeeded().endswith("values 2 [1, 1]\n")
    assert started.saw("interrupted") == [["['processing',", "'processing']"]] * 4


def _strike(started: Program, turn: int) -> bool:
    if len(started.saw("interrupted")) > turn:
        return True
    if len(started.saw("waiting")) == turn + 1 and _waits(started.pid):
        started.signal(signal.SIGINT)
        until(lambda: len(started.saw("interrupted")) > turn or not _waits(started.pid), "the signal arrives")
    return False


def _waits(pid: int) -> bool:
    """True while the main thread sleeps in poll(2)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/syscall") as file:
            return file.read().split()[0] in ("7", "271")
    except (OSError, IndexError):
        return True


@pytest.mark.parametrize("n_waiting", [1, 3], ids=["alone", "beside other threads"])
def test_a_hundred_ctrl_cs_lose_nothing(program: Start, n_waiting: int) -> None:
    # They come at any moment: in call, in map, in the middle of an event, in result.
    started = program(
        f"""
        import os, signal, sys, threading, time
        import cloud.mp as cloud
        submitted, n_interrupted, values = [], 0, {{}}
        over = False
        def others():
            while not over:
                assert cloud.result(cloud.map(abs, range(30))) == list(range(30))
        threads = [threading.Thread(target=others) for _ in range({n_waiting} - 1)]
        for thread in threads: thread.start()
        def work(n):
            submitted.append((cloud.call(lambda x: x * x, n), n * n))
            jids = cloud.map(lambda x: x + 1, range(n, n + 5))
            submitted.extend(zip(jids, range(n + 1, n + 6)))
            for jid, value in submitted[-6:]:
                assert cloud.result(jid) == value
            cloud.kill(cloud.call(time.sleep, 0.001))
        cloud.result(cloud.call(abs, -1))
        print("ready", flush=True)
        n = 0
        while n_interrupted < 100:
            try:
                while True:
                    n += 1
                    work(n)
            except KeyboardInterrupt:
                n_interrupted += 1
                print("interrupted", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        over = True
        for thread in threads: thread.join()
        jids = [jid for jid, _ in submitted]
        assert cloud.result(jids, timeout=30) == [value for _, value in submitted]
        cloud.join(cloud.find(), timeout=30, ignore_errors=True)
        assert cloud.find(status=["waiting", "queued", "processing"]) == []
        assert cloud.result(cloud.map(abs, range(100))) == list(range(100))
        print("fine", len(jids) > 100)
        """
    )
    started.wait_for("ready")
    moments = random.Random(5)
    never = threading.Event()
    for turn in range(100):
        never.wait(moments.uniform(0.0, 0.008))
        os.kill(started.pid, signal.SIGINT)
        started.wait_for("interrupted", n=turn + 1)
    assert started.succeeded(40).endswith("fine True\n")
    started.left_nothing(2)


def test_ctrl_c_of_a_terminal_reaches_only_the_program(program: Start) -> None:
    # A terminal sends it to the whole foreground process group.
    started = program(
        """
        import time
        import cloud.mp as cloud
        jids = cloud.map(lambda x: time.sleep(0.5) or x, range(4))
        print("waiting", flush=True)
        try:
            cloud.result(jids)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(cloud.result(jids), {cloud.info(jid, "attempt")[jid]["attempt"] for jid in jids})
        """,
        env={"CLOUD_NUM_PROCS": "4"},
    )
    started.wait_for("waiting")
    until(lambda: _waits(started.pid), "it waits")
    os.killpg(started.pid, signal.SIGINT)
    assert started.succeeded() == "waiting\ninterrupted\n[0, 1, 2, 3] {1}\n"


def test_the_programs_own_handler_runs_during_a_wait(program: Start) -> None:
    # One that does not raise lets the wait go on; it runs soon, not when the wait is over.
    started = program(
        """
        import signal, time
        import cloud.mp as cloud
        seen = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: print("handled", number, frame is not None, flush=True))
        jid = cloud.call(lambda: time.sleep(1.5) or "value")
        print("waiting", flush=True)
        value = cloud.result(jid)
        print("after", value)
        assert callable(signal.getsignal(signal.SIGINT))
        """
    )
    started.wait_for("waiting")
    until(lambda: _waits(started.pid), "it waits")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD):
        started.signal(number)
        assert started.wait_for("handled", str(int(number))) == ["True"]
        assert not started.saw("after")
    assert "after value\n" in started.succeeded()


def test_handlers_are_the_programs_again_after_each_verb(program: Start) -> None:
    assert (
        program(
            """
        import signal
        import cloud.mp as cloud
        def mine(number, frame): pass
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM): signal.signal(number, mine)
        def check():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert all(signal.getsignal(n) is mine for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM))
        jid = cloud.call(abs, -1); check()
        cloud.result(jid); check()
        cloud.result(cloud.map(abs, range(10))); check()
        late = cloud.call(lambda: [None for _ in iter(int, 1)]); check()
        try: cloud.join(late, timeout=0.05)
        except cloud.CloudTimeoutError: check()
        cloud.kill(late); check()
        try: cloud.result(cloud.call(lambda: 1 / 0))
        except cloud.CloudException: check()
        cloud.delete(jid); check()
        cloud.close(); check()
        print("fine")
        """
        ).succeeded()
        == "fine\n"
    )


def test_a_fork_in_a_thread_while_the_main_thread_waits_keeps_ctrl_c(program: Start) -> None:
    # The child inherits a process whose handlers are held back by a thread that it does not have.
    out = program(
        """
        import os, signal, threading, time
        import cloud.mp as cloud
        jid = cloud.call(lambda: time.sleep(0.6) or "value")
        codes = []
        def fork():
            time.sleep(0.2)
            pid = os.fork()
            if pid == 0:
                try:
                    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
                    signal.raise_signal(signal.SIGINT)
                    time.sleep(5)
                    os._exit(1)
                except KeyboardInterrupt:
                    os._exit(0 if cloud.result(cloud.call(abs, -1)) == 1 else 2)
                except BaseException:
                    os._exit(3)
            codes.append(os.waitpid(pid, 0)[1])
        thread = threading.Thread(target=fork); thread.start()
        print(cloud.result(jid))
        thread.join()
        print(codes)
        """
    ).succeeded()
    assert out == "value\n[0]\n"


def test_ctrl_c_while_a_generator_feeds_a_map(program: Start) -> None:
    out = program(
        """
        import signal, time
        import cloud.mp as cloud
        def items():
            for x in range(10_000):
                if x == 3000: signal.raise_signal(signal.SIGINT)
                yield x
        try:
            cloud.map(abs, items())
        except KeyboardInterrupt:
            print("interrupted", cloud.find())
        print(cloud.result(cloud.map(abs, range(5))))
        """
    ).succeeded()
    assert out == "interrupted []\n[0, 1, 2, 3, 4]\n"


def test_asyncio_ctrl_c(program: Start) -> None:
    started = program(
        """
        import asyncio, time
        import cloud.mp as cloud
        jid = cloud.call(lambda: time.sleep(0.8) or "value")
        while cloud.status(jid) != "processing": time.sleep(0.001)
        async def main():
            print("waiting", flush=True)
            return await cloud.aresult(jid)
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            print("interrupted", cloud.status(jid), flush=True)
        print(cloud.result(jid))
        """
    )
    started.wait_for("waiting")
    until(lambda: _in_epoll(started.pid), "the loop waits")
    started.signal(signal.SIGINT)
    assert started.succeeded() == "waiting\ninterrupted processing\nvalue\n"


def _in_epoll(pid: int) -> bool:
    with open(f"/proc/{pid}/task/{pid}/syscall") as file:
        return file.read().split()[0] in ("232", "281", "441")
