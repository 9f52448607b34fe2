"""The record of a run of a batch's items: small ones share it, and the others have their times in it."""

from __future__ import annotations

import time
from collections.abc import Callable

from cloud.engine.worker.run import max_rss_kb, usage
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
        is_silent: True when that is nothing; quicker.

    Attributes:
        values: Of the items so far.
        position: Of the first of them.
    """

    def __init__(self, pid: int, output: Callable[[], tuple[bytes, bytes]], is_silent: Callable[[], bool]) -> None:
        self.values: list[Any] = []
        self.position = 0
        self._pid = pid
        self._output = output
        self._is_silent = is_silent
        self._printed = b"", b""
        self._began = 0.0, 0.0
        self._used: Any = None
        self._used_at = -1.0
        self._epoch = 0.0
        self._times: list[tuple[int, float, float, float, float, int]] = []

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

    def keep_times(self, position: int, began: float, ended: float) -> bool:
        """Keep the times of an item that is not small; False if it printed, and must have an outcome of its own."""
        if not self._is_silent():
            self._printed = self._output()
            if any(self._printed):
                return False
        user_s, system_s, rss_kb = self.usage_of_last(began)
        self._used_at = ended
        started = self._began[0] + began - self._began[1]
        self._times.append((position - self.position, started, ended - began, user_s, system_s, rss_kb))
        return True

    def output_of_last(self) -> tuple[bytes, bytes]:
        """What the item printed that ``keep_times`` refused, or what was printed since."""
        printed, self._printed = self._printed, (b"", b"")
        return printed if any(printed) else self._output()

    def usage_of_last(self, began: float) -> tuple[float, float, int]:
        """CPU seconds, user and system, of the item that began then, and peak memory in kB."""
        before, after = self._used, usage()
        self._used = after
        # The small items before it took about the time that had passed since that look.
        others_s = began - self._used_at
        user_s = max(0.0, after.ru_utime - before.ru_utime - others_s)
        return user_s, after.ru_stime - before.ru_stime, max_rss_kb(after)

    def pack(self, ended: float, *, take_output: bool = True) -> tuple[int, int, bytes] | None:
        """(position, number of items, packed outcome) of what there is, if anything; the record is empty then."""
        values, times = self.values, self._times
        if not values:
            return None
        started, began = self._began
        content = pickling.dumps_list(values)
        out, err = self._output() if take_output else (b"", b"")
        if len(values) == len(times) == 1 and not (out or err):
            packed = pack_value(PACKED, content, self._pid, *times[0][1:])
        elif out or err or times:
            # Written below sys.stdout by one of the small items: which one cannot be told.
            sections = [(PACKED, content), (STDOUT, out), (STDERR, err)]
            sections.append((TIMES, b"".join(ITEM_TIMES.pack(*each) for each in times)))
            packed = pack_outcome(DONE, sections, pid=self._pid, started=started, runtime_s=ended - began)
        else:
            packed = pack_value(PACKED, content, self._pid, started, ended - began, 0.0, 0.0, 0)
        n = len(values)
        values.clear()
        times.clear()
        return self.position, n, packed
