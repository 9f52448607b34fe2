"""Taking work back that workers were sent ahead and have not begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from cloud.engine import channel as ch
from cloud.engine.executor.workers import WorkerHandle
from cloud.engine.store.base import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeAlias

    GiveBack: TypeAlias = Callable[[Batch, int, int], None]

_HANDSHAKE_S: Final = 0.00005


def take_back(workers: Iterable[WorkerHandle], give_back: GiveBack) -> list[WorkerHandle]:
    """Give back what workers have surely not begun, through ``give_back(batch, start, stop)``.

    Returns:
        The workers that were asked and confirm it with a STOPPED frame; whoever calls sends them on with RESUME.
    """
    asked = []
    for worker in workers:
        if not worker.tasks or worker.taking_back is not None or worker.dead:
            continue
        slots = worker.slots
        current = slots[ch.CURRENT]
        if worker.position - 1 == current:
            continue  # it has begun all it has
        first = 0 if current == ch.NO_LIMIT else current + 1
        slots[ch.LIMIT] = worker.limit = first
        asked.append((worker, first))
    if asked:
        # A worker announces an item, then looks at the limit. Once our limit has surely reached it, the item it
        # announced last is the last it can have begun.
        time.sleep(_HANDSHAKE_S)
    for worker, first in asked:
        current = worker.slots[ch.CURRENT]
        bound = first if current == ch.NO_LIMIT else max(first, current + 1)
        worker.taking_back = worker.position
        return_from(worker, bound, give_back)
    return [worker for worker, _ in asked]


def return_from(worker: WorkerHandle, bound: int, give_back: GiveBack) -> None:
    """Give back what a worker was sent from a position on."""
    kept = []
    for task in reversed(worker.tasks):
        end = task.position + task.stop - task.start
        if task.position >= bound:
            give_back(task.batch, task.start, task.stop)
        elif end > bound:
            split = task.start + bound - task.position
            give_back(task.batch, split, task.stop)
            task.stop = split
            kept.append(task)
        else:
            kept.append(task)
    worker.tasks.clear()
    worker.tasks.extend(reversed(kept))
    worker.load_s = sum((task.stop - task.start) * task.mean_s for task in worker.tasks)
