"""What an engine does beside when its store outlives it: nothing begins, or is taken up, that is not on disk."""

from __future__ import annotations

from collections import Counter

from cloud.engine.executor.base import Task
from cloud.engine.store.base import Batch, Chunk, Stored, loaded
from cloud.engine.waits import runs_of
from cloud.errors import BackendError, CloudException
from cloud.jobs import ERROR, ERROR_TEXT, KILLED, QUEUED, WAITING, pack_outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from cloud.engine.engine import Engine

_DISK_FULL_S: Final = 1.0
_LOST: Final = (
    b"The job's worker was lost: the server stopped while it ran, and it is not to be run twice (_restartable=False)."
)


class Durability:
    """The part of an engine that its durable store needs. Called under the engine's lock, if not said otherwise.

    Args:
        engine: Whose.

    Attributes:
        open_maps: Maps of an earlier process that were not sealed, by the name their store gave them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.open_maps: dict[int, Batch] = {}
        self._unsafe: Counter[int] = Counter()
        # Arguments of maps that are in memory for the moment, and where they are kept.
        self._read_back: list[tuple[Chunk, Stored]] = []

    # --- submissions --------------------------------------------------------------------------------------------------

    def is_safe(self, batch: Batch) -> bool:
        """False while a part of it is not on disk."""
        return id(batch) not in self._unsafe

    def settle_when_safe(self, batch: Batch) -> None:
        """What is lost with the process must not have run: its submitter will submit it again."""
        engine = self._engine
        self._unsafe[id(batch)] += 1

        def settle(error: Exception | None) -> None:
            with engine.changing:
                self._unsafe[id(batch)] -= 1
                if not self._unsafe[id(batch)]:
                    del self._unsafe[id(batch)]
                if error is not None:
                    self._drop(batch)
                elif not engine.closed:
                    engine.settle(batch)

        engine.store.after(settle)

    def take_back_unless_safe(self, batch: Batch) -> None:
        """If a map's end cannot be written, its submitter is told so, and what runs of it ends."""
        engine = self._engine

        def take_back(error: Exception | None) -> None:
            if error is not None:
                with engine.changing:
                    if not engine.closed:
                        engine.cancel(range(batch.jid0, batch.jid0 + batch.n))
                        self._drop(batch)

        engine.store.after(take_back)

    def _drop(self, batch: Batch) -> None:
        outcome = pack_outcome(KILLED, [(ERROR_TEXT, b"The server could not write it to disk")])
        for start, n in runs_of(batch, (WAITING, QUEUED)):
            self._engine.finish(batch, start, n, outcome, may_retry=False)
        if batch.jid0:
            self._engine.store.delete(batch, 0, batch.n)

    # --- giving work out ----------------------------------------------------------------------------------------------

    def may_begin(self, tasks: list[Task]) -> list[Task]:
        """Those that may: their arguments are in memory, and of what must not run twice the disk knows that it runs."""
        engine = self._engine
        for chunk, stored in self._read_back:
            chunk.payload = stored
        self._read_back.clear()
        ready = []
        for task in tasks:
            batch = task.batch
            try:
                self._read(task)
            except (OSError, BackendError) as exc:
                outcome = pack_outcome(ERROR, [(ERROR_TEXT, f"Its arguments cannot be read back: {exc}".encode())])
                for index in range(task.start, task.stop):
                    engine.finish(batch, index, 1, outcome, may_retry=False)
                continue
            if not batch.options.restartable:
                try:
                    engine.store.began(batch, task.start, task.stop)
                except (OSError, BackendError):
                    engine.give_back(batch, task.start, task.stop)
                    engine.call_later(_DISK_FULL_S, engine.executor.wake)
                    continue
            ready.append(task)
        return ready

    def _read(self, task: Task) -> None:
        batch = task.batch
        if batch.arguments is not None:
            batch.arguments = loaded(batch.arguments)
            return
        chunk = batch.chunk_at(task.start)
        if isinstance(chunk.payload, Stored):
            self._read_back.append((chunk, chunk.payload))
            chunk.payload = chunk.payload.load()

    # --- starting again -----------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Take up the unfinished jobs of an earlier process; once, before anything else. Without the lock.

        What had begun and must not run twice is an error; everything else is queued again.
        """
        engine = self._engine
        with engine.changing:
            found = engine.store.recovered()
            lost = pack_outcome(ERROR, [(ERROR_TEXT, _LOST)])
            for batch, begun in found:
                engine.adopt(batch)
                if not batch.sealed:
                    self.open_maps[batch.key] = batch
                for start, stop in begun:
                    for index in range(start, stop):
                        engine.finish(batch, index, 1, lost, may_retry=False)
            for batch, _ in found:
                try:
                    engine.attach(batch)
                except CloudException:
                    batch.n_waiting_on = -1  # a dependency was deleted meanwhile: nobody knows how it ended
                if not batch.finished:
                    engine.settle(batch)
