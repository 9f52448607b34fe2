"""Ending jobs: raised in them first, ended for certain soon after, and nobody else hurt."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from cloud.errors import CloudTimeoutError, JobKilled, KilledException
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import PROCESSES_ONLY
from tests.contract.jobs import Gate, NotesDumps, eventually, note, notes

WITHIN_S = 1.5
"""The promise is one second; the rest is for a busy machine."""


def test_finally_blocks_run_and_the_text_tells_where(api: ModuleType, gate: Gate, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def job() -> None:
        print("printed before")
        try:
            gate.hold()
        finally:
            note(log, "cleaned up")

    jid = api.call(job)
    gate.await_begun()
    assert api.kill(jid) is None
    assert api.status(jid) == "killed"
    assert notes(log) == ["cleaned up"]
    with pytest.raises(JobKilled) as caught:
        api.result(jid)
    assert (caught.value.jid, caught.value.status) == (jid, "killed")
    assert caught.value.parameter.startswith("Traceback (most recent call last):")
    assert "in hold" in caught.value.parameter
    assert caught.value.parameter.endswith("KilledException: Job terminated by user")
    found = api.info(jid, "all")[jid]
    assert found["stdout"] == "printed before\n"
    assert found["exception"] == caught.value.parameter
    assert found["runtime"] > 0
    assert found["pid"] > 0


@pytest.mark.parametrize("items", ["numbers", "records", "objects", "pairs", "pairs of records", "calls of a method"])
def test_it_is_raised_in_whatever_was_sent_together(
    api: ModuleType, one_slot: None, gate: Gate, tmp_path: Path, items: str
) -> None:
    log, n = str(tmp_path / "log"), 40

    def hold_one(item: object, *_: object) -> None:
        if item == 20 or item == {"number": 20} or (isinstance(item, jobs.Tally) and item.total == 20):
            gate.hold_then_note(log)

    held = [gate]

    class Holder:
        def look(self, item: object) -> None:
            held.append(self)
            hold_one(item)

    def tally(total: int) -> jobs.Tally:
        made = jobs.Tally()
        made.total = total
        return made

    records = [{"number": number} for number in range(n)]
    if items == "calls of a method":
        api.result(api.call(abs, 1))
        look = Holder().look
        jids = [api.call(look, number) for number in range(n)]
    else:
        iterables = {
            "numbers": [range(n)],
            "records": [records],
            "objects": [[tally(number) for number in range(n)]],
            "pairs": [range(n), range(n)],
            "pairs of records": [records, [[] for _ in range(n)]],
        }[items]
        jids = list(api.map(hold_one, *iterables))
    gate.await_begun()
    api.kill(jids[20])
    assert notes(log) == ["KilledException"]
    api.join(jids, ignore_errors=True)
    assert [index for index, status in enumerate(api.status(jids)) if status != "done"] == [20]


def test_what_has_not_begun_is_just_marked(api: ModuleType, one_slot: None, gate: Gate, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    api.call(gate.hold)
    gate.await_begun()
    queued, mapped = api.call(note, log), api.map(lambda i: note(log), range(5))
    waiting = api.call(note, log, _depends_on=queued, _depends_on_errors="ignore")
    api.kill([queued, mapped, waiting])
    assert api.status([queued, *mapped, waiting]) == ["killed"] * 7
    with pytest.raises(JobKilled) as caught:
        api.join(queued)
    assert str(caught.value) == f"Job {queued}: Killed"
    gate.open()
    assert api.result(api.call(sample.square, 3)) == 9
    assert notes(log) == []


def test_an_except_exception_does_not_swallow_it(api: ModuleType, gate: Gate) -> None:
    def job() -> str:
        try:
            gate.hold()
        except Exception:
            return "swallowed"
        return "let go"

    jid = api.call(job)
    gate.await_begun()
    api.kill(jid)
    assert api.status(jid) == "killed"


def test_a_job_that_swallows_it_and_returns_was_killed_all_the_same(api: ModuleType, gate: Gate) -> None:
    def job() -> str:
        try:
            gate.hold()
        except KilledException:
            return "swallowed"
        return "let go"

    jid = api.call(job)
    gate.await_begun()
    api.kill(jid)
    with pytest.raises(JobKilled):
        api.result(jid)


def test_none_means_every_unfinished_job_and_an_empty_list_none(api: ModuleType, two_slots: None, gate: Gate) -> None:
    done = api.call(sample.square, 3)
    api.join(done)
    held = [api.call(gate.hold) for _ in range(2)]
    gate.await_begun(2)
    queued = api.map(sample.square, range(3))
    for nothing in ([], (), range(0), iter([])):
        assert api.kill(nothing) is None
    assert api.status([done, *held, *queued]) == ["done", *["processing"] * 2, *["queued"] * 3]
    assert api.kill() is None
    assert api.status([done, *held, *queued]) == ["done", *["killed"] * 5]
    api.kill(None)
    assert api.result([done, api.call(sample.square, 4)]) == [9, 16]


def test_finished_jobs_are_left_alone(api: ModuleType) -> None:
    done, failed = api.call(sample.square, 3), api.call(sample.boom)
    api.join([done, failed], ignore_errors=True)
    api.kill([done, failed, done])
    assert api.status([done, failed]) == ["done", "error"]
    assert api.result(done) == 9


def test_only_the_named_jobs_end(api: ModuleType, two_slots: None, gate: Gate) -> None:
    victim, other = api.call(gate.hold), api.call(gate.hold, "other")
    gate.await_begun(2)
    behind = api.map(sample.square, range(10))
    api.kill(victim)
    assert api.status([victim, other]) == ["killed", "processing"]
    assert api.result(behind, timeout=10) == [i * i for i in range(10)]
    gate.open()
    assert api.result(other) == "other"


def test_jobs_can_be_killed_by_label(api: ModuleType, gate: Gate) -> None:
    api.map(gate.hold, range(20), _label="these")
    kept = api.call(gate.hold, "kept")
    gate.await_begun()
    api.kill(api.find(label="these"))
    gate.open()
    assert api.result(kept) == "kept"
    assert len(api.find(label="these", status="killed")) == 20


def test_who_waits_is_told(api: ModuleType, gate: Gate) -> None:
    import threading

    jid, raised = api.call(gate.hold), []
    gate.await_begun()

    def wait() -> None:
        try:
            api.join(jid)
        except JobKilled as exc:
            raised.append(exc.jid)

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(CloudTimeoutError):
        api.join(jid, timeout=0.05)
    api.kill(jid)
    thread.join(10)
    assert raised == [jid]


def test_killing_again_and_again_in_the_middle_of_many_jobs(api: ModuleType, two_slots: None) -> None:
    jids = api.map(sample.sleep_then, [0.001] * 300, range(300))
    for part in range(0, 300, 30):
        api.kill(jids[part : part + 10])
    api.join(jids, ignore_errors=True, timeout=30)
    states = api.status(jids)
    assert set(states) <= {"done", "killed"}
    assert [states[i] for i in range(300) if i % 30 >= 10] == ["done"] * 200
    found = api.result(jids, ignore_errors=True)
    for i, (state, value) in enumerate(zip(states, found, strict=True)):
        assert value == i if state == "done" else isinstance(value, JobKilled)


def test_one_whose_result_is_being_pickled(api: ModuleType, one_slot: None, gate: Gate, tmp_path: Path) -> None:
    asked = str(tmp_path / "asked")
    jids = api.map(lambda i: NotesDumps(asked, gate=gate) if i == 3 else [i], range(8))
    gate.await_begun()
    api.kill(jids[3])
    assert api.status(jids[3]) == "killed"
    assert eventually(lambda: notes(asked)[1:]) == ["KilledException"], "it was told, and asked once"
    assert api.result([jid for jid in jids if jid != jids[3]], timeout=20) == [[i] for i in range(8) if i != 3]


# --- by force ---------------------------------------------------------------------------------------------------------


@PROCESSES_ONLY
def test_one_that_ignores_everything_ends_within_a_second(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    jid = api.call(sample.ignore_sigterm, log, 60)
    [pid] = [int(each) for each in eventually(lambda: notes(log))]
    began = time.monotonic()
    api.kill(jid)
    assert time.monotonic() - began < WITHIN_S
    assert api.status(jid) == "killed"
    assert eventually(lambda: not psutil.pid_exists(pid))
    with pytest.raises(JobKilled, match="Killed"):
        api.join(jid)
    assert api.result(api.call(sample.square, 3)) == 9


@PROCESSES_ONLY
def test_a_stopped_process_ends_too(api: ModuleType, gate: Gate) -> None:
    jid = api.call(gate.hold)
    [pid] = gate.await_begun()
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    api.kill(jid)
    assert time.monotonic() - began < WITHIN_S
    assert api.status(jid) == "killed"
    assert eventually(lambda: not psutil.pid_exists(pid))


@PROCESSES_ONLY
def test_many_at_once_take_no_longer(api: ModuleType, configure: object, tmp_path: Path) -> None:
    configure(num_procs=8)  # type: ignore[operator]
    log = str(tmp_path / "log")
    jids = api.map(sample.ignore_sigterm, [log] * 8, [60] * 8)
    pids = [int(each) for each in eventually(lambda: len(notes(log)) == 8 and notes(log))]
    began = time.monotonic()
    api.kill()
    assert time.monotonic() - began < WITHIN_S
    assert api.status(jids) == ["killed"] * 8
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@PROCESSES_ONLY
def test_its_children_end_with_it(api: ModuleType, tmp_path: Path, gate: Gate) -> None:
    log = str(tmp_path / "log")

    def job() -> None:
        import subprocess

        child = subprocess.Popen(["sleep", "60"])
        escaped = subprocess.Popen(["sleep", "60"], start_new_session=True)
        note(log, f"{child.pid} {escaped.pid}")
        gate.hold()

    jid = api.call(job)
    gate.await_begun()
    pids = [int(each) for each in notes(log)[0].split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    api.kill(jid)
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))
