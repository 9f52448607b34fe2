"""Runs attempts in worker processes of this machine.

::

    engine's process                         template                      workers
    ProcessExecutor ── control socket ──►  forks, signals, reaps  ──fork──►  worker.main
        │                                                                      │
        └── one socket, one shared page, two capture files a worker ───────────┘

Whoever waits for jobs polls the sockets (``poll``); submitting threads write to them directly. The death of a worker
is what the template says of it, not the end of its socket: a child it forked may hold that open.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import sys
import time
from functools import partial

from cloud.engine import channel as ch
from cloud.engine.descriptors import n_spare
from cloud.engine.executor.base import AHEAD_S, Executor, Task
from cloud.engine.executor.deaths import describe_death
from cloud.engine.executor.lookout import Lookout
from cloud.engine.executor.poller import Poller
from cloud.engine.executor.taking_back import return_from, take_back
from cloud.engine.executor.template import TemplateProcess, kill_orphan
from cloud.engine.executor.workers import STALL_S, WorkerHandle
from cloud.engine.signals import signal
from cloud.engine.store.base import Batch
from cloud.engine.stream import Frame
from cloud.engine.worker.protocol import BY_ENGINE, N_DESCRIPTORS
from cloud.engine.worker.surroundings import thread_defaults
from cloud.errors import UnsupportedOperation
from cloud.jobs import OUTCOME_HEADER_BYTES
from cloud.serialization.shared import payload_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.environment import Environment

_STEAL_S: Final = 0.002
_REFILL: Final = 0.75
"""A worker with less than this part of what it is to be sent ahead is given more."""

_MAX_FAILED_STARTS: Final = 3
_MAX_KILLED_STARTS: Final = 20
_CUT_OFF_S: Final = 0.1
_SIGKILL: Final = signal.SIGKILL
_INTERRUPT: Final = signal.SIGINT
_POKE: Final = signal.SIGURG
_OUTCOME_BODY: Final = struct.Struct("<QI")
_MIN_OUTCOME_BYTES: Final = _OUTCOME_BODY.size + OUTCOME_HEADER_BYTES


class ProcessExecutor(Executor):
    """Worker processes of this machine.

    Args:
        n_slots: Jobs that run at the same time.
        capture: Keep what jobs print; else it goes where the program prints.
        output_limit_bytes: How much of the end of each output stream is kept.
        grace_s: Seconds between the exception that kills a job and the end of its processes.
        max_transmit_bytes: Larger results are errors; 0 means no limit.
        preload: Modules that the template imports when a processor is to spare, for workers forked from then on.
        template: One that was started before, and is this executor's from now on; else the first job starts one.
    """

    takes_many = True

    def __init__(
        self,
        n_slots: int,
        *,
        capture: bool = True,
        output_limit_bytes: int = 64_000,
        grace_s: float = 0.5,
        max_transmit_bytes: int = 0,
        preload: tuple[str, ...] = (),
        template: TemplateProcess | None = None,
    ) -> None:
        if not hasattr(os, "fork") or not hasattr(os, "posix_spawn"):
            raise UnsupportedOperation(
                f"worker processes are not supported on {sys.platform}: use cloud.start_simulator(), or a server"
            )
        self._n_slots = n_slots
        self._capture = capture
        self._grace_s = grace_s
        self._n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._poller = Poller(self._n_cores)
        self._closed = self._spinning = self._makes_way = False
        self._settings = {
            "spin_s": self._poller.spin_s,
            "output_limit_bytes": output_limit_bytes,
            "max_transmit_bytes": max_transmit_bytes,
            "thread_defaults": thread_defaults(self._n_cores, n_slots),
            "capture": capture,
        }
        self._preload = preload
        self._workers: dict[int, WorkerHandle] = {}
        self._by_fd: dict[int, WorkerHandle] = {}
        self._idle: list[WorkerHandle] = []
        self._used = self._n_numbers = self._n_heard = 0
        self._failed_starts: dict[Environment | None, int] = {}
        self._templates: dict[int, TemplateProcess] = {}
        self._template = None if template is None else self._listen_to(template)
        self._stole_at = 0.0
        self._lookout = Lookout(
            self._workers.values,
            take=self._take_left,
            read=self._read,
            poke=lambda worker: self._signal(worker, _POKE),
            capture=capture,
        )
        self._source: Any = None
        self._pid = os.getpid()

    def bind(self, source: Any) -> None:
        self._source = source
        self._lock = source.lock

    @property
    def n_slots(self) -> int:
        return self._n_slots

    @property
    def has_room(self) -> bool:
        return self._used < self._n_slots  # asked with every call: not by way of two more properties

    @property
    def n_used(self) -> int:
        return self._used

    @property
    def n_workers(self) -> int:
        return len(self._workers)

    @property
    def busy(self) -> bool:
        return len(self._idle) < len(self._workers)

    @property
    def has_news(self) -> bool:
        with self._lock:
            return self._lookout.regular and any(worker.has_left for worker in self._workers.values())

    @property
    def patient(self) -> bool:
        return self._lookout.patient

    # --- giving work --------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        if self._makes_way:
            self.take_back()
        self._give_idle(AHEAD_S)

    def _give_idle(self, room_s: float) -> None:
        while self._used < self._n_slots and not self._closed:
            if not self._source.has_queued:
                return
            if not self._idle and any(worker.is_about_to_be_idle for worker in self._workers.values()):
                return
            worker = self._idle.pop() if self._idle else self._new_worker()
            if worker is None:
                return
            tasks = self._source.claim(self._n_slots - self._used, room_s, idle=True)
            if not tasks:
                self._idle.append(worker)
                return
            worker.cores = tasks[0].batch.options.cores
            self._occupy(worker)
            self._begin(worker, tasks)

    def _begin(self, worker: WorkerHandle, tasks: list[Task]) -> None:
        self._give(worker, tasks)
        limit_s = tasks[0].batch.options.max_runtime_s
        if limit_s is not None:
            self._limit_runtime(worker, tasks[0], limit_s)

    def _occupy(self, worker: WorkerHandle) -> None:
        self._used += worker.cores - worker.held_slots
        worker.held_slots = worker.cores

    def _vacate(self, worker: WorkerHandle) -> None:
        self._used -= worker.held_slots
        worker.held_slots = 0

    def _refill(self) -> None:
        """Send busy workers more, so that they do not wait for us between small jobs."""
        if self._idle or self._makes_way:
            self.wake()
            if 0 < len(self._idle) < len(self._workers) and not (self._source.has_queued or self.whole_chunks):
                self._steal()
        if not self._closed and self._source.has_queued:
            self._give_busy()

    def _give_busy(self) -> None:
        ahead_s = self._lookout.ahead_s
        for worker in self._workers.values():
            if not worker.tasks or worker.n_waiting or not worker.takes_more:
                continue
            left_s = worker.left_s
            if left_s < _REFILL * ahead_s:
                free_slots, room_s = self._n_slots - self._used + worker.cores, ahead_s - left_s
                if tasks := self._source.claim(free_slots, room_s, idle=False, environment=worker.environment):
                    self._give(worker, tasks)

    def _steal(self) -> None:
        """Let idle workers have what busy ones were sent ahead and have not begun."""
        now = time.monotonic()
        if now - self._stole_at < _STEAL_S:
            return  # what was stolen must not be stolen back before any of it is done
        rich = [worker for worker in self._workers.values() if worker.tasks and self._is_rich(worker, now)]
        if rich:
            self._stole_at = now
            share_s = sum(worker.left_s for worker in rich) / (len(rich) + len(self._idle))
            self._take_back(rich)
            self._give_idle(min(share_s, AHEAD_S))

    def _is_rich(self, worker: WorkerHandle, now: float) -> bool:
        return worker.takes_work and worker.is_rich(now)

    def _give(self, worker: WorkerHandle, tasks: list[Task]) -> None:
        if not worker.tasks:
            worker.seen_at = worker.began = time.monotonic()
        worker.give(tasks)
        if worker.pending:
            self._want_write(worker)
        elif self._poller.asleep and not self._lookout.regular and self._lookout.leaves(worker):
            self._lookout.regular = True
            self.interrupt()

    def _want_write(self, worker: WorkerHandle) -> None:
        if worker.fd in self._by_fd:
            self._poller.watch(worker.fd, writes=True)

    def _new_worker(self, environment: Environment | None = None) -> WorkerHandle | None:
        """A worker, or None if no more can be had now: descriptors, memory or processes are used up."""
        try:
            return self._spawn(environment)
        except OSError as exc:
            if any(not worker.n_waiting or worker.kill_at is not None for worker in self._workers.values()):
                return None  # those there are do it all, and each asks for more at its end
            self._fail_queued(f"Worker processes cannot be started: {exc}.", environment)
            return None

    def _fail_queued(self, reason: str, environment: Environment | None) -> None:
        """Nobody can run what is queued for an environment: it ends, rather than wait for ever."""
        while tasks := self._source.claim(self._n_slots, AHEAD_S, idle=True, environment=environment):
            for task in tasks:
                for index in range(task.start, task.stop):
                    self._source.lose(task.batch, index, reason, None, own_fault=True)

    def _spawn(self, environment: Environment | None = None) -> WorkerHandle:
        if len(self._workers) >= max(1, n_spare() // N_DESCRIPTORS):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        template = self._template_for(environment)
        self._n_numbers += 1
        worker = self._open_worker(self._n_numbers, environment)
        worker.template = template
        worker.slots[ch.SPIN] = self._spinning
        try:
            template.fork(worker.number, worker.descriptors)
        except OSError:
            worker.close()
            raise
        worker.started()
        self._workers[worker.number] = worker
        self._by_fd[worker.fd] = worker
        self._poller.watch(worker.fd)
        return worker

    def _open_worker(self, number: int, environment: Environment | None) -> WorkerHandle:
        return WorkerHandle(number, self._settings, capture=self._capture)

    def _template_for(self, environment: Environment | None) -> TemplateProcess:
        if self._template is None:
            self._template = self._listen_to(self._start_template())
        return self._template

    def _start_template(self) -> TemplateProcess:
        return TemplateProcess(self._preload)

    def _listen_to(self, template: TemplateProcess) -> TemplateProcess:
        self._templates[template.fd] = template
        self._poller.watch(template.fd)
        return template

    # --- events -------------------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        self._poller.interrupt()

    def poll(self, timeout_s: float | None, *, may_jump: bool, patient: bool = False) -> None:
        self._lookout.begin(patient=patient)
        events = self._wait(timeout_s, patient=patient)
        with self._lock:
            if self._closed:
                return
            for fd, event in events:
                worker = self._by_fd.get(fd)
                if worker is not None:
                    if event & select.POLLOUT and worker.write_pending():
                        self._poller.watch(fd)
                    if event & ~select.POLLOUT:
                        self._read(worker)
                elif fd == self._poller.woken:
                    self._poller.heed()
                elif fd in self._templates:
                    self._hear_template(self._templates[fd])
            self._look_after_workers()
            self._refill()

    def _look_after_workers(self) -> None:
        stalled = self._lookout.look(time.monotonic())
        if stalled:
            self._take_back(stalled)

    def call_in(self) -> None:
        n_heard = self._n_heard
        if self._lookout.patient:
            self._lookout.call_in()
            if self._n_heard > n_heard:
                self.interrupt()  # whoever waits may have waited for this, and a worker may want more

    def _wait(self, timeout_s: float | None, *, patient: bool) -> list[tuple[int, int]]:
        poller = self._poller
        if timeout_s is not None and timeout_s <= 0.0:
            return poller.look()
        workers = list(self._workers.values())
        # With every core at work, looking again and again would only slow the workers down.
        spinning = self._used < self._n_cores and poller.is_quiet(lambda: sum(1 for each in workers if each.tasks))
        if spinning != self._spinning:
            self._spinning = spinning
            for worker in workers:
                worker.slots[ch.SPIN] = spinning
        if spinning and (events := poller.spin()):
            return events
        with self._lock:
            # Those who submit start workers and give them work meanwhile.
            limit_s = self._lookout.plan(
                may_be_patient=patient and self._used >= self._n_slots, has_queued=self._source.has_queued
            )
        return poller.sleep(limit_s if timeout_s is None else timeout_s if limit_s is None else min(timeout_s, limit_s))

    def _read(self, worker: WorkerHandle) -> None:
        frames, alive = ([], True) if worker.is_heard else worker.read()
        if frames:
            self._hear(worker, frames)
        if not alive:
            self._cut_off(worker)

    def _take_left(self, worker: WorkerHandle) -> None:
        left, sound = ([], True) if worker.is_heard else worker.left()
        if left:
            self._hear(worker, left)
        if not sound:
            self._cut_off(worker)

    def _hear(self, worker: WorkerHandle, frames: list[Frame]) -> None:
        self._n_heard += len(frames)
        worker.is_heard = True  # who hears of these may look: what came after them is not to be heard first
        try:
            alike: list[bytes] = []
            for kind, body in frames:
                if kind == ch.OUTCOME:
                    if len(body) < _MIN_OUTCOME_BYTES:
                        self._distrust(worker)
                        return
                    position, n = _OUTCOME_BODY.unpack_from(body)
                    if n == 1 and type(body) is bytes and len(frames) > 1:
                        alike.append(body)
                        continue
                    if alike:
                        self._finish_each(worker, alike)
                    outcome = body[12:] if type(body) is bytes else payload_from(body, _OUTCOME_BODY.size)
                    self._finish(worker, position, n, outcome)
                    continue
                if alike:
                    self._finish_each(worker, alike)
                if kind == ch.STOPPED:
                    self._stopped(worker)
                elif kind == ch.REQUEST:
                    self._request(worker, bytes(body))
            if alike:
                self._finish_each(worker, alike)
        finally:
            worker.is_heard = False

    def _finish_each(self, worker: WorkerHandle, bodies: list[bytes]) -> None:
        """Outcomes of single items that came together: those of one task are one change of state."""
        at = 0
        while at < len(bodies) and worker.tasks:
            task = worker.tasks[0]
            batch, start, n = task.batch, task.start, min(task.stop - task.start, len(bodies) - at)
            if n == 1 or worker.kill_at is not None:
                body = bodies[at]
                self._finish(worker, _OUTCOME_BODY.unpack_from(body)[0], 1, body[12:])
                at += 1
                continue
            position = _OUTCOME_BODY.unpack_from(bodies[at + n - 1])[0] - n + 1
            if self._advance(worker, position, n):
                self._source.finish_each(batch, start, [body[12:] for body in bodies[at : at + n]])
            at += n
        bodies.clear()

    def _cut_off(self, worker: WorkerHandle) -> None:
        if worker.fd in self._by_fd:
            self._poller.forget(worker.fd)
            del self._by_fd[worker.fd]
            # Most likely it is dead, and the template about to tell of what. But a job may have closed its
            # descriptors, or written into our memory: then it runs on and can never report.
            self._source.call_later(_CUT_OFF_S, lambda: self._end_cut_off(worker))

    def _distrust(self, worker: WorkerHandle) -> None:
        worker.lies = True  # what it tells from now on may seem to fit, and be of other items
        self._cut_off(worker)

    def _end_cut_off(self, worker: WorkerHandle) -> None:
        if not worker.dead:
            worker.cut_off = True
            self._signal(worker, _SIGKILL)

    def _finish(self, worker: WorkerHandle, position: int, n: int, outcome: bytes) -> None:
        if worker.tasks:
            batch, start = worker.tasks[0].batch, worker.tasks[0].start
            if self._advance(worker, position, n):
                self._source.finish(batch, start, n, outcome)

    def _advance(self, worker: WorkerHandle, position: int, n: int) -> bool:
        """Note that the next ``n`` items of a worker have ended; False if those are not the ones it tells of."""
        task = worker.tasks[0]
        if worker.lies or position != task.position or n > task.stop - task.start:
            self._distrust(worker)
            return False
        task.start += n
        task.position += n
        if self._failed_starts:
            self._failed_starts.pop(worker.environment, None)
        if task.start == task.stop:
            worker.tasks.popleft()
        worker.load_s -= n * task.mean_s
        if worker.kill_at is not None and position <= worker.kill_at < position + n:
            self._signal(worker, _SIGKILL)
        elif not worker.tasks:
            self._idled(worker, retire=task.batch.options.kill_process)
        return True

    def _idled(self, worker: WorkerHandle, *, retire: bool) -> None:
        worker.load_s = 0.0
        if worker.kill_at is not None or worker.dead:
            return
        self._vacate(worker)
        if retire or worker.n_waiting or self._too_many():
            self._retire(worker)
        elif worker.taking_back is None:
            self._idle.append(worker)

    def _too_many(self) -> bool:
        """Whether there are more workers than slots, as jobs that waited go on."""
        if len(self._workers) <= self._n_slots:
            return False
        return sum(1 for each in self._workers.values() if not each.retired and not each.n_waiting) > self._n_slots

    def _retire(self, worker: WorkerHandle) -> None:
        worker.retired = True
        self._signal(worker, _SIGKILL)

    def _signal(self, worker: WorkerHandle, number: int) -> None:
        if worker.template is not None:
            worker.template.signal(worker.number, number)

    # --- deaths -------------------------------------------------------------------------------------------------------

    def _hear_template(self, template: TemplateProcess) -> None:
        messages, alive = template.read()
        for what, number, argument in messages:
            worker = self._workers.get(number)
            if worker is None:
                continue
            if what == b"B":
                worker.pid = argument
            else:
                worker.cut_off &= argument >= BY_ENGINE
                self._bury(worker, argument & ~BY_ENGINE if argument > 0 else argument)
        if not alive:
            # Killed from outside. Its workers die with it, or when their socket ends.
            self._poller.forget(template.fd)
            del self._templates[template.fd]
            status = template.close()
            if template is self._template:
                self._template = None
            starts = self._failed_starts
            for worker in [each for each in self._workers.values() if each.template is template]:
                self._failed_starts = dict(starts)  # however many it was to start: one thing failed
                worker.template = None
                kill_orphan(worker.pid)
                # If it ended by itself it cannot start workers here, and the next one could not either.
                self._bury(worker, _SIGKILL if worker.has_begun else status)

    def _bury(self, worker: WorkerHandle, status: int) -> None:
        worker.dead = True
        while frames := worker.read()[0]:
            self._hear(worker, [frame for frame in frames if frame[0] == ch.OUTCOME])
        self._workers.pop(worker.number, None)
        if self._by_fd.pop(worker.fd, None) is not None:
            self._poller.forget(worker.fd)
        if worker in self._idle:
            self._idle.remove(worker)
        self._vacate(worker)
        current = worker.slots[ch.CURRENT]
        never_ran = not worker.has_begun
        reason, exitcode, own_fault = self._describe_death(worker, status)
        n_failed = self._failed_starts.get(worker.environment, 0)
        if never_ran and worker.tasks:
            n_failed += 1
            self._failed_starts[worker.environment] = n_failed
        killed = os.WIFSIGNALED(status) and not own_fault
        give_up = never_ran and n_failed >= (_MAX_KILLED_STARTS if killed else _MAX_FAILED_STARTS)
        output = worker.output()
        if give_up:
            reason = self._why_not_started(worker, reason)
        for position, batch, index in reversed(list(worker.items())):
            unreported = position < current and batch.options.reports_late
            if position > current or unreported or (never_ran and not give_up):
                self._source.give_back(batch, index, index + 1)
            elif give_up:
                self._source.lose(batch, index, reason, exitcode, own_fault=True)
            else:
                self._source.lose(
                    batch,
                    index,
                    reason,
                    exitcode,
                    own_fault=own_fault and position == current,
                    had_ended=position < current,
                    output=output if position == current else (b"", b""),
                    pid=worker.pid,
                    age_s=time.monotonic() - worker.began if position == current else None,
                )
        worker.tasks.clear()
        worker.close()
        if give_up:
            self._failed_starts.pop(worker.environment, None)
            self._fail_queued(reason, worker.environment)
        self.wake()

    def _describe_death(self, worker: WorkerHandle, status: int) -> tuple[str, int | None, bool]:
        return describe_death(status, worker.pid, cut_off=worker.cut_off)

    def _why_not_started(self, worker: WorkerHandle, reason: str) -> str:
        return f"Worker processes cannot be started; what they print says why. {reason}"

    # --- taking back --------------------------------------------------------------------------------------------------

    def take_back(self) -> None:
        self._makes_way = False
        # First: what has ended is not to be killed.
        for worker in list(self._workers.values()):
            self._read(worker)
        self._take_back(list(self._workers.values()))

    def make_way(self, priority: int) -> None:
        # Later: this may be asked amid giving work to workers, which must not be asked for theirs then.
        self._makes_way |= self._lookout.is_far_ahead_of(priority)

    def _take_back(self, workers: list[WorkerHandle]) -> None:
        for worker in take_back(workers, self._source.give_back):
            if not worker.write(ch.frame(ch.RESUME)):
                self._want_write(worker)

    def _stopped(self, worker: WorkerHandle) -> None:
        if worker.taking_back is None:
            return
        # What it had not reported by now it has not begun.
        return_from(worker, 0, self._source.give_back)
        worker.taking_back = worker.limit = None
        if worker.kill_at is not None or worker.dead or worker.retired:
            return
        self._vacate(worker)
        if worker not in self._idle:
            self._idle.append(worker)

    # --- asking and ending --------------------------------------------------------------------------------------------

    def running(self) -> list[tuple[Batch, int, int]]:
        return [begun for worker in self._workers.values() for begun in worker.begun()]

    def held(self) -> list[tuple[Batch, int]]:
        return [(batch, index) for worker in self._workers.values() for _, batch, index in worker.items()]

    def live(self, batch: Batch, index: int) -> dict[str, Any]:
        for worker in self._workers.values():
            found = worker.running()
            if found is not None and found[1] is batch and found[2] == index:
                return worker.describe_running()
        return {}

    def kill(self, batch: Batch, index: int) -> bool:
        for worker in self._workers.values():
            for position, its_batch, its_index in worker.items():
                if its_batch is batch and its_index == index:
                    if worker.kill_at is None:
                        worker.kill_at = position
                        worker.slots[ch.KILL] = position
                        self._signal(worker, _INTERRUPT)
                        self._source.call_later(self._grace_s, partial(self._signal, worker, _SIGKILL))
                    return True
        return False

    def _limit_runtime(self, worker: WorkerHandle, task: Task, limit_s: float) -> None:
        batch, index = task.batch, task.start
        attempt = batch.attempt(index)

        def still_there() -> bool:
            return batch.attempt(index) == attempt and any(b is batch and i == index for _, b, i in worker.items())

        def begin() -> None:
            # The start of the worker is not the job's time.
            begun = worker.has_begun
            if begun or still_there():
                self._source.call_later(limit_s if begun else STALL_S, out_of_time if begun else begin)

        def out_of_time() -> None:
            if still_there():
                self._source.out_of_time(batch, index)

        begin()

    def _request(self, worker: WorkerHandle, body: bytes) -> None:
        try:
            number, content, blobs = ch.unpack_message(body)
        except (struct.error, ValueError, KeyError, TypeError):
            self._distrust(worker)
            return
        batch = worker.tasks[0].batch if worker.tasks else None

        def reply(content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> None:
            if not worker.dead and not worker.write(ch.pack_message(ch.REPLY, number, content, blobs)):
                self._want_write(worker)

        self._source.request(worker, batch, content, blobs, reply)

    def suspend(self, caller: Any) -> None:
        worker: WorkerHandle = caller
        worker.n_waiting += 1
        if worker.n_waiting == 1 and worker.tasks:
            self._vacate(worker)
            self._take_back([worker])
            self.wake()

    def resume(self, caller: Any) -> None:
        worker: WorkerHandle = caller
        if worker.dead:
            return
        worker.n_waiting -= 1
        if worker.n_waiting == 0 and worker.tasks:
            self._occupy(worker)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._end(list(self._templates.values()))

    def abandon(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._end([])
        for template in self._templates.values():
            template.abandon()

    def _end(self, templates: list[TemplateProcess]) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._by_fd.clear()
        self._idle.clear()
        for template in templates:
            template.end()
        self._poller.close()
