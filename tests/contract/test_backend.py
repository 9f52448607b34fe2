"""What every backend promises: each clause one test, named by it. The verbs stand in for the client's end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cloud.backends.base import Backend
from cloud.errors import BackendClosed, JobFailed, JobNotFound, JobStalled, SerializationError, WorkerLost
from cloud.jobs import DEFAULT_OPTIONS, DONE, ERROR, KILLED, PROCESSING, QUEUED, STALLED, STDOUT, WAITING
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import CHILDREN_ONLY, PROCESSES_ONLY, beginning
from tests.contract.jobs import Gate, Point, eventually, notes
from tests.scripts import ScriptRunner

UNKNOWN = 987654321

ASKING: dict[str, Callable[[Backend, list[int]], Any]] = {
    "wait": lambda backend, jids: backend.wait(jids, None, stop_on_error=False),
    "wait until one fails": lambda backend, jids: backend.wait(jids, 0.0, stop_on_error=True),
    "when_final": lambda backend, jids: backend.when_final(jids, lambda: None),
    "on_each_final": lambda backend, jids: backend.on_each_final(jids, lambda first, n, status: None),
    "finals": lambda backend, jids: backend.finals(jids),
    "outcomes": lambda backend, jids: backend.outcomes(jids),
    "statuses": lambda backend, jids: backend.statuses(jids),
    "describe": lambda backend, jids: backend.describe(jids),
    "cancel": lambda backend, jids: backend.cancel(jids),
    "delete": lambda backend, jids: backend.delete(jids),
}


def wait_all(backend: Backend, jids: Any) -> None:
    assert backend.wait(list(jids), 30.0, stop_on_error=False) == []


@pytest.mark.parametrize(("n", "n_bytes"), [(3, 10), (20, 200_000)])
def test_what_comes_with_a_wait_is_what_the_outcomes_are(
    api: ModuleType, backend: Backend, n: int, n_bytes: int
) -> None:
    jids = [api.call(sample.square, 3), *api.map(bytes, [n_bytes] * n)]
    unfinished, segments = backend.wait_outcomes(jids, 30.0, stop_on_error=True)
    assert unfinished == []
    if segments is None:
        wait_all(backend, jids)
    else:
        assert [bytes(segment[3]) for segment in segments] == [bytes(each[3]) for each in backend.outcomes(jids)]
    assert api.result(jids) == [9, *([bytes(n_bytes)] * n)]


@CHILDREN_ONLY
def test_outcomes_are_read_while_the_last_job_runs(
    api: ModuleType, backend: Backend, gate: Gate, two_slots: None
) -> None:
    n, read = 50_000, dict[int, bytes]()

    def hold_the_last(number: int) -> int:
        value: int = gate.hold(number) if number == n - 1 else number
        return value

    def read_one(at: int, raw: bytes) -> None:
        read[at] = raw
        gate.open()

    jids = api.map(hold_the_last, range(n))
    assert backend.wait_outcomes(jids, 30.0, stop_on_error=True, read=read_one)[0] == []
    ends = list(itertools.accumulate(n for _, n, _, _ in backend.outcomes(jids)))
    found = {end - n: raw for end, (_, n, _, raw) in zip(ends, backend.outcomes(jids), strict=True)}
    assert read.items() <= found.items()
    assert api.result(jids) == list(range(n))


def test_a_wait_that_ends_early_brings_no_outcomes(api: ModuleType, backend: Backend, gate: Gate) -> None:
    jids = [api.call(sample.square, 3), api.call(gate.hold)]
    wait_all(backend, jids[:1])
    assert backend.wait_outcomes(jids, 0.0, stop_on_error=True) == (jids[1:], None)
    gate.open()
    wait_all(backend, jids)


def test_01_jids_are_distinct_and_in_order(api: ModuleType) -> None:
    calls = [api.call(sample.square, i) for i in range(5)]
    mapped = api.map(sample.square, range(7))
    last = api.call(sample.square, 0)
    assert [*calls, *mapped, last] == list(range(calls[0], calls[0] + 13))
    assert calls[0] == 1
    assert type(mapped) is range


def test_02_an_empty_batch_is_nothing(api: ModuleType, backend: Backend) -> None:
    assert list(api.map(sample.square, [])) == []
    assert backend.select() == []
    for verb, ask in ASKING.items():
        if verb != "finals":
            assert not ask(backend, []) or verb == "when_final"
    called: list[bool] = []
    backend.when_final([], lambda: called.append(True))
    assert called == [True]
    assert api.call(sample.nothing) == 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        -(2**100),
        1.5,
        float("inf"),
        "",
        "täxt\0\ud800",
        b"x" * (1 << 20),
        [[], ()],
        {1: {2}},
        Ellipsis,
        Point(1, 2),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_03_values_come_back_equal(api: ModuleType, value: Any) -> None:
    called, mapped = api.call(sample.identity, value), api.map(sample.identity, [value, None, value])
    for result in (api.result(called), *(api.result(mapped)[i] for i in (0, 2))):
        assert result == value
        assert type(result) is type(value)
    assert api.result(mapped)[1] is None


def test_04_an_exception_keeps_type_arguments_cause_and_traceback(api: ModuleType) -> None:
    with pytest.raises(JobFailed) as caught:
        api.result(api.call(sample.chained))
    error = caught.value.__cause__
    assert type(error) is RuntimeError
    assert error.args == ("outer",)
    assert error.__notes__ == ["a note"]
    assert type(error.__cause__) is KeyError
    assert error.__cause__.args == ("missing",)
    for part in (
        "Traceback (most recent call last):",
        "in chained",
        "KeyError: 'missing'",
        "RuntimeError: outer",
        "a note",
    ):
        assert part in caught.value.parameter


def test_05_an_unpicklable_result_is_an_error_of_its_job(api: ModuleType) -> None:
    jid = api.call(sample.unpicklable_result)
    with pytest.raises(JobFailed, match=r"the job's result cannot be pickled.*lock") as caught:
        api.result(jid, timeout=10)
    assert isinstance(caught.value.__cause__, SerializationError)
    assert api.status(jid) == "error"


def test_06_an_unpicklable_exception_reports_type_and_text(api: ModuleType) -> None:
    for function, text in (
        (sample.raise_unpicklable, "CannotPickle: cannot be pickled"),
        (sample.raise_unrebuildable, "CannotRebuild: cannot be rebuilt"),
    ):
        with pytest.raises(JobFailed) as caught:
            api.result(api.call(function), timeout=10)
        assert caught.value.parameter.endswith(text)
        assert caught.value.__cause__ is None


@PROCESSES_ONLY
def test_07_a_job_that_ends_its_process_costs_no_other(api: ModuleType, two_slots: None, gate: Gate) -> None:
    beside = api.call(gate.hold, "unharmed")
    gate.await_begun()
    began = time.monotonic()
    lost = api.call(sample.exit_hard, 3)
    behind = api.map(sample.square, range(10))
    with pytest.raises(WorkerLost, match="exited with code 3") as caught:
        api.result(lost)
    assert time.monotonic() - began < 5.0
    assert (caught.value.exitcode, caught.value.status, caught.value.jid) == (3, "error", lost)
    assert api.result(behind) == [i * i for i in range(10)]
    gate.open()
    assert api.result(beside) == "unharmed"


def test_08_wait_with_zero_looks_once(api: ModuleType, backend: Backend, gate: Gate) -> None:
    jid = api.call(gate.hold)
    gate.await_begun()
    began = time.monotonic()
    assert backend.wait([jid], 0.0, stop_on_error=False) == [jid]
    assert time.monotonic() - began < 0.5
    gate.open()
    wait_all(backend, [jid])
    assert backend.wait([jid], 0.0, stop_on_error=False) == []


def test_09_a_wait_s_timeout_leaves_the_jobs_running(api: ModuleType, backend: Backend, gate: Gate) -> None:
    jid = api.call(gate.hold, "still here")
    gate.await_begun()
    assert backend.wait([jid], 0.05, stop_on_error=True) == [jid]
    assert list(backend.statuses([jid])) == [PROCESSING]
    gate.open()
    wait_all(backend, [jid])
    assert api.result(jid) == "still here"


def test_10_all_waits_for_every_job_and_any_for_the_first(
    api: ModuleType, two_slots: None, backend: Backend, gate: Gate
) -> None:
    slow, quick = api.call(gate.hold), api.call(sample.square, 3)
    finals = backend.finals([slow, quick])
    assert finals.next(10.0) == (quick, 1, DONE)
    assert finals.next(0.0) is None
    assert backend.wait([slow, quick], 0.0, stop_on_error=False) == [slow]
    gate.open()
    assert finals.next(10.0) == (slow, 1, DONE)
    assert backend.wait([slow, quick], 0.0, stop_on_error=False) == []


def test_10_a_wait_may_end_with_the_first_failure(
    api: ModuleType, two_slots: None, backend: Backend, gate: Gate
) -> None:
    slow = api.call(gate.hold)
    gate.await_begun()
    failed = api.call(sample.boom)
    backend.wait([slow, failed], 10.0, stop_on_error=True)
    assert list(backend.statuses([slow, failed])) == [PROCESSING, ERROR]


def test_11_an_unknown_jid_is_an_error_and_changes_nothing(
    api: ModuleType, one_slot: None, backend: Backend, gate: Gate
) -> None:
    done, running = api.call(sample.square, 3), api.call(gate.hold)
    gate.await_begun()
    for ask in ASKING.values():
        for asked in ([UNKNOWN], [UNKNOWN, done, running], [done, running, UNKNOWN]):
            with pytest.raises(
                JobNotFound, match=rf"^Job {UNKNOWN}: Does not exist or was purged from cache$"
            ) as caught:
                ask(backend, asked)
            assert caught.value.jid == UNKNOWN
            assert list(backend.statuses([done, running])) == [DONE, PROCESSING]
    assert api.result(done) == 9


def test_12_a_second_delete_finds_nothing(api: ModuleType, backend: Backend) -> None:
    jid, mapped = api.call(sample.nothing), api.map(sample.square, range(4))
    wait_all(backend, [jid, *mapped])
    for gone, kept in (([jid], mapped), ([mapped[1]], [mapped[0], mapped[2]])):
        backend.delete(gone)
        with pytest.raises(JobNotFound):
            backend.delete(gone)
        for ask in ASKING.values():
            with pytest.raises(JobNotFound):
                ask(backend, gone)
        assert list(backend.statuses(list(kept))) == [DONE] * len(kept)
    assert backend.select() == [mapped[0], mapped[2], mapped[3]]
    with pytest.raises(JobNotFound):
        backend.statuses(mapped)


def test_13_deleting_a_job_that_runs_kills_it_first(api: ModuleType, tmp_path: Path, gate: Gate) -> None:
    log = str(tmp_path / "log")
    jid = api.call(gate.hold_then_note, log)
    gate.await_begun()
    api.delete(jid)
    assert notes(log) == ["KilledException"]
    with pytest.raises(JobNotFound):
        api.status(jid)
    assert api.result(api.call(sample.square, 2)) == 4


def test_14_a_job_begins_after_all_it_depends_on(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    first = api.map(lambda i: jobs.note(log, f"first {i}"), range(5))
    second = api.call(jobs.note, log, "second", _depends_on=first)
    third = api.map(lambda i: jobs.note(log, f"third {i}"), range(3), _depends_on=[second])
    api.join(third)
    found = notes(log)
    assert sorted(found[:5]) == [f"first {i}" for i in range(5)]
    assert found[5] == "second"
    assert sorted(found[6:]) == [f"third {i}" for i in range(3)]


def test_15_what_depends_on_a_failure_stalls_transitively(api: ModuleType, backend: Backend, gate: Gate) -> None:
    def hold_then_fail() -> None:
        gate.hold()
        raise ValueError

    failing = api.call(hold_then_fail)
    child = api.call(sample.nothing, _depends_on=failing)
    grandchildren = api.map(sample.square, range(3), _depends_on=[child])
    waiting = [child, *grandchildren]
    assert list(backend.statuses(waiting)) == [WAITING] * 4
    gate.open()
    wait_all(backend, waiting)
    late = api.call(sample.nothing, _depends_on=grandchildren[1])
    assert list(backend.statuses([failing, *waiting, late])) == [ERROR] + [STALLED] * 5
    with pytest.raises(JobStalled, match="Could not start due to dependency erroring"):
        api.join(late)


def test_16_cancel_ends_jobs_in_every_state(api: ModuleType, one_slot: None, backend: Backend, gate: Gate) -> None:
    done = api.call(sample.square, 3)
    wait_all(backend, [done])
    running = api.call(gate.hold)
    gate.await_begun()
    queued = api.call(sample.nothing)
    waiting = api.call(sample.nothing, _depends_on=queued, _depends_on_errors="ignore")
    every = [done, running, queued, waiting]
    assert list(backend.statuses(every)) == [DONE, PROCESSING, QUEUED, WAITING]
    assert backend.cancel(every) == [running]
    wait_all(backend, every)
    assert list(backend.statuses(every)) == [DONE, KILLED, KILLED, KILLED]
    assert backend.cancel(every) == []
    assert list(backend.statuses(every)) == [DONE, KILLED, KILLED, KILLED]
    assert api.result(done) == 9


def test_17_a_status_never_moves_backwards(api: ModuleType, two_slots: None, backend: Backend) -> None:
    first = api.map(sample.sleep_then, [0.002] * 40)
    then = api.map(sample.square, range(2000), _depends_on=first)
    failing = api.map(sample.boom_if, [0, 1] * 20, _depends_on=first)
    every = [*first, *then, *failing]
    seen = bytes(len(every))
    while not all(code >= DONE for code in seen):
        now = bytes(backend.statuses(every))
        back = [(jid, a, b) for jid, a, b in zip(every, seen, now, strict=True) if b < a or (a >= DONE and a != b)]
        assert back == []
        seen = now
        backend.wait(every, 0.001, stop_on_error=False)


def test_18_times_are_seconds_and_the_last_output_is_kept(
    api: ModuleType, configure: Callable[..., None], backend_name: str
) -> None:
    configure(output_limit_bytes=1000)
    before = time.time()
    jid = api.call(lambda: (jobs.show_many(1000), time.sleep(0.05)))
    api.join(jid)
    info = api.info(jid, "all")[jid]
    assert 0.05 <= info["runtime"] < 5.0
    assert before - 1.0 <= info["created"].timestamp() <= info["started"].timestamp() + 0.001
    assert info["finished"].timestamp() - info["started"].timestamp() == pytest.approx(info["runtime"], abs=0.001)
    assert info["memory.max_usage"] > 1_000_000
    assert info["stdout"] == "".join(f"{i:07d}\n" for i in range(875, 1000))


def test_19_output_is_captured_and_never_mixed(api: ModuleType, two_slots: None, backend: Backend) -> None:
    jids = [api.call(sample.print_both, f"out {i}", f"err {i}") for i in range(20)]
    mapped = api.map(lambda i: print("mapped", i), range(20))
    wait_all(backend, [*jids, *mapped])
    for i, jid in enumerate(jids):
        assert api.info(jid, ["stdout", "stderr"])[jid] == {"stdout": f"out {i}\n", "stderr": f"err {i}\n"}
    for i, jid in enumerate(mapped):
        assert api.info(jid, ["stdout", "stderr"])[jid] == {"stdout": f"mapped {i}\n", "stderr": ""}
    [(skip, n, length, raw)] = backend.outcomes([jids[0]])
    assert (skip, n, length) == (0, 1, 1)
    assert backend.describe(jids)[0]["outcome"].section(STDOUT) == b"out 0\n"
    assert b"out 0\n" in raw


def test_20_arguments_are_taken_by_value(api: ModuleType, one_slot: None, gate: Gate) -> None:
    api.call(gate.hold)
    gate.await_begun()
    values: list[Any] = ["as submitted"]
    jid, mapped = api.call(jobs.append, values, "in the job"), api.map(jobs.append, [values, values], ["a", "b"])
    values.append("later")
    gate.open()
    assert api.result(jid) == ["as submitted", "in the job"]
    assert api.result(mapped) == [["as submitted", "a"], ["as submitted", "b"]]
    assert values == ["as submitted", "later"]


def test_21_many_threads_submit_and_wait(api: ModuleType) -> None:
    found: dict[int, int] = {}

    def work(k: int) -> None:
        for i in range(50):
            jid = api.call(sample.square, 1000 * k + i)
            assert api.result(jid) == (1000 * k + i) ** 2
            found[jid] = 1000 * k + i

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == list(range(1, 401))
    assert api.result(found) == [n * n for n in found.values()]


def test_22_a_closed_backend_refuses_everything(api: ModuleType, backend: Backend, gate: Gate) -> None:
    done, running = api.call(sample.square, 3), api.call(gate.hold)
    gate.await_begun(1)
    wait_all(backend, [done])
    function = api.call.__self__._pickled(sample.nothing, backend)
    writer = backend.open_map(function, DEFAULT_OPTIONS)
    backend.close()
    backend.close()
    for refused in (
        lambda: backend.submit(function, b"", DEFAULT_OPTIONS),
        lambda: backend.open_map(function, DEFAULT_OPTIONS),
        lambda: writer.extend(1, 1, b""),
        *(partial(ask, backend, jids) for ask in ASKING.values() for jids in ([running], [done])),
        lambda: backend.cancel(None),
        lambda: backend.select(),
    ):
        with pytest.raises(BackendClosed):
            refused()


def test_23_close_wakes_a_wait(api: ModuleType, two_slots: None, backend: Backend, gate: Gate) -> None:
    jid = api.call(gate.hold)
    gate.await_begun()
    raised: list[BaseException] = []

    def wait(begun: threading.Event) -> None:
        begun.set()
        try:
            backend.wait([jid], None, stop_on_error=False)
        except BaseException as exc:
            raised.append(exc)

    threads = []
    for _ in range(3):
        begun = threading.Event()
        threads.append(threading.Thread(target=wait, args=(begun,)))
        threads[-1].start()
        assert begun.wait(10)
    assert backend.wait([jid], 0.05, stop_on_error=False) == [jid]
    began = time.monotonic()
    backend.close()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 5.0
    assert [type(exc) for exc in raised] == [BackendClosed] * 3


def test_24_any_callable_is_a_function(api: ModuleType) -> None:
    offset = 100

    def closure(x: int) -> int:
        return x + offset

    point = Point(2, 3)
    for function, expected in (
        (lambda x: x + 1, 8),
        (closure, 107),
        (partial(pow, 2), 128),
        (partial(closure), 107),
        (point.scaled, Point(14, 21)),
        (point, 14),
        (Point, Point(7)),
        (abs, 7),
        ("{}!".format, "7!"),
    ):
        assert api.result(api.call(function, 7)) == expected
        assert api.result(api.map(function, [7, 7])) == [expected] * 2


def test_24_functions_of_main_are_functions(run_script: ScriptRunner, backend_name: str) -> None:
    program = beginning(backend_name) + "\n".join(
        (
            "offset = 100",
            "def helper(x): return x + offset",
            "def f(x): return helper(x)",
            "print(api.result(api.call(f, 7)), api.result(api.map(f, [1, 2])))",
        )
    )
    assert run_script(program).stdout == "107 [101, 102]\n"


@pytest.mark.parametrize(
    "error", [SystemExit(3), SystemExit(), KeyboardInterrupt("stop"), GeneratorExit(), BaseException(1)]
)
def test_25_a_job_that_raises_what_ends_programs_has_failed(api: ModuleType, error: BaseException) -> None:
    for jid in (api.call(jobs.raise_this, error), api.map(jobs.raise_this, [error])[0]):
        with pytest.raises(JobFailed) as caught:
            api.join(jid)
        assert type(caught.value.__cause__) is type(error)
        assert caught.value.__cause__.args == error.args
        assert type(error).__name__ in caught.value.parameter
        assert api.status(jid) == "error"
    assert api.result(api.call(sample.square, 3)) == 9


def test_25_the_process_lives_on(api: ModuleType, one_slot: None) -> None:
    before = api.result(api.call(sample.worker_pid))
    for function in (sample.exit_soft, sample.interrupt):
        api.join(api.call(function), ignore_errors=True)
    assert api.result(api.call(sample.worker_pid)) == before
    assert eventually(lambda: api.find(status="error")) == [2, 3]
