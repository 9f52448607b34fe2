"""What is known of an engine's jobs: of one, of those that match, of the newest, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable

from cloud.engine.engine import Engine
from cloud.engine.store.base import Batch, Stored, loaded
from cloud.engine.waits import by_batch, runs_in, status_codes
from cloud.jobs import DONE, OUTCOME_HEADER_BYTES, PROCESSING, QUEUED, WAITING, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_MAX_BATCHES: Final = 2_000
_MAX_ITEMS: Final = 100_000


def overview(engine: Engine) -> dict[str, Any]:
    """Numbers: ``counts`` of jobs by status code, ``n_slots``, ``n_used`` of them, and ``n_workers``."""
    executor = engine.executor
    engine.call_in()
    with engine.lock:
        counts = engine.store.tally()
        counts[WAITING] = engine.n_waiting
        counts[PROCESSING] = sum(batch.states.count(QUEUED, start, stop) for batch, start, stop in executor.running())
        counts[QUEUED] = max(0, engine.n_unfinished - counts[WAITING] - counts[PROCESSING])
        return {
            "counts": counts,
            "n_slots": executor.n_slots,
            "n_used": executor.n_used,
            "n_workers": executor.n_workers,
        }


def describe(engine: Engine, jid: int, ends: dict[int, Outcome] | None = None) -> dict[str, Any]:
    """What is known of a job; times in seconds since the epoch. Output of running jobs is as of now.

    Args:
        jid: Of the job.
        ends: Filled with the outcome, by the first jid that shares it: what is there need not be read again.
    """
    engine.check_open()
    with engine.lock:
        batch, index = engine.store.locate(jid)
        facts: dict[str, Any] = {
            "status": engine.statuses((jid,))[0],
            "label": batch.options.label,
            "function": batch.function.name,
            "created": batch.created,
            "attempt": batch.attempt(index),
            "retries": batch.options.retries,
            "depth": batch.depth,
        }
        if batch.states[index] >= DONE:
            start, n, raw = batch.segment_at(index)
            found = None if ends is None else ends.get(batch.jid0 + start)
            facts["outcome"] = found = found or Outcome(loaded(raw))
            if ends is not None:
                ends[batch.jid0 + start] = found
            facts["n_shared"], facts["index"] = n, index - start
        elif facts["status"] == PROCESSING:
            facts["live"] = engine.executor.live(batch, index)
        return facts


def select(
    engine: Engine, *, label: str | None = None, status: Iterable[int] | None = None, function: str | None = None
) -> list[int]:
    """Jids of jobs that match all that is given, in order. ``function`` matches the name or its last part."""
    engine.check_open()
    wanted = None if status is None else frozenset(status)
    engine.call_in()
    with engine.lock:
        found: list[int] = []
        running = by_batch(engine.executor.running() if wanted is not None else ())
        for batch in engine.store.batches(label=label):
            name = batch.function.name
            if function is not None and name != function and not name.endswith(f".{function}"):
                continue
            if wanted is None:
                runs: Iterable[tuple[int, int]] = ((0, batch.n),)
            else:
                runs = runs_in(status_codes(batch, 0, batch.n, running), tuple(wanted))
            for start, n in runs:
                jids = range(batch.jid0 + start, batch.jid0 + start + n)
                if engine.store.forgets(batch):
                    found += [jid for jid in jids if not engine.store.forgotten(batch, jid - batch.jid0)]
                else:
                    found += jids
        return found


def listing(
    engine: Engine,
    *,
    label: str | None,
    status: Iterable[int] | None,
    function: str | None,
    before: int | None,
    limit: int,
) -> tuple[list[dict[str, Any]], int | None]:
    """Jobs that match all that is given, newest first, in short.

    One call looks at some thousand submissions at most, so that nobody else waits long.

    Args:
        label, status, function: As for ``select``.
        before: Only jobs with smaller jids; None: all.
        limit: How many at most.

    Returns:
        (jobs, where to go on: the next ``before``; None at the end).
    """
    wanted = None if status is None else frozenset(status)
    engine.call_in()
    with engine.lock:
        running = by_batch(engine.executor.running())
        end = 1 << 62 if before is None else before
        if wanted == frozenset((PROCESSING,)):
            batches: Iterable[Batch] = _that_run(engine, label, end)
        else:
            batches = engine.store.newest(end, label=label)
        found: list[dict[str, Any]] = []
        n_items = 0
        for n_batches, batch in enumerate(batches, 1):
            stop = min(batch.n, end - batch.jid0)
            name = batch.function.name
            if function is not None and name != function and not name.endswith(f".{function}"):
                stop = 0
            codes = status_codes(batch, 0, batch.n, running) if stop else b""
            for index in range(stop - 1, -1, -1):
                if n_items >= _MAX_ITEMS or len(found) >= limit:
                    return found, batch.jid0 + index + 1
                n_items += 1
                if (wanted is None or codes[index] in wanted) and not engine.store.forgotten(batch, index):
                    found.append(_in_short(engine, batch, index, codes[index]))
            if n_batches >= _MAX_BATCHES:
                return found, batch.jid0
        return found, None


def _that_run(engine: Engine, label: str | None, end: int) -> list[Batch]:
    batches = {id(batch): batch for batch, _, _ in engine.executor.running()}.values()
    known = (each for each in batches if 0 < each.jid0 < end and label in (None, each.options.label))
    return sorted(known, key=lambda batch: -batch.jid0)


def _in_short(engine: Engine, batch: Batch, index: int, status: int) -> dict[str, Any]:
    started, runtime_s = 0.0, 0.0
    if status == PROCESSING:
        started = engine.executor.live(batch, index).get("started", 0.0)
        runtime_s = max(0.0, engine.clock.now() - started) if started else 0.0
    elif status >= DONE:
        started, runtime_s = _times(batch, index)
    return {
        "jid": batch.jid0 + index,
        "status": status,
        "label": batch.options.label,
        "function": batch.function.name,
        "created": batch.created,
        "started": started or None,
        "runtime_s": runtime_s if started else None,
        "attempt": batch.attempt(index),
    }


def _times(batch: Batch, index: int) -> tuple[float, float]:
    start, n, raw = batch.segment_at(index)
    if n > 1:
        outcome = Outcome(loaded(raw)).of_item(index - start, n)[0]
    else:
        # A result may be large, and is not asked for.
        outcome = Outcome(raw.head(OUTCOME_HEADER_BYTES) if isinstance(raw, Stored) else raw)
    return outcome.started, outcome.runtime_s
