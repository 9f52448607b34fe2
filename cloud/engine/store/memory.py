"""Keeps jobs in this process's memory, for as long as it lives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from cloud.engine.store.base import Batch, Store, not_found
from cloud.jobs import DONE, STATUS_LABELS, Jids


class JidSource:
    """Hands out jids; ``cloud.mp`` and the simulator share one, as PiCloud's did."""

    def __init__(self) -> None:
        self._next = 1

    def take(self, n: int) -> int:
        """Reserve n consecutive jids, return the first."""
        first = self._next
        self._next = first + n
        return first

    @property
    def next(self) -> int:
        """The jid handed out next."""
        return self._next


class MemoryStore(Store):
    """Batches: a call under its jid; maps, and calls that share a batch, by their first."""

    def __init__(self, jids: JidSource) -> None:
        self._jids = jids
        self._calls: dict[int, Batch] = {}
        self._maps: dict[int, Batch] = {}
        self._firsts: list[int] = []
        self._deleted: dict[int, set[int]] = {}

    def new_jids(self, n: int) -> int:
        return self._jids.take(n)

    def add(self, batch: Batch) -> None:
        if batch.arguments is not None:
            self._calls[batch.jid0] = batch
        else:
            self._maps[batch.jid0] = batch
            self._firsts.append(batch.jid0)

    def locate(self, jid: int) -> tuple[Batch, int]:
        batch = self._calls.get(jid)
        if batch is not None:
            return batch, 0
        at = bisect_right(self._firsts, jid) - 1
        if at >= 0:
            batch = self._maps[self._firsts[at]]
            index = jid - batch.jid0
            if index < batch.n and not self.forgotten(batch, index):
                return batch, index
        raise not_found(jid)

    def runs(self, jids: Jids) -> list[tuple[Batch, int, int]]:
        if type(jids) is range and jids.step == 1:
            return list(self._contiguous(jids.start, jids.stop))
        if len(jids) == 1:
            batch, index = self.locate(jids[0])
            return [(batch, index, index + 1)]
        found: list[tuple[Batch, int, int]] = []
        start = stop = 0
        for jid in jids:
            if jid != stop:
                if start != stop:
                    found += self._contiguous(start, stop)
                start = jid
            stop = jid + 1
        found += self._contiguous(start, stop)
        return found

    def _contiguous(self, jid: int, end: int) -> Iterator[tuple[Batch, int, int]]:
        calls, maps = self._calls, self._maps
        while jid < end:
            call = calls.get(jid)
            if call is not None:
                yield call, 0, 1
                jid += 1
                continue
            batch, index = (maps[jid], 0) if jid in maps else self.locate(jid)
            stop = min(batch.n, index + end - jid)
            deleted = self._deleted.get(batch.jid0)
            if deleted:
                for each in range(index, stop):
                    if each in deleted:
                        self.locate(batch.jid0 + each)
            yield batch, index, stop
            jid += stop - index

    def delete(self, batch: Batch, start: int, stop: int) -> None:
        if batch.arguments is not None:
            self._calls.pop(batch.jid0, None)
            return
        if self._maps.get(batch.jid0) is not batch:
            return  # its last job was forgotten before
        if stop - start < batch.n or not batch.sealed:
            deleted = self._deleted.setdefault(batch.jid0, set())
            deleted.update(range(start, stop))
            batch.drop_outcomes(start, stop)
            if len(deleted) < batch.n or not batch.sealed:
                return
        self._deleted.pop(batch.jid0, None)
        del self._maps[batch.jid0]
        del self._firsts[bisect_right(self._firsts, batch.jid0) - 1]

    def find_call(self, jid: int) -> Batch | None:
        return self._calls.get(jid)

    def forget_call(self, jid: int) -> bool:
        return self._calls.pop(jid, None) is not None

    def batches(self, *, label: str | None = None, unfinished: bool = False) -> Iterator[Batch]:
        for batch in sorted([*self._calls.values(), *self._maps.values()], key=_first_jid):
            if (label is None or batch.options.label == label) and not (unfinished and batch.finished):
                yield batch

    def newest(self, before: int, *, label: str | None = None) -> Iterator[Batch]:
        for batch in sorted([*self._calls.values(), *self._maps.values()], key=_first_jid, reverse=True):
            if batch.jid0 < before and label in (None, batch.options.label):
                yield batch

    def forgets(self, batch: Batch) -> bool:
        return batch.jid0 in self._deleted

    def forgotten(self, batch: Batch, index: int) -> bool:
        deleted = self._deleted.get(batch.jid0)
        return deleted is not None and index in deleted

    def tally(self) -> list[int]:
        counts = [0] * len(STATUS_LABELS)
        for batch in self._calls.values():
            counts[batch.states[0]] += 1
        for batch in self._maps.values():
            for status in range(DONE, len(counts)):
                counts[status] += batch.states.count(status)
            for index in self._deleted.get(batch.jid0, ()):
                counts[batch.states[index]] -= 1
        counts[:DONE] = [0] * DONE
        return counts


def _first_jid(batch: Batch) -> int:
    return batch.jid0
