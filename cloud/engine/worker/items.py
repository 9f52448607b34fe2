"""The record of a run of a batch's items: small ones share it, and the others have their times in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import starmap

from cloud.engine.worker.run import RSS_UNIT, max_rss_kb, usage
from cloud.jobs import DONE, ITEM_TIMES, PACKED, STDERR, STDOUT, TIMES, pack_outcome, pack_value
from cloud.serialization import pickling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final


_LOOK_S: Final = 0.001
"""Time of day and processor time are looked up no more often: that takes longer than a small item does."""


class ItemRecord:
    """Values of consecutive items that are all immutable, until they are packed as one outcome.

    Args:
        pid: Process id to report.
        output: Takes what was printed since it was called last.

    Attributes:
        values: Of the items so far.
        position: Of the first of them.
        note: Takes (position, began, ended, what ``usage`` gave at its end) of an item that is not small. Its times are
            worked out later, for all together: what runs once a millisecond finds nothing in the processor's caches.
    """

    def __init__(self, pid: int, output: Callable[[], tuple[bytes, bytes]]) -> None:
        self.values: list[Any] = []
        self.position = 0
        self._pid = pid
        self._output = output
        self._printed = b"", b""
        self._began = 0.0, 0.0
        self._used: Any = None
        self._used_at = -1.0
        self._epoch = 0.0
        self._noted: list[tuple[int, float, float, Any]] = []
        self.note = self._noted.append

    def begin(self, position: int) -> float:
        """The next item is the first of a record; now, on the clock of ``perf_counter``."""
        self.position = position
        now = time.perf_counter()
        if now - self._used_at > _LOOK_S:
            self._epoch = time.time() - now
            self._used, self._used_at = usage(), now
        self._began = self._epoch + now, now
        return now

    def go_on(self, n: int) -> None:
        """The item that runs is the first of the next record: the ``n`` before it were packed."""
        self.position += n
        now = time.perf_counter()
        self._began = self._began[0] + now - self._began[1], now

    def has_printed(self) -> bool:
        """True if the item that ended last printed, and must have an outcome of its own."""
        self._printed = self._output()
        return any(self._printed)

    def output_of_last(self) -> tuple[bytes, bytes]:
        """What that item printed, or what was printed since."""
        printed, self._printed = self._printed, (b"", b"")
        return printed if any(printed) else self._output()

    def usage_of_last(self, began: float) -> tuple[float, float, int]:
        """CPU seconds, user and system, of the item that began then, and peak memory in kB."""
        before, after = self._used, usage()
        # The small items before it took about the time that had passed since that look.
        user_s = max(0.0, after.ru_utime - before.ru_utime - (began - self._used_at))
        self._used, self._used_at = after, time.perf_counter()
        return user_s, after.ru_stime - before.ru_stime, max_rss_kb(after)

    def _take_times(self, stop: int) -> list[tuple[int, float, float, float, float, int]]:
        """Those of items before ``stop``: index in the record, started, runtime, CPU seconds, peak memory in kB."""
        noted, first, offset = self._noted, self.position, self._began[0] - self._began[1]
        later = [each for each in noted if each[0] >= stop] if noted and noted[-1][0] >= stop else []
        before, looked_at, times = self._used, self._used_at, []
        for position, began, ended, used in noted[: len(noted) - len(later)]:
            # As in usage_of_last, but without a call for each: this delays the next item.
            user_s = used.ru_utime - before.ru_utime - (began - looked_at)
            user_s = max(user_s, 0.0)
            system_s, rss_kb = used.ru_stime - before.ru_stime, used.ru_maxrss // RSS_UNIT
            times.append((position - first, offset + began, ended - began, user_s, system_s, rss_kb))
            before, looked_at = used, ended
        self._used, self._used_at = before, looked_at
        noted[:] = later
        return times

    def pack(self, ended: float, *, take_output: bool = True) -> tuple[int, int, bytes] | None:
        """(position, number of items, packed outcome) of what there is, if anything; the record is empty then."""
        values = self.values
        if not values:
            return None
        times = self._take_times(self.position + len(values))
        started, began = self._began
        content = pickling.dumps_list(values)
        out, err = self._output() if take_output else (b"", b"")
        if len(values) == len(times) == 1 and not (out or err):
            packed = pack_value(PACKED, content, self._pid, *times[0][1:])
        elif out or err or times:
            # Written below sys.stdout by one of the small items: which one cannot be told.
            sections = [(PACKED, content), (STDOUT, out), (STDERR, err)]
            sections.append((TIMES, b"".join(starmap(ITEM_TIMES.pack, times))))
            packed = pack_outcome(DONE, sections, pid=self._pid, started=started, runtime_s=ended - began)
        else:
            packed = pack_value(PACKED, content, self._pid, started, ended - began, 0.0, 0.0, 0)
        n = len(values)
        values.clear()
        return self.position, n, packed
