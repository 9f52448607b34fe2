"""Jobs that begin after others, and attempts that follow failed ones."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest

from cloud.errors import JobFailed, JobKilled, JobStalled
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.jobs import Gate, eventually, note, notes


def test_jids_to_depend_on_come_in_every_form(api: ModuleType, gate: Gate) -> None:
    held, mapped = api.call(gate.hold), api.map(sample.square, range(3))
    dependants = [
        api.call(sample.nothing, _depends_on=form)
        for form in (held, [held], (mapped, held), [mapped, held, held], {held}, iter([held]), [range(held, held + 2)])
    ]
    many = api.map(sample.square, range(4), _depends_on=[held, mapped])
    assert set(api.status([*dependants, *many])) == {"waiting"}
    gate.open()
    api.join([*dependants, *many])


def test_finished_jobs_hold_nobody_up(api: ModuleType) -> None:
    done = api.call(sample.nothing)
    api.join(done)
    assert api.result(api.call(sample.square, 3, _depends_on=[done, done])) == 9
    assert api.result(api.map(sample.square, range(3), _depends_on=done)) == [0, 1, 4]
    api.delete(done)


def test_a_diamond_and_a_long_chain(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    top = api.call(note, log, "top")
    sides = [api.call(note, log, "side", _depends_on=top) for _ in range(2)]
    bottom = api.call(note, log, "bottom", _depends_on=sides)
    last = bottom
    for i in range(50):
        last = api.call(note, log, str(i), _depends_on=last)
    api.join(last)
    assert notes(log) == ["top", "side", "side", "bottom", *map(str, range(50))]


@pytest.mark.parametrize("how", ["error", "killed", "stalled", "one of a map"])
def test_whatever_failed_stalls_those_after_it(api: ModuleType, gate: Gate, how: str) -> None:
    failed: object
    if how == "error":
        failed = api.call(sample.boom)
    elif how == "killed":
        failed = api.call(gate.hold)
    elif how == "stalled":
        failed = api.call(sample.nothing, _depends_on=api.call(sample.boom))
    else:
        failed = api.map(sample.boom_if, [0, 0, 1, 0])
    after = [api.call(sample.nothing, _depends_on=failed), *api.map(sample.identity, range(3), _depends_on=failed)]
    if how == "killed":
        gate.await_begun()
        api.kill(failed)
    for jid in after:
        with pytest.raises(JobStalled) as caught:
            api.result(jid, timeout=10)
        assert str(caught.value) == f"Job {jid}: Could not start due to dependency erroring"
        assert (caught.value.jid, caught.value.status) == (jid, "stalled")
    found = api.info(after[0], "all")[after[0]]
    assert (found["status"], found["started"], found["runtime"], found["pid"]) == ("stalled", None, None, None)


def test_errors_of_dependencies_may_be_ignored(api: ModuleType, gate: Gate) -> None:
    held, failed, mapped = api.call(gate.hold), api.call(sample.boom), api.map(sample.boom_if, [0, 1])
    after = [
        api.call(sample.square, 3, _depends_on=[held, failed, mapped], _depends_on_errors="ignore"),
        *api.map(sample.square, [4], _depends_on=[failed, held], _depends_on_errors="ignore"),
    ]
    api.join([failed, mapped], ignore_errors=True)
    assert api.status(after) == ["waiting", "waiting"]
    gate.await_begun()
    api.kill(held)
    assert api.result(after) == [9, 16]


def test_deleting_a_dependency_that_runs_stalls_those_after_it(api: ModuleType, gate: Gate) -> None:
    held = api.call(gate.hold)
    after = api.call(sample.nothing, _depends_on=held)
    gate.await_begun()
    api.delete(held)
    with pytest.raises(JobStalled):
        api.join(after, timeout=10)


def test_killing_what_waits_leaves_the_dependency_alone(api: ModuleType, gate: Gate) -> None:
    held = api.call(gate.hold, "goes on")
    waiting = api.call(sample.nothing, _depends_on=held)
    behind = api.call(sample.nothing, _depends_on=waiting)
    api.kill(waiting)
    assert api.status([waiting, behind]) == ["killed", "stalled"]
    gate.open()
    assert api.result(held) == "goes on"


# --- retries ----------------------------------------------------------------------------------------------------------


def test_a_job_that_raises_is_tried_again(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    jid = api.call(jobs.fail_first, log, 2, "at last", _retries=3, _retry_delay=0)
    assert api.result(jid) == "at last"
    assert len(notes(log)) == 3
    assert api.info(jid, "attempt") == {jid: {"attempt": 3}}


def test_the_last_attempt_s_error_is_the_job_s(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    jid = api.call(jobs.fail_first, log, 9, _retries=2, _retry_delay=0)
    with pytest.raises(JobFailed, match="attempt 3") as caught:
        api.join(jid)
    assert caught.value.__cause__.args == ("attempt 3",)
    assert len(notes(log)) == 3
    none = api.call(jobs.fail_first, str(tmp_path / "none"), 1)
    with pytest.raises(JobFailed, match="attempt 1"):
        api.join(none)


def test_items_of_a_map_are_tried_again_one_by_one(api: ModuleType, tmp_path: Path) -> None:
    def fail_some(i: int) -> int:
        return jobs.fail_first(str(tmp_path / str(i)), i % 3, i)  # type: ignore[no-any-return]

    jids = api.map(fail_some, range(30), _retries=1, _retry_delay=0)
    found = api.result(jids, ignore_errors=True)
    for i, value in enumerate(found):
        if i % 3 == 2:
            assert isinstance(value, JobFailed)
        else:
            assert value == i
        assert len(notes(str(tmp_path / str(i)))) == min(i % 3, 1) + 1
        assert api.info(jids[i], "attempt")[jids[i]]["attempt"] == min(i % 3, 1) + 1


def test_the_delay_doubles(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def fail() -> None:
        note(log, repr(time.time()))
        raise ValueError

    jid = api.call(fail, _retries=3, _retry_delay=0.1)
    api.join(jid, ignore_errors=True)
    times = [float(each) for each in notes(log)]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert len(gaps) == 3
    for gap, delay in zip(gaps, (0.1, 0.2, 0.4), strict=True):
        assert delay * 0.95 <= gap < delay + 0.3


def test_a_job_waits_for_its_next_attempt_and_can_be_killed_then(
    api: ModuleType, one_slot: None, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")
    jid = api.call(jobs.fail_first, log, 9, _retries=5, _retry_delay=3600)
    after = api.call(sample.nothing, _depends_on=jid)
    eventually(lambda: api.status(jid) == "waiting")
    assert api.result(api.call(sample.square, 3)) == 9
    assert api.status([jid, after]) == ["waiting", "waiting"]
    api.kill(jid)
    with pytest.raises(JobKilled):
        api.join(jid)
    assert api.status([jid, after]) == ["killed", "stalled"]
    assert len(notes(log)) == 1


def test_those_after_it_wait_for_the_last_attempt(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    first = api.call(jobs.fail_first, log, 2, _retries=2, _retry_delay=0)
    assert api.result(api.call(lambda: len(notes(log)), _depends_on=first)) == 3


def test_a_killed_job_is_not_tried_again(api: ModuleType, gate: Gate) -> None:
    jid = api.call(gate.hold, _retries=3, _retry_delay=0)
    limited = api.call(gate.hold, _retries=3, _retry_delay=0, _max_runtime=0.5 / 60)
    gate.await_begun(2)
    api.kill(jid)
    api.join(limited, ignore_errors=True, timeout=10)
    assert api.status([jid, limited]) == ["killed", "killed"]
    assert gate.n_begun == 2


def test_retries_do_not_hold_other_jobs_up(api: ModuleType, one_slot: None, tmp_path: Path) -> None:
    def delayed(i: int) -> int:
        return api.call(jobs.fail_first, str(tmp_path / str(i)), 1, i, _retries=1, _retry_delay=0.2)

    slow = [delayed(i) for i in range(5)]
    assert api.result(api.map(sample.square, range(50)), timeout=10) == [i * i for i in range(50)]
    assert api.result(slow, timeout=10) == list(range(5))
