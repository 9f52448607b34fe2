"""Telling of jobs as they become final: once for all of them, or of each run that ends together; and which are."""

from __future__ import annotations

from collections.abc import Callable

from cloud.engine.engine import Engine
from cloud.engine.store.base import Batch, Watch
from cloud.engine.waits import FINAL, Wait, runs_of
from cloud.jobs import DONE, QUEUED, WAITING, Jids


def when_final(
    engine: Engine, jids: Jids, action: Callable[[], None], *, stop_on_error: bool = False, first: bool = False
) -> Callable[[], None]:
    """Call ``action()`` once, under the lock, when all jobs are final (or one has failed); at once if they are.

    Args:
        engine: Has them.
        jids: Jobs; with ``first`` none of them final.
        action: Called once.
        stop_on_error: The first that fails will do.
        first: The first that becomes final will do.

    Returns:
        A function that calls it off.

    Raises:
        JobNotFound: A jid is unknown.
        BackendClosed: The engine is closed.
    """
    engine.check_open()
    over = [False]
    watching: list[tuple[Batch, Watch]] = []
    with engine.changing:
        runs = engine.store.runs(jids)
        left = [0]

        def finished(batch: Batch, start: int, n: int) -> None:
            left[0] -= n
            failed = stop_on_error and batch.states[start] != DONE
            if not over[0] and (left[0] <= 0 or failed or first):
                over[0] = True
                action()

        if stop_on_error and Wait(runs).has_failed():
            runs = []
        for batch, start, stop in runs:
            unfinished = _n_unfinished(batch, start, stop)
            if unfinished:
                left[0] += unfinished
                watching.append((batch, engine.watch(batch, start, stop, finished)))
        if not left[0]:
            over[0] = True
            action()
        else:
            engine.waiting.need_helper()

    def call_off() -> None:
        over[0] = True
        # Who looks again and again with a timeout must not leave a watch behind each time.
        with engine.changing:
            for batch, watch in watching:
                if batch.watches is not None:
                    batch.watches.remove(watch)
            watching.clear()

    return call_off


def on_each_final(engine: Engine, jids: Jids, notify: Callable[[int, int, int], None]) -> None:
    """Call ``notify(jid, n, status)`` under the lock for each run of jobs that becomes final, past ones too.

    Raises:
        JobNotFound: A jid is unknown.
        BackendClosed: The engine is closed.
    """
    engine.check_open()

    def tell(batch: Batch, low: int, n: int) -> None:
        notify(batch.jid0 + low, n, batch.states[low])

    with engine.changing:
        for batch, start, stop in engine.store.runs(jids):
            if stop - start == 1 and batch.states[start] < DONE:
                engine.watch(batch, start, stop, tell)
                continue
            for low, n in runs_of(batch, FINAL, start, stop):
                tell(batch, low, n)
            if _n_unfinished(batch, start, stop):
                engine.watch(batch, start, stop, tell)
        engine.waiting.need_helper()


def finals(engine: Engine, jids: Jids) -> list[tuple[int, int, int]]:
    """(first jid, n, status) of each run of these jobs that is final by now, in order."""
    engine.call_in()
    with engine.lock:
        return [
            (batch.jid0 + low, n, batch.states[low])
            for batch, start, stop in engine.store.runs(jids)
            for low, n in runs_of(batch, FINAL, start, stop)
        ]


def _n_unfinished(batch: Batch, start: int, stop: int) -> int:
    return batch.states.count(QUEUED, start, stop) + batch.states.count(WAITING, start, stop)
