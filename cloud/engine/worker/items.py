"""Items of a batch: what calls the function with one, and the record that small ones share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import starmap

from cloud.engine import channel as ch
from cloud.engine.worker.run import max_rss_kb, usage
from cloud.jobs import (
    DONE,
    ITEM_TIMES,
    PACKED,
    PICKLED,
    STDERR,
    STDOUT,
    TIMES,
    VALUE,
    pack_outcome,
    pack_value,
)
from cloud.serialization import pickling
from cloud.serialization.flat import PICKLE, REFERENCE, loads_plain
from cloud.serialization.namespace import Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final


_LOOK_S: Final = 0.001
"""Time of day and processor time are looked up no more often: that takes longer than a small item does."""


def caller(
    function: Callable[..., Any], kind: int, namespace: Namespace, dirty: list[bool], path: list[str]
) -> Callable[[Any], Any]:
    """What calls a function with the arguments of an item as they were sent in a chunk of this kind.

    Args:
        function: The user's; what gives it, if it is to be built anew for each.
        kind: Of the chunk.
        namespace: The program's ``__main__``.
        dirty: See ``Surroundings``; set when an item changed the import path, which leaves no note by itself.
        path: That of the submission.
    """

    def call_spread(item: tuple[Any, ...]) -> Any:
        return function(*item)

    def call_loaded(item: bytes) -> Any:
        plain = item[0] == PICKLE and REFERENCE not in item  # as loads finds it, without a call for each
        args, kwargs = loads_plain(item) if plain else pickling.loads(item, namespace)
        called = function() if kind == ch.ANEW_CHUNK else function
        return called(*args, **kwargs)

    call = call_loaded if kind in ch.SEPARATE else call_spread if kind in ch.SPREAD else function
    if kind in (ch.ATOMS_CHUNK, ch.TUPLES_CHUNK):
        return call

    def call_and_look(item: Any) -> Any:
        value = call(item)
        if sys.path != path:
            dirty[0] = True  # the next call may be somebody else's
        return value

    return call_and_look


class ItemRecord:
    """Values of consecutive items, until they are packed as one outcome: as they are while all are immutable.

    Args:
        pid: Process id to report.
        output: Takes what was printed since it was called last.

    Attributes:
        pid: As given.
        values: Of the items so far.
        is_pickled: Each of the values, and of those to come, is a pickle by itself, as one of them could be changed.
        n_bytes: Of such pickles that were added.
        position: Of the first of them.
        note: Takes (position, began, ended, processor time of this process then) of an item that is not small. Its
            times are worked out later, for all together: what runs once a millisecond finds nothing in the processor's
            caches, where ``usage`` takes 3 us.
    """

    def __init__(self, pid: int, output: Callable[[], tuple[bytes, bytes]]) -> None:
        self.values: list[Any] = []
        self.is_pickled = False
        self.n_bytes = 0
        self.position = 0
        self.pid = pid
        self._output = output
        self._pickling_s = 0.0
        self._printed = b"", b""
        self._began = 0.0, 0.0
        self._user_s = self._system_s = 0.0
        self._used_at = -1.0
        self._epoch = 0.0
        self._noted: list[tuple[int, float, float, float]] = []
        self.note = self._noted.append

    def begin(self, position: int) -> float:
        """The next item is the first of a record; now, on the clock of ``perf_counter``."""
        self.position = position
        self.is_pickled = False
        self.n_bytes, self._pickling_s = 0, 0.0
        now = time.perf_counter()
        if now - self._used_at > _LOOK_S:
            self._epoch = time.time() - now
            used = usage()
            self._user_s, self._system_s, self._used_at = used.ru_utime, used.ru_stime, now
        self._began = self._epoch + now, now
        return now

    def go_on(self, n: int, ended: float) -> None:
        """The item that runs is the first of the next record: the ``n`` before it were packed, and ended then."""
        self.position += n
        self._began = self._began[0] + ended - self._began[1], ended

    def add_pickle(self, content: bytes, began: float) -> float:
        """Add a value that was pickled, which began then. The others so far are pickled too. Now, on that clock."""
        if not self.is_pickled:
            self.values[:] = map(pickling.dumps_plain, self.values)
            self.is_pickled = True
        self.values.append(content)
        self.n_bytes += len(content)
        now, first = time.perf_counter(), self._began[1]
        self._pickling_s += now - (began if began > first else first)  # this record may have begun since, at a poke
        return now

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
        used = usage()
        # The small items before it took about the time that had passed since that look.
        user_s = max(0.0, used.ru_utime - self._user_s - (began - self._used_at))
        system_s = max(0.0, used.ru_stime - self._system_s)
        self._user_s, self._system_s, self._used_at = used.ru_utime, used.ru_stime, time.perf_counter()
        return user_s, system_s, max_rss_kb(used)

    def _take_times(self, stop: int) -> list[tuple[int, float, float, float, float, int]]:
        """Those of items before ``stop``: index in the record, started, runtime, CPU seconds, peak memory in kB.

        How much of the CPU seconds was the system's, and the peak, are those of all together: the kernel counts both
        for the process, and the former in ticks of some milliseconds.
        """
        noted = self._noted
        if not noted:
            return []
        later = [each for each in noted if each[0] >= stop] if noted[-1][0] >= stop else []
        used = usage()
        peak_kb, cpu_s, looked_at = max_rss_kb(used), self._user_s + self._system_s, self._used_at
        in_all_s = used.ru_utime + used.ru_stime - cpu_s
        user = min(1.0, max(0.0, (used.ru_utime - self._user_s) / in_all_s)) if in_all_s > 0.0 else 1.0
        system, first, offset, times = 1.0 - user, self.position, self._began[0] - self._began[1], []
        for position, began, ended, total_s in noted[: len(noted) - len(later)]:
            # As in usage_of_last, but without a call for each: this delays the next item.
            own_s = max(total_s - cpu_s - (began - looked_at), 0.0)
            times.append((position - first, offset + began, ended - began, user * own_s, system * own_s, peak_kb))
            cpu_s, looked_at = total_s, ended
        used_s = cpu_s - self._user_s - self._system_s
        self._user_s += user * used_s
        self._system_s += system * used_s
        self._used_at = looked_at
        noted[:] = later
        return times

    def pack(self, ended: float, *, take_output: bool = True) -> tuple[int, int, bytes] | None:
        """(position, number of items, packed outcome) of what there is, if anything; the record is empty then.

        Args:
            ended: When the last item did: if it was pickled, after that.
            take_output: What was printed goes with it.
        """
        values, pickling_s = self.values, self._pickling_s
        self.n_bytes, self._pickling_s = 0, 0.0
        if not values:
            return None
        times = self._take_times(self.position + len(values))
        started, began = self._began
        runtime_s = max(0.0, ended - began - pickling_s)
        if not self.is_pickled:
            tag, content = PACKED, pickling.dumps_list(values)
        elif len(values) > 1:
            tag, content = PICKLED, pickling.dumps_list(values)
        else:
            tag, content = VALUE, values[0]
        out, err = self._output() if take_output else (b"", b"")
        if len(values) == len(times) == 1 and not (out or err):
            packed = pack_value(tag, content, self.pid, *times[0][1:])
        elif out or err or times:
            # Written below sys.stdout by one of the small items: which one cannot be told.
            sections = [(tag, content), (STDOUT, out), (STDERR, err)]
            sections.append((TIMES, b"".join(starmap(ITEM_TIMES.pack, times))))
            packed = pack_outcome(DONE, sections, pid=self.pid, started=started, runtime_s=runtime_s)
        else:
            packed = pack_value(tag, content, self.pid, started, runtime_s, 0.0, 0.0, 0)
        n = len(values)
        values.clear()
        return self.position, n, packed
