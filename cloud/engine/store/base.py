"""The contract of a store of jobs, and the record it keeps: the batch.

A batch is one submission: a single call, or a map of N calls that share one function. Or it is several calls that were
made one after the other and are kept like a map. Its jobs have consecutive jids.
Stores do not lock; the engine calls them one operation at a time, and each operation is atomic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count, repeat

from cloud.errors import JobNotFound
from cloud.jobs import DONE, QUEUED, Jids, JobOptions
from cloud.serialization.functions import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.environment import Environment


_MAX_RUN: Final = 1 << 16


class Chunk:
    """Arguments of a run of map items, pickled together.

    Attributes:
        token: Names it inside the engine.
        start: Index of its first item in the batch.
        n: Number of items.
        kind: One of the channel's kinds of chunks.
        payload: Opaque bytes, or where they are kept; for separate items the lengths (u32 each), then the pickles.
    """

    __slots__ = ("kind", "n", "payload", "start", "token")

    def __init__(self, token: int, start: int, n: int, kind: int, payload: bytes) -> None:
        self.token = token
        self.start = start
        self.n = n
        self.kind = kind
        self.payload: Any = payload


class Batch:
    """One submission and all its jobs.

    Attributes:
        jid0: Jid of its first job; the job with index i has jid0 + i.
        key: Names it inside its store, also before it has jids; 0 where the store needs no such name.
        n: Number of jobs so far.
        function: The pickled function.
        context: (id, pickled surroundings) of the submission.
        options: As given with the submission.
        depth: 0 for jobs of the program, parent's depth + 1 for jobs submitted by jobs.
        environment: What its workers must be; None where all workers are alike.
        created: Seconds since the epoch.
        arguments: Pickled arguments of a single call, or what reads them back; None for a map, and for several calls
            together.
        chunks: Arguments of a map, by start.
        sealed: False while a map may still grow.
        states: One status code a job. A job that runs is QUEUED here: the executor knows which run.
        free: Runs of items not given to a worker, (start, stop) in order; they may hold finished ones. None for a call.
        attempts: Attempts begun before the present one, by index; only indexes with any.
        segments: (start, n, packed outcome) of finished items, ordered by start.
        n_final: Jobs in a final state.
        n_waiting_on: Unfinished dependencies.
        watches: Who is to be told of jobs that finish; None while nobody is.
    """

    __slots__ = (
        "_is_free",
        "arguments",
        "attempts",
        "chunks",
        "context",
        "created",
        "depth",
        "environment",
        "free",
        "function",
        "jid0",
        "key",
        "n",
        "n_final",
        "n_waiting_on",
        "options",
        "queued",
        "sealed",
        "segments",
        "states",
        "watches",
    )

    def __init__(
        self,
        jid0: int,
        function: Function,
        context: tuple[int, bytes],
        options: JobOptions,
        depth: int,
        created: float,
        arguments: bytes | None,
        environment: Environment | None = None,
    ) -> None:
        self.jid0 = jid0
        self.key = 0
        self.environment = environment
        self.function = function
        self.context = context
        self.options = options
        self.depth = depth
        self.created = created
        self.arguments: bytes | Stored | None = arguments
        self.n_final = 0
        self.n_waiting_on = 0
        self.watches: Watches | None = None
        # A hundred thousand calls may be outstanding: a call has no containers that it does not need.
        self.segments: Sequence[tuple[int, int, bytes | Stored]] = ()
        self.attempts: dict[int, int] | None = None
        self.queued = False
        if arguments is not None:
            self.n = 1
            self.states = bytearray(b"\x01")
            self.sealed = True
            self.chunks: list[Chunk] = _NO_CHUNKS
            self.free: deque[tuple[int, int]] | None = None
            self._is_free = True
        else:
            self.n = 0
            self.states = bytearray()
            self.sealed = False
            self.chunks = []
            self.free = deque()

    @property
    def is_map(self) -> bool:
        """True for a map, whatever its length, and for several calls together."""
        return self.arguments is None

    @property
    def finished(self) -> bool:
        """True when every job is in a final state and no more can come."""
        return self.n_final == self.n and self.sealed

    def watch(self, start: int, stop: int, notify: Callable[[Batch, int, int], None]) -> Watch:
        """Tell of each of these jobs that becomes final from now on: see ``Watch``."""
        if self.watches is None:
            self.watches = Watches()
        watch = Watch(start, stop, notify)
        self.watches.add(watch)
        return watch

    def chunk_at(self, index: int) -> Chunk:
        """The chunk that holds an item's arguments."""
        return self.chunks[bisect_right(self.chunks, index, key=_chunk_start) - 1]

    def add_segment(self, start: int, n: int, outcome: bytes | Stored) -> None:
        """Keep the outcome of a run of items."""
        segments = self.segments
        if not isinstance(segments, list):
            self.segments = [(start, n, outcome)]
        elif segments[-1][0] < start:
            segments.append((start, n, outcome))
        else:
            segments.insert(_n_before(segments, start), (start, n, outcome))

    def add_segments(self, start: int, outcomes: list[bytes]) -> None:
        """Keep the outcomes of consecutive items, one each."""
        added = zip(count(start), repeat(1), outcomes, strict=False)
        segments = self.segments
        if not isinstance(segments, list):
            self.segments = list(added)
        elif segments[-1][0] < start:
            segments.extend(added)
        else:
            at = _n_before(segments, start)
            segments[at:at] = added

    def drop_outcomes(self, start: int, stop: int) -> None:
        """Let go of what nobody will ask for: outcomes of these items only."""
        segments = self.segments
        at = max(0, _n_before(segments, start) - 1)
        while isinstance(segments, list) and at < len(segments) and segments[at][0] < stop:
            low, n, _ = segments[at]
            if start <= low and low + n <= stop:
                segments[at] = low, n, b""
            at += 1

    def segment_at(self, index: int) -> tuple[int, int, bytes | Stored]:
        """The segment that holds an item's outcome; the item must be final."""
        segments = self.segments
        if len(segments) == 1:
            return segments[0]
        return segments[_n_before(segments, index) - 1]

    def segments_in(self, start: int, stop: int) -> Iterator[tuple[int, int, bytes | Stored]]:
        """Segments that overlap the items from start to stop, in order."""
        segments = self.segments
        at = max(0, _n_before(segments, start) - 1)
        while at < len(segments) and segments[at][0] < stop:
            if segments[at][0] + segments[at][1] > start:
                yield segments[at]
            at += 1

    def attempt(self, index: int) -> int:
        """Number of the present attempt, from 1."""
        return 1 if self.attempts is None else self.attempts.get(index, 0) + 1

    def next_attempt(self, index: int) -> None:
        """Count one more attempt."""
        if self.attempts is None:
            self.attempts = {}
        self.attempts[index] = self.attempts.get(index, 0) + 1

    def next_free(self) -> tuple[int, int] | None:
        """A first run of items that are queued and not given to a worker; drops finished ones on the way."""
        free, states = self.free, self.states
        if free is None:
            return (0, 1) if self._is_free and states[0] == QUEUED else None
        while free:
            start, stop = free[0]
            if states[start] != QUEUED:
                found = states.find(QUEUED, start, stop)
                if found < 0:
                    free.popleft()
                    continue
                start = found
                free[0] = (start, stop)
            # No more than a worker may be given: looking at all of a long map each time would make it quadratic.
            near = min(stop, start + _MAX_RUN)
            if near - start > 1 and states.count(QUEUED, start, near) != near - start:
                end = start
                while states[end] == QUEUED:
                    end += 1
                free[0] = (end, stop)
                free.appendleft((start, end))
                return start, end
            return start, near
        return None

    @property
    def n_free(self) -> int:
        """Items of a map that are not given to a worker, finished ones among them perhaps."""
        return sum(stop - start for start, stop in self.free or ())

    @property
    def queued_s(self) -> float:
        """Estimated runtime of the items of a map that are not given to a worker."""
        return self.n_free * self.function.mean_s

    def take_free(self, stop: int) -> None:
        """Note that the first run's items before ``stop`` were given out."""
        if self.free is None:
            self._is_free = False
            return
        _, end = self.free.popleft()
        if stop < end:
            self.free.appendleft((stop, end))

    def put_free(self, start: int, stop: int, *, first: bool = False) -> None:
        """Note that items may be given out; ``first``: before all others."""
        if self.free is None:
            self._is_free = True
        elif first:
            self.free.appendleft((start, stop))
        else:
            self.free.append((start, stop))


_NO_CHUNKS: list[Chunk] = []


def _chunk_start(chunk: Chunk) -> int:
    return chunk.start


def _n_before(segments: Sequence[tuple[int, int, bytes | Stored]], index: int) -> int:
    # How many begin at the index or before it. Tuples are compared without a call, as a key would take for each.
    return bisect_left(segments, (index + 1,))


class Watch:
    """Told of each job of a run that becomes final.

    Attributes:
        start, stop: Indexes in the batch.
        notify: Called with the batch, start and n of each finished run; must be quick and must not call the engine.
    """

    __slots__ = ("notify", "start", "stop")

    def __init__(self, start: int, stop: int, notify: Any) -> None:
        self.start = start
        self.stop = stop
        self.notify = notify


class Watches:
    """Who is to be told of a batch's jobs. Those of single items are found by index: each of N may have its own."""

    __slots__ = ("_of_one", "_of_runs")

    def __init__(self) -> None:
        self._of_one: dict[int, list[Watch]] = {}
        self._of_runs: list[Watch] = []

    def add(self, watch: Watch) -> None:
        if watch.stop - watch.start == 1:
            self._of_one.setdefault(watch.start, []).append(watch)
        else:
            self._of_runs.append(watch)

    def remove(self, watch: Watch) -> None:
        """Tell it no more. No effect if it is not here."""
        # New lists: whoever is being told now goes on over the old ones.
        if watch.stop - watch.start > 1:
            self._of_runs = [each for each in self._of_runs if each is not watch]
        elif watch.start in self._of_one:
            left = [each for each in self._of_one.pop(watch.start) if each is not watch]
            if left:
                self._of_one[watch.start] = left

    def take(self, start: int, n: int) -> list[Watch]:
        """Those to tell of items that became final; those of single items are told once, and go."""
        found: list[Watch] = []
        of_one = self._of_one
        if of_one:
            indexes = range(start, start + n)
            # Whichever is shorter: a packed run may be long, and so may the list of those who wait for one item.
            for index in indexes if n <= len(of_one) else sorted(of_one.keys() & indexes):
                found += of_one.pop(index, ())
        if self._of_runs:
            found += [watch for watch in self._of_runs if watch.start < start + n and start < watch.stop]
        return found

    def __bool__(self) -> bool:
        return bool(self._of_one or self._of_runs)


class Stored(ABC):
    """Bytes that the store has put away: a payload or an outcome that need not stay in memory."""

    @abstractmethod
    def load(self) -> bytes:
        """The bytes, read back and compared with their digest. Blocks.

        Raises:
            BackendError: They are damaged or gone; the message names the job's batch.
        """

    @abstractmethod
    def head(self, n_bytes: int) -> bytes:
        """Their first bytes, at most so many, which are compared with nothing. Blocks. Errors as ``load``."""


def loaded(content: Any) -> bytes:
    """Payload or outcome bytes, wherever they are."""
    return content.load() if isinstance(content, Stored) else content


def not_found(jid: int | None = None) -> JobNotFound:
    """The error for a job that is unknown, or was deleted."""
    return JobNotFound("Does not exist or was purged from cache", jid=jid)


class Store(ABC):
    """Keeps batches. The embedded engine's is memory; a server's is a database.

    The engine owns the batches' fields while jobs are unfinished, and tells a durable store of each change by the
    methods below ``# changes``. Changes reach the disk in the order they were told, several in one commit.

    Attributes:
        durable: True when what was told survives the process.
    """

    durable: bool = False

    @abstractmethod
    def new_jids(self, n: int) -> int:
        """Reserve ``n`` consecutive jids and return the first. Jids start at 1 and are never used twice."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Keep a new batch."""

    @abstractmethod
    def locate(self, jid: int) -> tuple[Batch, int]:
        """The batch and index of a job.

        Raises:
            JobNotFound: Unknown, or deleted.
        """

    @abstractmethod
    def runs(self, jids: Jids) -> list[tuple[Batch, int, int]]:
        """(batch, start, stop) of consecutive jobs, covering ``jids`` in order.

        Raises:
            JobNotFound: One of them is unknown or deleted.
        """

    def have_succeeded(self, jids: Jids) -> bool:
        """True when all these jobs are done; False also if one is unknown."""
        try:
            return all(batch.states.count(DONE, start, stop) == stop - start for batch, start, stop in self.runs(jids))
        except JobNotFound:
            return False

    @abstractmethod
    def delete(self, batch: Batch, start: int, stop: int) -> None:
        """Forget finished jobs. The batch goes when all its jobs are forgotten."""

    def find_call(self, jid: int) -> Batch | None:
        """The batch of one call where that is one step, without the lock; None if it is not: see ``runs``."""
        return None

    def forget_call(self, jid: int) -> bool:
        """Forget a finished call where that is one step, without the lock; False if it is not: ``delete`` it."""
        return False

    @abstractmethod
    def batches(self, *, label: str | None = None, unfinished: bool = False) -> Iterator[Batch]:
        """Batches, oldest first, those with forgotten jobs included.

        Args:
            label: Only those with this label.
            unfinished: Only those with jobs that are not final.
        """

    @abstractmethod
    def newest(self, before: int, *, label: str | None = None) -> Iterator[Batch]:
        """Batches that begin before a jid, newest first, those with forgotten jobs included.

        Args:
            before: Only those whose first jid is smaller.
            label: Only those with this label.
        """

    @abstractmethod
    def forgotten(self, batch: Batch, index: int) -> bool:
        """True for a job that was deleted out of a batch still kept."""

    @abstractmethod
    def tally(self) -> list[int]:
        """How many final jobs are kept, by status code; 0 for the other codes. Does not look at a database."""

    def forgets(self, batch: Batch) -> bool:
        """False when surely none of its jobs was forgotten."""
        return batch.is_map

    # --- changes, of which only a durable store takes note ------------------------------------------------------------

    def opened(self, batch: Batch) -> None:
        """A map was begun; it has no jids before ``add``, which seals it."""
        return

    def extended(self, batch: Batch, chunk: Chunk) -> None:
        """The chunk was added to an open map."""
        return

    def began(self, batch: Batch, start: int, stop: int) -> None:
        """Items that must not run twice are given to a worker. On disk when this returns. Blocks."""
        return

    def retried(self, batch: Batch, index: int) -> None:
        """A new attempt was counted."""
        return

    def finished(self, batch: Batch, start: int, n: int, outcome: bytes) -> None:
        """Items became final, as the batch's states and segments say already."""
        return

    def after(self, action: Callable[[Exception | None], None]) -> None:
        """Call ``action(None)`` once every change told so far is on disk; with the error if they cannot be written.

        At once, or later from another thread, without the engine's lock.
        """
        action(None)

    def recovered(self) -> list[tuple[Batch, list[tuple[int, int]]]]:
        """Unfinished batches of an earlier process, oldest first, with the runs of ``began`` that have no outcome.

        States are QUEUED for what is not final, whatever its dependencies; ``free`` holds all of that. Asked once,
        before anything else.
        """
        return []

    def remember(self, key: str, reply: dict[str, Any]) -> None:
        """Keep the reply to a request by its idempotency key, in the same commit as the change told just before."""
        return

    def recall(self, key: str) -> dict[str, Any] | None:
        """The reply kept for this key, or None."""
        return None

    def together(self) -> AbstractContextManager[None]:
        """What is told inside is one commit, or none."""
        return nullcontext()

    def close(self) -> None:
        """Write what is not written, and let go of the files. Idempotent."""
        return


__all__ = ["Batch", "Chunk", "Store", "Stored", "Watch", "Watches", "loaded", "not_found"]
