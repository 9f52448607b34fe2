"""Outcomes on their way from a worker to the engine: held for a moment, then left in the ring or sent."""

from __future__ import annotations

import os
import time

from cloud.engine import channel as ch
from cloud.engine.ring import Ring
from cloud.engine.stream import WITH_SEGMENT
from cloud.engine.worker.link import Link
from cloud.jobs import DONE
from cloud.serialization.shared import Segment, SharedBytes, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_FAILURE_S: Final = 0.002
"""Failures are told of no later, where nobody looks so often: somebody may wait for the first."""

_MAX_HELD_BYTES: Final = 1 << 16


class Outbox:
    """What a worker has to report.

    Args:
        link: The socket to the engine.
        page: The shared page, with the ring behind it.

    Attributes:
        called_in: The engine has asked for what is held: what ends next is not to be held as long as was said before.
    """

    def __init__(self, link: Link, page: ch.Page) -> None:
        self._link = link
        self._slots = page.slots
        self._ring = Ring(page.behind, page.slots)
        self._pid = os.getpid()
        self._held: list[tuple[bytes, Segment | None]] = []
        self._n_sent = 0
        self._flushed_at = 0.0
        self._has_failure = False
        self._failed_at = 0.0
        self._n_bytes = 0
        self.called_in = False

    def note_beginning(self) -> float:
        """What is about to end is to be reported soon; seconds that are left, below 0 if others are held too long."""
        now = time.monotonic_ns()
        if not self._held:
            self._slots[ch.HELD] = now
        return self.hold_s - 1e-9 * (now - self._slots[ch.HELD])

    def hold(self, position: int, n: int, outcome: bytes) -> None:
        """Take the outcome of ``n`` items from a position on."""
        segment = outcome.segment if type(outcome) is SharedBytes else None
        kind = ch.OUTCOME if segment is None else ch.OUTCOME | WITH_SEGMENT
        if not self._slots[ch.HELD]:  # else the first of these may have ended long ago
            self.note_beginning()
        if outcome[0] != DONE:
            self._has_failure = True
        self._n_bytes += size_of(outcome)
        self._held.append((ch.OUTCOME_HEAD.pack(len(outcome) + 12, kind, position, n) + outcome, segment))

    @property
    def hold_s(self) -> float:
        """How long an outcome is held for those of the next items, which then go with it."""
        return _FAILURE_S if self._has_failure else 1e-9 * self._slots[ch.HOLD]

    def is_due(self) -> bool:
        """Whether what is held has been held long enough."""
        if self._n_bytes > _MAX_HELD_BYTES:
            return True
        # The first failure at once; those that follow it closely together.
        return time.monotonic() - (self._failed_at if self._has_failure else self._flushed_at) > self.hold_s

    def flush(self, *, wake: bool = False) -> None:
        """Hand over what is held; with ``wake`` by the socket, which wakes the engine."""
        held, self._held = self._held, []
        if held and os.getpid() != self._pid:
            os._exit(0)  # a child that C code of the job forked, and that returned into our loop
        self._n_bytes = 0
        self.called_in = False
        self._flushed_at = time.monotonic()
        if self._has_failure:
            self._has_failure, self._failed_at, wake = False, self._flushed_at, True
        plain = [frame for frame, segment in held if segment is None]
        if len(plain) < len(held):
            self._send_in_order(held)
        elif plain:
            data = plain[0] if len(plain) == 1 else b"".join(plain)
            if wake or self._slots[ch.SEEN] != self._n_sent or not self._ring.put(data):
                self._n_sent += len(plain)
                self._link.send(data)
        self._slots[ch.HELD] = 0  # now, and not before: whoever called it in finds it there

    def _send_in_order(self, held: list[tuple[bytes, Segment | None]]) -> None:
        plain: list[bytes] = []
        for frame, segment in held:
            self._n_sent += 1
            if segment is None:
                plain.append(frame)
                continue
            if plain:
                self._link.send(b"".join(plain))
                plain.clear()
            self._link.send(frame, segment)
        if plain:
            self._link.send(b"".join(plain))

    @property
    def has_left(self) -> bool:
        """True while outcomes are in the ring that the engine has not taken."""
        return self._ring.has_unread

    def finish(self) -> None:
        """Nothing more is to be run: see that the engine knows all outcomes soon."""
        if self._held:
            self.flush(wake=True)
        elif self.has_left:
            self._link.send(ch.frame(ch.LEFT))
