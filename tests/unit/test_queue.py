"""The queue of jobs that are ready: one lane an environment, one order over all."""

from __future__ import annotations

from itertools import count

import pytest

from cloud.engine.executor.base import AHEAD_S, Task
from cloud.engine.queue import Queue
from cloud.engine.store.base import Batch, Chunk, Stored
from cloud.environment import Environment
from cloud.jobs import DEFAULT_OPTIONS, KILLED, JobOptions
from cloud.serialization.functions import Function
from tests.unit.fake_executor import ByHand

A, B = Environment("3.12", "a"), Environment("3.12", "b")
_created = count(1)


def call(environment: Environment | None, priority: int = 5, mean_s: float = 0.0) -> Batch:
    options = DEFAULT_OPTIONS if priority == 5 else JobOptions.from_dict({"priority": priority})
    function = Function(b"", "f")
    function._mean_s = mean_s
    return Batch(next(_created), function, (1, b""), options, 0, float(next(_created)), b"x", environment)


def of_map(environment: Environment | None, n: int, mean_s: float) -> Batch:
    function = Function(b"", "f")
    function._mean_s = mean_s
    batch = Batch(next(_created), function, (1, b""), DEFAULT_OPTIONS, 0, float(next(_created)), None, environment)
    batch.chunks.append(Chunk(next(_created), 0, n, 0, b""))
    batch.n = n
    batch.states += b"\x01" * n
    batch.put_free(0, n)
    return batch


@pytest.fixture
def queue() -> Queue:
    return Queue(ByHand(2))


def filled(queue: Queue, *batches: Batch) -> Queue:
    for batch in batches:
        queue.put(batch)
    return queue


def claimed(queue: Queue, environment: Environment | None, *, idle: bool = True) -> list[Batch]:
    tasks: list[Task] = queue.claim(2, AHEAD_S, idle=idle, environment=environment)
    return [task.batch for task in tasks]


def test_a_worker_gets_batches_of_its_environment_only(queue: Queue) -> None:
    a, b, none = call(A), call(B), call(None)
    filled(queue, a, b, none)
    assert claimed(queue, None) == [none]
    assert claimed(queue, B) == [b]
    assert claimed(queue, Environment("3.12", "c")) == []
    assert claimed(queue, A) == [a]
    assert not queue


def test_the_next_environment_is_by_priority_then_by_age(queue: Queue) -> None:
    first, second, urgent = call(A), call(B), call(None, priority=1)
    filled(queue, second, first, urgent)
    for batch in (urgent, first, second):
        assert queue.next_environment == batch.environment
        assert claimed(queue, batch.environment) == [batch]
    assert queue.next_environment is None
    assert not queue


def test_a_busy_worker_gets_no_more_while_another_environment_comes_first(queue: Queue) -> None:
    filled(queue, of_map(A, 100_000, 0.001))
    assert claimed(queue, A, idle=False)
    late = call(B)
    filled(queue, late)
    assert claimed(queue, A, idle=False)  # the map is older
    urgent = call(B, priority=1)
    filled(queue, urgent)
    assert claimed(queue, A, idle=False) == []
    assert claimed(queue, B) == [urgent]
    assert claimed(queue, A, idle=False)


def test_what_was_killed_in_the_queue_holds_nobody_up(queue: Queue) -> None:
    killed, waiting = call(A), call(B)
    filled(queue, killed, waiting)
    killed.states[0] = KILLED
    assert queue.next_environment == B
    assert claimed(queue, B) == [waiting]
    assert not queue


def test_environments_that_have_no_more_work_are_forgotten(queue: Queue) -> None:
    for n in range(100):
        environment = Environment("3.12", str(n))
        filled(queue, call(environment))
        assert claimed(queue, environment)
    assert len(queue._lanes) == 1


class Away(Stored):
    """What a store has put away."""

    def load(self) -> bytes:
        raise AssertionError("nobody has begun it")

    def head(self, n_bytes: int) -> bytes:
        raise AssertionError("nobody has asked for it")


def test_what_the_store_has_put_away_is_given_by_itself(queue: Queue) -> None:
    calls = [call(None, mean_s=1e-6) for _ in range(5)]
    for each in calls[1:3]:
        each.arguments = Away()
    filled(queue, *calls)
    assert [claimed(queue, None) for _ in range(4)] == [calls[:1], calls[1:2], calls[2:3], calls[3:]]


@pytest.mark.parametrize(("size", "expected"), [(10, 5), (100_000, 2), (1_000_000, 1)])
def test_no_more_bytes_are_given_than_a_socket_takes(queue: Queue, size: int, expected: int) -> None:
    calls = [call(None, mean_s=1e-6) for _ in range(5)]
    for each in calls:
        each.arguments = bytes(size)
    filled(queue, *calls)
    assert claimed(queue, None) == calls[:expected]
    while calls := calls[expected:]:
        assert claimed(queue, None) == calls[:expected]
    assert not queue
