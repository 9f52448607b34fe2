"""The queue of jobs that are ready: by priority, then in order; and how much of it a worker is given at once.

A worker takes only what its environment allows, so each environment has a lane of its own. In embedded use there is
one lane, that of None.
"""

from __future__ import annotations

from collections import deque

from cloud.engine.executor.base import AHEAD_S, LONG_S, Executor, Task
from cloud.engine.store.base import Batch, Stored
from cloud.jobs import DEFAULT_OPTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from cloud.environment import Environment

_LONG_PART: Final = 1 / 8
"""Of items that are long, and take more than this part of the room there is, one is sent ahead at a time."""
_TOO_LONG_S: Final = 0.1
"""Those that take longer are not sent ahead at all: what a worker loses between two is little then."""
_TINY_S: Final = 0.0001
"""Shorter ones are rarely among much longer ones."""

_MAX_TASKS: Final = 256
_MAX_BYTES: Final = 1 << 18
"""About as much as a socket takes: more would be joined and kept here, and made again if it is taken back."""
_NEVER: Final = float("inf")


class _Lane:
    """The batches of one environment."""

    __slots__ = ("environment", "n", "priorities", "queues")

    def __init__(self, environment: Environment | None) -> None:
        self.environment = environment
        self.queues: dict[int, deque[Batch]] = {}
        self.priorities: list[int] = []
        self.n = 0


class Queue:
    """Batches with items to give out.

    Args:
        executor: Whose workers take them.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._lanes: dict[Environment | None, _Lane] = {None: _Lane(None)}
        self._n = 0

    def __bool__(self) -> bool:
        return self._n > 0

    def put(self, batch: Batch, *, first: bool = False) -> None:
        """Queue a batch by its priority, behind the others or before them, unless it is queued already."""
        if batch.queued:
            return
        batch.queued = True
        self._n += 1
        lane = self._lanes.get(batch.environment)
        if lane is None:
            lane = self._lanes[batch.environment] = _Lane(batch.environment)
        lane.n += 1
        priority = batch.options.priority
        queue = lane.queues.get(priority)
        if queue is None:
            queue = lane.queues[priority] = deque()
            lane.priorities = sorted(lane.queues)
        if first:
            queue.appendleft(batch)
        else:
            queue.append(batch)
            if priority < lane.priorities[-1]:
                self._executor.make_way(priority)

    def goes_before_some(self, priority: int) -> bool:
        """True when a batch of that priority passes by others that are, or were, queued."""
        return any(lane.priorities and priority < lane.priorities[-1] for lane in self._lanes.values())

    @property
    def next_environment(self) -> Environment | None:
        """Of the batch that is to start next: the first by priority, then by age. None also when nothing is queued.

        What has nothing left to give out is dropped on the way.
        """
        return self._first_lane().environment

    def claim(
        self, free_slots: int, room_s: float, *, idle: bool, environment: Environment | None = None
    ) -> list[Task]:
        """Take work for one worker; see ``Source.claim``."""
        tasks: list[Task] = []
        lane = self._lanes.get(environment)
        # A worker that was refilled for ever would never leave its slot to one of another environment.
        if lane is None or (not idle and len(self._lanes) > 1 and lane is not self._first_lane()):
            return tasks
        long_s = max(LONG_S, _LONG_PART * room_s)
        spent_s, n_bytes, shared, share = 0.0, 0, None, 1
        for priority in lane.priorities:
            queue = lane.queues[priority]
            while queue:
                batch = queue[0]
                run = batch.next_free()
                if run is None:
                    self._drop_first(lane, queue)
                    continue
                options, mean_s = batch.options, batch.function.mean_s
                if options.cores > free_slots:
                    return tasks
                start, stop = run
                alone = options is not DEFAULT_OPTIONS and options.alone
                whole = self._executor.whole_chunks
                if alone or whole or not 0.0 < mean_s <= long_s:
                    one_ahead = not (alone or whole) and 0.0 < mean_s <= _TOO_LONG_S and self._has_plenty(batch, room_s)
                    if not tasks and (idle or one_ahead):
                        stop = min(stop, _end_of_chunk(batch, start)) if whole and batch.is_map else start + 1
                        tasks.append(Task(batch, start, stop))
                        batch.take_free(stop)
                        if not batch.is_map:
                            self._drop_first(lane, queue)
                    return tasks
                if (spent_s + mean_s > room_s and (tasks or not idle)) or len(tasks) == _MAX_TASKS:
                    return tasks
                if batch.arguments is not None:
                    # What the store has put away is large.
                    n_bytes += _MAX_BYTES if isinstance(batch.arguments, Stored) else len(batch.arguments)
                    if n_bytes > _MAX_BYTES and tasks:
                        return tasks
                    self._drop_first(lane, queue)
                else:
                    if batch is not shared:
                        shared, share = batch, self._share(batch, mean_s, free_slots if idle else 0)
                    room = max(1, int((room_s - spent_s) / mean_s))
                    stop = min(stop, _end_of_chunk(batch, start), start + min(room, share))
                    share -= stop - start
                tasks.append(Task(batch, start, stop))
                batch.take_free(stop)
                spent_s += mean_s * (stop - start)
                if not share and batch.next_free() is not None:
                    return tasks  # the rest is for others
        return tasks

    def _drop_first(self, lane: _Lane, queue: deque[Batch]) -> None:
        queue.popleft().queued = False
        self._n -= 1
        lane.n -= 1
        if not lane.n and lane.environment is not None:
            # Each edit of a user's modules makes an environment: they must not gather here.
            del self._lanes[lane.environment]

    def _first_lane(self) -> _Lane:
        first, least = self._lanes[None], (_NEVER, 0.0)
        for lane in list(self._lanes.values()):
            head = self._head(lane)
            if head is not None and (head.options.priority, head.created) < least:
                first, least = lane, (head.options.priority, head.created)
        return first

    def _head(self, lane: _Lane) -> Batch | None:
        for priority in lane.priorities:
            queue = lane.queues[priority]
            while queue:
                if queue[0].next_free() is not None:
                    return queue[0]
                self._drop_first(lane, queue)
        return None

    def _has_plenty(self, batch: Batch, room_s: float) -> bool:
        """True if there is enough to send a long item to each busy worker that has nothing behind the one it runs."""
        n_queued = self._n - 1 + (batch.n_free if batch.is_map else 1)
        return room_s >= AHEAD_S and n_queued > self._executor.n_slots

    def _share(self, batch: Batch, mean_s: float, n_idle: int) -> int:
        """How many items of a map one worker is given at most, so that all have done theirs at the same time."""
        left, n_slots = batch.n_free, self._executor.n_slots
        left_s = mean_s * left
        if left_s < LONG_S / 8:
            return left
        if left_s < AHEAD_S * n_slots and mean_s < _TINY_S:
            return -(-left // (n_idle or n_slots))  # all of it would be sent ahead anyway, in ever smaller pieces
        return max(1, left // (2 * n_slots))


def _end_of_chunk(batch: Batch, index: int) -> int:
    chunk = batch.chunk_at(index)
    return chunk.start + chunk.n
