"""Looking at workers that say nothing: how often, what is called in, and what is seen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cloud.engine import channel as ch
from cloud.engine.executor.base import AHEAD_S
from cloud.engine.executor.lookout import Lookout
from cloud.engine.executor.workers import STALL_S, WorkerHandle


class Worker:
    """As much of a ``WorkerHandle`` as is looked at; busy with many items until told otherwise."""

    def __init__(self) -> None:
        self.slots = [0] * 16
        self.slots[ch.HOLD] = ch.HOLD_NS
        self.batch = SimpleNamespace(watches=None, queued_s=10.0, function=SimpleNamespace(mean_s=0.001))
        self.tasks: deque[Any] = deque([SimpleNamespace(batch=self.batch)])
        self.n_items_over_one = True
        self.left_s = 1.0
        self.n_left = 50
        self.load_s = 1.0
        self.has_begun = True
        self.poke_again_at = self.seen_at = 0.0
        self.seen_current = -1
        self.is_heard = False
        self.unanswered = 0
        self.told: tuple[bool, int] | None = None
        self.leaves = False

    mean_s = WorkerHandle.mean_s

    def looks(self, regularly: bool, hold_ns: int) -> bool:
        before, self.leaves = self.leaves, regularly
        self.told = regularly, hold_ns
        self.slots[ch.HOLD] = hold_ns
        return before and not regularly

    def limit_output(self) -> bool:
        return False

    def hold_since(self, seconds_ago: float) -> None:
        self.slots[ch.HELD] = int(1e9 * (time.monotonic() - seconds_ago))

    def send(self) -> None:
        self.slots[ch.HELD] = 0


class House:
    """A lookout over some workers, and a note of what it had done."""

    def __init__(self, n_workers: int = 1) -> None:
        self.workers = [Worker() for _ in range(n_workers)]
        self.events: list[tuple[str, int]] = []
        self.on_poke: Callable[[Worker], None] = Worker.send
        self.lookout = Lookout(
            lambda: self.workers,  # type: ignore[arg-type, return-value]
            take=self._noting("take"),
            read=self._noting("read"),
            poke=self._poke,
            capture=True,
        )

    def _noting(self, what: str) -> Any:
        return lambda worker: self.events.append((what, self.workers.index(worker)))

    def _poke(self, worker: Any) -> None:
        self.events.append(("poke", self.workers.index(worker)))
        self.on_poke(worker)

    def plan(self, *, may_be_patient: bool, has_queued: bool = False) -> float | None:
        return self.lookout.plan(may_be_patient=may_be_patient, has_queued=has_queued)


@pytest.fixture
def house() -> House:
    return House(2)


def test_nobody_looks_where_there_is_nothing_to_see(house: House) -> None:
    for worker in house.workers:
        worker.tasks.clear()
        worker.n_items_over_one = False
    assert house.plan(may_be_patient=True) is None
    assert not (house.lookout.regular or house.lookout.patient)
    # One that runs one job may print.
    house.workers[0].tasks.append(SimpleNamespace(batch=house.workers[0].batch))
    limit_s = house.plan(may_be_patient=True)
    assert limit_s is not None and limit_s >= 0.005
    assert not (house.lookout.regular or house.lookout.patient)
    assert [worker.told for worker in house.workers] == [(False, house.workers[0].slots[ch.HOLD])] * 2


def test_a_patient_one_looks_less_often_and_lets_workers_hold_more_and_have_more_ahead(house: House) -> None:
    often = house.plan(may_be_patient=False)
    assert often is not None and often <= 0.008
    assert house.lookout.regular and not house.lookout.patient
    assert house.lookout.ahead_s == AHEAD_S
    assert {worker.told for worker in house.workers} == {(True, ch.HOLD_NS)}
    seldom = house.plan(may_be_patient=True)
    assert seldom is not None and seldom > 3 * often
    assert house.lookout.regular and house.lookout.patient
    assert house.lookout.ahead_s > 1.5 * seldom
    assert {worker.told for worker in house.workers} == {(True, house.workers[0].slots[ch.HOLD])}
    assert house.workers[0].slots[ch.HOLD] > ch.HOLD_NS
    house.plan(may_be_patient=False)
    assert house.workers[0].slots[ch.HOLD] == ch.HOLD_NS
    assert not house.lookout.patient


def test_nobody_is_patient_while_somebody_is_to_be_told_of_single_jobs(house: House) -> None:
    house.workers[1].batch.watches = object()
    assert house.plan(may_be_patient=True) == house.plan(may_be_patient=False)
    assert not house.lookout.patient


def test_nobody_is_patient_while_a_worker_has_something_else_to_do_behind(house: House) -> None:
    house.workers[1].tasks.append(SimpleNamespace(batch=Worker().batch))
    assert house.plan(may_be_patient=True) == house.plan(may_be_patient=False)
    assert not house.lookout.patient
    house.workers[1].tasks.popleft()
    house.plan(may_be_patient=True)
    assert house.lookout.patient


def test_less_is_sent_ahead_towards_the_end_of_a_map(house: House) -> None:
    house.plan(may_be_patient=True, has_queued=True)
    most = house.lookout.ahead_s
    for worker in house.workers:
        worker.batch.queued_s = 4 * most / 2
    house.plan(may_be_patient=True, has_queued=True)
    assert house.lookout.ahead_s == pytest.approx(most / 2)
    for worker in house.workers:
        worker.batch.queued_s = 0.0
    house.plan(may_be_patient=True)
    assert house.lookout.ahead_s == AHEAD_S


def test_who_has_little_gets_more_in_time(house: House) -> None:
    seldom = house.plan(may_be_patient=True, has_queued=True)
    house.workers[1].left_s = 0.02
    assert house.plan(may_be_patient=True, has_queued=True) == pytest.approx(0.012)
    assert seldom is not None and seldom > 0.1
    house.workers[1].left_s = 0.0
    assert house.plan(may_be_patient=True, has_queued=True) == house.plan(may_be_patient=False)


def test_what_comes_of_the_last_items_is_read_while_they_run(house: House) -> None:
    seldom = house.plan(may_be_patient=True)
    house.workers[1].left_s = 0.02
    assert house.plan(may_be_patient=True) == pytest.approx(0.012)
    house.workers[1].left_s = 0.002  # it would not be worth it
    assert house.plan(may_be_patient=True) == seldom


def test_a_look_takes_what_was_left_and_pokes_those_that_hold_for_too_long(house: House) -> None:
    house.on_poke = lambda worker: None
    house.plan(may_be_patient=False)
    now = time.monotonic()
    house.workers[0].hold_since(0.5)
    house.workers[1].hold_since(0.0005)
    assert house.lookout.look(now) == []
    assert house.events == [("take", 0), ("poke", 0), ("take", 1)]
    house.events.clear()
    house.lookout.look(now + 0.001)
    assert house.events == [("take", 0), ("take", 1)], "it was poked a moment ago"
    house.lookout.look(now + 0.5)
    assert ("poke", 0) in house.events


def test_what_a_worker_may_hold_is_not_called_in_by_a_look(house: House) -> None:
    house.plan(may_be_patient=True)
    now = time.monotonic()
    house.workers[0].hold_since(0.25)
    house.lookout.look(now)
    assert ("poke", 0) not in house.events, "it is about to hand it over, and nobody waits for that"
    house.workers[0].hold_since(0.5)
    house.lookout.look(now)
    assert ("poke", 0) in house.events, "it stands at a long item"


def test_a_look_finds_those_that_stand_at_one_item(house: House) -> None:
    first, second = house.workers
    now = time.monotonic()
    assert house.lookout.look(now) == []
    second.slots[ch.CURRENT] += 1
    # Not just STALL_S later: in floating point that may be less.
    assert house.lookout.look(now + 1.1 * STALL_S) == [first]
    assert house.lookout.look(now + 1.5 * STALL_S) == [], "that was told a moment ago"
    assert house.lookout.look(now + 2.5 * STALL_S) == [second]


def test_one_whose_last_was_in_its_ring_has_nothing_to_stand_at(house: House) -> None:
    now = time.monotonic()
    house.lookout.look(now)
    for worker in house.workers:
        worker.slots[ch.HELD] = 0
    house.lookout._take = lambda worker: worker.tasks.clear()
    assert house.lookout.look(now + 1.0) == []


def test_an_item_as_long_as_others_is_no_reason_to_move_those_behind_it(house: House) -> None:
    first, second = house.workers
    first.batch.function.mean_s = 0.05
    now = time.monotonic()
    house.lookout.look(now)
    assert house.lookout.look(now + 0.15) == [second]
    assert house.lookout.look(now + 0.21) == [first]


def test_a_patient_one_sends_more_ahead_of_long_items_though_workers_leave_nothing_yet(house: House) -> None:
    for worker in house.workers:
        worker.n_items_over_one = False
    house.plan(may_be_patient=True, has_queued=True)
    assert house.lookout.ahead_s > AHEAD_S
    assert not house.lookout.patient, "there is nothing to call in"
    house.plan(may_be_patient=False, has_queued=True)
    assert house.lookout.ahead_s == AHEAD_S


def test_the_ends_of_long_items_are_sent_and_nobody_looks_for_them(house: House) -> None:
    for worker in house.workers:
        worker.batch.function.mean_s = 0.01
        worker.n_left, worker.leaves = 1, True
    soon = house.plan(may_be_patient=False, has_queued=True)
    assert soon is not None and soon < 0.01, "once more: it may just be leaving something"
    limit_s = house.plan(may_be_patient=False, has_queued=True)
    assert limit_s is not None and limit_s > 0.02, "what is printed is still looked at"
    assert [worker.told for worker in house.workers] == [(False, 0)] * 2
    house.workers[0].hold_since(0.5)
    house.lookout.look(time.monotonic())
    assert ("poke", 0) not in house.events, "that is the item it runs"
    house.workers[0].batch.function.mean_s = 0.001
    assert house.plan(may_be_patient=False) == pytest.approx(0.006)
    assert [worker.told for worker in house.workers] == [(True, ch.HOLD_NS), (False, 0)]


def test_who_was_sent_much_while_somebody_was_patient_is_looked_at_as_often_as_others(house: House) -> None:
    for worker in house.workers:
        worker.batch.function.mean_s = 0.02
    house.plan(may_be_patient=True, has_queued=True)
    house.events.clear()
    assert house.plan(may_be_patient=False, has_queued=True) == pytest.approx(0.006)
    assert house.events == [("poke", 0), ("poke", 1)], "they hold for as long as they were told before"
    house.plan(may_be_patient=False, has_queued=True)
    assert len(house.events) == 2


def test_what_was_sent_far_ahead_makes_way_for_what_has_priority(house: House) -> None:
    for worker in house.workers:
        worker.batch.options = SimpleNamespace(priority=5)
    assert house.lookout.is_far_ahead_of(4)
    assert not house.lookout.is_far_ahead_of(5)
    for worker in house.workers:
        worker.left_s = AHEAD_S
    assert not house.lookout.is_far_ahead_of(4)


def test_nothing_is_sent_far_ahead_any_more_once_nobody_is_patient(house: House) -> None:
    house.plan(may_be_patient=True, has_queued=True)
    house.lookout.begin(patient=True)
    assert house.lookout.ahead_s > AHEAD_S
    house.lookout.begin(patient=False)
    assert house.lookout.ahead_s == AHEAD_S


def test_whoever_asks_calls_in_what_is_held(house: House) -> None:
    house.plan(may_be_patient=True)
    house.workers[0].hold_since(0.02)
    house.workers[1].hold_since(0.0)
    house.lookout.call_in()
    assert house.events == [("take", 0), ("poke", 0), ("take", 1), ("read", 0)]


def test_one_that_does_not_answer_is_not_waited_for_long(house: House) -> None:
    house.on_poke = lambda worker: None
    house.plan(may_be_patient=True)
    house.workers[0].hold_since(0.02)
    house.lookout.call_in()
    assert house.events.count(("poke", 0)) == 1
    assert house.events[-1] == ("read", 0)
    house.events.clear()
    house.lookout.call_in()
    assert house.events == [("take", 0), ("poke", 0), ("take", 1)], "it is not waited for again"
    house.workers[0].hold_since(0.01)
    house.lookout.call_in()
    assert house.events[-1] == ("read", 0), "it has answered since"


def test_only_those_are_called_in_that_have_something_and_are_not_being_heard(house: House) -> None:
    house.plan(may_be_patient=True)
    for worker in house.workers:
        worker.hold_since(0.02)
    house.workers[0].tasks.clear()
    house.workers[1].is_heard = True
    house.lookout.call_in()
    assert house.events == [("take", 0), ("take", 1)]
