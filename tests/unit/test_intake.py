"""Calls that wait to become a batch: what they may share, and that nobody sees the difference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random
from typing import Any

import pytest

from cloud.engine.channel import ANEW_CHUNK, SEPARATE_CHUNK
from cloud.engine.engine import Engine
from cloud.engine.intake import Intake
from cloud.engine.overview import select
from cloud.engine.store.base import Batch
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.errors import BackendClosed, JobNotFound, UnsupportedOperation
from cloud.jobs import DEFAULT_OPTIONS, STALLED, JobOptions
from cloud.serialization.functions import Function
from cloud.serialization.memory import MemoryFile
from cloud.serialization.shared import Segment, SharedBytes, attach
from tests.unit.fake_executor import Body, FakeExecutor, Sleep, frozen_virtual_clock

HERE = 1, b""
THERE = 2, b""
WORK = Function(b"", "module.work", reusable=True)
OTHER = Function(b"", "module.other", reusable=True)
FRESH = Function(b"", "module.fresh")
SAME = Function(b"", "module.fresh")
CHANGED = Function(b"changed", "module.fresh")
NAMED = Function(b"changed", "module.named")
LARGE = Function(SharedBytes(b""), "module.large")
CONSTANT = Function(SharedBytes(b""), "module.constant", reusable=True)
OF_POOL = JobOptions()
OF_POOL.restartable, OF_POOL.reports_late = False, True


def sizes(intake: Intake) -> list[int]:
    return [batch.n for batch in intake.batches(count(1))]


def taken(
    jid: int,
    function: Function = WORK,
    context: Any = HERE,
    depth: int = 0,
    at: float = 0.0,
    options: JobOptions = DEFAULT_OPTIONS,
    arguments: bytes | None = None,
) -> Any:
    return jid, (function, context, options, depth, at, b"%d" % jid if arguments is None else arguments)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([taken(1), taken(2), taken(3)], [3]),
        ([taken(1), taken(3)], [1, 1]),
        ([taken(2), taken(1), taken(3)], [1, 1, 1]),
        ([taken(1), taken(2, OTHER), taken(3, OTHER)], [1, 2]),
        ([taken(1, FRESH), taken(2, SAME), taken(3, FRESH)], [3]),
        ([taken(1, FRESH), taken(2, CHANGED), taken(3, NAMED), taken(4, WORK)], [1, 1, 1, 1]),
        ([taken(1, LARGE), taken(2, LARGE)], [1, 1]),
        ([taken(1, CONSTANT), taken(2, CONSTANT)], [2]),
        ([taken(1), taken(2, context=THERE)], [1, 1]),
        ([taken(1), taken(2, depth=1)], [1, 1]),
        ([taken(1), taken(2, options=OF_POOL), taken(3, options=OF_POOL)], [1, 2]),
        ([taken(1), taken(2, at=0.0005), taken(3, at=0.5), taken(4, at=0.5)], [2, 2]),
        ([taken(jid) for jid in range(1, 131)], [64, 64, 2]),
        (
            [taken(1), taken(2, arguments=bytes(2000)), taken(3, arguments=bytes(2000)), taken(4), taken(5)],
            [1, 1, 1, 2],
        ),
    ],
)
def test_only_what_is_alike_and_adjoins_shares_a_batch(calls: list[Any], expected: list[int]) -> None:
    intake = Intake()
    for call in calls:
        intake.append(call)
    assert len(intake) == len(calls)
    assert sizes(intake) == expected
    assert not intake


def test_a_batch_has_everything_of_its_calls() -> None:
    intake = Intake()
    for jid in (7, 8, 9):
        intake.append(taken(jid, depth=2, at=3.0))
    (batch,) = intake.batches(count(5))
    assert (batch.jid0, batch.n, batch.depth, batch.created, batch.context) == (7, 3, 2, 3.0, HERE)
    assert batch.function is WORK
    assert batch.options is DEFAULT_OPTIONS
    assert bytes(batch.states) == b"\x01\x01\x01"
    assert batch.next_free() == (0, 3)
    assert batch.sealed
    assert not batch.finished
    (chunk,) = batch.chunks
    assert (chunk.token, chunk.start, chunk.n) == (5, 0, 3)
    assert chunk.payload == b"\x01\0\0\0" * 3 + b"789"
    assert chunk.kind == SEPARATE_CHUNK


def test_what_may_be_changed_is_built_anew_for_each_of_a_batch() -> None:
    intake = Intake([taken(7, FRESH), taken(8, SAME)])
    (batch,) = intake.batches(count(5))
    assert batch.chunks[0].kind == ANEW_CHUNK


def test_a_single_call_stays_one() -> None:
    intake = Intake()
    intake.append(taken(7))
    (batch,) = intake.batches(count(5))
    assert not batch.is_map
    assert batch.arguments == b"7"


def options(**values: Any) -> JobOptions:
    return JobOptions.from_dict(values)


def test_what_lies_in_shared_memory_is_not_taken() -> None:
    assert Intake.takes(bytes(100_000), DEFAULT_OPTIONS)
    shared = attach(b"small", Segment(MemoryFile.create(), 0, 0))
    assert type(shared) is SharedBytes
    assert not Intake.takes(shared, DEFAULT_OPTIONS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (OF_POOL, True),
        (options(label="its own"), True),
        (options(priority=9), True),
        (options(priority=4), False),
        (options(reports_late=True, kill_process=True), False),
        (options(max_runtime_s=1.0), False),
        (options(cores=2), False),
    ],
)
def test_who_needs_care_or_is_urgent_is_not_taken(given: JobOptions, expected: bool) -> None:
    assert Intake.takes(b"small", given) is expected


class Burst:
    """An engine with one busy slot, and calls that wait behind its job."""

    def __init__(self, n: int, **settings: Any) -> None:
        def body(batch: Batch, index: int, attempt: int) -> Body:
            yield Sleep(0.001)

        clock = frozen_virtual_clock()
        self.engine = Engine(
            MemoryStore(JidSource()), FakeExecutor(1, clock, Random(1), body), clock, max_nesting=3, **settings
        )
        self.engine.waiting.need_helper = lambda: None  # type: ignore[method-assign]
        self.first = self.call()
        self.jids = [self.call() for _ in range(n)]

    def call(self, depth: int = 0, options: JobOptions = DEFAULT_OPTIONS) -> int:
        return self.engine.submit(WORK, HERE, b"arguments", options, depth)

    @property
    def batches(self) -> list[Batch]:
        return list(self.engine.store.batches())


@pytest.fixture
def burst() -> Iterator[Burst]:
    made = Burst(5)
    yield made
    made.engine.close()


def test_calls_behind_a_busy_worker_become_one_batch(burst: Burst) -> None:
    assert burst.jids == [2, 3, 4, 5, 6]
    assert burst.engine.n_unfinished == 6
    assert [batch.n for batch in burst.batches] == [1, 5]
    assert burst.engine.n_unfinished == 6
    assert burst.engine.wait(burst.jids, None) == []
    assert burst.engine.n_unfinished == 0


def test_whoever_looks_finds_them(burst: Burst) -> None:
    assert bytes(burst.engine.statuses(burst.jids)) == b"\x01" * 5
    burst.call()
    assert select(burst.engine) == [1, 2, 3, 4, 5, 6, 7]
    burst.call()
    burst.engine.cancel((8,))
    burst.engine.cancel(burst.jids[1:3])
    assert burst.engine.wait(range(1, 9), None) == []
    burst.engine.delete((burst.jids[0],))
    with pytest.raises(JobNotFound):
        burst.engine.statuses((burst.jids[0],))
    assert len(burst.engine.statuses(burst.jids[1:])) == 4


def test_jids_stay_in_the_order_of_submission(burst: Burst) -> None:
    urgent = JobOptions()
    urgent.priority = 0
    assert burst.call(options=urgent) == 7
    assert [burst.call(), burst.call()] == [8, 9]
    assert [batch.jid0 for batch in burst.batches] == [1, 2, 7, 8]


def test_jobs_after_others_that_succeeded_share_a_batch(burst: Burst) -> None:
    assert burst.engine.wait(burst.jids[:1], None) == []
    burst.call()
    after = options(depends_on=[burst.first, burst.jids[0]])
    jids = [burst.call(options=after) for _ in range(4)]
    assert [batch.n for batch in burst.batches][-1] == 4
    assert bytes(burst.engine.statuses(jids)) == b"\x01" * 4
    assert burst.engine.wait(jids, None) == []


def test_jobs_after_others_that_did_not_wait_for_them(burst: Burst) -> None:
    last = burst.call()
    after = options(depends_on=[burst.first, last])
    jids = [burst.call(options=after) for _ in range(4)]
    assert [batch.n for batch in burst.batches] == [1, 6, 1, 1, 1, 1]
    assert bytes(burst.engine.statuses(jids)) == b"\0" * 4
    assert burst.engine.n_waiting == 4
    burst.engine.cancel((last,))
    assert burst.engine.wait(jids, None) == []
    assert bytes(burst.engine.statuses(jids)) == bytes((STALLED,)) * 4
    assert bytes(burst.engine.statuses((burst.call(options=after),))) == bytes((STALLED,))


def test_an_unknown_dependency_is_told_at_once(burst: Burst) -> None:
    with pytest.raises(JobNotFound, match="does not exist"):
        burst.call(options=options(depends_on=[burst.first, 99]))
    assert burst.call() == burst.jids[-1] + 1


def test_what_goes_before_work_that_was_sent_far_ahead_is_queued_at_once(burst: Burst) -> None:
    burst.engine.cancel((burst.call(options=options(priority=9)),))
    made_way: list[int] = []
    executor = burst.engine.executor
    executor.make_way = made_way.append  # type: ignore[method-assign]
    burst.call()
    assert not made_way
    type(executor).patient = True  # type: ignore[assignment, method-assign]
    try:
        burst.call()
        assert made_way
    finally:
        del type(executor).patient


def test_what_a_call_refuses_it_still_refuses(burst: Burst) -> None:
    with pytest.raises(UnsupportedOperation, match="levels deep"):
        burst.call(depth=4)
    burst.engine.close()
    with pytest.raises(BackendClosed):
        burst.call()


def test_with_a_limit_on_what_is_remembered_each_call_counts() -> None:
    limited = Burst(5, max_kept=3)
    assert [batch.n for batch in limited.batches] == [1] * 6
    limited.engine.close()


def test_the_result_of_a_deleted_job_is_let_go(burst: Burst) -> None:
    assert burst.engine.wait(burst.jids, None) == []
    (_, batch) = burst.batches
    batch.segments = [(index, 1, b"its own") for index in range(5)]  # as values have that are not small
    burst.engine.delete((burst.jids[2],))
    assert [bool(outcome) for _, _, outcome in batch.segments] == [True, True, False, True, True]
    assert len(burst.engine.outcomes(burst.jids[:2])) == 2


def test_arguments_of_ended_jobs_are_let_go(burst: Burst) -> None:
    (_, batch) = burst.batches
    assert batch.chunks
    assert burst.engine.wait(burst.jids, None) == []
    assert not batch.chunks
