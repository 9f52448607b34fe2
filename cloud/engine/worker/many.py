"""Runs items of a batch one after the other, with as little as possible between two."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

from cloud.engine import channel as ch
from cloud.engine.worker.capture import Capture
from cloud.engine.worker.items import ItemRecord, caller
from cloud.engine.worker.outbox import Outbox
from cloud.engine.worker.run import Call, pack_ended
from cloud.engine.worker.surroundings import Surroundings
from cloud.serialization import pickling
from cloud.serialization.flat import ATOMS, are_of, pickle_flat
from cloud.serialization.namespace import Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, NoReturn

SMALL_S: Final = 0.0001
"""Items of a batch that ran shorter than this share one outcome record with their neighbours."""

_LARGE: Final = 4096
"""Values of this length are not kept back to be sent with others."""

_MAX_VALUES: Final = 8192
"""About so many values share a record: as many as the processor's caches hold."""

_MAX_BYTES: Final = 1 << 16
"""Of those that are pickled each by itself."""


class Many:
    """The items a worker runs by the run, and the record that those share whose values can.

    Args:
        page: The shared page.
        outbox: Takes the outcomes.
        capture: Tells of output.
        surroundings: Their path is that of the submission.
        dirty: See ``Surroundings``.
        namespace: The program's ``__main__``.
        record: Of the items that share an outcome.
        tidy: Puts back what jobs changed.
    """

    def __init__(
        self,
        page: ch.Page,
        outbox: Outbox,
        capture: Capture,
        surroundings: Surroundings,
        dirty: list[bool],
        namespace: Namespace,
        record: ItemRecord,
        tidy: Callable[[], None],
    ) -> None:
        self._slots, self._raw = page.slots, page.raw
        self._outbox = outbox
        self._capture = capture
        self._surroundings = surroundings
        self._dirty = dirty
        self._namespace = namespace
        self._record = record
        self._tidy = tidy
        self._last: float | None = None  #: while a value is pickled: when the item before it ended

    def run_items(
        self, function: Callable[..., Any], kind: int, items: Iterable[Any], position: int, flags: int
    ) -> None:
        """Run consecutive items of a chunk of that kind.

        Args:
            function, kind: See ``caller``.
            items: As they were sent.
            position: Of the first.
            flags: Of the frame that told of them.
        """
        slots, dirty, atoms, clock = self._slots, self._dirty, ATOMS, time.perf_counter
        current, limit, small_s, cpu_clock = ch.CURRENT, ch.LIMIT, SMALL_S, time.process_time
        raw, unlimited = self._raw, ch.LIMIT_TOP
        call = caller(function, kind, self._namespace, dirty, self._surroundings.path)
        prompt, deliver, outbox = bool(flags & ch.PROMPT), bool(flags & ch.DELIVER), self._outbox
        record, is_silent = self._record, self._capture.is_silent
        values, note = record.values, record.note
        usual: type | None = None
        content: bytes | BaseException | None
        last, due, full = self._begin(position)
        soon = soon_added = -1.0  # the first is looked at more closely, for its type
        for here, item in enumerate(items, position):
            slots[current] = here
            if not raw[unlimited] and here >= slots[limit]:
                break
            try:
                value = call(item)
            except BaseException as exc:  # noqa: BLE001 - packed as this item's outcome
                ended: tuple[Any, BaseException | None] = None, exc
                now = clock()
                content = None
            else:
                now = clock()
                if now < soon and (type(value) is usual or type(value) in atoms) and not dirty[0]:
                    values.append(value)
                    last = now
                    continue
                if now < soon_added and self._is_in_order() and (ended_at := self._add_small(value, now)):
                    last = ended_at
                    continue
                small, content = now - last < small_s, None
                if not dirty[0] and (small or is_silent() or not record.has_printed()):
                    noted = None if small else (here, last, now, cpu_clock())
                    usual = type(value) if type(value) in atoms and not record.is_pickled else None
                    shares = usual is not None or self._is_to_be_kept(value)
                    if not shares:
                        self._last = last
                        content = self.pickle_value(value)
                        self._last = None
                        shares = type(content) is bytes and self._is_in_order()
                    if shares:
                        if noted is not None:
                            note(noted)  # before its value: a poke between the two packs neither
                        if type(content) is bytes:
                            last = record.add_pickle(content, now)
                            large = len(content) > _LARGE or record.n_bytes > _MAX_BYTES
                        else:
                            values.append(value)
                            last = now if small else clock()
                            large = (usual is str or usual is bytes) and len(value) > _LARGE
                        if last > due or here >= full or large or deliver or (prompt and not small) or outbox.called_in:
                            self.pack(last, take_output=small)
                            outbox.flush()
                            last, due, full = self._begin(here + 1)
                        soon, soon_added = (-1.0, -1.0) if deliver else self._soon(last)
                        continue
                ended = value, None
                del value
            self.pack(last, take_output=False)
            outcome = pack_ended(
                ended,
                Call(_no_load, self._namespace),
                (record.pid, time.time() - (now - last), now - last, *record.usage_of_last(last)),
                record.output_of_last,
                content=content,
            )
            del ended, content
            outbox.hold(here, 1, outcome)
            self._tidy()
            if prompt or deliver or outbox.is_due():
                outbox.flush()
            last, due, full = self._begin(here + 1)
            soon, soon_added = (-1.0, -1.0) if deliver else self._soon(last)
        self.pack(last)
        self._tidy()

    def pickle_value(self, value: Any) -> bytes | BaseException:
        """The pickle of a value, or what pickling it raised: a ``__reduce__`` of the user's may raise anything.

        By this name the worker's signal handlers know that the user's code runs.
        """
        try:
            return pickling.dumps_result(value, self._namespace, share=True)
        except BaseException as exc:  # noqa: BLE001 - packed as this item's outcome; it is not asked again
            return exc

    def _is_to_be_kept(self, value: Any) -> bool:
        """True for a tuple of atoms that can be kept as it is."""
        return not self._record.is_pickled and is_flat_tuple(value, small=True) and self._is_in_order()

    def _is_in_order(self) -> bool:
        """True if the item left nothing behind that is to be put back before the next one."""
        # Neither what stands in the place of a stream nor the import path leaves a note.
        return not self._dirty[0] and self._capture.is_in_place() and sys.path == self._surroundings.path

    def _soon(self, last: float) -> tuple[float, float]:
        """Until when what ends is small, and need not be looked at more closely: if it is an atom, and else."""
        return -1.0 if self._record.is_pickled else last + SMALL_S, last + SMALL_S

    def _add_small(self, value: Any, now: float) -> float:
        """Add the value of a small item that ended now; when that was done, or 0.0 if it takes a closer look."""
        if not self._record.is_pickled:
            if not is_flat_tuple(value):
                return 0.0
            self._record.values.append(value)
            return now
        try:
            flat = pickle_flat(value)
        except Exception:  # noqa: BLE001 - a thread of the job's may change it meanwhile; who looks closer says so
            return 0.0
        return self._record.add_pickle(flat, now) if isinstance(flat, bytes) else 0.0

    def _begin(self, position: int) -> tuple[float, float, int]:
        """Begin a record: now, when it is due to be handed over, and the item that fills it."""
        left_s = self._outbox.note_beginning()
        now = self._record.begin(position)
        return now, now + left_s, position + _MAX_VALUES - 1

    def pack(self, ended: float, *, take_output: bool = True) -> None:
        """Put what the record holds into the outbox; its last item ended then."""
        packed = self._record.pack(ended, take_output=take_output)
        if packed is not None:
            self._outbox.hold(*packed)

    def pack_amid(self) -> None:
        """As ``pack``, while an item runs, which is the first of the next record."""
        n = len(self._record.values)
        if n:
            # Neither is one that is being pickled, nor what that takes, to lengthen those before it.
            now = time.perf_counter() if self._last is None else self._last
            self.pack(now, take_output=False)
            self._record.go_on(n, now)


def is_flat_tuple(value: Any, *, small: bool = False) -> bool:
    """True for a tuple of what is immutable and refers to nothing; with ``small``, of nothing large."""
    if type(value) is not tuple or not are_of(ATOMS, value):
        return False
    return not small or all(len(each) <= _LARGE for each in value if type(each) is str or type(each) is bytes)


def _no_load() -> NoReturn:
    raise AssertionError("this call has ended")
