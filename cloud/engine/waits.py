"""How far a wait for many jobs has come, and runs of jobs that stand alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cloud.engine.store.base import Batch
from cloud.jobs import DONE, ERROR, KILLED, PROCESSING, QUEUED, STALLED, WAITING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from cloud.engine.reading import ReadAhead


FINAL: Final = (DONE, ERROR, KILLED, STALLED)
"""Codes of states that no job leaves."""


class Wait:
    """How far a wait for jobs has come; looks at each job once.

    Attributes:
        ahead: See ``Waiting.drive``.
    """

    __slots__ = ("_at", "_low", "_runs", "_wanted", "ahead", "failed", "failures", "seen_failures")

    def __init__(self, runs: list[tuple[Batch, int, int]], *, ahead: ReadAhead | None = None) -> None:
        self._runs = runs
        self.ahead = ahead
        self._at = 0
        self._low = runs[0][1] if runs else 0
        self._wanted: dict[int, list[tuple[int, int]]] | None = None
        self.failures: list[tuple[Batch, int, int]] | None = None
        self.seen_failures = 0
        self.failed = False

    def is_to_the_end(self) -> bool:
        """True when no job comes after these in their batches: workers run out of work as the last of these ends."""
        stops: dict[int, int] = {}
        for batch, _, stop in self._runs:
            stops[id(batch)] = max(stop, stops.get(id(batch), 0))
        return all(stops[id(batch)] == batch.n for batch, _, _ in self._runs)

    def has_failed(self) -> bool:
        for batch, start, stop in self._runs:
            states = batch.states
            if states[start] > DONE or (
                stop - start > 1 and any(states.find(code, start, stop) >= 0 for code in (ERROR, KILLED, STALLED))
            ):
                self.failed = True
                return True
        return False

    def done(self) -> bool:
        failures = self.failures
        if failures is not None and len(failures) > self.seen_failures and self._meets(failures):
            return True
        return self.all_final()

    def all_final(self) -> bool:
        runs, at = self._runs, self._at
        while at < len(runs):
            batch, _, stop = runs[at]
            if batch.n_final != batch.n or not batch.sealed:
                states, low = batch.states, self._low
                if states[low] < DONE:
                    self._at = at
                    return False
                if stop - low > 1:
                    queued = states.find(QUEUED, low, stop)
                    # No further than that: looking at the rest each time would make long maps quadratic.
                    waiting = states.find(WAITING, low, stop if queued < 0 else queued)
                    if queued >= 0 or waiting >= 0:
                        self._at, self._low = at, queued if waiting < 0 else waiting
                        return False
            at += 1
            if at < len(runs):
                self._low = runs[at][1]
        self._at = at
        return True

    def _meets(self, failures: list[tuple[Batch, int, int]]) -> bool:
        if self._wanted is None:
            self._wanted = {}
            for batch, start, stop in self._runs:
                self._wanted.setdefault(batch.jid0, []).append((start, stop))
        for batch, low, n in failures[self.seen_failures :]:
            for start, stop in self._wanted.get(batch.jid0, ()):
                if low < stop and start < low + n:
                    self.failed = True
                    return True
        self.seen_failures = len(failures)
        return False

    def unfinished(self) -> list[int]:
        if self.all_final():
            return []
        return [
            batch.jid0 + index
            for batch, start, stop in self._runs[self._at :]
            for index in range(start, stop)
            if batch.states[index] < DONE
        ]


def by_batch(runs: Iterable[tuple[Batch, int, int]]) -> dict[int, list[tuple[int, int]]]:
    """(start, stop) of runs by the id() of their batch."""
    found: dict[int, list[tuple[int, int]]] = {}
    for batch, start, stop in runs:
        found.setdefault(id(batch), []).append((start, stop))
    return found


def status_codes(batch: Batch, start: int, stop: int, running: dict[int, list[tuple[int, int]]]) -> bytearray:
    """Status codes of a run of items; ``running`` are runs of those that have begun, by batch."""
    codes = batch.states[start:stop]
    for first, last in running.get(id(batch), ()):
        low, high = max(first, start) - start, min(last, stop) - start
        if low < high:
            codes[low:high] = codes[low:high].replace(_QUEUED, _PROCESSING)
    return codes


_QUEUED: Final = bytes((QUEUED,))
_PROCESSING: Final = bytes((PROCESSING,))


def runs_of(
    batch: Batch, codes: tuple[int, ...], start: int = 0, stop: int | None = None, besides: Iterable[int] = ()
) -> Iterator[tuple[int, int]]:
    """(start, n) of consecutive items in one of the states; computed before the first is yielded."""
    skip = frozenset(besides)
    states = batch.states
    end = batch.n if stop is None else stop
    if end - start > _LONG and not skip:
        return runs_in(states, codes, start, end)
    found: list[tuple[int, int]] = []
    low = start
    while low < end:
        if states[low] not in codes or low in skip:
            low += 1
            continue
        high = low + 1
        code = states[low]
        while high < end and states[high] == code and high not in skip:
            high += 1
        found.append((low, high - low))
        low = high
    return iter(found)


def runs_in(
    states: bytearray, codes: tuple[int, ...], start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int]]:
    """The same of a row of states; quick for many."""
    # Loaded here: a program with short maps need not pay for it.
    import re

    if not codes:
        return iter(())
    pattern = re.compile(b"|".join(b"%b+" % re.escape(bytes((code,))) for code in codes))
    end = len(states) if stop is None else stop
    return iter([(each.start(), each.end() - each.start()) for each in pattern.finditer(bytes(states), start, end)])


_LONG: Final = 1000
