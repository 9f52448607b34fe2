"""What a job costs a server as its table grows: ``python -m benchmarks.server.growth [1000000]``.

One workgroup's engine over its database and two workers, without HTTP. Single calls, submitted 10,000 at a time and
waited for; the figures of each tenth, and how long the database takes to open at the end.
"""

from __future__ import annotations

import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import functions as f
from benchmarks.pace import timed
from cloud.backends.local import LocalBackend
from cloud.engine.clock import RealClock
from cloud.engine.engine import Engine
from cloud.engine.executor.processes import ProcessExecutor
from cloud.engine.store.sqlite import SqliteStore
from cloud.jobs import DEFAULT_OPTIONS
from cloud.serialization import pickling
from cloud.serialization.functions import FunctionCache

AT_ONCE = 10_000


def opened(folder: str) -> LocalBackend:
    """One workgroup at work over this folder."""
    engine = Engine(SqliteStore(folder), ProcessExecutor(2), RealClock())
    assert engine.durable is not None
    engine.durable.recover()
    return LocalBackend("server", engine, "server")


def grow(backend: LocalBackend, n: int) -> int:
    """Submit ``n`` calls and wait for them; the last jid."""
    function = FunctionCache().get(f.noop, None)
    last = 0
    for _ in range(n // AT_ONCE):
        arguments = (pickling.dumps_plain(((number,), {})) for number in range(AT_ONCE))
        jids = [backend.submit(function, each, DEFAULT_OPTIONS) for each in arguments]
        assert backend.wait(jids, None, stop_on_error=False) == []
        last = jids[-1]
    return last


def median_ms(ask: Callable[[], Any]) -> float:
    """How long it takes to ask, in milliseconds."""
    return 1000 * statistics.median(timed(ask)[0] for _ in range(20))


def main(n: int) -> None:
    """Print a line for each tenth; ``n`` is rounded up to a multiple of 100,000."""
    n = -(-n // (10 * AT_ONCE)) * 10 * AT_ONCE
    with tempfile.TemporaryDirectory() as folder:
        backend = opened(folder)
        print("      jobs  us a job  first page ms  status ms  outcome ms  MB on disk")
        for _ in range(10):
            seconds, last = timed(lambda: grow(backend, n // 10))
            cost_us = seconds / (n // 10) * 1e6

            def any_job(last: int = last) -> tuple[int]:
                return (random.randint(1, last),)

            page = median_ms(lambda: backend.listing(limit=100))
            status = median_ms(lambda any_job=any_job: backend.statuses(any_job()))
            outcome = median_ms(lambda any_job=any_job: backend.outcomes(any_job()))
            disk_mb = sum(each.stat().st_size for each in Path(folder).rglob("*") if each.is_file()) / 1e6
            print(
                f"{last:>10,}{cost_us:>10.0f}{page:>15.2f}{status:>11.3f}{outcome:>12.3f}{disk_mb:>12.0f}", flush=True
            )
        backend.close()
        seconds, backend = timed(lambda: opened(folder))
        resident_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(f"opened again in {seconds:.2f} s; at most {resident_mb:.0f} MB resident")
        backend.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
