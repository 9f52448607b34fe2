"""Workers that die under their jobs, and the process that starts them."""

from __future__ import annotations

import os
import random
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from cloud.client.cloud import Cloud
from cloud.engine.channel import WRITTEN
from cloud.engine.executor.workers import WorkerHandle
from cloud.errors import CloudException, WorkerLost
from tests.integration import jobs
from tests.integration.support import executor_of, exists, lines_of, template_pid, until, worker_pids

Opener = Callable[..., Cloud]

N_KILLS = 50


def kill_in_turn(pid: int, turn: int) -> None:
    with suppress(ProcessLookupError):
        if turn % 3 == 2:
            os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGTERM if turn % 3 == 1 else signal.SIGKILL)
        os.kill(pid, signal.SIGCONT if turn % 3 == 1 else 0)


def starts_by_item(witness: Path) -> Counter[str]:
    return Counter(line.split()[1] for line in lines_of(witness) if line.startswith("start"))


def runs_for_the_first_time(pid: int, witness: Path) -> bool:
    """True while the stopped worker runs an item that was begun once: three losses are an error."""
    begun = [line.split()[1] for line in lines_of(witness) if line.startswith("start") and line.endswith(f" {pid}")]
    return bool(begun) and starts_by_item(witness)[begun[-1]] == 1 and f"end {begun[-1]}" not in lines_of(witness)


def shoot(cloud: Cloud, witness: Path, turn: int, moments: random.Random) -> bool:
    """Kill a worker, wherever it is in its item, unless another shot has met that item before."""
    pids = worker_pids(cloud)
    if not pids:
        return False
    pid = moments.choice(pids)
    try:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE), "it stops")
        if runs_for_the_first_time(pid, witness):
            kill_in_turn(pid, turn)
            return True
        os.kill(pid, signal.SIGCONT)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass
    return False


def all_workers_work(cloud: Cloud, n: int, witness: Path) -> None:
    meeting = witness.with_name(f"meeting{uuid.uuid4()}")
    assert len(set(cloud.result(cloud.map(jobs.meet, [str(meeting)] * n, [n] * n), timeout=20))) == n


def storm(cloud: Cloud, witness: Path, seed: int, *, submit: Callable[[], object]) -> None:
    """Kill workers at random moments, as many as promised; submit more whenever little is left."""
    moments = random.Random(seed)
    never = threading.Event()
    for turn in range(N_KILLS):
        never.wait(moments.uniform(0.0, 0.02))
        while not shoot(cloud, witness, turn, moments):
            if len(cloud.find(status=["queued", "processing"])) < 20:
                submit()
            never.wait(0.001)


def test_restartable_jobs_survive_the_deaths_of_their_workers(start: Opener, witness: Path) -> None:
    cloud = start(4)
    file = str(witness)
    wanted: dict[int, int] = {}

    def submit() -> None:
        base = len(wanted)
        for x in range(base, base + 40):
            wanted[cloud.call(jobs.noted_square, file, x, 0.01)] = x * x
        base += 40
        jids = cloud.map(jobs.noted_square, [file] * 40, range(base, base + 40), [0.01] * 40)
        wanted.update({jid: (base + index) ** 2 for index, jid in enumerate(jids)})

    storm(cloud, witness, 1, submit=submit)
    assert cloud.result(list(wanted), timeout=60) == list(wanted.values())
    again = sum(1 for n in starts_by_item(witness).values() if n > 1)
    assert 0 < again <= N_KILLS
    all_workers_work(cloud, 4, witness)


def test_who_runs_again_gets_the_arguments_as_they_were_sent(start: Opener, tmp_path: Path) -> None:
    cloud = start(1)
    numbers, dying = np.arange(100_000.0), tmp_path / "dying"
    # From the second job in the same worker on, what is returned lies in the memory that was given.
    for dies in (False, False, True, False, False):
        if dies:
            dying.touch()
        jid = cloud.call(jobs.double_and_die, numbers, str(dying))
        assert np.array_equal(cloud.result(jid, timeout=20), 2 * numbers)
        assert cloud.info(jid, "attempt")[jid]["attempt"] == 1 + dies


def test_jobs_that_must_not_be_restarted_run_at_most_once(start: Opener, witness: Path) -> None:
    cloud = start(4)
    file = str(witness)
    wanted: dict[int, int] = {}

    def submit() -> None:
        base = len(wanted)
        for x in range(base, base + 40):
            wanted[cloud.call(jobs.noted_square, file, x, 0.01, _restartable=False)] = x
        base += 40
        items = [file] * 40, range(base, base + 40), [0.01] * 40
        jids = cloud.map(jobs.noted_square, *items, _restartable=False)
        wanted.update({jid: base + index for index, jid in enumerate(jids)})

    storm(cloud, witness, 2, submit=submit)
    values = cloud.result(list(wanted), timeout=60, ignore_errors=True)
    assert max(starts_by_item(witness).values()) == 1
    ended = Counter(line.split()[1] for line in lines_of(witness) if line.startswith("end"))
    lost = 0
    for (jid, x), value in zip(wanted.items(), values, strict=True):
        if isinstance(value, CloudException):
            assert isinstance(value, WorkerLost)
            assert (value.jid, value.status) == (jid, "error")
            assert value.exitcode in (-signal.SIGKILL, -signal.SIGTERM)
            lost += 1
        else:
            assert value == x * x
            assert ended[str(x)] == 1
    assert 0 < lost <= N_KILLS
    all_workers_work(cloud, 4, witness)


@pytest.mark.parametrize("restartable", [True, False])
def test_maps_of_tiny_items_under_fire(start: Opener, witness: Path, restartable: bool) -> None:
    # Many items share a message here: what was reported, what was begun and what was not must be told apart.
    cloud = start(2)
    moments = random.Random(3)
    never = threading.Event()
    for turn in range(6):
        file = str(witness) + str(turn)
        jids = cloud.map(jobs.noted_square, [file] * 2000, range(2000), _restartable=restartable)
        until(lambda file=file: lines_of(Path(file)), "an item runs")
        never.wait(moments.uniform(0.0, 0.03))
        for pid in worker_pids(cloud):
            kill_in_turn(pid, turn)
        values = cloud.result(jids, timeout=60, ignore_errors=True)
        failed = [x for x, value in enumerate(values) if isinstance(value, CloudException)]
        assert [value for x, value in enumerate(values) if x not in failed] == [
            x * x for x in range(2000) if x not in failed
        ]
        starts = starts_by_item(Path(file))
        if restartable:
            assert failed == []
            assert len(starts) == 2000
        else:
            assert max(starts.values()) == 1
            assert len(failed) <= 2


def test_a_death_is_told_in_time_and_costs_nobody_else_anything(start: Opener, witness: Path) -> None:
    cloud = start(2)
    bystander = cloud.call(jobs.noted_square, str(witness), 3, 0.5, _restartable=False)
    victim = cloud.call(jobs.sleep_noted, str(witness), _restartable=False)
    line = until(lambda: [line for line in lines_of(witness) if line.startswith("pid")], "the victim runs")[0]
    os.kill(int(line.split()[1]), signal.SIGKILL)
    with pytest.raises(WorkerLost, match="SIGKILL") as caught:
        cloud.result(victim, timeout=2)
    assert caught.value.exitcode == -signal.SIGKILL
    assert cloud.result(bystander) == 9


def test_a_worker_lost_again_and_again_is_an_error_in_the_end(mp: Cloud) -> None:
    with pytest.raises(WorkerLost, match="SIGKILL"):
        mp.result(mp.call(jobs.kill_self, signal.SIGKILL), timeout=10)
    assert mp.info(1, "attempt")[1]["attempt"] == 3
    with pytest.raises(WorkerLost):
        mp.result(mp.call(jobs.kill_self, signal.SIGTERM, _restartable=False), timeout=10)
    assert mp.info(2, "attempt")[2]["attempt"] == 1


def spoil_ring(worker: WorkerHandle) -> None:
    worker.slots[WRITTEN] = 1 << 61


def lose_track(worker: WorkerHandle) -> None:
    """As if it had told of other items than it was given."""
    with suppress(IndexError):
        worker.tasks[0].position += 1


@pytest.mark.parametrize("spoil", [spoil_ring, lose_track])
def test_a_worker_that_tells_what_makes_no_sense_is_replaced(
    start: Opener, witness: Path, spoil: Callable[[WorkerHandle], None]
) -> None:
    cloud = start(1)
    jids = cloud.map(jobs.noted_square, [str(witness)] * 300, range(300), [0.001] * 300)
    until(lambda: lines_of(witness), "an item runs")
    (pid,), (worker,) = worker_pids(cloud), executor_of(cloud)._workers.values()
    with cloud.backend.engine.lock:  # type: ignore[attr-defined]
        spoil(worker)
    values = cloud.result(jids, timeout=20, ignore_errors=True)
    # The one that ran is suspected of it.
    suspects = [x for x, value in enumerate(values) if isinstance(value, WorkerLost)]
    assert len(suspects) <= 1
    assert [value for x, value in enumerate(values) if x not in suspects] == [
        x * x for x in range(300) if x not in suspects
    ]
    assert worker_pids(cloud) != [pid]


def test_idle_workers_that_are_killed_are_not_missed(start: Opener, witness: Path) -> None:
    cloud = start(3)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        all_workers_work(cloud, 3, witness.with_name(f"of{number}"))
        pids = worker_pids(cloud)
        for pid in pids:
            os.kill(pid, number)
        until(lambda pids=pids: not any(map(exists, pids)), "the workers are dead")
        values = [cloud.call(jobs.noted_square, str(witness), x, _restartable=False) for x in range(6)]
        assert cloud.result(values, timeout=10) == [x * x for x in range(6)]
    assert max(starts_by_item(witness).values()) == 3  # once in each round


def test_workers_killed_while_they_start(start: Opener, witness: Path) -> None:
    cloud = start(2)
    for x in range(10):
        cloud.call(jobs.noted_square, str(witness), x, _restartable=False)
        for worker in list(executor_of(cloud)._workers.values()):
            if worker.pid:
                kill_in_turn(worker.pid, x)
    values = cloud.result(range(1, 11), timeout=20, ignore_errors=True)
    assert all(isinstance(value, WorkerLost) or value == x * x for x, value in enumerate(values))
    assert max(starts_by_item(witness).values(), default=0) <= 1
    assert cloud.result(cloud.call(abs, -1), timeout=10) == 1


def test_the_template_is_killed_while_jobs_run(start: Opener, witness: Path) -> None:
    cloud = start(2)
    file = str(witness)
    for round_ in range(4):
        first = cloud.map(jobs.noted_square, [file] * 30, range(round_ * 100, round_ * 100 + 30), [0.005] * 30)
        once = [
            cloud.call(jobs.noted_square, file, -x - round_ * 100 - 1, 0.005, _restartable=False) for x in range(10)
        ]
        until(lambda n=round_ * 40: len(lines_of(witness)) > n, "jobs run")
        os.kill(template_pid(cloud), (signal.SIGKILL, signal.SIGTERM)[round_ % 2])
        assert cloud.result(first, timeout=20) == [x * x for x in range(round_ * 100, round_ * 100 + 30)]
        values = cloud.result(once, timeout=20, ignore_errors=True)
        assert all(isinstance(value, WorkerLost) or value >= 1 for value in values)
    assert max(n for x, n in starts_by_item(witness).items() if int(x) < 0) == 1
    all_workers_work(cloud, 2, witness)


def test_the_template_is_killed_while_all_is_idle(start: Opener, witness: Path) -> None:
    cloud = start(2)
    for round_ in range(3):
        all_workers_work(cloud, 2, witness.with_name(f"round{round_}"))
        pids = worker_pids(cloud)
        os.kill(template_pid(cloud), signal.SIGKILL)
        assert cloud.result(cloud.call(abs, -1), timeout=10) == 1
        until(lambda pids=pids: not any(map(exists, pids)), "its workers went with it")


def test_the_template_and_all_workers_are_killed_at_once(start: Opener, witness: Path) -> None:
    cloud = start(2)
    for _ in range(5):
        jids = cloud.map(jobs.noted_square, [str(witness)] * 20, range(20), [0.01] * 20)
        n = len(lines_of(witness))
        until(lambda n=n: len(lines_of(witness)) > n, "jobs run")
        for pid in [*worker_pids(cloud), template_pid(cloud)]:
            kill_in_turn(pid, 0)
        assert cloud.result(jids, timeout=20) == [x * x for x in range(20)]


def test_a_template_that_is_stopped_for_a_while(start: Opener, witness: Path) -> None:
    cloud = start(2)
    assert cloud.result(cloud.call(abs, -1)) == 1
    pid = template_pid(cloud)
    os.kill(pid, signal.SIGSTOP)
    try:
        # Workers that live go on; what needs a new one waits.
        assert cloud.result([cloud.call(abs, -x) for x in range(20)], timeout=10) == list(range(20))
        for worker in worker_pids(cloud):
            os.kill(worker, signal.SIGKILL)
        waiting = cloud.map(jobs.meet, [str(witness)] * 2, [2] * 2)
        with pytest.raises(TimeoutError):
            cloud.result(waiting, timeout=0.2)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert len(set(cloud.result(waiting, timeout=10))) == 2


def test_a_stopped_worker_goes_on_after_sigcont(start: Opener, witness: Path) -> None:
    cloud = start(1)
    jid = cloud.call(jobs.noted_square, str(witness), 5, 0.2)
    until(lambda: lines_of(witness), "it runs")
    pid = worker_pids(cloud)[0]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        cloud.result(jid, timeout=0.5)
    os.kill(pid, signal.SIGCONT)
    assert cloud.result(jid, timeout=10) == 25
    assert starts_by_item(witness) == {"5": 1}
