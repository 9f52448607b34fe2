"""``kill`` and limits: every job ends, soon, whatever it does against it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloud.client.cloud import Cloud
from cloud.errors import JobKilled
from tests.integration import jobs
from tests.integration.support import exists, lines_of, until, worker_pids

Opener = Callable[..., Cloud]

KILL_S = 1.0
#: What a machine with other things to do may add.
SLACK_S = 1.0


@contextmanager
def at_once() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < KILL_S + SLACK_S


def words(witness: Path, first: str) -> list[int]:
    return [int(line.split()[1]) for line in lines_of(witness) if line.split()[0] == first and " " in line]


RESISTING = {
    jobs.sleep_noted: "pid",
    jobs.ignore_and_sleep: "deaf",
    jobs.swallow_everything: "stubborn",
    jobs.block_and_sleep: "blocked",
    jobs.compute_in_c: "computing",
    jobs.backtrack: "matching",
    jobs.stop_in_c: "stopped",
    jobs.flood: "flooding",
    jobs.cleaned_up: "entered",
}


@pytest.mark.parametrize("job", RESISTING, ids=lambda job: job.__name__)
def test_a_job_that_resists(mp: Cloud, witness: Path, job: Any) -> None:
    bystander = mp.call(jobs.noted_square, str(witness) + "2", 4, 1.2)
    jid = mp.call(job, str(witness))
    pid = until(lambda: words(witness, RESISTING[job]), "it runs")[0]
    with at_once():
        mp.kill(jid)
    assert mp.status(jid) == "killed"
    with pytest.raises(JobKilled):
        mp.result(jid)
    until(lambda: not exists(pid), "its worker is gone", limit_s=KILL_S + SLACK_S)
    assert mp.result(mp.call(abs, -1), timeout=10) == 1
    assert mp.result(bystander, timeout=10) == 16


def test_all_of_them_at_once(start: Opener, witness: Path) -> None:
    cloud = start(len(RESISTING))
    jids = [cloud.call(job, str(witness)) for job in RESISTING]
    for word in RESISTING.values():
        until(lambda word=word: words(witness, word), f"the job that is {word} runs")
    with at_once():
        cloud.kill(jids)
    assert set(cloud.status(jids)) == {"killed"}
    assert cloud.result(cloud.map(abs, range(20)), timeout=20) == list(range(20))


@pytest.mark.parametrize("how", ["jids", "all"])
def test_two_hundred_jobs_at_once(start: Opener, witness: Path, how: str) -> None:
    # Some run, most wait; calls, a map, dependants.
    cloud = start(4)
    running = [cloud.call(jobs.ignore_and_sleep, str(witness)) for _ in range(4)]
    until(lambda: len(words(witness, "deaf")) == 4, "four run")
    queued = [cloud.call(jobs.sleep_noted, str(witness)) for _ in range(96)]
    mapped = cloud.map(jobs.sleep_noted, [str(witness)] * 80)
    waiting = [cloud.call(abs, 1, _depends_on=queued[0], _depends_on_errors="ignore") for _ in range(20)]
    everything = [*running, *queued, *mapped, *waiting]
    assert len(everything) == 200
    with at_once():
        cloud.kill(everything if how == "jids" else None)
    assert set(cloud.status(everything)) == {"killed"}
    assert words(witness, "pid") == []
    assert cloud.result(cloud.map(abs, range(20)), timeout=20) == list(range(20))


def test_two_hundred_running_jobs_at_once(start: Opener, witness: Path) -> None:
    cloud = start(200)
    jids = cloud.map(jobs.ignore_and_sleep, [str(witness)] * 200)
    until(lambda: len(set(words(witness, "deaf"))) == 200, "all run", limit_s=40)
    pids = words(witness, "deaf")
    began = time.monotonic()
    cloud.kill(jids)
    # 200 processes have to be ended on the cores there are.
    assert time.monotonic() - began < KILL_S + 2 * SLACK_S
    assert set(cloud.status(jids)) == {"killed"}
    until(lambda: not any(map(exists, pids)), "all are gone", limit_s=KILL_S + 2 * SLACK_S)
    assert cloud.result(cloud.call(abs, -1), timeout=20) == 1


def test_a_stopped_worker(mp: Cloud, witness: Path) -> None:
    jid = mp.call(jobs.sleep_noted, str(witness))
    pid = until(lambda: words(witness, "pid"), "it runs")[0]
    os.kill(pid, signal.SIGSTOP)
    with at_once():
        mp.kill(jid)
    until(lambda: not exists(pid), "it is gone", limit_s=KILL_S + SLACK_S)


def test_finally_blocks_run(mp: Cloud, witness: Path) -> None:
    jid = mp.call(jobs.cleaned_up, str(witness))
    until(lambda: lines_of(witness), "it runs")
    with at_once():
        mp.kill(jid)
    assert lines_of(witness)[1:] == ["finally"]


def test_kill_right_after_call(start: Opener, witness: Path) -> None:
    # Before its worker exists, while it starts, just as it begins: the job never runs afterwards.
    cloud = start(2)
    for turn in range(60):
        file = witness.with_name(f"witness{turn}")
        jid = cloud.call(jobs.cleaned_up, str(file))
        deadline = time.monotonic() + turn * 0.0004
        while time.monotonic() < deadline:
            pass
        with at_once():
            cloud.kill(jid)
        assert cloud.status(jid) == "killed"
        assert [line.split()[0] for line in lines_of(file)] in ([], ["entered"], ["entered", "finally"])
        if turn == 30:
            for pid in worker_pids(cloud):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert cloud.result(cloud.map(abs, range(10)), timeout=20) == list(range(10))


def test_kill_spares_what_was_sent_ahead(start: Opener, witness: Path) -> None:
    # Small jobs travel in one message: those behind the killed one run, once.
    cloud = start(1)
    cloud.result(cloud.map(jobs.noted_square, [str(witness) + "0"] * 50, range(50)))
    before = [cloud.call(jobs.noted_square, str(witness), x) for x in range(20)]
    victim = cloud.call(jobs.cleaned_up, str(witness) + "2")
    after = [cloud.call(jobs.noted_square, str(witness), x) for x in range(20, 40)]
    until(lambda: lines_of(Path(str(witness) + "2")), "the victim runs")
    with at_once():
        cloud.kill(victim)
    assert cloud.result([*before, *after], timeout=10) == [x * x for x in range(40)]
    starts = [line for line in lines_of(witness) if line.startswith("start")]
    assert len(starts) == 40


def test_killing_one_item_of_a_map(mp: Cloud, witness: Path) -> None:
    mp.result(mp.map(jobs.noted_square, [str(witness) + "0"] * 50, range(50)))
    jids = mp.map(jobs.noted_square, [str(witness)] * 200, range(200), [0.002] * 200)
    mp.kill(jids[150])
    values = mp.result(jids, ignore_errors=True, timeout=30)
    assert isinstance(values[150], JobKilled)
    assert [value for index, value in enumerate(values) if index != 150] == [x * x for x in range(200) if x != 150]


def test_children_of_the_job_end_with_it(mp: Cloud, witness: Path) -> None:
    jid = mp.call(jobs.start_family, str(witness), 600)
    until(lambda: "ready" in lines_of(witness), "the family stands")
    family = words(witness, "child") + words(witness, "daemon")
    assert len(family) == 3
    assert all(map(exists, family))
    with at_once():
        mp.kill(jid)
    until(lambda: not any(map(exists, family)), "the family is gone", limit_s=KILL_S + SLACK_S)


def test_a_job_that_moved_its_worker_to_another_process_group(mp: Cloud, witness: Path) -> None:
    jid = mp.call(_move_and_sleep, str(witness))
    pid = until(lambda: words(witness, "moved"), "it runs")[0]
    with at_once():
        mp.kill(jid)
    until(lambda: not exists(pid), "it is gone", limit_s=KILL_S + SLACK_S)


def _move_and_sleep(witness: str) -> None:
    import subprocess

    other = subprocess.Popen(["sleep", "600"], process_group=0)
    os.setpgid(0, other.pid)
    jobs.ignore_all_signals()
    jobs.note(witness, "moved", os.getpid())
    time.sleep(600)


def test_max_runtime(mp: Cloud, witness: Path) -> None:
    began = time.monotonic()
    slow = mp.call(jobs.cleaned_up, str(witness), _max_runtime=0.4 / 60)
    stubborn = mp.call(jobs.swallow_everything, str(witness), _max_runtime=0.4 / 60)
    fast = mp.call(jobs.noted_square, str(witness), 2, _max_runtime=5)
    with pytest.raises(JobKilled, match="_max_runtime"):
        mp.result(slow, timeout=10)
    with pytest.raises(JobKilled, match="_max_runtime"):
        mp.result(stubborn, timeout=10)
    assert mp.result(fast, timeout=10) == 4
    assert time.monotonic() - began < 0.4 + KILL_S + 2 * SLACK_S
    assert "finally" in lines_of(witness)
    assert mp.status([slow, stubborn]) == ["killed", "killed"]


def test_max_runtime_does_not_count_the_start_of_the_worker(
    start: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(0.8)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cloud = start(1)
    began = time.monotonic()
    values = [cloud.call(abs, -x, _max_runtime=0.4 / 60) for x in range(3)]
    assert cloud.result(values, timeout=20) == [0, 1, 2]
    assert time.monotonic() - began > 0.8


def test_a_short_and_a_long_grace(start: Opener, witness: Path) -> None:
    impatient, patient = start(1, kill_grace_s=0.0), start(1, kill_grace_s=3.0)
    stubborn = impatient.call(jobs.swallow_everything, str(witness))
    until(lambda: words(witness, "stubborn"), "it runs")
    began = time.monotonic()
    impatient.kill(stubborn)
    assert time.monotonic() - began < 0.5 + SLACK_S
    slow = patient.call(_slow_to_end, str(witness))
    until(lambda: "slow" in lines_of(witness), "it runs")
    patient.kill(slow)
    assert lines_of(witness)[-1] == "ended slowly"


def _slow_to_end(witness: str) -> None:
    try:
        jobs.note(witness, "slow")
        time.sleep(600)
    finally:
        time.sleep(0.7)
        jobs.note(witness, "ended slowly")


def test_kill_from_several_threads(start: Opener, witness: Path) -> None:
    import threading

    cloud = start(4)
    jids = [cloud.call(jobs.swallow_everything, str(witness)) for _ in range(4)]
    jids += [cloud.call(jobs.sleep_noted, str(witness)) for _ in range(40)]
    until(lambda: len(words(witness, "stubborn")) == 4, "four run")
    threads = [threading.Thread(target=cloud.kill, args=(jids[n::2],)) for n in (0, 1, 0, 1)]
    with at_once():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(cloud.status(jids)) == {"killed"}


def test_a_killed_parent_of_nested_jobs(mp: Cloud, witness: Path) -> None:
    jid = mp.call(_nest, str(witness), 3)
    until(lambda: "innermost" in lines_of(witness), "the innermost runs")
    with at_once():
        mp.kill(jid)
    assert mp.status(jid) == "killed"
    with at_once():
        mp.kill()
    assert mp.find(status=["processing", "queued", "waiting"]) == []
    assert mp.result(mp.call(abs, -1), timeout=10) == 1


def _nest(witness: str, depth: int) -> None:
    import cloud.mp

    if depth:
        cloud.mp.result(cloud.mp.call(_nest, witness, depth - 1))
    else:
        jobs.note(witness, "innermost")
        time.sleep(600)


def test_no_slot_is_lost_by_kills(start: Opener, witness: Path) -> None:
    others = psutil.Process().children()
    cloud = start(2)
    for turn in range(25):
        jids = [cloud.call(jobs.sleep_noted, str(witness)), *cloud.map(abs, range(20))]
        if turn % 2:
            until(lambda: lines_of(witness), "it runs")
        cloud.kill(jids)
        witness.unlink(missing_ok=True)
    meeting = witness.with_name("meeting")
    assert len(set(cloud.result(cloud.map(jobs.meet, [str(meeting)] * 2, [2] * 2), timeout=20))) == 2
    assert len(set(psutil.Process().children()) - set(others)) == 1  # the template
