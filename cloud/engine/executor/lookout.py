"""Looking at workers that say nothing: what they left, items that turn out long, floods of output; and how often.

While workers have more than the item they run, they leave outcomes in their rings, and somebody looks into those every
few milliseconds. A look takes a core from a worker for a fifth of a millisecond. So whoever waits for a whole map is
*patient*, while all workers are busy, each with items of one batch, and nobody is to be told of single jobs: looks are
few, and workers hold outcomes for as long. Whoever asks about jobs meanwhile calls those in first
(``Executor.call_in``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from cloud.engine import channel as ch
from cloud.engine.executor.base import AHEAD_S, LONG_S
from cloud.engine.executor.workers import STALL_S, WorkerHandle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_STALL_PART: Final = 4
"""An item that takes so much longer than usual, and ``STALL_S``, is none that others are sent along with."""

_LOOK_S: Final = 0.006
_LOOK_PATIENTLY_S: Final = 0.200
_LOOK_LAST_S: Final = 0.003
_AHEAD_PATIENTLY_S: Final = 2 * _LOOK_PATIENTLY_S
_LOOK_AGAIN: Final = 0.6
"""After so much of what a worker has: none is to run dry before, should it take less than was thought."""
_HOLD_PATIENTLY_NS: Final = int(1e9 * _LOOK_PATIENTLY_S)
_OVERDUE_NS: Final = 1_500_000
"""A worker holds outcomes no longer than it may and this, but for an item that turns out to be long."""

_POKE_AGAIN_S: Final = 0.01
_UNKNOWN_NS: Final = 5_000_000
_ANSWER_S: Final = 0.005
"""An outcome is known within these two of its job's end to whoever asks for it."""

_WATCH_OUTPUT_S: Final = 0.05
_WATCH_FLOOD_S: Final = 0.005


class Lookout:
    """When to look, and what is seen then. All under the engine's lock.

    Args:
        workers: Gives them all.
        take: Reports what a worker left in its ring.
        read: Reports what a worker sent.
        poke: Sends a worker the signal that makes it send what it holds.
        capture: Whether output is kept.

    Attributes:
        regular: Somebody looks into rings now and then.
        patient: Not often, and workers hold outcomes for long: whoever asks is to call them in first.
        ahead_s: How much work a busy worker is to be sent ahead.
    """

    def __init__(
        self,
        workers: Callable[[], Iterable[WorkerHandle]],
        *,
        take: Callable[[WorkerHandle], None],
        read: Callable[[WorkerHandle], None],
        poke: Callable[[WorkerHandle], None],
        capture: bool,
    ) -> None:
        self._workers = workers
        self._take = take
        self._read = read
        self._poke = poke
        self._capture = capture
        self.regular = self.patient = False
        self.ahead_s = AHEAD_S
        self._looked_at_output = 0.0
        self._watch_output_s = _WATCH_OUTPUT_S

    def begin(self, *, patient: bool) -> None:
        """Somebody polls: what the one before him had sent ahead is no measure, unless he is patient, too."""
        if not patient:
            self.ahead_s = AHEAD_S

    def leaves(self, worker: WorkerHandle, *, patient: bool = False) -> bool:
        """Whether a worker is to leave outcomes in its ring. One with a single long item ahead sends them instead."""
        return worker.n_items_over_one and (patient or worker.mean_s <= LONG_S or worker.n_left > 1)

    def plan(self, *, may_be_patient: bool, has_queued: bool) -> float | None:
        """Seconds until the next look, for one who is about to sleep; None for none at all. Tells the workers."""
        limit_s, n_busy, least_s, queued_s = None, 0, _AHEAD_PATIENTLY_S, 0.0
        self.regular, was_patient = False, self.patient
        # What is held behind a long item of another batch might be the last that somebody waits for.
        patient = may_be_patient and not any(
            task.batch.watches is not None or task.batch is not worker.tasks[0].batch
            for worker in self._workers()
            for task in worker.tasks
        )
        for worker in self._workers():
            leaves = self.leaves(worker, patient=patient)
            sends = worker.n_items_over_one and not leaves
            # Once more at one that is to leave nothing from now on: it may just be doing so.
            leaves |= worker.looks(leaves, _HOLD_PATIENTLY_NS if patient else 0 if sends else ch.HOLD_NS)
            if leaves:
                self.regular = True
                least_s = min(least_s, worker.left_s)
            if was_patient and not patient and worker.tasks:
                self._poke(worker)  # it holds what it has for as long as it was told before
            if worker.tasks:
                n_busy += 1
                limit_s = self._watch_output_s
                queued_s = max(queued_s, worker.tasks[-1].batch.queued_s)
        self.patient = self.regular and patient
        self.ahead_s = AHEAD_S
        if patient and n_busy:
            # Less towards the end of a map: its last items may be long, and nobody can have them while they wait behind
            # others.
            self.ahead_s = max(AHEAD_S, min(_AHEAD_PATIENTLY_S, queued_s / (2 * n_busy)))
        if not self.regular:
            return limit_s
        if not self.patient:
            return _LOOK_S
        again_s = min(_LOOK_PATIENTLY_S, _LOOK_AGAIN * least_s)
        if has_queued:
            return max(_LOOK_S, again_s)  # who has little must get more in good time
        # Nobody need be given more; but not all outcomes are to be read after the last, when no worker works any more.
        return again_s if again_s >= _LOOK_LAST_S else _LOOK_PATIENTLY_S

    def is_far_ahead_of(self, priority: int) -> bool:
        """True when workers were sent much, as somebody was patient, that is to start after a job of that priority."""
        return any(
            worker.left_s > AHEAD_S and any(task.batch.options.priority > priority for task in worker.tasks)
            for worker in self._workers()
        )

    def look(self, now: float) -> list[WorkerHandle]:
        """Take what workers left, see that what is overdue is sent; those that have stood at one item for long."""
        stalled = []
        for worker in list(self._workers()):
            if not worker.n_items_over_one:
                continue
            self._take(worker)
            if not worker.tasks:
                continue
            # Who is patient does not mind. But what an outcome waits behind may never end, and would take it along.
            overdue_ns = worker.slots[ch.HOLD] + (_HOLD_PATIENTLY_NS if self.patient else _OVERDUE_NS)
            if worker.leaves and self._holds(worker, overdue_ns, now) and now > worker.poke_again_at:
                # Again and again while it stands: our own code between two items does not heed a poke.
                worker.poke_again_at = now + _POKE_AGAIN_S
                self._poke(worker)
            current = worker.slots[ch.CURRENT]
            if current != worker.seen_current:
                worker.seen_current, worker.seen_at = current, now
            elif now - worker.seen_at >= max(STALL_S, _STALL_PART * worker.mean_s) and worker.has_begun:
                worker.seen_at = now + 0.1
                stalled.append(worker)
        if self._capture and now - self._looked_at_output > self._watch_output_s:
            self._looked_at_output = now
            # Idle ones too: what a job printed last is still there.
            n_flooded = sum(worker.limit_output() for worker in self._workers())
            self._watch_output_s = _WATCH_FLOOD_S if n_flooded else _WATCH_OUTPUT_S
        return stalled

    def call_in(self) -> None:
        """Somebody asks though whoever waits is patient: report what has ended, but for the last few milliseconds."""
        self.patient = False  # what hears of it may ask again
        try:
            self._call_in()
        finally:
            self.patient = True

    def _call_in(self) -> None:
        holding = []
        for worker in list(self._workers()):
            self._take(worker)
            since = worker.slots[ch.HELD]
            if worker.tasks and not worker.is_heard and self._holds(worker, _UNKNOWN_NS, time.monotonic()):
                self._poke(worker)
                # One in the middle of C code does not answer before its end: it is waited for once.
                if since != worker.unanswered:
                    holding.append(worker)
        until = time.monotonic() + _ANSWER_S
        while holding and time.monotonic() < until:
            time.sleep(0.0002)
            # Before the reading: one that sends between the two has not been read.
            left = [worker for worker in holding if self._holds(worker, _UNKNOWN_NS, time.monotonic())]
            for worker in holding:
                self._read(worker)
            holding = left
        for worker in holding:
            worker.unanswered = worker.slots[ch.HELD]

    def _holds(self, worker: WorkerHandle, longer_than_ns: int, now: float) -> bool:
        since: int = worker.slots[ch.HELD]
        return since > 0 and now * 1e9 - since > longer_than_ns
