"""What the engine sent ahead of the jobs that use it: surroundings, functions, the items of maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat

from cloud.engine import channel as ch
from cloud.serialization import pickling
from cloud.serialization.kept import KeptFunctions
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import SharedBytes, payload_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.engine.worker.in_place import InPlace
    from cloud.serialization.shared import Segment

_MAX_CONTEXTS: Final = 64


class Unshared:
    """Items that may be changed: whoever asks for some gets them as nobody had them before.

    Args:
        content: One pickle of the list of all.
    """

    def __init__(self, content: bytes | memoryview) -> None:
        self._content = content
        self._items: list[Any] | None = None
        self._given = bytearray()

    def __getitem__(self, which: slice) -> list[Any]:
        items = self._items
        if items is None or any(self._given[which]):
            self._items = items = pickling.loads_list(self._content)
            self._given = bytearray(len(items))
        part = items[which]
        self._given[which] = b"\x01" * len(part)  # first: a signal handler may raise between the two
        items[which] = [None] * len(part)
        return part


def each_once(items: list[Any]) -> Iterator[Any]:
    """Them in order; none is kept, with what its job may have put into it, while the next ones run."""
    items.reverse()
    return map(list.pop, repeat(items, len(items)))


class Received:
    """What jobs refer to by number, and their arguments.

    Attributes:
        contexts: Surroundings that jobs run in.
        payloads: Functions as they came.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.contexts: dict[int, tuple[Any, ...]] = {}
        self.payloads: dict[int, bytes] = {}
        self._chunks: dict[int, tuple[int, Any]] = {}
        self._large_chunk: tuple[int, Any] | None = None
        self._last_large: Any = None
        self._functions = KeptFunctions(namespace)
        self._namespace = namespace
        self._in_place: InPlace | None = None

    # --- as it comes --------------------------------------------------------------------------------------------------

    def on_context(self, body: Any) -> None:
        """Keep surroundings."""
        number = ch.ID.unpack_from(body)[0]
        if len(self.contexts) > _MAX_CONTEXTS:
            self.contexts.clear()
        self.contexts[number] = pickling.loads(body[ch.ID.size :])

    def on_function(self, body: Any) -> None:
        """Keep a function."""
        self.payloads[ch.ID.unpack_from(body)[0]] = payload_from(body, ch.ID.size)

    def on_forget(self, body: Any) -> None:
        """Keep a function no longer."""
        token = ch.ID.unpack_from(body)[0]
        self.payloads.pop(token, None)
        self._functions.forget(token)
        if self._in_place is not None:
            self._in_place.forget(token)

    def on_chunk(self, body: Any) -> None:
        """Keep items of a map."""
        token, kind, n = ch.CHUNK_HEAD.unpack_from(body)
        offset = ch.CHUNK_HEAD.size
        if type(body) is SharedBytes:
            # An item with a segment has a chunk of its own, which is sent whenever it is to be run.
            self._large_chunk = kind, [payload_from(body, offset + 4)]
            return
        if kind in ch.SEPARATE:
            items: Any = []
            lengths = memoryview(body)[offset : offset + 4 * n].cast("I")
            offset += 4 * n
            for length in lengths:
                items.append(body[offset : offset + length])
                offset += length
        elif kind in ch.UNSHARED:
            items = Unshared(memoryview(body)[offset:])
        else:
            items = pickling.loads_list(memoryview(body)[offset:])
        if len(self._chunks) >= ch.MAX_CHUNKS:
            self._chunks.pop(next(iter(self._chunks)))
        self._chunks[token] = kind, items

    # --- as jobs need it ----------------------------------------------------------------------------------------------

    def chunk(self, token: int) -> tuple[int, Any]:
        """(kind, items) of a chunk; of one with a segment only once."""
        large, self._large_chunk = self._large_chunk, None
        return self._chunks[token] if large is None else large

    def function(self, token: int, *, keep: bool) -> Callable[..., Any]:
        """A function, built anew unless it was kept."""
        function = self._functions.get(token)
        if function is None:
            function = pickling.loads(self.payloads[token], self._namespace)
            if keep:
                self._functions.keep(token, function, self.payloads[token])
        return function

    def arguments(self, token: int, payload: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a job of the function with that number."""
        if type(payload) is SharedBytes:
            if self._in_place is None:
                from cloud.engine.worker.in_place import InPlace

                self._in_place = InPlace()
            self._last_large = payload
            payload = self._in_place.given(token, payload)
        loaded: tuple[tuple[Any, ...], dict[str, Any]] = pickling.loads(payload, self._namespace)
        return loaded

    def in_place(self, buffers: list[memoryview]) -> Segment | None:
        """Where buffers of the job's result lie, if that is in its arguments and can be sent as it is."""
        return None if self._in_place is None else self._in_place.segment_of(buffers)

    def end_job(self) -> None:
        """The result has been packed, and the arguments are used no more."""
        if self._in_place is not None:
            self._in_place.end()

    def prepare(self, go_on: Callable[[], bool]) -> None:
        """Get memory that the next job may need, as long as ``go_on()``."""
        if self._in_place is not None:
            self._in_place.prepare(go_on)

    @property
    def is_prepared(self) -> bool:
        """Whether memory was got for the next job."""
        return self._in_place is not None and self._in_place.is_prepared

    def give_back(self) -> None:
        """Hold that memory no longer: a job did not need it, or none came."""
        if self._in_place is not None:
            self._in_place.give_back()

    @property
    def has_large(self) -> bool:
        """Whether large arguments of the last job are still held here."""
        return self._last_large is not None

    def let_go(self) -> None:
        """Hold them no longer."""
        self._last_large = None


__all__ = ["Received", "Unshared", "each_once"]
