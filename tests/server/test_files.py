"""Stored files of a server: from programs, from jobs, over kill -9, at any size, and of nobody else."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import cloud
from cloud import current
from cloud.backends import files as client
from cloud.backends.http import HttpBackend
from cloud.errors import BackendError, CloudException, PayloadTooLarge, StoredFileCorrupt, StoredFileNotFound
from tests.server.running import ROOT, RunningServer
from tests.unit.test_files import NAMES

FEW = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
LARGE_BYTES = int(os.environ.get("CLOUD_TEST_LARGE_BYTES", str(160 << 20)))
"""2 GB and more where there is time: memory must not tell the difference."""


@pytest.fixture(scope="module")
def shared(_own_temporary_folder: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server") / "data") as server:
        yield server


def use(server: RunningServer, **quotas: Any) -> tuple[int, str]:
    """Have this program use a workgroup of its own."""
    key, secret = server.new_group(**quotas)
    cloud.setkey(key, secret, server.url)
    return key, secret


@pytest.fixture
def server(shared: RunningServer, closed_after: None) -> RunningServer:
    use(shared)
    return shared


def content(name: str) -> bytes:
    with cloud.files.getf(name) as file:
        return file.read()


def outside(server: RunningServer) -> dict[str, bytes]:
    """All files of the data folder and beside it that are not a workgroup's own."""
    folder = server.data.parent
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "groups" not in path.parts and path.suffix != ".log"
    }


def newest_group(server: RunningServer) -> Path:
    return max((server.data / "groups").iterdir(), key=lambda path: int(path.name))


class TestVerbs:
    def test_files_go_there_and_back(self, server: RunningServer, tmp_path: Path, home: Path) -> None:
        data = random.Random(1).randbytes(5 << 20)
        (tmp_path / "a").write_bytes(data)
        cloud.files.put(tmp_path / "a")
        cloud.files.putf("text", "b")
        assert cloud.files.list() == ["a", "b"]
        assert cloud.files.get_md5("a") == hashlib.md5(data).hexdigest()
        cloud.files.get("a", tmp_path / "copy", 10, 3_000_000)
        assert (tmp_path / "copy").read_bytes() == data[10:3_000_000]
        assert content("b") == b"text"
        assert cloud.files.delete("b")
        assert not cloud.files.exists("b")
        with pytest.raises(StoredFileNotFound, match="'b'"):
            cloud.files.getf("b")
        assert not home.exists(), "nothing belongs on this machine"

    def test_jobs_use_the_same_files(self, server: RunningServer) -> None:
        cloud.files.putf(b"from the program", "in")

        def job() -> bytes:
            import cloud

            cloud.files.putf(bytes(5 << 20), "large")
            with cloud.files.getf("in") as file:
                found: bytes = file.read()
            cloud.files.putf(found.upper(), "out")
            return found

        assert cloud.result(cloud.call(job)) == b"from the program"
        assert content("out") == b"FROM THE PROGRAM"
        assert content("large") == bytes(5 << 20)

    def test_errors_reach_a_job_as_they_are(self, server: RunningServer) -> None:
        def job() -> str:
            import cloud
            from cloud.errors import StoredFileNotFound

            try:
                cloud.files.getf("nothing")
            except StoredFileNotFound as exc:
                return exc.name
            return "found"

        assert cloud.result(cloud.call(job)) == "nothing"

    @FEW
    @given(NAMES)
    def test_no_name_is_a_path(self, server: RunningServer, name: str) -> None:
        before = outside(server)
        cloud.files.putf(name.encode(), name)
        assert content(name) == name.encode()
        assert cloud.files.delete(name)
        assert outside(server).keys() == before.keys()

    def test_another_workgroup_knows_nothing_of_them(self, server: RunningServer) -> None:
        data = random.Random(1).randbytes(client._FIRST_BYTES * 3)
        cloud.files.putf(data, "secret")
        mine = current.process.cloud.backend
        assert isinstance(mine, HttpBackend)
        upload = mine.ask("files.begin")[0]["upload"]
        digest = hashlib.sha256(data).hexdigest()
        use(server)
        other = current.process.cloud.backend
        assert isinstance(other, HttpBackend)
        assert cloud.files.list() == []
        assert not cloud.files.exists("secret")
        with pytest.raises(StoredFileNotFound):
            other.ask("files.read", sha256=digest, name="secret", start=0, n=10)
        with pytest.raises(StoredFileNotFound):
            other.ask("files.append", b"x", upload=upload, offset=0)
        assert not cloud.files.delete("secret")

    def test_a_key_without_the_scope_is_refused(self, shared: RunningServer, closed_after: None) -> None:
        from cloud.resources.accounts import AccountStore

        number, _ = shared.new_group()
        store = AccountStore(str(shared.data))
        user = next(
            user.name
            for workgroup in store.list_workgroups()
            for user in store.list_users(workgroup.name)
            if number in [key.api_key for key in store.list_keys(user.name)]
        )
        key = store.create_key(user, "", ("submit", "read"))
        store.close()
        cloud.setkey(key.api_key, key.api_secretkey, shared.url)
        for verb in (lambda: cloud.files.putf("x", "n"), cloud.files.list, lambda: cloud.files.delete("n")):
            with pytest.raises(CloudException, match="files"):
                verb()

    def test_quotas(self, shared: RunningServer, closed_after: None) -> None:
        use(shared, max_file_bytes=5 << 20, max_storage_bytes=12 << 20)
        cloud.files.putf(b"a" * (5 << 20), "a")
        with pytest.raises(PayloadTooLarge, match="may have 5,242,880 bytes"):
            cloud.files.putf(b"b" * ((5 << 20) + 1), "b")
        cloud.files.putf(b"b" * (5 << 20), "b")
        with pytest.raises(BackendError, match="no room"):
            cloud.files.putf(b"c" * (4 << 20), "c")
        assert cloud.files.list() == ["a", "b"]
        cloud.files.delete("a")
        cloud.files.putf(b"c" * (4 << 20), "c")


class TestFaults:
    def test_bits_flipped_on_disk_are_never_returned(self, server: RunningServer, tmp_path: Path) -> None:
        data = random.Random(1).randbytes(3 << 20)
        cloud.files.putf(data, "n")
        path = newest_group(server) / "files" / "blobs" / hashlib.sha256(data).hexdigest()
        (tmp_path / "copy").write_text("kept")
        for at in (0, 1 << 20, len(data) - 1):
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(StoredFileCorrupt, match="'n'"):
                cloud.files.get("n", tmp_path / "copy")
            assert (tmp_path / "copy").read_text() == "kept"
        cloud.files.putf(data, "n")
        assert content("n") == data

    def test_an_upload_goes_on_when_the_server_was_killed(self, tmp_path: Path, closed_after: None) -> None:
        data = random.Random(1).randbytes(client.PIECE_BYTES * 6 + 17)
        (tmp_path / "file").write_bytes(data)
        server = RunningServer(tmp_path / "server" / "data")
        server.data.parent.mkdir()
        server.start()
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        backend = current.process.cloud.backend
        assert isinstance(backend, HttpBackend)
        asked: list[str] = []

        def ask(op: str, *blobs: bytes, **content: Any) -> Any:
            asked.append(op)
            killer = None
            if (op == "files.append" and len(asked) in (3, 6)) or (op == "files.commit" and asked.count(op) == 1):
                killer = threading.Timer(0.005 * len(asked), restart)
                killer.start()
            try:
                return backend.ask(op, *blobs, **content)
            finally:
                if killer is not None:
                    killer.join()

        def restart() -> None:
            server.kill(group=True)
            server.start()

        client.RemoteFiles(ask).put(tmp_path / "file", "n")
        assert content("n") == data
        assert asked.count("files.begin") == 1
        restart()
        assert content("n") == data
        (group,) = (server.data / "groups").iterdir()
        assert os.listdir(group / "files" / "uploads") == []
        cloud.files.putf("x", "sweeps")
        assert os.listdir(group / "files" / "incoming") == []
        cloud.close()
        server.stop()

    def test_what_was_stored_survives_kill_9(self, tmp_path: Path, closed_after: None) -> None:
        server = RunningServer(tmp_path / "server" / "data")
        server.data.parent.mkdir()
        server.start()
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        for number in range(3):
            cloud.files.putf(str(number), f"n{number}")
            server.kill(group=True)
            server.start()
        assert [content(name) for name in cloud.files.list()] == [b"0", b"1", b"2"]
        cloud.close()
        server.stop()


def peak_kb(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.timeout(1200)
def test_memory_is_flat_at_any_size(shared: RunningServer, closed_after: None, tmp_path: Path) -> None:
    key, secret = use(shared)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, hashlib, cloud\n"
        f"cloud.setkey({key}, {secret!r}, {shared.url!r})\n"
        "class Source:\n"
        "    def __init__(self, n): self.left, self.hash, self.n = n, hashlib.sha256(), 0\n"
        "    def read(self, size):\n"
        "        self.n += 1\n"
        "        piece = (self.n.to_bytes(8, 'little') * (size // 8 + 1))[:min(size, self.left)]\n"
        "        self.left -= len(piece); self.hash.update(piece)\n"
        "        return piece\n"
        "def peak():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "def transfer(n):\n"
        "    source = Source(n)\n"
        "    cloud.files.putf(source, 'large')\n"
        "    found = hashlib.sha256()\n"
        "    with cloud.files.getf('large') as file:\n"
        "        while piece := file.read(1 << 20): found.update(piece)\n"
        "    assert found.digest() == source.hash.digest()\n"
        "transfer(48 << 20)\n"
        "small = peak()\n"
        "print(small, flush=True); sys.stdin.readline()\n"
        f"transfer({LARGE_BYTES})\n"
        "print(peak() - small)\n"
    )
    assert shared.process is not None
    with subprocess.Popen(
        [sys.executable, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        before = peak_kb(shared.process.pid)
        rest, _ = running.communicate("\n")
    assert running.returncode == 0
    assert int(rest) < 24_000
    assert peak_kb(shared.process.pid) - before < 48_000
    cloud.files.delete("large")
