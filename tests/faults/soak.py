"""The long version of the fault tests: `make soak`, or `python -m tests.faults.soak [--minutes N] [PART…]`.

Each part prints one line of JSON with its figures; the exit status is 1 if a promise was broken. Parts: kills, load,
commits, writes, cuts, readers, map, jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final

import psutil

import cloud
from tests.faults.harness import Load, Workgroup, check, eventually
from tests.faults.test_server_commits import sweep
from tests.faults.test_server_disk import failing_writes
from tests.faults.test_server_kills import kill_workers
from tests.faults.test_server_network import check_once_each, cut_at_each, measure_slow_readers
from tests.faults.test_server_scale import measure_map, measure_restart
from tests.server.proxy import FaultProxy

N_KILLS: Final = 200
N_CRASHES: Final = 100
STOP_S: Final = 30.0


def kills(folder: Path, minutes: float) -> dict[str, Any]:
    """F1: workers are killed 200 times, and the server 100 times, half of them with its workers (F2)."""
    with Workgroup(folder, "--workers", "2") as workgroup:
        load = Load(folder, seconds=0.05).start()
        eventually(load.n_seen, "no job ended")
        kill_workers(load, N_KILLS, 0.1, workgroup)
        ready_s = []
        for number in range(N_CRASHES):
            n = load.n_seen()
            eventually(lambda n=n: load.n_seen() > n, "clients do not go on by themselves")  # type: ignore[misc]
            threading.Event().wait(workgroup.random.uniform(0.0, 0.5))
            ready_s.append(workgroup.crash(group=number % 2 == 0))
        return {**_ended(load, workgroup), "ready_p50_s": sorted(ready_s)[N_CRASHES // 2], "ready_max_s": max(ready_s)}


def load(folder: Path, minutes: float) -> dict[str, Any]:
    """F17: all faults in random order for so many minutes; nothing may grow."""
    random = Random(1)
    with Workgroup(folder, "--workers", "2") as workgroup, FaultProxy(workgroup.server.port) as proxy:
        workgroup.use(proxy.url)
        load = Load(folder).start()
        faults: dict[str, Callable[[], object]] = {
            "worker killed": lambda: kill_workers(load, 1, 0.1, workgroup),
            "server killed": workgroup.crash,
            "group killed": lambda: workgroup.crash(group=True),
            "network cut": proxy.cut_all,
            "worker stopped": lambda: _stopped(load, 2.0),
            "server stopped": lambda: _stop(workgroup.server.process.pid, 2.0),  # type: ignore[union-attr]
        }
        until, counts, sizes = time.monotonic() + 60.0 * minutes, dict.fromkeys(faults, 0), []
        while time.monotonic() < until:
            name = random.choice(list(faults))
            faults[name]()
            counts[name] += 1
            n = load.n_seen()
            eventually(lambda n=n: load.n_seen() > n, f"nothing goes on after: {name}")  # type: ignore[misc]
            sizes.append(_sizes(workgroup))
        long_stop = workgroup.server.process
        assert long_stop is not None
        _stop(long_stop.pid, STOP_S)
        found = _ended(load, workgroup)
        last = _sizes(workgroup)
        found["broken"] |= {} if last["wal_mb"] < 64 else {"write-ahead log grew": last}
        return {**found, "faults": counts, "first": sizes[0] if sizes else None, "last": last}


def commits(folder: Path, minutes: float) -> dict[str, Any]:
    """F3: the server dies at each commit point of a scenario."""
    with Workgroup(folder, "--workers", "2") as workgroup:
        return {"n_deaths": sweep(workgroup, folder, count(1)), "broken": {}}


def writes(folder: Path, minutes: float) -> dict[str, Any]:
    """F6: writes fail, at many distances from each other."""
    refused = broken = 0
    for each in (3, 5, 8, 13, 21, 34, 55, 89):
        place = folder / str(each)
        place.mkdir()
        found = failing_writes(place, each)
        refused += found.n_refused
        broken += bool(found.broken)
    return {"n_refused": refused, "broken": {"distances": broken} if broken else {}}


def cuts(folder: Path, minutes: float) -> dict[str, Any]:
    """F10: the connection is cut at every byte of a submission, once in good order and once by a reset."""
    with Workgroup(folder, "--workers", "2") as workgroup, FaultProxy(workgroup.server.port) as proxy:
        workgroup.use(proxy.url)
        n = cut_at_each(proxy, folder / "witness", 1, 1, reset=False)
        n += cut_at_each(proxy, folder / "witness", 1, n + 1, reset=True)
        check_once_each(workgroup, folder / "witness", n)
        return {"n_submissions": n, "broken": {}}


def readers(folder: Path, minutes: float) -> dict[str, Any]:
    """F12: a thousand connections hardly read their replies."""
    with Workgroup(folder, "--workers", "2") as workgroup:
        p99_s, resident_mb = measure_slow_readers(workgroup, 1000)
    slow = {} if p99_s < 0.1 and resident_mb < 200 else {"slow readers": [p99_s, resident_mb]}
    return {"p99_s": p99_s, "resident_mb": resident_mb, "broken": slow}


def map_(folder: Path, minutes: float) -> dict[str, Any]:
    """F13: a map of a million."""
    with Workgroup(folder, "--workers", "2") as workgroup:
        found: dict[str, Any] = measure_map(workgroup, 1_000_000)
    over = {name: found[name] for name, most in _MAP_LIMITS.items() if found[name] > most}
    return {**found, "broken": over}


def jobs(folder: Path, minutes: float) -> dict[str, Any]:
    """F2, F13: 100,000 single jobs."""
    with Workgroup(folder, "--workers", "2") as workgroup:
        found: dict[str, Any] = measure_restart(workgroup, 100_000)
    return {**found, "broken": {} if found["ready_s"] < 2.0 else {"ready_s": found["ready_s"]}}


_MAP_LIMITS: Final = {"server_s": 0.5, "listing_p95_s": 0.05, "resident_mb": 500}
PARTS: Final[dict[str, Callable[[Path, float], dict[str, Any]]]] = {
    "kills": kills,
    "load": load,
    "commits": commits,
    "writes": writes,
    "cuts": cuts,
    "readers": readers,
    "map": map_,
    "jobs": jobs,
}


def _ended(load: Load, workgroup: Workgroup) -> dict[str, Any]:
    ended = load.stop()
    found = check(load, workgroup.store)
    facts = {name: value for name, value in vars(found).items() if isinstance(value, int)}
    broken: dict[str, Any] = found.broken if ended else {**found.broken, "stuck submitters": True}
    return {**facts, "broken": broken}


def _stop(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    threading.Event().wait(seconds)
    os.kill(pid, signal.SIGCONT)


def _stopped(load: Load, seconds: float) -> None:
    running = load.witness.running()
    if running:
        try:
            _stop(running[0][1], seconds)
        except ProcessLookupError:
            pass


def _sizes(workgroup: Workgroup) -> dict[str, float]:
    assert workgroup.server.process is not None
    server = psutil.Process(workgroup.server.process.pid)
    wal = workgroup.store.with_name(workgroup.store.name + "-wal")
    return {
        "resident_mb": server.memory_info().rss / 1e6,
        "descriptors": server.num_fds(),
        "processes": len(server.children(recursive=True)),
        "wal_mb": wal.stat().st_size / 1e6 if wal.exists() else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=10.0, help="of the part 'load' (10)")
    options = parser.parse_args()
    status = 0
    for name in options.parts or PARTS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as folder:
            found = PARTS[name](Path(folder), options.minutes)
        print(json.dumps({"part": name, "took_s": round(time.monotonic() - began, 1), **found}), flush=True)
        status |= bool(found["broken"])
    cloud.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
