"""One worker process as the engine's side sees it: its socket, page and capture files, and what it was given."""

from __future__ import annotations

import _socket as socket
import fcntl
import os
import struct
import time
from collections import deque
from collections.abc import Iterator

from cloud.engine import channel as ch
from cloud.engine.descriptors import off_stdio
from cloud.engine.executor.base import Task
from cloud.engine.executor.template import TemplateProcess
from cloud.engine.ring import RING_BYTES, Ring
from cloud.engine.store.base import Batch, Chunk
from cloud.engine.stream import WITH_SEGMENT, Frame, FrameStream
from cloud.engine.worker.capture import free_pages, tail
from cloud.jobs import DEFAULT_OPTIONS
from cloud.serialization import pickling
from cloud.serialization.memory import MemoryFile, memory_file
from cloud.serialization.shared import Segment, SharedBytes, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.environment import Environment

STALL_S: Final = 0.005
"""One that has not started in that time perhaps never will, and an item that runs so long is a long one."""

_RICH_S: Final = 0.001
_MAX_FUNCTIONS: Final = 256
_MAX_FUNCTION_BYTES: Final = 64 << 20
_MAX_INSIDE_BYTES: Final = 1 << 16
"""Up to this size, functions that are for one call only travel in its frame."""
_FRAME_AND_RUN: Final = struct.Struct(ch.FRAME.format + ch.RUN_HEAD.format[1:])


class WorkerHandle:
    """A worker process.

    Attributes:
        number: Names it to the template.
        pid: 0 until the template has told.
        tasks: What it was given and has not reported, in order.
        load_s: Estimated runtime of ``tasks``.
        cores: Slots it holds while busy.
        held_slots: Slots it holds now.
        n_waiting: Threads of its job that wait for other jobs; while positive it holds no slots.
        taking_back: Position up to which work was taken back and the worker has not confirmed, or None.
        limit: While it is taking back: the position from which on nothing was to begin.
        kill_at: Position of the item being killed, or None. Such a worker gets no more work.
        retired: It is to end; it gets no more work.
        cut_off: It lives and its socket is closed: a job of its did that.
        lies: It told of items that it was not given: nothing it tells is believed any more.
        is_heard: What it sent is being reported; nothing more is to be read of it meanwhile.
        leaves: It leaves outcomes in its ring, as somebody looks there; else it sends them.
        unanswered: Since when it has held what it did not send when it was asked to.
        environment: What it is; it gets batches of that environment only.
        template: Forked it; None before that, and when that is dead.
    """

    def __init__(
        self, number: int, settings: dict[str, Any], *, capture: bool, environment: Environment | None = None
    ) -> None:
        self.number = number
        self.environment = environment
        self.template: TemplateProcess | None = None
        self.pid = 0
        self.tasks: deque[Task] = deque()
        self.load_s = 0.0
        self.position = 0
        self.cores = 1
        self.held_slots = 0
        self.n_waiting = 0
        self.taking_back: int | None = None
        self.limit: int | None = None
        self.kill_at: int | None = None
        self.retired = False
        self.dead = False
        self.cut_off = False
        self.lies = False
        self.began = 0.0
        self.seen_current = -1
        self.seen_at = 0.0
        self.poke_again_at = 0.0
        self.is_heard = False
        self.unanswered = 0
        self.leaves = False
        self._n_outcomes = 0
        self._functions: dict[int, int] = {}
        self._function_bytes = 0
        self._contexts: set[int] = set()
        self._chunks: dict[int, None] = {}
        self._freed = [0, 0]
        self.slots: Any = None
        self._captures = capture
        self._limit_bytes = settings["output_limit_bytes"]
        self.fd = self._their_fd = self._page_fd = -1
        self._page: ch.Page | None = None
        self.output_fds: list[int] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self.write(ch.frame(ch.SETTINGS, pickling.dumps_plain(settings)))

    def _open(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.fd, self._their_fd = ours.detach(), theirs.detach()
        self.fd = off_stdio(self.fd)
        self._their_fd = off_stdio(self._their_fd)
        self._stream = FrameStream(self.fd)
        self._page_fd = memory_file()
        self._page_fd = off_stdio(self._page_fd)
        self._page = ch.Page(self._page_fd, RING_BYTES, create=True)
        self.slots = self._page.slots
        self._ring = Ring(self._page.behind, self.slots)
        for fd in (1, 2):
            self.output_fds.append(off_stdio(_capture_file() if self._captures else _copy_of(fd)))

    @property
    def descriptors(self) -> list[int]:
        """What the template hands to the new process."""
        return [self._their_fd, self._page_fd, *self.output_fds]

    def started(self) -> None:
        """The descriptors were sent: the process has its own copies now."""
        os.close(self._their_fd)
        os.close(self._page_fd)
        self._their_fd = self._page_fd = -1

    @property
    def takes_work(self) -> bool:
        """False for a worker that is ending or in the middle of giving work back."""
        return not (self.retired or self.dead or self.taking_back is not None or self.kill_at is not None)

    @property
    def is_about_to_be_idle(self) -> bool:
        """True when it has nothing to do, and is to confirm what was taken back before it gets more."""
        return self.taking_back is not None and not (
            self.tasks or self.retired or self.dead or self.kill_at is not None
        )

    @property
    def takes_more(self) -> bool:
        """True for a worker that takes work ahead of what it runs: it has read that, and may go on after it."""
        return self.takes_work and not self.pending and not (self.tasks and self.tasks[-1].batch.options.alone)

    # --- giving work --------------------------------------------------------------------------------------------------

    def give(self, tasks: list[Task]) -> None:
        """Send tasks, with whatever they need that the worker does not have."""
        parts: list[bytes] = []
        for task in tasks:
            batch = task.batch
            function, context = batch.function, batch.context
            token = function.token
            is_inside = not (function.reusable or batch.is_map or size_of(function.payload) > _MAX_INSIDE_BYTES)
            if is_inside:
                token = ch.INSIDE
            elif token not in self._functions:
                self._add_function(token, function.payload, parts)
            if context[0] not in self._contexts:
                if len(self._contexts) > 64:
                    self._contexts.clear()
                self._contexts.add(context[0])
                parts.append(ch.frame(ch.CONTEXT, ch.ID.pack(context[0]), context[1]))
            task.position = position = self.position
            n = task.stop - task.start
            self.position = position + n
            options = batch.options
            if options is DEFAULT_OPTIONS:
                flags, extras = (ch.KEEP_FUNCTION if function.reusable else 0), b""
            else:
                flags = ch.run_flags(options, reusable=function.reusable)
                extras = _extras(options.env_vars) if options.env_vars else b""
            if is_inside:
                extras += ch.sized(function.payload)
            attempt = 1 if batch.attempts is None else batch.attempt(task.start)
            if batch.arguments is not None:
                arguments: Any = batch.arguments  # here: what a store has put away is read before it is given out
                segment = arguments.segment if type(arguments) is SharedBytes else None
                if segment is not None:
                    self._send_parts(parts)
                length = ch.RUN_HEAD.size + len(extras) + len(arguments)
                parts.append(
                    _FRAME_AND_RUN.pack(
                        length,
                        ch.RUN if segment is None else ch.RUN | WITH_SEGMENT,
                        position,
                        batch.jid0,
                        token,
                        context[0],
                        attempt,
                        batch.depth,
                        flags,
                    )
                )
                if extras:
                    parts.append(extras)
                parts.append(arguments)
                if segment is not None:
                    self._send_parts(parts, segment)
            else:
                self._add_range(task, batch, n, attempt, flags, extras, parts)
            self.load_s += n * task.mean_s
            self.tasks.append(task)
        self._send_parts(parts)

    def identify(self, program_pid: int, authkey: bytes) -> None:
        """Let it be a process of the program's multiprocessing."""
        self.write(ch.frame(ch.IDENTITY, ch.IDENTITY_HEAD.pack(self.number, program_pid), authkey))

    def share_tracker(self, fd: int) -> None:
        """Give it the program's tracker of shared memory."""
        self.write(ch.frame(ch.TRACKER | WITH_SEGMENT), Segment(MemoryFile(os.dup(fd)), 0, 0))

    def initialize(self, context: tuple[int, bytes], payload: bytes) -> None:
        """Send the initializer that runs before its first task, and where; an empty payload means the inherited one."""
        self._contexts.add(context[0])
        parts = [ch.frame(ch.CONTEXT, ch.ID.pack(context[0]), context[1])]
        self._add_frame(parts, ch.INITIALIZE, ch.ID.pack(context[0]), payload)
        self._send_parts(parts)

    def leave(self) -> None:
        """Tell it to end in good order, after what it was sent before."""
        self.write(ch.frame(ch.LEAVE))

    def _send_parts(self, parts: list[bytes], segment: Segment | None = None) -> None:
        if parts:
            self.write(b"".join(parts), segment)
            parts.clear()

    def _add_frame(self, parts: list[bytes], kind: int, head: bytes, payload: bytes) -> None:
        if type(payload) is SharedBytes:
            self._send_parts(parts)
            parts.append(ch.frame(kind | WITH_SEGMENT, head, payload))
            self._send_parts(parts, payload.segment)
        else:
            parts.append(ch.frame(kind, head, payload))

    def _add_function(self, token: int, payload: bytes, parts: list[bytes]) -> None:
        functions = self._functions
        functions[token] = size_of(payload)
        self._function_bytes += size_of(payload)
        self._add_frame(parts, ch.FUNCTION, ch.ID.pack(token), payload)
        # Frames come in order: what was sent before still finds a function that is forgotten here.
        while len(functions) > 1 and (len(functions) > _MAX_FUNCTIONS or self._function_bytes > _MAX_FUNCTION_BYTES):
            oldest = next(iter(functions))
            self._function_bytes -= functions.pop(oldest)
            parts.append(ch.frame(ch.FORGET, ch.ID.pack(oldest)))

    def _add_range(
        self, task: Task, batch: Batch, n: int, attempt: int, flags: int, extras: bytes, parts: list[bytes]
    ) -> None:
        chunk = batch.chunk_at(task.start)
        if type(chunk.payload) is SharedBytes:  # one item, which the worker does not keep
            self._add_chunk(chunk, parts)
        elif chunk.token not in self._chunks:
            if len(self._chunks) >= ch.MAX_CHUNKS:
                self._chunks.pop(next(iter(self._chunks)))
            self._chunks[chunk.token] = None
            self._add_chunk(chunk, parts)
        head = ch.RANGE_HEAD.pack(
            task.position,
            batch.jid0 + task.start,
            batch.function.token,
            batch.context[0],
            attempt,
            batch.depth,
            flags,
            chunk.token,
            task.start - chunk.start,
            n,
        )
        parts.append(ch.frame(ch.RANGE, head, extras))

    def _add_chunk(self, chunk: Chunk, parts: list[bytes]) -> None:
        self._add_frame(parts, ch.CHUNK, ch.CHUNK_HEAD.pack(chunk.token, chunk.kind, chunk.n), chunk.payload)

    def write(self, data: bytes, segment: Segment | None = None) -> bool:
        """Send, or keep what the socket does not take now; False if something is kept."""
        try:
            return self._stream.send(data, segment)
        except OSError:
            return True  # it died; the template tells

    def write_pending(self) -> bool:
        """Send more of what was kept; True when nothing is left."""
        try:
            return self._stream.send_rest()
        except OSError:
            return True

    @property
    def pending(self) -> bool:
        """True while its socket would not take everything."""
        return self._stream.has_unsent

    # --- what it sends ------------------------------------------------------------------------------------------------

    def read(self) -> tuple[list[Frame], bool]:
        """Frames that have arrived whole, as (kind, body); and False at the end of the stream."""
        try:
            frames, alive = self._stream.receive(), True
        except (OSError, EOFError, IndexError, struct.error):
            frames, alive = [], False  # gone, or a job has sent what makes no sense
        # What is in the ring was left there before these were sent, as the ring is looked into after they came.
        slots = self.slots
        if slots[ch.WRITTEN] != slots[ch.READ]:
            left, sound = self.left()
            if not sound:
                return left, False
            frames = left + frames
            n_left = len(left)
        else:
            n_left = 0
        for kind, _ in frames[n_left:] if n_left else frames:
            if kind == ch.OUTCOME:
                self._n_outcomes += 1
        if self.leaves:
            slots[ch.SEEN] = self._n_outcomes
        return frames, alive

    @property
    def has_left(self) -> bool:
        """True while something is in the ring."""
        slots = self.slots
        return bool(slots[ch.WRITTEN] != slots[ch.READ])

    def left(self) -> tuple[list[Frame], bool]:
        """Frames that it left in the ring, and False if they make no sense. They precede all that ``read`` has yet."""
        try:
            return self._ring.take(), True
        except OSError:
            return [], False

    def looks(self, regularly: bool, hold_ns: int) -> bool:
        """Tell it whether somebody looks into the ring now and then, else it sends everything; and how long to hold.

        Returns:
            True if nobody is to look from now on, and somebody did before.
        """
        self.slots[ch.HOLD] = hold_ns
        if regularly is self.leaves:
            return False
        self.leaves = regularly
        self.slots[ch.SEEN] = self._n_outcomes if regularly else ch.NO_LIMIT
        return not regularly

    # --- where it stands ----------------------------------------------------------------------------------------------

    def items(self) -> Iterator[tuple[int, Batch, int]]:
        """(position, batch, index) of all it was given and has not reported."""
        for task in self.tasks:
            for index in range(task.start, task.stop):
                yield task.position + index - task.start, task.batch, index

    @property
    def has_begun(self) -> bool:
        """True once it runs, or ran, something: it has started."""
        return bool(self.slots[ch.CURRENT] != ch.NO_LIMIT)

    @property
    def left_s(self) -> float:
        """Estimated runtime of what it has not begun, as far as that can be told from here."""
        if not self.tasks or not self.has_begun:
            return self.load_s
        return float(self.n_left * self.mean_s)

    @property
    def n_left(self) -> int:
        """How many items it has not begun; it has begun one."""
        return int(self.position - 1 - self.slots[ch.CURRENT])

    @property
    def mean_s(self) -> float:
        """How long an item of what it was given takes on average; 0.0 if that is unknown. It has something to do."""
        return self.tasks[-1].batch.function.mean_s

    def is_rich(self, now: float) -> bool:
        """True when others could do some of what it was sent."""
        return self.left_s > _RICH_S if self.has_begun else now - self.began > STALL_S

    @property
    def n_items_over_one(self) -> bool:
        """True when it has more than the item it runs."""
        tasks = self.tasks
        return len(tasks) > 1 or (bool(tasks) and tasks[0].stop - tasks[0].start > 1)

    def running(self) -> tuple[int, Batch, int] | None:
        """(position, batch, index) of the item that runs, if one does."""
        current = self.slots[ch.CURRENT]
        if self.limit is not None and current >= self.limit:
            return None  # announced, and perhaps not begun: it met the limit
        for task in self.tasks:
            if task.position <= current < task.position + task.stop - task.start:
                return current, task.batch, task.start + current - task.position
        return None

    def begun(self) -> Iterator[tuple[Batch, int, int]]:
        """(batch, start, stop) of what it has begun and not reported: what runs, and outcomes that it still holds."""
        current = self.slots[ch.CURRENT]
        if current == ch.NO_LIMIT:
            return
        last = current if self.limit is None else min(current, self.limit - 1)
        for task in self.tasks:
            if task.position > last:
                return
            yield task.batch, task.start, min(task.stop, task.start + last - task.position + 1)

    def output_lengths(self) -> tuple[int, int]:
        """How many bytes the running job has printed so far."""
        if not self._captures:
            return 0, 0
        starts = (self.slots[ch.OUT], self.slots[ch.ERR])
        out, err = (max(0, os.fstat(fd).st_size - start) for fd, start in zip(self.output_fds, starts, strict=True))
        return out, err

    def output(self, lengths: tuple[int, int] | None = None) -> tuple[bytes, bytes]:
        """What the running job has printed so far, or when it had printed so much: the last part of each stream."""
        if not self._captures:
            return b"", b""
        starts = (self.slots[ch.OUT], self.slots[ch.ERR])
        ends = (None, None) if lengths is None else (starts[0] + lengths[0], starts[1] + lengths[1])
        out, err = (
            tail(fd, start, self._limit_bytes, end)
            for fd, start, end in zip(self.output_fds, starts, ends, strict=True)
        )
        return out, err

    def describe_running(self) -> dict[str, Any]:
        """What can be told of the item that runs: its process, its start, what it has printed."""
        lengths = self.output_lengths()
        out, err = self.output(lengths)
        started = time.time() - (time.monotonic() - self.began)
        printed = {"stdout": out, "stderr": err, "n_stdout": lengths[0], "n_stderr": lengths[1]}
        return {"pid": self.pid, "started": started, **printed}

    def limit_output(self) -> bool:
        """Give back the memory of output that nobody will see; True if there was much."""
        if not self._captures:
            return False
        freed = [free_pages(fd, self._limit_bytes, self._freed[at]) for at, fd in enumerate(self.output_fds)]
        before, self._freed = self._freed, freed
        return freed != before

    def close(self) -> None:
        """Close our descriptors; a live worker then ends by itself. Idempotent."""
        fds = (self._their_fd, self._page_fd, *self.output_fds)
        if self.fd >= 0:
            self._stream.close()
        self.fd = self._their_fd = self._page_fd = -1
        self.output_fds = []
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        page, self._page = self._page, None
        if page is not None:
            self.slots = memoryview(bytearray(ch.PAGE_BYTES)).cast("Q")
            page.close()


def _capture_file() -> int:
    fd = memory_file()
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    os.write(fd, b"\n" * ch.CAPTURE_START)
    return fd


def _copy_of(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)  # the program runs without


def _extras(env_vars: dict[str, str]) -> bytes:
    return ch.sized(pickling.dumps_plain(env_vars))
