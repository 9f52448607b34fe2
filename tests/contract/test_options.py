"""The reserved names of ``call`` and ``map``: types, errors, and that they are the job's, never the function's."""

from __future__ import annotations

import pstats
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cloud.errors import CloudException, JobFailed, JobKilled, SerializationError, UnsupportedOperation
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import PROCESSES_ONLY
from tests.contract.jobs import Gate, note, notes

REFUSED: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "_label": [
        (value, TypeError, f"_job_label must be an ASCII string, not {value!r}")
        for value in (5, b"a", "ä", ["a"], True)
    ],
    "_priority": [(value, TypeError, "_priority must be an integer") for value in (1.5, "1", None, True, [1])],
    "_restartable": [(value, TypeError, "_restartable must be a bool") for value in (1, 0, "yes", None)],
    "_fast_serialization": [
        (value, TypeError, "_fast_serialization must be 0, 1 or 2") for value in (3, -1, "0", None, True, 1.0)
    ],
    "_cores": [
        (value, TypeError, "_cores must be an integer greater than 0") for value in (0, -1, 1.0, "1", None, True)
    ],
    "_max_runtime": [
        *((value, TypeError, "_max_runtime must be a number") for value in ("1", True, [1])),
        *((value, ValueError, "_max_runtime must be greater than 0") for value in (0, -1, float("nan"))),
    ],
    "_retries": [
        *((value, TypeError, "_retries must be an integer") for value in ("1", True, 1.0, None)),
        (-1, ValueError, "_retries must be at least 0"),
    ],
    "_retry_delay": [
        *((value, TypeError, "_retry_delay must be a number") for value in ("1", True, None)),
        *((value, ValueError, "_retry_delay must be at least 0") for value in (-0.1, float("nan"))),
    ],
    "_depends_on": [
        (value, TypeError, "_depends_on must be a jid or list of jids")
        for value in ("1", b"1", True, 1.5, [None], ["1"])
    ],
    "_depends_on_errors": [
        *((value, TypeError, "_depends_on_errors must be 'abort' or 'ignore'") for value in (None, 1, True, ["abort"])),
        *((value, ValueError, "_depends_on_errors must be 'abort' or 'ignore'") for value in ("", "Abort", "stop")),
    ],
    "_os_env_vars": [
        *((value, TypeError, "_os_env_vars must") for value in (5, "HOME", b"HOME", [1], {"A": 1}, {1: "A"})),
        (["NOT_SET_HERE"], ValueError, "_os_env_vars names variables that are not set here: NOT_SET_HERE"),
    ],
    "_type": [("x9", ValueError, "_type must be one of c1, c2, f2, m1, s1, not 'x9'")],
    "_callback": [
        (value, CloudException, "All callbacks must be callable") for value in (5, "print", [print, 5], {"a": print})
    ],
    "_callback_on_error": [
        (value, CloudException, "All callbacks must be callable") for value in (5, "print", [print, 5])
    ],
}


def test_bad_values_are_refused_and_nothing_is_submitted(api: ModuleType) -> None:
    untouched = iter("ab")
    for name, value, error, text in [(name, *case) for name, cases in REFUSED.items() for case in cases]:
        for submit in (
            lambda **given: api.call(sample.identity, 1, **given),
            lambda **given: api.map(sample.identity, untouched, **given),
            lambda **given: api.starmap(sample.identity, untouched, **given),
        ):
            with pytest.raises(error) as caught:
                submit(**{name: value})
            assert str(caught.value).startswith(text), value
            assert type(caught.value) is error
    assert list(untouched) == ["a", "b"]
    assert api.find() == []


ACCEPTED: dict[str, list[Any]] = {
    "_label": [None, "", "a label \x7f"],
    "_priority": [0, -5, 10**9],
    "_restartable": [True, False],
    "_fast_serialization": [0, 1, 2],
    "_cores": [1, 2],
    "_max_runtime": [None, 1, 0.5, 10**6, float("inf")],
    "_retries": [0, 3],
    "_retry_delay": [0, 0.5, 10**6],
    "_depends_on": [None, [], (), range(0), set()],
    "_depends_on_errors": ["abort", "ignore"],
    "_os_env_vars": [[], {}, ["HOME"], ("HOME",), {"MINE": "1"}],
    "_type": ["c1", "c2", "f2", "m1", "s1"],
    "_high_cpu": [True, False, 1, None],
    "_kill_process": [False, 0, None],
    "_profile": [False, 0, None],
    "_callback": [None, [], repr, (repr,)],
    "_callback_on_error": [None, [], repr],
}


def test_good_values_are_taken_and_the_function_never_sees_them(api: ModuleType, two_slots: None) -> None:
    for name, value in [(name, value) for name, values in ACCEPTED.items() for value in values]:
        called = api.call(sample.keywords, 1, k=2, **{name: value})
        mapped = api.map(sample.keywords, [1, 2], **{name: value})
        spread = api.starmap(sample.keywords, [(1, 2)], **{name: value})
        assert api.result(called, timeout=30) == ((1,), {"k": 2})
        assert api.result([mapped, spread], timeout=30) == [((1,), {}), ((2,), {}), ((1, 2), {})]


def test_a_parameter_of_a_reserved_name_does_not_get_it(api: ModuleType) -> None:
    expected = ("default", "default", "mine")
    assert api.result(api.call(jobs.with_reserved_parameters, _label="x", _priority=1, _mine="mine")) == expected
    assert api.result(api.map(jobs.with_reserved_parameters, ["x"], _label="y")) == [("x", "default", "default")]


def test_names_with_an_underscore_that_are_not_reserved_are_the_function_s(api: ModuleType) -> None:
    given = {"_mine": 1, "__x": 2, "_labels": 3, "label": 4, "_callbacks": 5}
    assert api.result(api.call(sample.keywords, **given)) == ((), given)


def test_jobs_run_in_the_order_of_their_priority(api: ModuleType, one_slot: None, gate: Gate, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    api.call(gate.hold)
    gate.await_begun()
    submitted = [
        api.call(note, log, "default a"),
        api.call(note, log, "low", _priority=100),
        api.map(lambda i: note(log, f"map {i}"), range(3), _priority=6),
        api.call(note, log, "negative", _priority=-1),
        api.call(note, log, "default b", _priority=5),
        api.call(note, log, "high", _priority=0),
    ]
    assert set(api.status(submitted)) == {"queued"}
    gate.open()
    api.join(submitted)
    assert notes(log) == ["negative", "high", "default a", "default b", "map 0", "map 1", "map 2", "low"]


def test_cores_reserve_slots(api: ModuleType, configure: Any, gate: Gate, tmp_path: Path) -> None:
    configure(num_procs=3)
    log = str(tmp_path / "log")
    small = api.call(gate.hold)
    large = api.call(gate.hold, _cores=2)
    gate.await_begun(2)
    waits = api.call(note, log, "waits")
    assert api.status([small, large, waits]) == ["processing", "processing", "queued"]
    api.kill(small)
    api.join(waits, timeout=10)
    whole = api.call(note, log, "whole", _cores=3)
    with pytest.raises(CloudException, match="timed out"):
        api.join(whole, timeout=0.05)
    assert api.status(whole) == "queued"
    gate.open()
    api.join(whole, timeout=10)
    assert notes(log) == ["waits", "whole"]


def test_more_cores_than_slots_are_refused(api: ModuleType, two_slots: None) -> None:
    for submit in (lambda: api.call(sample.nothing, _cores=3), lambda: api.map(sample.identity, [1], _cores=3)):
        with pytest.raises(UnsupportedOperation, match=r"_cores=3 asks for more than the 2 worker slots"):
            submit()
    assert api.find() == []


def test_a_job_over_its_max_runtime_is_killed(api: ModuleType, gate: Gate, tmp_path: Path) -> None:
    # Long enough for a busy machine to import what the job is made of.
    log = str(tmp_path / "log")
    over = api.call(gate.hold_then_note, log, _max_runtime=0.5 / 60)
    within = api.call(sample.square, 3, _max_runtime=1)
    many = api.map(gate.hold, range(2), _max_runtime=0.5 / 60)
    for jid in (over, *many):
        with pytest.raises(JobKilled, match="longer than its _max_runtime") as caught:
            api.join(jid, timeout=20)
        assert caught.value.status == "killed"
    assert notes(log) == ["KilledException"]
    assert api.result(within) == 9
    assert gate.n_begun == 3


def test_time_in_the_queue_is_no_runtime(api: ModuleType, one_slot: None, gate: Gate) -> None:
    first = api.call(gate.hold)
    gate.await_begun()
    behind = api.call(sample.square, 3, _max_runtime=0.05 / 60)
    with pytest.raises(CloudException, match="timed out"):
        api.join(first, timeout=0.2)
    gate.open()
    assert api.result(behind) == 9


def test_a_very_long_max_runtime_is_no_trouble_afterwards(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    api.join(api.call(sample.nothing, _max_runtime=10**6))
    api.call(note, log, "nobody waits for this")
    jobs.eventually(lambda: notes(log), 5)
    jobs.eventually(lambda: api.find(status="done") == [1, 2], 5)


def test_fast_serialization_refuses_lambdas_in_arguments_and_results(api: ModuleType) -> None:
    class Local:
        pass

    for level in (0, 1):
        assert api.result(api.call(lambda function: function(), lambda: 5, _fast_serialization=level)) == 5
    for argument in (lambda: 5, Local(), [Local]):
        with pytest.raises(SerializationError, match="argument 1"):
            api.call(sample.identity, argument, _fast_serialization=2)
        with pytest.raises(SerializationError, match="argument 1"):
            api.map(sample.identity, [argument], _fast_serialization=2)
    assert len(api.find()) == 2
    assert api.result(api.call(lambda x: x + 1, 1, _fast_serialization=2)) == 2
    for jid in (
        api.call(lambda: lambda: 5, _fast_serialization=2),
        api.map(lambda x: lambda: 5, [1], _fast_serialization=2)[0],
    ):
        with pytest.raises(JobFailed, match="the job's result cannot be pickled"):
            api.result(jid)
    array = np.arange(1000.0)
    assert np.array_equal(api.result(api.call(sample.identity, array, _fast_serialization=2)), array)


@PROCESSES_ONLY
def test_kill_process_lets_nothing_run_afterwards(api: ModuleType, one_slot: None) -> None:
    first = api.result(api.call(sample.worker_pid))
    assert api.result(api.call(sample.worker_pid)) == first
    last = api.result(api.call(sample.worker_pid, _kill_process=True))
    assert last == first
    assert api.result(api.call(sample.worker_pid)) != last
    pids = api.result(api.map(lambda i: sample.worker_pid(), range(4), _kill_process=True))
    assert len(set(pids)) == 4


@PROCESSES_ONLY
def test_nothing_is_sent_behind_what_kills_its_process(api: ModuleType, one_slot: None) -> None:
    def pid_after(seconds: float) -> int:
        time.sleep(seconds)
        return sample.worker_pid()

    api.result(api.map(pid_after, [0.001] * 20))
    for _ in range(15):
        last = api.call(pid_after, 0.004, _kill_process=True)
        pids = api.result([last, *(api.call(pid_after, 0.001) for _ in range(20))])
        assert pids[0] not in pids[1:]


@PROCESSES_ONLY
def test_os_env_vars_reach_the_job_and_no_other(
    api: ModuleType, backend_name: str, one_slot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAKEN", "from here")
    named = api.call(sample.getenv, "TAKEN", _os_env_vars=["TAKEN"])
    given = api.call(sample.getenv, "GIVEN", _os_env_vars={"GIVEN": "of its own", "TAKEN": "x"})
    mapped = api.map(sample.getenv, ["GIVEN"] * 3, _os_env_vars={"GIVEN": "mapped"})
    after = api.map(sample.getenv, ["GIVEN", "TAKEN"])
    # The environment itself does not travel to a server: that is what the option is for.
    without = None if backend_name == "http" else "from here"
    assert api.result([named, given, mapped, after]) == ["from here", "of its own", *["mapped"] * 3, None, without]


def test_profile_keeps_statistics(api: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    profiled = [
        api.call(sample.recurse, 20, _profile=True),
        *api.map(sample.recurse, [20, 20], _profile=True),
        api.call(sample.boom_if, 1, _profile=True),
    ]
    plain = api.call(sample.recurse, 20)
    api.join([*profiled, plain], ignore_errors=True)
    for jid in profiled:
        stats = pstats.Stats(api.info(jid, "profile")[jid]["profile"])
        name = "boom_if" if jid == profiled[-1] else "recurse"
        [calls] = [row[1] for key, row in stats.stats.items() if key[2] == name]  # type: ignore[attr-defined]
        assert calls == (1 if name == "boom_if" else 21)
        assert stats.total_tt >= 0  # type: ignore[attr-defined]
    stats.print_stats()
    assert "boom_if" in capsys.readouterr().out
    assert api.info(plain, "profile") == {plain: {"profile": None}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert api.result(profiled[0]) == 20
