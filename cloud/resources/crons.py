"""Crons: functions that are called again and again, by a schedule.

`CronStore` keeps the entries, `CronRunner` submits the jobs of those that are due, `CronService` is what the face
``cloud.cron`` stands on::

    cloud.cron.register ── CronService ── CronStore ◄── claim ── CronRunner ── submit(entry) ──► the client
                                              ▲                      │
                                              └───── record_run ─────┘
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from cloud.resources.cron_runner import CronRunner, Firing
from cloud.resources.cron_store import CronEntry, CronStore, MissedPolicy, OverlapPolicy
from cloud.resources.schedule import Schedule

__all__ = [
    "CronEntry",
    "CronRunner",
    "CronService",
    "CronStore",
    "Firing",
    "MissedPolicy",
    "OverlapPolicy",
    "describe",
    "name_of",
    "policy",
]


class CronService:
    """What ``cloud.cron`` can do: entries made of functions, and what is known of them.

    Args:
        store: The entries.
        runner: Runs an entry when asked to; need not be looping in this process.
        dumps: Turns a function and its reserved ``_names`` into payload and options, TypeError for bad ones.
    """

    def __init__(
        self,
        store: CronStore,
        runner: CronRunner,
        dumps: Callable[[Callable[..., Any], dict[str, Any]], tuple[bytes, dict[str, Any]]],
    ) -> None:
        self._store = store
        self._runner = runner
        self._dumps = dumps

    def register(
        self,
        func: Callable[..., Any],
        label: str,
        schedule: str | Sequence[str | int],
        *,
        reserved: Mapping[str, Any],
        tz: str = "UTC",
        missed: MissedPolicy | str = MissedPolicy.RUN_ONCE,
        overlap: OverlapPolicy | str = OverlapPolicy.SKIP,
    ) -> None:
        """Store a function under a label, replacing what the label stood for. See ``cloud.cron.register``."""
        parsed = Schedule(schedule, tz)
        missed = policy(MissedPolicy, missed, "missed")
        overlap = policy(OverlapPolicy, overlap, "overlap")
        payload, options = self._dumps(func, dict(reserved))
        self._store.register(
            label, parsed, payload, options=options, func_name=name_of(func), missed=missed, overlap=overlap
        )

    def deregister(self, label: str) -> None:
        """Remove an entry. Raises CronNotFound for an unknown label."""
        self._store.deregister(label)

    def manual_run(self, label: str) -> int:
        """Submit an entry's job now and return its jid. Raises CronNotFound for an unknown label."""
        return self._runner.run_now(label)

    def list(self) -> builtins.list[str]:
        """Return all labels, sorted."""
        return [position.label for position in self._store.positions()]

    def info(self, label: str) -> dict[str, Any]:
        """Describe an entry; see ``cloud.cron.info``. Raises CronNotFound for an unknown label."""
        return describe(self._store.get(label), self._store.clock())


def describe(entry: CronEntry, now: datetime) -> dict[str, Any]:
    """What ``cloud.cron.info`` tells of an entry."""
    return {
        "label": entry.label,
        "schedule": entry.schedule,
        "tz": entry.tz,
        "missed": entry.missed.value,
        "overlap": entry.overlap.value,
        "func_name": entry.func_name,
        "funcname": entry.func_name,
        "created": entry.created,
        "creator_host": entry.creator_host,
        "last_run": entry.last_run,
        "last_jid": entry.last_jid,
        "next_run": Schedule(entry.schedule, entry.tz).next(now),
    }


_Policy = TypeVar("_Policy", bound=StrEnum)


def policy(kind: type[_Policy], value: str, name: str) -> _Policy:
    """The policy of this name; ValueError tells which there are."""
    try:
        return kind(value)
    except ValueError as exc:
        choices = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{name} must be one of {choices}, not {value!r}") from exc


def name_of(func: Any) -> str:
    """What people call a function."""
    while isinstance(func, partial):
        func = func.func
    return str(getattr(func, "__name__", None) or type(func).__name__)
