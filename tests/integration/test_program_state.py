"""Programs whose process is in an unusual state: descriptors, limits, signals, cores."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support import Program

Start = Callable[..., Program]

USE_EVERYTHING = """
import os, pickle, sys, time
import cloud.mp as cloud

class Big:
    # Large enough to travel in a file of its own.
    def __init__(self, data):
        self.data = bytes(data)
    def __reduce_ex__(self, protocol):
        return Big, (pickle.PickleBuffer(self.data),)

def reversed_big(big):
    return Big(big.data[::-1])

def printing(x):
    print("out", x)
    print("err", x, file=sys.stderr)
    os.system("echo child")
    return x

def check():
    jid = cloud.call(printing, 1)
    assert cloud.result(jid) == 1
    facts = cloud.info(jid)[jid]
    assert facts["stdout"] == "out 1\\nchild\\n", facts
    assert facts["stderr"] == "err 1\\n", facts
    assert cloud.result(cloud.map(lambda x: x * x, range(20))) == [x * x for x in range(20)]
    assert cloud.result(cloud.call(lambda: cloud.result(cloud.call(abs, -1)))) == 1
    late = cloud.call(time.sleep, 60)
    cloud.kill(late)
    assert cloud.status(late) == "killed"
    assert cloud.result(cloud.call(len, "abc" * 1_000_000)) == 3_000_000
    content = os.urandom(1 << 20)
    assert cloud.result(cloud.call(reversed_big, Big(content))).data == content[::-1]
    many = [Big(os.urandom(300_000)) for _ in range(8)]
    assert [big.data for big in cloud.result(cloud.map(reversed_big, many))] == [big.data[::-1] for big in many]
"""


@pytest.mark.parametrize(
    "redirections",
    [">&-", "<&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "<&- >&- 2>&- 3>&- 4>&-", "</dev/null >/dev/null 2>&1"],
)
@pytest.mark.parametrize("capture", ["True", "False"], ids=["captured", "not captured"])
def test_closed_descriptors(program: Start, redirections: str, capture: str) -> None:
    checks = "check()" if capture == "True" else "assert cloud.result(cloud.map(abs, range(5))) == list(range(5))"
    started = program(
        f"{USE_EVERYTHING}\n"
        f"{checks}\n"
        "assert cloud.result(cloud.call(lambda: [os.fstat(fd) and fd for fd in (0, 1, 2)])) == [0, 1, 2]\n"
        "open('fine', 'w').write('fine')",
        redirections=redirections,
        env={"CLOUD_REDIRECT_JOB_OUTPUT": capture},
    )
    started.ended()
    assert (started.folder / "fine").read_text() == "fine"
    started.left_nothing(2)


def test_descriptors_closed_before_the_import(program: Start) -> None:
    started = program(
        f"import os\nos.closerange(0, 10)\n{USE_EVERYTHING}\ncheck()\nopen('fine', 'w').write('fine')",
    )
    started.ended()
    assert (started.folder / "fine").read_text() == "fine"


def test_stdio_closed_while_the_program_runs(program: Start) -> None:
    # What the program goes on to print to these numbers must not end up in a worker's socket.
    started = program(
        f"{USE_EVERYTHING}\n"
        "check()\n"
        "for fd in (0, 1, 2): os.close(fd)\n"
        "cloud.close()\n"
        "check()\n"
        "kept = [cloud.call(reversed_big, Big(b'a' * 300_000 + b'b')) for _ in range(6)]\n"
        "values = cloud.result(kept)\n"
        "for fd in (0, 1, 2):\n"
        "    try: os.write(fd, b'x' * 100)\n"
        "    except OSError: pass\n"
        "assert all(value.data == b'b' + b'a' * 300_000 for value in [*values, *cloud.result(kept)])\n"
        "cloud.result(cloud.call(abs, -1))\n"
        "check()\n"
        "taken = [fd for fd in (0, 1, 2) if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "open('fine', 'w').write(f'fine {taken}')",
    )
    started.ended()
    assert (started.folder / "fine").read_text() == "fine []"


def test_an_output_file_is_not_taken_for_a_jobs_output(program: Start) -> None:
    started = program(
        """
        import cloud.mp as cloud
        print("the program's own", flush=True)
        jid = cloud.call(print, "the job's")
        cloud.result(jid)
        print(cloud.info(jid)[jid]["stdout"] == "")
        """,
        env={"CLOUD_REDIRECT_JOB_OUTPUT": "False"},
    )
    assert started.succeeded() == "the program's own\nthe job's\nTrue\n"


@pytest.mark.parametrize("limit", [40, 64])
def test_few_descriptors(program: Start, limit: int) -> None:
    # More workers than descriptors: those that can be had do the work.
    started = program(
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        f"{USE_EVERYTHING}\n"
        "cloud.result(cloud.map(lambda x: time.sleep(0.01), range(40)))\n"
        "late = cloud.map(time.sleep, [60] * 20)\n"
        "cloud.kill(late)\n"
        "assert set(cloud.status(late)) == {'killed'}\n"
        "check()\n"
        "bigs = cloud.map(reversed_big, [Big(os.urandom(300_000)) for _ in range(40)])\n"
        "assert all(len(big.data) == 300_000 for big in cloud.result(bigs))\n"
        "print('fine')",
        env={"CLOUD_NUM_PROCS": "20"},
    )
    assert started.succeeded() == "fine\n"


def test_more_large_results_than_descriptors(program: Start) -> None:
    started = program(
        """
        import os, resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        import cloud.mp as cloud
        from cloud import Executor

        class Block:
            def __init__(self, content):
                self.content = content

            def __reduce_ex__(self, protocol):
                import pickle
                return Block, (pickle.PickleBuffer(self.content),)

        def block(number):
            return Block(bytearray((number % 251,)) * 270_000)

        def check(blocks):
            for number, block in enumerate(blocks):
                content = memoryview(block.content)
                assert not content.readonly and content.nbytes == 270_000
                assert content[0] == content[269_999] == number % 251, number
                content[5] = 252
            assert all(memoryview(block.content).tolist().count(252) == 1 for block in blocks[::7])

        n_open = len(os.listdir("/proc/self/fd"))
        with Executor(2) as executor:
            blocks = list(executor.map(block, range(600)))
            check(blocks)
            del blocks
        assert len(os.listdir("/proc/self/fd")) <= n_open, "all is given back"
        jids = cloud.map(block, range(600))
        for _ in range(2):
            check(cloud.result(jids))
        print("fine")
        """,
        env={"CLOUD_NUM_PROCS": "2"},
    )
    assert started.succeeded() == "fine\n"


def test_jobs_that_close_low_descriptors_have_large_results(program: Start) -> None:
    out = program(
        """
        import os
        import cloud.mp as cloud

        def large(number):
            os.closerange(3, 500)
            return bytes((number,)) * 300_000

        def small(number):
            return [large(number)]

        jids = [*cloud.map(large, range(20)), *cloud.map(small, range(20)), *(cloud.call(large, n) for n in range(20))]
        found = cloud.result(jids)
        print([content if type(content) is bytes else content[0] for content in found] == [
            bytes((number,)) * 300_000 for number in range(20)] * 3)
        """,
        env={"CLOUD_NUM_PROCS": "2"},
    ).succeeded()
    assert out == "True\n"


def test_no_descriptors_at_all(program: Start) -> None:
    # Every job reaches a final state, and the program recovers when there are descriptors again.
    out = program(
        """
        import errno, os
        import cloud.mp as cloud
        cloud.connection_info()
        cloud._cloud.backend
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as exc:
            assert exc.errno == errno.EMFILE
        try:
            cloud.result(cloud.call(abs, -1))
        except cloud.CloudException as exc:
            print(type(exc).__name__, "cannot be started" in str(exc), "Too many open files" in str(exc))
        print(cloud.status(cloud.map(abs, range(3))))
        for fd in taken:
            os.close(fd)
        print(cloud.result(cloud.map(abs, range(3))))
        """,
        env={"CLOUD_NUM_PROCS": "2"},
    ).succeeded()
    assert out == "WorkerLost True True\n['error', 'error', 'error']\n[0, 1, 2]\n"


def test_nested_jobs_that_cannot_have_workers_fail_instead_of_waiting_for_ever(program: Start) -> None:
    out = program(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        import cloud.mp as cloud
        def nest(depth):
            return depth and cloud.result(cloud.call(nest, depth - 1))
        try:
            cloud.result(cloud.call(nest, 50))
        except cloud.CloudException as exc:
            print("cannot be started" in str(exc))
        print(cloud.result(cloud.call(nest, 1)))
        """,
        env={"CLOUD_NUM_PROCS": "2"},
    ).succeeded()
    assert out == "True\n0\n"


def test_a_python_that_cannot_start(program: Start) -> None:
    out = program(
        """
        import sys
        import cloud.mp as cloud
        real, sys.executable = sys.executable, "/nonexistent/python"
        try:
            cloud.result(cloud.call(abs, -1))
        except cloud.CloudException as exc:
            print(type(exc).__name__, "/nonexistent/python" in str(exc) or "No such file" in str(exc))
        sys.executable = ""
        try:
            cloud.result(cloud.call(abs, -1))
        except cloud.CloudException as exc:
            print(type(exc).__name__, "sys.executable" in str(exc))
        sys.executable = "/bin/false"
        try:
            cloud.result(cloud.call(abs, -1), timeout=20)
        except cloud.CloudException as exc:
            print(type(exc).__name__, "cannot be started" in str(exc))
        sys.executable = real
        print(cloud.result(cloud.call(abs, -1)))
        """
    ).succeeded()
    assert out == "WorkerLost True\nWorkerLost True\nWorkerLost True\n1\n"


SIGNALS = {
    "SIGCHLD handler that reaps all": """
        def reap(number, frame):
            try:
                while os.waitpid(-1, os.WNOHANG)[0]: pass
            except ChildProcessError: pass
        signal.signal(signal.SIGCHLD, reap)
    """,
    "SIGCHLD ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "SIGINT ignored": "signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "SIGTERM ignored": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "SIGHUP ignored": "signal.signal(signal.SIGHUP, signal.SIG_IGN)",
    "SIGPIPE default": "signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
    "SIGURG handler": "signal.signal(signal.SIGURG, lambda *args: 1 / 0)",
    "all blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "a thread that waits for any child": """
        def wait():
            while not over:
                try: os.waitpid(-1, os.WNOHANG)
                except ChildProcessError: pass
                time.sleep(0.001)
        over = []
        threading.Thread(target=wait, daemon=True).start()
    """,
    "a timer": """
        ticks = []
        signal.signal(signal.SIGALRM, lambda number, frame: ticks.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
        import atexit
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    """,
    "a wake-up descriptor": """
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
    """,
    "one core": "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "umask": "os.umask(0o777)",
    "a low priority": "os.nice(5)",
    "scheduled as batch work": "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "scheduled when idle": "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))",
    "no core files, little stack": """
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))
    """,
}


@pytest.mark.parametrize("state", SIGNALS)
def test_signals_and_their_like(program: Start, state: str) -> None:
    from textwrap import dedent

    started = program(
        "import os, signal, threading, time\n"
        f"{dedent(SIGNALS[state])}\n"
        f"{USE_EVERYTHING}\n"
        "check()\n"
        "os.kill(cloud._cloud.backend.engine.executor._template._pid, signal.SIGKILL)\n"
        "check()\n"
        "cloud.close()\n"
        "check()\n"
        "print('fine')"
    )
    assert started.succeeded() == "fine\n"
    started.left_nothing(2)


def test_sigpipe_at_its_default_does_not_end_the_program(program: Start) -> None:
    # Programs that are made for pipelines restore it; the engine writes to workers that are dead already.
    out = program(
        """
        import os, signal
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        import cloud.mp as cloud
        print(cloud.result(cloud.map(abs, range(4))))
        executor = cloud._cloud.backend.engine.executor
        pids = [worker.pid for worker in executor._workers.values()] + [executor._template._pid]
        for pid in pids: os.kill(pid, signal.SIGKILL)
        def lives(pid):
            try:
                return "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2]
            except OSError:
                return False
        for pid in pids:
            while lives(pid): pass
        print(cloud.result([cloud.call(abs, -x) for x in range(4)]))
        """
    ).succeeded()
    assert out == "[0, 1, 2, 3]\n[0, 1, 2, 3]\n"


def test_jobs_have_signals_of_their_own(program: Start) -> None:
    out = program(
        """
        import os, signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGINT})
        signal.signal(signal.SIGUSR2, lambda *args: print("mine"))
        import cloud.mp as cloud
        def look():
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            return sorted(blocked), signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGCHLD)
        print(cloud.result(cloud.call(look)) == ([], signal.SIG_DFL, signal.SIG_DFL))
        """
    ).succeeded()
    assert out == "True\n"


def test_a_timeout_made_of_an_alarm(program: Start) -> None:
    # A handler that raises in the middle of a wait must not cost a result.
    out = program(
        """
        import signal, random
        import cloud.mp as cloud
        class Late(BaseException): pass   # an Exception may be caught by anybody who catches those
        def late(number, frame): raise Late
        signal.signal(signal.SIGALRM, late)
        n_late = n_called = 0
        jids = []
        for x in range(150):
            try:
                # And again: what is raised in a callback of Python's own, as imports have, is ignored.
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.002), 1.0)
                while True:
                    jid = cloud.call(abs, -x)
                    jids.append((jid, x))
                    assert cloud.result(jid) == x
            except Late:
                signal.setitimer(signal.ITIMER_REAL, 0)
                n_late += 1
        assert cloud.result([jid for jid, _ in jids]) == [x for _, x in jids]
        assert cloud.result(cloud.map(abs, range(20))) == list(range(20))
        print(n_late)
        """
    ).succeeded(40)
    assert out.splitlines()[-1] == "150"


def test_the_working_directory_cannot_be_read(program: Start, tmp_path: Path) -> None:
    out = program(
        """
        import os, tempfile
        import cloud.mp as cloud
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        jid = cloud.call(abs, -1)
        os.rmdir(folder)
        print(cloud.result(jid) if cloud.join(jid, ignore_errors=True) is None and cloud.status(jid) == "done" else 1)
        os.chdir("/")
        print(cloud.result(cloud.call(os.getcwd)))
        """
    ).succeeded()
    assert out == "1\n/\n"


def test_an_ended_stdout_reader(program: Start, tmp_path: Path) -> None:
    # As in `program | head -1`: the program dies of the pipe, or of BrokenPipeError, and leaves nothing.
    started = program(
        """
        import os, signal
        read, write = os.pipe()
        os.dup2(write, 1); os.close(write); os.close(read)
        import cloud.mp as cloud
        cloud.result(cloud.map(abs, range(10)))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print("x", flush=True)
        """
    )
    assert started.ended() == -signal.SIGPIPE
    started.left_nothing(2)
