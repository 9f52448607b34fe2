"""How many final jobs a durable store keeps, by status: counted once when it opens, and then as they come and go."""

from __future__ import annotations

from collections.abc import Iterable

from cloud.engine.store.rows import Reader
from cloud.engine.store.schema import DELETED
from cloud.jobs import DONE, STATUS_LABELS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_N: Final = len(STATUS_LABELS)
_FINAL: Final = range(DONE, _N)
_KEYS: Final = 500


class Tally:
    """Counts by status code.

    Args:
        reader: Of the store; reads every segment's head once. Blocks: about half a second for a million calls.

    Attributes:
        ended: How many became final since it was made, by status code.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._n = [0] * _N
        self.ended = [0] * _N
        for status, n in reader.rows("SELECT kind, sum(n) FROM segment GROUP BY kind"):
            self._n[status] += n
        marked = [key for (key,) in reader.rows("SELECT DISTINCT batch FROM mark WHERE kind = ?", (DELETED,))]
        self._count_deleted(marked, +1)

    def add(self, status: int, n: int) -> None:
        """So many jobs became final."""
        self._n[status] += n
        self.ended[status] += n

    def remove(self, states: bytearray, runs: Iterable[tuple[int, int]]) -> None:
        """The final ones of these runs of a batch were forgotten."""
        for start, stop in runs:
            for status in _FINAL:
                self._n[status] -= states.count(status, start, stop)

    def remove_stored(self, keys: list[int]) -> None:
        """Whole batches that are finished and on disk were forgotten."""
        for at in range(0, len(keys), _KEYS):
            some = keys[at : at + _KEYS]
            which = ", ".join("?" * len(some))
            sql = f"SELECT kind, sum(n) FROM segment WHERE batch IN ({which}) GROUP BY kind"  # noqa: S608 - only marks
            for status, n in self._reader.rows(sql, some):
                self._n[status] -= n
        self._count_deleted(keys, -1)

    def _count_deleted(self, keys: list[int], sign: int) -> None:
        """Jobs that were forgotten one by one still have their segments: count these less (+1), or no more so (-1)."""
        for key in keys:
            marks = self._reader.rows("SELECT start, stop FROM mark WHERE batch = ? AND kind = ?", (key, DELETED))
            if not marks:
                continue
            deleted = bytearray(max(stop for _, stop in marks))
            for start, stop in marks:
                deleted[start:stop] = b"\x01" * (stop - start)
            for status, start, n in self._reader.rows("SELECT kind, start, n FROM segment WHERE batch = ?", (key,)):
                self._n[status] -= sign * deleted.count(1, start, start + n)

    @property
    def counts(self) -> list[int]:
        """By status code."""
        return list(self._n)


__all__ = ["Tally"]
