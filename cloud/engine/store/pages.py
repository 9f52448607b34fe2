"""Walks over all batches of a durable store, in the order of their jids: rows page by page, and what is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cloud.engine.store.held import Held, HeldBatches
from cloud.jobs import Jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Read = Callable[..., dict[int, Held]]
    """(condition on the row ``b``, its values, what follows it) -> finished batches on disk, by their first jid."""

_PAGE: Final = 256
_FIRST_PAGE: Final = 16
_END: Final = 1 << 62
_ON_DISK: Final = "+b.finished IS NOT NULL"


def oldest_first(read: Read, held: HeldBatches, label: str | None) -> Iterator[Held]:
    """All batches; what comes to be in memory or goes from there meanwhile is no harm."""
    where = f"b.jid0 > ? AND b.jid0 < ? AND {_ON_DISK}"
    where, values = (where, ()) if label is None else (f"{where} AND b.label = ?", (label,))
    last = 0
    while True:
        page = read(where, (last, _END, *values), f"ORDER BY b.jid0 LIMIT {_PAGE}")
        upto = max(page) if len(page) == _PAGE else _END
        page.update((each.batch.jid0, each) for each in held if last < each.batch.jid0 <= upto and _is_of(each, label))
        for jid0 in sorted(page):
            yield page[jid0]
        if upto == _END:
            return
        last = upto


def newest_first(read: Read, held: HeldBatches, before: int, label: str | None) -> Iterator[Held]:
    """Batches whose first jid is smaller than ``before``; to be walked under one lock. Short walks cost little."""
    where = f"b.jid0 < ? AND {_ON_DISK}"
    where, values = (where, ()) if label is None else (f"{where} AND b.label = ?", (label,))
    here = sorted((each for each in held if each.batch.jid0 < before and _is_of(each, label)), key=_first_jid)
    n = _FIRST_PAGE
    while True:
        page = read(where, (before, *values), f"ORDER BY b.jid0 DESC LIMIT {n}")
        before = min(page) if len(page) == n else 0
        while here and here[-1].batch.jid0 >= before:
            found = here.pop()
            page[found.batch.jid0] = found
        for jid0 in sorted(page, reverse=True):
            yield page[jid0]
        if not before:
            return
        n = min(_PAGE, 4 * n)


def ascending(jids: Jids) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of consecutive jids, in the order given."""
    start = stop = 0
    for jid in jids:
        if jid == stop and stop > start:
            stop += 1
            continue
        if stop > start:
            yield start, stop
        start, stop = jid, jid + 1
    if stop > start:
        yield start, stop


def _is_of(held: Held, label: str | None) -> bool:
    return label is None or held.batch.options.label == label


def _first_jid(held: Held) -> int:
    return held.batch.jid0


__all__ = ["ascending", "newest_first", "oldest_first"]
