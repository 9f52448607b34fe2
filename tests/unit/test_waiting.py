"""Many threads that wait over one executor: one leads, the others follow, and nobody is forgotten."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from cloud.engine.clock import RealClock
from cloud.engine.reading import ReadAhead
from cloud.engine.waiting import Waiting, _Follower
from cloud.errors import BackendClosed
from tests.unit.fake_executor import ByHand

SOON_S = 10.0
"""Nothing here takes this long, unless somebody is forgotten."""


class Toy(ByHand):
    """An executor whose events are functions that a test posts; ``poll`` sleeps until there is one.

    Attributes:
        led_by: Names of the threads that polled, in order.
        n_polling: Threads in ``poll`` now; more than one is against the contract.
        patience: How patient each poll was, in order.
    """

    patient = False

    def __init__(self, lock: Any) -> None:
        super().__init__()
        self.lock = lock
        self.led_by: list[str] = []
        self.patience: list[bool] = []
        self.n_polling = 0
        self.broken: list[str] = []
        self._events: deque[Callable[[], None]] = deque()
        self._interrupted = False
        self._condition = threading.Condition()

    def post(self, event: Callable[[], None]) -> None:
        with self._condition:
            self._events.append(event)
            self._condition.notify_all()

    def interrupt(self) -> None:
        # Called by signal handlers too, perhaps while this thread holds the condition: a plain flag and no lock.
        self._interrupted = True
        if self._condition.acquire(blocking=False):
            try:
                self._condition.notify_all()
            finally:
                self._condition.release()

    def poll(self, timeout_s: float | None, *, may_jump: bool, patient: bool = False) -> None:
        self.n_polling += 1
        if self.n_polling > 1:
            self.broken.append("two threads poll")
        if self.lock._is_owned():
            self.broken.append("the engine's lock is held")
        self.led_by.append(threading.current_thread().name)
        self.patience.append(patient)
        self.patient = patient
        try:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            with self._condition:
                while not (self._events or self._interrupted):
                    left_s = None if deadline is None else deadline - time.monotonic()
                    if left_s is not None and left_s <= 0:
                        break
                    # Looks again by itself: an interrupt that met the condition held set the flag only.
                    self._condition.wait(0.05 if left_s is None else min(left_s, 0.05))
                self._interrupted = False
                events, self._events = self._events, deque()
            with self.lock:
                for event in events:
                    event()
        finally:
            self.n_polling -= 1


class House:
    """A ``Waiting`` over a ``Toy``, and threads that wait."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.toy = Toy(self.lock)
        self.busy = False
        self.done: set[Any] = set()
        self.waiting = Waiting(self.toy, RealClock(), self.lock, lambda: self.busy)
        self.threads: list[threading.Thread] = []

    def finish(self, *names: Any) -> None:
        """Post the event that ends what waits for these names."""
        self.toy.post(lambda: self.done.update(names))

    def drive(self, name: Any, timeout_s: float | None = None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return self.waiting.drive(lambda: name in self.done, deadline)

    def start(self, name: Any, timeout_s: float | None = None, wait: Callable[[], bool] | None = None) -> Future[bool]:
        """A thread that waits for a name; its result is that of ``drive``."""
        future: Future[bool] = Future()

        def run() -> None:
            try:
                future.set_result(wait() if wait is not None else self.drive(name, timeout_s))
            except BaseException as exc:
                future.set_exception(exc)

        thread = threading.Thread(target=run, name=f"waiter-{name}")
        self.threads.append(thread)
        thread.start()
        return future

    def leader(self, name: Any = "lead", timeout_s: float | None = None) -> Future[bool]:
        future = self.start(name, timeout_s)
        until(lambda: self.toy.n_polling == 1)
        return future

    def follower(self, name: Any, timeout_s: float | None = None) -> Future[bool]:
        n = len(self.waiting._followers)
        future = self.start(name, timeout_s)
        until(lambda: len(self.waiting._followers) > n)
        return future

    def close(self) -> None:
        self.waiting.close()
        for thread in self.threads:
            thread.join(SOON_S)
        assert not [thread for thread in self.threads if thread.is_alive()]
        assert not self.toy.broken


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.0005)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()
    assert not house.waiting._lead_lock.locked()
    assert not house.waiting._followers


# --- leader and followers ---------------------------------------------------------------------------------------------


def test_what_is_done_needs_no_poll(house: House) -> None:
    house.done.add("a")
    assert house.drive("a")
    assert house.toy.led_by == []


def test_a_timeout_of_zero_only_looks(house: House) -> None:
    assert not house.drive("a", 0.0)
    assert house.toy.led_by == []


def test_a_deadline_ends_the_wait_of_a_leader(house: House) -> None:
    began = time.monotonic()
    assert not house.drive("a", 0.05)
    assert 0.05 <= time.monotonic() - began < SOON_S


def test_nobody_is_patient_while_another_waits(house: House) -> None:
    leader = house.start("all", wait=lambda: house.waiting.drive(lambda: "all" in house.done, None, patient=True))
    until(lambda: house.toy.n_polling == 1)
    follower = house.follower("one")
    until(lambda: len(house.toy.patience) == 2)
    house.finish("one")
    assert follower.result(SOON_S)
    until(lambda: len(house.toy.patience) == 3)
    house.finish("all")
    assert leader.result(SOON_S)
    assert house.toy.patience == [True, False, True]


class Reader(ReadAhead):
    """Has something to read as long as a test says so, and says who reads."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.todo: list[str] = []
        self.lead_was_taken: list[bool] = []

    @property
    def has_news(self) -> bool:
        return bool(self.todo)

    def read_one(self) -> None:
        if self.todo:
            self.lead_was_taken.append(self.house.waiting._lead_lock.locked())
            self.todo.pop()


def test_who_leads_reads_ahead_between_two_looks_and_does_not_lead_then(house: House) -> None:
    reader = Reader(house)
    leader = house.start("all", wait=lambda: house.waiting.drive(lambda: "all" in house.done, None, ahead=reader))
    until(lambda: house.toy.n_polling == 1)
    for n in (1, 2, 3):
        house.toy.post(lambda: reader.todo.extend("ab"))
        until(lambda n=n: len(reader.lead_was_taken) == 2 * n and house.toy.n_polling == 1)
    house.finish("all")
    assert leader.result(SOON_S)
    assert not any(reader.lead_was_taken)


def test_one_that_reads_ahead_may_wait_for_another(house: House) -> None:
    reader = Reader(house)
    inner: list[bool] = []

    def read_one() -> None:
        if reader.todo:
            reader.todo.clear()
            house.finish("inner")
            inner.append(house.drive("inner", SOON_S))

    reader.read_one = read_one  # type: ignore[method-assign]
    house.toy.post(lambda: reader.todo.append("a"))
    leader = house.start("all", wait=lambda: house.waiting.drive(lambda: "all" in house.done, None, ahead=reader))
    until(lambda: inner == [True])
    house.finish("all")
    assert leader.result(SOON_S)


def test_a_deadline_ends_the_wait_of_a_follower(house: House) -> None:
    leader = house.leader()
    follower = house.follower("a", 0.05)
    assert follower.result(SOON_S) is False
    house.finish("lead")
    assert leader.result(SOON_S)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_everybody_returns_when_all_is_done_at_once(house: House, n: int) -> None:
    futures = [house.start(name) for name in range(n)]
    house.finish(*range(n))
    assert all(future.result(SOON_S) for future in futures)


@pytest.mark.parametrize("backwards", [False, True])
def test_everybody_returns_one_by_one(house: House, backwards: bool) -> None:
    n = 12
    futures = {name: house.start(name) for name in range(n)}
    until(lambda: len(house.waiting._followers) == n - 1 and house.toy.n_polling == 1)
    for name in sorted(futures, reverse=backwards):
        house.finish(name)
        assert futures.pop(name).result(SOON_S)
        assert not any(future.done() for future in futures.values())


def test_the_lead_is_handed_on(house: House) -> None:
    first, second, third = house.leader("a"), house.follower("b"), house.follower("c")
    house.finish("a")
    assert first.result(SOON_S)
    until(lambda: house.toy.led_by[-1] == "waiter-b")
    house.finish("b")
    assert second.result(SOON_S)
    until(lambda: house.toy.led_by[-1] == "waiter-c")
    house.finish("c")
    assert third.result(SOON_S)


def test_the_lead_is_handed_on_by_one_that_runs_out_of_time(house: House) -> None:
    leader, follower = house.leader("a", 0.2), house.follower("b")
    assert leader.result(SOON_S) is False
    house.finish("b")
    assert follower.result(SOON_S)


def test_a_result_passes_through_no_other_thread(house: House) -> None:
    house.finish("a")
    assert house.drive("a")
    assert set(house.toy.led_by) == {threading.current_thread().name}


def test_a_follower_whose_job_ended_before_it_stood_in_line_returns(house: House) -> None:
    """The leader ends the job between the follower's look and its place in the list, then sleeps."""
    leader = house.leader()
    looks: list[bool] = []

    def done() -> bool:
        looks.append(len(looks) > 0)
        return looks[-1]

    follower = house.start("late", wait=lambda: house.waiting.drive(done, None))
    assert follower.result(SOON_S / 4)
    house.finish("lead")
    assert leader.result(SOON_S)


def test_jobs_that_end_by_no_event_are_noticed(house: House) -> None:
    """As when another thread kills them."""
    leader, follower = house.leader("a"), house.follower("b")
    house.done.add("b")
    house.waiting.look_again()
    assert follower.result(SOON_S / 4)
    house.done.add("a")
    house.waiting.look_again()
    assert leader.result(SOON_S / 4)


def test_looking_again_disturbs_nobody(house: House) -> None:
    house.waiting.look_again()
    leader, follower = house.leader("a"), house.follower("b")
    for _ in range(20):
        house.waiting.look_again()
    assert not leader.done()
    assert not follower.done()
    house.finish("a", "b")
    assert leader.result(SOON_S)
    assert follower.result(SOON_S)


def test_a_look_in_passing_takes_what_is_there(house: House) -> None:
    house.finish("a")
    house.waiting.poll_once()
    assert house.done == {"a"}


def test_a_look_in_passing_leaves_a_leader_alone(house: House) -> None:
    leader = house.leader("a")
    n = len(house.toy.led_by)
    house.waiting.poll_once()
    assert len(house.toy.led_by) == n
    house.finish("a")
    assert leader.result(SOON_S)


def test_a_look_in_passing_wakes_those_whose_jobs_it_ended(house: House) -> None:
    """It may get between two leaders, while followers sleep."""
    lead = house.waiting._lead_lock
    lead.acquire()
    first, second = house.follower("a"), house.follower("b")
    house.finish("b")
    lead.release()
    house.waiting.poll_once()
    assert second.result(SOON_S / 4)
    house.finish("a")
    assert first.result(SOON_S)


def test_many_threads_and_many_events(house: House) -> None:
    n_threads, n_each = 8, 60
    house.busy = True
    house.waiting.need_helper()

    def wait_for_all(number: int) -> bool:
        for step in range(n_each):
            house.finish((number, step))
            assert house.drive((number, step), SOON_S)
            if step % 7 == 0:
                assert not house.drive("never", 0.0005)
        return True

    futures = [house.start(number, wait=lambda number=number: wait_for_all(number)) for number in range(n_threads)]
    assert all(future.result(60.0) for future in futures)
    house.busy = False


def test_an_error_of_the_executor_reaches_the_leader_and_frees_the_lead(house: House) -> None:
    leader, follower = house.leader("a"), house.follower("b")

    def fail() -> None:
        raise ZeroDivisionError

    house.toy.post(fail)
    with pytest.raises(ZeroDivisionError):
        leader.result(SOON_S)
    house.finish("b")
    assert follower.result(SOON_S)


# --- timers -----------------------------------------------------------------------------------------------------------


def test_timers_fire_in_order_and_on_time(house: House) -> None:
    fired: list[tuple[str, float]] = []
    began = time.monotonic()
    for name, delay_s in (("c", 0.06), ("a", 0.02), ("b", 0.04)):
        house.waiting.call_later(delay_s, lambda name=name: fired.append((name, time.monotonic() - began)))
    house.waiting.drive(lambda: len(fired) == 3, time.monotonic() + SOON_S)
    assert [name for name, _ in fired] == ["a", "b", "c"]
    for (_, at), delay_s in zip(fired, (0.02, 0.04, 0.06), strict=True):
        assert delay_s <= at < delay_s + 1.0


def test_timers_are_called_under_the_lock(house: House) -> None:
    owned: list[bool] = []
    house.waiting.call_later(0.0, lambda: owned.append(house.lock._is_owned()))  # type: ignore[attr-defined]
    house.waiting.drive(lambda: bool(owned), time.monotonic() + SOON_S)
    assert owned == [True]


def test_a_timer_fires_while_a_leader_sleeps(house: House) -> None:
    leader = house.leader("a")
    with house.lock:
        house.waiting.call_later(0.01, lambda: house.done.add("a"))
    assert leader.result(SOON_S)


def test_a_timer_fires_when_nobody_waits(house: House) -> None:
    fired = threading.Event()
    with house.lock:
        house.waiting.call_later(0.01, fired.set)
    assert fired.wait(SOON_S)


def test_whoever_only_looks_does_what_is_due(house: House) -> None:
    fired: list[bool] = []
    house.waiting.need_helper = lambda: None  # type: ignore[method-assign]
    house.waiting.call_later(0.0, lambda: fired.append(True))
    house.waiting.poll_once()
    assert fired == [True]


def test_who_waits_with_the_lock_lets_others_have_it(house: House) -> None:
    # A signal handler does, that comes amid a submission: the leader needs the lock to tell it.
    first = house.leader()
    with house.lock:
        house.finish("second", "lead")
        assert house.drive("second", 10.0)
        assert house.lock._is_owned()  # type: ignore[attr-defined]
    assert first.result(SOON_S)


def test_a_timer_may_set_another(house: House) -> None:
    fired: list[int] = []

    def fire() -> None:
        fired.append(1)
        if len(fired) < 3:
            house.waiting.call_later(0.0, fire)

    with house.lock:
        house.waiting.call_later(0.0, fire)
    house.waiting.drive(lambda: len(fired) == 3, time.monotonic() + SOON_S)
    assert len(fired) == 3


def test_a_cancelled_timer_is_forgotten(house: House) -> None:
    fired: list[int] = []
    with house.lock:
        timers = [house.waiting.call_later(0.01 * n, lambda: fired.append(1)) for n in range(5)]
        for timer in timers:
            timer.cancel()
        assert house.waiting.next_timer() is None


# --- the helper -------------------------------------------------------------------------------------------------------


def test_the_helper_starts_with_the_first_work(house: House) -> None:
    assert "cloud-helper" not in {thread.name for thread in threading.enumerate()}
    house.waiting.need_helper()
    assert "cloud-helper" in {thread.name for thread in threading.enumerate()}


def test_the_helper_polls_when_nobody_waits(house: House) -> None:
    seen = threading.Event()
    house.busy = True
    house.waiting.need_helper()
    house.toy.post(seen.set)
    assert seen.wait(SOON_S)
    assert set(house.toy.led_by) == {"cloud-helper"}


def test_the_helper_tells_of_an_error_and_goes_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    seen = threading.Event()
    monkeypatch.setattr("cloud.engine.waiting._AFTER_ERROR_S", 0.01)
    monkeypatch.setattr(threading, "excepthook", told.append)
    house.busy = True
    house.waiting.need_helper()

    def fail() -> None:
        raise ZeroDivisionError

    house.toy.post(fail)
    until(lambda: len(told) == 1)
    house.toy.post(seen.set)
    assert seen.wait(SOON_S)
    assert [each.exc_type for each in told] == [ZeroDivisionError]
    assert told[0].thread.name == "cloud-helper"
    house.busy = False


def test_the_helper_is_not_followed(house: House) -> None:
    # It never lets a virtual clock jump: followers would wait for what only one of them could bring about.
    house.busy = True
    house.waiting.need_helper()
    until(lambda: house.waiting._helping)
    assert house.start("a", wait=lambda: house.waiting._follow(lambda: False, None) is None).result(SOON_S)
    house.busy = False


def test_the_helper_hands_the_lead_to_one_that_follows(house: House) -> None:
    house.busy = True
    house.waiting.need_helper()
    until(lambda: house.waiting._helping)
    follower = _Follower(lambda: False, None)
    house.waiting._followers.append(follower)
    house.toy.interrupt()
    assert follower.ticket.acquire(timeout=SOON_S)
    house.busy = False


def test_the_helper_gives_way_to_one_that_waits(house: House) -> None:
    house.busy = True
    house.waiting.need_helper()
    until(lambda: house.toy.led_by == ["cloud-helper"])
    waiter = house.start("a")
    until(lambda: house.toy.led_by[-1] == "waiter-a")
    house.finish("a")
    assert waiter.result(SOON_S)
    until(lambda: house.toy.led_by[-1] == "cloud-helper")
    house.busy = False


def test_the_helper_rests_and_comes_back(house: House) -> None:
    for _ in range(3):
        seen = threading.Event()
        house.busy = True
        house.waiting.need_helper()
        house.toy.post(seen.set)
        assert seen.wait(SOON_S)
        house.busy = False
        house.toy.interrupt()
        until(house.waiting._parked.is_set)


def test_the_helper_does_not_spin_beside_a_leader(house: House) -> None:
    house.busy = True
    house.waiting.need_helper()
    house.busy = False
    house.toy.interrupt()
    until(house.waiting._parked.is_set)
    leader = house.leader("a")
    house.busy = True
    house.waiting.need_helper()  # wakes it for good
    n_waits = 0
    wait = house.waiting._unpark.wait

    def counted(timeout: float | None = None) -> bool:
        nonlocal n_waits
        n_waits += 1
        return wait(timeout)

    house.waiting._unpark.wait = counted  # type: ignore[method-assign]
    watched_s = 0.2
    time.sleep(watched_s)
    house.finish("a")
    assert leader.result(SOON_S)
    assert n_waits < watched_s * 2000
    house.busy = False


# --- closing ----------------------------------------------------------------------------------------------------------


def test_close_wakes_everybody(house: House) -> None:
    house.busy = True
    house.waiting.need_helper()
    futures = [house.start(name) for name in range(6)]
    until(lambda: len(house.waiting._followers) == 5)
    house.waiting.close()
    for future in futures:
        with pytest.raises(BackendClosed, match="closed"):
            future.result(SOON_S)
    house.waiting.close()
    assert "cloud-helper" not in {thread.name for thread in threading.enumerate()}


def test_close_ends_a_helper_that_rests(house: House) -> None:
    house.waiting.need_helper()
    until(house.waiting._parked.is_set)
    house.waiting.close()
    assert "cloud-helper" not in {thread.name for thread in threading.enumerate()}


def test_close_by_the_helper_itself(house: House) -> None:
    closed = threading.Event()

    def close() -> None:
        house.waiting.close()
        closed.set()

    house.busy = True
    house.waiting.need_helper()
    house.toy.post(close)
    assert closed.wait(SOON_S)
    until(lambda: "cloud-helper" not in {thread.name for thread in threading.enumerate()})


def test_waits_after_close_are_refused_unless_done(house: House) -> None:
    house.waiting.close()
    with pytest.raises(BackendClosed):
        house.drive("a")
    house.done.add("a")
    assert house.drive("a")


# --- signal handlers --------------------------------------------------------------------------------------------------


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_the_wait_of_a_leader(house: House) -> None:
    follower: list[Future[bool]] = []

    def press() -> None:
        until(lambda: house.toy.n_polling == 1)
        follower.append(house.follower("b"))
        ctrl_c()

    house.start("press", wait=lambda: press() is None)
    with pytest.raises(KeyboardInterrupt):
        house.drive("a")
    house.finish("a", "b")
    assert follower[0].result(SOON_S)
    assert house.drive("a"), "the lead was given back"


def test_ctrl_c_ends_the_wait_of_a_follower(house: House) -> None:
    leader = house.leader("lead")

    def press() -> bool:
        until(lambda: len(house.waiting._followers) == 1)
        ctrl_c()
        return True

    house.start("press", wait=press)
    with pytest.raises(KeyboardInterrupt):
        house.drive("a")
    assert not house.waiting._followers
    assert not leader.done()
    house.finish("lead")
    assert leader.result(SOON_S)


def test_ctrl_c_never_falls_between_two_halves_of_an_event(house: House) -> None:
    halves: list[int] = []

    def event() -> None:
        halves.append(1)
        ctrl_c()
        for _ in range(1000):
            time.monotonic()  # a handler that may run does run here
        halves.append(2)

    house.toy.post(event)
    with pytest.raises(KeyboardInterrupt):
        house.drive("a")
    assert halves == [1, 2]


def test_ctrl_c_never_falls_into_a_look_in_passing(house: House) -> None:
    halves: list[int] = []

    def event() -> None:
        halves.append(1)
        ctrl_c()
        for _ in range(1000):
            time.monotonic()
        halves.append(2)

    house.toy.post(event)
    with pytest.raises(KeyboardInterrupt):
        house.waiting.poll_once()
    assert halves == [1, 2]


def test_any_handler_that_raises_ends_the_wait(house: House) -> None:
    class TooLate(Exception):
        pass

    def handle(number: int, frame: Any) -> None:
        raise TooLate

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TooLate):
            house.drive("a")
        assert signal.getsignal(signal.SIGALRM) is handle
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    house.finish("a")
    assert house.drive("a")


def test_a_handler_that_does_not_raise_runs_soon_and_the_wait_goes_on(house: House) -> None:
    handled: list[int] = []

    def handle(number: int, frame: Any) -> None:
        handled.append(number)
        house.finish("a")

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        house.start("press", wait=lambda: until(lambda: house.toy.n_polling == 1) is None and _signal_usr1())
        assert house.drive("a", SOON_S)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [signal.SIGUSR1]


def _signal_usr1() -> bool:
    os.kill(os.getpid(), signal.SIGUSR1)
    return True


def test_handlers_that_raise_leave_no_lead_behind(house: House) -> None:
    """At whatever instruction they fall: between taking the lead and polling, and while it is given back."""

    class Pressed(Exception):
        pass

    armed = False
    n_raised = 0

    def handle(number: int, frame: Any) -> None:
        nonlocal armed, n_raised
        if armed:
            armed = False
            n_raised += 1
            raise Pressed

    def press() -> bool:
        for _ in range(400):
            time.sleep(0.0005)
            os.kill(os.getpid(), signal.SIGUSR2)
        return True

    before = signal.signal(signal.SIGUSR2, handle)
    try:
        presser = house.start("press", wait=press)
        name = 0
        while not presser.done():
            name += 1
            house.finish(name)
            try:
                armed = True
                assert house.drive(name, SOON_S)
                armed = False
            except Pressed:
                assert house.drive(name, SOON_S), "what it waited for is not lost"
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert n_raised > 20
    assert not house.waiting._lead_lock.locked()
