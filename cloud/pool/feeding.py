"""Submits the items of an iterable piece by piece: what ``imap`` reads from.

::

    iterable ──► Feed: this thread for the first moments of a list, else a thread of its own
                    └──► sink.add(jids) · sink.add_error(…) · … ──► sink.end()

As in multiprocessing the iterable is read by another thread and ahead of its results, whether or not anybody asks for
them. Not without limit, though: no more is read while thousands of items are not finished.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice

from cloud.backends.base import Backend
from cloud.client.arguments import chunks_of, pack_items
from cloud.errors import BackendClosed
from cloud.pool.errors import unsent_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, Protocol

    from cloud.backends.base import MapWriter
    from cloud.pool.placing import Place
    from cloud.serialization.functions import Function
    from cloud.serialization.namespace import Namespace

    class Sink(Protocol):
        """Who is told of what was submitted. All but ``end`` may be called from another thread at any time."""

        def add(self, backend: Backend, jids: range) -> None:
            """The next items are these jobs."""

        def add_error(self, error: BaseException) -> None:
            """The next item could not be submitted."""

        def end(self, error: BaseException | None = None) -> None:
            """There are no more: the iterable has ended, or raised this. Only the first call counts."""


__all__ = ["Feed", "extend"]

_FIRST: Final = 64
_CHUNK_ITEMS: Final = 4096
_MAX_ITEMS: Final = 1 << 18
_BLOCK_S: Final = 0.05
_MAX_INLINE: Final = 1 << 20
_MAX_UNFINISHED: Final = 16_384
_QUICK_S: Final = 0.002
_INLINE_S: Final = 0.02
_INSTANT: Final = frozenset((list, tuple, range, set, frozenset, dict, str, bytes))
"""Iterables that never keep the reader waiting."""


def extend(
    writer: MapWriter, items: Iterable[Any], namespace: Namespace | None, chunksize: int, *, tuples: bool
) -> None:
    """Add items to a map.

    Args:
        chunksize: Items to a chunk, where workers are replaced after so many chunks; 0 where items may travel as suits
            them best.
    """
    if chunksize:
        reader = iter(items)
        while block := list(islice(reader, chunksize)):
            for chunk in pack_items(block, namespace, tuples=tuples):
                writer.extend(*chunk)
    else:
        for chunk in chunks_of(items, namespace, tuples=tuples):
            writer.extend(*chunk)


class Feed:
    """Submits ``func(item)`` for each item of an iterable.

    Args:
        place: Where to.
        func: What each job calls.
        iterable: Its items.
        sink: Told of the jobs, in order.
        chunksize: As multiprocessing's: when the iterable raises, the items of the chunk begun are lost.
        exact: Chunks are to have exactly that size.
        tuples: Each item is the arguments of one call.
    """

    def __init__(
        self,
        place: Place,
        func: Callable[..., Any],
        iterable: Any,
        sink: Sink,
        chunksize: int,
        *,
        exact: bool,
        tuples: bool = False,
    ) -> None:
        self._tuples = tuples
        self._place = place
        self._func = func
        self._pickled: tuple[Backend, Function] | None = None
        self._sink = sink
        self._chunksize = chunksize
        self._exact = exact
        self._n_unfinished = 0
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None
        try:
            # A range is submitted in ranges.
            self._items: Any = iterable if type(iterable) is range and not tuples else iter(iterable)
        except Exception as exc:  # noqa: BLE001 - whatever the user's iterable raises is for the reader of results
            sink.end(exc)
            return
        self._is_instant = type(iterable) in _INSTANT
        if self._is_instant:
            with suppress(Exception):  # raised again, for each item
                self._pickle()
            self._n = self._items_of_block(self._most_items() // 4 if self._mean_s() else _FIRST)
            until = time.monotonic() + _INLINE_S
            more, n = True, 0
            while more and n < _MAX_INLINE and time.monotonic() < until:
                n += self._n
                more = self._feed()
            if not more:
                sink.end()
                return
        else:
            self._n = chunksize
        self._thread = threading.Thread(target=self._run, name="cloud-pool-feed", daemon=True)
        self._thread.start()

    def _items_of_block(self, n: int) -> int:
        return max(1, min(n, self._most_items()) // self._chunksize) * self._chunksize

    def _most_items(self) -> int:
        # All results of a block are kept until the last was taken. Quick jobs do not have large ones. And an iterable
        # that may be endless is not read far ahead.
        mean_s = self._mean_s()
        if not self._is_instant or not mean_s:
            return _CHUNK_ITEMS
        return max(_CHUNK_ITEMS, min(int(_BLOCK_S / mean_s), _MAX_ITEMS))

    def _mean_s(self) -> float:
        return 0.0 if self._pickled is None else self._pickled[1].mean_s

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            more = True
            while more:
                if self._n_unfinished >= _MAX_UNFINISHED:
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopped or self._n_unfinished < _MAX_UNFINISHED)
                if self._stopped:
                    return
                more = self._feed()
        except BaseException as exc:  # noqa: BLE001 - else the results would end early, and nobody would know
            error = exc
        finally:
            self._sink.end(error)

    def _feed(self) -> bool:
        """Submit the next items; False when there are no more."""
        n = self._n
        began = time.perf_counter()
        block, error = self._read(n)
        took_s = time.perf_counter() - began
        # A slow iterable gives small blocks, so that its first items need not wait for its last.
        if took_s < _QUICK_S:
            self._n = self._items_of_block(max(4 * n, self._most_items() // 4))
        elif took_s > 5 * _QUICK_S:
            self._n = self._items_of_block(n // 4)
        if block:
            self._submit(block)
        if error is not None:
            self._sink.end(error)
        return error is None and len(block) == n

    def _read(self, n: int) -> tuple[list[Any] | range, BaseException | None]:
        """Up to ``n`` items; the error that came after them."""
        if type(self._items) is range:
            part, self._items = self._items[:n], self._items[n:]
            return part, None
        block: list[Any] = []
        try:
            # What comes before an error stays in the list.
            block.extend(islice(self._items, n))
        except BaseException as exc:  # noqa: BLE001 - whatever the user's iterable raises is for the reader of results
            del block[len(block) - len(block) % self._chunksize :]
            return block, exc
        return block, None

    def _submit(self, block: list[Any] | range) -> None:
        try:
            backend, writer = self._open_map()
            try:
                # All of it, before any begins: what cannot be pickled must not make what stands before it run twice.
                for chunk in list(self._packed(block, backend.namespace)):
                    writer.extend(*chunk)
                jids = writer.seal()
            except BaseException:
                writer.abandon()
                raise
        except Exception as exc:  # noqa: BLE001 - for the reader of results
            # One that cannot be pickled costs its own place only.
            if len(block) == 1:
                self._sink.add_error(unsent_error(exc))
            else:
                self._submit(block[: len(block) // 2])
                self._submit(block[len(block) // 2 :])
            return
        if self._thread is not None:
            self._count(backend, jids)
        self._sink.add(backend, jids)

    def _open_map(self) -> tuple[Backend, MapWriter]:
        backend, function = self._pickle()
        return backend, self._place.open_map(backend, function)

    def _pickle(self) -> tuple[Backend, Function]:
        """The function, pickled once for as long as its place is the same."""
        pickled = self._pickled
        if pickled is None or pickled[0] is not self._place.cloud.backend:
            pickled = self._pickled = self._place.pickled(self._func)
        return pickled

    def _packed(self, block: list[Any] | range, namespace: Namespace | None) -> Iterator[tuple[int, int, bytes]]:
        n = self._chunksize if self._exact else len(block) if type(block) is range else _CHUNK_ITEMS
        for start in range(0, len(block), n):
            yield from pack_items(block[start : start + n], namespace, tuples=self._tuples)

    def _count(self, backend: Backend, jids: range) -> None:
        def finished() -> None:
            with self._changed:
                self._n_unfinished -= len(jids)
                self._changed.notify()

        with self._changed:
            self._n_unfinished += len(jids)
        with suppress(BackendClosed):
            backend.when_final(jids, finished)

    def stop(self) -> None:
        """Read no more. An iterable that blocks is left behind with its thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def join(self) -> None:
        """Block until the iterable is exhausted and all is submitted."""
        if self._thread is not None:
            self._thread.join()
