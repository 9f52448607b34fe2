"""One worker process as the engine's side sees it: its socket, page and capture files, and what it was given."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from cloud.engine import channel as ch
from cloud.engine.executor.base import Task
from cloud.engine.store.base import Batch
from cloud.engine.worker.capture import free_pages, tail
from cloud.jobs import DEFAULT_OPTIONS
from cloud.serialization import pickling

_MAX_FUNCTIONS: Final = 256
_MAX_FUNCTION_BYTES: Final = 64 << 20
_READ_BYTES: Final = 1 << 18
_FRAME_AND_RUN: Final = struct.Struct(ch.FRAME.format + ch.RUN_HEAD.format[1:])

_OWN_FAULT_SIGNALS: Final = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGABRT,
        signal.SIGTRAP,
        signal.SIGSYS,
        signal.SIGPIPE,
        signal.SIGALRM,
        signal.SIGXCPU,
        signal.SIGXFSZ,
    }
)


class WorkerHandle:
    """A worker process.

    Attributes:
        number: Names it to the template.
        pid: 0 until the template has told.
        tasks: What it was given and has not reported, in order.
        load_s: Estimated runtime of ``tasks``.
        cores: Slots it holds while busy.
        n_waiting: Threads of its job that wait for other jobs; while positive it holds no slots.
        taking_back: Position up to which work was taken back and the worker has not confirmed, or None.
        kill_at: Position of the item being killed, or None. Such a worker gets no more work.
        retired: It is to end; it gets no more work.
        pending: Bytes that its socket would not take yet.
    """

    def __init__(self, number: int, settings: dict[str, Any], *, capture: bool) -> None:
        self.number = number
        self.pid = 0
        self.tasks: deque[Task] = deque()
        self.load_s = 0.0
        self.position = 0
        self.cores = 1
        self.n_waiting = 0
        self.taking_back: int | None = None
        self.kill_at: int | None = None
        self.retired = False
        self.dead = False
        self.began = 0.0
        self.seen_current = -1
        self.seen_at = 0.0
        self.pending = bytearray()
        self._received = bytearray()
        self._needed = 0
        self._functions: dict[int, int] = {}
        self._function_bytes = 0
        self._contexts: set[int] = set()
        self._chunks: dict[int, None] = {}
        self._freed = [0, 0]
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.fd = ours.detach()
        os.set_blocking(self.fd, False)
        self.page_fd = ch.memory_file()
        self.page = ch.Page(self.page_fd, create=True)
        self.slots = self.page.slots
        self.output_fds = [_capture_file(), _capture_file()] if capture else [os.dup(1), os.dup(2)]
        self._captures = capture
        self._limit_bytes = settings["output_limit_bytes"]
        self.write(ch.frame(ch.SETTINGS, pickling.dumps_plain(settings)))

    @property
    def descriptors(self) -> list[int]:
        """What the template hands to the new process."""
        return [self.theirs.fileno(), self.page_fd, *self.output_fds]

    def started(self) -> None:
        """The descriptors were sent: the process has its own copies now."""
        self.theirs.close()
        os.close(self.page_fd)
        self.page_fd = -1

    @property
    def takes_work(self) -> bool:
        """False for a worker that is ending or in the middle of giving work back."""
        return not (self.retired or self.dead or self.taking_back is not None or self.kill_at is not None)

    # --- giving work --------------------------------------------------------------------------------------------------

    def give(self, tasks: list[Task]) -> None:
        """Send tasks, with whatever they need that the worker does not have."""
        parts: list[bytes] = []
        for task in tasks:
            batch = task.batch
            function, context = batch.function, batch.context
            token = function.token
            if token not in self._functions:
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
                extras = _extras(options.env_vars)
            attempt = 1 if batch.attempts is None else batch.attempt(task.start)
            if batch.arguments is not None:
                arguments = batch.arguments
                length = ch.RUN_HEAD.size + len(extras) + len(arguments)
                parts.append(
                    _FRAME_AND_RUN.pack(
                        length, ch.RUN, position, batch.jid0, token, context[0], attempt, batch.depth, flags
                    )
                )
                if extras:
                    parts.append(extras)
                parts.append(arguments)
            else:
                self._add_range(task, batch, n, attempt, flags, extras, parts)
            self.load_s += n * (function.mean_s or 1.0)
            self.tasks.append(task)
        self.write(b"".join(parts))

    def _add_function(self, token: int, payload: bytes, parts: list[bytes]) -> None:
        functions = self._functions
        functions[token] = len(payload)
        self._function_bytes += len(payload)
        parts.append(ch.frame(ch.FUNCTION, ch.ID.pack(token), payload))
        # Frames come in order: what was sent before still finds a function that is forgotten here.
        while len(functions) > 1 and (len(functions) > _MAX_FUNCTIONS or self._function_bytes > _MAX_FUNCTION_BYTES):
            oldest = next(iter(functions))
            self._function_bytes -= functions.pop(oldest)
            parts.append(ch.frame(ch.FORGET, ch.ID.pack(oldest)))

    def _add_range(
        self, task: Task, batch: Batch, n: int, attempt: int, flags: int, extras: bytes, parts: list[bytes]
    ) -> None:
        chunk = batch.chunk_at(task.start)
        if chunk.token not in self._chunks:
            if len(self._chunks) >= ch.MAX_CHUNKS:
                self._chunks.pop(next(iter(self._chunks)))
            self._chunks[chunk.token] = None
            parts.append(ch.frame(ch.CHUNK, ch.CHUNK_HEAD.pack(chunk.token, chunk.kind, chunk.n), chunk.payload))
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

    def write(self, data: bytes) -> bool:
        """Send, or keep what the socket does not take now; False if something is kept."""
        if self.pending:
            self.pending += data
            return False
        try:
            sent = os.write(self.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return True  # it died; the template tells
        if sent < len(data):
            self.pending += memoryview(data)[sent:]
            return False
        return True

    def write_pending(self) -> bool:
        """Send more of what was kept; True when nothing is left."""
        data, self.pending = bytes(self.pending), bytearray()
        return self.write(data)

    # --- what it sends ------------------------------------------------------------------------------------------------

    def read(self) -> tuple[list[tuple[int, memoryview]], bool]:
        """Frames that have arrived whole, as (kind, body); and False at the end of the stream."""
        try:
            data = os.read(self.fd, _READ_BYTES if not self._needed else max(_READ_BYTES, self._needed))
        except BlockingIOError:
            return [], True
        except OSError:
            return [], False
        if not data:
            return [], False
        source: bytes | bytearray = data
        if self._received:
            self._received += data
            if len(self._received) < self._needed:
                return [], True
            source, self._received = self._received, bytearray()
        frames = []
        offset, end, head = 0, len(source), ch.FRAME.size
        view = memoryview(source)
        self._needed = 0
        while end - offset >= head:
            length, kind = ch.FRAME.unpack_from(source, offset)
            stop = offset + head + length
            if stop > end:
                self._needed = head + length
                break
            frames.append((kind, view[offset + head : stop]))
            offset = stop
        if offset < end:
            self._received += view[offset:]
        return frames, True

    # --- where it stands ----------------------------------------------------------------------------------------------

    def items(self) -> Iterator[tuple[int, Batch, int]]:
        """(position, batch, index) of all it was given and has not reported."""
        for task in self.tasks:
            for index in range(task.start, task.stop):
                yield task.position + index - task.start, task.batch, index

    @property
    def n_items_over_one(self) -> bool:
        """True when it has more than the item it runs."""
        tasks = self.tasks
        return len(tasks) > 1 or (bool(tasks) and tasks[0].stop - tasks[0].start > 1)

    def running(self) -> tuple[int, Batch, int] | None:
        """(position, batch, index) of the item that runs, if one does."""
        current = self.slots[ch.CURRENT]
        for task in self.tasks:
            if task.position <= current < task.position + task.stop - task.start:
                return current, task.batch, task.start + current - task.position
        return None

    def output(self) -> tuple[bytes, bytes]:
        """What the running job has printed so far: the last part of each stream."""
        if not self._captures:
            return b"", b""
        starts = (self.slots[ch.OUT], self.slots[ch.ERR])
        out, err = (
            tail(fd, start, self._limit_bytes) for fd, start in zip(self.output_fds, starts, strict=True)
        )
        return out, err

    def limit_output(self) -> None:
        """Give back the memory of output that nobody will see."""
        if self._captures:
            for index, fd in enumerate(self.output_fds):
                self._freed[index] = free_pages(fd, self._limit_bytes, self._freed[index])

    def close(self) -> None:
        """Close our descriptors; a live worker then ends by itself. Idempotent."""
        if self.fd >= 0:
            for fd in (self.fd, *self.output_fds):
                os.close(fd)
            self.fd = -1
            self.theirs.close()
            if self.page_fd >= 0:
                os.close(self.page_fd)
            self.slots = memoryview(bytearray(ch.PAGE_BYTES)).cast("Q")
            self.page.close()


def _capture_file() -> int:
    fd = ch.memory_file()
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return fd


def _extras(env_vars: dict[str, str] | None) -> bytes:
    if not env_vars:
        return b""
    content = pickling.dumps_plain(env_vars)
    return len(content).to_bytes(4, "little") + content


def describe_death(status: int, pid: int) -> tuple[str, int | None, bool]:
    """(what happened in words, exit code or minus signal, whether the job itself did it) of a wait status."""
    who = f"The job's worker process (pid {pid})"
    if status <= -1000:
        return f"The job's worker process could not be started: {os.strerror(-1000 - status)}.", None, False
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        own = number in _OWN_FAULT_SIGNALS
        why = (
            "it crashed"
            if own
            else "another process ended it, or the kernel did because memory ran out"
            if number == signal.SIGKILL
            else "another process ended it"
        )
        return f"{who} was killed by {name}: {why}.", -number, own
    code = os.waitstatus_to_exitcode(status)
    return (
        f"{who} exited with code {code} in the middle of the job: os._exit, an exit in C code, or its connection "
        "was closed.",
        code,
        True,
    )
