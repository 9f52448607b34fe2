"""The contract between the engine and whatever runs attempts.

The executor pulls: it asks the engine for work (``claim``) when a worker has room, and reports what became of it.
All calls either way are made under the engine's lock, except ``poll``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from cloud.engine.store.base import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.environment import Environment

AHEAD_S: Final = 0.020
"""A worker is sent about this much work ahead: enough to last while the scheduler keeps our process waiting.

More, if whoever waits is patient: see ``lookout``.
"""

LONG_S: Final = 0.002
"""What takes longer is long: one is sent ahead, and its end is told at once, unless whoever waits is patient."""


class Task:
    """Work given to one worker: consecutive items of one batch.

    Attributes:
        batch: Whose.
        start, stop: Indexes of its items; outcomes arrive in order and move ``start`` up.
        position: Of the item at ``start``, as its worker counts.
        mean_s: What its items were thought to take when it was given.
    """

    __slots__ = ("batch", "mean_s", "position", "start", "stop")

    def __init__(self, batch: Batch, start: int, stop: int) -> None:
        self.batch = batch
        self.start = start
        self.stop = stop
        self.position = 0
        self.mean_s = batch.function.mean_s or 1.0


class Source(ABC):
    """What an executor needs of the engine."""

    @abstractmethod
    def claim(
        self, free_slots: int, room_s: float, *, idle: bool, environment: Environment | None = None
    ) -> list[Task]:
        """Work for one worker, possibly none.

        Args:
            free_slots: Worker slots not in use; jobs that need more stay queued, and all behind them.
            room_s: How much work, in seconds, this worker may be sent ahead.
            idle: True when the worker has nothing to do: it then gets work whatever its length. A busy one gets none
                while work of another environment is to start first.
            environment: What the worker is; it gets work of that environment only.
        """

    @property
    @abstractmethod
    def next_environment(self) -> Environment | None:
        """What a worker must be to take the work that is to start first; None also when nothing is queued."""

    @abstractmethod
    def give_back(self, batch: Batch, start: int, stop: int) -> None:
        """Items that were claimed and not begun are queued again, at the front."""

    @abstractmethod
    def finish(self, batch: Batch, start: int, n: int, outcome: bytes) -> None:
        """Record how a run of items ended."""

    @abstractmethod
    def finish_each(self, batch: Batch, start: int, outcomes: list[bytes]) -> None:
        """Record how consecutive items ended, one outcome each."""

    @abstractmethod
    def lose(
        self,
        batch: Batch,
        index: int,
        reason: str,
        exitcode: int | None,
        *,
        own_fault: bool,
        had_ended: bool = False,
        output: tuple[bytes, bytes] = (b"", b""),
        pid: int = 0,
        age_s: float | None = None,
    ) -> None:
        """An item's worker died under it, ``age_s`` after it began.

        Args:
            own_fault: By the job itself (exit, crash).
            had_ended: The worker was running a later item; only this one's outcome was lost.
        """

    @abstractmethod
    def request(
        self, caller: Any, batch: Batch | None, content: dict[str, Any], blobs: list[bytes], reply: Any
    ) -> None:
        """A job of ``batch`` used a verb: answer through ``reply(content, blobs)``, now or later.

        ``caller`` is what ``suspend`` and ``resume`` take.
        """

    @abstractmethod
    def out_of_time(self, batch: Batch, index: int) -> None:
        """An item ran longer than its ``max_runtime_s``."""

    @abstractmethod
    def call_later(self, delay_s: float, action: Any) -> Any:
        """Call ``action()`` under the lock after a delay; returns a handle with ``cancel()``."""

    @property
    @abstractmethod
    def has_queued(self) -> bool:
        """True when something might be claimed."""


class Executor(ABC):
    """Runs attempts."""

    #: True when jobs run in this process on a virtual clock.
    simulated: bool = False

    #: True when a worker is to be given one call, or one whole chunk of a map, at a time.
    whole_chunks: bool = False

    #: True when calls made one after the other may come to it as items of one batch.
    takes_many: bool = False

    @abstractmethod
    def bind(self, source: Source) -> None:
        """Connect to the engine; called once, before anything else."""

    @abstractmethod
    def wake(self) -> None:
        """There may be work to claim. Does not block."""

    @abstractmethod
    def poll(self, timeout_s: float | None, *, may_jump: bool, patient: bool = False) -> None:
        """Wait for events for at most ``timeout_s`` (None: without limit) and report them.

        ``may_jump``: a virtual clock may jump ahead to the next event, as somebody waits for it. ``patient``: who waits
        wants all jobs of many, and nobody else waits; ends may be reported late, but failures.

        Called without the engine's lock, by one thread at a time.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Make a ``poll`` that blocks in another thread return soon. Callable from any thread."""

    @abstractmethod
    def running(self) -> list[tuple[Batch, int, int]]:
        """(batch, start, stop) of the items that have begun and are not reported."""

    @abstractmethod
    def kill(self, batch: Batch, index: int) -> bool:
        """End a running item: raise in it, then end its worker for certain. False if it does not run here.

        The engine records the kill itself when the worker reports or is dead, through ``finish`` or ``lose``.
        """

    @abstractmethod
    def take_back(self) -> None:
        """Give back every item that was claimed and not begun."""

    def make_way(self, priority: int) -> None:
        """A job of that priority was queued: give back what was sent far ahead and is to start after it."""
        return

    @abstractmethod
    def held(self) -> list[tuple[Batch, int]]:
        """The items that were claimed and have not ended: those that run, and those that may have begun."""

    @abstractmethod
    def live(self, batch: Batch, index: int) -> dict[str, Any]:
        """Of a running item: ``pid``, ``started`` (epoch seconds), ``stdout`` and ``stderr`` so far (bytes).

        What keeps only their last part also tells how long they are: ``n_stdout`` and ``n_stderr``, in bytes.
        """

    @abstractmethod
    def suspend(self, caller: Any) -> None:
        """A job waits for others: its slots are free meanwhile, and what was sent after it is given back."""

    @abstractmethod
    def resume(self, caller: Any) -> None:
        """That job goes on."""

    def wait_inside(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """A thread is about to wait. If it runs a job of this executor, others run until ``done()`` or the deadline.

        Returns:
            False for any other thread: it waits as threads do.
        """
        return False

    def depth_here(self) -> int:
        """How deep in jobs a submission by this thread is; 0 unless it runs a job of this executor."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """End all workers. Idempotent; bounded."""

    @abstractmethod
    def abandon(self) -> None:
        """In a forked child of the program: let go of what is the parent's, touching none of its processes."""

    @property
    @abstractmethod
    def n_slots(self) -> int:
        """Worker slots."""

    @property
    def has_news(self) -> bool:
        """True when ``poll`` would report something at once, though nothing wakes it. Asked without the lock."""
        return False

    @property
    def patient(self) -> bool:
        """True while whoever polls is patient and sleeps, so that ``call_in`` may find something."""
        return False

    def call_in(self) -> None:
        """Report what has ended and was not reported, as whoever polls is patient. Under the lock."""
        return

    @property
    def has_room(self) -> bool:
        """True when a job that is queued now would be claimed at once."""
        return self.n_used < self.n_slots

    @property
    def n_used(self) -> int:
        """Slots that are in use; more than there are while jobs that waited for others go on."""
        return 0

    @property
    def n_workers(self) -> int:
        """Worker processes, idle ones too."""
        return 0

    @property
    @abstractmethod
    def busy(self) -> bool:
        """True while any claimed item is unfinished."""
