"""Stored files: the store, its blobs and its database, against bad input, bad disks, crashes and each other."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import cloud
from cloud.errors import BackendError, StoredFileCorrupt, StoredFileNotFound
from cloud.resources import Database, blobs
from cloud.resources.files import FileStore

FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)

HOSTILE_NAMES = [
    "../x",
    "../../../../tmp/x",
    "/etc/passwd",
    ".",
    "..",
    "a/",
    "/",
    "//a//b",
    "C:\\windows\\x",
    "con",
    "%2e%2e%2fx",
    "name\nwith\r\x1b[31mcontrol",
    "*",
    "'; DROP TABLE file; --",
    "names.sqlite3",
    "\u00e9",
    "e\u0301",
    "\U0001f600",
    "x" * 1024,
    "\U0001f600" * 1024,
    " ",
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(str(tmp_path / "data"))
    yield store
    store.close()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "CHUNK_BYTES", 16)


def content(store: FileStore, name: str) -> bytes:
    with store.getf(name) as file:
        return file.read()


def blob_names(home: Path) -> set[str]:
    return set(os.listdir(home / "files" / "blobs"))


def incoming(home: Path) -> list[str]:
    return os.listdir(home / "files" / "incoming")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def in_child(function: Callable[[], object]) -> Callable[[], int]:
    """Run in a forked child; the returned function waits and gives its exit code, minus the signal if killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestPutAndGet:
    def test_a_file_comes_back_as_it_was(self, store: FileStore, tmp_path: Path) -> None:
        data = os.urandom(3 * blobs.CHUNK_BYTES + 5)
        (tmp_path / "in.bin").write_bytes(data)
        store.put(tmp_path / "in.bin")
        store.get("in.bin", tmp_path / "out.bin")
        assert (tmp_path / "out.bin").read_bytes() == data
        assert store.list() == ["in.bin"]

    def test_a_name_may_be_given(self, store: FileStore, tmp_path: Path) -> None:
        (tmp_path / "in").write_text("x")
        store.put(str(tmp_path / "in"), "some/other name")
        assert store.list() == ["some/other name"]

    def test_put_replaces_and_frees_what_was_there(self, store: FileStore, tmp_path: Path) -> None:
        store.putf(b"old", "n")
        store.putf(b"new", "n")
        assert content(store, "n") == b"new"
        assert blob_names(tmp_path / "data") == {digest(b"new")}

    def test_put_of_what_cannot_be_read_changes_nothing(self, store: FileStore, tmp_path: Path) -> None:
        store.putf(b"old", "n")
        with pytest.raises(FileNotFoundError):
            store.put(tmp_path / "missing", "n")
        with pytest.raises(IsADirectoryError):
            store.put(tmp_path, "n")
        with pytest.raises(TypeError, match="not bytes"):
            store.put(b"path", "n")  # type: ignore[arg-type]
        assert content(store, "n") == b"old"

    @FEW
    @given(st.binary(max_size=100) | st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def test_str_and_bytes_are_contents(self, store: FileStore, small_chunks: None, data: str | bytes) -> None:
        expected = data.encode() if isinstance(data, str) else data
        store.putf(data, "n")
        assert content(store, "n") == expected
        stream = io.StringIO(data, newline="") if isinstance(data, str) else io.BytesIO(data)
        store.putf(stream, "m")
        assert content(store, "m") == expected
        info = store.info("m")
        assert (info.size_bytes, info.sha256) == (len(expected), digest(expected))
        assert store.get_md5("m") == info.md5 == hashlib.md5(expected).hexdigest()

    @FEW
    @given(st.lists(st.binary(min_size=1, max_size=50) | st.text("aä€😀", min_size=1, max_size=20), max_size=8))
    def test_a_source_may_give_less_or_more_than_asked(
        self, store: FileStore, small_chunks: None, parts: list[str | bytes]
    ) -> None:
        class Source:
            def __init__(self) -> None:
                self.left = list(parts)

            def read(self, size: int, /) -> bytes | str:
                return self.left.pop(0) if self.left else b""

        store.putf(Source(), "n")
        expected = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
        assert content(store, "n") == expected

    def test_putf_starts_at_the_position_and_closes(self, store: FileStore) -> None:
        source = io.BytesIO(b"0123456789")
        source.seek(4)
        store.putf(source, "n")
        assert content(store, "n") == b"456789"
        assert source.closed

    @pytest.mark.parametrize("bad", [None, 5, Path("x"), ["a"]])
    def test_putf_refuses_what_is_no_file(self, store: FileStore, bad: Any) -> None:
        with pytest.raises(TypeError, match=f"not {type(bad).__name__}"):
            store.putf(bad, "n")
        assert not store.exists("n")

    @pytest.mark.parametrize("given_back", [None, 7])
    def test_a_source_that_gives_no_bytes_stores_nothing(self, store: FileStore, given_back: Any) -> None:
        source = types.SimpleNamespace(read=lambda size: given_back)
        with pytest.raises(TypeError, match=r"read\(\)"):
            store.putf(source, "n")
        assert store.list() == []

    def test_a_source_that_fails_half_way_stores_nothing(self, store: FileStore, tmp_path: Path) -> None:
        class Source(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell() > 2 * blobs.CHUNK_BYTES:
                    raise OSError(errno.EIO, "gone")
                return super().read(size)

        store.putf("old", "n")
        source = Source(bytes(4 * blobs.CHUNK_BYTES))
        with pytest.raises(OSError, match="gone"):
            store.putf(source, "n")
        assert content(store, "n") == b"old"
        assert incoming(tmp_path / "data") == []
        assert source.closed

    def test_info_says_when(self, store: FileStore) -> None:
        before = datetime.now(UTC)
        store.putf("x", "n")
        assert timedelta() <= store.info("n").modified - before + timedelta(milliseconds=1) < timedelta(minutes=1)

    def test_what_is_missing_is_told(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("x", "n")
        for ask in (store.getf, store.get_md5, store.info, lambda name: store.get(name, tmp_path / "out")):
            with pytest.raises(StoredFileNotFound, match="'nöne'") as caught:
                ask("nöne")
            assert caught.value.name == "nöne"
        assert not (tmp_path / "out").exists()

    def test_delete_tells_whether_there_was_one(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("x", "a")
        store.putf("x", "b")
        assert store.delete("a") is True
        assert store.delete("a") is False
        assert content(store, "b") == b"x"
        assert store.delete("b") is True
        assert blob_names(tmp_path / "data") == set()

    def test_list_by_prefix(self, store: FileStore) -> None:
        for name in ("b", "a%1", "a%2", "ab", "a_", "ä", "\U0001f600x"):
            store.putf("", name)
        assert store.list() == ["a%1", "a%2", "a_", "ab", "b", "ä", "\U0001f600x"]
        assert store.list("a%") == ["a%1", "a%2"]
        assert store.list(prefix="a_") == ["a_"]
        assert store.list("\U0001f600") == ["\U0001f600x"]
        assert store.list("zz") == []
        with pytest.raises(TypeError, match="prefix must be a str"):
            store.list(5)  # type: ignore[arg-type]

    def test_reads_create_nothing(self, tmp_path: Path) -> None:
        store = FileStore(str(tmp_path / "no" / "where"))
        assert store.list() == []
        assert store.exists("x") is False
        assert store.delete("x") is False
        for ask in (store.getf, store.get, store.info, store.get_md5):
            with pytest.raises(StoredFileNotFound):
                ask("x")
        store.sweep()
        store.close()
        assert not (tmp_path / "no").exists()

    def test_only_the_owner_can_read_what_is_on_disk(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("x", "n")
        for folder, _, files in os.walk(tmp_path / "data"):
            for path in [folder, *(os.path.join(folder, name) for name in files)]:
                assert os.stat(path).st_mode & 0o077 == 0, path

    def test_close_is_idempotent_and_not_the_end(self, store: FileStore) -> None:
        store.putf("x", "n")
        with store.getf("n") as file:
            store.close()
            store.close()
            assert file.read() == b"x"
        assert content(store, "n") == b"x"


class TestNames:
    def test_no_name_is_a_path(self, store: FileStore, tmp_path: Path) -> None:
        for name in HOSTILE_NAMES:
            store.putf(name, name)
        assert store.list() == sorted(HOSTILE_NAMES)
        for name in HOSTILE_NAMES:
            assert content(store, name) == name.encode()
        found = {
            os.path.relpath(os.path.join(folder, name), tmp_path) for folder, _, ns in os.walk(tmp_path) for name in ns
        }
        expected = {f"data/files/blobs/{digest(name.encode())}" for name in HOSTILE_NAMES}
        assert {path for path in found if not path.startswith("home")} == expected | {"data/files/names.sqlite3"}

    @FEW
    @given(NAMES)
    @example("../x")
    def test_any_unicode_name_works(self, store: FileStore, name: str) -> None:
        store.putf("x", name)
        assert name in store.list(name[:3])
        assert store.exists(name)
        assert store.delete(name)
        assert not store.exists(name)

    @pytest.mark.parametrize("name", ["", "x" * 1025, "x" * 4096, "nul\0byte", "\0", "lone\udcff"])
    def test_bad_names_are_refused_everywhere(self, store: FileStore, tmp_path: Path, name: str) -> None:
        (tmp_path / "f").write_text("x")
        for ask in self.verbs(store, tmp_path):
            with pytest.raises(ValueError, match="the name of a stored file must"):
                ask(name)
        assert not (tmp_path / "data").exists()

    @pytest.mark.parametrize("name", [None, 5, b"x", Path("x")])
    def test_names_of_other_types_are_refused(self, store: FileStore, tmp_path: Path, name: Any) -> None:
        (tmp_path / "f").write_text("x")
        for ask in self.verbs(store, tmp_path)[name is None :]:
            with pytest.raises(TypeError, match=f"must be a str, not {type(name).__name__}"):
                ask(name)

    def verbs(self, store: FileStore, tmp_path: Path) -> list[Callable[[Any], object]]:
        return [
            lambda name: store.put(tmp_path / "f", name),
            lambda name: store.putf("x", name),
            lambda name: store.get(name, tmp_path / "out"),
            store.getf,
            store.exists,
            store.delete,
            store.get_md5,
            store.info,
        ]


class TestGet:
    def test_default_is_the_last_part_of_the_name_here(
        self, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        store.putf("x", "../../up/file.txt")
        store.get("../../up/file.txt")
        assert (tmp_path / "here" / "file.txt").read_text() == "x"

    @pytest.mark.parametrize("name", ["..", ".", "a/", "/", "a/.."])
    def test_a_name_without_last_part_needs_a_path(self, store: FileStore, name: str) -> None:
        store.putf("x", name)
        with pytest.raises(ValueError, match="give save_path"):
            store.get(name)

    def test_an_existing_file_keeps_its_mode_and_a_link_stays(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("new", "n")
        target, link = tmp_path / "target", tmp_path / "link"
        target.write_text("old")
        target.chmod(0o640)
        link.symlink_to(target)
        store.get("n", link)
        assert link.is_symlink()
        assert target.read_text() == "new"
        assert target.stat().st_mode & 0o777 == 0o640

    def test_a_new_file_has_the_usual_mode(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("x", "n")
        store.get("n", tmp_path / "out")
        (tmp_path / "usual").touch()
        assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_pipe_is_written_to(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("through", "n")
        os.mkfifo(tmp_path / "pipe")
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
        reader.start()
        store.get("n", tmp_path / "pipe")
        reader.join()
        assert got == [b"through"]

    def test_where_it_cannot_be_written_is_named(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("x", "n")
        with pytest.raises(FileNotFoundError) as caught:
            store.get("n", tmp_path / "no" / "out")
        assert caught.value.filename == str(tmp_path / "no" / "out")
        with pytest.raises(IsADirectoryError):
            store.get("n", tmp_path)

    def test_a_range_can_be_copied(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("0123456789", "n")
        store.get("n", tmp_path / "out", 3, 6)
        assert (tmp_path / "out").read_text() == "345"


class TestOpenFile:
    DATA = b"one\ntwo\n\nthree, a longer line that spans pieces of sixteen bytes\nlast without newline"

    @FEW
    @given(
        st.integers(0, 100),
        st.none() | st.integers(0, 100),
        st.lists(
            st.tuples(st.sampled_from(["read", "readline", "read1"]), st.integers(-1, 40))
            | st.tuples(st.just("seek"), st.integers(0, 120))
            | st.tuples(st.sampled_from(["readlines", "tell", "__next__"]))
        ),
    )
    def test_it_behaves_as_any_binary_file(
        self, store: FileStore, small_chunks: None, start: int, end: int | None, steps: list[Any]
    ) -> None:
        if not store.exists("n"):
            store.putf(self.DATA, "n")
        if end is not None:
            start, end = sorted((start, end))
        expected = io.BufferedReader(io.BytesIO(self.DATA[start:end]))  # type: ignore[arg-type]
        with store.getf("n", start, end) as file:
            for verb, *arguments in steps:
                if verb == "read1":
                    # How much one read gives is the file's own choice; what it gives is not.
                    got = file.read1(*arguments)
                    assert expected.read(len(got)) == got
                    continue
                answers = []
                for one in (file, expected):
                    try:
                        answers.append(getattr(one, verb)(*arguments))
                    except StopIteration:
                        answers.append(StopIteration)
                assert answers[0] == answers[1], verb

    def test_attributes(self, store: FileStore) -> None:
        store.putf(self.DATA, "n")
        with store.getf("n", 4, 8) as file:
            assert file.filesize == len(self.DATA)
            assert file.md5 == hashlib.md5(self.DATA).hexdigest()
            assert file.name == "n"
            assert file.readable()
            assert file.seekable()
            assert not file.writable()
            assert list(file) == [b"two\n"]
        assert file.closed
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.read()

    def test_seeking(self, store: FileStore) -> None:
        store.putf(self.DATA, "n")
        with store.getf("n", 4, 12) as file:
            assert file.seek(-3, os.SEEK_END) == 5
            assert file.tell() == 5
            assert file.read() == self.DATA[9:12]
            assert file.seek(100) == 100
            assert file.read() == b""
            assert file.seek(0) == 0
            assert file.seek(2, os.SEEK_CUR) == 2
            with pytest.raises(ValueError, match="-1"):
                file.seek(-1)
            with pytest.raises(ValueError, match="whence"):
                file.raw.seek(0, 9)

    def test_text_can_be_read_through_the_standard_wrapper(self, store: FileStore) -> None:
        store.putf("grüße\nzwei", "n")
        with io.TextIOWrapper(store.getf("n"), encoding="utf-8") as text:
            assert list(text) == ["grüße\n", "zwei"]

    @pytest.mark.parametrize(("start", "end"), [(-1, None), (0, -1), (5, 4)])
    def test_impossible_ranges_are_refused(self, store: FileStore, start: int, end: int | None) -> None:
        store.putf("0123456789", "n")
        with pytest.raises(ValueError, match="byte range"):
            store.getf("n", start, end)

    @pytest.mark.parametrize(("start", "end"), [("1", None), (0, 2.5)])
    def test_ranges_of_other_types_are_refused(self, store: FileStore, start: Any, end: Any) -> None:
        store.putf("0123456789", "n")
        with pytest.raises(TypeError):
            store.getf("n", start, end)

    def test_ranges_beyond_the_end_are_cut_as_slices_are(self, store: FileStore) -> None:
        store.putf("0123456789", "n")
        for start, end in [(8, 100), (10, None), (50, 60), (3, 3)]:
            with store.getf("n", start, end) as file:
                assert file.read() == b"0123456789"[start:end]

    def test_who_has_it_open_reads_on_after_replace_and_delete(self, store: FileStore) -> None:
        data = os.urandom(3 * blobs.CHUNK_BYTES)
        store.putf(data, "n")
        with store.getf("n") as file:
            assert file.read(10) == data[:10]
            store.putf("other", "n")
            store.delete("n")
            assert file.read() == data[10:]


class TestDamage:
    DATA = bytes(range(100))

    @pytest.fixture
    def blob(self, store: FileStore, small_chunks: None, tmp_path: Path) -> Path:
        store.putf(self.DATA, "n")
        return tmp_path / "data" / "files" / "blobs" / digest(self.DATA)

    @FEW
    @given(st.integers(0, 99), st.integers(0, 7), st.integers(0, 99), st.integers(0, 99))
    def test_a_flipped_bit_is_never_returned(
        self, store: FileStore, blob: Path, position: int, bit: int, start: int, end: int
    ) -> None:
        start, end = sorted((start, end))
        damaged = bytearray(self.DATA)
        damaged[position] ^= 1 << bit
        blob.write_bytes(damaged)
        piece = position // 16
        touched = start < end and start // 16 <= piece <= (end - 1) // 16
        with store.getf("n", start, end) as file:
            if touched:
                with pytest.raises(StoredFileCorrupt, match="'n' does not match its checksum") as caught:
                    file.read()
                assert caught.value.name == "n"
            else:
                assert file.read() == self.DATA[start:end]

    def test_get_keeps_what_it_would_have_replaced(self, store: FileStore, blob: Path, tmp_path: Path) -> None:
        blob.write_bytes(self.DATA[:-1] + b"x")
        (tmp_path / "out").write_text("old")
        with pytest.raises(StoredFileCorrupt):
            store.get("n", tmp_path / "out")
        assert (tmp_path / "out").read_text() == "old"
        assert not [name for name in os.listdir(tmp_path) if "part" in name]

    @pytest.mark.parametrize("damaged", [b"", DATA[:-1], DATA + b"x"])
    def test_another_length_is_found_at_once(self, store: FileStore, blob: Path, damaged: bytes) -> None:
        blob.write_bytes(damaged)
        with pytest.raises(StoredFileCorrupt, match="put it again"):
            store.getf("n")

    def test_missing_contents_are_no_missing_file(self, store: FileStore, blob: Path) -> None:
        blob.unlink()
        with pytest.raises(StoredFileCorrupt, match="missing"):
            store.getf("n")

    def test_cut_while_open(self, store: FileStore, blob: Path) -> None:
        with store.getf("n") as file:
            os.truncate(blob, 50)
            with pytest.raises(StoredFileCorrupt):
                file.read()

    def test_putting_again_heals(self, store: FileStore, blob: Path) -> None:
        blob.write_bytes(self.DATA[::-1])
        store.putf(self.DATA, "other")
        assert content(store, "n") == self.DATA


class TestManyAtOnce:
    def test_readers_see_whole_files_only(self, tmp_path: Path) -> None:
        home = str(tmp_path / "data")
        versions = [bytes([65 + i]) * (50_000 + i) for i in range(4)]
        store = FileStore(home)
        store.putf(versions[0], "n")

        def write() -> None:
            own = FileStore(home)
            for i in range(60):
                own.putf(versions[i % 4], "n")

        waits = [in_child(write), in_child(write)]
        try:
            for _ in range(150):
                assert content(store, "n") in versions
        finally:
            assert [wait() for wait in waits] == [0, 0]
            store.close()
        assert len(blob_names(tmp_path / "data")) == 1

    def test_the_same_contents_put_and_deleted_by_several_processes(self, tmp_path: Path) -> None:
        home = str(tmp_path / "data")
        shared = [b"first", b"second"]

        def churn(number: int) -> None:
            own = FileStore(home)
            for i in range(40):
                name = f"{number}"
                own.putf(shared[i % 2], name)
                with own.getf(name) as file:
                    assert file.read() == shared[i % 2]
                if i % 3 == 0:
                    assert own.delete(name)
            own.putf(shared[number % 2], f"kept {number}")
            own.delete(f"{number}")

        waits = [in_child(lambda number=number: churn(number)) for number in range(4)]
        assert [wait() for wait in waits] == [0] * 4
        store = FileStore(home)
        assert store.list() == [f"kept {number}" for number in range(4)]
        for number in range(4):
            assert content(store, f"kept {number}") == shared[number % 2]
        store.delete("kept 0")
        store.delete("kept 2")
        store.close()
        assert blob_names(tmp_path / "data") == {digest(b"second")}
        assert incoming(tmp_path / "data") == []

    def test_threads_share_a_store(self, store: FileStore) -> None:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for i in range(15):
                    store.putf(f"{number} {i}", f"{number}")
                    assert content(store, f"{number}") == f"{number} {i}".encode()
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.list() == ["0", "1", "2", "3"]

    def test_a_forked_child_may_use_the_store_of_its_parent(self, store: FileStore) -> None:
        store.putf("parent", "n")

        def child() -> None:
            assert content(store, "n") == b"parent"
            store.putf("child", "m")
            store.close()

        assert in_child(child)() == 0
        assert content(store, "m") == b"child"
        store.putf("again", "n")
        assert content(store, "n") == b"again"

    def test_a_child_forked_while_threads_write(self, store: FileStore) -> None:
        # A child forked inside a transaction would inherit locks that nobody releases.
        stop = threading.Event()

        def work(number: int) -> None:
            i = 0
            while not stop.is_set():
                store.putf(f"{i}", f"{number}")
                i += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            for i in range(8):
                assert in_child(lambda i=i: store.putf(f"child {i}", "child"))() == 0
                assert content(store, "child") == f"child {i}".encode()
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def test_a_store_removed_under_a_running_program(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("old", "n")
        shutil.rmtree(tmp_path / "data")
        assert store.list() == []
        store.putf("new", "m")
        assert store.list() == ["m"]
        assert content(store, "m") == b"new"


class TestDurability:
    def test_contents_and_their_name_on_disk_come_before_the_entry(
        self, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.putf("old", "n")
        observer = FileStore(str(tmp_path / "data"))
        done: list[str] = []
        fsync, replace = os.fsync, os.replace

        def spied_fsync(descriptor: int) -> None:
            done.append(f"fsync {os.path.splitext(os.readlink(f'/proc/self/fd/{descriptor}'))[-1] or 'folder'}")
            assert content(observer, "n") == b"old"
            fsync(descriptor)

        def spied_replace(source: str, target: str) -> None:
            done.append("replace")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", spied_fsync)
        monkeypatch.setattr(os, "replace", spied_replace)
        store.putf("new", "n")
        assert done == ["fsync .part", "replace", "fsync folder"]
        assert content(observer, "n") == b"new"
        observer.close()

    def test_commits_are_on_disk(self, tmp_path: Path) -> None:
        # EXTRA: the folder too, or power loss could undo the commit after which a blob was removed.
        database = Database(str(tmp_path / "x"), [()])
        with database.writing() as db:
            assert db.execute("PRAGMA synchronous").fetchone() == (3,)
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        database.close()


#: Calls into the operating system and SQLite: the moments between which a crash or a full disk makes a difference.
STEPS = {"open", "write", "flush", "fsync", "replace", "unlink", "close", "flock", "mkdir", "execute", "executemany"}


def at_step(number: int, action: Callable[[], None]) -> Callable[[types.FrameType, str, Any], None]:
    """A profile function that acts just before the given step that code of `cloud.resources` takes."""
    seen = 0

    def watch(frame: types.FrameType, event: str, what: Any) -> None:
        nonlocal seen
        if event == "c_call" and what.__name__ in STEPS and "resources" in frame.f_code.co_filename:
            seen += 1
            if seen == number:
                action()

    return watch


class TestCrash:
    @pytest.mark.parametrize("verb", ["first", "replace", "same", "delete"])
    def test_killed_at_every_step(self, tmp_path: Path, verb: str) -> None:
        old, new = b"old" * 10, b"new" * 20
        number, code = 0, -signal.SIGKILL
        while code == -signal.SIGKILL:
            number += 1
            home = tmp_path / str(number)
            before = FileStore(str(home))
            before.putf(b"beside", "beside")
            if verb != "first":
                before.putf(old, "n")
            before.close()

            def child(home: Path = home, number: int = number) -> None:
                store = FileStore(str(home))
                sys.setprofile(at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL)))
                if verb == "delete":
                    store.delete("n")
                else:
                    store.putf(b"beside" if verb == "same" else new, "n")
                sys.setprofile(None)

            code = in_child(child)()
            after = FileStore(str(home))
            left = {name: content(after, name) for name in after.list()}
            started = {} if verb == "first" else {"n": old}
            ended = {"first": {"n": new}, "replace": {"n": new}, "same": {"n": b"beside"}, "delete": {}}[verb]
            assert left in ({"beside": b"beside"} | started, {"beside": b"beside"} | ended), number
            after.putf(b"one more", "sweeps")
            assert incoming(home) == [], number
            expected = {digest(data) for data in left.values()} | {digest(b"one more")}
            assert blob_names(home) == expected, number
            after.close()
        assert code == 0
        assert number > 10
        assert left == {"beside": b"beside"} | ended

    @pytest.mark.parametrize("verb", ["put", "delete"])
    def test_an_error_at_every_step(self, tmp_path: Path, verb: str) -> None:
        def fail() -> None:
            raise OSError(errno.ENOSPC, "no space, said the test")

        steps = STEPS - {"close", "unlink"}  # would leak what they fail to free
        number = failures = 0
        failed = True
        while failed:
            number += 1
            failed = False
            store = FileStore(str(tmp_path / str(number)))
            store.putf("old", "n")
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(globals(), "STEPS", steps)
                sys.setprofile(at_step(number, fail))
                try:
                    store.putf("new", "n") if verb == "put" else store.delete("n")
                except OSError as exc:
                    assert "said the test" in str(exc)
                    failed = True
                    failures += 1
                finally:
                    # Python takes a profile function out that raised: a step found means it did.
                    reached = sys.getprofile() is None
                    sys.setprofile(None)
            left = {name: content(store, name) for name in store.list()}
            if failed:
                assert left == {"n": b"old"}, number
            else:
                assert left == ({"n": b"new"} if verb == "put" else {}), number
            store.sweep()
            assert incoming(tmp_path / str(number)) == [], number
            assert blob_names(tmp_path / str(number)) == {digest(data) for data in left.values()}, number
            store.close()
            failed = reached
        assert failures > 3

    def test_killed_in_the_middle_of_a_put(self, store: FileStore, tmp_path: Path) -> None:
        store.putf("old", "n")
        inside, told = os.pipe()

        def child() -> None:
            class Endless:
                n_read = 0

                def read(self, size: int, /) -> bytes:
                    self.n_read += 1
                    if self.n_read == 3:
                        os.write(told, b"x")
                        signal.pause()
                    return bytes(size)

            store.putf(Endless(), "n")

        pid_before = set(_children())
        wait = in_child(child)
        (pid,) = set(_children()) - pid_before
        os.read(inside, 1)
        os.close(inside)
        os.close(told)
        home = tmp_path / "data"
        assert content(store, "n") == b"old"
        assert len(incoming(home)) == 1
        store.sweep()
        assert len(incoming(home)) == 1, "swept under a living writer"
        os.kill(pid, signal.SIGKILL)
        assert wait() == -signal.SIGKILL
        other = FileStore(str(home))
        other.putf("x", "m")
        other.close()
        assert incoming(home) == []
        assert store.list() == ["m", "n"]
        assert content(store, "n") == b"old"

    def test_a_sweep_between_making_a_file_and_locking_it(
        self, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = blobs._lock
        swept: list[int] = []

        def late_lock(descriptor: int) -> bool:
            if not swept:
                swept.append(descriptor)
                store.sweep()
            return lock(descriptor)

        monkeypatch.setattr(blobs, "_lock", late_lock)
        store.putf("x", "n")
        assert swept
        assert content(store, "n") == b"x"

    def test_a_full_disk_keeps_the_old_contents(self, tmp_path: Path) -> None:
        mount = tmp_path / "small"
        mount.mkdir()
        script = f"""
import errno, os, sys
sys.path.insert(0, {str(Path(cloud.__path__[0]).parent)!r})
from cloud.resources.files import FileStore
store = FileStore({str(mount)!r})
store.putf(b"old" * 1000, "n")
try:
    store.putf(os.urandom(8 << 20), "n")
    sys.exit("stored more than fits")
except OSError as exc:
    assert exc.errno == errno.ENOSPC, exc
assert store.getf("n").read() == b"old" * 1000
assert os.listdir({str(mount / "files" / "incoming")!r}) == []
# Now so full that SQLite too finds no room, then healed by itself.
with open({str(mount / "filler")!r}, "wb", buffering=0) as filler:
    size = 1 << 20
    while size:
        try:
            filler.write(bytes(size))
        except OSError:
            size //= 2
for contents in (b"", b"x"):
    try:
        store.putf(contents, "n")
        sys.exit("stored without space")
    except OSError as exc:
        assert exc.errno == errno.ENOSPC, exc
    assert store.getf("n").read() == b"old" * 1000
os.unlink({str(mount / "filler")!r})
store.putf("new", "n")
assert store.getf("n").read() == b"new"
assert len(os.listdir({str(mount / "files" / "blobs")!r})) == 1
print("passed")
"""
        (tmp_path / "script.py").write_text(script)
        namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        mounting = f"mount -t tmpfs -o size=4m none '{mount}'"
        try:
            possible = subprocess.run([*namespace, mounting], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            possible = False
        if not possible:
            pytest.skip("a file system of 4 MB needs user namespaces")
        done = subprocess.run(
            [*namespace, f"{mounting} && '{sys.executable}' '{tmp_path / 'script.py'}'"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stdout, done.stderr, done.returncode) == ("passed\n", "", 0)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_memory_does_not_grow_with_the_file(store: FileStore, tmp_path: Path) -> None:
    size = 96 << 20
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        store.put(tmp_path / "sparse")
        with open(tmp_path / "sparse", encoding="latin-1") as text:
            text.seek(size - (12 << 20))
            store.putf(text, "text")
        store.get("sparse", tmp_path / "out")
        with store.getf("sparse", 5, size - 5) as part:
            for _ in iter(lambda: part.read(100_000), b""):
                pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size == size
    assert store.info("text").size_bytes == 12 << 20
    assert peak < 16 << 20


class TestDatabase:
    V1 = [("CREATE TABLE a (x INTEGER)", "INSERT INTO a VALUES (1)")]
    V2 = [*V1, ("ALTER TABLE a ADD COLUMN y INTEGER DEFAULT 7",)]

    def rows(self, database: Database, statement: str) -> list[Any]:
        with database.reading() as db:
            return db.execute(statement).fetchall()

    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        return str(tmp_path / "a b?%#" / "x.sqlite3")

    def test_what_does_not_exist_reads_as_fresh(self, path: str) -> None:
        database = Database(path, self.V2)
        assert self.rows(database, "SELECT * FROM a") == [(1, 7)]
        database.close()
        assert not os.path.exists(os.path.dirname(path))

    def test_an_older_file_is_upgraded_by_reading_and_writing(self, path: str) -> None:
        for use in ("reading", "writing"):
            old = Database(path + use, self.V1)
            with old.writing() as db:
                db.execute("INSERT INTO a VALUES (2)")
            old.close()
            new = Database(path + use, self.V2)
            with getattr(new, use)() as db:
                assert db.execute("SELECT * FROM a").fetchall() == [(1, 7), (2, 7)]
            new.close()

    def test_a_newer_file_is_refused_even_when_open_already(self, path: str) -> None:
        old, new = Database(path, self.V1), Database(path, self.V2)
        with old.writing():
            pass
        with new.writing():
            pass
        for use in (old, Database(path, self.V1)):
            for block in (use.reading, use.writing, use.alone):
                with pytest.raises(BackendError, match=r"schema version 2.*knows 1.*\n.*Upgrade"), block():
                    pass
            use.close()
        new.close()

    def test_a_damaged_file_is_told(self, path: str) -> None:
        os.makedirs(os.path.dirname(path))
        Path(path).write_bytes(b"this is no database, however long you look at it" * 100)
        database = Database(path, self.V1)
        for block in (database.reading, database.writing):
            with pytest.raises(BackendError, match=r"x\.sqlite3 is damaged") as caught, block():
                pass
            assert caught.value.hint is not None

    def test_damage_met_in_the_middle_is_told(self, path: str) -> None:
        database = Database(path, self.V1)
        with database.writing() as db:
            db.executemany("INSERT INTO a VALUES (?)", [(i,) for i in range(20_000)])
        database.close()
        with open(path, "r+b") as file:
            file.seek(8192)
            file.write(b"\xff" * 8192)
        with pytest.raises(BackendError, match="damaged"):
            self.rows(database, "SELECT count(x), sum(x) FROM a")
        database.close()

    def test_a_block_that_raises_is_undone(self, path: str) -> None:
        database = Database(path, self.V1)
        with pytest.raises(KeyError), database.writing() as db:
            db.execute("INSERT INTO a VALUES (2)")
            raise KeyError
        assert self.rows(database, "SELECT x FROM a") == [(1,)]
        database.close()

    def test_a_lock_that_is_not_given_up_is_told(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        database = Database(path, self.V1)
        with database.writing():
            pass
        database.close()
        monkeypatch.setattr("cloud.resources.LOCK_WAIT_S", 0.05)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BackendError, match="locked by other processes") as caught, database.reading():
            pass
        assert caught.value.retry
        other.close()

    def test_an_empty_file_reads_as_fresh_and_can_be_written(self, path: str) -> None:
        os.makedirs(os.path.dirname(path))
        Path(path).touch()
        database = Database(path, self.V1)
        assert self.rows(database, "SELECT x FROM a") == [(1,)]
        with database.writing() as db:
            db.execute("INSERT INTO a VALUES (2)")
        assert self.rows(database, "SELECT x FROM a") == [(1,), (2,)]
        database.close()

    def test_many_processes_may_create_it(self, path: str) -> None:
        def create(number: int) -> None:
            with Database(path, self.V2).writing() as db:
                db.execute("INSERT INTO a VALUES (?, ?)", (number, 0))

        waits = [in_child(lambda number=number: create(number)) for number in range(6)]
        assert [wait() for wait in waits] == [0] * 6
        database = Database(path, self.V2)
        assert sorted(self.rows(database, "SELECT x FROM a")) == [(0,), (1,), (1,), (2,), (3,), (4,), (5,)]
        database.close()
        assert os.listdir(os.path.dirname(path)) == ["x.sqlite3"]

    def test_threads_read_side_by_side(self, path: str) -> None:
        database = Database(path, self.V1)
        with database.writing():
            pass
        barrier = threading.Barrier(3, timeout=10)

        def read() -> None:
            with database.reading():
                barrier.wait()

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not barrier.broken
        database.close()


class StoreMachine(RuleBasedStateMachine):
    """Random programs, held against a plain dict; what is on disk is exactly what is named."""

    names = st.sampled_from(["a", "b", "../c"])
    contents = st.sampled_from([b"", b"one", b"two", b"three" * 10])

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(os.environ["TMPDIR"]) / os.urandom(6).hex()
        self.store = FileStore(str(self.home))
        self.model: dict[str, bytes] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.home, ignore_errors=True)

    @rule(name=names, data=contents)
    def put(self, name: str, data: bytes) -> None:
        self.store.putf(data, name)
        self.model[name] = data

    @rule(name=names)
    def delete(self, name: str) -> None:
        assert self.store.delete(name) == (self.model.pop(name, None) is not None)

    @rule(name=names)
    def get(self, name: str) -> None:
        assert self.store.exists(name) == (name in self.model)
        if name in self.model:
            assert content(self.store, name) == self.model[name]

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = FileStore(str(self.home))

    @invariant()
    def named_and_stored_are_the_same(self) -> None:
        assert self.store.list() == sorted(self.model)
        if self.home.exists():
            assert blob_names(self.home) == {digest(data) for data in self.model.values()}


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=15, stateful_step_count=20)


class TestFace:
    @pytest.fixture
    def face(self, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
        current = types.ModuleType("cloud.current")
        current.resources = lambda: types.SimpleNamespace(files=store)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cloud.current", current)
        monkeypatch.setattr(cloud, "current", current, raising=False)
        # Under another name, so that the real module stays untouched by this one.
        spec = importlib.util.spec_from_file_location("files_face", Path(cloud.__path__[0]) / "files.py")
        assert spec is not None
        assert spec.loader is not None
        face = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(face)
        return face

    def test_a_round_trip(self, face: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "names.txt").write_text("ada\ngrace\n")
        assert face.put("names.txt") is None
        assert face.putf(io.StringIO("text"), "t") is None
        assert face.putf("contents", name="c") is None
        assert face.list() == ["c", "names.txt", "t"]
        assert face.list("n") == ["names.txt"]
        (tmp_path / "names.txt").unlink()
        assert face.get("names.txt") is None
        assert (tmp_path / "names.txt").read_text() == "ada\ngrace\n"
        face.get("names.txt", "copy", start_byte=4, end_byte=9)
        assert (tmp_path / "copy").read_text() == "grace"
        with face.getf("names.txt", start_byte=4) as file:
            assert file.readlines() == [b"grace\n"]
        assert face.get_md5("t") == hashlib.md5(b"text").hexdigest()
        assert face.exists("t") is True
        assert face.delete("t") is True
        assert face.exists("t") is False
        assert face.delete("t") is False

    def test_every_exported_name_exists_and_is_documented(self, face: Any) -> None:
        assert face.__all__ == sorted(face.__all__)
        assert all(getattr(face, name).__doc__ for name in face.__all__)
