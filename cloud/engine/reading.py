"""Outcomes for those who ask for them: all at the end, and those that many items share while the others still run."""

from __future__ import annotations

from collections.abc import Callable

from cloud.engine.store.base import Batch, Store, loaded
from cloud.jobs import Jids
from cloud.serialization.shared import size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeAlias

    Read: TypeAlias = Callable[[int, bytes], None]
    """Takes the index of the first of many jobs that share an outcome, and that."""

_LONG: Final = 4096
_MANY: Final = 256
_MAX_SEGMENTS: Final = 2048
"""In a map that has more of them, few items share one, and to look through all takes longer than it saves."""


class ReadAhead:
    """What is known of a long map that somebody waits for, read by him while the workers go on.

    Where values are rebuilt after the last has come, the cores that worked at them idle meanwhile.

    Args:
        batch, start, stop: The jobs.
        read: Called with outcomes in no order, and perhaps not with all.
    """

    def __init__(self, batch: Batch, start: int, stop: int, read: Read) -> None:
        self._batch = batch
        self._start, self._stop = start, stop
        self._read = read
        self._n_segments = 0
        self._is_read: set[int] = set()

    @property
    def has_news(self) -> bool:
        """Whether there may be something to read."""
        return self._n_segments != len(self._batch.segments) <= _MAX_SEGMENTS

    def read_one(self) -> None:
        """Read one of those that came, if there is one."""
        if not self.has_news:
            return
        n_segments = len(self._batch.segments)
        for low, n, outcome in tuple(self._batch.segments):
            if n >= _MANY and low >= self._start and low + n <= self._stop and low not in self._is_read:
                self._is_read.add(low)
                if type(outcome) is bytes and outcome:  # else it is elsewhere, or was deleted
                    self._read(low - self._start, outcome)
                    return
        self._n_segments = n_segments


def reads_ahead(runs: list[tuple[Batch, int, int]], read: Read | None) -> ReadAhead | None:
    """What reads ahead for one who waits for these jobs, if they are one long map."""
    if read is None or len(runs) != 1 or runs[0][2] - runs[0][1] < _LONG:
        return None
    return ReadAhead(*runs[0], read)


def outcomes_of(store: Store, jids: Jids, limit_bytes: int | None) -> list[tuple[int, int, int, bytes]]:
    """As ``Engine.outcomes``, under its lock."""
    n_bytes = 0
    found: list[tuple[int, int, int, bytes]] = []
    for batch, start, stop in store.runs(jids):
        if batch.arguments is not None:
            found.append((0, 1, 1, loaded(batch.segments[0][2])))
            if limit_bytes is not None and (n_bytes := n_bytes + size_of(found[-1][3])) > limit_bytes:
                return found
            continue
        for low, n, outcome in batch.segments_in(start, stop):
            skip = max(0, start - low)
            found.append((skip, min(low + n, stop) - low - skip, n, loaded(outcome)))
            if limit_bytes is not None and (n_bytes := n_bytes + size_of(found[-1][3])) > limit_bytes:
                return found
    return found
