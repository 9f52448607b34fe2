"""Slots shared by several executors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.engine.executor import slots as slots_module
from cloud.engine.executor.setup import WorkerSetup
from cloud.engine.executor.slots import Share, Slots
from tests.unit.served import ServedHouse, eventually


class Member:
    """An executor as the slots see it."""

    def __init__(self, slots: Slots, max_slots: int = 0) -> None:
        self.woken = 0
        self.share: Share = slots.join(self._interrupt, max_slots)

    def _interrupt(self) -> None:
        self.woken += 1

    def take(self, n: int = 1) -> int:
        """Take up to ``n`` as an executor does; how many it got."""
        got = min(n, self.share.free())
        if got:
            self.share.take(got)
            self.share.rotate()
        if got < n:
            self.share.wait()
        return got


def members(n_slots: int, n: int) -> tuple[Slots, list[Member]]:
    slots = Slots(n_slots)
    return slots, [Member(slots) for _ in range(n)]


def test_there_must_be_a_slot() -> None:
    with pytest.raises(ValueError, match="at least 1 worker slot, not 0"):
        Slots(0)


def test_one_alone_may_have_all() -> None:
    slots, (a, b) = members(4, 2)
    assert a.take(9) == 4
    assert b.take() == 0
    assert slots.n_used == 4


def test_a_limit_of_its_own_holds() -> None:
    slots = Slots(4)
    a, b = Member(slots, 1), Member(slots, 9)
    assert (a.share.most, b.share.most) == (1, 4)
    assert a.take(3) == 1
    assert b.take(9) == 3


def test_what_is_given_back_wakes_who_waits() -> None:
    _, (a, b) = members(2, 2)
    a.take(2)
    b.take()
    assert b.woken == 0
    a.share.give(1)
    assert b.woken == 1
    assert a.share.free() == 0  # it is for the one that waits
    assert b.take() == 1


def test_who_comes_new_counts_at_once() -> None:
    _, (a, b) = members(2, 2)
    a.take(3)
    a.share.give(1)  # nobody else was there, so it waits for this one itself
    assert b.take() == 1


def test_who_has_its_share_lets_workers_run_dry_for_others() -> None:
    _, (a, b) = members(4, 2)
    a.take(4)
    assert not a.share.must_yield
    b.take()
    assert a.share.must_yield
    a.share.give(1)
    assert not a.share.must_yield  # the free one is about to be taken
    assert b.take(9) == 1
    assert a.share.must_yield
    a.share.give(1)
    b.take(9)
    assert (a.share.n_used, b.share.n_used) == (2, 2)
    assert not a.share.must_yield
    assert not b.share.must_yield


def test_more_members_than_slots_take_turns() -> None:
    _, waiting = members(2, 5)
    running = [each for each in waiting if each.take()]
    had = {id(each): 1 for each in running}
    for _ in range(23):
        first = running.pop(0)
        assert first.share.must_yield
        first.share.give(1)
        assert first.take() == 0  # others came before
        [following] = [each for each in waiting if each not in running and each is not first and each.take()]
        running.append(following)
        had[id(following)] = had.get(id(following), 0) + 1
    assert sorted(had.values()) == [5, 5, 5, 5, 5]


def test_who_needs_more_than_its_share_gets_it_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (a, b) = members(4, 2)
    a.take(4)
    b.take()
    a.share.give(2)
    assert b.share.free() == 2
    b.share.wait(declined=True)  # its job needs all four
    assert not a.share.must_yield
    monkeypatch.setattr(slots_module, "_PATIENCE_S", -1.0)
    assert a.share.must_yield
    assert a.share.free() == 0
    a.share.give(1)
    assert a.take() == 0
    a.share.give(1)
    assert b.take(4) == 4
    b.share.give(4)
    assert a.take(4) == 4


def test_who_wants_nothing_any_more_holds_nobody_up() -> None:
    _, (a, b) = members(2, 2)
    a.take(2)
    b.take()
    a.share.give(1)
    a.take()
    b.share.content()
    assert a.woken == 1
    assert a.share.free() == 1


def test_who_leaves_gives_all_back() -> None:
    slots, (a, b) = members(2, 2)
    a.take(2)
    b.take()
    a.share.leave()
    a.share.leave()
    assert b.woken
    assert slots.n_used == 0
    a.share.wait()
    b.take(2)
    b.share.give(2)
    assert a.woken == 0  # its descriptor may be another's by now


# --- executors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., ServedHouse]]:
    houses: list[ServedHouse] = []

    def opened(slots: Slots, **options: Any) -> ServedHouse:
        houses.append(ServedHouse(WorkerSetup(str(tmp_path)), slots, **options))
        return houses[-1]

    yield opened
    for house in houses:
        house.engine.close()


def test_executors_never_run_more_jobs_than_there_are_slots(opened: Callable[..., ServedHouse], tmp_path: Path) -> None:
    slots = Slots(2)
    houses = [opened(slots) for _ in range(3)]
    log = tmp_path / "log"

    def mark(path: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"+")
        time.sleep(0.005)
        os.write(fd, b"-")
        os.close(fd)

    jids = [[house.call(mark, str(log), kill_process=n % 7 == 0) for n in range(30)] for house in houses]
    for house, its in zip(houses, jids, strict=True):
        assert house.results(its) == [None] * 30
    running, most = 0, 0
    for sign in log.read_text():
        running += 1 if sign == "+" else -1
        most = max(most, running)
    assert most == 2
    eventually(lambda: slots.n_used == 0, "slots were kept")


def test_a_long_map_of_one_does_not_starve_another(opened: Callable[..., ServedHouse]) -> None:
    slots = Slots(2)
    a, b = opened(slots), opened(slots)
    a.results(a.map(time.sleep, [0.001] * 100))
    long = a.map(time.sleep, [0.001] * 60_000)
    for _ in range(20):
        began = time.monotonic()
        assert b.result(b.call(abs, -2)) == 2
        assert time.monotonic() - began < 5.0
    assert a.engine.statuses(long[-1:])[0] < 3
    a.engine.cancel(None)


def test_a_freed_slot_reaches_who_waits(opened: Callable[..., ServedHouse], tmp_path: Path) -> None:
    slots = Slots(1)
    a, b = opened(slots), opened(slots)
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def held(path: str) -> None:
        open(path).close()

    first = a.call(held, str(gate))
    eventually(lambda: a.engine.statuses((first,))[0] == 2, "the first job did not begin")
    waiting = b.call(os.getpid)
    assert b.engine.wait((waiting,), 0.2) == [waiting]
    # Nobody calls into the second one from now on but its own helper.
    open(gate, "w").close()
    eventually(lambda: b.engine.store.locate(waiting)[0].states[0] == 3, "the freed slot reached nobody")


def test_a_job_killed_while_it_waits_for_a_slot_holds_nobody_up(
    opened: Callable[..., ServedHouse], tmp_path: Path
) -> None:
    slots = Slots(1)
    a, b = opened(slots), opened(slots)
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def held(path: str) -> None:
        open(path).close()

    first = a.call(held, str(gate))
    eventually(lambda: a.engine.statuses((first,))[0] == 2, "the first job did not begin")
    b.engine.cancel([b.call(os.getpid)])
    open(gate, "w").close()
    assert a.result(first) is None
    assert a.results([a.call(abs, -3) for _ in range(50)]) == [3] * 50


def test_a_closed_executor_frees_its_slots(opened: Callable[..., ServedHouse], tmp_path: Path) -> None:
    slots = Slots(1)
    a, b = opened(slots), opened(slots)
    a.call(time.sleep, 60)
    waiting = b.call(os.getpid)
    a.engine.close()
    assert b.result(waiting)


def test_many_cores_are_had_at_last_under_the_load_of_another(opened: Callable[..., ServedHouse]) -> None:
    slots = Slots(2)
    a, b = opened(slots), opened(slots)
    load = a.map(time.sleep, [0.02] * 400)
    a.engine.wait(load[:1], 10.0)
    wide = b.call(os.getpid, cores=2)
    assert b.result(wide)
    assert a.engine.statuses(load[-1:])[0] < 3
    a.engine.cancel(None)


def test_a_quota_bounds_the_jobs_of_an_executor(opened: Callable[..., ServedHouse]) -> None:
    slots = Slots(2)
    a = opened(slots, max_slots=1)
    assert a.executor.n_slots == 1
    assert len(set(a.results([a.call(os.getpid) for _ in range(20)]))) == 1
