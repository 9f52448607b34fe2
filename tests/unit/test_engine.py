"""Each clause of the state machine, with an executor that the test works by hand."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.engine import overview
from cloud.engine.engine import Engine
from cloud.engine.executor.base import AHEAD_S
from cloud.engine.store.base import Batch, Watch, Watches
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.engine.waits import Wait
from cloud.engine.watching import on_each_final, when_final
from cloud.errors import BackendClosed, JobNotFound, UnsupportedOperation
from cloud.jobs import (
    DEFAULT_OPTIONS,
    DONE,
    ERROR,
    ERROR_TEXT,
    EXITCODE,
    KILLED,
    PACKED,
    PROCESSING,
    QUEUED,
    STALLED,
    STDERR,
    STDOUT,
    VALUE,
    WAITING,
    Jids,
    JobOptions,
    Outcome,
    pack_outcome,
)
from cloud.serialization.functions import Function
from tests.unit.fake_executor import ByHand, frozen_virtual_clock

CONTEXT = (1, b"")
RAISED = pack_outcome(ERROR, [(ERROR_TEXT, b"it raised")])


def done(value: Any = None, runtime_s: float = 1.0) -> bytes:
    return pack_outcome(DONE, [(VALUE, pickle.dumps(value))], runtime_s=runtime_s)


def packed(values: list[Any], runtime_s: float = 0.0) -> bytes:
    return pack_outcome(DONE, [(PACKED, pickle.dumps(values))], runtime_s=runtime_s)


def options(**values: Any) -> JobOptions:
    return JobOptions.from_dict(values)


class House:
    """An engine over ``ByHand``, with shorthands."""

    def __init__(self, n_slots: int = 1, **settings: Any) -> None:
        self.clock = frozen_virtual_clock()
        self.hand = ByHand(n_slots)
        self.store = MemoryStore(JidSource())
        self.engine = Engine(self.store, self.hand, self.clock, **settings)
        # Time moves when a test says so, on the test's own thread.
        self.engine.waiting.need_helper = lambda: None  # type: ignore[method-assign]
        self.function = Function(b"", "module.work", reusable=True)

    def call(self, _depth: int = 0, _function: Function | None = None, **values: Any) -> int:
        chosen = options(**values) if values else DEFAULT_OPTIONS
        return self.engine.submit(_function or self.function, CONTEXT, b"arguments", chosen, _depth)

    def open(self, **values: Any) -> Batch:
        chosen = options(**values) if values else DEFAULT_OPTIONS
        return self.engine.open_map(self.function, CONTEXT, chosen)

    def map(self, *sizes: int, **values: Any) -> range:
        batch = self.open(**values)
        for n in sizes:
            self.engine.extend(batch, 1, n, b"")
        return self.engine.seal(batch)

    def status(self, jid: int) -> int:
        return self.engine.statuses((jid,))[0]

    def codes(self, jids: Jids) -> list[int]:
        return list(self.engine.statuses(jids))

    def outcome(self, jid: int) -> Outcome:
        return Outcome(self.engine.outcomes((jid,))[0][3])

    def text(self, jid: int) -> str | None:
        return self.outcome(jid).text(ERROR_TEXT)

    def claimed(self, **how: Any) -> list[int]:
        """Jids of what one worker gets."""
        return [task.batch.jid0 + i for task in self.hand.claim(**how) for i in range(task.start, task.stop)]

    def start(self, *jids: int) -> None:
        """Have these run, and nothing else given out."""
        while any(jid not in self.holding() for jid in jids):
            assert self.claimed(), "nothing more to claim"
        for jid in jids:
            self.hand.begin(*self.store.locate(jid))
        self.hand.return_all()

    def holding(self) -> set[int]:
        return {batch.jid0 + index for batch, index in self.hand.held_items}

    def finish(self, jid: int, outcome: bytes | None = None) -> None:
        self.hand.finish(*self.store.locate(jid), done() if outcome is None else outcome)

    def run(self, jid: int, outcome: bytes | None = None) -> None:
        self.start(jid)
        self.finish(jid, outcome)

    def lose(self, jid: int, *, own_fault: bool = False) -> None:
        self.hand.lose(*self.store.locate(jid), own_fault=own_fault)

    def pass_time(self, s: float) -> None:
        self.engine.wait_until(lambda: False, s)

    def known_runtime(self, runtime_s: float) -> None:
        """Have the engine know how long the function takes."""
        self.function._mean_s = runtime_s


@pytest.fixture
def house() -> House:
    return House()


# --- submitting -------------------------------------------------------------------------------------------------------


def test_jids_start_at_one_and_a_map_has_a_range(house: House) -> None:
    assert house.call() == 1
    assert house.map(2, 3) == range(2, 7)
    assert house.call() == 7
    assert house.codes(range(1, 8)) == [QUEUED] * 7


def test_an_empty_map_has_no_jids(house: House) -> None:
    assert len(house.map()) == 0
    assert house.call() == 1
    assert not house.claimed()[1:]


def test_the_executor_is_told_of_work(house: House) -> None:
    house.call()
    assert house.hand.n_wakes == 1


@pytest.mark.parametrize("submit", [House.call, House.map, House.open])
def test_a_refused_submission_leaves_nothing(submit: Callable[..., Any]) -> None:
    house = House(n_slots=2, max_nesting=3)
    with pytest.raises(JobNotFound, match="dependency") as caught:
        submit(house, depends_on=[17])
    assert caught.value.jid == 17
    with pytest.raises(UnsupportedOperation, match=r"_cores=3.*2 worker slots"):
        submit(house, cores=3)
    assert overview.select(house.engine) == []
    assert not house.engine.has_queued
    assert house.call() == 1


def test_nesting_has_a_limit() -> None:
    house = House(max_nesting=3)
    house.call(_depth=3)
    with pytest.raises(UnsupportedOperation, match=r"4 levels deep.*max_nesting = 3"):
        house.call(_depth=4)
    with pytest.raises(UnsupportedOperation, match="4 levels deep"):
        house.engine.open_map(house.function, CONTEXT, DEFAULT_OPTIONS, 4)


def test_nothing_is_taken_after_close(house: House) -> None:
    batch = house.open()
    house.engine.close()
    house.engine.close()
    assert house.hand.closed
    for submit in (house.call, house.map, lambda: house.engine.extend(batch, 1, 1, b"")):
        with pytest.raises(BackendClosed):
            submit()


# --- maps -------------------------------------------------------------------------------------------------------------


def test_items_of_an_open_map_run_before_it_is_sealed(house: House) -> None:
    batch = house.open()
    house.engine.extend(batch, 1, 2, b"")
    [task] = house.hand.claim()
    house.hand.finish(task.batch, task.start, done())
    house.engine.extend(batch, 1, 1, b"")
    jids = house.engine.seal(batch)
    assert house.codes(jids) == [DONE, QUEUED, QUEUED]


def test_an_abandoned_map_is_killed_and_forgotten(house: House) -> None:
    batch = house.open()
    house.engine.extend(batch, 1, 3, b"")
    house.hand.claim()
    house.hand.begin(batch, 0)
    house.engine.abandon(batch)
    assert house.hand.killed == [(batch, 0)]
    assert list(batch.states) == [QUEUED, KILLED, KILLED]
    assert overview.select(house.engine) == []
    house.hand.finish(batch, 0, done())
    assert list(batch.states) == [KILLED] * 3
    assert not house.engine.has_queued or not house.claimed()


def test_an_empty_open_map_is_abandoned(house: House) -> None:
    house.engine.abandon(house.open())
    assert overview.select(house.engine) == []


# --- claiming ---------------------------------------------------------------------------------------------------------


def test_lower_priority_numbers_go_first(house: House) -> None:
    jids = {priority: house.call(priority=priority) for priority in (5, -1, 9, 0)}
    house.call(priority=5)
    order = [house.claimed()[0] for _ in range(5)]
    assert order == [jids[-1], jids[0], jids[5], 5, jids[9]]


def test_jobs_of_unknown_length_go_one_at_a_time(house: House) -> None:
    house.map(10)
    assert house.claimed() == [1]


def test_short_jobs_go_together_as_far_as_there_is_room(house: House) -> None:
    house.known_runtime(0.001)
    for _ in range(20):
        house.call()
    assert house.claimed(room_s=0.005) == [1, 2, 3, 4, 5]
    assert house.claimed(room_s=0.0, idle=False) == []
    assert house.claimed(room_s=0.0) == [6], "a worker with nothing to do gets work whatever its length"


def test_of_long_jobs_one_is_sent_ahead_unless_there_is_room_for_many(house: House) -> None:
    house.known_runtime(0.1)
    house.map(10)
    assert house.claimed(idle=False, room_s=0.9 * AHEAD_S) == [], "it has something behind the one it runs"
    assert house.claimed(idle=False, room_s=0.7) == [1]
    assert house.claimed(room_s=0.7) == [2], "to one with nothing to do"
    assert house.claimed(idle=False, room_s=0.9) == [3, 4, 5, 6]
    assert house.claimed(idle=False, room_s=AHEAD_S) == [7]
    assert [house.claimed(), house.claimed()] == [[8], [9]]
    assert house.claimed(idle=False, room_s=AHEAD_S) == [], "the last are for those who come first"


def test_jobs_that_take_very_long_are_never_sent_ahead(house: House) -> None:
    house.known_runtime(0.2)
    house.map(10)
    assert house.claimed(idle=False, room_s=0.9) == []
    assert house.claimed(room_s=0.9) == [1]


@pytest.mark.parametrize(
    "values", [{"max_runtime_s": 5.0}, {"kill_process": True}, {"cores": 2}, {"profile": True}], ids=str
)
def test_jobs_that_need_care_go_alone(values: dict[str, Any]) -> None:
    house = House(n_slots=2)
    house.known_runtime(0.0001)
    for _ in range(3):
        house.call(**values)
    assert house.claimed() == [1]
    assert house.claimed(idle=False) == []


def test_a_job_for_several_slots_holds_back_all_behind_it() -> None:
    house = House(n_slots=3)
    house.call(cores=2)
    house.call(priority=9)
    assert house.claimed(free_slots=1) == []
    assert house.claimed(free_slots=2) == [1]
    assert house.claimed(free_slots=1) == [2]


def test_a_message_has_a_greatest_number_of_tasks(house: House) -> None:
    house.known_runtime(1e-9)
    for _ in range(300):
        house.call()
    assert len(house.claimed(room_s=1e9)) == 256


def test_a_piece_of_a_map_stays_within_one_chunk(house: House) -> None:
    house.known_runtime(1e-7)
    house.map(3, 4)
    tasks = house.hand.claim()
    assert [(task.start, task.stop) for task in tasks] == [(0, 3), (3, 7)]


def test_pieces_shrink_towards_the_end_of_a_map() -> None:
    house = House(n_slots=2)
    house.known_runtime(0.001)
    house.map(100)
    sizes = []
    while jids := house.claimed(room_s=0.01):
        sizes.append(len(jids))
    assert sum(sizes) == 100
    assert sizes[0] == 10
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_given_back_comes_first_and_in_order(house: House) -> None:
    house.known_runtime(0.001)
    house.map(6)
    other = house.call()
    assert house.claimed(room_s=0.004)[:2] == [1, 2]
    house.claimed(room_s=0.1)
    house.hand.return_all()
    order = []
    while jids := house.claimed(room_s=0.001):
        order += jids
    assert order == [1, 2, 3, 4, 5, 6, other]


def test_what_is_given_back_does_not_overtake_a_better_priority(house: House) -> None:
    low = house.call(priority=9)
    house.claimed()
    high = house.call(priority=1)
    house.hand.return_all()
    assert [house.claimed(), house.claimed()] == [[high], [low]]


def test_claim_skips_what_was_killed_meanwhile(house: House) -> None:
    jids = house.map(5)
    house.engine.cancel([jids[0], jids[2]])
    order = []
    while claimed := house.claimed():
        order += claimed
    assert order == [jids[1], jids[3], jids[4]]
    assert not house.engine.has_queued


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(done(), DONE), (RAISED, ERROR), (pack_outcome(KILLED), KILLED)],
    ids=["done", "error", "killed"],
)
def test_an_outcome_is_final(house: House, outcome: bytes, status: int) -> None:
    jid = house.call()
    house.run(jid, outcome)
    batch, index = house.store.locate(jid)
    house.engine.finish(batch, index, 1, RAISED)
    house.engine.finish(batch, index, 1, done("late"))
    house.engine.lose(batch, index, "late", None, own_fault=True)
    house.engine.out_of_time(batch, index)
    assert house.status(jid) == status
    assert house.outcome(jid).raw == outcome
    assert not house.hand.killed


def test_the_mean_runtime_follows_what_jobs_take(house: House) -> None:
    house.run(house.call(), done(runtime_s=2.0))
    assert house.function.mean_s == pytest.approx(2.0)
    for _ in range(3):
        house.run(house.call(), done(runtime_s=4.0))
    assert house.function.mean_s == pytest.approx(4.0, rel=0.01)


def test_one_slow_job_among_thousands_of_quick_ones_changes_the_mean_little() -> None:
    function = Function(b"", "f")
    function.took(0.004, 20_000)
    function.took(0.0005, 1)
    assert function.mean_s < 0.3e-6
    # Quick ones that are slow from now on are known to be after a few.
    for _ in range(4):
        function.took(0.1, 1)
    assert function.mean_s > 0.01


def test_a_runtime_of_zero_is_known_all_the_same(house: House) -> None:
    house.run(house.call(), done(runtime_s=0.0))
    assert house.function.mean_s > 0


@pytest.mark.parametrize(
    ("retries", "delay_s", "delays"),
    [
        (0, 1.0, []),
        (1, 0.0, [0.0]),
        (3, 1.0, [1.0, 2.0, 4.0]),
        (5, 10.0, [10.0, 20.0, 40.0, 60.0, 60.0]),
        (2, 100.0, [60.0, 60.0]),
    ],
)
def test_retries_wait_twice_as_long_each_time(house: House, retries: int, delay_s: float, delays: list[float]) -> None:
    jid = house.call(retries=retries, retry_delay_s=delay_s)
    for number, delay in enumerate(delays, 1):
        assert overview.describe(house.engine, jid)["attempt"] == number
        house.run(jid, RAISED)
        assert house.status(jid) == WAITING
        if delay:
            house.pass_time(delay * 0.999)
            assert house.status(jid) == WAITING
        house.pass_time(delay * 0.001 + 1e-9)
        assert house.status(jid) == QUEUED
    house.run(jid, RAISED)
    assert house.status(jid) == ERROR
    assert house.text(jid) == "it raised"


def test_a_retry_that_succeeds_is_done(house: House) -> None:
    jid = house.call(retries=2, retry_delay_s=0.0)
    house.run(jid, RAISED)
    house.pass_time(0.001)
    house.run(jid, done("at last"))
    assert house.status(jid) == DONE


def test_a_job_killed_while_it_waits_for_its_retry_stays_killed(house: House) -> None:
    jid = house.call(retries=2, retry_delay_s=5.0)
    house.run(jid, RAISED)
    assert house.engine.cancel((jid,)) == []
    house.pass_time(10.0)
    assert house.status(jid) == KILLED
    assert not house.claimed()


def test_a_retry_of_a_map_item_leaves_the_others_alone(house: House) -> None:
    jids = house.map(3, retries=1, retry_delay_s=1.0)
    house.run(jids[1], RAISED)
    assert house.codes(jids) == [QUEUED, WAITING, QUEUED]
    house.pass_time(1.0)
    assert house.codes(jids) == [QUEUED] * 3
    assert house.claimed() == [jids[1]], "it goes first"


# --- lost workers -----------------------------------------------------------------------------------------------------


def test_a_lost_restartable_job_runs_again_twice(house: House) -> None:
    jid = house.call()
    for attempt in (1, 2):
        house.start(jid)
        assert overview.describe(house.engine, jid)["attempt"] == attempt
        house.lose(jid)
        assert house.status(jid) == QUEUED
    house.start(jid)
    house.lose(jid)
    outcome = house.outcome(jid)
    assert (outcome.status, outcome.pid) == (ERROR, 7)
    assert (outcome.text(ERROR_TEXT), outcome.text(EXITCODE)) == ("the worker died", "-9")
    assert (outcome.text(STDOUT), outcome.text(STDERR)) == ("out", None)


def test_a_job_that_ends_its_own_worker_is_not_run_again(house: House) -> None:
    jid = house.call()
    house.start(jid)
    house.lose(jid, own_fault=True)
    assert house.status(jid) == ERROR


def test_a_job_that_ends_its_own_worker_uses_its_retries(house: House) -> None:
    jid = house.call(retries=1, retry_delay_s=0.0)
    house.start(jid)
    house.lose(jid, own_fault=True)
    assert house.status(jid) == WAITING


@pytest.mark.parametrize("own_fault", [False, True])
@pytest.mark.parametrize("retries", [0, 3])
def test_a_lost_job_that_is_not_restartable_never_runs_again(house: House, own_fault: bool, retries: int) -> None:
    jid = house.call(restartable=False, retries=retries)
    house.start(jid)
    house.lose(jid, own_fault=own_fault)
    assert house.status(jid) == ERROR


def test_a_job_that_raised_is_retried_though_not_restartable(house: House) -> None:
    jid = house.call(restartable=False, retries=1)
    house.run(jid, RAISED)
    assert house.status(jid) == WAITING


def test_a_killed_job_whose_worker_died_is_killed(house: House) -> None:
    jid = house.call(retries=3)
    house.start(jid)
    assert house.engine.cancel((jid,)) == [jid]
    house.lose(jid)
    outcome = house.outcome(jid)
    assert (outcome.status, outcome.text(ERROR_TEXT), outcome.text(EXITCODE)) == (KILLED, "Killed", None)
    assert outcome.text(STDOUT) == "out"


# --- kill -------------------------------------------------------------------------------------------------------------


def test_jobs_that_do_not_run_are_killed_at_once(house: House) -> None:
    queued, waiting, claimed = house.call(), house.call(depends_on=[1]), house.call(priority=0)
    assert house.claimed() == [claimed]
    assert house.engine.cancel([queued, waiting, claimed]) == []
    assert house.status(queued) == KILLED
    assert house.status(claimed) == KILLED, "a worker that has not begun it gives it back"
    assert house.status(waiting) == STALLED, "what it waits for was killed before it"
    assert house.text(queued) == "Killed"
    assert not house.claimed()


def test_a_running_job_is_killed_by_its_worker(house: House) -> None:
    jid = house.call()
    house.start(jid)
    assert house.engine.cancel((jid,)) == [jid]
    assert house.hand.killed == [house.store.locate(jid)]
    assert house.status(jid) == PROCESSING
    house.finish(jid, pack_outcome(KILLED, [(ERROR_TEXT, b"Traceback: killed here"), (STDOUT, b"bye")]))
    assert house.status(jid) == KILLED
    assert house.text(jid) == "Traceback: killed here"
    assert house.outcome(jid).text(STDOUT) == "bye"


@pytest.mark.parametrize("late", [done("just in time"), RAISED], ids=["done", "error"])
def test_a_job_that_ends_while_it_is_killed_is_killed(house: House, late: bytes) -> None:
    jid = house.call(retries=3)
    house.start(jid)
    house.engine.cancel((jid,))
    house.finish(jid, late)
    assert house.status(jid) == KILLED
    assert house.text(jid) == "Killed"


def test_a_killed_job_that_never_began_is_not_begun_elsewhere(house: House) -> None:
    jid = house.call()
    house.start(jid)
    house.engine.cancel((jid,))
    house.hand.began.clear()
    house.hand.return_all()  # its worker had only announced it
    assert house.status(jid) == KILLED
    assert not house.claimed()


def test_final_jobs_are_not_killed(house: House) -> None:
    jid = house.call()
    house.run(jid)
    assert house.engine.cancel((jid,)) == []
    assert house.engine.cancel(None) == []
    assert house.status(jid) == DONE


def test_kill_all_ends_every_unfinished_job(house: House) -> None:
    finished, running = house.call(), house.call()
    house.run(finished)
    house.start(running)
    jids = house.map(3)
    assert house.engine.cancel(None) == [running]
    assert house.status(finished) == DONE
    assert house.codes(jids) == [KILLED] * 3


def test_kill_of_an_unknown_job_kills_nothing(house: House) -> None:
    jid = house.call()
    with pytest.raises(JobNotFound):
        house.engine.cancel([jid, 99])
    assert house.status(jid) == QUEUED


def test_killing_a_few_items_leaves_the_others(house: House) -> None:
    jids = house.map(4)
    house.engine.cancel(jids[1:3])
    assert house.codes(jids) == [QUEUED, KILLED, KILLED, QUEUED]


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_the_other_items_of_a_waiting_map_start_all_the_same(house: House, killed: int) -> None:
    first = house.call()
    jids = house.map(3, depends_on=[first])
    house.engine.cancel((jids[killed],))
    house.run(first)
    expected = [QUEUED] * 3
    expected[killed] = KILLED
    assert house.codes(jids) == expected
    assert house.claimed() == [jids[killed == 0]]


def test_nothing_that_is_killed_together_is_handed_out_between(house: House) -> None:
    """The end of the first releases the second: a worker must not get it just before its turn comes."""
    first = house.call()
    second = house.call(depends_on=[first], ignore_dependency_errors=True)
    claimed_meanwhile = []
    house.hand.wake = lambda: claimed_meanwhile.extend(house.claimed())  # type: ignore[method-assign]
    assert house.engine.cancel([first, second]) == []
    assert house.codes([first, second]) == [KILLED, KILLED]
    assert claimed_meanwhile == []


def test_out_of_time_kills_and_says_why(house: House) -> None:
    jid = house.call(max_runtime_s=5.0)
    house.start(jid)
    batch, index = house.store.locate(jid)
    house.engine.out_of_time(batch, index)
    assert house.hand.killed == [(batch, index)]
    house.finish(jid, pack_outcome(KILLED, [(ERROR_TEXT, b"Traceback")]))
    assert house.status(jid) == KILLED
    assert "_max_runtime" in (house.text(jid) or "")


# --- dependencies -----------------------------------------------------------------------------------------------------


def test_a_job_waits_for_calls_maps_and_parts_of_maps(house: House) -> None:
    call, whole, part = house.call(), house.map(2), house.map(3)
    jid = house.call(depends_on=[call, *whole, part[1], part[1]])
    for each in (call, *whole):
        assert house.status(jid) == WAITING
        house.run(each)
    house.run(part[0])
    assert house.status(jid) == WAITING
    house.run(part[1])
    assert house.status(jid) == QUEUED


def test_dependencies_that_are_done_do_not_count(house: House) -> None:
    first = house.call()
    house.run(first)
    assert house.status(house.call(depends_on=[first])) == QUEUED
    assert house.codes(house.map(2, depends_on=[first])) == [QUEUED, QUEUED]


def test_a_map_may_wait_as_a_whole(house: House) -> None:
    first = house.call()
    jids = house.map(2, 1, depends_on=[first])
    assert house.codes(jids) == [WAITING] * 3
    house.run(first)
    assert house.codes(jids) == [QUEUED] * 3


def test_an_open_map_may_grow_before_and_after_its_dependencies_end(house: House) -> None:
    first = house.call()
    batch = house.open(depends_on=[first])
    house.run(first)
    house.engine.extend(batch, 1, 1, b"")
    assert list(batch.states) == [QUEUED]
    second = house.open(depends_on=[house.call()])
    house.engine.extend(second, 1, 1, b"")
    assert list(second.states) == [WAITING]


@pytest.mark.parametrize("how", ["error", "killed", "stalled"])
def test_a_failed_dependency_stalls_at_once_or_later(house: House, how: str) -> None:
    root = house.call()
    first = house.call(depends_on=[root])
    before = house.call(depends_on=[first])
    before_map = house.map(2, depends_on=[first])
    if how == "stalled":
        house.run(root, RAISED)
    else:
        house.run(root)
        house.run(first, RAISED) if how == "error" else house.engine.cancel((first,))
    after = house.call(depends_on=[first])
    after_map = house.map(2, depends_on=[first])
    jids = [before, *before_map, after, *after_map]
    assert house.codes(jids) == [STALLED] * 6
    assert {house.text(jid) for jid in jids} == {"Could not start due to dependency erroring"}
    assert not house.claimed()


def test_an_open_map_stalls_as_it_grows(house: House) -> None:
    first = house.call()
    batch = house.open(depends_on=[first])
    house.engine.extend(batch, 1, 2, b"")
    house.run(first, RAISED)
    assert list(batch.states) == [STALLED, STALLED]
    house.engine.extend(batch, 1, 1, b"")
    assert house.codes(house.engine.seal(batch)) == [STALLED] * 3


def test_one_failure_among_several_dependencies_stalls_once(house: House) -> None:
    jids = house.map(3)
    dependant = house.call(depends_on=jids)
    told: list[tuple[int, int, int]] = []
    on_each_final(house.engine, (dependant,), lambda *run: told.append(run))
    house.run(jids[1], RAISED)
    assert house.status(dependant) == STALLED
    house.run(jids[0], RAISED)
    house.run(jids[2])
    assert told == [(dependant, 1, STALLED)]


def test_errors_of_dependencies_may_be_ignored(house: House) -> None:
    first, second = house.call(), house.call()
    jid = house.call(depends_on=[first, second], ignore_dependency_errors=True)
    house.run(first, RAISED)
    assert house.status(jid) == WAITING
    house.engine.cancel((second,))
    assert house.status(jid) == QUEUED


def test_a_retry_of_a_dependency_is_waited_for(house: House) -> None:
    first = house.call(retries=1, retry_delay_s=0.0)
    jid = house.call(depends_on=[first])
    house.run(first, RAISED)
    assert house.status(jid) == WAITING
    house.pass_time(0.001)
    house.run(first)
    assert house.status(jid) == QUEUED


def test_a_waiting_job_that_was_killed_is_not_released(house: House) -> None:
    first = house.call()
    jid = house.call(depends_on=[first])
    house.engine.cancel((jid,))
    house.run(first)
    assert house.status(jid) == KILLED
    assert not house.claimed()


def test_long_chains_stall_without_recursion(house: House) -> None:
    jid = head = house.call()
    for _ in range(5000):
        jid = house.call(depends_on=[jid])
    house.run(head, RAISED)
    assert set(house.codes(range(head + 1, jid + 1))) == {STALLED}


def test_dependencies_may_be_deleted_once_they_ended(house: House) -> None:
    first = house.call()
    jid = house.call(depends_on=[first])
    house.run(first)
    house.engine.delete((first,))
    assert house.status(jid) == QUEUED
    with pytest.raises(JobNotFound):
        house.call(depends_on=[first])


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_the_oldest_finished_batches_are_forgotten() -> None:
    house = House(max_kept=2)
    unfinished = house.call()
    finished = [house.call(priority=0) for _ in range(4)]
    for jid in finished:
        house.run(jid)
    assert overview.select(house.engine) == [unfinished, *finished[2:]]
    with pytest.raises(JobNotFound):
        house.status(finished[0])


def test_a_map_is_forgotten_as_a_whole_and_only_when_all_of_it_ended() -> None:
    house = House(max_kept=1)
    jids = house.map(2)
    house.run(jids[0])
    house.run(house.call(priority=0))
    house.run(house.call(priority=0))
    assert house.codes(jids) == [DONE, QUEUED]
    house.run(jids[1])
    house.run(house.call())
    with pytest.raises(JobNotFound):
        house.status(jids[0])


def test_a_map_that_ended_before_it_was_sealed_is_forgotten_too() -> None:
    house = House(max_kept=1)
    batch = house.open()
    house.engine.extend(batch, 1, 1, b"")
    house.hand.claim()
    house.hand.finish(batch, 0, done())
    jids = house.engine.seal(batch)
    assert house.codes(jids) == [DONE]
    house.run(house.call())
    with pytest.raises(JobNotFound):
        house.status(jids[0])


def test_what_was_deleted_may_be_forgotten_again() -> None:
    house = House(max_kept=1)
    jids = house.map(2)
    for jid in jids:
        house.run(jid)
    house.engine.delete(jids)
    house.run(house.call())
    house.run(house.call())
    assert len(overview.select(house.engine)) == 1


def test_deleting_twice_in_one_call_is_deleting_once(house: House) -> None:
    jids = house.map(1)
    house.run(jids[0])
    house.engine.delete([jids[0], jids[0]])
    assert overview.select(house.engine) == []
    with pytest.raises(JobNotFound):
        house.engine.delete(jids)


# --- asking -----------------------------------------------------------------------------------------------------------


def test_statuses_show_what_runs(house: House) -> None:
    jids = house.map(4)
    house.start(jids[1])
    assert house.codes(jids) == [QUEUED, PROCESSING, QUEUED, QUEUED]
    assert house.codes([jids[3], jids[1], jids[1]]) == [QUEUED, PROCESSING, PROCESSING]
    assert house.codes(jids[2:]) == [QUEUED, QUEUED]
    house.finish(jids[1])
    assert house.codes(jids) == [QUEUED, DONE, QUEUED, QUEUED]


def test_describe_tells_what_is_known(house: House) -> None:
    jid = house.call(label="a", priority=3)
    facts = overview.describe(house.engine, jid)
    assert facts == {
        "status": QUEUED,
        "label": "a",
        "function": "module.work",
        "created": house.clock.now(),
        "attempt": 1,
        "retries": 0,
        "depth": 0,
    }
    house.start(jid)
    facts = overview.describe(house.engine, jid)
    assert (facts["status"], facts["live"]["stdout"]) == (PROCESSING, b"so far")
    house.finish(jid)
    facts = overview.describe(house.engine, jid)
    assert (facts["status"], facts["outcome"].status, facts["n_shared"]) == (DONE, DONE, 1)
    with pytest.raises(JobNotFound):
        overview.describe(house.engine, jid + 1)


def test_select_matches_all_that_is_given(house: House) -> None:
    other = Function(b"", "pkg.module.Other.method", reusable=True)
    first = house.call(label="a")
    second = house.call(_function=other, label="a")
    jids = house.map(3, label="b")
    house.start(jids[1])
    house.run(first)
    select = partial(overview.select, house.engine)
    assert select() == [first, second, *jids]
    assert select(label="a") == [first, second]
    assert select(label="a", status=[DONE]) == [first]
    assert select(status=[PROCESSING]) == [jids[1]]
    assert select(status=[QUEUED, PROCESSING]) == [second, *jids]
    assert select(function="method") == select(function="Other.method") == select(function=other.name) == [second]
    assert select(function="thod") == []
    assert select(function="work", label="c") == []
    house.finish(jids[1])
    house.engine.delete((jids[1],))
    assert select(label="b") == [jids[0], jids[2]]
    assert select(label="b", status=[QUEUED, DONE]) == [jids[0], jids[2]]


def test_packed_runs_are_given_in_part(house: House) -> None:
    house.known_runtime(1e-7)
    jids = house.map(6)
    assert len(house.claimed()) == 6
    batch, _ = house.store.locate(jids[0])
    house.hand.finish(batch, 0, packed(list("abcd")), n=4)
    house.hand.finish(batch, 4, RAISED)
    house.hand.finish(batch, 5, done("f"))
    outcomes = house.engine.outcomes
    assert [each[:3] for each in outcomes(jids)] == [(0, 4, 4), (0, 1, 1), (0, 1, 1)]
    assert [each[:3] for each in outcomes(jids[1:3])] == [(1, 2, 4)]
    assert [each[:3] for each in outcomes(jids[3:5])] == [(3, 1, 4), (0, 1, 1)]
    assert [each[:3] for each in outcomes([jids[2], jids[0], jids[0], jids[1]])] == [
        (2, 1, 4),
        (0, 1, 4),
        (0, 2, 4),
    ]
    assert overview.describe(house.engine, jids[2])["n_shared"] == 4
    assert house.codes(jids) == [DONE] * 4 + [ERROR, DONE]


@given(st.data())
def test_outcomes_are_those_of_the_items_asked_for(data: st.DataObject) -> None:
    house = House()
    house.known_runtime(1e-7)
    n = data.draw(st.integers(1, 12))
    jids = house.map(n)
    batch, _ = house.store.locate(jids[0])
    house.claimed()
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    runs = list(pairwise(cuts))
    for low, high in data.draw(st.permutations(runs)):
        if high - low == 1:
            house.hand.finish(batch, low, done(low))
        else:
            house.hand.finish(batch, low, packed(list(range(low, high))), n=high - low)
    asked = data.draw(st.lists(st.sampled_from(list(jids)), min_size=1) | st.just(jids))
    values: list[int] = []
    for first, wanted, n_held, raw in house.engine.outcomes(asked):
        outcome = Outcome(raw)
        section = outcome.section(VALUE if n_held == 1 else PACKED) or b""
        held = [pickle.loads(section)] if n_held == 1 else pickle.loads(section)
        values += held[first : first + wanted]
    assert [jids[0] + value for value in values] == list(asked)


# --- being told -------------------------------------------------------------------------------------------------------


def test_when_final_tells_once_all_have_ended(house: House) -> None:
    jids = house.map(3)
    told: list[str] = []
    when_final(house.engine, jids, lambda: told.append("all"))
    when_final(house.engine, [jids[0], jids[0]], lambda: told.append("first"))
    for number, expected in enumerate((["first"], ["first"], ["first", "all"])):
        house.run(jids[number], RAISED if number == 1 else None)
        assert told == expected
    when_final(house.engine, jids, lambda: told.append("at once"))
    assert told[2:] == ["at once"]


def test_when_final_may_end_at_the_first_failure(house: House) -> None:
    jids = house.map(3)
    told: list[str] = []
    when_final(house.engine, jids, lambda: told.append("x"), stop_on_error=True)
    house.run(jids[0])
    assert told == []
    house.run(jids[1], RAISED)
    assert told == ["x"]
    house.run(jids[2], RAISED)
    assert told == ["x"]
    when_final(house.engine, jids, lambda: told.append("at once"), stop_on_error=True)
    assert told == ["x", "at once"]


def test_when_final_that_is_called_off_tells_nothing_and_leaves_nothing(house: House) -> None:
    jids = house.map(2)
    batch, _ = house.store.locate(jids[0])
    told: list[str] = []
    for _ in range(3):
        for each in (jids, jids[:1]):
            when_final(house.engine, each, lambda: told.append("x"))()
    assert not batch.watches
    house.run(jids[0])
    house.run(jids[1])
    assert told == []


def test_calling_off_what_has_told_does_nothing(house: House) -> None:
    jid = house.call()
    told: list[str] = []
    call_off = when_final(house.engine, (jid,), lambda: told.append("x"))
    house.run(jid)
    call_off()
    assert told == ["x"]


def test_on_each_final_tells_of_the_past_and_of_the_future(house: House) -> None:
    jids = house.map(4)
    house.engine.cancel(jids[:2])
    told: list[tuple[int, int, int]] = []
    on_each_final(house.engine, jids, lambda *run: told.append(run))
    assert told == [(jids[0], 2, KILLED)]
    house.run(jids[3], RAISED)
    house.run(jids[2])
    assert told[1:] == [(jids[3], 1, ERROR), (jids[2], 1, DONE)]


def test_those_who_wait_are_told_of_a_job_once(house: House) -> None:
    jid = house.call(retries=1, retry_delay_s=0.0)
    told: list[Any] = []
    on_each_final(house.engine, (jid,), lambda *run: told.append(run))
    house.run(jid, RAISED)
    house.pass_time(0.001)
    house.start(jid)
    house.lose(jid)
    house.run(jid)
    assert told == [(jid, 1, DONE)]


@given(st.data())
def test_watches_tell_each_of_exactly_its_items(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    ranges = st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda run: run[0] < run[1])
    watches = Watches()
    told: dict[int, list[int]] = {}
    added: list[Watch] = []
    for number, (start, stop) in enumerate(data.draw(st.lists(ranges, max_size=8))):
        told[number] = []

        def notify(batch: None, low: int, count: int, number: int = number) -> None:
            told[number] += range(low, low + count)

        added.append(Watch(start, stop, notify))
        watches.add(added[-1])
    removed = {number for number in range(len(added)) if data.draw(st.booleans())}
    for number in removed:
        watches.remove(added[number])
        watches.remove(added[number])
    assert bool(watches) == (len(removed) < len(added))
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    for low, high in data.draw(st.permutations(list(pairwise(cuts)))):
        for watch in watches.take(low, high - low):
            first, last = max(low, watch.start), min(high, watch.stop)
            assert first < last
            watch.notify(None, first, last - first)
    for number, watch in enumerate(added):
        expected = [] if number in removed else list(range(watch.start, watch.stop))
        assert sorted(told[number]) == expected


def test_many_who_wait_for_one_item_each_cost_no_more_than_themselves(house: House) -> None:
    """Not by the clock: each finished item looks at its own watches only."""
    jids = house.map(300)
    batch, _ = house.store.locate(jids[0])
    for jid in jids:
        house.call(priority=9, depends_on=[jid])
    looked_at = 0
    watches = batch.watches
    assert watches is not None
    take = Watches.take

    def counted(self: Watches, start: int, n: int) -> list[Watch]:
        nonlocal looked_at
        found = take(self, start, n)
        looked_at += len(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watches, "take", counted)
        for _ in jids:
            [task] = house.hand.claim()
            house.hand.finish(task.batch, task.start, done())
    assert looked_at == len(jids)


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_on_error", [False, True])
def test_a_wait_for_many_is_looked_at_under_the_lock(
    house: House, monkeypatch: pytest.MonkeyPatch, stop_on_error: bool
) -> None:
    # Whoever leads looks at those of others, and jobs change state in steps.
    owned: list[bool] = []
    done = Wait.done

    def look(wait: Wait) -> bool:
        owned.append(house.engine.lock._is_owned())  # type: ignore[attr-defined]
        return done(wait)

    monkeypatch.setattr(Wait, "done", look)
    jids = house.map(3)
    assert house.engine.wait(jids, 0, stop_on_error=stop_on_error) == list(jids)
    assert owned
    assert all(owned)


def test_wait_returns_what_has_not_ended(house: House) -> None:
    jids = house.map(3)
    house.run(jids[1])
    before = house.clock.monotonic()
    assert house.engine.wait(jids, 0) == [jids[0], jids[2]]
    assert house.clock.monotonic() == before
    assert house.engine.wait(jids, 2.0) == [jids[0], jids[2]]
    assert house.clock.monotonic() == pytest.approx(before + 2.0)
    assert house.engine.wait((jids[1],), None) == []


def test_wait_for_an_unknown_job_waits_for_nothing(house: House) -> None:
    with pytest.raises(JobNotFound):
        house.engine.wait([house.call(), 99], None)


def test_wait_may_end_at_the_first_failure(house: House) -> None:
    jids = house.map(3)
    house.engine.call_later(1.0, lambda: house.run(jids[1], RAISED))
    house.engine.call_later(2.0, lambda: house.run(jids[0]))
    before = house.clock.monotonic()
    assert house.engine.wait(jids, 10.0, stop_on_error=True) is None
    assert house.clock.monotonic() == pytest.approx(before + 1.0)
    assert house.engine.wait(jids, 10.0, stop_on_error=True) is None, "a past failure ends it at once"
    assert house.engine.wait((jids[0],), 10.0, stop_on_error=True) == []
    assert house.engine.wait((jids[2],), 1.0, stop_on_error=True) == [jids[2]]


def test_failures_of_others_end_no_wait(house: House) -> None:
    jids, other = house.map(2), house.map(2)
    house.engine.call_later(1.0, lambda: house.run(other[0], RAISED))
    house.engine.call_later(2.0, lambda: house.run(jids[1], RAISED))
    assert house.engine.wait((jids[0], other[1]), 5.0, stop_on_error=True) == [jids[0], other[1]]


def test_wait_until_asks_as_events_come(house: House) -> None:
    seen: list[int] = []
    house.engine.call_later(1.0, lambda: seen.append(1))
    assert house.engine.wait_until(lambda: bool(seen), 5.0)
    assert not house.engine.wait_until(lambda: len(seen) > 1, 5.0)


def test_a_cancelled_timer_does_nothing(house: House) -> None:
    seen: list[int] = []
    timer = house.engine.call_later(1.0, lambda: seen.append(1))
    house.engine.call_later(1.0, lambda: seen.append(2))
    timer.cancel()
    timer.cancel()
    house.pass_time(2.0)
    assert seen == [2]


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_of_jobs_go_to_whoever_serves_them(house: House) -> None:
    served: list[tuple[Any, ...]] = []
    house.engine.serve_requests(lambda *request: served.append(request))
    batch, _ = house.store.locate(house.call())
    house.engine.request("worker", batch, {"op": "status"}, [b"blob"], "reply")
    assert served == [("worker", batch, {"op": "status"}, [b"blob"], "reply")]
