"""The worker's end of the channel: frames in, frames out, and requests to the engine from inside jobs.

Whoever waits reads: the loop between jobs, or the thread of a job that waits for a reply. One reads at a time and
hands the others what is theirs.
"""

from __future__ import annotations

import os
import select
import time
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable

from cloud.engine import channel as ch
from cloud.engine.descriptors import out_of_reach
from cloud.engine.stream import Frame, FrameStream
from cloud.serialization import pickling
from cloud.serialization.shared import Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from typing import Any


class LinkClosed(Exception):
    """The engine closed the channel, or is gone."""


class Link:
    """A connection to the engine over the descriptor of a stream socket.

    Attributes:
        frames: Frames read and not yet handled by the loop, (kind, body) in order.
        before_request: Called before a request is sent, in its thread.
        interruptible: True while a wait for a reply may be broken off by an exception without losing data.
    """

    def __init__(self, fd: int) -> None:
        # A job that closes descriptors and opens files must not get our number: outcomes would be written into them.
        self._fd = out_of_reach(fd)
        os.close(fd)
        fd = self._fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._stands_back = hasattr(os, "SCHED_BATCH")
        self._stream = FrameStream(fd)
        self.frames: deque[Frame] = deque()
        self.interruptible = False
        self.before_request: Callable[[], None] | None = None
        self._write_lock = allocate_lock()
        self._turn: threading.Condition | None = None
        self._reading = False
        self._n_requests = 0
        self._replies: dict[int, tuple[dict[str, Any], list[bytes]]] = {}

    def receive_settings(self) -> dict[str, Any]:
        """Wait for the SETTINGS frame that opens every connection."""
        while not self.frames:
            self.receive(0.0)
        kind, body = self.frames.popleft()
        assert kind == ch.SETTINGS
        settings: dict[str, Any] = pickling.loads(body)
        return settings

    def receive(self, spin_s: float) -> None:
        """Wait until at least one frame is in ``frames``.

        Args:
            spin_s: How long to look again and again before sleeping; waking up costs more than a short look.

        Raises:
            LinkClosed: The engine is gone.
        """
        if self._n_requests:
            # Threads that a job left behind may be waiting for replies: share the reading with them.
            while not self.frames:
                self._read_in_turn(None)
            return
        if spin_s:
            until = time.monotonic() + spin_s
            while True:
                if self._read() and self.frames:
                    return
                if time.monotonic() > until:
                    break
        while not self.frames:
            self._sleep()
            self._read()

    def _sleep(self) -> None:
        # Linux may let who is woken push aside who woke it, even beside an idle core: the engine would give the next
        # worker its work 2 to 3 ms later. With SCHED_BATCH one waits for its turn. Jobs run with what they would have.
        stands_back = self._stands_back and os.sched_getscheduler(0) == os.SCHED_OTHER
        if stands_back:
            stands_back = self._schedule(os.SCHED_BATCH)
        try:
            self._poll.poll()
        finally:
            if stands_back:
                self._schedule(os.SCHED_OTHER)

    def _schedule(self, policy: int) -> bool:
        try:
            os.sched_setscheduler(0, policy, os.sched_param(0))
        except OSError:
            self._stands_back = False  # a sandbox refuses it
        return self._stands_back

    def linger(self, seconds: float) -> bool:
        """Wait until something arrives, and no longer than this; True if something has."""
        return self.reads_alone and bool(self._poll.poll(1000 * seconds))

    @property
    def reads_alone(self) -> bool:
        """False once a job has asked something: threads that it left behind may be reading."""
        return not self._n_requests

    def look(self) -> bool:
        """Take what has arrived, without waiting; True if there is something in ``frames`` now."""
        if self.reads_alone:
            self._read()
        return bool(self.frames)

    def send(self, data: bytes, segment: Segment | None = None) -> None:
        """Write all of ``data``. Blocks while the engine does not read.

        Raises:
            LinkClosed: The engine is gone, or a job closed our descriptor.
        """
        with self._write_lock:
            try:
                sent = self._stream.send(data, segment)
                while not sent:
                    waiter = select.poll()
                    waiter.register(self._fd, select.POLLOUT)
                    waiter.poll()
                    sent = self._stream.send_rest()
            except OSError as exc:
                raise LinkClosed from exc

    def request(self, content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> tuple[dict[str, Any], list[bytes]]:
        """Ask the engine something from inside a job and wait for its reply. Thread-safe.

        Raises:
            LinkClosed: The engine is gone.
        """
        if self.before_request is not None:
            self.before_request()
        with self._turns():
            self._n_requests += 1
            number = self._n_requests
        self.send(ch.pack_message(ch.REQUEST, number, content, blobs))
        while number not in self._replies:
            self._read_in_turn(number)
        return self._replies.pop(number)

    def _turns(self) -> threading.Condition:
        if self._turn is None:
            import threading

            with self._write_lock:
                self._turn = self._turn or threading.Condition(threading.Lock())
        return self._turn

    def _read_in_turn(self, number: int | None) -> None:
        turns = self._turns()
        with turns:
            while self._reading:
                turns.wait()
                if number in self._replies or (number is None and self.frames):
                    return
            self._reading = True
        try:
            if number not in self._replies:
                self.interruptible = True
                try:
                    self._poll.poll()
                finally:
                    self.interruptible = False
                self._read()
        finally:
            with turns:
                self._reading = False
                turns.notify_all()

    def _read(self) -> bool:
        try:
            frames = self._stream.receive()
        except (OSError, EOFError) as exc:
            raise LinkClosed from exc
        for frame in frames:
            if frame[0] == ch.REPLY:
                number, content, blobs = ch.unpack_message(frame[1])
                self._replies[number] = content, blobs
            else:
                self.frames.append(frame)
        return bool(frames)
