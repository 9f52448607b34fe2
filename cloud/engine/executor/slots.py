"""Worker slots that several executors of one process share, fairly.

::

    Slots(n) ──join──► Share   one an executor: free() · take(n) · give(n) · wait() · rotate() · content()

Each executor works under its own engine's lock. The lock of the slots is taken last, and nothing is called under it
but ``interrupt`` of an executor that waits: that only makes its poll return, and it then helps itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_PATIENCE_S: Final = 1.0
"""So long waits who needs more than its share; then all others wait for it."""


class Slots:
    """A budget of worker slots.

    Args:
        n: How many jobs run at the same time, of all executors together.
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"there must be at least 1 worker slot, not {n}")
        self.n = n
        self.lock = threading.RLock()
        self._shares: list[Share] = []
        self._waiting: dict[Share, None] = {}

    def join(self, interrupt: Callable[[], None], max_slots: int = 0) -> Share:
        """One more executor.

        Args:
            interrupt: Makes its poll return; called from any thread. May not block, nor take a lock.
            max_slots: It never gets more; 0 means no such limit.
        """
        share = Share(self, interrupt, max_slots)
        with self.lock:
            self._shares.append(share)
        return share

    @property
    def n_used(self) -> int:
        """Slots in use; more than there are while jobs that waited for others go on."""
        with self.lock:
            return sum(each.n_used for each in self._shares)

    def _fair(self, asking: Share) -> int:
        n_active = sum(1 for each in self._shares if each.n_used or each in self._waiting or each is asking)
        return max(1, self.n // max(1, n_active))

    def _in_turn(self) -> Share | None:
        """Who has waited too long for more than it would get by its share."""
        now = time.monotonic()
        return next(
            (each for each in self._waiting if each.declined is not None and now - each.declined > _PATIENCE_S), None
        )

    def _free_for(self, share: Share) -> int:
        left = self.n - self.n_used
        if left > 0 and self._waiting.keys() - {share}:
            turn = self._in_turn()
            if turn is not None:
                return min(left, share.most - share.n_used) if turn is share else 0
            fair, before = self._fair(share), True
            for each in self._waiting:
                if each is share:
                    before = False
                elif (before or share.n_used >= fair) and each.wants(fair):
                    left -= min(fair, each.most) - each.n_used
        return max(0, min(left, share.most - share.n_used))

    def _wake(self) -> None:
        for each in self._waiting:
            if self._free_for(each) > 0:
                each.interrupt()


class Share:
    """The slots of one executor.

    Attributes:
        n_used: Slots it holds.
        most: It never gets more.
        declined: Since when it was offered slots that were too few for its next job (monotonic), or None.
        interrupt: Makes its poll return.
    """

    def __init__(self, slots: Slots, interrupt: Callable[[], None], max_slots: int) -> None:
        self.slots = slots
        self.interrupt = interrupt
        self.n_used = 0
        self.most = min(slots.n, max_slots) if max_slots else slots.n
        self.declined: float | None = None

    def wants(self, fair: int) -> bool:
        """True while it holds less than it may have by its share."""
        return self.n_used < min(fair, self.most)

    def free(self) -> int:
        """How many slots it may take now. Who means to take them holds ``slots.lock`` until it has."""
        with self.slots.lock:
            return self.slots._free_for(self)

    def take(self, n: int) -> None:
        """Hold so many more, whether they are free or not: a job that waited for others must go on."""
        with self.slots.lock:
            self.n_used += n

    def give(self, n: int) -> None:
        """Hold so many less."""
        with self.slots.lock:
            self.n_used -= n
            self.slots._wake()

    def rotate(self) -> None:
        """It took some of what it waited for: who waits with it comes first from now on."""
        with self.slots.lock:
            self.declined = None
            if self.slots._waiting.pop(self, self) is None:
                self.slots._wake()

    def wait(self, *, declined: bool = False) -> None:
        """It has work and no slot for it: it is interrupted when there is one.

        Args:
            declined: It was offered some, and its next job needs more.
        """
        with self.slots.lock:
            if self in self.slots._shares:
                self.slots._waiting.setdefault(self)
            if declined and self.declined is None:
                self.declined = time.monotonic()

    def content(self) -> None:
        """It has no more work to give out."""
        with self.slots.lock:
            self.declined = None
            if self in self.slots._waiting:
                del self.slots._waiting[self]
                self.slots._wake()

    @property
    def must_yield(self) -> bool:
        """True while another waits and this one should let workers run dry for it."""
        slots = self.slots
        with slots.lock:
            if not slots._waiting.keys() - {self}:
                return False
            turn = slots._in_turn()
            if turn is not None:
                return turn is not self
            if slots.n_used < slots.n:
                return False  # who waits is about to take what is free
            fair = slots._fair(self)
            crowded = self.n_used == fair and sum(1 for each in slots._shares if each.n_used) >= slots.n
            return (self.n_used > fair or crowded) and any(
                each.wants(fair) for each in slots._waiting if each is not self
            )

    def leave(self) -> None:
        """Its executor is closed: give everything back. Idempotent."""
        with self.slots.lock:
            self.n_used = 0
            self.slots._waiting.pop(self, None)
            if self in self.slots._shares:
                self.slots._shares.remove(self)
            self.slots._wake()
