"""The batches that are in memory: all unfinished ones, and of the finished ones those that were used last."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterator

from cloud.engine.store.base import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_N_RECENT: Final = 512
_RECENT_ITEMS: Final = 1 << 23
"""Together they have no more jobs than this: a map of a million weighs more than a call."""


class Held:
    """A batch in memory.

    Attributes:
        batch: That.
        deleted: One byte a job, 1 for those that were forgotten; None for no job.
        n_pending: Changes of it that are not on disk.
    """

    __slots__ = ("batch", "deleted", "n_pending")

    def __init__(self, batch: Batch, deleted: bytearray | None = None) -> None:
        self.batch = batch
        self.deleted = deleted
        self.n_pending = 0


class HeldBatches:
    """Finds them by key and by jid."""

    def __init__(self) -> None:
        self._by_key: dict[int, Held] = {}
        self._calls: dict[int, Held] = {}
        self._maps: list[Held] = []
        self._recent: OrderedDict[int, Held] = OrderedDict()
        self._n_recent_items = 0

    def get(self, key: int) -> Held | None:
        """The batch of this key, or None."""
        return self._by_key.get(key)

    def add(self, held: Held) -> None:
        """Hold one more; if it has jids, it can be found by them."""
        self._by_key[held.batch.key] = held
        if held.batch.jid0:
            self.place(held)

    def place(self, held: Held) -> None:
        """It has jids now."""
        if held.batch.is_map:
            insort(self._maps, held, key=_jid0)
        else:
            self._calls[held.batch.jid0] = held

    def remove(self, key: int) -> None:
        """Hold it no more. No effect if it is not here."""
        held = self._by_key.pop(key, None)
        if held is None:
            return
        batch = held.batch
        if self._recent.pop(key, None) is not None:
            self._n_recent_items -= batch.n
        if not batch.is_map:
            self._calls.pop(batch.jid0, None)
            return
        at = bisect_right(self._maps, batch.jid0, key=_jid0) - 1
        if at >= 0 and self._maps[at] is held:
            del self._maps[at]

    def at(self, jid: int) -> Held | None:
        """The batch with this job, or None."""
        held = self._calls.get(jid)
        if held is None:
            at = bisect_right(self._maps, jid, key=_jid0) - 1
            if at < 0 or jid >= self._maps[at].batch.jid0 + self._maps[at].batch.n:
                return None
            held = self._maps[at]
        if held.batch.key in self._recent:
            self._recent.move_to_end(held.batch.key)
        return held

    def let_go(self, held: Held) -> None:
        """Count it among the recent ones if it is finished and all on disk, and drop the oldest of these."""
        batch = held.batch
        if held.n_pending or not batch.finished or self._by_key.get(batch.key) is not held:
            return
        batch.chunks = []
        if batch.key not in self._recent:
            self._recent[batch.key] = held
            self._n_recent_items += batch.n
        while len(self._recent) > _N_RECENT or (self._n_recent_items > _RECENT_ITEMS and len(self._recent) > 1):
            oldest = next(iter(self._recent.values()))
            if not oldest.n_pending:
                self.remove(oldest.batch.key)
                continue
            # Some of its jobs were deleted just now; it is recent again when that is on disk.
            del self._recent[oldest.batch.key]
            self._n_recent_items -= oldest.batch.n

    def unfinished(self, label: str | None = None) -> list[Batch]:
        """Unfinished batches that have jids, oldest first; with a label only those of it."""
        found = [held.batch for held in self if not held.batch.finished]
        return sorted((each for each in found if label in (None, each.options.label)), key=lambda each: each.jid0)

    def __iter__(self) -> Iterator[Held]:
        """Those that have jids, in no order."""
        yield from self._calls.values()
        yield from self._maps


def _jid0(held: Held) -> int:
    return held.batch.jid0


__all__ = ["Held", "HeldBatches"]
