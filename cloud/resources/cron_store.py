"""Where cron entries are kept: one SQLite file, shared by every process that uses the same home folder.

Owns the records, the tables and the rule that a slot is claimed once. Decides nothing: what is due, and what to do
about it, is `cloud.resources.crons`' part. Payloads are opaque bytes here.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud.errors import BackendError, CronNotFound
from cloud.resources import LOCK_WAIT_S, Database
from cloud.resources.schedule import Schedule

if TYPE_CHECKING:
    import sqlite3

__all__ = ["CronEntry", "CronStore", "MissedPolicy", "OverlapPolicy", "Position"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Claimed slots remembered per label, against a clock that is set back: more than a day of every minute.
_N_SLOTS_KEPT = 1500

# `claimed` is the latest slot already dealt with (at first, the time of registration). `runner` names who can tell
# whether `runner_jid` is unfinished; both are NULL when it ended or nobody needs to know. Times are microseconds
# since 1970.
_MIGRATIONS = (
    (
        """CREATE TABLE cron (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            label TEXT NOT NULL UNIQUE,
            schedule TEXT NOT NULL,
            tz TEXT NOT NULL,
            payload BLOB NOT NULL,
            options TEXT NOT NULL,
            func_name TEXT NOT NULL,
            missed TEXT NOT NULL,
            overlap TEXT NOT NULL,
            created INTEGER NOT NULL,
            creator_host TEXT NOT NULL,
            claimed INTEGER NOT NULL,
            last_run INTEGER,
            last_jid INTEGER,
            runner TEXT,
            runner_jid INTEGER
        )""",
        "CREATE TABLE slot (id INTEGER PRIMARY KEY, label TEXT NOT NULL, due INTEGER NOT NULL, UNIQUE (label, due))",
        "CREATE INDEX slot_by_age ON slot (label, id)",
    ),
    # The slot that was claimed and is not settled: whether it was run is not yet noted.
    ("ALTER TABLE cron ADD COLUMN unsettled INTEGER",),
)


class MissedPolicy(StrEnum):
    """What happens to slots that passed while nobody ran."""

    #: They are dropped.
    SKIP = "skip"
    #: The latest of them is run, once. The default: a laptop that slept through the night does the nightly job.
    RUN_ONCE = "run_once"
    #: Each of them is run, whatever the overlap policy says of simultaneous runs.
    RUN_ALL = "run_all"


class OverlapPolicy(StrEnum):
    """What happens to a slot while the entry's last run is unfinished."""

    #: It is run beside the last one.
    ALLOW = "allow"
    #: It is dropped. The default: jobs slower than their schedule do not pile up.
    SKIP = "skip"
    #: The last run is killed, then it is run.
    KILL_PREVIOUS = "kill_previous"


@dataclass(frozen=True, slots=True, kw_only=True)
class CronEntry:
    """One registered cron, as stored."""

    label: str
    schedule: str
    tz: str
    #: The call's bytes; unpickled only where the job runs.
    payload: bytes = field(repr=False)
    #: Reserved ``_names`` of the call, as JSON can hold them.
    options: Mapping[str, Any]
    func_name: str
    missed: MissedPolicy
    overlap: OverlapPolicy
    #: When this registration was made, UTC.
    created: datetime
    creator_host: str
    #: When the last job was submitted, UTC; None before the first. Survives registering the label again.
    last_run: datetime | None
    last_jid: int | None
    #: Number of this registration, never used again.
    id: int
    #: Who can tell whether ``runner_jid`` is unfinished; None when that is over or of no interest.
    runner: str | None
    runner_jid: int | None


class Position(NamedTuple):
    """How far one entry has come: what is needed, at every look, to see whether it is due."""

    id: int
    label: str
    schedule: str
    tz: str
    missed: MissedPolicy
    #: Latest slot dealt with, or time of registration, UTC.
    claimed: datetime


class CronStore:
    """The cron entries of one home folder. Thread-safe, fork-safe, shared between processes.

    Reads create nothing; the first registration creates folder and file, readable by this user only. Every method
    raises `BackendError` when the file is damaged, of a newer version, or locked for 30 s.

    Args:
        home: Folder of ``crons.sqlite3``.
        clock: Returns the current time as an aware datetime.
    """

    def __init__(self, home: str, clock: Callable[[], datetime]) -> None:
        self.home = home
        self.clock = clock
        self._database = Database(os.path.join(home, "crons.sqlite3"), _MIGRATIONS)

    def register(
        self,
        label: str,
        schedule: Schedule,
        payload: bytes,
        *,
        options: Mapping[str, Any],
        func_name: str,
        missed: MissedPolicy = MissedPolicy.RUN_ONCE,
        overlap: OverlapPolicy = OverlapPolicy.SKIP,
        creator_host: str | None = None,
    ) -> CronEntry:
        """Store an entry, replacing one of the same label atomically. Durable on return.

        Slots up to now are not due. Only when the label was registered with an equal schedule do its slots go on
        where they were: a program that registers at every start must not lose the slot it was late for. The time
        and jid of the last run are kept. Without ``creator_host`` that is this machine.

        Raises:
            TypeError: ``options`` cannot be written as JSON.
        """
        import platform

        now = _to_us(self.clock())
        row = {
            "label": label,
            "schedule": schedule.text,
            "tz": schedule.tz,
            "payload": payload,
            "options": json.dumps(dict(options)),
            "func_name": func_name,
            "missed": missed.value,
            "overlap": overlap.value,
            "created": now,
            "creator_host": platform.node() if creator_host is None else creator_host,
            "claimed": now,
            "last_run": None,
            "last_jid": None,
            "runner": None,
            "runner_jid": None,
            "unsettled": None,
        }
        kept = ("last_run", "last_jid", "runner", "runner_jid", "unsettled")
        with self._database.writing() as db:
            for old in _rows(db.execute("SELECT * FROM cron WHERE label = ?", (label,))):
                row.update((name, old[name]) for name in kept)
                if (old["schedule"], old["tz"]) == (schedule.text, schedule.tz):
                    row["claimed"] = old["claimed"]
            # REPLACE gives a new id, so that a claim on the old registration fails.
            db.execute(
                "REPLACE INTO cron (label, schedule, tz, payload, options, func_name, missed, overlap, created,"
                " creator_host, claimed, last_run, last_jid, runner, runner_jid, unsettled) VALUES (:label, :schedule,"
                " :tz, :payload, :options, :func_name, :missed, :overlap, :created, :creator_host, :claimed, :last_run,"
                " :last_jid, :runner, :runner_jid, :unsettled)",
                row,
            )
            return _one(db, label)

    def deregister(self, label: str) -> None:
        """Remove an entry; jobs it started go on. Raises CronNotFound for an unknown label."""
        self.get(label)  # an unknown label must not create the file
        with self._database.writing() as db:
            if not db.execute("DELETE FROM cron WHERE label = ?", (label,)).rowcount:
                raise _not_found(label)
            db.execute("DELETE FROM slot WHERE label = ?", (label,))

    def get(self, label: str) -> CronEntry:
        """Return one entry. Raises CronNotFound for an unknown label."""
        with self._database.reading() as db:
            return _one(db, label)

    def list(self) -> builtins.list[CronEntry]:
        """Return all entries, sorted by label."""
        with self._database.reading() as db:
            return [_entry(row) for row in _rows(db.execute("SELECT * FROM cron ORDER BY label"))]

    def positions(self) -> builtins.list[Position]:
        """Return how far each entry has come, sorted by label; reads no payload."""
        with self._database.reading() as db:
            rows = db.execute("SELECT id, label, schedule, tz, missed, claimed FROM cron ORDER BY label").fetchall()
        return [
            Position(row_id, label, schedule, tz, MissedPolicy(missed), _from_us(claimed))
            for row_id, label, schedule, tz, missed, claimed in rows
        ]

    def claim(self, position: Position, slot: datetime) -> CronEntry | None:
        """Take a slot, and with it all earlier ones, for the caller alone. Durable on return.

        Of any number of processes that claim from the same position, one succeeds.

        Returns:
            The entry to run; None when another process moved the position first, the registration is gone, or
            this very slot was claimed before (the clock was set back).
        """
        return self._claim(position, slot, settled=True)

    def claim_unsettled(self, position: Position, slot: datetime) -> CronEntry | None:
        """As `claim`; the slot is among the `unsettled` ones until `record_run` or `settle` says what became of it."""
        return self._claim(position, slot, settled=False)

    def _claim(self, position: Position, slot: datetime, *, settled: bool) -> CronEntry | None:
        due = _to_us(slot)
        with self._claiming(), self._database.writing() as db:
            moved = db.execute(
                "UPDATE cron SET claimed = ? WHERE id = ? AND claimed = ?", (due, position.id, _to_us(position.claimed))
            )
            if not moved.rowcount:
                return None
            new = db.execute("INSERT OR IGNORE INTO slot (label, due) VALUES (?, ?)", (position.label, due))
            if not new.rowcount:
                return None
            db.execute(
                "DELETE FROM slot WHERE label = ?1 AND id <="
                " (SELECT id FROM slot WHERE label = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
                (position.label, _N_SLOTS_KEPT),
            )
            if not settled:
                db.execute("UPDATE cron SET unsettled = ? WHERE id = ?", (due, position.id))
            return _one(db, position.label)

    @contextmanager
    def _claiming(self) -> Iterator[None]:
        # SQLite's own lock would do wherever the file system has POSIX locks; some shared and container mounts only
        # pretend to, and there this lock keeps two processes from claiming one slot.
        from filelock import FileLock, Timeout

        lock = FileLock(os.path.join(self.home, "crons.lock"), timeout=LOCK_WAIT_S, mode=0o600, poll_interval=0.005)
        try:
            lock.acquire()
        except Timeout as exc:
            remedy = "A process was stopped while it claimed a cron slot: continue or end it."
            raise BackendError(f"{lock.lock_file} was locked for {LOCK_WAIT_S:g} s", retry=True, hint=remedy) from exc
        try:
            yield
        finally:
            lock.release()

    def record_run(
        self, label: str, jid: int, at: datetime, runner: str | None = None, *, settles: bool = False
    ) -> None:
        """Note an entry's newest job; nothing happens when the label is gone.

        Args:
            label: The entry.
            jid: The job.
            at: When it was submitted.
            runner: Who can tell whether it is unfinished; None leaves what is known of an earlier run.
            settles: It is that of the slot claimed last.
        """
        with self._database.writing() as db:
            db.execute("UPDATE cron SET last_run = ?, last_jid = ? WHERE label = ?", (_to_us(at), jid, label))
            if settles:
                db.execute("UPDATE cron SET unsettled = NULL WHERE label = ?", (label,))
            if runner is not None:
                db.execute("UPDATE cron SET runner = ?, runner_jid = ? WHERE label = ?", (runner, jid, label))

    def settle(self, label: str) -> None:
        """Note that the slot claimed last is over, and was not run."""
        with self._database.writing() as db:
            db.execute("UPDATE cron SET unsettled = NULL WHERE label = ?", (label,))

    def unsettled(self) -> builtins.list[tuple[CronEntry, datetime]]:
        """Return the entries of which a slot was claimed and neither run, as far as is noted, nor settled."""
        with self._database.reading() as db:
            rows = list(_rows(db.execute("SELECT * FROM cron WHERE unsettled IS NOT NULL ORDER BY label")))
        return [(_entry(row), _from_us(row["unsettled"])) for row in rows]

    def record_end(self, label: str, jid: int, runner: str) -> None:
        """Note that a run ended, unless a later one has taken its place."""
        with self._database.writing() as db:
            db.execute(
                "UPDATE cron SET runner = NULL, runner_jid = NULL WHERE label = ? AND runner = ? AND runner_jid = ?",
                (label, runner, jid),
            )

    def close(self) -> None:
        """Give the file's connections back. Idempotent; a later use opens new ones."""
        self._database.close()


def _one(db: sqlite3.Connection, label: str) -> CronEntry:
    for row in _rows(db.execute("SELECT * FROM cron WHERE label = ?", (label,))):
        return _entry(row)
    raise _not_found(label)


def _rows(cursor: sqlite3.Cursor) -> Iterator[dict[str, Any]]:
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, row, strict=True)) for row in cursor.fetchall())


def _entry(row: dict[str, Any]) -> CronEntry:
    row["options"] = json.loads(row["options"])
    row["missed"] = MissedPolicy(row["missed"])
    row["overlap"] = OverlapPolicy(row["overlap"])
    row["created"] = _from_us(row["created"])
    if row["last_run"] is not None:
        row["last_run"] = _from_us(row["last_run"])
    return CronEntry(**{name: value for name, value in row.items() if name not in ("claimed", "unsettled")})


def _not_found(label: str) -> CronNotFound:
    return CronNotFound(f"no cron is registered as {label!r}", hint="cloud.cron.list() names the registered ones")


def _to_us(instant: datetime) -> int:
    return (instant - _EPOCH) // timedelta(microseconds=1)


def _from_us(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
