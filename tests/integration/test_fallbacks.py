"""POSIX systems that have less than Linux: each feature is switched off in turn, in program, template and workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from tests.integration.support import Program, exists, lines_of, until
from tests.scripts import REPO

Start = Callable[..., Program]

#: Run by every interpreter of the program at its start, as sitecustomize.
WITHOUT = {
    "memfd": "import os; del os.memfd_create",
    "memfd that is refused": """
        import os
        def memfd_create(*args):
            raise PermissionError(1, "refused")
        os.memfd_create = memfd_create
    """,
    "prctl": """
        import ctypes
        class CDLL(ctypes.CDLL):
            def __getattr__(self, name):
                if name in ("prctl", "fallocate"):
                    raise AttributeError(name)
                return super().__getattr__(name)
        ctypes.CDLL = CDLL
    """,
    "ctypes": "import sys; sys.modules['ctypes'] = sys.modules['_ctypes'] = None",
    "proc": """
        import builtins, os
        real = builtins.open
        def open(file, *args, **kwargs):
            if str(file).startswith("/proc"):
                raise FileNotFoundError(2, "no such file", file)
            return real(file, *args, **kwargs)
        real_listdir, real_os_open = os.listdir, os.open
        def listdir(path="."):
            if str(path).startswith("/proc"):
                raise FileNotFoundError(2, "no such file", path)
            return real_listdir(path)
        def os_open(path, *args, **kwargs):
            if str(path).startswith("/proc"):
                raise FileNotFoundError(2, "no such file", path)
            return real_os_open(path, *args, **kwargs)
        builtins.open, os.listdir, os.open = open, listdir, os_open
    """,
    "affinity": "import os; del os.sched_getaffinity, os.sched_setaffinity",
    "pidfd": "import os; del os.pidfd_open",
    "scheduling": "import os; del os.SCHED_BATCH, os.sched_setscheduler, os.sched_getscheduler, os.sched_param",
    "leave to schedule": """
        import os
        def refused(*args):
            raise PermissionError(1, "Operation not permitted")
        os.sched_setscheduler = refused
    """,
    "many cores": "import os; os.cpu_count = lambda: 1; os.sched_getaffinity = lambda pid: {0}",
    "load average": "import os; os.getloadavg = None",
}
WITHOUT["all of it"] = "\n".join(dedent(WITHOUT[name]) for name in ("memfd", "prctl", "proc", "affinity", "pidfd"))

BASICS = """
import os, sys, time
import cloud.mp as cloud
from tests.integration import jobs

def printing(x):
    print("out", x)
    os.system("echo child")
    return x

assert cloud.result(cloud.call(lambda x: x + 1, 1)) == 2
jid = cloud.call(printing, 1)
assert cloud.result(jid) == 1
assert cloud.info(jid)[jid]["stdout"] == "out 1\\nchild\\n"
assert cloud.result(cloud.map(lambda x: x * x, range(500))) == [x * x for x in range(500)]
assert cloud.result(cloud.call(lambda: cloud.result(cloud.call(abs, -1)))) == 1
big = os.urandom(3_000_000)
assert cloud.result(cloud.call(lambda data: data[::-1], big)) == big[::-1]
late = [cloud.call(jobs.ignore_and_sleep, "late"), cloud.call(time.sleep, 60)]
began = time.monotonic()
cloud.kill(late)
assert time.monotonic() - began < 2
assert cloud.status(late) == ["killed", "killed"]
try:
    cloud.result(cloud.call(jobs.abort))
except cloud.CloudException as exc:
    assert "SIGABRT" in str(exc)
much = cloud.call(jobs.print_much, 20_000_000)
assert cloud.result(much) == 20_000_000
assert len(cloud.info(much)[much]["stdout"]) == 64_000
"""


@pytest.fixture
def without(program: Start, tmp_path: Path) -> Start:
    """Start a program on a system without a feature."""

    def start(feature: str, source: str, **options: object) -> Program:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(dedent(WITHOUT[feature]))
        return program(source, env={"PYTHONPATH": f"{folder}:{REPO}"}, **options)

    return start


@pytest.mark.parametrize("feature", WITHOUT)
def test_the_basics(without: Start, feature: str) -> None:
    started = without(feature, BASICS + "print('fine')")
    assert started.succeeded(40) == "fine\n"
    started.left_nothing(2)


@pytest.mark.parametrize("feature", ["memfd", "prctl", "all of it"])
def test_the_basics_after_the_template_was_killed(without: Start, feature: str) -> None:
    kill = "os.kill(cloud._cloud.backend.engine.executor._template._pid, 9)\n"
    started = without(feature, BASICS + kill + BASICS + "print('fine')")
    assert started.succeeded(40) == "fine\n"
    started.left_nothing(2)


@pytest.mark.parametrize("feature", ["prctl", "all of it"])
@pytest.mark.parametrize("ending", ["sys.exit()", "os.kill(os.getpid(), 9)"], ids=["exit", "SIGKILL"])
def test_the_end_without_subreapers(without: Start, feature: str, ending: str) -> None:
    # Children are still found by their process group; those that left it are not.
    started = without(
        feature,
        f"""
        import os, sys, time
        import cloud.mp as cloud
        from tests.integration import jobs
        def family():
            jobs.start_child("witness")
            jobs.note("witness", "ready")
            time.sleep(600)
        cloud.call(family)
        cloud.call(jobs.swallow_everything, "witness")
        def text(): return open("witness").read() if os.path.exists("witness") else ""
        while "ready" not in text() or "stubborn" not in text(): time.sleep(0.005)
        {ending}
        """,
    )
    started.ended()
    pids = [int(line.split()[1]) for line in lines_of(started.folder / "witness") if " " in line]
    assert len(pids) == 2
    until(lambda: not any(map(exists, pids)), "they are gone", limit_s=2)
    started.left_nothing(2)


def test_forking_fails(program: Start, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import errno, os\n"
        "real = os.fork\n"
        "def fork():\n"
        "    if os.path.exists('no-forks'): raise BlockingIOError(errno.EAGAIN, 'no more processes')\n"
        "    return real()\n"
        "os.fork = fork\n"
    )
    out = program(
        """
        import os
        import cloud.mp as cloud
        open("no-forks", "w").close()
        try:
            cloud.result(cloud.call(abs, -1), timeout=10)
        except cloud.CloudException as exc:
            print(type(exc).__name__, "could not be started" in str(exc), os.strerror(11) in str(exc))
        os.unlink("no-forks")
        print(cloud.result(cloud.map(abs, range(5)), timeout=10))
        """,
        env={"PYTHONPATH": f"{folder}:{REPO}", "CLOUD_NUM_PROCS": "2"},
    ).succeeded()
    assert out == "WorkerLost True True\n[0, 1, 2, 3, 4]\n"


def test_a_worker_that_ends_as_it_starts(program: Start, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.argv == ['-c']:\n"
        "    os.register_at_fork(after_in_child=lambda: os.path.exists('no-starts') and os._exit(9))\n"
    )
    out = program(
        """
        import os
        import cloud.mp as cloud
        open("no-starts", "w").close()
        for _ in range(2):
            try:
                cloud.result(cloud.call(abs, -1), timeout=10)
            except cloud.CloudException as exc:
                print(type(exc).__name__, "cannot be started" in str(exc), "code 9" in str(exc))
        os.unlink("no-starts")
        print(cloud.result(cloud.map(abs, range(5)), timeout=10))
        """,
        env={"PYTHONPATH": f"{folder}:{REPO}", "CLOUD_NUM_PROCS": "2"},
    ).succeeded()
    assert out == "WorkerLost True True\nWorkerLost True True\n[0, 1, 2, 3, 4]\n"


def test_a_template_that_fails_as_it_starts(program: Start, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\nif sys.argv == ['-c'] and os.path.exists('no-starts'):\n    os._exit(9)\n"
    )
    out = program(
        """
        import os, time
        import cloud.mp as cloud
        open("no-starts", "w").close()
        try:
            cloud.result(cloud.map(abs, range(20)), timeout=20)
        except cloud.CloudException as exc:
            print(type(exc).__name__, "cannot be started" in str(exc))
        cloud.join(cloud.find(), ignore_errors=True, timeout=20)
        os.unlink("no-starts")
        print(cloud.result(cloud.map(abs, range(5)), timeout=10))
        """,
        env={"PYTHONPATH": f"{folder}:{REPO}", "CLOUD_NUM_PROCS": "2"},
    ).succeeded()
    assert out == "WorkerLost True\n[0, 1, 2, 3, 4]\n"


@pytest.mark.parametrize("missing", ["fork", "posix_spawn"])
def test_a_system_that_cannot_do_it_says_so(program: Start, missing: str) -> None:
    out = program(
        f"""
        import os
        del os.{missing}
        import cloud.mp as cloud
        try:
            cloud.result(cloud.call(abs, -1), timeout=10)
        except cloud.CloudException as exc:
            print(type(exc).__name__, "start_simulator" in str(exc))
        """
    ).succeeded()
    assert out == "UnsupportedOperation True\n"


def test_signal_numbers_exist() -> None:
    # What the tests above rely on.
    assert signal.SIGKILL == 9
    assert os.strerror(11)
