"""Jobs that want more than a server gives: each fails alone, and is told which limit it met."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.engine.executor.cgroups import WorkerGroup, delegated
from cloud.engine.executor.setup import WorkerSetup
from cloud.engine.worker.limits import Limits
from tests.unit.served import ServedHouse, eventually

MEMORY_BYTES = 1 << 30
FILE_BYTES = 8 << 20
LIMITS = Limits(memory_bytes=MEMORY_BYTES, n_files=64, file_bytes=FILE_BYTES, n_processes=20)

ROUNDS = 30

Opener = Callable[..., ServedHouse]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    houses: list[ServedHouse] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def opened(slots: int = 2, limits: Limits = LIMITS) -> ServedHouse:
        houses.append(ServedHouse(WorkerSetup(str(scratch), limits=limits), slots))
        return houses[-1]

    yield opened
    for house in houses:
        house.engine.close()
    assert list(scratch.iterdir()) == []


def fails_alone(house: ServedHouse, function: Callable[..., Any], *args: Any) -> str:
    """Text of the error of one job among neighbours that all end well, in the same workers and in others."""

    def neighbour(number: int) -> int:
        with open(f"note{number}", "w") as file:
            file.write("x" * 1000)
        print("y" * 1000)
        return number

    before = [house.call(neighbour, number) for number in range(ROUNDS)]
    bad = house.call(function, *args)
    after = [house.call(neighbour, number) for number in range(ROUNDS)]
    text = house.error(bad)
    assert house.results(before) == house.results(after) == list(range(ROUNDS))
    assert house.engine.statuses((bad,))[0] == 4
    assert "ask the server's operator to raise it" in text
    return text


def test_100_gigabytes_are_a_memory_error(opened: Opener) -> None:
    text = fails_alone(opened(), bytearray, 100_000_000_000)
    assert "MemoryError" in text
    assert "memory limit of 1,073,741,824 bytes" in text


def test_so_are_100_gigabytes_of_c_code(opened: Opener) -> None:
    def allocate() -> None:
        import ctypes

        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        if not libc.malloc(100_000_000_000):
            raise MemoryError

    assert "memory limit of" in fails_alone(opened(), allocate)


def test_memory_that_grows_bit_by_bit_is_limited_too(opened: Opener) -> None:
    def grow() -> None:
        kept = []
        while True:
            kept.append(bytearray(1 << 20))

    assert "memory limit of" in fails_alone(opened(), grow)


def test_children_of_a_job_share_its_memory(opened: Opener) -> None:
    def spread() -> None:
        for _ in range(3):
            if not os.fork():
                kept = b"x" * (600 << 20)
                time.sleep(60 + len(kept) // (1 << 40))
                os._exit(0)
        time.sleep(60)

    assert "memory limit of" in fails_alone(opened(), spread)


def test_threads_and_their_stacks_fit_a_modest_limit(opened: Opener) -> None:
    house = opened(limits=Limits(memory_bytes=512 << 20))

    def use_threads() -> int:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(lambda n: len(bytearray(n)), [1 << 20] * 64))

    assert house.result(house.call(use_threads)) == 64 << 20


def test_a_fork_bomb_is_ended(opened: Opener) -> None:
    def bomb() -> None:
        while True:
            os.fork()

    house = opened()
    assert "limit of 20 processes" in fails_alone(house, bomb)
    eventually(lambda: house.n_workers <= 2, "processes of the bomb are left")


def test_a_fork_bomb_that_hides_is_ended(opened: Opener) -> None:
    def bomb() -> None:
        # Each generation leaves its session and its parent.
        for _ in range(40):
            if not os.fork():
                os.setsid()
                while True:
                    if os.fork():
                        time.sleep(0.02)
                        os._exit(0)
        time.sleep(60)

    assert "limit of 20 processes" in fails_alone(opened(), bomb)


def test_processes_within_the_limit_are_allowed(opened: Opener) -> None:
    house = opened()

    def start() -> list[int]:
        children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"]) for _ in range(10)]
        return [child.wait() for child in children]

    assert house.result(house.call(start)) == [0] * 10


def test_a_disk_filler_meets_the_limit_of_its_file(opened: Opener) -> None:
    def fill() -> None:
        with open("big", "wb") as file:
            while True:
                file.write(b"x" * 100_000)

    text = fails_alone(opened(), fill)
    assert "File too large" in text
    assert f"limit of {FILE_BYTES:,} bytes" in text


def test_a_flood_of_output_ends_its_job(opened: Opener) -> None:
    def flood() -> None:
        while True:
            print("x" * 10_000)

    assert f"limit of {FILE_BYTES:,} bytes" in fails_alone(opened(), flood)


def test_output_of_many_jobs_together_may_be_larger(opened: Opener) -> None:
    house = opened(1)

    def print_much() -> int:
        print("x" * (FILE_BYTES // 2))
        return os.getpid()

    assert len(set(house.results([house.call(print_much) for _ in range(10)]))) == 1


def test_too_many_open_files_end_the_job_that_opened_them(opened: Opener) -> None:
    def leak() -> None:
        import builtins

        builtins.kept = []  # type: ignore[attr-defined]
        while True:
            builtins.kept.append(open("/dev/null"))  # type: ignore[attr-defined]

    text = fails_alone(opened(), leak)
    assert "Too many open files" in text
    assert "limit of 64 open files" in text


def test_items_of_a_map_fail_one_by_one(opened: Opener) -> None:
    house = opened()

    def allocate(n: int) -> int:
        return len(bytearray(n))

    values = house.results(house.map(allocate, [1, 100_000_000_000, 2] * 20))
    assert [value for value in values if isinstance(value, int)] == [1, 2] * 20
    assert all("memory limit" in str(value) for value in values[1::3])


def test_no_job_leaves_a_core_file_or_gains_privileges(opened: Opener) -> None:
    house = opened()

    def look() -> tuple[Any, str]:
        import resource

        with open("/proc/self/status") as file:
            return resource.getrlimit(resource.RLIMIT_CORE), file.read()

    core, status = house.result(house.call(look))
    assert core == (0, 0)
    assert "NoNewPrivs:\t1" in status


@pytest.mark.parametrize("limits", [Limits(memory_bytes=1), Limits(n_files=1), Limits(file_bytes=1)])
def test_a_limit_under_which_nothing_can_run_is_refused(limits: Limits, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be 0 \(none\) or at least \d+, not 1"):
        WorkerSetup(str(tmp_path), limits=limits)


# --- control groups ---------------------------------------------------------------------------------------------------


def test_without_control_groups_there_are_none(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/x\n")
    assert delegated(str(tmp_path), str(own)) == ""
    own.write_text("0::/x\n")
    assert delegated(str(tmp_path), str(own)) == ""


def test_a_worker_gets_a_control_group_of_its_own(tmp_path: Path) -> None:
    # Plain files stand in for the kernel's: what is written where is all that can be seen without them.
    base = tmp_path / "service"
    base.mkdir()
    own = tmp_path / "own"
    own.write_text("0::/service\n")
    (base / "cgroup.controllers").write_text("cpu memory pids\n")
    (base / "cgroup.subtree_control").write_text("")
    assert delegated(str(tmp_path), str(own)) == str(base)
    assert (base / "cloud-server" / "cgroup.procs").read_text() == str(os.getpid())
    assert (base / "cgroup.subtree_control").read_text() == "+memory +pids"
    own.write_text("0::/service/cloud-server\n")
    assert delegated(str(tmp_path), str(own)) == str(base)
    group = WorkerGroup(str(base), "worker-1", LIMITS)
    assert Path(group.path, "memory.max").read_text() == str(MEMORY_BYTES)
    assert Path(group.path, "pids.max").read_text() == "20"
    assert not group.ran_out_of_memory
    Path(group.path, "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert group.ran_out_of_memory
