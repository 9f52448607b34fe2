"""Who polls the executor: leader and followers, timers, and the helper that steps in when nobody waits.

A thread that waits for jobs polls the executor itself, so that a result passes through no other thread. One thread
leads at a time; others sleep until the leader finds them done, or until it leaves and hands the lead on. When work
is under way and nobody has led for a few milliseconds, the helper thread leads, and gives way to the first that waits.

::

    result() ──► drive ──► lead: poll · timers · wake followers ──► done ──► hand the lead on
                    └────► follow: sleep on a ticket ──► woken: done, or lead next

Lock order: lead, then the engine's lock. ``poll`` runs without the engine's lock and takes it to report.
"""

from __future__ import annotations

import heapq
import sys
import threading
import time
from collections.abc import Callable
from itertools import count

from cloud.engine.clock import Clock
from cloud.engine.executor.base import Executor
from cloud.engine.interrupts import Handlers
from cloud.errors import BackendClosed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.engine.reading import ReadAhead

_HELP_AFTER_S: Final = 0.004
_AFTER_ERROR_S: Final = 1.0
_LOOK_S: Final = 0.006
"""While threads lead for shorter than this, the helper looks so often, rather than be woken by each that leaves."""


class Timer:
    """An action planned for a moment of the clock."""

    __slots__ = ("action", "when")

    def __init__(self, when: float, action: Callable[[], None]) -> None:
        self.when = when
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Do not do it. Idempotent."""
        self.action = None


class _Follower:
    __slots__ = ("deadline", "done", "ticket")

    def __init__(self, done: Callable[[], bool], deadline: float | None) -> None:
        self.done = done
        self.deadline = deadline
        self.ticket = threading.Lock()
        self.ticket.acquire()

    def wake(self) -> None:
        try:
            self.ticket.release()
        except RuntimeError:
            pass  # a leader and a signal handler may both wake it


class Waiting:
    """Waits of many threads over one executor.

    Args:
        executor: Polled by whoever leads.
        clock: Deadlines and timers are moments of its ``monotonic``.
        lock: The engine's.
        busy: True while anything is unfinished, so that somebody must poll.
    """

    def __init__(self, executor: Executor, clock: Clock, lock: Any, busy: Callable[[], bool]) -> None:
        self._executor = executor
        self._clock = clock
        self._lock = lock
        self._busy = busy
        self._lead_lock = threading.Lock()
        self._led_at = self._led_from = self._led_s = 0.0
        self._followers: list[_Follower] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._helper: threading.Thread | None = None
        self._helping = False
        self._give_way = False
        self._resting = False
        self.handlers = Handlers()
        self._parked = threading.Event()
        self._unpark = threading.Event()
        self.closed = False

    # --- timers -------------------------------------------------------------------------------------------------------

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Call ``action`` under the engine's lock after a delay of the clock."""
        timer = Timer(self._clock.monotonic() + delay_s, action)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        if self._timers[0][2] is timer and self._lead_lock.locked():
            self._executor.interrupt()
        self.need_helper()
        return timer

    def next_timer(self) -> float | None:
        """The moment of the next timer, or None."""
        timers = self._timers
        while timers and timers[0][2].action is None:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def run_timers(self) -> None:
        """Do what is due. Under the engine's lock."""
        while (when := self.next_timer()) is not None and when <= self._clock.monotonic():
            action = heapq.heappop(self._timers)[2].action
            if action is not None:
                action()

    # --- waiting ------------------------------------------------------------------------------------------------------

    def drive(
        self,
        done: Callable[[], bool],
        deadline: float | None,
        *,
        patient: bool = False,
        ahead: ReadAhead | None = None,
    ) -> bool:
        """Block until ``done()`` or the deadline; poll meanwhile if nobody else does.

        Args:
            done: Tells whether what is waited for is there. Other threads ask it too, without the engine's lock.
            deadline: A moment of the clock; None for none.
            patient: It comes with the last of many jobs, and failures count at once.
            ahead: What this thread does meanwhile, whenever there is something to read. It does not lead then: to make
                objects may run any finalizer of the user's, and that may wait for a job.

        Returns:
            What ``done()`` said last.

        Raises:
            BackendClosed: The engine was closed meanwhile.
            KeyboardInterrupt: In the main thread; jobs are not affected.
        """
        if self._executor.wait_inside(done, deadline):
            if self.closed:
                raise BackendClosed("cloud was closed while waiting for jobs")
            return done()
        if self._lock._is_owned():
            # A signal handler waits, amid a look or a submission of ours; whoever polls needs the lock.
            held = self._lock._release_save()
            try:
                return self._drive(done, deadline, patient=patient, ahead=ahead)
            finally:
                self._lock._acquire_restore(held)
        return self._drive(done, deadline, patient=patient, ahead=ahead)

    def _drive(
        self,
        done: Callable[[], bool],
        deadline: float | None,
        *,
        patient: bool,
        ahead: ReadAhead | None,
    ) -> bool:
        while not done():
            if self.closed:
                raise BackendClosed("cloud was closed while waiting for jobs")
            if deadline is not None and self._clock.monotonic() >= deadline:
                return done()
            if ahead is not None:
                ahead.read_one()  # and look again before the next: a worker may be out of work by now
            # Held back before the lead is taken: Ctrl-C must neither leave it taken nor fall into an event. Handlers
            # run at the end of the block, and end it soon.
            with self.handlers:
                if self._lead_lock.acquire(blocking=False):
                    self._lead(done, deadline, patient=patient, ahead=ahead)
                elif self._helping:
                    self._give_way = True
                    self._executor.interrupt()
                    if self._lead_lock.acquire(timeout=0.05):
                        self._lead(done, deadline, patient=patient, ahead=ahead)
                else:
                    self._follow(done, deadline)
        return True

    def poll_once(self) -> None:
        """Look for events without blocking, unless somebody leads already."""
        with self.handlers:
            if self._lead_lock.acquire(blocking=False):
                try:
                    self._executor.poll(0.0, may_jump=False)
                    if self._timers:
                        # Who submits without end keeps the lead from all others.
                        with self._lock:
                            self.run_timers()
                finally:
                    self._leave()

    def look_again(self) -> None:
        """Jobs became final by no report of the executor: see that those who wait for them notice."""
        if self._lead_lock.locked():
            self._executor.interrupt()

    def _lead(
        self,
        done: Callable[[], bool],
        deadline: float | None,
        *,
        patient: bool,
        ahead: ReadAhead | None,
    ) -> None:
        handlers = self.handlers
        self._led_from = time.monotonic()
        try:
            handlers.wake_by(self._executor.interrupt)
            self._look_first()
            while not (done() or self.closed or handlers.waiting or (ahead is not None and ahead.has_news)):
                if not self._step(deadline, patient=patient):
                    break
        finally:
            handlers.wake_by(None)
            self._led_s = time.monotonic() - self._led_from
            self._leave()

    def _look_first(self) -> None:
        # What came while nobody led wakes nobody: it is not to wait for the next look.
        if self._executor.has_news:
            self._executor.poll(0.0, may_jump=False)

    def _step(self, deadline: float | None, *, patient: bool = False, may_jump: bool = True) -> bool:
        """Poll once, at most until the deadline; False when that has passed."""
        now = self._clock.monotonic()
        if deadline is not None and now >= deadline:
            return False
        until = deadline
        if self._timers or self._followers:
            moments = [deadline, *[follower.deadline for follower in self._followers[:]]]
            if self._timers:
                with self._lock:
                    moments.append(self.next_timer())
            until = min((moment for moment in moments if moment is not None), default=None)
        timeout_s = None if until is None else max(0.0, until - now)
        self._executor.poll(timeout_s, may_jump=may_jump, patient=patient and not self._followers)
        if self._timers:
            with self._lock:
                self.run_timers()
        self._wake_followers()
        return True

    def _leave(self) -> None:
        self._led_at = time.monotonic()
        self._lead_lock.release()
        if self._resting:
            self._unpark.set()
        # Whoever polled last may have ended their jobs too; only one that still waits can lead.
        self._wake_followers()
        follower = next(iter(self._followers), None)
        if follower is not None:
            self._wake(follower)

    def _follow(self, done: Callable[[], bool], deadline: float | None) -> None:
        follower = _Follower(done, deadline)
        self._followers.append(follower)
        if self._executor.patient:
            self._executor.interrupt()
        try:
            self.handlers.wake_by(follower.wake)
            # A leader that left before we stood in the list saw nobody to hand the lead to, and one that ended our
            # jobs before saw nobody to wake. The helper is not followed: it never lets a virtual clock jump.
            if self._lead_lock.locked() and not (self._helping or self.closed or self.handlers.waiting or done()):
                timeout = -1.0
                if deadline is not None and not self._executor.simulated:
                    timeout = max(0.0, deadline - self._clock.monotonic())
                follower.ticket.acquire(timeout=timeout)
        finally:
            self.handlers.wake_by(None)
            self._wake(follower)

    def _wake_followers(self) -> None:
        for follower in self._followers[:]:
            if follower.done() or (follower.deadline is not None and self._clock.monotonic() >= follower.deadline):
                self._wake(follower)

    def _wake(self, follower: _Follower) -> None:
        # Without the engine's lock, which others hold while they read and write: each step here is one of a list's.
        try:
            self._followers.remove(follower)
        except ValueError:
            pass  # somebody has just done this
        follower.wake()

    # --- the helper ---------------------------------------------------------------------------------------------------

    def need_helper(self) -> None:
        """There is work under way: see that somebody polls, now or soon."""
        if self._helper is None:
            self._helper = threading.Thread(target=self._help, name="cloud-helper", daemon=True)
            self._helper.start()
        elif self._parked.is_set():
            self._unpark.set()

    def _help(self) -> None:
        while not self.closed:
            try:
                self._help_on()
            except Exception:  # noqa: BLE001 - a defect of ours, in one event
                # Told as the end of this thread would be; but nobody else would poll for those who do not wait.
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
                self._pause(_AFTER_ERROR_S)

    def _help_on(self) -> None:
        """Sleep while there is nothing to do or somebody leads, or lead until somebody waits."""
        if not self._busy() and not self._timers:
            self._unpark.clear()
            self._parked.set()
            if not self._busy() and not self._timers and not self.closed:
                self._unpark.wait()
            self._unpark.clear()
            self._parked.clear()
            return
        now = time.monotonic()
        if self._lead_lock.locked():
            if max(self._led_s, now - self._led_from) >= _LOOK_S:
                self._rest()
            else:
                self._pause(_LOOK_S)
        elif self._led_at + _HELP_AFTER_S > now:
            self._pause(self._led_at + _HELP_AFTER_S - now)
        else:
            self._helping = True  # before anybody can see that it leads
            if not self._lead_lock.acquire(blocking=False):
                self._helping = False
                return
            try:
                self._look_first()
                while (self._busy() or self._timers) and not (self._give_way or self._followers or self.closed):
                    self._step(None, may_jump=False)
            finally:
                self._helping = self._give_way = False
                self._leave()

    def _pause(self, seconds: float) -> None:
        self._unpark.clear()  # one that left as we stopped resting may have set it
        self._unpark.wait(seconds)

    def _rest(self) -> None:
        """One leads for long, and wakes us as it leaves: to look again and again would take a core from the workers."""
        self._unpark.clear()
        self._resting = True
        if self._lead_lock.locked() and not self.closed:
            self._unpark.wait()
        self._resting = False
        self._unpark.clear()

    def close(self) -> None:
        """Wake everybody; waits then raise BackendClosed. Idempotent; bounded."""
        self.closed = True
        self._unpark.set()
        self._executor.interrupt()
        for follower in self._followers[:]:
            self._wake(follower)
        if self._helper is not None and self._helper is not threading.current_thread():
            self._helper.join(5.0)
