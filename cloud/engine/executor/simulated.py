"""Runs attempts in this process, one at a time, on a virtual clock: a discrete-event simulation of worker slots.

Each job has a thread of its own, but only one of them runs: it has the turn until it sleeps, waits for other jobs or
ends. Then whoever polls picks the next, or lets the clock jump to the next event.

::

    poll ──turn──► job thread ──► time.sleep / cloud.result / its end ──turn──► poll
      └── nothing can run: jump to the next wake-up, deadline or timer (if somebody waits), else wait in real time
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from random import Random

from cloud.engine import channel as ch
from cloud.engine.clock import VirtualClock
from cloud.engine.executor import printing, swapped, virtual_time
from cloud.engine.executor.base import Executor
from cloud.engine.store.base import Batch
from cloud.engine.worker.received import Unshared
from cloud.engine.worker.run import Call, run_call
from cloud.errors import KilledException
from cloud.serialization import pickling
from cloud.serialization.kept import KeptFunctions
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import payload_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_REAL_PAUSE_S: Final = 0.05
_MAX_FUNCTIONS: Final = 256
_ENDS: Final = 100
_CLOSE_S: Final = 5.0


class Job:
    """An attempt that has begun.

    Attributes:
        batch, index, attempt: Which.
        wake_at: Moment at which it goes on; None while it waits for something else.
        ready: Says whether what it waits for is there; None unless it waits for jobs.
        killed: It is to raise KilledException when it has the turn.
        turn: Released when it has the turn.
    """

    def __init__(self, batch: Batch, index: int, started: float, limit_bytes: int) -> None:
        self.batch = batch
        self.index = index
        self.attempt = batch.attempt(index)
        self.started = started
        self.wake_at: float | None = None
        self.ready: Callable[[], bool] | None = None
        self.killed = False
        self.ended = False
        self.holds_slots = True
        self.turn = _closed_gate()
        self.output = (printing.Tail(limit_bytes), printing.Tail(limit_bytes))
        self.surroundings: swapped.Swapped | None = None

    def can_run(self, now: float) -> bool:
        """Whether it would do something with the turn."""
        if self.killed or (self.wake_at is not None and self.wake_at <= now):
            return True
        if self.ready is not None:
            return self.ready()
        return self.wake_at is None


class SimulatedExecutor(Executor):
    """Virtual worker slots.

    Args:
        n_slots: Jobs that are under way at the same virtual time.
        clock: The virtual clock.
        output_limit_bytes: How much of the end of each output stream is kept.
        max_transmit_bytes: Larger results are errors; 0 means no limit.
        capture: False leaves what jobs print where the program prints.
        random: Decides which attempts fail.
        fail: Probability that an attempt raises an injected error instead of running.
        lose_worker: Probability that an attempt's worker is lost when it ends.
    """

    simulated = True

    def __init__(
        self,
        n_slots: int,
        clock: VirtualClock,
        *,
        output_limit_bytes: int = 64_000,
        max_transmit_bytes: int = 0,
        capture: bool = True,
        random: Random | None = None,
        fail: float = 0.0,
        lose_worker: float = 0.0,
    ) -> None:
        self._n_slots = n_slots
        self._clock = clock
        self._limit_bytes = output_limit_bytes
        self._max_transmit_bytes = max_transmit_bytes
        self._random = random or Random()
        self._fail = fail
        self._lose = lose_worker
        self._jobs: deque[Job] = deque()
        self._used = 0
        self._source: Any = None
        self._turn = _closed_gate()
        self._free: list[_Runner] = []
        self._here = _Here()
        self._event = threading.Event()
        self._scheduling = threading.Lock()
        self._closed = False
        self._n_started = 0
        self._context: tuple[int, Any] = (0, None)
        self._chunk: tuple[int, Any] = (0, [])
        self.namespace = Namespace({"__name__": "__main__", "__builtins__": __builtins__}, key=f"sim{id(self)}")
        self._functions = KeptFunctions(self.namespace)
        self._events: list[tuple[float, Batch, int, int, str]] = []
        virtual_time.install()
        swapped.install()
        self._capture = printing.Capture() if capture else None

    def bind(self, source: Any) -> None:
        self._source = source
        self._lock = source.lock

    @property
    def n_slots(self) -> int:
        return self._n_slots

    @property
    def n_used(self) -> int:
        return self._used

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    # --- the scheduler ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        self._event.set()

    def interrupt(self) -> None:
        self._event.set()

    def poll(self, timeout_s: float | None, *, may_jump: bool, patient: bool = False) -> None:
        with self._scheduling:
            if not self._closed:
                self._schedule(timeout_s, may_jump=may_jump)

    def _schedule(self, timeout_s: float | None, *, may_jump: bool) -> None:
        until = None if timeout_s is None else self._clock.monotonic() + timeout_s
        self._event.clear()
        with self._lock:
            self._begin_jobs()
            job = self._next()
            moments = [each.wake_at for each in self._jobs if each.wake_at is not None]
        if job is not None:
            self._give_turn(job)
            return
        moment = min([*moments, *(() if until is None else (until,))], default=None)
        if may_jump and moment is not None:
            self._clock.jump_to(moment)
            return
        wait_s = _REAL_PAUSE_S if moment is None else min(moment - self._clock.monotonic(), _REAL_PAUSE_S)
        if wait_s > 0:
            self._event.wait(wait_s)

    def _begin_jobs(self) -> None:
        while self._used < self._n_slots and not self._closed:
            tasks = self._source.claim(self._n_slots - self._used, 0.0, idle=True)
            if not tasks:
                return
            first = tasks[0]
            for task in reversed(tasks[1:]):
                self._source.give_back(task.batch, task.start, task.stop)
            if first.stop - first.start > 1:
                self._source.give_back(first.batch, first.start + 1, first.stop)
            self._begin(first.batch, first.start)

    def _begin(self, batch: Batch, index: int) -> None:
        job = Job(batch, index, self._clock.now(), self._limit_bytes)
        self._jobs.append(job)
        self._used += batch.options.cores
        self._n_started += 1
        self._note(job, "begins")
        if batch.options.max_runtime_s is not None:
            self._source.call_later(batch.options.max_runtime_s, lambda: self._out_of_time(job))
        if self._free:
            self._free.pop().take(job)
        else:
            _Runner(job, self._body, self._turn.release, self._free, f"cloud-sim-{self._n_started}").start()

    def _next(self) -> Job | None:
        now = self._clock.monotonic()
        for _ in range(len(self._jobs)):
            job = self._jobs[0]
            # Round robin: what went on last comes last.
            self._jobs.rotate(-1)
            if job.can_run(now):
                return job
        return None

    def _give_turn(self, job: Job) -> None:
        job.wake_at = job.ready = None
        if self._capture is not None:
            self._capture.renew()
        with swapped.turn():
            if job.surroundings is not None:
                job.surroundings.enter()
            job.turn.release()
            self._turn.acquire()
            if job.surroundings is not None:
                job.surroundings.leave()

    # --- in the job's thread ------------------------------------------------------------------------------------------

    def _body(self, job: Job) -> None:
        self._here.job = job
        swapped.enter_job()
        virtual_time.enter_job(self._clock, lambda seconds: self._sleep(job, seconds))
        if self._capture is not None:
            printing.enter_job(job.output)
        fails = self._random.random() < self._fail
        loses = self._random.random() < self._lose
        options = job.batch.options
        call = Call(
            lambda: self._load(job, fails=fails),
            self.namespace,
            profile=options.profile,
            fast_pickle=options.fast_serialization == 2,
        )
        try:
            outcome = run_call(call, os.getpid(), lambda: self._output(job), self._max_transmit_bytes)
            if job.surroundings is not None:
                # Before anybody is told that it ended: whoever submits next takes the surroundings it finds.
                job.surroundings.leave()
            with self._lock:
                self._end(job, outcome, lost=loses)
        finally:
            self._here.job = None

    def _load(self, job: Job, *, fails: bool) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        if job.killed:
            raise KilledException("Job terminated by user")
        batch, options = job.batch, job.batch.options
        if self._context[0] != batch.context[0]:
            self._context = batch.context[0], pickling.loads(batch.context[1])
        context = self._context[1]
        job.surroundings = swapped.Swapped(context, options.env_vars or {})
        job.surroundings.enter()
        if fails:
            raise RuntimeError("injected by the simulator (fail=)")
        function = self._functions.get(batch.function.token)
        if function is None:
            function = pickling.loads(batch.function.payload, self.namespace)
            if batch.function.reusable or (batch.is_map and batch.chunk_at(job.index).kind != ch.ANEW_CHUNK):
                if len(self._functions) >= _MAX_FUNCTIONS:
                    self._functions.clear()
                self._functions.keep(batch.function.token, function, batch.function.payload)
        if batch.arguments is not None:
            args, kwargs = pickling.loads(batch.arguments, self.namespace)
            return function, args, kwargs
        return function, *self._item(batch, job.index)

    def _item(self, batch: Batch, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        chunk = batch.chunk_at(index)
        at = index - chunk.start
        if chunk.kind not in ch.SEPARATE:
            if self._chunk[0] != chunk.token:
                unshared = chunk.kind in ch.UNSHARED
                self._chunk = chunk.token, (Unshared if unshared else pickling.loads_list)(chunk.payload)
            [item] = self._chunk[1][at : at + 1]
            return tuple(item) if chunk.kind in ch.SPREAD else (item,), {}
        lengths = memoryview(chunk.payload[: 4 * chunk.n]).cast("I")
        start = 4 * chunk.n + sum(lengths[:at])
        content = payload_from(chunk.payload, start) if chunk.n == 1 else chunk.payload[start : start + lengths[at]]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = pickling.loads(content, self.namespace)
        return arguments

    def _output(self, job: Job) -> tuple[bytes, bytes]:
        return job.output[0].value(), job.output[1].value()

    def _end(self, job: Job, outcome: bytes, *, lost: bool) -> None:
        job.ended = True
        self._jobs.remove(job)
        if job.holds_slots:
            self._used -= job.batch.options.cores
        if self._closed:
            return  # nobody asks any more
        if lost and not job.killed:
            self._note(job, "loses its worker")
            reason = "The job's worker was lost: injected by the simulator (lose_worker=)."
            self._source.lose(
                job.batch,
                job.index,
                reason,
                None,
                own_fault=False,
                output=self._output(job),
                pid=os.getpid(),
                age_s=self._clock.now() - job.started,
            )
        else:
            self._note(job, "ends")
            self._source.finish(job.batch, job.index, 1, outcome)

    def _sleep(self, job: Job, seconds: float) -> None:
        job.wake_at = self._clock.monotonic() + seconds
        self._hand_over(job)

    def _hand_over(self, job: Job) -> None:
        if job.killed:
            raise KilledException("Job terminated by user")
        self._turn.release()
        job.turn.acquire()
        if job.killed:
            raise KilledException("Job terminated by user")

    def wait_inside(self, done: Callable[[], bool], deadline: float | None) -> bool:
        job = self._here.job
        if job is None or job.ended:
            return False
        with self._lock:
            job.holds_slots = False
            self._used -= job.batch.options.cores
        try:
            while not done() and (deadline is None or self._clock.monotonic() < deadline) and not self._closed:
                job.wake_at, job.ready = deadline, done
                self._hand_over(job)
        finally:
            with self._lock:
                job.holds_slots = True
                self._used += job.batch.options.cores
        return True

    def depth_here(self) -> int:
        job = self._here.job
        return 0 if job is None or job.ended else job.batch.depth + 1

    def namespace_here(self) -> Namespace | None:
        """The jobs' ``__main__`` in the thread of a job, None in any other."""
        job = self._here.job
        return None if job is None or job.ended else self.namespace

    # --- asking and ending --------------------------------------------------------------------------------------------

    def running(self) -> list[tuple[Batch, int, int]]:
        return [(job.batch, job.index, job.index + 1) for job in self._jobs]

    def held(self) -> list[tuple[Batch, int]]:
        return [(job.batch, job.index) for job in self._jobs]

    def kill(self, batch: Batch, index: int) -> bool:
        for job in self._jobs:
            if job.batch is batch and job.index == index:
                self._note(job, "is killed")
                job.killed = True
                self._event.set()
                return True
        return False

    def _out_of_time(self, job: Job) -> None:
        if not job.ended:
            self._source.out_of_time(job.batch, job.index)

    def take_back(self) -> None:
        """Nothing is claimed before it begins."""

    def live(self, batch: Batch, index: int) -> dict[str, Any]:
        for job in self._jobs:
            if job.batch is batch and job.index == index:
                out, err = self._output(job)
                return {"pid": os.getpid(), "started": job.started, "stdout": out, "stderr": err}
        return {}

    def suspend(self, caller: Any) -> None:
        """Jobs of this process wait through ``wait_inside``."""

    def resume(self, caller: Any) -> None:
        """Jobs of this process wait through ``wait_inside``."""

    def _note(self, job: Job, what: str) -> None:
        self._events.append((self._clock.now(), job.batch, job.index, job.attempt, what))

    @property
    def events(self) -> list[tuple[float, int, int, str]]:
        """(virtual epoch seconds, jid, attempt, what) of all that happened to jobs, in order."""
        # A map's jobs begin before the map is sealed, which gives them their jids.
        return [(when, batch.jid0 + index, attempt, what) for when, batch, index, attempt, what in self._events]

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._event.set()
        # Whoever polls may be giving a turn; a job that closes its own simulation has it.
        inside = self._here.job is not None
        if not inside and not self._scheduling.acquire(timeout=_CLOSE_S):
            self._restore()
            return  # a job does not hand over: its thread is left behind
        try:
            self._end_jobs()
        finally:
            if not inside:
                self._scheduling.release()
        self._restore()

    def _end_jobs(self) -> None:
        # Each job gets the turn, raises, runs its finally blocks and ends. One that goes on is left behind.
        for _ in range(_ENDS * len(self._jobs)):
            with self._lock:
                if not self._jobs:
                    break
                self._jobs.rotate(-1)
                job = self._jobs[0]
                job.killed = True
            if job is self._here.job:
                continue
            self._give_turn(job)
        while self._free:
            self._free.pop().dismiss()

    def abandon(self) -> None:
        if not self._closed:
            self._closed = True
            self._restore()

    def _restore(self) -> None:
        virtual_time.uninstall()
        swapped.uninstall()
        if self._capture is not None:
            self._capture.close()


def _closed_gate() -> Any:
    """A lock that is taken: to pass it somebody else must release it first."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class _Runner(threading.Thread):
    """A thread that runs one job after the other, each for as long as the job lasts.

    Args:
        job: The first.
        body: Runs a job that has its first turn.
        end_turn: Hands the turn back.
        free: Where the runner waits for the next.
    """

    def __init__(
        self,
        job: Job,
        body: Callable[[Job], None],
        end_turn: Callable[[], None],
        free: list[_Runner],
        name: str,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._job: Job | None = job
        self._body = body
        self._end_turn = end_turn
        self._free = free
        self._gate = _closed_gate()

    def take(self, job: Job) -> None:
        """Run this one next."""
        self._job = job
        self._gate.release()

    def dismiss(self) -> None:
        """End."""
        self._job = None
        self._gate.release()
        self.join(1.0)

    def run(self) -> None:
        """Until dismissed."""
        while (job := self._job) is not None:
            job.turn.acquire()
            try:
                self._body(job)
            finally:
                self._free.append(self)
                self._end_turn()
            del job
            self._gate.acquire()


class _Here(threading.local):
    job: Job | None = None
