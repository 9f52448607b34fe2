"""Taking time: the right number of repetitions, and results that are checked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class WrongResult(Exception):
    """The system gave something else than the jobs returned."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to do.

    Attributes:
        seconds: What one measurement may take; whoever is slow does less in it.
        patience_s: How long to wait for what may never come.
        full: False divides the numbers of jobs by ten where that does not change what is measured.
    """

    seconds: float
    patience_s: float
    full: bool

    def n(self, number: int) -> int:
        return number if self.full else max(1, number // 10)

    def half(self, number: int) -> int:
        return number if self.full else number // 2


SHORT = Effort(seconds=0.2, patience_s=3.0, full=False)
FULL = Effort(seconds=1.5, patience_s=10.0, full=True)


_MAX_RUNS = 7


def expect(right: Any, what: str = "a wrong result") -> None:
    """Refuse the measurement unless the results are right."""
    if not right:
        raise WrongResult(what)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it returned)."""
    began = time.perf_counter()
    value = action()
    return time.perf_counter() - began, value


def as_many_as_fit(run: Callable[[int], float], n: int, effort: Effort) -> tuple[float, int]:
    """Run ``n`` jobs, or so many of them as fit the time.

    A few come first, to start the workers; then some more, which tell how many fit. Who is quick runs all of them again
    while there is time: of runs that take 20 ms, one may well meet somebody else on the processor.

    Args:
        run: Runs so many jobs, checks what they return, and gives the seconds they took.
        n: How many are wanted.
        effort: The time.

    Returns:
        (seconds for one job, the median of the runs; how many jobs each was).
    """
    run(min(n, 4))
    count = max(1, n // 200)
    while True:
        seconds = max(run(count), 1e-9)
        fit = min(n, int(effort.seconds * count / seconds))
        if fit < 2 * count:
            break
        count = fit
    times = [seconds]
    while len(times) < _MAX_RUNS and sum(times) + seconds <= effort.seconds:
        seconds = run(count)
        times.append(seconds)
    return statistics.median(times) / count, count


def percentile(values: list[float], percent: float) -> float:
    """The value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
