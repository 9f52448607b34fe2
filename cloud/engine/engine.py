"""The state machine of jobs: dependencies, priorities, attempts, retries, kill. Over a store and an executor.

::

    submit ─► (intake) ─► store.add ─► queue of its priority ◄── give_back, retries
                               │ claim                        ▲
                               ▼                              │
                           executor ──── finish / lose ───────┘
                                            │
                      states, outcomes ─► watches: dependants, waits, callbacks

Everything here happens under one lock, except ``wait``, which polls the executor through ``Waiting``.
A job that runs is QUEUED in its batch's states: which jobs run is what the executor knows, and ``statuses`` adds it.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable
from itertools import count

from cloud.engine.clock import Clock
from cloud.engine.durability import Durability
from cloud.engine.executor.base import Executor, Source, Task
from cloud.engine.intake import Call, Intake
from cloud.engine.interrupts import Changing
from cloud.engine.queue import Queue
from cloud.engine.reading import outcomes_of, reads_ahead
from cloud.engine.store.base import Batch, Chunk, Store, Watch, loaded
from cloud.engine.waiting import Timer, Waiting
from cloud.engine.waits import Wait, by_batch, runs_of, status_codes
from cloud.errors import BackendClosed, CloudException, UnsupportedOperation
from cloud.jobs import (
    DONE,
    ERROR,
    ERROR_TEXT,
    EXITCODE,
    KILLED,
    QUEUED,
    STALLED,
    STDERR,
    STDOUT,
    WAITING,
    Jids,
    JobOptions,
    as_killed,
    pack_outcome,
)
from cloud.serialization.functions import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.engine.reading import Read
    from cloud.environment import Environment

_MAX_LOSSES: Final = 3
"""Attempts at a restartable job whose worker was killed from outside; then it is an error."""

_MAX_RETRY_DELAY_S: Final = 60.0
_RUNTIME: Final = struct.Struct("<d")
_RUNTIME_AT: Final = 16
_WAITING_BYTE: Final = bytes((WAITING,))
_QUEUED_BYTE: Final = bytes((QUEUED,))
_POLL_EVERY_S: Final = 0.002
_POLL_OFTEN_S: Final = 0.0005
"""Whoever submits much looks for outcomes himself: the helper thread would step in, and each switch takes longer. Often
if a call could not be put aside, as it may wait for what has just ended."""

_POLL_EVERY_CHUNKS: Final = 4


class Engine(Source):
    """Jobs, from submission to outcome.

    Args:
        store: Keeps them.
        executor: Runs them.
        clock: Real or virtual.
        max_nesting: How deep jobs may submit jobs.
        max_kept: Finished batches remembered; 0 means all.
    """

    def __init__(
        self, store: Store, executor: Executor, clock: Clock, *, max_nesting: int = 100, max_kept: int = 0
    ) -> None:
        self._store = store
        self._intake = Intake()
        self._has_intake = executor.takes_many and not (store.durable or max_kept)
        self.executor = executor
        self.clock = clock
        self.lock = threading.RLock()
        self._max_nesting = max_nesting
        self._max_kept = max_kept
        self._kept: deque[Batch] = deque()
        self._queue = Queue(executor)
        self._unfinished = self._n_waiting = 0
        self._killing: dict[tuple[int, int], bytes] = {}
        self._cancelling = self._paused = False
        self._stalling: list[Batch] = []
        self._failures: list[tuple[Batch, int, int]] = []
        self._n_watching_failures = 0
        self._polled_at = 0.0
        self._chunk_tokens = count(1)
        self._on_request: Callable[..., None] | None = None
        #: Called after the end, without the lock: who was to be told of jobs hears no more of them.
        self.when_closed: list[Callable[[], None]] = []
        self.closed = False
        self.durable = Durability(self) if store.durable else None
        self.waiting = Waiting(executor, clock, self.lock, lambda: self.n_unfinished > 0 or executor.busy)
        #: Held while anything here is changed, or asked for through ``Requests``.
        self.changing = Changing(self.lock, self.waiting.handlers)
        executor.bind(self)

    @property
    def store(self) -> Store:
        """Where jobs are kept, all that were submitted."""
        if self._intake:
            self._empty_intake()
        return self._store

    def call_in(self) -> None:
        """Know of the ends that can be known by now: whoever waits may be patient, and whoever asks must not be.

        Raises:
            BackendClosed: The engine is closed.
        """
        self.check_open()
        if self.executor.patient:
            with self.changing:
                self.executor.call_in()

    @property
    def n_unfinished(self) -> int:
        """Jobs that are not final."""
        return self._unfinished + len(self._intake)

    @property
    def n_waiting(self) -> int:
        """Jobs that wait for others, or for their next attempt."""
        return self._n_waiting

    # --- submitting ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        function: Function,
        context: tuple[int, bytes],
        arguments: bytes,
        options: JobOptions,
        depth: int = 0,
        environment: Environment | None = None,
    ) -> int:
        """Take one call; returns its jid. Does not block. With a durable store it starts once it is on disk.

        Raises:
            JobNotFound: A dependency is unknown; nothing was submitted.
            UnsupportedOperation: It needs more slots than there are, or is nested too deep.
            BackendClosed: The engine is closed.
        """
        now = self.clock.now()
        can_wait = self._has_intake and environment is None and not self.executor.has_room
        jid = self._take_in((function, context, options, depth, now, arguments)) if can_wait else 0
        poll_every_s = _POLL_EVERY_S if jid else _POLL_OFTEN_S
        if not jid:
            with self.changing:
                self._check(options, depth)
                batch = Batch(0, function, context, options, depth, now, arguments, environment)
                self.attach(batch)
                batch.jid0 = jid = self.store.new_jids(1)
                self._add(batch)
                if self.durable is not None:
                    self.durable.settle_when_safe(batch)
                else:
                    self.settle(batch)
        if not 0.0 <= now - self._polled_at < poll_every_s and self.executor.busy:
            self.waiting.poll_once()
            self._polled_at = self.clock.now()
        return jid

    def _take_in(self, call: Call) -> int:
        """The jid of a call that is put aside, as nobody would begin it now; 0 if it is to be queued at once."""
        _, _, options, depth, _, arguments = call
        if not Intake.takes(arguments, options):
            return 0
        if self.executor.patient and self._queue.goes_before_some(options.priority):
            return 0  # nobody looks for long, and workers may have been sent much that is to start after it
        with self.lock:
            self._check(options, depth)
            if options.depends_on and not self._store.have_succeeded(options.depends_on):
                return 0
            jid = self._store.new_jids(1)
            self._intake.append((jid, call))
        if self.executor.has_room:
            # Just now: whoever made it found nothing here.
            with self.changing:
                self._empty_intake()
                self.executor.wake()
                self.waiting.need_helper()
        return jid

    def _empty_intake(self) -> None:
        with self.changing:
            for batch in self._intake.batches(self._chunk_tokens):
                self._add(batch)
                self._queue.put(batch)

    def _add(self, batch: Batch) -> None:
        self._unfinished += batch.n
        self._store.add(batch)

    def open_map(
        self,
        function: Function,
        context: tuple[int, bytes],
        options: JobOptions,
        depth: int = 0,
        environment: Environment | None = None,
    ) -> Batch:
        """Begin a map; its items follow by ``extend``, and ``seal`` ends it. Errors as ``submit``."""
        with self.changing:
            self._check(options, depth)
            batch = Batch(0, function, context, options, depth, self.clock.now(), None, environment)
            self.attach(batch)
            self.store.opened(batch)
            return batch

    def extend(self, batch: Batch, kind: int, n: int, payload: bytes) -> None:
        """Add a chunk of ``n`` items to an open map. They may start at once: nobody knows their jids yet."""
        with self.changing:
            self.check_open()
            start = batch.n
            batch.chunks.append(Chunk(next(self._chunk_tokens), start, n, kind, payload))
            batch.n += n
            batch.put_free(start, start + n)
            batch.states += bytes((WAITING if batch.n_waiting_on else QUEUED,)) * n
            self._unfinished += n
            self._n_waiting += n if batch.n_waiting_on else 0
            if self.durable is not None:
                self.store.extended(batch, batch.chunks[-1])
                self.durable.settle_when_safe(batch)
            else:
                self.settle(batch)
        if len(batch.chunks) % _POLL_EVERY_CHUNKS == 0:
            self.waiting.poll_once()

    def seal(self, batch: Batch) -> range:
        """End a map, and give its jobs their jids."""
        with self.changing:
            batch.sealed = True
            if batch.n:
                batch.jid0 = self.store.new_jids(batch.n)
                self.store.add(batch)
                if self.durable is not None:
                    self.durable.take_back_unless_safe(batch)
                if batch.finished:
                    self._ended(batch)
            else:
                self.store.delete(batch, 0, 0)
            return range(batch.jid0, batch.jid0 + batch.n)

    def abandon(self, batch: Batch) -> None:
        """Give an open map up: kill what runs of it and forget it."""
        with self.changing:
            jids = self.seal(batch)
            if jids:
                self.cancel(jids)
                self.store.delete(batch, 0, batch.n)

    def check_open(self) -> None:
        """Raise BackendClosed if the engine is closed."""
        if self.closed:
            raise BackendClosed("this cloud was closed")

    def _check(self, options: JobOptions, depth: int) -> None:
        self.check_open()
        if options.cores > 1 and options.cores > self.executor.n_slots:
            raise UnsupportedOperation(
                f"_cores={options.cores} asks for more than the {self.executor.n_slots} worker slots there are; "
                "ask for fewer, or raise cloud.config.num_procs"
            )
        if depth > self._max_nesting:
            raise UnsupportedOperation(
                f"jobs submit jobs {depth} levels deep; more than cloud.config.max_nesting = {self._max_nesting}"
            )

    def attach(self, batch: Batch) -> None:
        """Let it wait for the jobs it depends on.

        Raises:
            JobNotFound: One is unknown.
        """
        if not batch.options.depends_on:
            return
        try:
            dependencies = self.store.runs(batch.options.depends_on)
        except CloudException as exc:
            raise type(exc)("This dependency does not exist.", jid=exc.jid) from None
        ignore = batch.options.ignore_dependency_errors
        for other, start, stop in dependencies:
            states = other.states
            if not ignore and any(states.find(code, start, stop) >= 0 for code in (ERROR, KILLED, STALLED)):
                batch.n_waiting_on = -1
                break
            unfinished = states.count(QUEUED, start, stop) + states.count(WAITING, start, stop)
            if unfinished:
                batch.n_waiting_on += unfinished
                self.watch(other, start, stop, lambda *run: self._dependency_finished(batch, *run))
        if batch.n_waiting_on:
            self._n_waiting += batch.states.count(QUEUED)
            batch.states = batch.states.replace(_QUEUED_BYTE, _WAITING_BYTE)

    def adopt(self, batch: Batch) -> None:
        """Count the jobs of an earlier process."""
        self._unfinished += batch.n - batch.n_final

    def _dependency_finished(self, batch: Batch, other: Batch, start: int, n: int) -> None:
        if batch.n_waiting_on < 0:
            return
        if not batch.options.ignore_dependency_errors and other.states[start] != DONE:
            batch.n_waiting_on = -1
        else:
            batch.n_waiting_on -= n
        if batch.n and batch.n_waiting_on <= 0:
            if not batch.n_waiting_on:
                self._n_waiting -= batch.states.count(WAITING)
                batch.states = batch.states.replace(_WAITING_BYTE, _QUEUED_BYTE)
            self.settle(batch)

    def settle(self, batch: Batch) -> None:
        """Put a new batch, or new items of one, where its dependencies let it be."""
        if self.durable is not None and not self.durable.is_safe(batch):
            return
        if batch.n_waiting_on < 0:
            self._stall(batch)
            return
        if batch.n_waiting_on:
            self.waiting.need_helper()
            return
        self._queue.put(batch)
        self.executor.wake()
        self.waiting.need_helper()

    def _stall(self, batch: Batch) -> None:
        """End a batch that can never start, and what depends on it; in a loop, as chains may be long."""
        self._stalling.append(batch)
        if len(self._stalling) > 1:
            return  # the loop below comes to it
        stalled = pack_outcome(STALLED, [(ERROR_TEXT, b"Could not start due to dependency erroring")])
        try:
            for each in self._stalling:
                for start, n in runs_of(each, (WAITING, QUEUED)):
                    self.finish(each, start, n, stalled)
        finally:
            self._stalling.clear()

    # --- giving work out ----------------------------------------------------------------------------------------------

    @property
    def has_queued(self) -> bool:
        """True when something might be claimed."""
        return not self._cancelling and not self._paused and (bool(self._queue) or bool(self._intake))

    @property
    def next_environment(self) -> Environment | None:
        """See ``Source.next_environment``."""
        return self._queue.next_environment

    def claim(
        self, free_slots: int, room_s: float, *, idle: bool, environment: Environment | None = None
    ) -> list[Task]:
        """Work for one worker; see ``Source.claim``."""
        if self._cancelling or self._paused:
            return []
        if self._intake:
            self._empty_intake()
        tasks = self._queue.claim(free_slots, room_s, idle=idle, environment=environment)
        return tasks if self.durable is None else self.durable.may_begin(tasks)

    def give_back(self, batch: Batch, start: int, stop: int) -> None:
        """Items that were claimed and not begun are queued again, at the front."""
        for (batch_id, index), why in list(self._killing.items()) if self._killing else ():
            if batch_id == id(batch) and start <= index < stop:
                # Its worker died before it began the item: there is nobody left to be told of the kill.
                self.finish(batch, index, 1, pack_outcome(KILLED, [(ERROR_TEXT, why)]))
        batch.put_free(start, stop, first=True)
        self._queue.put(batch, first=True)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def finish(self, batch: Batch, start: int, n: int, outcome: bytes, *, may_retry: bool = True) -> None:
        """Record how a run of items ended; once an item is final, later reports of it are dropped."""
        states = batch.states
        status = outcome[0]
        if n == 1:
            if states[start] >= DONE:
                return
            if self._killing and (why := self._killing.pop((id(batch), start), None)) is not None:
                status, outcome = KILLED, as_killed(outcome, why)
            elif status == ERROR and may_retry and batch.options.retries and self._retry(batch, start):
                return
            if states[start] == WAITING:
                self._n_waiting -= 1
            states[start] = status
            if batch.arguments is not None:
                batch.arguments = b""  # needed no more, and perhaps large
        else:
            for index in range(start, start + n) if self._killing else ():
                self._killing.pop((id(batch), index), None)
            if states[start] == WAITING:
                self._n_waiting -= n
            states[start : start + n] = bytes((status,)) * n
        batch.n_final += n
        self._unfinished -= n
        batch.add_segment(start, n, outcome)
        if self.durable is not None:
            self.store.finished(batch, start, n, outcome)
        if status == DONE or status == ERROR:
            batch.function.took(_RUNTIME.unpack_from(outcome, _RUNTIME_AT)[0], n)
        if status != DONE and self._n_watching_failures:
            self._failures.append((batch, start, n))
        if batch.watches is not None:
            self._tell(batch, start, n)
        if batch.n_final == batch.n and batch.sealed and (batch.chunks or self._max_kept):
            self._ended(batch)

    def finish_each(self, batch: Batch, start: int, outcomes: list[bytes]) -> None:
        """Record how consecutive items ended, one outcome each."""
        n = len(outcomes)
        states = batch.states
        if (
            (self._killing or self.durable is not None or batch.watches is not None or batch.n_final + n == batch.n)
            or states.count(QUEUED, start, start + n) < n
            or any(outcome[0] != DONE for outcome in outcomes)
        ):
            for index, outcome in enumerate(outcomes, start):
                self.finish(batch, index, 1, outcome)
            return
        states[start : start + n] = bytes((DONE,)) * n
        batch.n_final += n
        self._unfinished -= n
        batch.add_segments(start, outcomes)
        batch.function.took(sum(_RUNTIME.unpack_from(outcome, _RUNTIME_AT)[0] for outcome in outcomes), n)

    def _tell(self, batch: Batch, start: int, n: int) -> None:
        watches = batch.watches
        if self.closed or watches is None:
            return  # who was told would ask a closed one, and be refused
        found = watches.take(start, n)
        if batch.finished:
            batch.watches = None
        for watch in found:
            low, high = max(start, watch.start), min(start + n, watch.stop)
            watch.notify(batch, low, high - low)

    def watch(self, batch: Batch, start: int, stop: int, notify: Callable[[Batch, int, int], None]) -> Watch:
        """Tell of each of these jobs that becomes final from now on: see ``Watch``. Under the lock."""
        watch = batch.watch(start, stop, notify)
        if self.executor.patient:
            self.executor.interrupt()  # whoever polls knew of nobody who is to be told at once
        return watch

    def _retry(self, batch: Batch, index: int) -> bool:
        done = batch.attempt(index)
        if done > batch.options.retries:
            return False
        self._next_attempt(batch, index)
        batch.states[index] = WAITING
        self._n_waiting += 1
        delay_s = min(batch.options.retry_delay_s * 2.0 ** (done - 1), _MAX_RETRY_DELAY_S)
        self.waiting.call_later(delay_s, lambda: self._requeue(batch, index))
        return True

    def _next_attempt(self, batch: Batch, index: int) -> None:
        batch.next_attempt(index)
        if self.durable is not None:
            self.store.retried(batch, index)

    def _requeue(self, batch: Batch, index: int) -> None:
        if batch.states[index] == WAITING and not self.closed:
            batch.states[index] = QUEUED
            self._n_waiting -= 1
            self.give_back(batch, index, index + 1)
            self.executor.wake()

    def lose(
        self,
        batch: Batch,
        index: int,
        reason: str,
        exitcode: int | None,
        *,
        own_fault: bool,
        had_ended: bool = False,
        output: tuple[bytes, bytes] = (b"", b""),
        pid: int = 0,
        age_s: float | None = None,
    ) -> None:
        """An item's worker died under it: an error, or another attempt; see ``Source.lose``."""
        if batch.states[index] >= DONE:
            return
        killed = self._killing.get((id(batch), index))
        again = batch.options.restartable and (had_ended or batch.attempt(index) < _MAX_LOSSES)
        if killed is None and not own_fault and again:
            self._next_attempt(batch, index)
            self.give_back(batch, index, index + 1)
            return
        sections = [(ERROR_TEXT, reason.encode() if killed is None else killed)]
        sections += [(tag, data) for tag, data in zip((STDOUT, STDERR), output, strict=True) if data]
        if exitcode is not None and killed is None:
            sections.append((EXITCODE, str(exitcode).encode()))
        status = ERROR if killed is None else KILLED
        started = 0.0 if age_s is None else self.clock.now() - age_s
        outcome = pack_outcome(status, sections, pid=pid, started=started, runtime_s=age_s or 0.0)
        # Retries are for what is known to have failed; this attempt may have done all its work.
        self.finish(batch, index, 1, outcome, may_retry=batch.options.restartable)

    def _ended(self, batch: Batch) -> None:
        if batch.chunks and self.durable is None:
            batch.chunks = []  # needed no more, and perhaps large
        if not self._max_kept:
            return
        self._kept.append(batch)
        while len(self._kept) > self._max_kept:
            old = self._kept.popleft()
            self.store.delete(old, 0, old.n)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def wait(
        self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool = False, read: Read | None = None
    ) -> list[int] | None:
        """Block until all jobs are final, or the timeout, or (with ``stop_on_error``) until one has failed.

        Args:
            read: See ``ReadAhead``.

        Returns:
            The jids that are not final; None when a failed job ended the wait.

        Raises:
            JobNotFound: A jid is unknown; nothing was waited for.
        """
        self.check_open()
        deadline = None if timeout_s is None else self.clock.monotonic() + timeout_s
        self.call_in()
        call = self._store.find_call(jids[0]) if len(jids) == 1 else None
        if call is not None:
            return self._wait_for_one(call, 0, deadline, stop_on_error=stop_on_error)
        with self.lock:
            runs = self.store.runs(jids)
            if len(runs) == 1 and runs[0][2] - runs[0][1] == 1:
                wait = None
            else:
                wait = Wait(runs, ahead=reads_ahead(runs, read))
                if stop_on_error and wait.has_failed():
                    return None
                if wait.all_final():
                    return []
        if wait is None:
            return self._wait_for_one(runs[0][0], runs[0][1], deadline, stop_on_error=stop_on_error)
        if stop_on_error:
            self._drive_to_failure(wait, deadline)
        else:
            self._drive_to_end(wait, deadline)
        with self.lock:
            return None if wait.failed else wait.unfinished()

    def _wait_for_one(
        self, batch: Batch, index: int, deadline: float | None, *, stop_on_error: bool
    ) -> list[int] | None:
        def done() -> bool:
            return batch.states[index] >= DONE

        if not done():
            self.waiting.drive(done, deadline)
        status = batch.states[index]
        if status < DONE:
            return [batch.jid0 + index]
        return None if stop_on_error and status != DONE else []

    def _drive_to_failure(self, wait: Wait, deadline: float | None) -> None:
        try:
            with self.changing:
                wait.failures = self._failures
                wait.seen_failures = len(self._failures)
                self._n_watching_failures += 1
                # One may have failed since the last look, when nobody kept a list of failures.
                if wait.has_failed():
                    return
            self._drive_to_end(wait, deadline)
        finally:
            if wait.failures is not None:
                with self.changing:
                    self._n_watching_failures -= 1
                    if not self._n_watching_failures:
                        self._failures = []

    def _drive_to_end(self, wait: Wait, deadline: float | None) -> None:
        def done() -> bool:
            with self.lock:  # whoever leads looks, too, and others change what it looks at
                return wait.done()

        patient = self.durable is None and wait.is_to_the_end()
        self.waiting.drive(done, deadline, patient=patient, ahead=wait.ahead)

    def wait_until(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Block until ``done()``, which some report of the executor makes true, or the timeout."""
        return self.waiting.drive(done, None if timeout_s is None else self.clock.monotonic() + timeout_s)

    # --- asking -------------------------------------------------------------------------------------------------------

    def statuses(self, jids: Jids) -> bytearray:
        """One status code a jid, in order."""
        self.call_in()
        with self.lock:
            codes = bytearray()
            running: dict[int, list[tuple[int, int]]] | None = None
            for batch, start, stop in self.store.runs(jids):
                if batch.n_final == batch.n:
                    codes += batch.states[start:stop]
                    continue
                if running is None:
                    running = by_batch(self.executor.running())
                codes += status_codes(batch, start, stop, running)
            return codes

    def outcomes(self, jids: Jids, limit_bytes: int | None = None) -> list[tuple[int, int, int, bytes]]:
        """(first index in segment, n wanted, length of segment, packed outcome) covering final jobs, in order.

        With a limit, those of the first jobs only that together have so many bytes, and at least one.
        """
        self.check_open()
        call = self._store.find_call(jids[0]) if len(jids) == 1 else None
        if call is not None and call.segments:  # they come after the state
            return [(0, 1, 1, loaded(call.segments[0][2]))]
        with self.lock:
            return outcomes_of(self.store, jids, limit_bytes)

    # --- ending jobs --------------------------------------------------------------------------------------------------

    def cancel(self, jids: Jids | None, *, begun: bool = True) -> list[int]:
        """Kill jobs: those that wait at once, those that run by their executor. Final ones are left alone.

        Args:
            jids: None means every unfinished job.
            begun: False leaves those alone that have begun.

        Returns:
            Jids of the running ones, whose end is still to come: wait for them.
        """
        self.call_in()
        with self.changing:
            if jids is None:
                runs = [(batch, 0, batch.n) for batch in self.store.batches(unfinished=True)]
            else:
                runs = self.store.runs(jids)
            runs = [(batch, start, stop) for batch, start, stop in runs if batch.n_final < batch.n]
            if not runs:
                return []
            # The end of one may release another that is to be killed too: nothing is handed out meanwhile.
            self._cancelling = True
            try:
                pending = self._cancel(runs, kill_begun=begun)
            finally:
                self._cancelling = False
            self.executor.wake()
            self.waiting.look_again()
            return pending

    def _cancel(self, runs: list[tuple[Batch, int, int]], *, kill_begun: bool) -> list[int]:
        self.executor.take_back()
        held = self.executor.held()
        pending: list[int] = []
        killed = pack_outcome(KILLED, [(ERROR_TEXT, b"Killed")])
        for batch, start, stop in runs:
            begun = sorted(index for its_batch, index in held if its_batch is batch and start <= index < stop)
            for low, n in runs_of(batch, (WAITING, QUEUED), start, stop, besides=begun):
                self.finish(batch, low, n, killed)
            for index in begun if kill_begun else ():
                if batch.states[index] < DONE:
                    self._killing[id(batch), index] = b"Killed"
                    self.executor.kill(batch, index)
                    pending.append(batch.jid0 + index)
        return pending

    def delete(self, jids: Jids) -> None:
        """Forget jobs; unfinished ones must have been cancelled and waited for."""
        self.check_open()
        if len(jids) == 1 and self._store.forget_call(jids[0]):
            return  # in one step: no handler of a signal can come in the middle
        with self.changing:
            for batch, start, stop in self.store.runs(jids):
                self.store.delete(batch, start, stop)

    def pause(self) -> None:
        """Begin no more jobs; those that were sent ahead and have not begun come back."""
        self._paused = True
        self.executor.take_back()

    def resume(self) -> None:
        """Begin jobs again."""
        self._paused = False
        self.executor.wake()
        self.waiting.need_helper()

    def close(self) -> None:
        """End all workers and waits. Idempotent; bounded."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
        self.waiting.close()
        self.executor.close()
        self.store.close()
        for action in self.when_closed:
            action()

    def abandon_all(self) -> None:
        """In a forked child of the program: these jobs are the parent's. Takes no lock: its owner may be gone."""
        self.closed = self.waiting.closed = True
        self.waiting.handlers.abandon()
        self.executor.abandon()

    # --- for the executor ---------------------------------------------------------------------------------------------

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """See ``Source.call_later``."""
        return self.waiting.call_later(delay_s, action)

    def out_of_time(self, batch: Batch, index: int) -> None:
        """See ``Source.out_of_time``."""
        if batch.states[index] < DONE:
            self._killing[id(batch), index] = b"Killed: it ran longer than its _max_runtime"
            self.executor.kill(batch, index)

    def request(
        self, caller: Any, batch: Batch | None, content: dict[str, Any], blobs: list[bytes], reply: Any
    ) -> None:
        """A job used a verb; see ``Source.request``."""
        assert self._on_request is not None
        self._on_request(caller, batch, content, blobs, reply)

    def serve_requests(self, handler: Callable[..., None]) -> None:
        """Who answers verbs used inside jobs."""
        self._on_request = handler
