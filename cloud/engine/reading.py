"""Outcomes for those who ask for them: all at the end, and those that many items share while the others still run."""

from __future__ import annotations

from collections.abc import Callable

from cloud.engine.store.base import Batch, Store, loaded
from cloud.jobs import Jids
from cloud.serialization.shared import size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_LONG: Final = 4096
_MANY: Final = 256
_MAX_SEGMENTS: Final = 2048
"""In a map that has more of them, few items share one, and to look through all takes longer than it saves."""

_READ_AT_ONCE: Final = 8
"""So many outcomes take about a millisecond; then others have their turn."""


class ReadAhead:
    """What is known of a map that somebody waits for, read by him while the workers go on.

    Where values are rebuilt after the last has come, the cores that worked at them idle meanwhile.

    Args:
        batch: The map.
        read: Called with each outcome that many items share: in no order, and perhaps not with all.
    """

    def __init__(self, batch: Batch, read: Callable[[bytes], None]) -> None:
        self._batch = batch
        self._read = read
        self._n_segments = 0
        self._is_read: set[int] = set()

    def read_some(self) -> bool:
        """Read a few of those that came; True if there are more."""
        segments = self._batch.segments
        if len(segments) == self._n_segments or len(segments) > _MAX_SEGMENTS:
            return False
        n_left = _READ_AT_ONCE
        n_segments = len(segments)
        for start, n, outcome in tuple(segments):
            if n >= _MANY and start not in self._is_read:
                if not n_left:
                    return True
                n_left -= 1
                self._is_read.add(start)
                if type(outcome) is bytes:
                    self._read(outcome)
        self._n_segments = n_segments
        return False


def reads_ahead(runs: list[tuple[Batch, int, int]], read: Callable[[bytes], None] | None) -> Callable[[], bool] | None:
    """``read_some`` for one who waits for these jobs, if they are one long map."""
    if read is None or len(runs) != 1 or runs[0][2] - runs[0][1] < _LONG:
        return None
    return ReadAhead(runs[0][0], read).read_some


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
