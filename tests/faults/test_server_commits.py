"""The server dies at each of its commit points in turn: whatever the moment, what it promised is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest

import cloud
from cloud.errors import JobNotFound
from tests.faults.harness import Workgroup
from tests.faults.jobs import expected, work

EXIT_AT: Final = "CLOUD_TEST_EXIT_AT_COMMIT"
STEP: Final = 8
"""Of the points that are tried here; `make soak` tries each."""


def scenario(witness: Path, token: int) -> dict[str, Any]:
    """Submit, map, finish, kill and delete, as a client that knows nothing of faults; what it saw."""
    path = str(witness)

    def items() -> Iterator[int]:
        for number in range(6):
            yield token + 10 + number

    first = cloud.call(work, token, path, 0.0, _label=f"t{token}")
    once = cloud.call(work, token + 1, path, 0.0, _label=f"t{token + 1}", _restartable=False)
    after = cloud.call(work, token + 2, path, 0.0, _label=f"t{token + 2}", _depends_on=[first])
    mapped = cloud.map(work, items(), [path] * 6, [0.0] * 6, _label=f"m{token + 10}")
    long = cloud.call(work, token + 3, path, 600.0, _label=f"t{token + 3}")
    cloud.join([first, once, after, *mapped], ignore_errors=True)
    seen = {
        "first": cloud.result(first),
        "after": cloud.result(after),
        "mapped": cloud.result(mapped),
        "once": cloud.status(once),
    }
    cloud.kill(long)
    seen["long"] = cloud.status(long)
    cloud.delete(first)
    with pytest.raises(JobNotFound):
        cloud.status(first)
    cloud.delete(mapped)
    seen["left"] = [once, after, long]
    return seen


def check_scenario(seen: dict[str, Any], workgroup: Workgroup, witness: Path, token: int) -> None:
    """Compare with what must be, whenever the server died."""
    assert seen["first"] == expected(token)
    assert seen["after"] == expected(token + 2)
    assert seen["mapped"] == [expected(token + 10 + number) for number in range(6)]
    assert seen["long"] == "killed", seen
    starts = [int(text.split()[1]) for text in witness.read_text().splitlines() if text.startswith("start")]
    assert starts.count(token + 1) <= 1, "a job ran twice that must not"
    assert seen["once"] in ("done", "error")
    assert seen["once"] == "error" or cloud.result(seen["left"][0]) == expected(token + 1)
    with workgroup.opened_store() as rows:
        labels = [label for (label,) in rows("SELECT label FROM batch ORDER BY id")]
        assert labels == [f"t{token + 1}", f"t{token + 2}", f"t{token + 3}"], "one of each, and the deleted are gone"
        assert rows("PRAGMA integrity_check") == [("ok",)]
        assert rows("SELECT count(*) FROM batch WHERE finished IS NULL") == [(0,)]
    cloud.delete(seen["left"])


def dies_at(workgroup: Workgroup, point: int, witness: Path, token: int) -> bool:
    """Run the scenario against a server that dies at this point and is started again; False if it did not die."""
    server = workgroup.server
    server.stop()
    server.env[EXIT_AT] = str(point)
    died = threading.Event()
    try:
        try:
            server.start()
        except AssertionError:
            died.set()  # while it took up the jobs of the one before
        server.env.pop(EXIT_AT)
        over = threading.Event()
        watcher = threading.Thread(target=_start_again, args=(workgroup, died, over))
        watcher.start()
        try:
            check_scenario(scenario(witness, token), workgroup, witness, token)
        finally:
            over.set()
            watcher.join()
    finally:
        server.env.pop(EXIT_AT, None)
    return died.is_set()


def _start_again(workgroup: Workgroup, died: threading.Event, over: threading.Event) -> None:
    server = workgroup.server
    while not over.is_set():
        if died.is_set() or server.process is None:
            if server.process is None:
                server.start()
            return
        if server.process.poll() is not None:
            assert server.process.returncode == 137
            server.kill()
            died.set()
            server.start()
            return
        over.wait(0.01)


def sweep(workgroup: Workgroup, folder: Path, points: Iterator[int]) -> int:
    """Die at these points, until one is beyond the scenario's last; how many deaths."""
    for n_deaths, point in enumerate(points):
        if not dies_at(workgroup, point, folder / "witness", 1 + 100 * n_deaths):
            return n_deaths
    raise AssertionError("the scenario has no end")


def test_it_may_die_at_every_commit_of_a_scenario(closed_after: None, tmp_path: Path) -> None:
    with Workgroup(tmp_path, "--workers", "2") as workgroup:
        cloud.join(cloud.call(work, 0, str(tmp_path / "first"), 0.0, _label="t0"))  # the code travels only once
        cloud.delete(cloud.find(label="t0"))
        assert sweep(workgroup, tmp_path, count(1 + workgroup.random.randrange(STEP), STEP)) >= 2
