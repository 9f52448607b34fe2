"""The server's disk is full, fails, or changes bytes: it says so, lives on, and never answers what is wrong."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

import cloud
from cloud.errors import BackendError, CloudException
from tests.faults.harness import Load, Verdict, Workgroup, check, eventually
from tests.faults.jobs import expected, wait_for, work

SABOTAGE = Path(__file__).parent / "sabotage"
AT_ONCE_S = 5.0


def returned(value: Any) -> Any:
    return value


@pytest.fixture
def workgroup(closed_after: None, tmp_path: Path) -> Iterator[Workgroup]:
    with Workgroup(tmp_path, "--workers", "2") as found:
        yield found


@pytest.fixture(params=["file size", "file system"])
def full_disk(request: pytest.FixtureRequest, closed_after: None, tmp_path: Path) -> Iterator[Any]:
    """(workgroup, what fills its disk when it is called with True)."""
    if request.param == "file size":
        with Workgroup(tmp_path, "--workers", "2") as found:

            def limit(full: bool) -> None:
                assert found.server.process is not None
                most = 1024 if full else resource.RLIM_INFINITY
                resource.prlimit(found.server.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

            yield found, limit
        return
    disk = tmp_path / "data"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], check=False).returncode:
        pytest.skip("needs a file system of its own")
    try:
        with Workgroup(tmp_path, "--workers", "2") as found:
            filler = disk / "filler"

            def fill(full: bool) -> None:
                if not full:
                    filler.unlink()
                    return
                with open(filler, "wb", buffering=0) as file:
                    size = 1 << 16
                    while size:
                        try:
                            size = size if file.write(bytes(size)) == size else size // 2
                        except OSError:
                            size //= 2

            yield found, fill
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_refuses_at_once_and_heals(full_disk: tuple[Workgroup, Callable[[bool], None]]) -> None:
    workgroup, fill = full_disk
    witness, release = workgroup.folder / "witness", workgroup.folder / "release"
    before = cloud.call(work, 1, str(witness), 0.0)
    assert cloud.result(before) == expected(1)
    running = cloud.call(wait_for, str(release), os.urandom(300_000))
    eventually(lambda: cloud.status(running) == "processing", "it does not begin")
    results: list[Any] = []
    blocked = threading.Thread(target=lambda: results.append(_outcome_of(running)))
    blocked.start()
    asking, asked = threading.Event(), []
    curious = threading.Thread(target=lambda: asked.extend(_status_of(before) for _ in iter(asking.is_set, True)))
    curious.start()
    fill(True)
    refused = 0
    began = time.monotonic()
    with pytest.raises(BackendError) as caught:
        cloud.call(_tell_size, str(witness), os.urandom(300_000))
    assert caught.value.retry
    assert time.monotonic() - began < AT_ONCE_S
    with pytest.raises(BackendError):
        cloud.map(returned, [os.urandom(100_000) for _ in range(3)])
    accepted = [before, running]
    for token in range(2, 4):
        # Room that is left in the file may take a few small ones.
        try:
            accepted.append(cloud.call(work, token, str(witness), 0.0))
        except BackendError:
            refused += 1
    assert refused
    assert urlopen(f"{workgroup.server.url}/healthz", timeout=AT_ONCE_S).status == 200
    assert cloud.result(before) == expected(1)
    release.touch()
    fill(False)
    blocked.join(30)
    asking.set()
    curious.join(30)
    assert set(asked) == {"done"}, "who only asks is told of others' submissions"
    assert [len(each) for each in results] == [300_000], "who was blocked before does not go on by itself"
    accepted.append(cloud.call(work, 20, str(witness), 0.0))
    assert cloud.result(accepted[2:])[-1] == expected(20)
    n_run = sum(text.startswith("start") for text in witness.read_text().splitlines())
    assert n_run == len(accepted) - 1, "what was refused must not run"
    assert cloud.find() == accepted
    workgroup.crash(group=True)
    assert cloud.find() == accepted
    assert cloud.result([before, accepted[-1]]) == [expected(1), expected(20)]
    with workgroup.opened_store() as rows:
        assert rows("PRAGMA integrity_check") == [("ok",)]


def _outcome_of(jid: int) -> Any:
    try:
        return cloud.result(jid)
    except CloudException as exc:
        return exc


def _status_of(jid: int) -> Any:
    try:
        return cloud.status(jid)
    except CloudException as exc:
        return str(exc)


def failing_writes(folder: Path, each: int) -> Verdict:
    """Load on a server whose writes fail, with so many between one failure and the next."""
    shutil.copytree(SABOTAGE, folder / "sabotage")
    path = os.pathsep.join([str(folder / "sabotage"), str(Path(__file__).parents[2])])
    with Workgroup(folder, "--workers", "2", env={"PYTHONPATH": path, "FAIL_EACH": str(each)}) as workgroup:
        load = Load(folder, seconds=0.0).start()
        eventually(lambda: load.n_seen() > 20 and load.n_refused(), "jobs do not end")
        assert load.stop()
        return check(load, workgroup.store, refused_may_run=False)


def test_writes_fail_now_and_then(closed_after: None, tmp_path: Path) -> None:
    """Each failure is an error for the one who submitted, and what was accepted is kept."""
    found = failing_writes(tmp_path, 20)
    assert found.broken == {}
    assert found.n_refused > 0
    assert found.n_repeated == 0


# --- bytes are changed ------------------------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_blob_is_never_a_result_and_never_run(workgroup: Workgroup, tmp_path: Path) -> None:
    witness, release = tmp_path / "witness", tmp_path / "release"
    value = os.urandom(200_000)
    ended = cloud.call(returned, value)
    assert cloud.result(ended) == value
    other = cloud.call(returned, 5)
    assert cloud.result(other) == 5
    first = cloud.call(wait_for, str(release), 1)
    waiting = cloud.call(_tell_size, str(witness), os.urandom(200_000), _depends_on=[first])
    workgroup.server.kill(group=True)
    blobs = list(workgroup.store.parent.glob("blobs/*"))
    assert len(blobs) >= 2
    for number, blob in enumerate(blobs):
        content = bytearray(blob.read_bytes())
        content[number * 997 % len(content)] ^= 1 << number % 8
        blob.write_bytes(content)
    workgroup.server.start()
    with pytest.raises(CloudException, match="cannot be trusted|damaged"):
        cloud.result(ended)
    assert cloud.result(other) == 5, "the others are as they were"
    release.touch()
    assert cloud.result(first) == 1
    cloud.join(waiting, ignore_errors=True)
    assert cloud.status(waiting) == "error"
    with pytest.raises(CloudException, match="cannot be trusted|damaged"):
        cloud.result(waiting)
    assert not witness.exists(), "bytes that were changed were run"
    assert cloud.result(cloud.call(returned, 6)) == 6


def _tell_size(path: str, content: bytes) -> None:
    Path(path).write_text(str(len(content)))


# --- files of other versions ------------------------------------------------------------------------------------------


def test_a_newer_file_is_refused_and_left_alone(workgroup: Workgroup) -> None:
    assert cloud.result(cloud.call(returned, 1)) == 1
    workgroup.server.stop()
    store = workgroup.store
    with sqlite3.connect(store) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = store.read_bytes()
    workgroup.server.start()
    with pytest.raises(BackendError, match="schema version 99"):
        cloud.call(returned, 2)
    # Workgroups beside it are not held up.
    key, secret = workgroup.server.new_group()
    cloud.setkey(key, secret, workgroup.server.url)
    assert cloud.result(cloud.call(returned, 3)) == 3
    workgroup.server.stop()
    assert store.read_bytes() == before
