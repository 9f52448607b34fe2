"""Random programs on random schedules keep the engine's promises: its oracle is what the simulated workers did.

``ENGINE_SEEDS=100000`` runs more of them; ``ENGINE_SEED=123`` runs one again and prints what happened.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from cloud.backends.local import LocalBackend
from cloud.backends.requests import Requests
from cloud.engine import engine as engine_module
from cloud.engine import intake
from cloud.engine.engine import Engine
from cloud.engine.executor.base import Task
from cloud.engine.overview import describe
from cloud.engine.store.base import Batch, Store
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.errors import JobNotFound
from cloud.jobs import (
    DEFAULT_OPTIONS,
    DONE,
    ERROR,
    KILLED,
    PACKED,
    PROCESSING,
    QUEUED,
    STALLED,
    STATUS_LABELS,
    TRANSITIONS,
    VALUE,
    JobOptions,
    Outcome,
)
from cloud.serialization.functions import Function
from cloud.wire import pack_jids
from tests.unit.fake_executor import (
    Ask,
    Body,
    Die,
    Failure,
    FakeExecutor,
    Nature,
    Sleep,
    Stall,
    frozen_virtual_clock,
)

N_SEEDS = int(os.environ.get("ENGINE_SEEDS", "600"))
ONE_SEED = os.environ.get("ENGINE_SEED")
N_BLOCKS = 12
LEGAL = frozenset((old, new) for old, news in TRANSITIONS.items() for new in news)
CONTEXT = (1, b"")
DURATIONS_S = {"tiny": (0.00002, 0.0002), "small": (0.0005, 0.003), "long": (0.05, 4.0)}


class Broken(AssertionError):
    """A promise was not kept."""


def check(holds: Any, text: str, *values: Any) -> None:
    if not holds:
        raise Broken(text.format(*values))


class RecordedStates(bytearray):
    """States that tell of each change of one of them."""

    batch: RecordedBatch

    def __setitem__(self, at: Any, new: Any) -> None:
        if isinstance(at, slice):
            for index, code in zip(range(*at.indices(len(self))), new, strict=True):
                self.batch.ledger.changed(self.batch, index, self[index], code)
        else:
            self.batch.ledger.changed(self.batch, at, self[at], new)
        super().__setitem__(at, new)


class RecordedBatch(Batch):
    """A batch that tells its ledger of every transition and every outcome."""

    ledger: Ledger  # of the scenario that runs

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.covered: bytearray = bytearray()
        # One with a jid comes out of the intake, which must not be emptied meanwhile.
        engine = self.ledger.engine
        self.dependencies = self.ledger.dependencies_of(self.options, engine._store if self.jid0 else engine.store)
        self.submitted_to = self.ledger
        self.ledger.batches.append(self)
        self.ledger.unfinished.append(self)

    @property
    def states(self) -> RecordedStates:  # type: ignore[override]
        return self._states

    @states.setter
    def states(self, new: bytearray) -> None:
        if new is getattr(self, "_states", None):
            return
        recorded = RecordedStates(new)
        recorded.batch = self
        for index, code in enumerate(getattr(self, "_states", b"")):
            if code != new[index]:
                self.ledger.changed(self, index, code, new[index])
        self._states = recorded

    def add_segment(self, start: int, n: int, outcome: bytes) -> None:
        self.covered.extend(bytes(self.n - len(self.covered)))
        check(not any(self.covered[start : start + n]), "an outcome was recorded twice: {} {} {}", self, start, n)
        self.covered[start : start + n] = b"\x01" * n
        super().add_segment(start, n, outcome)

    def add_segments(self, start: int, outcomes: list[bytes]) -> None:
        for index, outcome in enumerate(outcomes, start):
            self.add_segment(index, 1, outcome)

    def __repr__(self) -> str:
        return f"<batch of {self.n} from jid {self.jid0}>"


class Ledger:
    """What was submitted, and what became of it."""

    engine: Engine

    def __init__(self) -> None:
        self.batches: list[RecordedBatch] = []
        self.unfinished: list[RecordedBatch] = []
        self.executor: FakeExecutor
        self.kill_asked: set[tuple[int, int]] = set()
        self.moves: set[tuple[int, int]] = set()

    def dependencies_of(self, options: JobOptions, store: Store) -> list[tuple[Batch, int]]:
        try:
            runs = store.runs(options.depends_on) if options.depends_on else []
        except JobNotFound:
            return []
        return [(batch, index) for batch, start, stop in runs for index in range(start, stop)]

    def changed(self, batch: Batch, index: int, old: int, new: int) -> None:
        key = id(batch), index
        if not batch.jid0 and not batch.is_map:
            return  # it is being made: nobody knows it
        if old == QUEUED and key in self.executor.begun:
            old = PROCESSING
            self.executor.begun.discard(key)
        self.moves.add((old, new))
        self.executor.note("{} goes from {} to {}", (batch, index), old, new)
        check((old, new) in LEGAL, "{} {} goes from {!r} to {!r}", batch, index, STATUS_LABELS[old], STATUS_LABELS[new])


class Scenario:
    """One random program on one random schedule."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Random(seed)
        self.clock = frozen_virtual_clock()
        self.ledger = RecordedBatch.ledger = Ledger()
        self.n_slots = rng.randint(1, 4)
        rough = rng.random() < 0.6
        self.p_raise = rng.choice((0.0, 0.1, 0.3))
        self.p_die = rng.choice((0.02, 0.1)) if rough else 0.0
        self.p_stall = rng.choice((0.0, 0.02, 0.05)) if rough else 0.0
        self.p_nested = rng.choice((0.0, 0.0, 0.1, 0.3))
        self.n_actions = rng.choice((6, 15, 30, 60))
        self.max_jobs = 200
        self.max_nesting = rng.choice((1, 2, 5))
        nature = Nature(
            latency_s=rng.choice((0.00005, 0.0005, 0.01)),
            start_dies=rng.choice((0.0, 0.2)) if rough else 0.0,
            idle_dies=rng.choice((0.0, 0.2)) if rough else 0.0,
            hold_s=rng.choice((0.003, 0.02)),
            slack_s=rng.choice((0.0, 0.0005, 0.02)),
        )
        self.executor = FakeExecutor(self.n_slots, self.clock, rng, self.body, nature)
        self.executor.on_begin = self.on_begin
        self.ledger.executor = self.executor
        self.max_kept = rng.choice((0, 0, 0, 0, 3))
        self.engine = Engine(
            MemoryStore(JidSource()), self.executor, self.clock, max_nesting=self.max_nesting, max_kept=self.max_kept
        )
        self.ledger.engine = self.engine
        # One thread is enough here, and two would not be repeatable.
        self.engine.waiting.need_helper = lambda: None  # type: ignore[method-assign]
        self.wrap_source()
        self.backend = LocalBackend("fake", self.engine, "fake")
        self.engine.serve_requests(Requests(self.backend))
        self.functions = {name: Function(b"", f"module.{name}", reusable=True) for name in DURATIONS_S}
        self.jids: list[int] = []
        self.maps: list[range] = []
        self.open: list[Batch] = []
        self.gone: set[int] = set()
        self.promises: list[Promise] = []

    # --- what the executor sees ---------------------------------------------------------------------------------------

    def wrap_source(self) -> None:
        engine, executor = self.engine, self.executor
        claim, give_back = engine.claim, engine.give_back

        def checked_claim(free_slots: int, room_s: float, *, idle: bool) -> list[Task]:
            tasks = claim(free_slots, room_s, idle=idle)
            self.check_claim(tasks, free_slots, idle=idle)
            return tasks

        def checked_give_back(batch: Batch, start: int, stop: int) -> None:
            for index in range(start, stop):
                key = id(batch), index
                if key in executor.begun:
                    executor.begun.discard(key)
                    self.ledger.moves.add((PROCESSING, QUEUED))
                runs = executor.runs.get(key)
                unbegun = not runs or runs[-1].attempt < batch.attempt(index)
                check(unbegun, "{} was begun, and given back", (batch, index))
            give_back(batch, start, stop)

        engine.claim = checked_claim  # type: ignore[method-assign]
        engine.give_back = checked_give_back  # type: ignore[method-assign]

    def check_claim(self, tasks: list[Task], free_slots: int, *, idle: bool) -> None:
        check(free_slots > 0 or not tasks, "work was given out without a free slot")
        claimed = {(id(task.batch), index) for task in tasks for index in range(task.start, task.stop)}
        check(len(claimed) == sum(task.stop - task.start for task in tasks), "an item was claimed twice at once")
        held = {(id(batch), index) for batch, index in self.executor.held()}
        check(not claimed & held, "an item was claimed that a worker has")
        for task in tasks:
            check(task.batch.options.cores <= free_slots, "{} takes more slots than are free", task.batch)
            check(len(tasks) == 1 or not task.batch.options.alone, "{} shares a message", task.batch)
            check(set(task.batch.states[task.start : task.stop]) == {QUEUED}, "{} is not queued", task.batch)
        unfinished = self.ledger.unfinished = [batch for batch in self.ledger.unfinished if not batch.finished]
        left = [
            batch
            for batch in unfinished
            if (batch.jid0 or batch.is_map)
            and batch.states.count(QUEUED)
            and any(
                code == QUEUED and (id(batch), index) not in claimed and (id(batch), index) not in held
                for index, code in enumerate(batch.states)
            )
            and batch.n_waiting_on == 0
        ]
        first = min((batch.options.priority for batch in left), default=None)
        if tasks and first is not None:
            last = max(task.batch.options.priority for task in tasks)
            check(last <= first, "priority {} was claimed before {}", last, first)
        if idle and not tasks and first is not None and not self.engine._cancelling:
            blocked = any(batch.options.priority == first and batch.options.cores > free_slots for batch in left)
            check(blocked, "a worker with nothing to do got none of {}", left)

    def on_begin(self, batch: Batch, index: int) -> None:
        self.ledger.moves.add((QUEUED, PROCESSING))
        assert isinstance(batch, RecordedBatch)
        for other, at in batch.dependencies:
            check(other.states[at] >= DONE, "{} began before {} had ended", (batch, index), (other, at))
            if not batch.options.ignore_dependency_errors:
                check(other.states[at] == DONE, "{} began although {} failed", (batch, index), (other, at))
        check(batch.states[index] == QUEUED, "{} began in state {}", (batch, index), batch.states[index])
        runs = self.executor.runs.get((id(batch), index), ())
        check(all(run.attempt < batch.attempt(index) for run in runs), "{} began twice", (batch, index))
        if not batch.options.restartable:
            check(
                all(run.ended == "raised" and run.n_reported for run in runs),
                "{} is not restartable, and began again after {}",
                (batch, index),
                runs,
            )

    # --- what jobs do -------------------------------------------------------------------------------------------------

    def body(self, batch: Batch, index: int, attempt: int) -> Body:
        rng = self.rng
        low, high = DURATIONS_S[batch.function.name.removeprefix("module.")]
        duration_s = rng.uniform(low, high)
        yield Sleep(duration_s * rng.random())
        if rng.random() < self.p_die:
            yield Die(own_fault=rng.random() < 0.3)
        if rng.random() < self.p_stall:
            yield Stall(rng.choice((0.01, 1.0, 10.0)))
        if rng.random() < self.p_nested:
            yield from self.nested(batch.depth + 1)
        yield Sleep(duration_s * rng.random())
        if rng.random() < self.p_raise:
            raise Failure("no")

    def nested(self, depth: int) -> Body:
        rng = self.rng
        jids: list[int] = []
        for _ in range(rng.randint(1, 2)):
            if self.n_jobs() > self.max_jobs:
                break
            options = self.options(nested=True)
            content = {"function": "module.small", "reusable": True, "options": options.as_dict()}
            if rng.random() < 0.7:
                answer, _ = yield Ask({"op": "submit", **content}, (b"small", b"", b"arguments"))
                if "error" in answer:
                    check(depth > self.max_nesting or answer["error"] != "UnsupportedOperation", "{}", answer)
                    raise Failure(answer["error"])
                check(depth <= self.max_nesting, "a job was submitted {} levels deep", depth)
                jids.append(answer["jid"])
            else:
                chunks = [[1, rng.randint(1, 4)] for _ in range(rng.randint(0, 2))]
                sealed = rng.random() < 0.3
                ask = {"op": "open_map", "chunks": chunks, "sealed": sealed, **content}
                answer, _ = yield Ask(ask, (b"small", b"", *[b""] * len(chunks)))
                if "error" in answer:
                    raise Failure(answer["error"])
                number = answer["map"]
                for _ in range(0 if sealed else rng.randint(0, 3)):
                    yield Ask(
                        {"op": "extend", "map": number, "chunks": [[1, rng.randint(1, 4)]], "sealed": False}, (b"",)
                    )
                    yield Sleep(0.001 * rng.random())
                if not sealed and rng.random() < 0.9:
                    answer, _ = yield Ask({"op": "extend", "map": number, "chunks": [], "sealed": True})
                elif not sealed:
                    answer, _ = yield Ask({"op": "abandon", "map": number})
                jids += range(answer.get("start", 0), answer.get("stop", 0))
        if jids and rng.random() < 0.2:
            yield Ask({"op": "cancel", "jids": pack_jids(rng.sample(jids, 1))})
        if jids and rng.random() < 0.8:
            timeout_s = rng.choice((None, None, 0, 0.01, 1.0))
            on_error = rng.random() < 0.3
            wait = {"op": "wait", "jids": pack_jids(jids), "timeout_s": timeout_s, "background": False}
            answer, _ = yield Ask({**wait, "stop_on_error": on_error})
            if timeout_s is None and not on_error and "error" not in answer:
                check(not answer["unfinished"], "a wait inside a job left {}", answer)
        if jids and rng.random() < 0.2:
            yield from self.finals(jids)
        self.jids += [jid for jid in jids if jid not in self.gone]

    def finals(self, jids: list[int]) -> Body:
        told: list[int] = []
        left = set(jids)
        while left:
            timeout_s = self.rng.choice((None, 0.1))
            ask = {
                "op": "finals",
                "jids": pack_jids(sorted(left)),
                "timeout_s": timeout_s,
                "poll": "",
                "background": False,
            }
            answer, _ = yield Ask(ask)
            check(answer["found"] or answer["gone"] or timeout_s is not None, "finals inside a job told nothing")
            for first, n, status in answer["found"]:
                check(status >= DONE, "finals told of a job in state {}", status)
                told += range(first, first + n)
                left.difference_update(range(first, first + n))
            for start, stop in answer["gone"]:
                told += range(start, stop)
                left.difference_update(range(start, stop))
        check(sorted(told) == sorted(jids), "finals told {} of {}", told, jids)

    # --- the program --------------------------------------------------------------------------------------------------

    def n_jobs(self) -> int:
        return sum(batch.n for batch in self.ledger.batches)

    def options(self, *, nested: bool = False) -> JobOptions:
        rng = self.rng
        if rng.random() < 0.4:
            return DEFAULT_OPTIONS
        options = JobOptions()
        options.priority = rng.choice((5, 5, 5, 0, 9, -3))
        options.restartable = rng.random() < 0.7
        options.retries = rng.choice((0, 0, 0, 1, 3))
        options.retry_delay_s = rng.choice((0.0, 0.01, 1.0))
        options.kill_process = rng.random() < 0.05
        if rng.random() < 0.1:
            options.cores = rng.randint(1, self.n_slots)
        if rng.random() < 0.1:
            options.max_runtime_s = rng.choice((0.001, 0.5, 60.0))
        if not nested and rng.random() < 0.6:
            options.depends_on = self.some_jids()
            options.ignore_dependency_errors = rng.random() < 0.3
        return options

    def some_jids(self) -> Any:
        """A few known jids as users give them: a map's range or part of it, or a list with duplicates."""
        rng = self.rng
        known = [jid for jid in self.jids if jid not in self.gone]
        if not known:
            return ()
        if self.maps and rng.random() < 0.4:
            jids = rng.choice(self.maps)
            if not self.gone.intersection(jids):
                if rng.random() < 0.5:
                    start = rng.randrange(len(jids))
                    return jids[start : rng.randint(start + 1, len(jids))]
                return jids
        return [rng.choice(known) for _ in range(rng.randint(1, 4))]

    def act(self) -> None:
        kinds = {
            self.call: 9,
            self.map: 3,
            self.open_map: 2,
            self.extend: 4,
            self.seal: 2,
            self.wait: 3,
            self.kill: 2,
            self.kill_all: 0.15,
            self.delete: 1,
            self.watch: 3,
            self.look: 1,
            self.pass_time: 4,
        }
        action = self.rng.choices(list(kinds), list(kinds.values()))[0]
        try:
            action()
        except JobNotFound as exc:
            check(self.max_kept or exc.jid in self.gone, "{} is unknown", exc.jid)

    def function(self) -> Function:
        return self.functions[self.rng.choice(("tiny", "tiny", "small", "long"))]

    def call(self) -> None:
        function, options = self.function(), self.options()
        for _ in range(self.rng.choice((1, 1, 1, 6))):
            self.jids.append(self.engine.submit(function, CONTEXT, b"arguments", options))

    def map(self) -> None:
        batch = self.engine.open_map(self.function(), CONTEXT, self.options())
        for _ in range(self.rng.randint(0, 3)):
            self.engine.extend(batch, 1, self.chunk_size(), b"")
        self.sealed(batch)

    def open_map(self) -> None:
        self.open.append(self.engine.open_map(self.function(), CONTEXT, self.options()))

    def extend(self) -> None:
        if self.open:
            self.engine.extend(self.rng.choice(self.open), 1, self.chunk_size(), b"")

    def chunk_size(self) -> int:
        return self.rng.choice((1, 2, 3, 5, 8, 30))

    def seal(self) -> None:
        if self.open:
            batch = self.open.pop(self.rng.randrange(len(self.open)))
            if self.rng.random() < 0.2:
                self.engine.abandon(batch)
                self.ledger.kill_asked.update((id(batch), index) for index in range(batch.n))
            else:
                self.sealed(batch)

    def sealed(self, batch: Batch) -> None:
        jids = self.engine.seal(batch)
        check(len(jids) == batch.n, "{} for a map of {}", jids, batch.n)
        if jids:
            self.jids += jids
            self.maps.append(jids)

    def codes(self, jids: Any) -> list[int]:
        return [
            batch.states[index] for batch, start, stop in self.engine.store.runs(jids) for index in range(start, stop)
        ]

    def wait(self) -> None:
        jids = self.some_jids()
        if not jids:
            return
        timeout_s = self.rng.choice((None, 0, 0.005, 0.5, 5.0))
        on_error = self.rng.random() < 0.4
        runs = self.engine.store.runs(jids)
        began = self.clock.monotonic()
        left = self.engine.wait(jids, timeout_s, stop_on_error=on_error)
        codes = {batch.jid0 + i: batch.states[i] for batch, start, stop in runs for i in range(start, stop)}
        late_s = self.clock.monotonic() - began - (timeout_s or 0.0)
        check(timeout_s is None or late_s < 1e-6, "a wait of {} s ended {} s late", timeout_s, late_s)
        if left is None:
            check(on_error and max(codes.values()) > DONE, "a wait was ended by an error, but there was none")
        else:
            unfinished = {jid for jid in jids if codes[jid] < DONE}
            check(set(left) == unfinished, "a wait told {} of {}", left, codes)
            check(not unfinished or timeout_s is not None, "a wait without limit left {}", left)
            check(not on_error or max(codes.values()) <= DONE, "a wait missed a failure among {}", codes)
        self.look_at(jids)

    def kill(self) -> None:
        jids = self.some_jids()
        if jids:
            self.kill_jids(jids)

    def kill_all(self) -> None:
        self.kill_jids(None)

    def kill_jids(self, jids: Any) -> None:
        if jids is None:
            runs = [(batch, 0, batch.n) for batch in self.engine.store.batches()]
        else:
            runs = self.engine.store.runs(jids)
        items = [(b, i) for b, start, stop in runs for i in range(start, stop) if b.states[i] < DONE]
        self.ledger.kill_asked.update((id(batch), index) for batch, index in items)
        began = self.clock.monotonic()
        pending = self.engine.cancel(jids)
        held = {(id(batch), index) for batch, index in self.executor.held()}
        for batch, index in items:
            check(
                # Stalled: a job that it depends on was killed with it, and first.
                batch.states[index] in (KILLED, STALLED) or (id(batch), index) in held,
                "{} was killed and is neither dead nor running",
                (batch, index),
            )
        if self.max_kept:
            self.engine.wait_until(lambda: all(batch.states[index] >= DONE for batch, index in items), None)
        else:
            self.engine.wait(pending, None)
        took_s = self.clock.monotonic() - began
        nature = self.executor.nature
        most_s = nature.grace_s + 3 * nature.latency_s + nature.slack_s + 0.01
        check(took_s <= most_s, "a kill took {} s", took_s)
        for batch, index in items:
            runs_of = self.executor.runs.get((id(batch), index), [])
            shared = runs_of and runs_of[-1].n_reported > 1
            code = batch.states[index]
            ended = code == KILLED or (code == STALLED and not runs_of) or (code == DONE and shared)
            check(ended, "{} was killed and is {}", (batch, index), code)
        running = {(id(item.batch), item.index) for item in self.executor.really_running()}
        check(not running.intersection((id(batch), index) for batch, index in items), "what was killed still runs")

    def delete(self) -> None:
        jids = list(self.some_jids())
        jids = [jid for jid, code in zip(jids, self.codes(jids), strict=True) if code >= DONE]
        self.engine.delete(jids)
        self.gone.update(jids)
        for jid in jids:
            with pytest.raises(JobNotFound):
                self.engine.store.locate(jid)

    def watch(self) -> None:
        jids = self.some_jids()
        if jids:
            self.promises.append(Promise(self, jids, called_off=self.rng.random() < 0.1))

    def look(self) -> None:
        jids = self.some_jids()
        if jids:
            self.look_at(jids)

    def look_at(self, jids: Any) -> None:
        codes = self.engine.statuses(jids)
        runs = self.executor.running()
        running = {(id(batch), index) for batch, start, stop in runs for index in range(start, stop)}
        expected = [
            PROCESSING if code == QUEUED and (id(batch), start + at) in running else code
            for batch, start, stop in self.engine.store.runs(jids)
            for at, code in enumerate(batch.states[start:stop])
        ]
        check(list(codes) == expected, "statuses are {}, not {}", list(codes), expected)
        describe(self.engine, jids[0])

    def pass_time(self) -> None:
        self.engine.wait_until(lambda: False, self.rng.choice((0.001, 0.01, 0.1, 2.0)))

    def run(self) -> None:
        for _ in range(self.n_actions):
            if self.n_jobs() > self.max_jobs:
                break
            self.act()
        while self.open:
            self.seal()
        self.engine.wait_until(lambda: all(batch.finished for batch in self.submitted()), None)
        # The timers of kills, limits and back-offs still run, and workers that were given up answer.
        while self.executor.has_events or self.engine.waiting.next_timer() is not None:
            self.engine.wait_until(lambda: False, 100.0)
        self.check_all()

    def submitted(self) -> Iterator[RecordedBatch]:
        return (batch for batch in self.ledger.batches if batch.jid0)

    # --- the promises -------------------------------------------------------------------------------------------------

    def check_all(self) -> None:
        for batch in self.submitted():
            for index in range(batch.n):
                self.check_job(batch, index)
            check(batch.n_final == batch.n, "{} counts {} final jobs", batch, batch.n_final)
            check(batch.watches is None, "{} is finished and still watched", batch)
            self.check_outcomes(batch)
        for promise in self.promises:
            promise.check()
        engine, waiting = self.engine, self.engine.waiting
        self.executor.wake()
        check(not engine.has_queued, "something is queued: {}", engine._queue)
        check(engine._unfinished == 0, "{} jobs are counted as unfinished", engine._unfinished)
        check(not engine._killing, "kills are remembered: {}", engine._killing)
        check(not engine._failures and not engine._n_watching_failures, "failures are remembered")
        check(waiting.next_timer() is None, "a timer is left")
        check(not waiting._followers and not waiting._lead_lock.locked(), "somebody waits")
        check(not self.executor.held() and not self.executor.busy, "a worker has work")
        check(self.executor.n_used == 0, "{} slots are in use", self.executor.n_used)
        n_kept = sum(batch.finished for batch in self.engine.store.batches())
        check(not self.max_kept or n_kept <= self.max_kept, "{} finished batches are kept", n_kept)

    def check_job(self, batch: RecordedBatch, index: int) -> None:
        name = batch, index
        status = batch.states[index]
        options = batch.options
        runs = self.executor.runs.get((id(batch), index), [])
        asked = (id(batch), index) in self.ledger.kill_asked
        check(status >= DONE, "{} is {}", name, status)
        failed = any(other.states[at] != DONE for other, at in batch.dependencies)
        if status == STALLED:
            check(failed and not options.ignore_dependency_errors, "{} stalled without a reason", name)
            check(not runs, "{} stalled and ran", name)
        elif failed and not options.ignore_dependency_errors:
            check(status == KILLED, "{} did not stall", name)
        elif status == DONE:
            check(runs and runs[-1].ended == "value", "{} is done; its runs are {}", name, runs)
        elif status == ERROR:
            self.check_error(batch, index)
        if status == KILLED and not asked and not self.kills_inside():
            check(options.max_runtime_s is not None, "{} was killed by nobody", name)
        if status == KILLED and not asked and options.max_runtime_s is not None and not self.kills_inside():
            ran_s = runs[-1].stop - runs[-1].began if runs else 0.0
            check(ran_s > options.max_runtime_s - 0.1, "{} was killed after {} s", name, ran_s)
        if options.restartable and status == DONE:
            check(len(runs) >= 1, "{} never ran", name)
        n_raised = sum(run.ended == "raised" and run.n_reported > 0 for run in runs)
        check(n_raised <= options.retries + 1, "{} raised {} times", name, n_raised)
        check(len(runs) <= options.retries + 3, "{} ran {} times", name, len(runs))

    def kills_inside(self) -> bool:
        return self.p_nested > 0

    def check_error(self, batch: RecordedBatch, index: int) -> None:
        name = batch, index
        options = batch.options
        runs = self.executor.runs.get((id(batch), index), [])
        if not options.restartable and not (runs and runs[-1].ended == "raised" and runs[-1].n_reported):
            return  # its worker was lost, or given up
        check(batch.attempt(index) > options.retries, "{} had {} attempts", name, batch.attempt(index))

    def check_outcomes(self, batch: RecordedBatch) -> None:
        """Every job has the outcome of its own last run."""
        check(sum(batch.covered) == batch.n, "outcomes are missing: {}", batch)
        at = 0
        for start, n, raw in batch.segments:
            check(start == at, "segments overlap or leave a gap: {}", batch)
            at = start + n
            if not raw:
                forgotten = all(batch.jid0 + index in self.gone for index in range(start, at))
                check(forgotten or self.max_kept, "an outcome that may be asked for is gone: {}", (batch, start))
                continue
            outcome = Outcome(raw)
            for index in range(start, at):
                check(outcome.status == batch.states[index], "outcome and state differ: {}", (batch, index))
                if outcome.status == DONE:
                    packed, single = outcome.section(PACKED), outcome.section(VALUE)
                    value = pickle.loads(packed)[index - start] if packed else pickle.loads(single or b"")
                    run = self.executor.runs[id(batch), index][-1]
                    check(value == run.number, "{} has the value of another run", (batch, index))
        check(at == batch.n, "segments end at {}: {}", at, batch)


class Promise:
    """Ways to be told that jobs are final, all of which must tell exactly once."""

    def __init__(self, scenario: Scenario, jids: Any, *, called_off: bool) -> None:
        self.scenario = scenario
        self.items = [
            (batch, index) for batch, start, stop in scenario.engine.store.runs(jids) for index in range(start, stop)
        ]
        self.jids = list(jids)
        self.statuses = {jid: batch.states for jid, (batch, _) in zip(self.jids, self.items, strict=True)}
        self.n_told = 0
        self.n_told_on_error = 0
        self.each: list[tuple[int, int, int]] = []
        self.called_off = called_off
        backend = scenario.backend
        call_off = backend.when_final(jids, self.all_final)
        if called_off and not self.n_told:
            call_off()
        backend.when_final(jids, self.final_or_failed, stop_on_error=True)
        backend.on_each_final(jids, lambda *run: self.each.append(run))
        self.finals = backend.finals(jids)
        self.n_unfinished_then = sum(batch.states[index] < DONE for batch, index in self.items)

    def all_final(self) -> None:
        self.n_told += 1
        check(all(batch.states[index] >= DONE for batch, index in self.items), "told before all were final")

    def final_or_failed(self) -> None:
        self.n_told_on_error += 1
        codes = [batch.states[index] for batch, index in self.items]
        check(min(codes) >= DONE or max(codes) > DONE, "told before one had failed: {}", codes)

    def check(self) -> None:
        silent = self.called_off and self.n_unfinished_then
        check(self.n_told == (0 if silent else 1), "a wait for {} was told {} times", self.jids, self.n_told)
        check(self.n_told_on_error == 1, "a wait for {} or an error was told {}", self.jids, self.n_told_on_error)
        expected = sorted((batch.jid0 + index, batch.states[index]) for batch, index in self.items)
        for found in (self.each, self.streamed()):
            told = sorted((jid, status) for first, n, status in found for jid in range(first, first + n))
            check(told == expected, "told {} instead of {}", told, expected)

    def streamed(self) -> list[tuple[int, int, int]]:
        found = []
        while (run := self.finals.next(0)) is not None:
            found.append(run)
        return found


def run_seed(seed: int) -> None:
    scenario = Scenario(seed)
    try:
        scenario.run()
    except BaseException as exc:
        exc.add_note(f"again: ENGINE_SEED={seed} pytest {__file__}")
        exc.add_note(trace_of(scenario))
        raise


def trace_of(scenario: Scenario) -> str:
    names = {id(batch): number for number, batch in enumerate(scenario.ledger.batches)}

    def text(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Batch):
            return f"batch {names[id(value[0])]} item {value[1]}"
        return value

    lines = [f"{scenario.n_slots} slots"]
    for number, batch in enumerate(scenario.ledger.batches):
        what = f"jid {batch.jid0}, {batch.n} items, {batch.function.name}, {batch.options.as_dict()}"
        lines.append(f"batch {number}: {what}")
    began = scenario.executor.trace[0][0] if scenario.executor.trace else 0.0
    for when, form, values in scenario.executor.trace:
        lines.append(f"{when - began:10.5f}  {form.format(*map(text, values))}")
    return "\n".join(lines[-400:])


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "Batch", RecordedBatch)
    monkeypatch.setattr(intake, "Batch", RecordedBatch)


@pytest.mark.parametrize("block", range(N_BLOCKS))
def test_promises_hold(block: int) -> None:
    if ONE_SEED is not None:
        if block == 0:
            run_seed(int(ONE_SEED))
        return
    for seed in range(block, N_SEEDS, N_BLOCKS):
        run_seed(seed)


def test_schedules_are_rough() -> None:
    """What the promises are about does happen: a run in which nothing goes wrong would prove nothing."""
    seen: Counter[str] = Counter()
    moves: set[tuple[int, int]] = set()
    for seed in range(120):
        scenario = Scenario(seed)
        scenario.run()
        moves |= scenario.ledger.moves
        seen.update(form for _, form, _ in scenario.executor.trace)
        seen.update(STATUS_LABELS[code] for batch in scenario.submitted() for code in batch.states)
        for runs in scenario.executor.runs.values():
            seen["again"] += len(runs) > 1
            seen.update(run.ended for run in runs)
            seen["packed"] += any(run.n_reported > 1 for run in runs)
    wanted = {"done", "error", "killed", "stalled", "again", "packed", "value", "raised", "died"}
    wanted |= {
        "late answer about {}",
        "kill {} at worker {}",
        "worker {} gives back from position {}",
        "worker {} is given up",
        "worker {} is buried",
        "worker {} waits",
    }
    assert not {what for what in wanted if seen[what] < 5}
    assert moves == LEGAL
