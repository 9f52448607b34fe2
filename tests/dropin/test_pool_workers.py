"""The workers of a pool: initializers, what they inherit, when they are replaced, where they print."""

from __future__ import annotations

import ctypes
import functools
import io
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import pytest

from cloud.errors import InitializerFailed, WorkerLost
from cloud.pool import Pool
from tests.dropin import pool_functions as fn
from tests.integration.jobs import exit_with
from tests.integration.support import lines_of, until
from tests.scripts import ScriptRunner

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True, scope="module")
def _what_multiprocessing_keeps() -> None:
    # Its tracker, its shared memory and its temporary folder stay until exit, whoever needed them first.
    resource_tracker.ensure_running()
    multiprocessing.Value("i")
    vars(multiprocessing.process.current_process())["_config"].setdefault("tempdir", tempfile.mkdtemp())


# --- initializers -----------------------------------------------------------------------------------------------------


def test_an_initializer_runs_once_in_each_worker(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    with Pool(2, fn.remember_and_note, (str(witness), 1, "two")) as pool:
        states = pool.map(fn.remembered, range(20))
        assert [state for _, state in states] == [[1, "two"]] * 20
        assert {pid for pid, _ in states} <= {int(line.split()[1]) for line in lines_of(witness)}
        # The map may be over before the second worker has started.
        until(lambda: len(lines_of(witness)) == 2, "both have begun")
        assert pool.map(fn.remembered, range(20))
        assert len(lines_of(witness)) == 2
    pool.join()


def test_an_initializer_runs_without_a_task(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    pool = Pool(2, fn.remember_and_note, (str(witness),))
    pool.close()
    pool.join()
    assert len(lines_of(witness)) == 2


def test_an_initializer_may_be_a_closure() -> None:
    here = {"a": [1]}
    with Pool(1, lambda: fn.remember(here)) as pool:
        assert pool.apply(fn.remembered)[1] == [{"a": [1]}]
    pool.join()


@pytest.mark.parametrize("context", [None, FORK], ids=["template", "fork"])
def test_an_initializer_that_raises_fails_every_task(context: Any) -> None:
    with Pool(2, fn.refuse, context=context) as pool:
        for call in (
            lambda: pool.apply(fn.square, (2,)),
            lambda: pool.map(fn.square, range(5)),
            lambda: next(pool.imap(fn.square, range(5))),
        ):
            with pytest.raises(InitializerFailed, match="this initializer always fails") as raised:
                call()
            assert isinstance(raised.value.__cause__, ValueError)
    pool.join()


@pytest.mark.parametrize("end", [functools.partial(exit_with, 3), functools.partial(sys.exit, "no"), os.abort])
def test_an_initializer_that_ends_its_process_fails_the_tasks(end: Any) -> None:
    with Pool(2, end) as pool:
        results = [pool.apply_async(fn.square, (i,)) for i in range(3)]
        for result in results:
            with pytest.raises((WorkerLost, InitializerFailed)):
                result.get(20)
    pool.join()


def test_what_an_initializer_changes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWANTED", "here")
    folder = str(tmp_path)
    wanted = (folder, "yes", None, folder, True)
    with Pool(1, fn.settle_in, (folder,)) as pool:
        assert pool.apply(fn.surroundings, (True,)) == wanted
        assert pool.apply(fn.surroundings, (False,)) == wanted
        monkeypatch.setenv("LATER", "set after the pool began")
        monkeypatch.chdir("/")
        assert pool.apply(fn.surroundings, (False,)) == wanted
        assert pool.apply(os.environ.get, ("LATER",)) == "set after the pool began"
    pool.join()


def test_what_functions_bound_before_the_fork_change_is_put_back(tmp_path: Path) -> None:
    with Pool(1, context=multiprocessing.get_context("fork")) as pool:
        before = pool.apply(os.getcwd)
        pool.apply(fn.go_to_and_tell, (str(tmp_path),))
        assert pool.apply(os.getcwd) == before
    pool.join()


def test_where_an_initializer_sends_stdout_it_stays(tmp_path: Path) -> None:
    def redirect(path: str) -> None:
        sys.stdout = open(path, "w", encoding="utf-8")

    log = tmp_path / "log"
    with Pool(1, redirect, (str(log),)) as pool:
        pool.map(lambda x: print("task", x), range(3))
    pool.join()
    assert log.read_text().splitlines() == ["task 0", "task 1", "task 2"]


@pytest.mark.parametrize("context", [None, FORK], ids=["template", "fork"])
def test_a_replaced_worker_is_initialized_anew(context: Any, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    with Pool(1, fn.remember_and_note, (str(witness), "state"), context=context) as pool:
        first = pool.apply(fn.remembered)
        with pytest.raises(WorkerLost) as raised:
            pool.apply(exit_with, (3,))
        assert raised.value.exitcode == 3
        second = pool.apply(fn.remembered)
        assert first[1] == second[1] == ["state"]
        assert first[0] != second[0]
        assert {line.split()[1] for line in lines_of(witness)} == {str(first[0]), str(second[0])}
    pool.join()


# --- replaced after so many tasks -------------------------------------------------------------------------------------


def test_a_worker_is_replaced_after_so_many_tasks() -> None:
    with Pool(2, maxtasksperchild=3) as pool:
        pids = [result.get() for result in [pool.apply_async(os.getpid) for _ in range(12)]]
        assert max(Counter(pids).values()) <= 3
        assert len(set(pids)) >= 4
        with pytest.raises(KeyError):
            pool.apply(fn.fail_if_odd, (1,))
    pool.join()


@pytest.mark.parametrize("verb", ["map", "imap", "imap_unordered"])
def test_a_chunk_counts_as_one_task(verb: str) -> None:
    with Pool(2, maxtasksperchild=2) as pool:
        pids = list(getattr(pool, verb)(fn.pid_of, range(40), 5))
        counts = Counter(pids)
        assert 2 < max(counts.values()) <= 10
        assert len(counts) >= 4
    pool.join()


def test_the_last_task_of_a_worker_is_reported(tmp_path: Path) -> None:
    with Pool(1, maxtasksperchild=1) as pool:
        assert pool.map(fn.square, range(5), 1) == [0, 1, 4, 9, 16]
        assert sorted(pool.imap_unordered(fn.square, range(5))) == [0, 1, 4, 9, 16]
    pool.join()


# --- what is inherited ------------------------------------------------------------------------------------------------


def test_locks_and_values_travel_through_initargs() -> None:
    value = multiprocessing.Value("i", 0)
    with Pool(2, fn.remember, (value,)) as pool:
        pool.map(fn.add_to_shared, range(100))
        assert value.value == sum(range(100))
    pool.join()


def test_arrays_without_a_lock_are_shared_not_copied() -> None:
    array = RawArray(ctypes.c_int, 10)
    with Pool(2, fn.remember, (array,)) as pool:
        pool.map(lambda i: fn.STATE[0].__setitem__(i, i * i), range(10))
        assert list(array) == [i * i for i in range(10)]
    pool.join()


def test_queues_hand_over_what_they_hold_before_workers_end() -> None:
    queue = multiprocessing.Queue()
    pool = Pool(2, fn.remember, (queue,))
    # Small things: the feeder thread of a queue writes them later.
    pool.map(fn.put_on_shared, range(200))
    pool.close()
    pool.join()
    assert sorted(queue.get(timeout=10) for _ in range(200)) == list(range(200))
    queue.close()
    queue.join_thread()


def test_open_files_travel_through_initargs(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:

        def write(x: int) -> None:
            fn.STATE[0].write(f"{x}\n")
            fn.STATE[0].flush()

        with Pool(1, fn.remember, (file,)) as pool:
            pool.map(write, range(3))
        pool.join()
    assert lines_of(tmp_path / "log") == ["0", "1", "2"]


def test_proxies_of_managers_travel_in_arguments() -> None:
    with multiprocessing.Manager() as manager:
        shared = manager.dict()
        queue = manager.Queue()
        with Pool(2) as pool:
            pool.starmap(lambda d, i: d.__setitem__(i, os.getpid()), [(shared, i) for i in range(5)])
            pool.map(queue.put, range(5))
        pool.join()
        assert sorted(shared.keys()) == list(range(5))
        assert os.getpid() not in shared.values()
        assert sorted(queue.get() for _ in range(5)) == list(range(5))


def test_connections_travel_in_arguments() -> None:
    ours, theirs = multiprocessing.Pipe()
    with Pool(1) as pool:
        pool.apply(lambda end: end.send("from the task"), (theirs,))
        assert ours.recv() == "from the task"
    pool.join()
    ours.close()
    theirs.close()
    multiprocessing.resource_sharer.stop()  # type: ignore[attr-defined]


def test_a_context_of_fork_hands_on_this_program() -> None:
    before = fn.STATE[:]
    fn.STATE[:] = [threading.Lock(), "as it was"]
    try:
        with Pool(1, context=FORK) as pool:
            fn.STATE[1] = "changed later"
            assert pool.apply(lambda: fn.STATE[1]) == "as it was"
            assert pool.apply(lambda: fn.STATE[0].acquire(timeout=5))
            with pytest.raises(WorkerLost):
                pool.apply(exit_with, (1,))
            assert pool.apply(lambda: fn.STATE[1]) == "as it was"
        pool.join()
        with Pool(1, context=multiprocessing.get_context("spawn")) as pool:
            assert pool.apply(lambda: __import__("tests.dropin.pool_functions", fromlist=["STATE"]).STATE) == []
        pool.join()
    finally:
        fn.STATE[:] = before


def test_workers_are_processes_of_multiprocessing() -> None:
    def who() -> tuple[Any, ...]:
        process, parent = multiprocessing.current_process(), multiprocessing.parent_process()
        assert parent is not None
        return process.name, process.pid == os.getpid(), bytes(process.authkey), parent.pid, parent.is_alive()

    for context in (None, FORK):
        with Pool(1, context=context) as pool:
            authkey = bytes(multiprocessing.current_process().authkey)
            assert pool.apply(who) == ("CloudPoolWorker-1", True, authkey, os.getpid(), True)
        pool.join()


def test_tasks_may_start_processes_of_multiprocessing() -> None:
    def start() -> int | None:
        process = multiprocessing.get_context("fork").Process(target=os._exit, args=(5,))
        process.start()
        process.join()
        return process.exitcode

    with Pool(1) as pool:
        assert pool.apply(start) == 5
    pool.join()


def test_a_task_may_have_a_pool() -> None:
    def inner(n: int) -> list[int]:
        with Pool(2) as pool:
            return pool.map(fn.square, range(n))

    with Pool(2) as pool:
        assert pool.map(inner, [3, 4]) == [[0, 1, 4], [0, 1, 4, 9]]
    pool.join()


MAIN = """
import multiprocessing
from cloud.pool import Pool

{setting}

if __name__ == "__main__":
    {preparation}
    with Pool(2{arguments}) as pool:
        {use}
    pool.join()
"""

PROGRAMS = {
    "a global set by the initializer": (
        "shared = None\ndef init(x):\n    global shared\n    shared = x\ndef work(i):\n    return shared + i",
        "pass",
        ", init, (100,)",
        "print(pool.map(work, range(3)), shared)",
        "[100, 101, 102] None",
    ),
    "a lock in initargs, kept in a global": (
        "lock = total = None\n"
        "def init(l, t):\n    global lock, total\n    lock, total = l, t\n"
        "def work(i):\n    with lock:\n        total.value += i\n    return i",
        "t = multiprocessing.Value('i', 0, lock=False)",
        ", init, (multiprocessing.Lock(), t)",
        "print(sum(pool.map(work, range(100))), t.value)",
        "4950 4950",
    ),
    "a lock that is a global": (
        "lock = multiprocessing.Lock()\ntotal = multiprocessing.Value('i', 0, lock=False)\n"
        "def work(i):\n    with lock:\n        total.value += i",
        "pass",
        "",
        "pool.map(work, range(100)); list(pool.imap(work, range(10))); pool.apply(work, (5,)); print(total.value)",
        "5000",
    ),
    "a class of the program, there and back": (
        "class Point:\n    def __init__(self, x): self.x = x\n    def __eq__(self, other): return self.x == other.x\n"
        "def work(p):\n    assert type(p) is Point\n    return Point(p.x + 1)",
        "pass",
        "",
        "found = pool.map(work, [Point(1), Point(2)]); print(found == [Point(2), Point(3)], type(found[0]) is Point)",
        "True True",
    ),
    "the same, forked": (
        "class Point:\n    def __init__(self, x): self.x = x\n    def __eq__(self, other): return self.x == other.x\n"
        "def work(p):\n    assert type(p) is Point\n    return Point(p.x + 1)",
        "pass",
        ", context=multiprocessing.get_context('fork')",
        "found = pool.map(work, [Point(1), Point(2)]); print(found == [Point(2), Point(3)], type(found[0]) is Point)",
        "True True",
    ),
    "a function defined after a forked pool began": (
        "def outer(x):\n    return later(x) + 1",
        "pass",
        ", context=multiprocessing.get_context('fork')",
        "globals()['later'] = lambda x: 10 * x; print(pool.map(outer, [1]), pool.map(lambda x: later(x), [2]))",
        "[11] [20]",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program(name: str, run_script: ScriptRunner) -> None:
    setting, preparation, arguments, use, wanted = PROGRAMS[name]
    source = MAIN.format(setting=setting, preparation=preparation, arguments=arguments, use=use)
    result = run_script(source)
    assert result.stdout.strip() == wanted
    assert result.stderr == ""


# --- where they print -------------------------------------------------------------------------------------------------

PRINTING = """
import os, sys
from cloud.pool import Pool

def work(i):
    print("out", i)
    sys.stderr.write(f"err {i}\\n")
    os.write(1, f"low {i}\\n".encode())
    os.system(f"echo child {i}")
    sys.stdout.write("unfinished")

if __name__ == "__main__":
    with Pool(1, initializer=print, initargs=("init",)%s) as pool:
        for i in range(2):
            pool.apply(work, (i,))
            print("\\nback", i, flush=True)
"""


@pytest.mark.parametrize("context", ["", ", context=__import__('multiprocessing').get_context('fork')"])
def test_tasks_print_where_the_program_prints(context: str, run_script: ScriptRunner) -> None:
    result = run_script(PRINTING % context)
    wanted = ["init"]
    for i in range(2):
        wanted += [f"out {i}", f"low {i}", f"child {i}", "unfinished", f"back {i}"]
    assert result.stdout.splitlines() == wanted
    assert result.stderr.splitlines() == ["err 0", "err 1"]


def test_what_the_program_has_not_flushed_is_written_once(run_script: ScriptRunner) -> None:
    result = run_script(
        """
        import multiprocessing, sys
        from cloud.pool import Pool

        if __name__ == "__main__":
            sys.stdout.write("once ")
            with Pool(2, context=multiprocessing.get_context("fork")) as pool:
                pool.map(print, ["line", "line"])
            pool.join()
        """
    )
    assert sorted(result.stdout.split()) == ["line", "line", "once"]


# --- their number -----------------------------------------------------------------------------------------------------


def test_workers_end_after_close_even_if_nobody_joins() -> None:
    pool = Pool(2)
    pids = set(pool.map(fn.pid_of, range(10)))
    result = pool.apply_async(fn.pid_after, (0.1,))
    pool.close()
    assert result.get() in pids | {result.get()}
    from tests.integration.support import exists

    until(lambda: not any(exists(pid) for pid in pids), "the workers end")
    pool.terminate()


def test_a_forgotten_pool_ends_its_workers() -> None:
    pool = Pool(2)
    pids = set(pool.map(fn.pid_of, range(10)))
    with pytest.warns(ResourceWarning, match="unclosed running"):
        del pool
        import gc

        gc.collect()
    from tests.integration.support import exists

    until(lambda: not any(exists(pid) for pid in pids), "the workers end")


def test_large_initargs_reach_all_workers() -> None:
    block = bytes(range(256)) * 4096 * 4
    with Pool(2, fn.remember, (block,)) as pool:
        assert pool.map(lambda _: fn.STATE[0] == bytes(range(256)) * 4096 * 4, range(4)) == [True] * 4
    pool.join()


def test_a_pool_starts_quickly() -> None:
    began = time.monotonic()
    with Pool(2) as pool:
        assert pool.apply(fn.square, (2,)) == 4
    pool.join()
    assert time.monotonic() - began < 10
    assert isinstance(sys.stdout, io.TextIOBase) or sys.stdout is not None


def test_shared_memory_that_tasks_look_at_stays(run_script: ScriptRunner) -> None:
    result = run_script(
        """
        from multiprocessing.shared_memory import SharedMemory
        from cloud.pool import Pool

        def look(name):
            memory = SharedMemory(name)
            memory.buf[0] += 1
            memory.close()

        if __name__ == "__main__":
            for early in (True, False):
                pool = Pool(2)
                if not early:
                    pool.map(abs, range(10))
                memory = SharedMemory(create=True, size=100)
                pool.map(look, [memory.name] * 5)
                pool.close()
                pool.join()
                again = SharedMemory(memory.name)
                assert again.buf[0] >= 2
                again.close()
                memory.close()
                memory.unlink()
            print("fine")
        """
    )
    assert result.stdout == "fine\n"
    assert result.stderr == ""
