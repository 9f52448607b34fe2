"""`cloud.cron` and what it stands on: the store, the runner, the service."""

from __future__ import annotations

import builtins
import functools
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloud.errors import BackendError, CronError, CronNotFound, InvalidSchedule
from cloud.resources import cron_runner
from cloud.resources.crons import (
    CronEntry,
    CronRunner,
    CronService,
    CronStore,
    MissedPolicy,
    OverlapPolicy,
)
from cloud.resources.schedule import Schedule

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
START = datetime(2024, 7, 1, 10, 0, 30, tzinfo=UTC)


class Clock:
    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


class Jobs:
    """Stands for the client: hands out jids, remembers what was submitted and what is finished."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, bytes]] = []
        self.finished: set[int] = set()
        self.killed: list[int] = []

    def submit(self, entry: CronEntry) -> int:
        self.submitted.append((entry.label, entry.payload))
        return len(self.submitted)

    def is_finished(self, jid: int) -> bool:
        return jid in self.finished

    def kill(self, jid: int) -> None:
        self.killed.append(jid)
        self.finished.add(jid)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[CronStore]:
    with closing(CronStore(str(tmp_path / "data"), clock)) as store:
        yield store


@pytest.fixture
def run_with(store: CronStore, jobs: Jobs, clock: Clock) -> Iterator[Callable[..., CronRunner]]:
    """Make runners over `store` that differ from the usual one in the arguments given."""
    with ExitStack() as stack:

        def make(**more: Any) -> CronRunner:
            given = {"submit": jobs.submit, "is_finished": jobs.is_finished, "clock": clock, **more}
            return stack.enter_context(closing(CronRunner(store, **given)))

        yield make


@pytest.fixture
def runner(run_with: Callable[..., CronRunner], jobs: Jobs) -> CronRunner:
    return run_with(kill=jobs.kill)


def add(store: CronStore, label: str = "a", spec: str = "* * * * *", tz: str = "UTC", **more: Any) -> CronEntry:
    more = {"options": {}, "func_name": "f", "overlap": OverlapPolicy.ALLOW, **more}
    return store.register(label, Schedule(spec, tz), more.pop("payload", b"call"), **more)


def slot(minute: int, hour: int = 10) -> datetime:
    return datetime(2024, 7, 1, hour, minute, tzinfo=UTC)


class TestStore:
    def test_reads_create_nothing(self, store: CronStore) -> None:
        assert store.list() == store.positions() == []
        for unknown in (store.get, store.deregister):
            with pytest.raises(CronNotFound, match="no cron is registered as 'a'"):
                unknown("a")
        assert not Path(store.home).exists()

    def test_an_entry_comes_back_as_it_went_in(self, store: CronStore) -> None:
        entry = add(
            store,
            "nightly",
            "0 2 * * mon",
            "Europe/Berlin",
            payload=b"\0\xff",
            options={"_priority": 3, "_os_env_vars": {"A": "1"}},
            func_name="backup",
            missed=MissedPolicy.RUN_ALL,
            overlap=OverlapPolicy.KILL_PREVIOUS,
        )
        with closing(CronStore(store.home, store.clock)) as again:
            assert again.get("nightly") == entry
        assert (entry.label, entry.schedule, entry.tz) == ("nightly", "0 2 * * mon", "Europe/Berlin")
        assert (entry.payload, entry.func_name) == (b"\0\xff", "backup")
        assert entry.options == {"_priority": 3, "_os_env_vars": {"A": "1"}}
        assert (entry.missed, entry.overlap) == (MissedPolicy.RUN_ALL, OverlapPolicy.KILL_PREVIOUS)
        assert (entry.created, entry.creator_host) == (START, os.uname().nodename)
        assert entry.last_run is entry.last_jid is None

    def test_entries_are_sorted_by_label(self, store: CronStore) -> None:
        for label in "cab":
            add(store, label)
        assert [entry.label for entry in store.list()] == ["a", "b", "c"]

    def test_files_are_private(self, store: CronStore) -> None:
        add(store)
        assert stat.S_IMODE(os.stat(store.home).st_mode) == 0o700
        for path in Path(store.home).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

    def test_registering_again_replaces(self, store: CronStore, clock: Clock) -> None:
        first = add(store, payload=b"old", options={"_cores": 2})
        store.record_run("a", 7, START)
        clock.now += HOUR
        second = add(store, spec="0 0 * * *", payload=b"new")
        assert [store.get("a")] == store.list() == [second]
        assert (second.payload, second.options, second.created) == (b"new", {}, START + HOUR)
        assert (second.last_jid, second.last_run) == (7, START)
        assert second.id != first.id

    def test_options_must_be_json(self, store: CronStore) -> None:
        with pytest.raises(TypeError):
            add(store, options={"_type": object()})
        assert store.list() == []

    def test_deregister(self, store: CronStore) -> None:
        add(store, "a")
        add(store, "b")
        store.deregister("a")
        assert [entry.label for entry in store.list()] == ["b"]
        with pytest.raises(CronNotFound):
            store.deregister("a")

    def test_a_claim_succeeds_once(self, store: CronStore) -> None:
        add(store)
        (position,) = store.positions()
        won: list[CronEntry | None] = []
        threads = [threading.Thread(target=lambda: won.append(store.claim(position, slot(1)))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(entry is not None for entry in won) == 1
        assert store.positions()[0].claimed == slot(1)

    def test_a_claim_on_a_replaced_entry_fails(self, store: CronStore) -> None:
        add(store)
        (position,) = store.positions()
        add(store, payload=b"new")
        assert store.claim(position, slot(1)) is None
        assert store.positions()[0].claimed == START

    def test_remembered_slots_are_bounded(self, store: CronStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cloud.resources.cron_store._N_SLOTS_KEPT", 3)
        add(store)
        for minute in range(1, 9):
            (position,) = store.positions()
            assert store.claim(position, slot(minute))
        with sqlite3.connect(os.path.join(store.home, "crons.sqlite3")) as db:
            assert db.execute("SELECT count(*) FROM slot").fetchone() == (3,)
        db.close()

    def test_a_record_for_a_label_that_is_gone_changes_nothing(self, store: CronStore) -> None:
        add(store, "b")
        store.record_run("a", 1, START, "me")
        store.record_end("a", 1, "me")
        assert [entry.last_jid for entry in store.list()] == [None]

    def test_an_end_counts_for_its_own_run_only(self, store: CronStore) -> None:
        add(store)
        store.record_run("a", 1, START, "me")
        store.record_run("a", 2, START, "you")
        store.record_end("a", 1, "me")
        assert (store.get("a").runner, store.get("a").runner_jid) == ("you", 2)
        store.record_end("a", 2, "you")
        assert (store.get("a").runner, store.get("a").runner_jid, store.get("a").last_jid) == (None, None, 2)

    @pytest.mark.parametrize("where", [0, 4096])
    def test_a_damaged_file_is_a_clear_error(self, store: CronStore, where: int) -> None:
        for n in range(20):
            add(store, f"a{n}", payload=b"x" * 1000)
        path = Path(store.home, "crons.sqlite3")
        content = bytearray(path.read_bytes())
        content[where : where + 6000] = b"\xab" * 6000
        path.write_bytes(content)
        fresh = CronStore(store.home, store.clock)
        for use in (fresh.list, lambda: fresh.get("a1"), lambda: add(fresh, "a1"), lambda: fresh.deregister("a1")):
            with pytest.raises(BackendError, match=r"crons\.sqlite3 .*(damaged|malformed)") as caught:
                use()
            assert caught.value.hint

    def test_a_file_of_a_newer_version_is_refused(self, store: CronStore) -> None:
        add(store)
        with sqlite3.connect(os.path.join(store.home, "crons.sqlite3")) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
        with pytest.raises(BackendError, match="version 99"):
            CronStore(store.home, store.clock).list()

    def test_a_forked_child_uses_the_store_too(self, store: CronStore) -> None:
        add(store, "parent")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                add(store, "child")
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert [entry.label for entry in store.list()] == ["child", "parent"]


class TestFiring:
    def test_a_slot_is_fired_once(self, store: CronStore, runner: CronRunner, jobs: Jobs) -> None:
        add(store, payload=b"bytes")
        assert runner.fire_due(START) == []
        assert runner.fire_due(slot(1)) == [("a", slot(1), 1)]
        assert runner.fire_due(slot(1)) == runner.fire_due(slot(1) + timedelta(seconds=59)) == []
        assert jobs.submitted == [("a", b"bytes")]
        entry = store.get("a")
        assert (entry.last_run, entry.last_jid) == (slot(1), 1)

    def test_a_slot_at_the_time_of_registration_is_past(
        self, store: CronStore, runner: CronRunner, clock: Clock
    ) -> None:
        clock.now = slot(0)
        add(store)
        assert runner.fire_due(slot(0)) == []
        assert [firing.slot for firing in runner.fire_due(slot(1))] == [slot(1)]

    def test_next_due(self, store: CronStore, runner: CronRunner) -> None:
        assert runner.next_due(START) is None
        add(store, "hourly", "0 * * * *")
        add(store, "often", "*/5 * * * *")
        assert runner.next_due(START) == slot(5)
        assert runner.next_due(slot(7)) == slot(5)  # overdue
        runner.fire_due(slot(7))
        assert runner.next_due(slot(7)) == slot(10)

    def test_a_day_of_crons_on_a_virtual_clock(self, store: CronStore, runner: CronRunner, clock: Clock) -> None:
        add(store, "hourly", "0 * * * *")
        add(store, "berlin", "30 2 * * *", "Europe/Berlin")
        add(store, "n/s", "7/20 12-13 * * *")
        fired, end = [], START + timedelta(hours=24)
        while (due := runner.next_due(clock())) is not None and due <= end:
            clock.now = due
            fired += runner.fire_due(due)
        schedules = {entry.label: Schedule(entry.schedule, entry.tz) for entry in store.list()}
        expected = {(label, at) for label, schedule in schedules.items() for at in schedule.between(START, end)}
        assert Counter((firing.label, firing.slot) for firing in fired) == Counter(expected)
        assert len(expected) == 24 + 1 + 6
        assert [firing.slot for firing in fired] == sorted(firing.slot for firing in fired)

    @pytest.mark.parametrize(
        ("tz", "day", "hours"),
        [
            ("Europe/Berlin", datetime(2024, 3, 31, tzinfo=UTC), [1.5]),
            ("Europe/Berlin", datetime(2024, 10, 27, tzinfo=UTC), [0.5]),
            ("America/New_York", datetime(2024, 3, 10, tzinfo=UTC), [7.5]),
            ("America/New_York", datetime(2024, 11, 3, tzinfo=UTC), [7.5]),
        ],
    )
    def test_clock_changes_fire_once(
        self,
        store: CronStore,
        runner: CronRunner,
        clock: Clock,
        tz: str,
        day: datetime,
        hours: builtins.list[float],
    ) -> None:
        clock.now = day
        add(store, "a", "30 2 * * *", tz)
        fired = [firing for n in range(24 * 6) for firing in runner.fire_due(day + n * timedelta(minutes=10))]
        assert [firing.slot for firing in fired] == [day + timedelta(hours=n) for n in hours]

    def test_a_raising_submit_is_logged_and_stops_nothing(
        self, store: CronStore, jobs: Jobs, caplog: pytest.LogCaptureFixture, run_with: Callable[..., CronRunner]
    ) -> None:
        def submit(entry: CronEntry) -> int:
            if entry.label == "bad":
                raise RuntimeError("no workers")
            return jobs.submit(entry)

        for label in ("apple", "bad", "cherry"):
            add(store, label)
        runner = run_with(submit=submit)
        assert [firing.label for firing in runner.fire_due(slot(1))] == ["apple", "cherry"]
        assert [firing.label for firing in runner.fire_due(slot(2))] == ["apple", "cherry"]
        assert "cron 'bad': the slot of 2024-07-01 10:01:00+00:00 could not be submitted" in caplog.text
        assert "no workers" in caplog.text
        assert store.get("bad").last_jid is None

    def test_an_entry_that_cannot_be_understood_here_stops_nothing(
        self, store: CronStore, runner: CronRunner, caplog: pytest.LogCaptureFixture
    ) -> None:
        add(store, "a")
        add(store, "b")
        with sqlite3.connect(os.path.join(store.home, "crons.sqlite3")) as db:
            db.execute("UPDATE cron SET tz = 'Mars/Olympus' WHERE label = 'a'")
        db.close()
        assert [firing.label for firing in runner.fire_due(slot(1))] == ["b"]
        assert runner.next_due(slot(1)) == slot(2)
        assert caplog.text.count("cron 'a' is not run: Invalid tz 'Mars/Olympus'") == 1

    def test_run_now(self, store: CronStore, runner: CronRunner, jobs: Jobs, clock: Clock) -> None:
        add(store, payload=b"bytes")
        clock.now += timedelta(seconds=5)
        assert runner.run_now("a") == 1
        assert jobs.submitted == [("a", b"bytes")]
        assert (store.get("a").last_jid, store.get("a").last_run) == (1, clock.now)
        assert len(runner.fire_due(slot(1))) == 1
        with pytest.raises(CronNotFound):
            runner.run_now("b")

    def test_an_unusable_store_is_told(self, store: CronStore, runner: CronRunner) -> None:
        add(store)
        Path(store.home, "crons.sqlite3").write_bytes(b"not a database" * 100)
        for use in (runner.fire_due, runner.next_due):
            with pytest.raises(BackendError):
                use(slot(1))
        with pytest.raises(BackendError):
            runner.run(threading.Event())


class TestMissed:
    LATE = slot(5) + timedelta(seconds=59)

    @pytest.mark.parametrize(
        ("missed", "minutes"),
        [
            (MissedPolicy.SKIP, [5]),
            (MissedPolicy.RUN_ONCE, [5]),
            (MissedPolicy.RUN_ALL, [1, 2, 3, 4, 5]),
        ],
    )
    def test_after_a_pause_with_a_slot_just_due(
        self, store: CronStore, runner: CronRunner, missed: MissedPolicy, minutes: builtins.list[int]
    ) -> None:
        add(store, missed=missed)
        assert [firing.slot for firing in runner.fire_due(self.LATE)] == [slot(minute) for minute in minutes]
        assert runner.fire_due(self.LATE) == []

    @pytest.mark.parametrize(
        ("missed", "minutes"),
        [(MissedPolicy.SKIP, []), (MissedPolicy.RUN_ONCE, [20]), (MissedPolicy.RUN_ALL, [10, 20])],
    )
    def test_after_a_pause_with_all_slots_long_past(
        self, store: CronStore, runner: CronRunner, missed: MissedPolicy, minutes: builtins.list[int]
    ) -> None:
        add(store, spec="*/10 * * * *", missed=missed)
        assert [firing.slot for firing in runner.fire_due(slot(25))] == [slot(minute) for minute in minutes]
        assert [firing.slot for firing in runner.fire_due(slot(30))] == [slot(30)]

    def test_a_year_of_missed_minutes_costs_one_run(self, store: CronStore, runner: CronRunner) -> None:
        add(store)
        began = time.perf_counter()
        assert len(runner.fire_due(START + timedelta(days=365))) == 1
        assert time.perf_counter() - began < 1

    def test_entries_take_turns(self, store: CronStore, runner: CronRunner) -> None:
        add(store, "a", missed=MissedPolicy.RUN_ALL)
        add(store, "b", "3 * * * *")
        fired = [(firing.label, firing.slot.minute) for firing in runner.fire_due(slot(3))]
        assert fired == [("a", 1), ("b", 3), ("a", 2), ("a", 3)]

    def test_registering_the_same_again_keeps_the_slots_that_wait(
        self, store: CronStore, runner: CronRunner, jobs: Jobs, clock: Clock
    ) -> None:
        add(store, "same", "30 10 * * *", payload=b"old")
        add(store, "other", "30 10 * * *")
        clock.now = slot(0, hour=12)
        add(store, "same", "30 10 * * *", payload=b"new")
        add(store, "other", "31 10 * * *")
        assert runner.fire_due(clock.now) == [("same", slot(30), 1)]
        assert jobs.submitted == [("same", b"new")]


class TestOverlap:
    def test_allow(self, store: CronStore, runner: CronRunner) -> None:
        add(store, overlap=OverlapPolicy.ALLOW)
        assert [len(runner.fire_due(slot(minute))) for minute in (1, 2, 3)] == [1, 1, 1]

    def test_skip(self, store: CronStore, runner: CronRunner, jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
        add(store, overlap=OverlapPolicy.SKIP)
        assert len(runner.fire_due(slot(1))) == 1
        assert runner.fire_due(slot(2)) == []
        assert "cron 'a': the slot of 2024-07-01 10:02:00+00:00 is skipped, its last run is unfinished" in caplog.text
        jobs.finished.add(1)
        assert runner.fire_due(slot(2) + timedelta(seconds=30)) == []  # gone for good
        assert runner.fire_due(slot(3)) == [("a", slot(3), 2)]

    def test_kill_previous(self, store: CronStore, runner: CronRunner, jobs: Jobs) -> None:
        add(store, overlap=OverlapPolicy.KILL_PREVIOUS)
        assert [len(runner.fire_due(slot(minute))) for minute in (1, 2)] == [1, 1]
        assert jobs.killed == [1]
        jobs.finished.add(2)
        runner.fire_due(slot(3))
        assert jobs.killed == [1]

    def test_kill_of_a_job_that_is_gone(self, store: CronStore, run_with: Callable[..., CronRunner]) -> None:
        def kill(jid: int) -> None:
            raise LookupError(jid)

        runner = run_with(kill=kill)
        add(store, overlap=OverlapPolicy.KILL_PREVIOUS)
        assert [len(runner.fire_due(slot(minute))) for minute in (1, 2)] == [1, 1]

    def test_without_kill_the_slot_is_skipped(self, store: CronStore, run_with: Callable[..., CronRunner]) -> None:
        runner = run_with()
        add(store, overlap=OverlapPolicy.KILL_PREVIOUS)
        assert [len(runner.fire_due(slot(minute))) for minute in (1, 2)] == [1, 0]

    def test_a_manual_run_counts(self, store: CronStore, runner: CronRunner, jobs: Jobs) -> None:
        add(store, overlap=OverlapPolicy.SKIP)
        runner.run_now("a")
        assert runner.fire_due(slot(1)) == []
        jobs.finished.add(1)
        assert len(runner.fire_due(slot(2))) == 1

    def test_missed_slots_of_run_all_are_run_beside_each_other(self, store: CronStore, runner: CronRunner) -> None:
        add(store, "a", "*/10 * * * *", missed=MissedPolicy.RUN_ALL, overlap=OverlapPolicy.SKIP)
        assert [firing.slot.minute for firing in runner.fire_due(slot(35))] == [10, 20, 30]
        assert runner.fire_due(slot(40)) == []

    def test_entries_do_not_wait_for_each_other(self, store: CronStore, runner: CronRunner) -> None:
        add(store, "a", overlap=OverlapPolicy.SKIP)
        add(store, "b", "2 * * * *", overlap=OverlapPolicy.SKIP)
        assert [firing.label for minute in (1, 2) for firing in runner.fire_due(slot(minute))] == ["a", "b"]

    @pytest.mark.parametrize("error", [LookupError("purged"), RuntimeError("server is down")])
    def test_a_job_that_cannot_be_looked_up_counts_as_finished(
        self, store: CronStore, error: Exception, run_with: Callable[..., CronRunner]
    ) -> None:
        def is_finished(jid: int) -> bool:
            raise error

        runner = run_with(is_finished=is_finished)
        add(store, overlap=OverlapPolicy.SKIP)
        assert [len(runner.fire_due(slot(minute))) for minute in (1, 2)] == [1, 1]

    def test_a_runner_of_the_same_owner_looks_the_job_up(
        self, store: CronStore, jobs: Jobs, run_with: Callable[..., CronRunner]
    ) -> None:
        # A server that was started anew over jobs that went on.
        add(store, overlap=OverlapPolicy.SKIP)
        first, second = (run_with(owner="server") for _ in range(2))
        assert len(first.fire_due(slot(1))) == 1
        assert second.fire_due(slot(2)) == []
        jobs.finished.add(1)
        assert len(second.fire_due(slot(3))) == 1
        assert not Path(store.home, "cron-runners").exists()

    def test_another_runners_job_counts_until_it_ends(
        self, store: CronStore, jobs: Jobs, run_with: Callable[..., CronRunner]
    ) -> None:
        add(store, overlap=OverlapPolicy.SKIP)
        theirs = Jobs()
        # To the other runner, jid 1 is a finished job of its own.
        jobs.finished.add(1)
        mine, other = (run_with(submit=each.submit, is_finished=each.is_finished) for each in (jobs, theirs))
        assert len(other.fire_due(slot(1))) == 1
        assert mine.fire_due(slot(2)) == []
        theirs.finished.add(1)
        assert other.fire_due(slot(2)) == []
        assert len(mine.fire_due(slot(3))) == 1

    def test_a_closed_runners_job_does_not_count(self, store: CronStore, run_with: Callable[..., CronRunner]) -> None:
        add(store, overlap=OverlapPolicy.SKIP)
        mine, other = (run_with() for _ in range(2))
        assert len(other.fire_due(slot(1))) == 1
        other.close()
        other.close()
        assert len(mine.fire_due(slot(2))) == 1
        mine.close()
        assert list(Path(store.home, "cron-runners").iterdir()) == []

    def test_a_forked_child_has_no_runs_and_leaves_the_parents_alone(
        self, store: CronStore, runner: CronRunner, run_with: Callable[..., CronRunner]
    ) -> None:
        add(store, "a", overlap=OverlapPolicy.SKIP)
        runner.fire_due(slot(1))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                runner.close()
                # The parent's run is another process's here: it lives, so this slot is skipped.
                assert runner.fire_due(slot(2)) == []
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        other = run_with(is_finished=lambda jid: True)
        assert other.fire_due(slot(3)) == []


class TestClockSet:
    def test_back_by_a_little_is_waited_out(self, store: CronStore, runner: CronRunner) -> None:
        add(store)
        assert len(runner.fire_due(slot(30))) == 1
        assert runner.fire_due(slot(10)) == []
        assert runner.next_due(slot(10)) == slot(31)
        assert len(runner.fire_due(slot(31))) == 1

    def test_back_by_years_goes_on_at_once_and_doubles_nothing(self, store: CronStore, runner: CronRunner) -> None:
        add(store)
        assert len(runner.fire_due(slot(1))) == 1
        assert len(runner.fire_due(slot(2))) == 1
        wrong = slot(3) + timedelta(days=3000)
        assert len(runner.fire_due(wrong)) == 1
        fired = [
            firing.slot for n in range(0, 300, 20) for firing in runner.fire_due(slot(1) + n * timedelta(seconds=1))
        ]
        assert fired == [slot(3), slot(4), slot(5)]
        due = runner.next_due(slot(5))
        assert due == slot(6)

    def test_forward_makes_slots_missed(self, store: CronStore, runner: CronRunner) -> None:
        add(store, spec="0 * * * *", missed=MissedPolicy.SKIP)
        assert runner.fire_due(slot(30) + timedelta(days=30)) == []
        assert len(runner.fire_due(slot(0, 11) + timedelta(days=30))) == 1


class TestLoop:
    @pytest.fixture
    def live(self, tmp_path: Path) -> Iterator[SimpleNamespace]:
        """A runner that loops in a thread, on a clock that starts 0.6 s before a minute."""
        began = time.monotonic()

        def now() -> datetime:
            return slot(0) + timedelta(seconds=time.monotonic() - began - 0.6)

        fired: list[tuple[str, datetime]] = []
        event, stop = threading.Event(), threading.Event()

        def submit(entry: CronEntry) -> int:
            fired.append((entry.label, now()))
            event.set()
            return len(fired)

        store = CronStore(str(tmp_path / "data"), now)
        runner = CronRunner(store, submit, lambda jid: True, now)
        thread = threading.Thread(target=runner.run, args=(stop,))
        live = SimpleNamespace(store=store, runner=runner, fired=fired, event=event, stop=stop, thread=thread, now=now)
        yield live
        stop.set()
        if thread.ident:
            thread.join(5)
            assert not thread.is_alive()
        store.close()

    def test_wakes_at_the_slot(self, live: SimpleNamespace) -> None:
        add(live.store)
        live.thread.start()
        assert live.event.wait(5)
        assert slot(0) <= live.fired[0][1] < slot(0) + timedelta(seconds=0.4)

    def test_sees_what_another_process_registers(self, live: SimpleNamespace) -> None:
        live.thread.start()
        code = (
            "import sys; from datetime import datetime\n"
            "from cloud.resources.crons import CronStore; from cloud.resources.schedule import Schedule\n"
            "now = datetime.fromisoformat(sys.argv[2])\n"
            "CronStore(sys.argv[1], lambda: now).register('x', Schedule('* * * * *'), b'', options={}, func_name='f')"
        )
        before = live.now() - MINUTE
        subprocess.run([sys.executable, "-c", code, live.store.home, before.isoformat()], check=True)
        registered = live.now()
        assert live.event.wait(5)
        label, at = live.fired[0]
        assert label == "x"
        assert at - registered < timedelta(seconds=1)

    def test_stops_at_once_also_amid_a_backlog(self, live: SimpleNamespace) -> None:
        add(live.store, missed=MissedPolicy.RUN_ALL)
        with sqlite3.connect(os.path.join(live.store.home, "crons.sqlite3")) as db:
            db.execute("UPDATE cron SET claimed = claimed - 86400 * 1000000 * 100")
        db.close()
        live.thread.start()
        assert live.event.wait(5)
        live.stop.set()
        live.thread.join(1)
        assert not live.thread.is_alive()

    def test_survives_a_store_that_fails_for_a_while(
        self, live: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(cron_runner, "_ERROR_WAIT_S", 0.01)
        add(live.store)
        real, n_calls = live.store.positions, 0

        def positions() -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls == 2:
                raise BackendError("locked")
            if n_calls == 3:
                raise OSError(28, "No space left on device")
            return real()

        monkeypatch.setattr(live.store, "positions", positions)
        live.thread.start()
        assert live.event.wait(5)
        assert caplog.text.count("trying again") == 2

    def test_is_idle_when_nothing_is_due(self, live: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        add(live.store, spec="30 * * * *")
        real, n_calls = live.store.positions, 0

        def positions() -> Any:
            nonlocal n_calls
            n_calls += 1
            return real()

        monkeypatch.setattr(live.store, "positions", positions)
        live.thread.start()
        live.thread.join(0.7)
        assert 1 < n_calls <= 7


RUNNER = """
import os, sys, threading, time
from datetime import datetime, timedelta
from cloud.resources.crons import CronRunner, CronStore

home, log, start, speed, n_virtual_s = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
log = os.open(log, os.O_WRONLY | os.O_APPEND)
print("ready", flush=True)
began = float(sys.stdin.readline())

def now():
    return datetime.fromtimestamp(start + (time.time() - began) * speed, tz=__import__("datetime").timezone.utc)

class Store(CronStore):
    def claim(self, position, slot):
        self.slot = slot
        return super().claim(position, slot)

store, jids = Store(home, now), iter(range(1, 10**9))

def submit(entry):
    os.write(log, f"{entry.label} {store.slot.isoformat()} {os.getpid()}\\n".encode())
    return next(jids)

stop = threading.Event()
threading.Timer(n_virtual_s / speed - (time.time() - began), stop.set).start()
CronRunner(store, submit, lambda jid: True, now).run(stop)
"""


class Fleet:
    """Real processes that run runners over one home, on one clock 3,600 times as fast as the real one."""

    SPEED = 3600.0
    HOURS = 1.0

    def __init__(self, tmp_path: Path) -> None:
        self.home, self.log = tmp_path / "data", tmp_path / "log"
        self.log.touch()
        self.processes: list[subprocess.Popen[str]] = []
        self.began: float | None = None
        self.end = START + timedelta(hours=self.HOURS)
        self.store = CronStore(str(self.home), Clock())
        for label, spec in (("each", "* * * * *"), ("third", "*/3 * * * *"), ("steps", "4/7 * * * *")):
            add(self.store, label, spec, missed=MissedPolicy.RUN_ALL)

    def spawn(self, n: int) -> None:
        arguments = [self.home, self.log, START.timestamp(), self.SPEED, self.HOURS * 3600]
        new = [
            subprocess.Popen(
                [sys.executable, "-c", RUNNER, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(n)
        ]
        self.processes += new
        for process in new:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        self.began = self.began or time.time()
        for process in new:
            assert process.stdin is not None
            process.stdin.write(f"{self.began}\n")
            process.stdin.flush()

    def wait_for_lines(self, n: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.lines()) < n:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()]

    def finish(self) -> Counter[tuple[str, datetime]]:
        """Wait for the processes, run what they left, and count each slot that was run."""
        for process in self.processes:
            process.communicate(timeout=30)
        with closing(self.store):
            rest = CronRunner(self.store, lambda entry: 1, lambda jid: True, Clock()).fire_due(self.end)
        ran = [(label, datetime.fromisoformat(at)) for label, at, _ in self.lines()]
        return Counter(ran + [(firing.label, firing.slot) for firing in rest])

    def expected(self) -> Counter[tuple[str, datetime]]:
        schedules = {entry.label: Schedule(entry.schedule) for entry in self.store.list()}
        return Counter((label, at) for label, schedule in schedules.items() for at in schedule.between(START, self.end))


class TestProcesses:
    @pytest.mark.parametrize("n", [2, 8])
    def test_each_slot_is_fired_exactly_once(self, tmp_path: Path, n: int) -> None:
        fleet = Fleet(tmp_path)
        fleet.spawn(n)
        assert fleet.finish() == fleet.expected()
        assert [process.returncode for process in fleet.processes] == [0] * n
        assert len({pid for _, _, pid in fleet.lines()}) > 1

    def test_killed_runners_lose_at_most_the_slot_they_had_claimed(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path)
        fleet.spawn(3)
        for n_killed in range(3):
            fleet.wait_for_lines(12 * (n_killed + 1))
            fleet.processes[n_killed].kill()
        fleet.spawn(1)
        counts = fleet.finish()
        assert max(counts.values()) == 1
        assert not counts - fleet.expected()
        assert sum((fleet.expected() - counts).values()) <= 3
        assert [process.returncode for process in fleet.processes] == [-signal.SIGKILL] * 3 + [0]

    def test_a_slot_is_lost_not_doubled_when_its_runner_dies_between_claim_and_submit(
        self, store: CronStore, runner: CronRunner
    ) -> None:
        add(store)
        code = (
            "import os, signal, sys; from datetime import datetime\n"
            "from cloud.resources.crons import CronRunner, CronStore\n"
            "at = datetime.fromisoformat(sys.argv[2]); store = CronStore(sys.argv[1], lambda: at)\n"
            "die = lambda entry: os.kill(os.getpid(), signal.SIGKILL)\n"
            "CronRunner(store, die, lambda jid: True, lambda: at).fire_due(at)"
        )
        command = [sys.executable, "-c", code, store.home, slot(1).isoformat()]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert runner.fire_due(slot(1)) == []
        assert [firing.slot for firing in runner.fire_due(slot(2))] == [slot(2)]

    def test_a_run_counts_until_its_process_is_killed(
        self, store: CronStore, run_with: Callable[..., CronRunner]
    ) -> None:
        add(store, overlap=OverlapPolicy.SKIP)
        code = (
            "import sys; from datetime import datetime; from cloud.resources.crons import CronRunner, CronStore\n"
            "at = datetime.fromisoformat(sys.argv[2]); store = CronStore(sys.argv[1], lambda: at)\n"
            "runner = CronRunner(store, lambda entry: 1, lambda jid: False, lambda: at)\n"
            "print(len(runner.fire_due(at)), flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, store.home, slot(1).isoformat()]
        runner = run_with()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"1\n"
            assert runner.fire_due(slot(2)) == []
            process.kill()
            process.wait()
        assert len(runner.fire_due(slot(3))) == 1
        (mine,) = Path(store.home, "cron-runners").iterdir()
        assert mine.name.startswith(f"{os.getpid()}-")
        runner.close()


def required(a: int, b: int) -> None: ...


def plain() -> int:
    return 42


class TestFace:
    @pytest.fixture
    def cron(self, store: CronStore, runner: CronRunner, monkeypatch: pytest.MonkeyPatch) -> Any:
        from cloud import cron

        def dumps(func: Callable[..., Any], reserved: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
            if not isinstance(reserved.get("_restartable", True), bool):
                raise TypeError("_restartable must be a bool")
            return repr(func).encode(), reserved

        service = CronService(store, runner, dumps)
        monkeypatch.setattr(cron.current, "resources", lambda: SimpleNamespace(crons=service))
        return cron

    def test_register_list_info_deregister(self, cron: Any, store: CronStore) -> None:
        assert cron.list() == []
        assert cron.register(plain, "b", ["0", 9, "*", "*", "mon"], tz="Europe/Berlin", _priority=2) is None
        assert cron.register(lambda: 1, "a", "*/5 * * * *", overlap="allow", missed=MissedPolicy.SKIP) is None
        assert cron.list() == ["a", "b"]
        assert cron.info("b") == {
            "label": "b",
            "schedule": "0 9 * * mon",
            "tz": "Europe/Berlin",
            "missed": "run_once",
            "overlap": "skip",
            "func_name": "plain",
            "funcname": "plain",
            "created": START,
            "creator_host": os.uname().nodename,
            "last_run": None,
            "last_jid": None,
            "next_run": datetime(2024, 7, 8, 7, tzinfo=UTC),
        }
        assert cron.info("a")["func_name"] == "<lambda>"
        assert store.get("b").options == {"_priority": 2}
        assert (store.get("a").missed, store.get("a").overlap) == (MissedPolicy.SKIP, OverlapPolicy.ALLOW)
        assert cron.deregister("a") is None
        assert cron.list() == ["b"]

    def test_manual_run(self, cron: Any, jobs: Jobs) -> None:
        cron.register(plain, "a", "0 0 1 1 *")
        assert cron.manual_run("a") == 1
        assert jobs.submitted[0][0] == "a"
        assert (cron.info("a")["last_jid"], cron.info("a")["last_run"]) == (1, START)

    @pytest.mark.parametrize("verb", ["info", "deregister", "manual_run"])
    def test_unknown_labels(self, cron: Any, verb: str) -> None:
        with pytest.raises(CronNotFound, match="no cron is registered as 'nope'") as caught:
            getattr(cron, verb)("nope")
        assert isinstance(caught.value, CronError)
        assert isinstance(caught.value, LookupError)

    @pytest.mark.parametrize("label", ["", "café", b"a", 5, None])
    def test_bad_labels(self, cron: Any, label: Any) -> None:
        for use in (
            lambda: cron.register(plain, label, "* * * * *"),
            lambda: cron.info(label),
            lambda: cron.deregister(label),
            lambda: cron.manual_run(label),
        ):
            with pytest.raises(TypeError, match="label must be a non-empty ASCII str"):
                use()

    @pytest.mark.parametrize("func", [5, None, "plain"])
    def test_not_callable(self, cron: Any, func: Any) -> None:
        with pytest.raises(TypeError, match="not callable"):
            cron.register(func, "a", "* * * * *")

    @pytest.mark.parametrize(
        ("func", "n"),
        [
            (required, 2),
            (lambda x: x, 1),
            (lambda *, x: x, 1),
            (functools.partial(required, 1), 1),
            (Clock.__call__, 1),
            (Fleet, 1),
        ],
    )
    def test_functions_with_required_arguments(self, cron: Any, func: Any, n: int) -> None:
        with pytest.raises(ValueError, match=rf"cron functions must have 0 \(required\) arguments\..* requires {n}"):
            cron.register(func, "a", "* * * * *")
        assert cron.list() == []

    @pytest.mark.parametrize(
        "func",
        [plain, lambda *args, **kwargs: 0, lambda x=1: x, functools.partial(required, 1, 2), Clock(), Clock().__call__,
         dict, time.time, Jobs],
    )  # fmt: skip
    def test_functions_without(self, cron: Any, func: Any) -> None:
        cron.register(func, "a", "* * * * *")
        assert isinstance(cron.info("a")["func_name"], str)

    @pytest.mark.parametrize(
        ("schedule", "message"),
        [
            ("99 * * * *", "Invalid min 99"),
            ("@daily", "Invalid cron string. Format: min hour day mon dow"),
            ("0 0 30 2 *", "never fires"),
        ],
    )
    def test_bad_schedules(self, cron: Any, schedule: str, message: str) -> None:
        with pytest.raises(InvalidSchedule, match=message):
            cron.register(plain, "a", schedule)
        with pytest.raises(InvalidSchedule, match="Invalid tz"):
            cron.register(plain, "a", "* * * * *", tz="Mars")
        assert cron.list() == []

    @pytest.mark.parametrize("keyword", [{"missed": "never"}, {"overlap": "queue"}, {"missed": None}, {"overlap": 1}])
    def test_bad_policies(self, cron: Any, keyword: dict[str, Any]) -> None:
        (name,) = keyword
        with pytest.raises(ValueError, match=rf"{name} must be one of '.*', not"):
            cron.register(plain, "a", "* * * * *", **keyword)

    def test_options(self, cron: Any, store: CronStore) -> None:
        options = {
            "_fast_serialization": 1,
            "_high_cpu": True,
            "_profile": True,
            "_restartable": False,
            "_priority": 1,
            "_type": "c2",
            "_cores": 2,
            "_max_runtime": 5,
            "_os_env_vars": ["A"],
            "_kill_process": True,
        }
        cron.register(plain, "a", "* * * * *", **options, _label="x", _depends_on=[1], _depends_on_errors="ignore")
        assert store.get("a").options == options

    @pytest.mark.parametrize("name", ["x", "_callback", "_nonsense"])
    def test_unknown_keywords(self, cron: Any, name: str) -> None:
        with pytest.raises(TypeError, match=rf"unexpected keyword arguments: {name};"):
            cron.register(plain, "a", "* * * * *", **{name: 1})

    def test_bad_options_are_refused_by_dumps(self, cron: Any) -> None:
        with pytest.raises(TypeError, match="_restartable"):
            cron.register(plain, "a", "* * * * *", _restartable=1)
        assert cron.list() == []

    def test_preview(self, cron: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        slots = cron.preview("0 9 * * mon-fri", n=3, tz="Europe/Berlin")
        assert len(slots) == 3
        assert all(later > earlier for earlier, later in pairwise(slots))
        assert len(cron.preview("* * * * *")) == 5
        with pytest.raises(InvalidSchedule):
            cron.preview("x")
