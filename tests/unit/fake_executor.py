"""An executor whose workers, messages and deaths are events on a virtual clock, drawn from one random source.

It takes and returns work as ``ProcessExecutor`` does: several items to a task, work sent ahead and taken back, results
held back and reported together, kills that take time, workers that die, stall and answer after they were given up.
A job is a generator (``Body``): it yields what it does and returns its value, or raises.
"""

from __future__ import annotations

import heapq
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from cloud.engine.clock import Clock, VirtualClock
from cloud.engine.executor.base import AHEAD_S, Executor, Task
from cloud.engine.store.base import Batch
from cloud.errors import KilledException
from cloud.jobs import DONE, ERROR, ERROR_CHAIN, ERROR_TEXT, KILLED, PACKED, VALUE, pack_outcome

EPOCH = 1_600_000_000.0
STALLED_BEHIND_S = 0.005


class FrozenClock(Clock):
    """Real time that stands still, so that only jumps move a ``VirtualClock`` over it."""

    def now(self) -> float:
        return EPOCH

    def monotonic(self) -> float:
        return 1000.0


def frozen_virtual_clock() -> VirtualClock:
    """A clock that moves when an executor jumps, and never by itself."""
    return VirtualClock(FrozenClock())


class Hang(AssertionError):
    """Somebody waits without limit, and nothing can ever happen again."""


@dataclass(frozen=True)
class Sleep:
    """Run for ``s`` seconds."""

    s: float


@dataclass(frozen=True)
class Die:
    """End the worker process: by the job itself (exit, crash), or from outside."""

    own_fault: bool


@dataclass(frozen=True)
class Stall:
    """Neither run nor hear anything for ``s`` seconds; the executor gives the worker up before that if it is long."""

    s: float


@dataclass(frozen=True)
class Ask:
    """Use a verb, as code inside a job does; what ``yield`` gives is (content, blobs) of the reply."""

    content: dict[str, Any]
    blobs: tuple[bytes, ...] = ()


Body = Generator[Sleep | Die | Stall | Ask, Any, Any]


class Failure(Exception):
    """What a body raises to fail."""


@dataclass(frozen=True)
class Nature:
    """What may happen besides jobs running: probabilities, and longest times in seconds."""

    latency_s: float = 0.0002
    grace_s: float = 0.5
    give_up_s: float = 3.0
    start_dies: float = 0.0
    idle_dies: float = 0.0
    ignores_kill: float = 0.2
    packs: float = 0.7
    hold_s: float = 0.003
    slack_s: float = 0.0005


CALM = Nature()


@dataclass
class Run:
    """One run of one job, as the worker that ran it knows it.

    Attributes:
        ended: '', 'value', 'raised', 'killed', 'died' (the process ended under it).
        n_reported: Length of the run of items that its outcome was reported with; 0 while it was not.
    """

    attempt: int
    number: int
    began: float
    stop: float = 0.0
    ended: str = ""
    n_reported: int = 0


@dataclass(eq=False)
class _Item:
    position: int
    task: Task
    batch: Batch
    index: int
    attempt: int
    deliver: bool


@dataclass
class _Ended:
    item: _Item
    run: Run
    status: int
    value: Any
    text: str


@dataclass(eq=False)
class Worker:
    """A worker: what the engine's side knows, then what the process itself knows.

    Attributes:
        position: Of the next item it is given.
        taking_back: Work was taken back, and the process has not confirmed.
        given_up: The executor forgot it; the process may still answer.
        current: Position announced last, -1 before the first.
        limit: Begin nothing from here on.
        running: What runs now.
        held: Outcomes not yet sent.
    """

    number: int
    tasks: deque[Task] = field(default_factory=deque)
    position: int = 0
    cores: int = 1
    load_s: float = 0.0
    n_waiting: int = 0
    taking_back: bool = False
    kill_at: int | None = None
    retired: bool = False
    buried: bool = False
    given_up: bool = False

    alive: bool = True
    started: bool = False
    current: int = -1
    limit: float = float("inf")
    inbox: deque[_Item | None] = field(default_factory=deque)
    running: tuple[_Item, Run, Body] | None = None
    deaf: bool = False
    held: list[_Ended] = field(default_factory=list)
    sent_at: float = 0.0

    @property
    def gone(self) -> bool:
        return self.buried or self.given_up

    @property
    def idle(self) -> bool:
        return not (self.tasks or self.taking_back or self.kill_at is not None or self.retired or self.gone)

    @property
    def occupies(self) -> bool:
        """True while it holds slots."""
        return not (self.idle or self.n_waiting or self.retired or self.gone) and self.cores > 0

    @property
    def takes_more(self) -> bool:
        return bool(self.tasks) and not (
            self.taking_back or self.kill_at is not None or self.retired or self.gone or self.n_waiting
        )

    def items(self) -> Iterator[tuple[int, Batch, int]]:
        for task in self.tasks:
            for index in range(task.start, task.stop):
                yield task.position + index - task.start, task.batch, index


class FakeExecutor(Executor):
    """Runs bodies on simulated workers.

    Args:
        n_slots: Worker slots.
        clock: Moved by ``poll``.
        rng: Decides everything that may go one way or another.
        body: Makes the body of a job: ``body(batch, index, attempt)``.
        nature: What else may happen.

    Attributes:
        runs: Every run that was begun, by (id of batch, index).
        begun: Those begun whose end the engine does not know.
        on_begin: Called as ``on_begin(batch, index)`` just before a job begins.
        trace: (time, format, values) of everything that happened.
    """

    takes_many = True

    def __init__(
        self,
        n_slots: int,
        clock: VirtualClock,
        rng: Random,
        body: Callable[[Batch, int, int], Body],
        nature: Nature = CALM,
    ) -> None:
        self._n_slots = n_slots
        self.clock = clock
        self.rng = rng
        self.body = body
        self.nature = nature
        self.workers: dict[int, Worker] = {}
        self._orphans: list[tuple[int, Batch, int]] = []
        self.runs: dict[tuple[int, int], list[Run]] = {}
        self.begun: set[tuple[int, int]] = set()
        self.on_begin: Callable[[Batch, int], None] = lambda batch, index: None
        self.trace: list[tuple[float, str, tuple[Any, ...]]] = []
        self.closed = False
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._numbers = count(1)
        self._run_numbers = count(1)
        self._source: Any = None

    # --- the contract -------------------------------------------------------------------------------------------------

    def bind(self, source: Any) -> None:
        self._source = source

    @property
    def n_slots(self) -> int:
        return self._n_slots

    @property
    def busy(self) -> bool:
        return any(worker.tasks for worker in self.workers.values())

    @property
    def n_used(self) -> int:
        """Slots that workers hold; more than there are only after a job that waited went on."""
        return sum(worker.cores for worker in self.workers.values() if worker.occupies)

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def really_running(self) -> Iterator[_Item]:
        """What the processes run, those given up excepted."""
        for worker in self.workers.values():
            if worker.alive and worker.running is not None:
                yield worker.running[0]

    def interrupt(self) -> None:
        pass

    def wake(self) -> None:
        while not self.closed and self._source.has_queued and self.n_used < self._n_slots:
            idle = [worker for worker in self.workers.values() if worker.idle]
            worker = idle[-1] if idle else self._spawn()
            tasks = self._source.claim(self._n_slots - self.n_used, AHEAD_S, idle=True)
            if not tasks:
                return
            worker.cores = tasks[0].batch.options.cores
            self._give(worker, tasks)
            limit_s = tasks[0].batch.options.max_runtime_s
            if limit_s is not None:
                self._limit_runtime(worker, tasks[0], limit_s)

    def poll(self, timeout_s: float | None, *, may_jump: bool, patient: bool = False) -> None:
        clock, events = self.clock, self._events
        now = clock.monotonic()
        if may_jump and (timeout_s is None or timeout_s > 0) and not (events and events[0][0] <= now):
            if not events and timeout_s is None:
                raise Hang("somebody waits without limit, and nothing can ever happen again")
            # A little later than the first event: several are then told together.
            until = events[0][0] + self.rng.random() * self.nature.slack_s if events else float("inf")
            if timeout_s is not None:
                until = min(until, now + timeout_s)
            clock.jump_to(until)
            now = clock.monotonic()
        with self._source.lock:
            while events and events[0][0] <= now:
                heapq.heappop(events)[2]()
            if not self.closed:
                self._refill()

    def running(self) -> list[tuple[Batch, int, int]]:
        return [
            (batch, index, index + 1)
            for worker in self.workers.values()
            for position, batch, index in worker.items()
            if position == worker.current
        ]

    def held(self) -> list[tuple[Batch, int]]:
        held = [(batch, index) for worker in self.workers.values() for _, batch, index in worker.items()]
        return held + [(batch, index) for _, batch, index in self._orphans]

    def live(self, batch: Batch, index: int) -> dict[str, Any]:
        runs = self.runs.get((id(batch), index))
        began = runs[-1].began if runs else self.clock.monotonic()
        started = self.clock.now() - (self.clock.monotonic() - began)
        return {"pid": 1, "started": started, "stdout": b"", "stderr": b""}

    def kill(self, batch: Batch, index: int) -> bool:
        for worker in self.workers.values():
            for position, its_batch, its_index in worker.items():
                if its_batch is batch and its_index == index:
                    self._kill(worker, position, batch, index)
                    return True
        return False

    def _kill(self, worker: Worker, position: int, batch: Batch, index: int) -> None:
        if worker.kill_at is None:
            self.note("kill {} at worker {}", (batch, index), worker.number)
            worker.kill_at = position
            self._after(self._latency(), lambda: self._interrupt(worker, position))
            self._source.call_later(self.nature.grace_s, lambda: self._die(worker, own_fault=False))

    def take_back(self) -> None:
        for worker in list(self.workers.values()):
            self._take_back(worker)

    def suspend(self, caller: Worker) -> None:
        caller.n_waiting += 1
        if caller.n_waiting == 1 and caller.tasks:
            self.note("worker {} waits", caller.number)
            self._take_back(caller)
            self.wake()

    def resume(self, caller: Worker) -> None:
        if not caller.gone:
            caller.n_waiting -= 1

    def close(self) -> None:
        self.closed = True

    def abandon(self) -> None:
        self.closed = True

    # --- the engine's side --------------------------------------------------------------------------------------------

    def _spawn(self) -> Worker:
        worker = Worker(next(self._numbers))
        self.workers[worker.number] = worker
        if self.rng.random() < self.nature.start_dies:
            self._after(self._latency(), lambda: self._die(worker, own_fault=False))
        else:
            self._after(self.rng.random() * 0.002, lambda: self._start(worker))
        return worker

    def _give(self, worker: Worker, tasks: list[Task]) -> None:
        for task in tasks:
            task.position = worker.position
            worker.position += task.stop - task.start
            worker.load_s += (task.stop - task.start) * (task.batch.function.mean_s or 1.0)
            worker.tasks.append(task)
            for index in range(task.start, task.stop):
                attempt = task.batch.attempt(index)
                deliver = not task.batch.options.restartable
                worker.inbox.append(
                    _Item(task.position + index - task.start, task, task.batch, index, attempt, deliver)
                )
            self.note("worker {} gets {}-{}", worker.number, (task.batch, task.start), task.stop - 1)
        self._step_later(worker)

    def _refill(self) -> None:
        self.wake()
        for worker in self.workers.values() if self._source.has_queued else ():
            if worker.takes_more and worker.load_s < AHEAD_S / 2 and self._source.has_queued:
                free = self._n_slots - self.n_used + worker.cores
                tasks = self._source.claim(free, AHEAD_S - worker.load_s, idle=False)
                if tasks:
                    self._give(worker, tasks)

    def _limit_runtime(self, worker: Worker, task: Task, limit_s: float) -> None:
        batch, index, position = task.batch, task.start, task.position

        def out_of_time() -> None:
            if any(each[0] == position for each in worker.items()):
                self._source.out_of_time(batch, index)

        self._source.call_later(limit_s, out_of_time)

    def _take_back(self, worker: Worker) -> None:
        if not worker.tasks or worker.taking_back or worker.gone or worker.position - 1 == worker.current:
            return
        worker.limit = worker.current + 1
        bound = worker.current + 1
        if worker.started and worker.running is None and self.rng.random() < 0.4:
            # It announced one more in the moment the limit was set, and saw the limit before it began.
            worker.current += 1
            bound += 1
            self.begun.update((id(batch), index) for position, batch, index in worker.items() if position == bound - 1)
        worker.taking_back = True
        self.note("worker {} gives back from position {}", worker.number, bound)
        self._return_from(worker, bound)
        worker.inbox.append(None)
        self._step_later(worker)

    def _return_from(self, worker: Worker, bound: int) -> None:
        kept: deque[Task] = deque()
        for task in reversed(worker.tasks):
            end = task.position + task.stop - task.start
            if task.position >= bound:
                self._source.give_back(task.batch, task.start, task.stop)
                continue
            if end > bound:
                split = task.start + bound - task.position
                self._source.give_back(task.batch, split, task.stop)
                task.stop = split
            kept.appendleft(task)
        worker.tasks = kept
        worker.load_s = sum((task.stop - task.start) * (task.batch.function.mean_s or 1.0) for task in kept)

    def _receive(self, worker: Worker, position: int, n: int, outcome: bytes) -> None:
        task = worker.tasks[0]
        assert task.position == position, "outcomes come in order"
        batch, start = task.batch, task.start
        task.start += n
        task.position += n
        if task.start == task.stop:
            worker.tasks.popleft()
        worker.load_s -= n * (batch.function.mean_s or 1.0)
        if worker.kill_at is not None and position <= worker.kill_at < position + n:
            self._after(self._latency(), lambda: self._die(worker, own_fault=False))
        elif not worker.tasks:
            self._idled(worker, retire=batch.options.kill_process)
        self._source.finish(batch, start, n, outcome)

    def _idled(self, worker: Worker, *, retire: bool) -> None:
        worker.load_s = 0.0
        n_live = sum(1 for each in self.workers.values() if not (each.retired or each.gone or each.n_waiting))
        if worker.kill_at is None and (retire or worker.n_waiting or n_live > self._n_slots):
            worker.retired = True
            self._after(self._latency(), lambda: self._die(worker, own_fault=False))
        elif self.rng.random() < self.nature.idle_dies:
            self._after(self.rng.random() * 0.01, lambda: self._die(worker, own_fault=False))

    def _receive_late(self, ended: list[_Ended]) -> None:
        """Answers of a worker that was given up: another attempt's, or of a job that is final."""
        for each in ended:
            item = each.item
            if item.batch.states[item.index] >= DONE:
                self.note("late answer about {}", (item.batch, item.index))
                self._source.finish(item.batch, item.index, 1, _outcome([each]))
            else:
                assert item.batch.attempt(item.index) > item.attempt, "an attempt that was given up may still run"

    def _bury(self, worker: Worker, *, own_fault: bool) -> None:
        if worker.gone:
            return
        worker.buried = True
        self.note("worker {} is buried", worker.number)
        self._let_go(worker, own_fault=own_fault)

    def _let_go(self, worker: Worker, *, own_fault: bool) -> None:
        del self.workers[worker.number]
        # Until each is reported it is still held: what the end of one releases may be claimed before the next is told.
        orphans = self._orphans = list(worker.items())
        worker.tasks.clear()
        while orphans:
            position, batch, index = orphans.pop()
            if position > worker.current:
                self._source.give_back(batch, index, index + 1)
            else:
                mine = position == worker.current
                self._source.lose(batch, index, "worker died", -9, own_fault=own_fault and mine)
        self.wake()

    def _give_up(self, worker: Worker, item: _Item) -> None:
        if worker.running is not None and worker.running[0] is item and worker.deaf and not worker.gone:
            worker.given_up = True
            self.note("worker {} is given up", worker.number)
            self._let_go(worker, own_fault=False)

    # --- the process's side -------------------------------------------------------------------------------------------

    def _start(self, worker: Worker) -> None:
        worker.started = True
        self._step(worker)

    def _step_later(self, worker: Worker) -> None:
        if worker.started and worker.running is None:
            self._after(self._latency(), lambda: self._step(worker))

    def _step(self, worker: Worker) -> None:
        """Begin the next item, or confirm that work was taken back."""
        if not worker.alive or not worker.started or worker.running is not None or worker.given_up:
            return
        while worker.inbox:
            item = worker.inbox.popleft()
            if item is None:
                worker.limit = float("inf")
                self._send(worker)
                self._send_message(worker, lambda: self._stopped(worker))
                continue
            if item.position >= worker.limit:
                worker.current = max(worker.current, item.position)
                continue
            worker.current = item.position
            self._begin(worker, item)
            return
        self._send(worker)

    def _begin(self, worker: Worker, item: _Item) -> None:
        key = id(item.batch), item.index
        self.on_begin(item.batch, item.index)
        run = Run(item.attempt, next(self._run_numbers), self.clock.monotonic())
        self.runs.setdefault(key, []).append(run)
        self.begun.add(key)
        self.note("worker {} begins {}, attempt {}", worker.number, (item.batch, item.index), item.attempt)
        worker.running = item, run, self.body(item.batch, item.index, item.attempt)
        self._after(STALLED_BEHIND_S, lambda: self._poke(worker, item))
        self._advance(worker, item, None)

    def _poke(self, worker: Worker, item: _Item) -> None:
        if worker.alive and worker.running is not None and worker.running[0] is item and not worker.gone:
            if not worker.deaf:
                self._send(worker)
            self._take_back(worker)

    def _advance(self, worker: Worker, item: _Item, answer: Any) -> None:
        if not worker.alive or worker.running is None or worker.running[0] is not item:
            return
        _, run, body = worker.running
        worker.deaf = False
        try:
            step = body.send(answer)
        except StopIteration as stop:
            self._ended(worker, item, run, "value", stop.value)
        except KilledException:
            self._ended(worker, item, run, "killed", None)
        except Failure as exc:
            self._ended(worker, item, run, "raised", exc)
        else:
            self._do(worker, item, step)

    def _do(self, worker: Worker, item: _Item, step: Sleep | Die | Stall | Ask) -> None:
        if isinstance(step, Sleep):
            self._after(step.s, lambda: self._advance(worker, item, None))
        elif isinstance(step, Stall):
            worker.deaf = True
            self._after(self.nature.give_up_s, lambda: self._give_up(worker, item))
            self._after(step.s, lambda: self._advance(worker, item, None))
        elif isinstance(step, Die):
            self._die(worker, own_fault=step.own_fault)
        else:
            self._send(worker)
            self._send_message(worker, lambda: self._request(worker, item, step))

    def _request(self, worker: Worker, item: _Item, ask: Ask) -> None:
        def reply(content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> None:
            self._after(self._latency(), lambda: self._advance(worker, item, (content, list(blobs))))

        if not worker.gone:
            self._source.request(worker, item.batch, dict(ask.content), list(ask.blobs), reply)

    def _interrupt(self, worker: Worker, position: int) -> None:
        """The signal that raises in the job, if the job is still there and hears it."""
        if not worker.alive or worker.running is None or worker.deaf or worker.gone:
            return
        item, run, body = worker.running
        if item.position != position or self.rng.random() < self.nature.ignores_kill:
            return
        body.close()
        worker.running = item, run, _killed(self.rng.random() * 0.01)
        self._advance(worker, item, None)

    def _ended(self, worker: Worker, item: _Item, run: Run, how: str, value: Any) -> None:
        worker.running = None
        run.ended, run.stop = how, self.clock.monotonic()
        status = {"value": DONE, "raised": ERROR, "killed": KILLED}[how]
        self.note("worker {} ended {}: {}", worker.number, (item.batch, item.index), how)
        worker.held.append(_Ended(item, run, status, run.number if how == "value" else None, repr(value)))
        if item.deliver or worker.given_up or not worker.inbox:
            self._send(worker)
        elif len(worker.held) == 1:
            self._after(self.rng.random() * self.nature.hold_s, lambda: self._send(worker))
        self._step_later(worker)

    def _send(self, worker: Worker) -> None:
        if not worker.alive or not worker.held:
            return
        ended, worker.held = worker.held, []
        if worker.given_up:
            self._after(self._latency(), lambda: self._receive_late(ended))
            return
        for run in self._packed(ended):
            first, n = run[0].item, len(run)
            outcome = _outcome(run)

            def arrive(run: list[_Ended] = run, first: _Item = first, n: int = n, outcome: bytes = outcome) -> None:
                if worker.given_up:
                    self._receive_late(run)
                elif not worker.gone:
                    for each in run:
                        each.run.n_reported = n
                    self._receive(worker, first.position, n, outcome)

            self._send_message(worker, arrive)

    def _packed(self, ended: list[_Ended]) -> Iterator[list[_Ended]]:
        """Neighbours of one map that succeeded may share one outcome."""
        run: list[_Ended] = []
        pack = self.rng.random() < self.nature.packs
        for each in ended:
            if run:
                last = run[-1]
                fits = (
                    pack
                    and last.status == each.status == DONE
                    and each.item.task is last.item.task
                    and not each.item.deliver
                )
                if not fits:
                    yield run
                    run = []
            run.append(each)
        if run:
            yield run

    def _stopped(self, worker: Worker) -> None:
        if worker.gone:
            return
        # What it had not reported by now it has not begun.
        self._return_from(worker, 0)
        worker.taking_back = False
        if worker.kill_at is None and not worker.retired:
            worker.tasks.clear()

    def _die(self, worker: Worker, *, own_fault: bool) -> None:
        if not worker.alive:
            return
        worker.alive = False
        if worker.running is not None:
            _, run, body = worker.running
            run.ended, run.stop = "died", self.clock.monotonic()
            body.close()
            worker.running = None
        self.note("worker {} dies", worker.number)
        # What it sent arrives before the news of its death; what it held is lost with it.
        self._send_message(worker, lambda: self._bury(worker, own_fault=own_fault))

    # --- events -------------------------------------------------------------------------------------------------------

    def note(self, text: str, *values: Any) -> None:
        """Add to the trace; put together only if somebody reads it."""
        self.trace.append((self.clock.monotonic(), text, values))

    def _latency(self) -> float:
        return self.rng.random() * self.nature.latency_s

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.monotonic() + delay_s, next(self._order), action))

    def _send_message(self, worker: Worker, action: Callable[[], None]) -> None:
        # Messages of one worker never overtake each other.
        worker.sent_at = max(worker.sent_at, self.clock.monotonic() + self._latency())
        heapq.heappush(self._events, (worker.sent_at, next(self._order), action))


def _killed(cleanup_s: float) -> Body:
    yield Sleep(cleanup_s)
    raise KilledException


def _outcome(run: list[_Ended]) -> bytes:
    first, n = run[0], len(run)
    runtime_s = sum(each.run.stop - each.run.began for each in run)
    if n > 1:
        sections = [(PACKED, pickle.dumps([each.value for each in run]))]
    elif first.status == DONE:
        sections = [(VALUE, pickle.dumps(first.value))]
    elif first.status == ERROR:
        sections = [(ERROR_TEXT, first.text.encode()), (ERROR_CHAIN, b"")]
    else:
        sections = [(ERROR_TEXT, b"Killed")]
    return pack_outcome(first.status, sections, pid=1, started=EPOCH, runtime_s=runtime_s)


class ByHand(Executor):
    """An executor that a test works by hand: it claims when told to, and reports what the test says.

    Attributes:
        held_items: What was claimed and not ended.
        began: Of those, what runs.
        killed: What was to be killed, in order.
        n_wakes: How often it was told that there is work.
    """

    def __init__(self, n_slots: int = 1) -> None:
        self._n_slots = n_slots
        self.source: Any = None
        self.held_items: list[tuple[Batch, int]] = []
        self.began: list[tuple[Batch, int]] = []
        self.killed: list[tuple[Batch, int]] = []
        self.n_wakes = 0
        self.closed = False

    def bind(self, source: Any) -> None:
        self.source = source

    def claim(self, free_slots: int | None = None, room_s: float = AHEAD_S, *, idle: bool = True) -> list[Task]:
        """Claim for one worker, and hold what comes."""
        tasks: list[Task] = self.source.claim(self._n_slots if free_slots is None else free_slots, room_s, idle=idle)
        self.held_items += [(task.batch, index) for task in tasks for index in range(task.start, task.stop)]
        return tasks

    def begin(self, batch: Batch, index: int) -> None:
        self.began.append((batch, index))

    def finish(self, batch: Batch, start: int, outcome: bytes, n: int = 1) -> None:
        """Report an outcome."""
        self._drop(batch, range(start, start + n))
        self.source.finish(batch, start, n, outcome)

    def lose(self, batch: Batch, index: int, *, own_fault: bool = False) -> None:
        """Report a death."""
        self._drop(batch, (index,))
        self.source.lose(batch, index, "the worker died", -9, own_fault=own_fault, output=(b"out", b""), pid=7)

    def return_all(self) -> None:
        """Give back what has not begun."""
        for batch, index in reversed([each for each in self.held_items if each not in self.began]):
            self.held_items.remove((batch, index))
            self.source.give_back(batch, index, index + 1)

    def _drop(self, batch: Batch, indexes: Iterable[int]) -> None:
        gone = {(id(batch), index) for index in indexes}
        for items in (self.held_items, self.began):
            items[:] = [each for each in items if (id(each[0]), each[1]) not in gone]

    @property
    def n_slots(self) -> int:
        return self._n_slots

    @property
    def busy(self) -> bool:
        return bool(self.held_items)

    def wake(self) -> None:
        self.n_wakes += 1

    def poll(self, timeout_s: float | None, *, may_jump: bool, patient: bool = False) -> None:
        clock = self.source.clock
        if timeout_s is None:
            raise Hang("somebody waits without limit, and nothing can ever happen again")
        clock.jump_to(clock.monotonic() + timeout_s)

    def interrupt(self) -> None:
        pass

    def running(self) -> list[tuple[Batch, int, int]]:
        return [(batch, index, index + 1) for batch, index in self.began]

    def held(self) -> list[tuple[Batch, int]]:
        return list(self.held_items)

    def kill(self, batch: Batch, index: int) -> bool:
        self.killed.append((batch, index))
        return True

    def take_back(self) -> None:
        self.return_all()

    def live(self, batch: Batch, index: int) -> dict[str, Any]:
        return {"pid": 7, "started": EPOCH, "stdout": b"so far", "stderr": b""}

    def suspend(self, caller: Any) -> None:
        pass

    def resume(self, caller: Any) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def abandon(self) -> None:
        self.closed = True
