"""joblib on the backend 'cloud', beside its own 'loky' and serial answers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("joblib")
numpy = pytest.importorskip("numpy")

import joblib  # noqa: E402
from joblib import Parallel, delayed, parallel_config  # noqa: E402

import cloud.joblib  # noqa: E402
from cloud.errors import WorkerLost  # noqa: E402
from tests.dropin import joblib_functions as fn  # noqa: E402
from tests.integration.support import Program, exists, lines_of, until  # noqa: E402

if sys.platform != "linux":
    pytest.skip("looks into /proc", allow_module_level=True)


@pytest.fixture(autouse=True)
def backend(home: Path) -> Iterator[None]:
    cloud.joblib.register()
    with parallel_config(backend="cloud", n_jobs=2):
        yield
    cloud.joblib.shutdown()


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 7}, {"pre_dispatch": "all"}, {"pre_dispatch": 1}, {"n_jobs": 3}, {"n_jobs": -1}, {"n_jobs": 1}],
    ids=repr,
)
def test_values(options: Any) -> None:
    assert Parallel(**options)(delayed(fn.square)(i) for i in range(200)) == [i * i for i in range(200)]


def test_what_cannot_be_imported() -> None:
    n = 3
    assert Parallel()(delayed(lambda x: x + n)(i) for i in range(5)) == [3, 4, 5, 6, 7]


def test_generators() -> None:
    calls = [delayed(fn.square)(i) for i in range(50)]
    assert list(Parallel(return_as="generator")(calls)) == [i * i for i in range(50)]
    assert sorted(Parallel(return_as="generator_unordered")(calls)) == [i * i for i in range(50)]


def test_small_tasks_are_batched() -> None:
    parallel = Parallel()
    with parallel:
        parallel(delayed(fn.square)(i) for i in range(20_000))
        assert parallel._backend._effective_batch_size > 8


@pytest.mark.parametrize("n_jobs", [1, 2, 5, -1, -2, -100, None])
def test_effective_n_jobs(n_jobs: int | None) -> None:
    with parallel_config(backend="loky"):
        expected = joblib.effective_n_jobs(n_jobs)
    with parallel_config(backend="cloud"):
        # As other backends that one has to ask for, it uses all cores if nothing is said.
        assert joblib.effective_n_jobs(n_jobs) == (joblib.cpu_count() if n_jobs is None else expected)


def test_n_jobs_of_zero() -> None:
    with pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)(delayed(fn.square)(i) for i in range(3))


def test_no_more_run_at_a_time_than_n_jobs() -> None:
    # Fewer do where one starts so late that the others have done its share.
    assert len(set(Parallel(n_jobs=3, batch_size=1)(delayed(fn.pid)(i) for i in range(30)))) in (2, 3)
    assert len(set(Parallel(n_jobs=2, batch_size=1)(delayed(fn.pid)(i) for i in range(30)))) in (1, 2)


def test_workers_are_kept_for_the_next_call() -> None:
    first = set(Parallel(batch_size=1)(delayed(fn.pid)(i) for i in range(10)))
    second = set(Parallel(batch_size=1)(delayed(fn.pid)(i) for i in range(10)))
    # One may have been given all of them.
    assert len(first | second) <= 2
    assert all(exists(pid) for pid in first | second)
    cloud.joblib.shutdown()
    assert not any(exists(pid) for pid in first | second)
    assert Parallel()(delayed(fn.square)(i) for i in range(3)) == [0, 1, 4]


def test_threads_of_libraries_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    each = max(1, joblib.cpu_count() // 2)
    assert set(Parallel()(delayed(fn.environment)("OMP_NUM_THREADS") for _ in range(4))) == {str(each)}
    with parallel_config(backend="cloud", n_jobs=2, inner_max_num_threads=3):
        assert set(Parallel()(delayed(fn.environment)("OMP_NUM_THREADS") for _ in range(4))) == {"3"}


# --- arrays -----------------------------------------------------------------------------------------------------------


def arrays() -> list[Any]:
    whole = numpy.arange(300_000.0).reshape(500, 600)
    return [
        whole,
        whole.T,
        whole[::2],
        numpy.asfortranarray(whole),
        whole.astype("f4"),
        whole.view([("one", "f8")])["one"],
    ]


@pytest.mark.parametrize("array", arrays(), ids=lambda array: f"{array.dtype}{array.shape}{array.strides}")
def test_large_arrays_are_mapped(array: Any) -> None:
    for kind, writable, shape, total, _ in Parallel(max_nbytes=1000)(delayed(fn.describe)(array) for _ in range(4)):
        assert (kind, writable, shape) == ("memmap", False, array.shape)
        assert total == pytest.approx(float(array.sum()), rel=1e-5)


def test_which_arrays_are_mapped() -> None:
    small, large = numpy.ones(10), numpy.ones(200_000)

    def kinds(array: Any, **options: Any) -> set[Any]:
        return {found[:2] for found in Parallel(**options)(delayed(fn.describe)(array) for _ in range(4))}

    assert kinds(small) == {("ndarray", True)}
    assert kinds(large) == {("memmap", False)}
    assert kinds(large, max_nbytes=None) == {("ndarray", True)}
    assert kinds(large, mmap_mode=None) == {("ndarray", True)}
    assert kinds(large, max_nbytes="10M") == {("ndarray", True)}
    assert kinds(large, mmap_mode="c") == {("memmap", True)}


def test_an_array_is_written_once_and_let_go_of() -> None:
    large = numpy.ones(1_000_000)
    before = len(os.listdir("/proc/self/fd"))
    counts: list[int] = []

    def calls() -> Iterator[Any]:
        for _ in range(20):
            counts.append(len(os.listdir("/proc/self/fd")))
            yield delayed(fn.describe)(large)

    Parallel(batch_size=1)(calls())
    Parallel(batch_size=1)(calls())
    assert max(counts) - before < 20
    assert len(os.listdir("/proc/self/fd")) <= counts[20]


def test_a_mapped_file_is_mapped_again(tmp_path: Path) -> None:
    file = numpy.memmap(tmp_path / "data", dtype="f8", mode="w+", shape=(1000, 3))
    file[:] = 1
    file.flush()
    found = Parallel()(delayed(fn.describe)(file) for _ in range(2))
    assert {each[:4] for each in found} == {("memmap", True, (1000, 3), 3000.0)}
    # A part of it is no file of its own.
    assert Parallel()(delayed(fn.describe)(file[10:20]) for _ in range(2))[0][2:4] == ((10, 3), 30.0)


def test_changes_are_seen_by_others_only_if_asked_for() -> None:
    large = numpy.zeros(200_000)
    with pytest.raises(ValueError, match="read-only"):
        Parallel()(delayed(fn.change)(large) for _ in range(2))
    assert Parallel(mmap_mode="c")(delayed(fn.change)(large) for _ in range(4)) == [1.0] * 4
    assert sorted(Parallel(mmap_mode="r+", batch_size=4)(delayed(fn.change)(large) for _ in range(4))) == [1, 2, 3, 4]
    assert large[0] == 0


def test_arrays_in_containers_and_keywords() -> None:
    large = numpy.ones(200_000)

    def kinds(pair: Any, *, named: Any) -> list[str]:
        return [type(each).__name__ for each in (*pair, named["deep"][0])]

    found = Parallel()(delayed(kinds)((large, 1), named={"deep": [large]}) for _ in range(2))
    assert found == [["memmap", "int", "memmap"]] * 2


# --- nesting ----------------------------------------------------------------------------------------------------------


def test_a_parallel_in_a_task() -> None:
    expected = [i * i for i in range(5)]
    # More tasks wait for tasks of their own than there are workers.
    assert Parallel(batch_size=1)(delayed(fn.inner)(2, 5) for _ in range(8)) == [expected] * 8
    assert Parallel()(delayed(fn.inner)(None, 5) for _ in range(3)) == [expected] * 3


def test_a_parallel_in_a_task_is_serial_unless_it_asks() -> None:
    assert Parallel()(delayed(fn.inner_n_jobs)() for _ in range(2)) == [1, 1]


def test_arrays_reach_the_tasks_of_tasks() -> None:
    large = numpy.ones(200_000)
    for found in Parallel()(delayed(fn.inner_array)(large) for _ in range(2)):
        assert {each[:4] for each in found} == {("memmap", False, (200_000,), 200_000.0)}


# --- faults -----------------------------------------------------------------------------------------------------------


def test_an_exception_is_the_tasks_own() -> None:
    for _ in range(2):
        with pytest.raises(KeyError) as raised:
            Parallel()(delayed(fn.fail_if_three)(i) for i in range(100))
        assert raised.value.args == (3, "three")
        assert 'raise KeyError(x, "three")' in str(raised.value.__cause__)
        assert Parallel()(delayed(fn.square)(i) for i in range(3)) == [0, 1, 4]


def test_an_exception_ends_the_tasks_that_run(tmp_path: Path) -> None:
    witness = str(tmp_path / "witness")
    began = time.monotonic()
    with pytest.raises(KeyError):
        Parallel(batch_size=1)([delayed(fn.sleep_noted)(witness, 600), delayed(fn.fail_when_noted)(witness)])
    assert Parallel(batch_size=1)(delayed(fn.square)(i) for i in range(10)) == [i * i for i in range(10)]
    # Two have work again, once the one that was ended has been replaced.
    while len(set(Parallel(batch_size=1)(delayed(fn.pid)() for _ in range(10)))) < 2:
        assert time.monotonic() - began < 20


def test_a_worker_that_exits() -> None:
    with pytest.raises(WorkerLost, match="exited with code 5") as raised:
        Parallel()(delayed(fn.exit_if_three)(i) for i in range(100))
    assert isinstance(raised.value, BrokenProcessPool)
    assert Parallel()(delayed(fn.square)(i) for i in range(3)) == [0, 1, 4]


def test_a_timeout(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(joblib.parallel.TimeoutError):
        Parallel(timeout=0.3)(delayed(time.sleep)(seconds) for seconds in (0, 600, 600))
    assert time.monotonic() - began < 10
    assert Parallel()(delayed(fn.square)(i) for i in range(3)) == [0, 1, 4]


def test_one_call_leaves_the_tasks_of_another_alone(tmp_path: Path) -> None:
    import threading

    found: list[Any] = []
    witness = tmp_path / "witness"

    def other() -> None:
        with parallel_config(backend="cloud", n_jobs=2):
            found.append(Parallel(batch_size=1)(delayed(fn.sleep_noted)(str(witness), 1.0) for _ in range(1)))
            found.append(Parallel(batch_size=1)(delayed(fn.square)(i) for i in range(2)))

    thread = threading.Thread(target=other)
    # The nesting that joblib counts starts anew in each thread; a single task runs in no worker.
    thread.start()
    for _ in range(3):
        with pytest.raises(KeyError):
            Parallel()(delayed(fn.fail_if_three)(i) for i in range(10))
    thread.join(30)
    assert found == [[None], [0, 1]]


def test_a_generator_that_is_dropped(tmp_path: Path) -> None:
    results = Parallel(return_as="generator", batch_size=1)(delayed(time.sleep)(s) for s in (0, 600, 600))
    assert next(results) is None
    with pytest.warns(UserWarning, match="tasks which were still being processed"):
        results.close()
    assert Parallel()(delayed(fn.square)(i) for i in range(3)) == [0, 1, 4]


BUSY = """
import sys
import joblib, cloud.joblib
from tests.dropin.joblib_functions import sleep_noted

cloud.joblib.register()
print("started", flush=True)
try:
    with joblib.parallel_config(backend="cloud", n_jobs=2):
        joblib.Parallel()(joblib.delayed(sleep_noted)("witness", 600) for _ in range(4))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise SystemExit(7)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_outlives_the_program(number: int, program: Callable[..., Program]) -> None:
    busy = program(BUSY)
    busy.wait_for("started")
    until(lambda: len(lines_of(busy.folder / "witness")) == 2)
    began = time.monotonic()
    busy.signal(number)
    assert busy.ended() == (7 if number == signal.SIGINT else -number)
    assert time.monotonic() - began < 8
    busy.left_nothing(5.0)


# --- registering ------------------------------------------------------------------------------------------------------


def test_importing_it_does_not_load_joblib(run_script: Any) -> None:
    shown = run_script("import sys, cloud.joblib; cloud.joblib.shutdown(); print('joblib' in sys.modules)")
    assert shown.stdout == "False\n"


def test_without_joblib(run_script: Any) -> None:
    shown = run_script(
        """
        import sys
        sys.modules["joblib"] = None
        import cloud.joblib
        try:
            cloud.joblib.register()
        except cloud.errors.UnsupportedOperation as exc:
            print(exc)
        """
    )
    assert "pip install 'cloudcall[joblib]'" in shown.stdout


def test_as_the_default(run_script: Any) -> None:
    shown = run_script(
        """
        import cloud.joblib, joblib
        cloud.joblib.register(make_default=True)
        with joblib.Parallel(n_jobs=2) as parallel:
            print(parallel(joblib.delayed(abs)(i) for i in range(3)), type(parallel._backend).__name__)
        """
    )
    assert shown.stdout == "[0, 1, 2] CloudBackend\n"
