"""Decides which cron slots to run, and submits their jobs.

Owns what "due", "missed" and "overlapping" mean, and the loop. Any number of processes may run a runner over one home
folder: a slot is claimed, durably, before its job is submitted, and a claim succeeds once. No slot is run twice; a
process killed between the two loses that one slot, unless its jobs are kept by a server: `Once`.

How a job is submitted, looked up and killed is given from above as callables.
"""

from __future__ import annotations

import os
import re
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cloud.errors import BackendClosed, CloudException, InvalidSchedule
from cloud.logs import logger
from cloud.resources.cron_store import CronEntry, CronStore, MissedPolicy, OverlapPolicy, Position
from cloud.resources.schedule import Schedule

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["CronRunner", "Firing", "Once"]

_LOGGER = "Cloud.cron"

#: A slot noticed this late or later was missed; up to then the runner was merely busy.
_MISSED_AFTER = timedelta(seconds=60)
# A clock behind the latest slot by more than this was set back, and the entry goes on from the new time. Smaller
# steps, as NTP makes them, are waited out.
_SET_BACK = timedelta(hours=1)
# Other processes cannot wake this one: how soon it sees their registrations.
_POLL_S = 0.5
_ERROR_WAIT_S = 5.0
_PRESENCE = re.compile(r"[0-9]+-[0-9a-f]{32}")


class Firing(NamedTuple):
    """One slot that was run."""

    label: str
    slot: datetime
    jid: int


@lru_cache(maxsize=512)
def _schedule(text: str, tz: str) -> Schedule:
    return Schedule(text, tz)


@lru_cache(maxsize=4096)
def _next(text: str, tz: str, after: datetime) -> datetime:
    return _schedule(text, tz).next(after)


def _next_slot(position: Position, now: datetime) -> datetime:
    """Return the first slot of an entry that nobody has dealt with; not later than ``now`` when one is due."""
    set_back = position.claimed - now > _SET_BACK
    return _next(position.schedule, position.tz, now - _MISSED_AFTER if set_back else position.claimed)


class Once(ABC):
    """Submits the jobs of slots to whoever keeps them through the end of this process, each once."""

    @abstractmethod
    def submit(self, entry: CronEntry, slot: datetime) -> int:
        """Submit the call for a slot and return its jid; the same jid when asked again, also by a later process.

        Raises:
            BackendClosed: Not now; the slot is left to a later process.
        """

    @abstractmethod
    def submitted(self, entry: CronEntry, slot: datetime) -> int | None:
        """The jid of the slot's job, None if it was not submitted."""


class CronRunner:
    """Submits the jobs of due cron entries. Thread-safe; a forked child starts with no runs of its own.

    Args:
        store: The entries.
        submit: Submits an entry's call and returns its jid.
        is_finished: Whether a job has ended; LookupError means that it is unknown by now.
        clock: Returns the current time as an aware datetime; used by `run` and `run_now`.
        kill: Kills a job. Without it, KILL_PREVIOUS does as SKIP.
        owner: A name for whoever keeps the jobs, when every runner of that name can look up the others' jobs, also
            after a restart (a server). None when jobs are known to this process only, and end with it.
        once: Submits the jobs of slots instead of ``submit``. What a process left that was killed between claim and
            record is then finished by `resume`. Only one runner at a time may use the store.
    """

    def __init__(
        self,
        store: CronStore,
        submit: Callable[[CronEntry], int],
        is_finished: Callable[[int], bool],
        clock: Callable[[], datetime],
        *,
        kill: Callable[[int], object] | None = None,
        owner: str | None = None,
        once: Once | None = None,
    ) -> None:
        self._store = store
        self._once = once
        self._submit = submit
        self._is_finished = is_finished
        self._clock = clock
        self._kill = kill
        self._owner = owner
        self._refused: set[tuple[str, str]] = set()
        self._reset()

    def fire_due(self, now: datetime) -> list[Firing]:
        """Claim the slots that are due and submit their jobs, as the policies of their entries say.

        Blocks for as long as ``submit`` takes. A ``submit`` that raises is logged and its slot is over; the other
        entries go on. When many slots are due, entries take turns.

        Args:
            now: The current time, aware.

        Returns:
            What was submitted here, in order; other processes may have taken slots as well.

        Raises:
            BackendError: The store cannot be used.
        """
        fired: list[Firing] = []
        while dealt := list(self._round(now)):
            fired += [firing for firing in dealt if firing]
        return fired

    def resume(self, now: datetime) -> list[Firing]:
        """Finish what an earlier process claimed and did not settle; for runners with ``once``, before anything else.

        Returns:
            What is submitted now, or was by that process.
        """
        unsettled = self._store.unsettled() if self._once else []
        return [firing for entry, slot in unsettled if (firing := self._fire(entry, slot, now))]

    def next_due(self, now: datetime) -> datetime | None:
        """Return when `fire_due` has something to do next, in UTC; not later than ``now`` if that is so already.

        None when nothing is registered. Raises BackendError when the store cannot be used.
        """
        return min((slot for _, slot in self._next_slots(now)), default=None)

    def run(self, stop: threading.Event) -> None:
        """Fire slots as they fall due, until ``stop`` is set.

        Wakes at each slot, sees what other processes registered within half a second, and sleeps otherwise. A
        suspended machine and a clock that is set make slots missed, never double. Errors of the store are logged
        and tried again, except at the start.

        Raises:
            BackendError: The store could not be used at the start.
        """
        self.next_due(self._clock())
        try:
            while not stop.is_set():
                try:
                    wait_s = self._step(stop)
                except (CloudException, OSError):
                    logger(_LOGGER).exception("crons cannot be read or claimed; trying again in %g s", _ERROR_WAIT_S)
                    wait_s = _ERROR_WAIT_S
                stop.wait(wait_s)
        finally:
            self.close()

    def run_now(self, label: str, submit: Callable[[CronEntry], int] | None = None) -> int:
        """Submit an entry's call at once, whatever its schedule, and return the jid.

        Runners that cannot look up this one's jobs do not take it for an unfinished run.

        Args:
            label: The entry.
            submit: Called instead of the runner's.

        Raises:
            CronNotFound: The label is unknown.
            Exception: Whatever ``submit`` raises.
        """
        self._reset_if_forked()
        jid = (submit or self._submit)(self._store.get(label))
        self._track(label, jid, self._owner)
        self._store.record_run(label, jid, self._clock(), self._owner)
        return jid

    def close(self) -> None:
        """Let go of the jobs started here: to other processes they count as ended. Idempotent."""
        if os.getpid() == self._pid:
            self._presence.close()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # Jobs started here and not yet seen to end: (label, jid) -> the name to withdraw from the store then.
        self._runs: dict[tuple[str, int], str | None] = {}
        self._presence = _Presence(os.path.join(self._store.home, "cron-runners"))

    def _reset_if_forked(self) -> None:
        # The parent's jobs are unknown here, and its lock may have been held by a thread that does not exist here.
        if os.getpid() != self._pid:
            self._reset()

    def _track(self, label: str, jid: int, runner: str | None) -> None:
        with self._lock:
            self._runs[label, jid] = runner

    def _step(self, stop: threading.Event) -> float:
        """Do one round of what is due; return the seconds to wait before the next."""
        busy = False
        for _ in self._round(self._clock()):
            busy = True
            if stop.is_set():
                break
        if busy:
            return 0.0
        now = self._clock()
        due = self.next_due(now)
        return _POLL_S if due is None else min(_POLL_S, max(0.0, (due - now).total_seconds()))

    def _round(self, now: datetime) -> Iterator[Firing | None]:
        """Deal with at most one slot of each entry; yield once per slot, None when it was not run here."""
        self._reset_if_forked()
        self._note_ends()
        for position, first in self._next_slots(now):
            if first > now:
                continue
            slot = first
            if position.missed is not MissedPolicy.RUN_ALL:
                slot = _schedule(position.schedule, position.tz).previous(now + datetime.resolution)
            entry = (self._store.claim_unsettled if self._once else self._store.claim)(position, slot)
            # Not claimed means another process was faster, or the label is registered anew: the next round sees.
            yield self._fire(entry, slot, now) if entry else None

    def _fire(self, entry: CronEntry, slot: datetime, now: datetime) -> Firing | None:
        jid = runner = None
        asked = entry.overlap is not OverlapPolicy.ALLOW
        try:
            before = None if self._once is None else self._once.submitted(entry, slot)
            if before is not None or self._wanted(entry, slot, now):
                if asked:
                    runner = self._owner or self._presence.name
                jid = self._submit_slot(entry, slot) if before is None else before
        except Exception as exc:  # noqa: BLE001 - see below
            if self._once is not None and isinstance(exc, BackendClosed):
                return None  # a later process goes on with it
            # User code and the machinery under it: no entry may stop the others.
            logger(_LOGGER).exception("cron %r: the slot of %s could not be submitted", entry.label, slot)
        if jid is None:
            if self._once is not None:
                self._store.settle(entry.label)
            return None
        if asked:
            self._track(entry.label, jid, runner)
        self._store.record_run(entry.label, jid, now, runner, settles=True)
        return Firing(entry.label, slot, jid)

    def _submit_slot(self, entry: CronEntry, slot: datetime) -> int:
        return self._submit(entry) if self._once is None else self._once.submit(entry, slot)

    def _wanted(self, entry: CronEntry, slot: datetime, now: datetime) -> bool:
        if now - slot >= _MISSED_AFTER:
            if entry.missed is MissedPolicy.SKIP:
                logger(_LOGGER).info("cron %r: the slot of %s was missed, and is skipped", entry.label, slot)
                return False
            if entry.missed is MissedPolicy.RUN_ALL:
                return True
        if entry.overlap is OverlapPolicy.ALLOW:
            return True
        mine = self._unfinished(entry)
        runner = entry.runner
        elsewhere = runner is not None and runner != self._owner and self._presence.is_elsewhere(runner)
        if elsewhere or (mine and (entry.overlap is OverlapPolicy.SKIP or self._kill is None)):
            logger(_LOGGER).warning("cron %r: the slot of %s is skipped, its last run is unfinished", entry.label, slot)
            return False
        if self._kill is not None:
            for jid in mine:
                with suppress(LookupError):  # it is gone
                    self._kill(jid)
        return True

    def _unfinished(self, entry: CronEntry) -> list[int]:
        with self._lock:
            jids = {jid for label, jid in self._runs if label == entry.label}
        if entry.runner_jid is not None and entry.runner == self._owner:
            jids.add(entry.runner_jid)
        return [jid for jid in jids if not self._ended(jid)]

    def _note_ends(self) -> None:
        # Other processes cannot ask for the jobs of this one; they read from the store that a run is over.
        with self._lock:
            runs = list(self._runs.items())
        for (label, jid), runner in runs:
            if self._ended(jid):
                with self._lock:
                    self._runs.pop((label, jid), None)
                if runner is not None:
                    self._store.record_end(label, jid, runner)

    def _ended(self, jid: int) -> bool:
        try:
            return self._is_finished(jid)
        except LookupError:
            return True
        except Exception:  # noqa: BLE001 - see below
            # A job nobody can look up must not keep its cron from running for ever.
            logger(_LOGGER).exception("job %d of a cron cannot be looked up, and counts as finished", jid)
            return True

    def _next_slots(self, now: datetime) -> Iterator[tuple[Position, datetime]]:
        for position in self._store.positions():
            try:
                yield position, _next_slot(position, now)
            except InvalidSchedule as exc:
                # Registered where the zone exists, or by another version.
                bad = (position.schedule, position.tz)
                if bad not in self._refused:
                    self._refused.add(bad)
                    logger(_LOGGER).error("cron %r is not run: %s", position.label, exc)


class _Presence:
    """A locked file that shows other processes that this one lives: the lock goes when it ends, however it ends."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._guard = threading.Lock()
        self._held: tuple[str, BaseFileLock] | None = None

    @property
    def name(self) -> str:
        """The name of this process; the file is made when it is first asked for."""
        from filelock import FileLock

        with self._guard:
            if self._held is None:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                for left_behind in self._folder.glob("*.lock"):
                    self.is_elsewhere(left_behind.stem)
                name = f"{os.getpid()}-{uuid.uuid4().hex}"
                lock = FileLock(self._path(name), mode=0o600, thread_local=False)
                lock.acquire()
                self._held = name, lock
            return self._held[0]

    def is_elsewhere(self, name: str) -> bool:
        """Tell whether a name is that of another process that lives; removes the file of a dead one."""
        from filelock import FileLock, Timeout

        if not _PRESENCE.fullmatch(name) or not self._path(name).exists():
            return False
        lock = FileLock(self._path(name), mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return self._held is None or self._held[0] != name
        self._path(name).unlink(missing_ok=True)
        lock.release()
        return False

    def close(self) -> None:
        with self._guard:
            if self._held is not None:
                name, lock = self._held
                self._held = None
                self._path(name).unlink(missing_ok=True)
                lock.release()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.lock"
