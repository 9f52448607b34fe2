"""The simulation that ``cloud.start_simulator()`` begins: its time, and what happened in it.

::

    cloud.start_simulator(seed=1)
    cloud.cron.register(report, "report", "0 * * * *")
    cloud.simulator.advance(hours=24)      # a day of crons
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from cloud import current
from cloud.engine.executor.simulated import SimulatedExecutor
from cloud.errors import UnsupportedOperation

__all__ = ["Event", "advance", "events", "now"]


class Event(NamedTuple):
    """Something that happened to a job."""

    #: Virtual time, aware UTC.
    time: datetime
    jid: int
    #: Number of the attempt, from 1.
    attempt: int
    #: 'begins', 'ends', 'is killed' or 'loses its worker'.
    what: str


def advance(seconds: float = 0.0, *, minutes: float = 0.0, hours: float = 0.0, days: float = 0.0) -> None:
    """Let virtual time pass: run every job and every registered cron that falls due in it.

    Takes as long as the jobs themselves compute. Crons come from ``cloud.cron``; what fires here is not counted as
    fired outside the simulation.

    Args:
        seconds, minutes, hours, days: How far, added up; at least 0.

    Raises:
        UnsupportedOperation: No simulation is running.
        ValueError: The time is negative.
    """
    length_s = seconds + 60 * minutes + 3600 * hours + 86400 * days
    if length_s < 0:
        raise ValueError(f"time cannot be advanced by {length_s!r} seconds; it never goes back")
    _executor()
    engine = current.process.cloud.backend.engine  # type: ignore[attr-defined]
    end = engine.clock.now() + length_s
    crons = current.resources().cron_runner
    while True:
        due = crons.next_due(now())
        moment = end if due is None else min(end, due.timestamp())
        left_s = moment - engine.clock.now()
        if left_s > 0:
            engine.wait_until(lambda: False, left_s)
        if due is None or due.timestamp() > end:
            return
        crons.fire_due(now())


def now() -> datetime:
    """The virtual time, aware UTC.

    Raises:
        UnsupportedOperation: No simulation is running.
    """
    _executor()
    return datetime.fromtimestamp(current.process.cloud.now(), UTC)


def events() -> list[Event]:
    """What happened to jobs, in order: the same for the same program and seed, times since the start apart.

    Raises:
        UnsupportedOperation: No simulation is running.
    """
    return [
        Event(datetime.fromtimestamp(when, UTC), jid, attempt, what) for when, jid, attempt, what in _executor().events
    ]


def _executor() -> SimulatedExecutor:
    if not current.process.uses_simulator():
        raise UnsupportedOperation("no simulation is running", hint="Call cloud.start_simulator() first.")
    executor = current.process.cloud.backend.engine.executor  # type: ignore[attr-defined]
    assert isinstance(executor, SimulatedExecutor)
    return executor
