"""Stored files over the table of operations: pieces, resumption, leases, checksums, limits."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cloud.backends import files
from cloud.backends.files import RemoteFiles
from cloud.errors import (
    AccountError,
    BackendClosed,
    BackendError,
    CloudException,
    PayloadTooLarge,
    StoredFileCorrupt,
    StoredFileNotFound,
)
from cloud.resources import blobs, uploads
from cloud.server import beside as served
from tests.unit.beside import Beside
from tests.unit.test_files import HOSTILE_NAMES, NAMES, at_step, in_child

FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECE = 128


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    beside = Beside(tmp_path / "group")
    yield beside
    beside.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "CHUNK_BYTES", 32)
    monkeypatch.setattr(files, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(files, "_FIRST_BYTES", 40)


@pytest.fixture
def remote(beside: Beside) -> RemoteFiles:
    return RemoteFiles(beside.ask)


def content(remote: RemoteFiles, name: str) -> bytes:
    with remote.getf(name) as file:
        return file.read()


def upload(beside: Beside, *pieces: bytes) -> str:
    number: str = beside.ask("files.begin")[0]["upload"]
    offset = 0
    for piece in pieces:
        offset += len(piece)
        assert beside.ask("files.append", piece, upload=number, offset=offset - len(piece))[0] == {"size": offset}
    return number


def stored(beside: Beside) -> set[str]:
    return set(os.listdir(beside.folder / "files" / "blobs"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestContents:
    @pytest.mark.parametrize("n", [0, 1, 31, 32, PIECE - 1, PIECE, PIECE + 1, PIECE * 3, PIECE * 3 + 77])
    def test_they_come_back(self, small: None, remote: RemoteFiles, tmp_path: Path, n: int) -> None:
        data = random.Random(n).randbytes(n)
        remote.putf(io.BytesIO(data), "n")
        assert content(remote, "n") == data
        info = remote.info("n")
        assert (info.size_bytes, info.sha256, info.md5) == (n, sha256(data), hashlib.md5(data).hexdigest())
        with remote.getf("n", 7) as file:
            assert (file.filesize, file.md5) == (n, info.md5)
        remote.get("n", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data

    @FEW
    @given(st.binary(max_size=400), st.integers(0, 500), st.none() | st.integers(0, 500), st.lists(st.integers(0, 450)))
    def test_it_behaves_as_any_binary_file(
        self, small: None, remote: RemoteFiles, data: bytes, start: int, end: int | None, seeks: list[int]
    ) -> None:
        remote.putf(data, "n")
        if end is not None:
            end = max(start, end)
        whole = io.BytesIO(data[start:end])
        with remote.getf("n", start, end) as file:
            for position in seeks:
                assert file.seek(position) == whole.seek(position)
                assert file.read(position % 60) == whole.read(position % 60)
            assert file.seek(0) == whole.seek(0)
            assert file.readlines() == whole.readlines()
            assert file.tell() == whole.tell()

    def test_a_small_file_is_one_request_each_way(self, beside: Beside, remote: RemoteFiles) -> None:
        remote.putf("small", "n")
        assert content(remote, "n") == b"small"
        assert beside.asked == ["files.put", "files.open"]

    def test_only_the_range_is_asked_for(self, small: None, beside: Beside, remote: RemoteFiles) -> None:
        remote.putf(bytes(1000), "n")
        beside.asked.clear()
        with remote.getf("n", 500, 503) as file:
            assert file.read() == bytes(3)
        assert beside.asked == ["files.open"]

    def test_ranges_far_beyond_the_end(self, remote: RemoteFiles) -> None:
        remote.putf("0123", "n")
        with remote.getf("n", 2**80, 2**81) as file:
            assert file.read() == b""
        with pytest.raises(ValueError, match="is not one"):
            remote.getf("n", 3, 2)

    def test_what_is_missing_is_told(self, remote: RemoteFiles) -> None:
        for verb in (remote.getf, remote.info, remote.get_md5):
            with pytest.raises(StoredFileNotFound, match="'n'") as caught:
                verb("n")
            assert caught.value.name == "n"
        assert not remote.exists("n")
        assert not remote.delete("n")

    def test_delete_tells_whether_there_was_one(self, beside: Beside, remote: RemoteFiles) -> None:
        remote.putf("x", "n")
        assert remote.exists("n")
        assert remote.delete("n")
        assert not remote.delete("n")
        assert remote.list() == []

    def test_many_names_come_in_pages(
        self, beside: Beside, remote: RemoteFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cloud.server import files as handlers

        monkeypatch.setattr(handlers, "_N_NAMES", 3)
        names = sorted(f"{prefix}{number}" for prefix in "ab" for number in range(4))
        for name in names:
            remote.putf("x", name)
        assert remote.list() == names
        assert remote.list("a") == names[:4]
        assert remote.list("b3") == ["b3"]
        assert remote.list("c") == []

    def test_memory_stays_flat(self, beside: Beside, remote: RemoteFiles, tmp_path: Path) -> None:
        n = 96 << 20
        with open(tmp_path / "large", "wb") as large:
            large.truncate(n)
        remote.put(tmp_path / "large", "warm")
        tracemalloc.start()
        try:
            remote.put(tmp_path / "large", "large")
            remote.get("large", tmp_path / "copy")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (tmp_path / "copy").stat().st_size == n
        assert peak < 40 << 20


class TestNames:
    @FEW
    @given(NAMES)
    @example("../../../x")
    @example("/etc/passwd")
    def test_none_is_a_path(self, remote: RemoteFiles, tmp_path: Path, name: str) -> None:
        outside = tmp_path / "outside"
        outside.mkdir(exist_ok=True)
        (outside / "kept").write_text("kept")
        before = {path: data for path, data in tree(tmp_path).items() if not path.startswith(str(tmp_path / "group"))}
        remote.putf(name.encode(), name)
        assert content(remote, name) == name.encode()
        assert name in remote.list(name)
        assert remote.delete(name)
        after = {path: data for path, data in tree(tmp_path).items() if not path.startswith(str(tmp_path / "group"))}
        assert after == before

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_hostile_ones(self, small: None, remote: RemoteFiles, tmp_path: Path, name: str) -> None:
        before = {path for path in tmp_path.rglob("*") if "group" not in path.parts}
        remote.putf(bytes(PIECE * 2 + 1), name)
        assert len(content(remote, name)) == PIECE * 2 + 1
        assert {path for path in tmp_path.rglob("*") if "group" not in path.parts} == before

    @pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 1025])
    def test_impossible_ones_are_refused_on_both_sides(self, beside: Beside, remote: RemoteFiles, name: str) -> None:
        for verb in (remote.getf, remote.info, remote.delete, remote.exists):
            with pytest.raises(ValueError, match="name of a stored file"):
                verb(name)
        assert beside.asked == []
        number = upload(beside, b"x")
        for op, blob, more in (
            ("files.put", (b"x",), {"sha256": sha256(b"x")}),
            ("files.commit", (), {"upload": number, "sha256": sha256(b"x")}),
            ("files.delete", (), {}),
            ("files.open", (), {"start": 0, "n": 1}),
        ):
            with pytest.raises(CloudException, match="name of a stored file"):
                beside.ask_unchecked(op, *blob, name=name, **more)

    @pytest.mark.parametrize("number", ["", "../../x", "/etc/passwd", "0" * 31, "0" * 32 + "\n", "A" * 32, "0" * 32])
    def test_no_upload_is_a_path(self, beside: Beside, number: str) -> None:
        (beside.folder / "files" / "uploads").mkdir(parents=True)
        with pytest.raises(StoredFileNotFound, match="there is no upload"):
            beside.ask_unchecked("files.append", b"x", upload=number, offset=0)
        with pytest.raises(StoredFileNotFound, match="there is no upload"):
            beside.ask_unchecked("files.commit", upload=number, name="n", sha256=sha256(b""))
        assert beside.ask_unchecked("files.abort", upload=number)[0] == {}


class TestUploads:
    def test_a_piece_sent_again_changes_nothing(self, beside: Beside, remote: RemoteFiles) -> None:
        number = upload(beside, b"abc", b"def")
        assert beside.ask("files.append", b"def", upload=number, offset=3)[0] == {"size": 6}
        assert beside.ask("files.append", b"xyz", upload=number, offset=9)[0] == {"size": 6}
        beside.ask("files.commit", upload=number, name="n", sha256=sha256(b"abcdef"))
        assert content(remote, "n") == b"abcdef"

    def test_a_commit_is_on_disk_and_copies_nothing(self, beside: Beside, remote: RemoteFiles) -> None:
        number = upload(beside, b"abc")
        inode = (beside.folder / "files" / "uploads" / number).stat().st_ino
        beside.ask("files.commit", upload=number, name="n", sha256=sha256(b"abc"))
        assert (beside.folder / "files" / "blobs" / sha256(b"abc")).stat().st_ino == inode
        assert os.listdir(beside.folder / "files" / "uploads") == []
        assert os.listdir(beside.folder / "files" / "incoming") == []

    def test_a_commit_asked_again_does_not_undo_what_came_later(self, beside: Beside, remote: RemoteFiles) -> None:
        number = upload(beside, b"abc")
        beside.ask("files.commit", upload=number, name="n", sha256=sha256(b"abc"))
        remote.putf("later", "n")
        beside.restart()
        beside.ask("files.commit", upload=number, name="n", sha256=sha256(b"abc"))
        assert content(remote, "n") == b"later"
        with pytest.raises(StoredFileNotFound, match="there is no upload"):
            beside.ask("files.append", b"x", upload=number, offset=3)

    def test_put_and_delete_asked_again_change_nothing(self, beside: Beside, remote: RemoteFiles) -> None:
        beside.ask_with_key("k1", "files.put", b"old", name="n", sha256=sha256(b"old"))
        remote.putf("later", "n")
        beside.ask_with_key("k1", "files.put", b"old", name="n", sha256=sha256(b"old"))
        assert content(remote, "n") == b"later"
        assert beside.ask_with_key("k2", "files.delete", name="n")[0] == {"deleted": True}
        assert beside.ask_with_key("k2", "files.delete", name="n")[0] == {"deleted": True}
        remote.putf("new", "n")
        beside.restart()
        assert beside.ask_with_key("k2", "files.delete", name="n")[0] == {"deleted": True}
        assert content(remote, "n") == b"new"
        assert beside.ask_with_key("k3", "files.delete", name="other")[0] == {"deleted": False}

    def test_contents_damaged_on_their_way_are_refused(self, beside: Beside, remote: RemoteFiles) -> None:
        remote.putf("old", "n")
        number = upload(beside, b"abc")
        with pytest.raises(StoredFileCorrupt, match="SHA-256"):
            beside.ask("files.commit", upload=number, name="n", sha256=sha256(b"abd"))
        with pytest.raises(StoredFileCorrupt, match="damaged"):
            beside.ask("files.put", b"abc", name="n", sha256=sha256(b"abd"))
        assert content(remote, "n") == b"old"
        assert os.listdir(beside.folder / "files" / "uploads") == []

    @pytest.mark.parametrize("kept", [0, 1, PIECE - 1, PIECE, PIECE + 1, PIECE + 50, 2 * PIECE])
    def test_goes_on_after_a_restart(
        self, small: None, beside: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
    ) -> None:
        """The server ends amid the third piece, and comes back with so many bytes of the second and third."""
        data = random.Random(kept).randbytes(PIECE * 4 + 3)
        n_appends = 0

        def ask(op: str, *blobs: bytes, **content: Any) -> Any:
            nonlocal n_appends
            if op == "files.append":
                n_appends += 1
                if n_appends == 3:
                    (path,) = (beside.folder / "files" / "uploads").iterdir()
                    beside.restart()
                    with open(path, "r+b") as partial:
                        partial.seek(2 * PIECE)
                        partial.write(data[2 * PIECE : 3 * PIECE])
                        partial.truncate(PIECE + kept)
            return beside.ask(op, *blobs, **content)

        RemoteFiles(ask).putf(io.BytesIO(data), "n")
        assert content(RemoteFiles(beside.ask), "n") == data
        # What was lost of a piece that had been acknowledged takes all of it once more.
        assert beside.asked.count("files.begin") == (1 if kept >= PIECE else 2)

    def test_an_upload_that_is_gone_is_sent_once_more(self, small: None, beside: Beside, tmp_path: Path) -> None:
        data = random.Random(1).randbytes(PIECE * 3)

        def ask(op: str, *blobs: bytes, **content: Any) -> Any:
            if op == "files.commit" and beside.asked.count("files.begin") == 1:
                beside.ask("files.abort", upload=content["upload"])
            return beside.ask(op, *blobs, **content)

        (tmp_path / "file").write_bytes(data)
        RemoteFiles(ask).put(tmp_path / "file", "n")
        assert content(RemoteFiles(beside.ask), "n") == data
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        beside.asked.clear()
        with pytest.raises(StoredFileNotFound, match="there is no upload"):
            RemoteFiles(ask).putf(open(read, "rb"), "m")
        assert not RemoteFiles(beside.ask).exists("m")

    def test_a_source_that_fails_leaves_nothing(self, small: None, beside: Beside, remote: RemoteFiles) -> None:
        class Failing(io.RawIOBase):
            n_read = 0

            def read(self, size: int = -1, /) -> bytes:
                self.n_read += 1
                if self.n_read == 5:
                    raise OSError("the source failed")
                return bytes(PIECE)

        with pytest.raises(OSError, match="the source failed"):
            remote.putf(Failing(), "n")
        assert not remote.exists("n")
        assert os.listdir(beside.folder / "files" / "uploads") == []

    def test_those_left_alone_for_a_day_are_swept(self, beside: Beside, remote: RemoteFiles) -> None:
        old, new = upload(beside, b"abc"), upload(beside, b"abc")
        path = beside.folder / "files" / "uploads" / old
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - uploads.KEPT_S - 1))
        beside.restart()
        upload(beside)
        assert not path.exists()
        beside.ask("files.commit", upload=new, name="n", sha256=sha256(b"abc"))
        assert content(remote, "n") == b"abc"

    def test_there_may_be_only_so_many(self, beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(uploads, "MAX_UPLOADS", 2)
        first = upload(beside)
        upload(beside)
        with pytest.raises(BackendError, match="2 uploads are unfinished"):
            beside.ask("files.begin")
        beside.ask("files.abort", upload=first)
        upload(beside)

    @pytest.mark.parametrize("before", ["nothing", "another", "the same"])
    def test_killed_at_every_step_of_a_commit(self, tmp_path: Path, before: str) -> None:
        data = b"new" * 20
        number, code, at_last = 0, -signal.SIGKILL, False
        while code == -signal.SIGKILL:
            number += 1
            beside = Beside(tmp_path / str(number))
            remote = RemoteFiles(beside.ask)
            if before != "nothing":
                remote.putf(b"old" if before == "another" else data, "n")
                remote.putf(data, "same")
            name = upload(beside, data[:30], data[30:])
            beside.close()

            def child(folder: Path = beside.folder, name: str = name, number: int = number) -> None:
                beside = Beside(folder)
                store = beside.server.uploads
                sys.setprofile(at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL)))
                store.commit(name, "n", sha256(data))
                sys.setprofile(None)

            code = in_child(child)()
            beside = Beside(beside.folder)
            remote = RemoteFiles(beside.ask)
            if remote.exists("n"):
                assert content(remote, "n") in (b"old", data), number
            with suppress(StoredFileNotFound):  # it was committed
                for offset in (7, 60):
                    reply, _ = beside.ask("files.append", b"" if offset == 60 else b"x", upload=name, offset=offset)
                    assert reply == {"size": 60}, number
            beside.ask("files.commit", upload=name, name="n", sha256=sha256(data))
            assert content(remote, "n") == data, number
            remote.putf("sweeps", "other")
            assert os.listdir(beside.folder / "files" / "incoming") == [], number
            assert os.listdir(beside.folder / "files" / "uploads") == [], number
            at_last = stored(beside) == {sha256(data), sha256(b"sweeps")}
            beside.close()
        assert code == 0
        assert number > 10
        assert at_last or before == "another"  # kept for who may be reading it


class TestReading:
    def test_goes_on_when_the_name_is_replaced_or_gone(self, small: None, beside: Beside, remote: RemoteFiles) -> None:
        data = random.Random(1).randbytes(1000)
        for change in (lambda: remote.putf("other", "n"), lambda: remote.delete("n")):
            remote.putf(data, "n")
            with remote.getf("n") as file:
                assert file.read(10) == data[:10]
                change()
                remote.putf("more", "collects")
                assert file.read() == data[10:]

    def test_also_over_a_restart(self, small: None, beside: Beside, remote: RemoteFiles) -> None:
        data = random.Random(1).randbytes(1000)
        remote.putf(data, "n")
        with remote.getf("n") as file:
            assert file.read(10) == data[:10]
            beside.restart()
            remote.delete("n")
            assert file.read() == data[10:]

    def test_the_space_is_free_once_nobody_reads(
        self, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(served, "_LEASE_S", 1e-9)
        beside = Beside(tmp_path / "group")
        remote = RemoteFiles(beside.ask)
        remote.putf(bytes(1000), "n")
        with remote.getf("n") as file:
            file.read(10)
            remote.delete("n")
            assert stored(beside) == set()
            with pytest.raises(StoredFileNotFound, match="replaced or deleted while it was being read"):
                file.read()
        beside.close()

    def test_delete_frees_the_space_at_once_when_nobody_reads(self, beside: Beside, remote: RemoteFiles) -> None:
        remote.putf(bytes(1000), "n")
        remote.delete("n")
        assert stored(beside) == set()
        assert beside.server.used_bytes == 0

    @pytest.mark.parametrize("at", [0, 39, 40, 500, 999])
    def test_a_bit_flipped_on_disk_is_never_returned(
        self, small: None, beside: Beside, remote: RemoteFiles, tmp_path: Path, at: int
    ) -> None:
        data = random.Random(1).randbytes(1000)
        remote.putf(data, "n")
        path = beside.folder / "files" / "blobs" / sha256(data)
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        (tmp_path / "copy").write_text("kept")
        with pytest.raises(StoredFileCorrupt, match="does not match its checksum") as caught:
            remote.get("n", tmp_path / "copy")
        assert caught.value.name == "n"
        assert (tmp_path / "copy").read_text() == "kept"

    def test_a_piece_damaged_on_its_way_is_asked_for_again(self, small: None, beside: Beside) -> None:
        data = random.Random(1).randbytes(1000)
        RemoteFiles(beside.ask).putf(data, "n")
        damage: set[int] = set()
        n_asked = 0

        def ask(op: str, *blobs: bytes, **content: Any) -> Any:
            nonlocal n_asked
            answer, found = beside.ask(op, *blobs, **content)
            n_asked += 1
            if n_asked in damage:
                found = [bytes([found[0][0] ^ 1]) + found[0][1:]]
            return answer, found

        damage = {1, 3}
        assert content(RemoteFiles(ask), "n") == data
        n_asked, damage = 0, {3, 4}
        with pytest.raises(StoredFileCorrupt, match="damaged on their way"):
            content(RemoteFiles(ask), "n")
        n_asked, damage = 0, set()

        def cut(op: str, *blobs: bytes, **more: Any) -> Any:
            answer, found = beside.ask(op, *blobs, **more)
            return answer, [found[0][:-1]]

        with pytest.raises(StoredFileCorrupt, match="damaged on their way"):
            content(RemoteFiles(cut), "n")


class TestLimits:
    def test_a_file_may_have_so_many_bytes(self, small: None, tmp_path: Path) -> None:
        beside = Beside(tmp_path / "group", max_file_bytes=PIECE * 2 + 10)
        remote = RemoteFiles(beside.ask)
        remote.putf(bytes(PIECE * 2 + 10), "n")
        with pytest.raises(PayloadTooLarge, match="266 bytes") as caught:
            remote.putf(bytes(PIECE * 2 + 11), "m")
        assert caught.value.limit_bytes == 266
        assert remote.list() == ["n"]
        assert os.listdir(beside.folder / "files" / "uploads") == []
        beside.close()

    def test_all_may_have_so_many_bytes(self, small: None, tmp_path: Path) -> None:
        beside = Beside(tmp_path / "group", max_storage_bytes=500)
        remote = RemoteFiles(beside.ask)
        remote.putf(b"a" * 50, "a")
        remote.putf(b"b" * 400, "b")
        with pytest.raises(BackendError, match="no room") as caught:
            remote.putf(b"c" * 51, "c")
        assert caught.value.retry
        with pytest.raises(BackendError, match="no room"):
            remote.putf(b"c" * (PIECE + 1), "c")
        partial = upload(beside, b"d" * 40)
        with pytest.raises(BackendError, match="no room"):
            remote.putf(b"c" * 11, "c")
        beside.ask("files.abort", upload=partial)
        remote.delete("a")
        remote.putf(b"c" * 100, "c")
        beside.close()

    def test_a_piece_may_have_so_many_bytes(self, beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
        from cloud.server import files as handlers

        monkeypatch.setattr(handlers, "MAX_PIECE_BYTES", 10)
        number = upload(beside)
        with pytest.raises(PayloadTooLarge):
            beside.ask("files.append", bytes(11), upload=number, offset=0)


class TestRequests:
    def test_nonsense_of_a_job_is_answered(self, beside: Beside) -> None:
        for content in ({}, {"name": 7}, {"name": None, "start": "x", "n": []}):
            for op in ("files.open", "files.put", "cron.info", "cron.register", "files.append"):
                with pytest.raises(CloudException):
                    beside.ask_unchecked(op, b"x", **content)

    def test_accounts_are_not_for_jobs(self, beside: Beside) -> None:
        with pytest.raises(AccountError, match="not managed from inside jobs"):
            beside.ask_unchecked("account.list_keys")

    def test_after_the_end_requests_are_refused(self, beside: Beside) -> None:
        beside.server.stop()
        with pytest.raises(BackendClosed):
            beside.ask("files.list", prefix="", after="")
