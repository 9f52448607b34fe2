"""Very many jobs: what takes no time for one takes none for each of a million."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

import cloud
from cloud.engine.store.base import Batch
from cloud.engine.store.sqlite import SqliteStore
from cloud.jobs import DEFAULT_OPTIONS, DONE, VALUE, JobOptions, pack_outcome
from cloud.serialization.functions import Function
from tests.faults.harness import Workgroup
from tests.faults.jobs import wait_for

N_ITEMS: Final = 1_000_000
N_JOBS: Final = 10_000


@pytest.fixture
def workgroup(closed_after: None, tmp_path: Path) -> Iterator[Workgroup]:
    with Workgroup(tmp_path, "--workers", "2") as found:
        yield found


def served_s(workgroup: Workgroup, path: str) -> float:
    """What the server spent on requests of this path, by its log."""
    lines = workgroup.server.log.read_text().splitlines()
    return sum(float(text.rpartition("duration_s=")[2]) for text in lines if f"path=/v1{path}" in text)


def measure_map(workgroup: Workgroup, n: int) -> dict[str, float]:
    """Submit a map of so many while all workers are held; what that, and asking for its jobs, takes."""
    assert workgroup.server.process is not None
    server = psutil.Process(workgroup.server.process.pid)
    release = workgroup.folder / "release"
    holding = [cloud.call(wait_for, str(release), None) for _ in range(2)]
    began = time.monotonic()
    jids = cloud.map(abs, range(n), _label="many")
    found = {"client_s": time.monotonic() - began, "server_s": served_s(workgroup, "/maps")}
    listings, others = [], []
    for at in range(0, n, n // 20):
        began = time.monotonic()
        assert cloud.status(jids[at : at + 100]) == ["queued"] * 100
        listings.append(time.monotonic() - began)
        began = time.monotonic()
        assert cloud.find(label="other") == []
        others.append(time.monotonic() - began)
    began = time.monotonic()
    assert len(cloud.find(label="many", status="queued")) == n
    found |= {
        "listing_p95_s": sorted(listings)[-2],
        "find_p95_s": sorted(others)[-2],
        "find_all_s": time.monotonic() - began,
        "resident_mb": server.memory_info().rss / 1e6,
    }
    found["ready_s"] = workgroup.crash(group=True)
    assert cloud.status(jids[n - 1]) in ("queued", "processing", "done")
    cloud.kill([*holding, *jids[n // 100 :]])
    release.touch()
    cloud.join(jids, ignore_errors=True)
    assert cloud.result(jids[7]) == 7
    return found


def test_a_map_of_a_million(workgroup: Workgroup) -> None:
    found = measure_map(workgroup, N_ITEMS)
    print(found)
    assert found["server_s"] < 2.0
    assert found["listing_p95_s"] < 0.25
    assert found["find_p95_s"] < 0.25
    assert found["resident_mb"] < 500
    assert found["ready_s"] < 10.0


def store_jobs(folder: Path, n: int, waits_for: int) -> int:
    """Have n single jobs more in a store: a tenth waits for that job, the rest is done; the jid of the first."""
    store = SqliteStore(folder)
    function, context = Function(b"never loaded", "module.work", reusable=True), (1, b"surroundings")
    waiting = JobOptions()
    waiting.depends_on = [waits_for]
    first = store.new_jids(n)
    for number in range(n):
        options = DEFAULT_OPTIONS if number % 10 else waiting
        batch = Batch(first + number, function, context, options, 0, time.time(), b"arguments")
        store.add(batch)
        if number % 10:
            outcome = pack_outcome(DONE, [(VALUE, b"value")])
            batch.states[0], batch.n_final, batch.arguments = DONE, 1, b""
            batch.add_segment(0, 1, outcome)
            store.finished(batch, 0, 1, outcome)
    store.close()
    return first


def measure_restart(workgroup: Workgroup, n: int) -> dict[str, float]:
    """Ready again after kill -9 with n single jobs stored; what asking takes then."""
    holding = cloud.call(wait_for, str(workgroup.folder / "release"), None)
    workgroup.server.kill(group=True)
    first = store_jobs(workgroup.store.parent, n, holding)
    workgroup.server.start()
    found = {"ready_s": workgroup.crash(group=True)}
    took = []
    for number in range(20):
        began = time.monotonic()
        assert cloud.status(first + number) == ("done" if number % 10 else "waiting")
        took.append(time.monotonic() - began)
    assert workgroup.server.process is not None
    resident = psutil.Process(workgroup.server.process.pid).memory_info().rss / 1e6
    return found | {"status_p95_s": sorted(took)[-2], "resident_mb": resident}


def test_many_single_jobs_are_there_again_soon(workgroup: Workgroup) -> None:
    found = measure_restart(workgroup, N_JOBS)
    print(found)
    assert found["ready_s"] < 5.0
    assert found["status_p95_s"] < 0.25
    assert found["resident_mb"] < 500
