"""The ways in which users write and start programs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from cloud.client.cloud import Cloud
from tests.integration.support import Program
from tests.scripts import MODES, REPO, Mode, ScriptRunner, program_environment

Start = Callable[..., Program]

NO_GUARD = """
    import os, sys
    import cloud.mp as cloud

    print("the program itself")
    CALLS = 0

    class Point:
        def __init__(self, x, y):
            self.x, self.y = x, y
        def __eq__(self, other):
            return (self.x, self.y) == (other.x, other.y)

    class Odd(Exception):
        def __init__(self, number):
            super().__init__(number)
            self.number = number

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    def mirrored(point):
        return Point(point.y, point.x)

    def refused(n):
        raise Odd(n)

    def counted():
        global CALLS
        CALLS += 1
        return CALLS, os.getpid()

    offset = 10
    assert cloud.result(cloud.call(lambda x: x + offset, 1)) == 11
    assert cloud.result(cloud.map(even, range(6))) == [True, False] * 3
    assert cloud.result(cloud.call(mirrored, Point(1, 2))) == Point(2, 1)
    assert type(cloud.result(cloud.call(mirrored, Point(1, 2)))) is Point
    try:
        cloud.result(cloud.call(refused, 3))
    except cloud.CloudException as exc:
        assert type(exc.__cause__) is Odd and exc.__cause__.number == 3, repr(exc.__cause__)
    else:
        raise AssertionError("no error")
    by_worker = {}
    for count, pid in cloud.result(cloud.map(lambda _: counted(), range(20))):
        by_worker.setdefault(pid, []).append(count)
    # Not in the order of the items: a worker may be given what was taken back from another.
    assert all(sorted(counts) == list(range(1, len(counts) + 1)) for counts in by_worker.values()), by_worker
    assert CALLS == 0
    print("fine")
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_program_without_a_guard(run_script: ScriptRunner, mode: Mode) -> None:
    done = run_script(NO_GUARD, mode=mode)
    assert done.stdout == "the program itself\nfine\n"
    assert done.stderr == ""


def test_a_package_run_with_m(program: Start, tmp_path: Path) -> None:
    package = tmp_path / "program0" / "tool"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sums.py").write_text("def total(values): return sum(values)\n")
    (package / "__main__.py").write_text(
        "import cloud.mp\n"
        "from .sums import total\n"
        "from . import sums\n"
        "def both(values): return total(values), sums.total(values)\n"
        "print(cloud.mp.result(cloud.mp.call(both, [1, 2])), cloud.mp.result(cloud.mp.call(total, [3])))\n"
    )
    started = program("import runpy; runpy.run_module('tool', run_name='__main__', alter_sys=True)")
    assert started.succeeded() == "(3, 3) 3\n"
    command = [sys.executable, "-m", "tool"]
    done = subprocess.run(
        command, cwd=package.parent, env=program_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("(3, 3) 3\n", "")


@pytest.mark.parametrize(
    "how",
    [
        ["-m", "cProfile", "-o", "profile.out", "guarded.py"],
        ["-m", "trace", "--count", "-C", "counts", "guarded.py"],
        ["-c", "import runpy; runpy.run_path('guarded.py', run_name='__main__')"],
        ["-c", "exec(open('guarded.py').read())"],
        ["-c", "exec(compile(open('guarded.py').read(), 'guarded.py', 'exec'), {'__name__': '__main__'})"],
        ["-i", "guarded.py"],
    ],
    ids=lambda how: how[1][:20],
)
def test_a_program_run_by_another(tmp_path: Path, how: list[str], run_script: ScriptRunner) -> None:
    # Its globals are those of a module that is called __main__, and may be no module's at all.
    # Closed at its end: trace counts the lines of our helper thread too, and trips over those that come while it writes.
    source = dedent(NO_GUARD.replace("CALLS == 0", "True")) + "cloud.close()\n"
    (run_script.folder / "guarded.py").write_text(source)
    command = [sys.executable, *how]
    done = subprocess.run(
        command,
        cwd=run_script.folder,
        env=program_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("the program itself\nfine\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_functions_of_a_module_beside_a_one_liner(run_script: ScriptRunner) -> None:
    (run_script.folder / "beside.py").write_text("def f(x): return x + 1, __name__\nclass C: pass\n")
    done = run_script(
        "import beside, cloud.mp as cloud; "
        "print(cloud.result(cloud.call(beside.f, 1)), type(cloud.result(cloud.call(beside.C))) is beside.C)",
        mode="-c",
    )
    assert done.stdout == "(2, 'beside') True\n"


def test_the_package_itself_in_a_zip_file(tmp_path: Path) -> None:
    archive = tmp_path / "whole.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for module in (REPO / "cloud").rglob("*.py"):
            file.write(module, module.relative_to(REPO))
        file.writestr("__main__.py", dedent(NO_GUARD))
    path = os.pathsep.join(each for each in sys.path if each and Path(each) != REPO)
    done = subprocess.run(
        [sys.executable, str(archive)],
        cwd=tmp_path,
        env={**program_environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("the program itself\nfine\n", "")


CELLS = """
    import cloud.mp as cloud

    cells = [
        "import cloud.mp as cloud, os\\ndef f(x): return x + 1",
        "first = cloud.result(cloud.call(f, 1))",
        "def f(x): return x + 100",
        "second = cloud.result(cloud.call(f, 1))",
        "def g(x): return f(x) * factor\\nfactor = 2",
        "third = cloud.result(cloud.call(g, 1))",
        "factor = 3",
        "fourth = cloud.result(cloud.call(g, 1))",
        "class A:\\n    def f(self): return 'old'",
        "a = A()\\nfifth = cloud.result(cloud.call(lambda: a.f()))",
        "class A:\\n    def f(self): return 'new'",
        "a = A()\\nsixth = cloud.result(cloud.call(lambda: a.f()))",
        "table = []\\ndef grow(): table.append(1); return len(table)",
        "grown = [cloud.result(cloud.call(grow, _cores=cloud.connection_info()['num_procs'])) for _ in range(3)]",
        "print(first, second, third, fourth, fifth, sixth, sorted(grown)[-1] > 1, len(table))",
    ]
"""
CELLS_DONE = "2 101 202 303 old new True 0\n"


def test_cells_of_a_notebook(program: Start) -> None:
    run = """
    import sys, types
    kernel = types.ModuleType("__main__")
    sys.modules["__main__"] = kernel   # as IPython does with its user namespace
    for number, cell in enumerate(cells):
        exec(compile(cell, f"<ipython-input-{number}>", "exec"), kernel.__dict__)
    """
    assert program(CELLS + run, env={"CLOUD_NUM_PROCS": "1"}).succeeded() == CELLS_DONE


def test_an_interactive_console(program: Start) -> None:
    run = """
    import code
    console = code.InteractiveConsole({"__name__": "__main__"})
    import sys
    console.locals = sys.modules["__main__"].__dict__
    for cell in cells:
        console.runsource(cell + "\\n", symbol="exec")
    """
    assert program(CELLS + run, env={"CLOUD_NUM_PROCS": "1"}).succeeded() == CELLS_DONE


def test_functions_that_a_program_makes_again_and_again(program: Start) -> None:
    assert (
        program(
            """
        import cloud.mp as cloud

        SCALE = 10

        def helper(x):
            return x * SCALE

        def scaled(n):
            return lambda x=n: (helper(n), x)

        def counter(n):
            def count():
                nonlocal n
                n += 1
                return n
            return count

        if __name__ == "__main__":
            for n in range(4):
                assert cloud.result(cloud.call(scaled(n))) == (10 * n, n)
            SCALE = 20
            jids = [cloud.call(scaled(n)) for n in range(300)]
            assert cloud.result(jids) == [(20 * n, n) for n in range(300)]
            one = scaled(1)
            assert cloud.result([cloud.call(one) for _ in range(4)]) == [(20, 1)] * 4
            counters = [counter(0), counter(5)]
            assert [cloud.result(cloud.call(counters[n % 2])) for n in range(6)] == [1, 6] * 3
            assert [cloud.result(cloud.call(counters[0])) for _ in range(3)] == [1] * 3
            print("all is well")
        """
        ).succeeded()
        == "all is well\n"
    )


def test_a_function_of_a_namespace_that_is_no_module(program: Start) -> None:
    assert (
        program(
            """
        import cloud.mp as cloud
        namespace = {}
        exec("k = 5\\ndef f(x): return g(x) + k\\ndef g(x): return 2 * x", namespace)
        print(cloud.result(cloud.call(namespace["f"], 1)))
        """
        ).succeeded()
        == "7\n"
    )


def test_inside_pytest(program: Start, tmp_path: Path) -> None:
    folder = tmp_path / "program0"
    folder.mkdir()
    (folder / "test_users.py").write_text(
        "import cloud, cloud.mp, pytest\n"
        "def double(x): return 2 * x\n"
        "class TestIt:\n"
        "    def half(self, x): return x / 2\n"
        "    @pytest.mark.parametrize('x', [1, 2])\n"
        "    def test_verbs(self, x, capfd):\n"
        "        assert cloud.mp.result(cloud.mp.call(double, x)) == 2 * x\n"
        "        assert cloud.mp.result(cloud.mp.call(lambda: x)) == x\n"
        "        assert cloud.mp.result(cloud.mp.call(self.half, x)) == x / 2\n"
        "    def test_error(self):\n"
        "        with pytest.raises(cloud.CloudException, match='division'):\n"
        "            cloud.mp.result(cloud.mp.call(lambda: 1 / 0))\n"
    )
    run = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-W', 'error', 'test_users.py']))"
    assert "3 passed" in program(run).succeeded()


def test_in_threads(mp: Cloud) -> None:
    values: list[object] = []

    def work(number: int) -> None:
        jids = [mp.call(lambda x: x * number, x) for x in range(20)]
        values.append(mp.result(jids) == [x * number for x in range(20)])
        values.append(mp.result(mp.map(lambda x: x * number, range(50))) == [x * number for x in range(50)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert values == [True] * 16


def test_started_in_a_thread_that_ends(program: Start) -> None:
    # A parent-death signal would fire when the thread that started the workers ends.
    assert (
        program(
            """
        import threading, time
        import cloud.mp as cloud
        jids = []
        starter = threading.Thread(target=lambda: jids.append(cloud.call(lambda: time.sleep(0.3) or "done")))
        starter.start(); starter.join()
        while any(thread.name == starter.name for thread in threading.enumerate()): pass
        print(cloud.result(jids[0]), cloud.result(cloud.call(abs, -1)), cloud.info(jids[0], "attempt")[jids[0]])
        """
        ).succeeded()
        == "done 1 {'attempt': 1}\n"
    )


FORKED = """
    import os, sys, threading, time, multiprocessing
    import cloud.mp as cloud

    def in_child(number=0):
        try:
            cloud.status(running)
            return "the child sees the parent's job"
        except cloud.CloudException as exc:
            if "Does not exist" not in str(exc):
                return repr(exc)
        jid = cloud.call(lambda: ("child", os.getppid() != parent))
        first = jid
        value = cloud.result([jid, *cloud.map(lambda x: x * x, range(3))])
        return "fine" if (first, value) == (1, [("child", True), 0, 1, 4]) else repr((first, value))

    if __name__ == "__main__":
        parent = os.getpid()
        warm = cloud.result(cloud.map(abs, range(10)))
        running = cloud.call(lambda: time.sleep(0.5) or "parent's")
"""

FORKS = {
    "os.fork": """
        children = []
        for _ in range(2):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(write, in_child().encode())
                os._exit(0)
            os.close(write)
            children.append((pid, read))
        for pid, read in children:
            print(os.read(read, 1000).decode(), os.waitpid(pid, 0)[1])
    """,
    "os.fork, sys.exit": """
        pid = os.fork()
        if pid == 0:
            sys.exit(0 if in_child() == "fine" else 1)
        print("fine", os.waitpid(pid, 0)[1])
        pid = os.fork()
        if pid == 0:
            sys.exit(0)   # never used cloud; its exit must not touch the parent's workers
        print("fine", os.waitpid(pid, 0)[1])
    """,
    "fork in a thread": """
        def fork():
            pid = os.fork()
            if pid == 0:
                os._exit(0 if in_child() == "fine" else 1)
            print("fine", os.waitpid(pid, 0)[1])
        for _ in range(2):
            thread = threading.Thread(target=fork); thread.start(); thread.join()
    """,
    "multiprocessing fork": """
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for answer in pool.map(in_child, range(2), chunksize=1):
                print(answer if answer.startswith("fine") or "Does not" in answer else answer, 0)
    """,
    "while others wait and submit": """
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                cloud.result(cloud.map(abs, range(5)))
        threads = [threading.Thread(target=busy) for _ in range(3)]
        for thread in threads: thread.start()
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if in_child() == "fine" else 1)
            print("fine", os.waitpid(pid, 0)[1])
        stop.set()
        for thread in threads: thread.join()
    """,
}


@pytest.mark.parametrize("how", FORKS)
def test_a_forked_child_starts_anew(program: Start, how: str) -> None:
    # jids of a child begin at 1 again, so the second worker of a pool, which shares nothing, sees the same.
    end = """
        print(cloud.result(running), cloud.result(cloud.call(abs, -7)))
    """
    started = program(FORKED + FORKS[how] + end)
    assert started.succeeded() == "fine 0\nfine 0\nparent's 7\n"
    started.left_nothing(2)


def test_a_spawned_child_starts_anew(program: Start) -> None:
    body = """
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            print(pool.apply(spawned))
        print(cloud.result(running))
    """
    spawned = """
    def spawned():
        return cloud.result(cloud.map(lambda x: x + 1, range(3)))
    """
    assert program(spawned + FORKED + body).succeeded() == "[1, 2, 3]\nparent's\n"


@pytest.mark.parametrize("name", ["random", "json", "logging", "calendar", "uuid", "platform"])
def test_a_file_named_like_a_module_of_the_library_beside_the_program(
    program: Start, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "program0"
    folder.mkdir()
    (folder / f"{name}.py").write_text("print('imported', __name__)\nmine = 1\n")
    out = program(
        f"""
        import cloud.mp as cloud
        print(cloud.result(cloud.call(lambda: 1)), cloud.result(cloud.map(abs, range(3))))
        def uses():
            import {name}
            return {name}.mine
        jid = cloud.call(uses)
        print(cloud.result(jid), cloud.info(jid)[jid]["stdout"].strip())
        """
    ).succeeded()
    assert out == f"1 [0, 1, 2]\n1 imported {name}\n"


def test_the_template_imports_nothing_of_the_users(program: Start) -> None:
    # The second template starts when every module it needs has a namesake beside the program.
    out = program(
        """
        import os, pathlib, signal, sys
        import cloud.mp as cloud
        # What the program itself imports when it is needed is its own affair.
        print(cloud.result(cloud.call(lambda: 1)), cloud.result(cloud.map(abs, range(2))))
        for name in sorted(sys.stdlib_module_names):
            if name not in ("__main__", "site", "sitecustomize", "usercustomize"):
                pathlib.Path(f"{name}.py").write_text("raise SystemExit('imported ' + __name__)")
        template = cloud._cloud.backend.engine.executor._template._pid
        os.kill(template, signal.SIGKILL)
        print(cloud.result(cloud.call(abs, -2)), cloud.result(cloud.call(lambda: 3)))
        """
    ).succeeded()
    assert out == "1 [0, 1]\n2 3\n"


def test_a_directory_that_is_deleted(program: Start) -> None:
    out = program(
        """
        import os, shutil, tempfile
        import cloud.mp as cloud
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        print(cloud.result(cloud.call(os.getcwd)) == os.path.realpath(folder))
        shutil.rmtree(folder)
        print(cloud.result(cloud.call(abs, -1)), cloud.result(cloud.map(lambda x: x, range(3))))
        os.chdir("/")
        print(cloud.result(cloud.call(os.getcwd)))
        """
    ).succeeded()
    assert out == "True\n1 [0, 1, 2]\n/\n"


def test_a_program_whose_directory_is_gone_from_the_start(program: Start, tmp_path: Path) -> None:
    out = program(
        f"""
        import os, sys, tempfile
        os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())
        sys.path.insert(0, {str(REPO)!r})
        import cloud.mp as cloud
        print(cloud.result(cloud.call(lambda: 1)))
        """
    ).succeeded()
    assert out == "1\n"


def test_modules_on_pythonpath_only(program: Start, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "onlyhere.py").write_text("def f(x): return x, __name__\nclass C: pass\n")
    path = f"{library}:{REPO}"
    out = program(
        """
        import cloud.mp as cloud, onlyhere
        print(cloud.result(cloud.call(onlyhere.f, 1)), type(cloud.result(cloud.call(onlyhere.C))) is onlyhere.C)
        """,
        env={"PYTHONPATH": path},
    ).succeeded()
    assert out == "(1, 'onlyhere') True\n"


def test_sys_path_changes_between_submissions(program: Start, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"from_{name}.py").write_text(f"value = {name!r}\n")
    out = program(
        """
        import sys
        import cloud.mp as cloud
        print(cloud.result(cloud.call(abs, -1)))
        def value(name):
            return __import__(name).value
        for name in ("first", "second"):
            sys.path.insert(0, f"../{name}")
            print(cloud.result(cloud.call(value, f"from_{name}")))
        sys.path[:2] = []
        print(cloud.result(cloud.call(lambda: [each for each in sys.path if each.startswith("..")])))
        """
    ).succeeded()
    assert out == "1\nfirst\nsecond\n[]\n"


def test_a_module_made_and_edited_while_the_program_runs(program: Start) -> None:
    # As in any Python process, a module that a worker has imported stays; a new program sees the edit.
    source = """
        import importlib, pathlib
        import cloud.mp as cloud
        cloud.result(cloud.call(abs, -1))
        pathlib.Path("edited.py").write_text("def f(): return 'first'\\n")
        importlib.invalidate_caches()
        import edited
        print(cloud.result(cloud.call(edited.f)))
        pathlib.Path("edited.py").write_text("def f(): return 'second, and longer'\\n")
        cloud.close()
        print(cloud.result(cloud.call(edited.f)), edited.f())
    """
    assert program(source).succeeded() == "first\nsecond, and longer first\n"


@pytest.mark.parametrize(
    ("flags", "expression", "expected"),
    [
        (["-O"], "sys.flags.optimize, __debug__", "(1, False)"),
        (["-OO"], "sys.flags.optimize", "2"),
        (["-X", "utf8"], "sys.flags.utf8_mode", "1"),
        (["-W", "error"], "sys.warnoptions", "['error']"),
        (["-X", "dev"], "sys.flags.dev_mode", "True"),
        (["-B"], "sys.dont_write_bytecode", "True"),
        (["-b"], "sys.flags.bytes_warning", "1"),
        (["-X", "int_max_str_digits=5000"], "sys.flags.int_max_str_digits", "5000"),
        (["-s"], "sys.flags.no_user_site", "1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_the_interpreter_reach_jobs(program: Start, flags: list[str], expression: str, expected: str) -> None:
    out = program(
        f"""
        import sys
        import cloud.mp as cloud
        def flags():
            return {expression}
        print(cloud.result(cloud.call(flags)) == flags(), flags())
        """,
        flags=flags,
    ).succeeded()
    assert out == f"True {expected}\n"


def test_warnings_as_errors_in_a_job(program: Start) -> None:
    out = program(
        """
        import warnings
        import cloud.mp as cloud
        try:
            cloud.result(cloud.call(warnings.warn, "careful"))
        except cloud.CloudException as exc:
            print(type(exc.__cause__).__name__)
        """,
        flags=["-W", "error"],
    ).succeeded()
    assert out == "UserWarning\n"


@pytest.mark.parametrize("flags", ["-E", "-I", "-S", "-IS", "-P"])
def test_isolated_interpreters(program: Start, flags: str) -> None:
    out = program(
        f"""
        import sys
        sys.path.insert(0, {str(REPO)!r})
        import cloud.mp as cloud
        def f(x):
            return x + 1, sys.flags.isolated, sys.flags.no_site, sys.flags.ignore_environment
        value = cloud.result(cloud.call(f, 1))
        print(value == f(1), value[0], cloud.result(cloud.map(lambda x: f(x)[0], range(3))))
        import time; time.sleep(0.2)   # the template loads more when idle: that may not be there
        print(cloud.result(cloud.call(f, 2))[0])
        """,
        flags=[flags],
    ).succeeded()
    assert out == "True 2 [1, 2, 3]\n3\n"


def test_in_a_virtual_environment(program: Start, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    inner = next((folder / "lib").glob("python*/site-packages"))
    (inner / "only_in_venv.py").write_text("def where(): import sys; return sys.prefix\n")
    out = program(
        """
        import sys, only_in_venv
        import cloud.mp as cloud
        print(cloud.result(cloud.call(only_in_venv.where)) == sys.prefix != sys.base_prefix)
        """,
        python=str(folder / "bin" / "python"),
    ).succeeded()
    assert out == "True\n"


def test_a_traced_program(program: Start) -> None:
    out = program(
        """
        import sys, threading
        seen = set()
        def trace(frame, event, argument):
            seen.add(event)
            return trace
        sys.settrace(trace); threading.settrace(trace)
        import cloud.mp as cloud
        def f(x):
            return x + 1, sys.gettrace()
        print(cloud.result(cloud.call(f, 1)), [value for value, _ in cloud.result(cloud.map(f, range(50)))][-1])
        print(cloud.close(), sorted(seen)[:2])
        """
    ).succeeded()
    assert out == "(2, None) 50\nTrue ['call', 'exception']\n"


def test_development_mode_finds_nothing_to_say(program: Start) -> None:
    started = program(
        """
        import cloud.mp as cloud, faulthandler, gc, time
        assert faulthandler.is_enabled()
        def printing(x):
            print(x)
            return x
        assert cloud.result(cloud.map(printing, range(20))) == list(range(20))
        assert cloud.result(cloud.call(lambda: cloud.result(cloud.call(abs, -1)))) == 1
        late = cloud.call(time.sleep, 60)
        cloud.kill(late)
        cloud.close()
        assert cloud.result(cloud.call(abs, -1)) == 1
        gc.collect()
        """,
        flags=["-X", "dev", "-W", "error"],
    )
    assert started.succeeded() == ""
    started.left_nothing(2)
