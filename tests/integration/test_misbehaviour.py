"""Jobs that exit, crash, leak, flood and disturb: the rest of the world does not notice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloud.client.cloud import Cloud
from cloud.errors import JobFailed, WorkerLost
from tests.integration import jobs
from tests.integration.support import Program, executor_of, exists, lines_of, until, worker_pids

Opener = Callable[..., Cloud]


def later(mp: Cloud) -> None:
    """The next jobs are as good as the first ones."""
    assert mp.result(mp.call(abs, -5), timeout=10) == 5
    jid = mp.call(jobs.print_much, 100)
    assert mp.result(jid, timeout=10) == 100
    assert mp.info(jid)[jid]["stdout"] == "x" * 99 + "\nthe end\n"
    assert mp.result(mp.map(abs, range(50)), timeout=10) == list(range(50))


@pytest.mark.parametrize(
    ("job", "args", "exitcode", "text"),
    [
        (jobs.exit_with, (0,), 0, "code 0"),
        (jobs.exit_with, (7,), 7, "code 7"),
        (jobs.segfault, (), -signal.SIGSEGV, "SIGSEGV"),
        (jobs.abort, (), -signal.SIGABRT, "SIGABRT"),
        (jobs.kill_self, (signal.SIGFPE,), -signal.SIGFPE, "SIGFPE"),
        (jobs.kill_self, (signal.SIGKILL,), -signal.SIGKILL, "SIGKILL"),
        (jobs.kill_self, (signal.SIGTERM,), -signal.SIGTERM, "SIGTERM"),
        (jobs.kill_self, (signal.SIGALRM,), -signal.SIGALRM, "SIGALRM"),
        (jobs.close_everything, (), 0, "code 0"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_a_job_that_ends_its_worker(
    mp: Cloud, witness: Path, job: Any, args: tuple[Any, ...], exitcode: int, text: str
) -> None:
    bystander = mp.call(jobs.noted_square, str(witness), 6, 0.3, _restartable=False)
    jid = mp.call(job, *args)
    queued = mp.map(jobs.noted_square, [str(witness)] * 10, range(10))
    with pytest.raises(WorkerLost, match=text) as caught:
        mp.result(jid, timeout=10)
    assert (caught.value.jid, caught.value.status, caught.value.exitcode) == (jid, "error", exitcode)
    assert mp.result(bystander, timeout=10) == 36
    assert mp.result(queued, timeout=10) == [x * x for x in range(10)]
    later(mp)


def test_a_job_that_closes_its_connection_and_runs_on(mp: Cloud) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="closed its connection") as caught:
        mp.result(mp.call(_close_and_sleep), timeout=10)
    assert caught.value.exitcode is None
    assert time.monotonic() - began < 2
    assert mp.info(1, "attempt")[1]["attempt"] == 1
    later(mp)


def _close_and_sleep() -> None:
    jobs.close_everything()
    time.sleep(600)


def test_output_before_a_crash_is_kept(mp: Cloud) -> None:
    jid = mp.call(_print_and_crash)
    with pytest.raises(WorkerLost):
        mp.result(jid, timeout=10)
    facts = mp.info(jid)[jid]
    assert facts["stdout"] == "last words\n"
    assert "Segmentation" not in facts["stdout"]


def test_what_faulthandler_says_of_a_crash_is_kept(program: Callable[..., Program]) -> None:
    out = program(
        """
        import faulthandler
        faulthandler.enable()
        import cloud.mp as cloud
        def crash():
            import faulthandler
            faulthandler._sigsegv()
        jid = cloud.call(crash)
        cloud.join(jid, ignore_errors=True)
        text = cloud.info(jid)[jid]["stderr"]
        print("Fatal Python error: Segmentation fault" in text, " in crash" in text)
        """,
        flags=["-X", "faulthandler"],
    ).succeeded()
    assert out == "True True\n"


def _print_and_crash() -> None:
    print("last words", flush=True)
    jobs.segfault()


@pytest.mark.parametrize("code", [None, 0, 3, "a message"])
def test_sys_exit_is_an_error_of_the_job(mp: Cloud, code: Any) -> None:
    with pytest.raises(JobFailed) as caught:
        mp.result(mp.call(jobs.system_exit, code), timeout=10)
    assert type(caught.value) is JobFailed
    assert isinstance(caught.value.__cause__, SystemExit)
    assert caught.value.__cause__.code == code
    later(mp)


def test_closing_and_opening_descriptors(mp: Cloud, tmp_path: Path) -> None:
    # A file opened afterwards must not get a number that the worker writes its outcomes to.
    path = tmp_path / "written"
    assert mp.result(mp.call(_close_low_and_write, str(path)), timeout=10) == "fine"
    assert path.read_text() == "mine" * 40
    later(mp)


def _close_low_and_write(path: str) -> str:
    os.closerange(0, 64)
    files = [open(path, "a") for _ in range(40)]
    for file in files:
        file.write("mine")
        file.flush()
    return "fine"


@pytest.mark.parametrize(
    "damage",
    [
        "os.close(1)",
        "os.close(2); os.close(1); os.close(0)",
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)",
        "os.dup2(os.open('there', os.O_WRONLY | os.O_CREAT), 1)",
        "os.dup2(os.pipe()[1], 2); os.dup2(2, 1)",
        "open(1, 'w').close()",
        "sys.stdout.close(); sys.stderr.close()",
        "sys.stdout.detach()",
        "sys.stdout = sys.stderr = None",
        "sys.stdout = io.StringIO(); print('lost')",
        "del sys.stdout",
        "sys.__stdout__ = sys.__stderr__ = None",
        "os.ftruncate(1, 0)",
        "os.closerange(0, 3)",
        "sys.stdin.close()",
    ],
)
def test_a_job_that_damages_its_output(start: Opener, tmp_path: Path, damage: str) -> None:
    cloud = start(1)
    for first in (True, False):
        assert cloud.result(cloud.call(_do, damage, str(tmp_path)), timeout=10) == "fine"
        for number in range(2):
            jid = cloud.call(_print_everywhere, number)
            assert cloud.result(jid, timeout=10) == number
            facts = cloud.info(jid)[jid]
            assert facts["stdout"] == f"out {number}\nchild\n", (first, damage)
            assert facts["stderr"] == f"err {number}\n"
    assert len({cloud.info(jid, "pid")[jid]["pid"] for jid in range(1, 7)}) == 1


def _do(code: str, folder: str) -> str:
    import io
    import sys

    os.chdir(folder)
    print("before")
    exec(code, {"os": os, "sys": sys, "io": io})
    return "fine"


def _print_everywhere(number: int) -> int:
    import sys

    print("out", number)
    print("err", number, file=sys.__stderr__)
    os.system("echo child")
    return number


SURROUNDINGS = {
    "directory": "os.chdir('/')",
    "directory by posix": "import posix; posix.chdir('/')",
    "directory removed": "import tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)",
    "environment": "os.environ['PATH'] = 'x'; os.environ['NEW'] = 'y'; os.environ.pop('HOME', None)",
    "environment cleared": "os.environ.clear()",
    "environment, low level": "os.putenv('NEW', 'y'); os.environ['OTHER'] = 'z'",
    "import path": "sys.path[:] = []",
    "import path replaced": "sys.path = ['/']",
    "signal handlers": "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 10, 12, 13, 14, 15, 17)]",
    "signal handlers that raise": "[signal.signal(n, lambda *a: 1 / 0) for n in (1, 2, 10, 12, 14, 15, 17)]",
    "blocked signals": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "an alarm left over": "signal.signal(signal.SIGALRM, print); signal.setitimer(signal.ITIMER_REAL, 0.05)",
    "an alarm that kills": "signal.alarm(1)",
    "a virtual timer": "signal.setitimer(signal.ITIMER_VIRTUAL, 0.01)",
}


@pytest.mark.parametrize("change", SURROUNDINGS)
def test_surroundings_are_restored(start: Opener, tmp_path: Path, change: str) -> None:
    cloud = start(1)
    before = cloud.result(cloud.call(jobs.surroundings))
    assert cloud.result(cloud.call(_change, SURROUNDINGS[change]), timeout=10) == "fine"
    assert cloud.result(cloud.call(jobs.surroundings), timeout=10) == before
    assert cloud.result(cloud.call(time.sleep, 0.15 if "timer" in change or "left" in change else 0)) is None
    pids = cloud.info(range(1, 4), "pid")
    assert len({facts["pid"] for facts in pids.values()}) == 1


def _change(code: str) -> str:
    import sys

    exec(code, {"os": os, "sys": sys, "signal": signal})
    return "fine"


def test_after_a_job_that_ignores_everything_kill_works(start: Opener, witness: Path) -> None:
    cloud = start(1)
    cloud.result(cloud.call(jobs.ignore_all_signals))
    jid = cloud.call(jobs.cleaned_up, str(witness))
    until(lambda: lines_of(witness), "it runs")
    cloud.kill(jid)
    assert "finally" in lines_of(witness)


def test_a_forked_child_that_returns_from_the_job(mp: Cloud) -> None:
    # It must neither report the job a second time nor run the next one.
    for job in (jobs.fork_and_return, jobs.fork_in_c_and_return):
        values = mp.result([mp.call(job) for _ in range(10)], timeout=10)
        assert -1 not in values
        values = mp.result(mp.map(_returning, [job.__name__] * 10), timeout=10)
        assert -1 not in values
    later(mp)


def _returning(name: str) -> int:
    return getattr(jobs, name)()  # type: ignore[no-any-return]


def test_what_a_job_leaves_behind_ends_with_the_cloud(mp: Cloud, witness: Path) -> None:
    mp.result(mp.call(jobs.start_family, str(witness)), timeout=20)
    family = [int(line.split()[1]) for line in lines_of(witness) if " " in line]
    assert len(family) == 4
    assert all(map(exists, family))
    later(mp)
    assert all(map(exists, family))
    mp.close()
    assert not any(map(exists, family))


def test_what_a_crashed_job_leaves_behind_ends_with_its_worker(mp: Cloud, witness: Path) -> None:
    jid = mp.call(_leave_and_crash, str(witness))
    with pytest.raises(WorkerLost):
        mp.result(jid, timeout=20)
    family = [int(line.split()[1]) for line in lines_of(witness) if line.startswith(("child", "daemon"))]
    assert len(family) == 3
    until(lambda: not any(map(exists, family)), "the family is gone", limit_s=2)
    later(mp)


def _leave_and_crash(witness: str) -> None:
    jobs.start_family(witness)
    os._exit(1)


def test_children_do_not_keep_a_dead_workers_job_open(mp: Cloud, witness: Path) -> None:
    # They hold copies of the worker's socket and output: its death is told all the same.
    jid = mp.call(_fork_and_crash, str(witness))
    with pytest.raises(WorkerLost):
        mp.result(jid, timeout=2)
    child = int(lines_of(witness)[0].split()[1])
    until(lambda: not exists(child), "the child is gone", limit_s=2)


def _fork_and_crash(witness: str) -> None:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    jobs.note(witness, "forked", pid)
    os._exit(1)


def test_threads_that_outlive_their_job(start: Opener) -> None:
    cloud = start(1)
    assert cloud.result(cloud.call(jobs.start_thread, 600.0), timeout=10).startswith("Thread")
    later(cloud)
    cloud.result(cloud.map(jobs.start_thread, [600.0] * 5))
    later(cloud)
    began = time.monotonic()
    cloud.close()
    assert time.monotonic() - began < 2


def test_a_thread_that_raises(mp: Cloud) -> None:
    jid = mp.call(jobs.thread_that_raises)
    assert mp.result(jid, timeout=10) == "fine"
    assert "RuntimeError: in a thread" in mp.info(jid)[jid]["stderr"]


def test_recursion(mp: Cloud) -> None:
    with pytest.raises(JobFailed) as caught:
        mp.result(mp.call(jobs.recurse), timeout=20)
    assert isinstance(caught.value.__cause__, RecursionError)
    assert "maximum recursion depth" in str(caught.value)
    later(mp)


def test_a_result_too_deep_to_be_pickled(mp: Cloud) -> None:
    with pytest.raises(JobFailed, match="recursion|pickle"):
        mp.result(mp.call(jobs.deep_list, 100_000), timeout=20)
    later(mp)


def test_memory(mp: Cloud) -> None:
    with pytest.raises(JobFailed) as caught:
        mp.result(mp.call(jobs.use_memory, 1 << 40, 1 << 30), timeout=20)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert mp.result(mp.call(jobs.use_memory, 1 << 20, 1 << 30), timeout=20) == 1 << 20
    later(mp)


def test_memory_used_up_while_the_result_is_packed(start: Opener) -> None:
    cloud = start(1)
    with pytest.raises(JobFailed):
        cloud.result(cloud.call(_limited, 64 << 20), timeout=30)
    later(cloud)


def _limited(n_bytes: int) -> str:
    import resource

    value = "x" * n_bytes  # unlike bytes, it is copied as it is packed
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    return value


def test_much_output(mp: Cloud) -> None:
    jid = mp.call(jobs.print_much, 200_000_000)
    before = _captured_bytes(mp)
    most = 0

    def done() -> bool:
        nonlocal most
        most = max(most, _captured_bytes(mp))
        return mp.status(jid) == "done"

    until(done, "it has printed", limit_s=60)
    assert mp.result(jid) == 200_000_000
    out = mp.info(jid)[jid]["stdout"]
    assert len(out.encode()) == 64_000
    assert out.endswith("x\nthe end\n")
    assert most - before < 100 << 20
    later(mp)


def test_an_endless_flood(mp: Cloud, witness: Path) -> None:
    jid = mp.call(jobs.flood, str(witness))
    until(lambda: lines_of(witness), "it floods")
    files = executor_of(mp)._workers
    deadline = time.monotonic() + 1.5
    most = 0
    while time.monotonic() < deadline:
        most = max(most, _captured_bytes(mp))
        time.sleep(0.01)
    written = max(os.fstat(fd).st_size for worker in files.values() for fd in worker.output_fds)
    # In memory is what was written since the last look, far less than all.
    assert most < 512 << 20
    assert len(mp.info(jid)[jid]["stdout"]) == 64_000
    mp.kill(jid)
    assert mp.status(jid) == "killed"
    assert mp.info(jid)[jid]["stdout"] == "y" * 64_000
    assert written > 0
    later(mp)


def _captured_bytes(cloud: Cloud) -> int:
    """Memory that the capture files of all workers take."""
    return sum(
        os.fstat(fd).st_blocks * 512
        for worker in list(executor_of(cloud)._workers.values())
        for fd in list(worker.output_fds)
    )


def test_output_of_many_jobs_does_not_pile_up(start: Opener) -> None:
    cloud = start(1)
    for _ in range(6):
        cloud.result(cloud.map(jobs.print_much, [4_000_000] * 5), timeout=60)
    assert _captured_bytes(cloud) < 40 << 20


def test_a_job_that_stops_itself_can_be_killed(mp: Cloud) -> None:
    jid = mp.call(jobs.stop_self)
    pid = until(lambda: [p for p in worker_pids(mp) if psutil.Process(p).status() == "stopped"], "it stops")[0]
    began = time.monotonic()
    mp.kill(jid)
    assert time.monotonic() - began < 2
    until(lambda: not exists(pid), "it is gone", limit_s=2)


def test_a_job_with_children_that_it_waits_for(mp: Cloud) -> None:
    assert mp.result(mp.call(_wait_for_children), timeout=20) == [0, 3, 0]


def _wait_for_children() -> list[int]:
    import multiprocessing
    import subprocess

    codes = [subprocess.call(["true"]), subprocess.call(["sh", "-c", "exit 3"])]
    process = multiprocessing.get_context("fork").Process(target=abs, args=(1,))
    process.start()
    process.join()
    return [*codes, process.exitcode or 0]


def test_a_pool_inside_a_job(mp: Cloud) -> None:
    for method in ("fork", "spawn"):
        assert mp.result(mp.call(_pool, method), timeout=30) == [0, 1, 2, 3]
    later(mp)


def _pool(method: str) -> list[int]:
    import multiprocessing

    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map(abs, range(4))
