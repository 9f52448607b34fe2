"""Many calls at once, which an engine may take together: each stays a job of its own."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cloud.errors import JobFailed, JobKilled, JobNotFound
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.jobs import Gate, eventually, notes

N = 200


def several(index: int, extra: Any = None) -> Any:
    """Does something else for each of some indexes."""
    if index % 20 == 3:
        raise ValueError(f"job {index} fails")
    if index % 20 == 5:
        print(f"job {index} prints")
    if index % 20 == 7:
        return [index]
    return index


def test_each_has_its_own_value_error_and_output(api: ModuleType) -> None:
    jids = [api.call(several, index) for index in range(N)]
    assert jids == sorted(set(jids))
    results = api.result(jids, ignore_errors=True)
    for index, (jid, result) in enumerate(zip(jids, results, strict=True)):
        if index % 20 == 3:
            assert isinstance(result, JobFailed)
            assert result.jid == jid
            assert repr(result.__cause__) == f"ValueError('job {index} fails')"
        else:
            assert result == ([index] if index % 20 == 7 else index)
    assert api.status(jids) == ["error" if index % 20 == 3 else "done" for index in range(N)]
    printed = api.info(jids, ["stdout"])
    assert {jid: facts["stdout"] for jid, facts in printed.items() if facts["stdout"]} == {
        jids[index]: f"job {index} prints\n" for index in range(N) if index % 20 == 5
    }


@pytest.mark.parametrize(
    "options",
    [
        {"_label": "many"},
        {"_retries": 1, "_retry_delay": 0.0},
        {"_restartable": False},
        {"_os_env_vars": {"BURST": "1"}},
        {"_fast_serialization": 2},
        {"_priority": 9},
        {"_label": None, "_priority": 5},
    ],
    ids=str,
)
def test_those_with_options_too(api: ModuleType, options: dict[str, Any]) -> None:
    n = 30
    jids = [api.call(several, index, **options) for index in range(n)]
    results = api.result(jids, ignore_errors=True)
    assert [repr(results[index].__cause__) for index in (3, 23)] == [f"ValueError('job {i} fails')" for i in (3, 23)]
    assert api.status(jids) == ["error" if index % 20 == 3 else "done" for index in range(n)]
    assert {facts["label"] for facts in api.info(jids, ["label"]).values()} == {options.get("_label")}
    assert [result for index, result in enumerate(results) if index % 20 != 3] == [
        [index] if index % 20 == 7 else index for index in range(n) if index % 20 != 3
    ]


def test_each_has_the_variables_it_was_given(api: ModuleType) -> None:
    jids = [api.call(os.getenv, "BURST", _os_env_vars={"BURST": str(index // 5)}) for index in range(40)]
    assert api.result([*jids, api.call(os.getenv, "BURST")]) == [*(str(index // 5) for index in range(40)), None]


def test_those_after_another_run_once_it_has_ended(api: ModuleType, tmp_path: Path) -> None:
    gate, path = Gate(tmp_path), str(tmp_path / "notes")
    first = api.call(gate.hold)
    api.result([api.call(sample.identity, index) for index in range(20)])
    early = [api.call(jobs.note, path, str(index), _depends_on=first) for index in range(10)]
    assert notes(path) == []
    gate.open()
    api.join(first)
    late = [api.call(jobs.note, path, str(index), _depends_on=[first]) for index in range(10, 40)]
    api.join([*early, *late])
    assert sorted(map(int, notes(path))) == list(range(40))


def test_what_a_function_holds_is_that_of_its_own_call(api: ModuleType) -> None:
    held: list[int] = []

    def grow(by: int) -> list[int]:
        held.append(by)
        return held

    jids = []
    for index in range(40):
        jids.append(api.call(grow, -1))
        held.append(index)
    assert api.result(jids) == [[*range(index), -1] for index in range(40)]


@pytest.mark.parametrize("kind", ["method", "partial", "closure"])
def test_what_a_job_changes_in_its_function_no_other_finds(api: ModuleType, kind: str) -> None:
    held: list[int] = []
    functions = {
        "method": held.append,
        "partial": partial(jobs.append, held),
        "closure": lambda value: jobs.append(held, value),
    }
    function = functions[kind]
    found = api.result([api.call(function, index) for index in range(N)])
    assert found == [None if kind == "method" else [index] for index in range(N)]
    tally = jobs.Tally()
    jids = [api.call(tally.count, index, by=index % 3) for index in range(N)]
    tally.total = 10
    jids += [api.call(tally.count, index) for index in range(N)]
    expected = [(index % 3, [index]) for index in range(N)] + [(11, [index]) for index in range(N)]
    assert api.result(jids) == expected


def test_results_come_in_the_order_asked(api: ModuleType) -> None:
    jids = [api.call(sample.square, index) for index in range(N)]
    assert api.result(jids[::-7]) == [index**2 for index in range(N)][::-7]
    assert [api.result(jid) for jid in jids[:5]] == [0, 1, 4, 9, 16]
    assert api.result([jids[3], jids[3], jids[1]]) == [9, 9, 1]


@pytest.mark.parametrize("size", [1_000, 100_000, 1_000_000])
def test_quick_functions_of_large_arguments(api: ModuleType, size: int) -> None:
    api.result([api.call(len, "a few, so that it is known as quick") for _ in range(20)])
    jids = [api.call(len, bytes(size + index)) for index in range(20)]
    assert api.result(jids, timeout=60) == [size + index for index in range(20)]


def test_keyword_arguments_and_mutable_ones_stay_apart(api: ModuleType) -> None:
    shared: list[int] = []
    jids = []
    for index in range(50):
        shared.append(index)
        jids.append(api.call(jobs.append, values=shared, value="end"))
    assert api.result(jids) == [[*range(index + 1), "end"] for index in range(50)]


def test_functions_alternate(api: ModuleType) -> None:
    jids = [api.call(sample.square if index % 3 else sample.identity, index) for index in range(60)]
    assert api.result(jids) == [index**2 if index % 3 else index for index in range(60)]


def test_one_of_them_can_be_killed_before_it_begins(api: ModuleType, tmp_path: Path) -> None:
    gate, path = Gate(tmp_path), str(tmp_path / "notes")
    held = [api.call(gate.hold) for _ in range(8)]
    jids = [api.call(jobs.note, path, str(index)) for index in range(30)]
    api.kill(jids[4])
    gate.open()
    api.join(held)
    api.join(jids, ignore_errors=True)
    assert isinstance(api.result(jids[4], ignore_errors=True), JobKilled)
    assert sorted(map(int, notes(path))) == [index for index in range(30) if index != 4]


def test_one_of_them_can_be_deleted(api: ModuleType) -> None:
    jids = [api.call(sample.identity, index) for index in range(30)]
    api.join(jids)
    api.delete(jids[7])
    with pytest.raises(JobNotFound):
        api.result(jids[7])
    with pytest.raises(JobNotFound):
        api.result(jids)
    assert api.result(jids[8:]) == list(range(8, 30))
    api.delete([*jids[:7], *jids[8:]])
    with pytest.raises(JobNotFound):
        api.status(jids[8])


def test_callbacks_of_later_calls_and_dependants_follow_them(api: ModuleType) -> None:
    jids = [api.call(sample.identity, index) for index in range(30)]
    last = api.call(partial(sample.identity, "last"), _depends_on=jids)
    told: list[int] = []
    watched = api.call(sample.identity, 1, _callback=told.append)
    assert api.result(last) == "last"
    assert eventually(lambda: told) == [watched]
    assert api.status(jids) == ["done"] * 30
