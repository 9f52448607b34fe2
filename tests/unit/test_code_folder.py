"""The server's folder of module sets: whole or not at all, and nothing outside it is touched."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.errors import BackendError, CloudException
from cloud.resources import code as code_module
from cloud.resources.code import CodeFolder
from cloud.serialization.manifest import (
    MAX_FILES,
    MAX_TOTAL_BYTES,
    CodeRefused,
    FileEntry,
    check_manifest,
    digest_of,
)

Content = dict[str, bytes]


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest(content: Content) -> list[FileEntry]:
    return [FileEntry(path, sha(data), len(data)) for path, data in content.items()]


def send(folder: CodeFolder, content: Content) -> str:
    by_hash = {sha(data): data for data in content.values()}
    for each in folder.missing(manifest(content)):
        folder.store(each, by_hash[each])
    return folder.publish(manifest(content))


def tree(root: Path) -> dict[str, object]:
    """Everything below a folder: path -> mode and contents."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(root))] = (
            info.st_mode,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the folder will be; beside it are things that must stay as they are."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "accounts.sqlite3").write_text("precious")
    (tmp_path / "outside").mkdir()
    return tmp_path / "data" / "code"


@pytest.fixture
def folder(place: Path) -> CodeFolder:
    return CodeFolder(str(place))


PACKAGE: Content = {"pkg/__init__.py": b"from pkg.sub.mod import x", "pkg/sub/mod.py": b"x = 7", "helper.py": b""}


def test_a_set_is_served_by_one_folder_on_the_path(folder: CodeFolder) -> None:
    digest = send(folder, PACKAGE)
    source = f"import sys; sys.path[:0] = [{folder.folder(digest)!r}]; import pkg, helper; print(pkg.x)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "7\n"


def test_the_digest_is_the_clients_and_computed_here(folder: CodeFolder) -> None:
    digest = send(folder, PACKAGE)
    assert digest == digest_of(reversed(manifest(PACKAGE)))
    assert folder.has(digest)
    assert os.path.basename(folder.folder(digest)) == digest
    assert digest_of(manifest({**PACKAGE, "helper.py": b"x"})) != digest


def test_what_is_missing_is_told_once_and_in_order(folder: CodeFolder) -> None:
    content = {"b.py": b"two", "a.py": b"one", "c.py": b"one"}
    assert folder.missing(manifest(content)) == [sha(b"one"), sha(b"two")]
    folder.store(sha(b"one"), b"one")
    assert folder.missing(manifest(content)) == [sha(b"two")]


def test_of_an_edited_set_only_the_edited_file_is_missing(folder: CodeFolder) -> None:
    before = send(folder, PACKAGE)
    edited = {**PACKAGE, "pkg/sub/mod.py": b"x = 8"}
    assert folder.missing(manifest(edited)) == [sha(b"x = 8")]
    after = send(folder, edited)
    assert after != before
    for digest, text in ((before, "x = 7"), (after, "x = 8")):
        assert Path(folder.folder(digest), "pkg/sub/mod.py").read_text() == text


def test_an_empty_set_needs_no_folder(folder: CodeFolder, place: Path) -> None:
    assert folder.missing([]) == []
    assert folder.publish([]) == ""
    assert folder.has("")
    assert not place.exists()


def test_files_are_read_only_and_others_may_read_them(folder: CodeFolder, place: Path) -> None:
    path = folder.folder(send(folder, PACKAGE))
    modes = {stat.S_IMODE(each.stat().st_mode) for each in Path(path).rglob("*") if each.is_file()}
    assert modes == {0o444}
    assert {stat.S_IMODE(each.stat().st_mode) for each in Path(path).rglob("*") if each.is_dir()} == {0o755}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o755
    assert stat.S_IMODE(place.stat().st_mode) == 0o711
    assert stat.S_IMODE((place / "contents").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_can_import_and_cannot_change(tmp_path: Path) -> None:
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as open_folder:
        Path(open_folder).chmod(0o711)
        Path(open_folder).parent.chmod(0o711)
        folder = CodeFolder(os.path.join(open_folder, "code"))
        path = folder.folder(send(folder, PACKAGE))
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            try:
                read = Path(path, "pkg/sub/mod.py").read_text() == "x = 7"
                closed = not any(os.access(Path(path, each), os.W_OK) for each in (".", "pkg", "helper.py"))
                listed = os.access(os.path.dirname(path), os.R_OK)
                os._exit(0 if read and closed and not listed else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_contents_with_another_hash_are_refused(folder: CodeFolder, place: Path) -> None:
    for digest, content in [(sha(b"a"), b"b"), ("../../outside/x", b"b"), (sha(b"b").upper(), b"b"), ("", b"")]:
        with pytest.raises(CodeRefused):
            folder.store(digest, content)
    too_large = bytes(MAX_TOTAL_BYTES + 1)
    with pytest.raises(CodeRefused, match="50,000,000 bytes, not 50,000,001"):
        folder.store(sha(too_large), too_large)
    assert not place.exists()


def test_a_set_with_missing_contents_is_not_made(folder: CodeFolder, place: Path) -> None:
    folder.store(sha(b""), b"")
    with pytest.raises(BackendError, match="'pkg/__init__.py'") as caught:
        folder.publish(manifest(PACKAGE))
    assert caught.value.retry
    assert not folder.has(digest_of(manifest(PACKAGE)))
    assert sorted(os.listdir(place)) == ["contents"]


def test_damaged_contents_are_asked_for_again(folder: CodeFolder, place: Path) -> None:
    folder.store(sha(b"good"), b"good")
    (place / "contents" / sha(b"good")).write_bytes(b"evil")
    with pytest.raises(BackendError):
        folder.publish(manifest({"a.py": b"good"}))
    assert folder.missing(manifest({"a.py": b"good"})) == [sha(b"good")]
    assert folder.has(send(folder, {"a.py": b"good"}))


def test_a_link_among_the_contents_is_not_followed(folder: CodeFolder, place: Path) -> None:
    folder.store(sha(b"precious"), b"precious")
    (place / "contents" / sha(b"precious")).unlink()
    (place / "contents" / sha(b"precious")).symlink_to(place.parent / "accounts.sqlite3")
    with pytest.raises(BackendError):
        folder.publish(manifest({"a.py": b"precious"}))
    assert (place.parent / "accounts.sqlite3").read_text() == "precious"


def test_a_size_that_is_not_the_contents_is_refused(folder: CodeFolder) -> None:
    folder.store(sha(b"abc"), b"abc")
    for size_bytes in (2, 4):
        with pytest.raises((CodeRefused, BackendError), match=r"a\.py"):
            folder.publish([("a.py", sha(b"abc"), size_bytes)])


def test_a_failing_disk_leaves_nothing(folder: CodeFolder, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in PACKAGE.values():
        folder.store(sha(data), data)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(code_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            folder.publish(manifest(PACKAGE))
    assert sorted(os.listdir(place)) == ["contents"]
    assert folder.has(send(folder, PACKAGE))


def test_a_server_killed_in_the_middle_leaves_no_half_set(place: Path) -> None:
    program = """
import os, signal, sys
from cloud.resources.code import CodeFolder
from tests.unit.test_code_folder import PACKAGE, manifest, sha
folder = CodeFolder(sys.argv[1])
for data in PACKAGE.values():
    folder.store(sha(data), data)
n, sync = 0, os.fsync
def counting(descriptor):
    global n
    n += 1
    if n == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = counting
folder.publish(manifest(PACKAGE))
"""
    digest = digest_of(manifest(PACKAGE))
    killed = []
    for n in range(1, 20, 2):
        done = subprocess.run([sys.executable, "-c", program, str(place), str(n)], timeout=60, check=False)
        folder = CodeFolder(str(place))
        killed.append(done.returncode)
        if folder.has(digest):
            path = Path(folder.folder(digest))
            assert {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()} == set(PACKAGE)
            break
        assert done.returncode < 0
    assert len(killed) > 2
    folder.sweep(time.time() + 60, keep=[digest])
    assert sorted(os.listdir(place)) == sorted([digest, "contents"])


def test_threads_that_send_the_same_set_make_one(folder: CodeFolder, place: Path) -> None:
    barrier = threading.Barrier(6)
    found: list[object] = []

    def run() -> None:
        barrier.wait()
        try:
            found.append(send(folder, PACKAGE))
        except Exception as exc:
            found.append(exc)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [digest_of(manifest(PACKAGE))] * 6
    assert len(os.listdir(place)) == 2


# --- retention --------------------------------------------------------------------------------------------------------


def test_what_nobody_used_is_swept(folder: CodeFolder, place: Path) -> None:
    old, kept, used = (send(folder, {f"{name}.py": name.encode()}) for name in ("old", "kept", "used"))
    long_ago = time.time() - 1000
    for path in [*place.iterdir(), *(place / "contents").iterdir()]:
        os.utime(path, (long_ago, long_ago))
    (place / ".part-of-a-killed-server").mkdir()
    os.utime(place / ".part-of-a-killed-server", (long_ago, long_ago))
    folder.folder(used)
    assert folder.sweep(time.time() - 500, keep=[kept]) == [old]
    assert sorted(os.listdir(place)) == sorted([kept, used, "contents"])
    assert os.listdir(place / "contents") == []
    assert not folder.has(old)
    with pytest.raises(CodeRefused, match=old):
        folder.folder(old)
    # Contents are a cache: a set can be sent again.
    assert send(folder, {"old.py": b"old"}) == old


def test_contents_that_were_found_present_stay_for_the_publication(folder: CodeFolder, place: Path) -> None:
    folder.store(sha(b"x"), b"x")
    os.utime(place / "contents" / sha(b"x"), (0, 0))
    assert folder.missing(manifest({"a.py": b"x"})) == []
    folder.sweep(time.time() - 500)
    assert folder.has(folder.publish(manifest({"a.py": b"x"})))


def test_sweeping_beside_publishing_breaks_nothing(folder: CodeFolder) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def sweep() -> None:
        while not stop.is_set():
            try:
                folder.sweep(time.time() + 1)
            except BaseException as exc:
                errors.append(exc)

    thread = threading.Thread(target=sweep)
    thread.start()
    published = 0
    try:
        for n in range(60):
            try:
                digest = send(folder, {"a.py": str(n).encode(), "pkg/b.py": b"b"})
                published += 1
                assert digest == digest_of(manifest({"a.py": str(n).encode(), "pkg/b.py": b"b"}))
            except BackendError as exc:
                assert exc.retry
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert folder.has(send(folder, PACKAGE))


# --- attackers --------------------------------------------------------------------------------------------------------

EVIL_PATHS = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../x.py",
    "pkg/../../x.py",
    "pkg/./x.py",
    "pkg//x.py",
    "pkg/",
    "a\\..\\x.py",
    "a\0.py",
    "a\n.py",
    "a\x7f.py",
    "\ud800.py",
    "x" * 256,
    "é" * 128,
    "/".join(["abcdefg"] * 130),
]


@pytest.mark.parametrize("path", EVIL_PATHS)
def test_a_path_that_is_not_plain_is_refused_and_named(folder: CodeFolder, place: Path, path: str) -> None:
    before = tree(place.parent.parent)
    for act in (folder.missing, folder.publish):
        with pytest.raises(CodeRefused) as caught:
            act([("good.py", sha(b""), 0), (path, sha(b""), 0)])
        assert caught.value.path == path
        assert ascii(path)[1:20] in str(caught.value)
    assert tree(place.parent.parent) == before


@pytest.mark.parametrize(
    "paths",
    [
        ["a.py", "a.py"],
        ["a.py", "A.py"],
        ["pkg/a.py", "Pkg/b.py"],
        ["caf\u00e9.py", "cafe\u0301.py"],
        ["stra\u00dfe.py", "STRASSE.py"],
        ["\u03b1\u0345\u0301.py", "\u03b1\u0301\u0345.py"],
        ["a", "a/b.py"],
        ["A", "a/b.py"],
        ["a/b/c.py", "a/b"],
        ["a/b.py", "a/b.py/c"],
    ],
)
def test_paths_that_a_file_system_may_confuse_are_refused(folder: CodeFolder, paths: list[str]) -> None:
    for order in (paths, paths[::-1]):
        with pytest.raises(CodeRefused, match=r"cannot be told apart|twice"):
            folder.missing([(path, sha(b""), 0) for path in order])


@pytest.mark.parametrize(
    "entry",
    [
        "abc",
        None,
        (),
        ("a.py", sha(b"")),
        ("a.py", sha(b""), 0, 0),
        (b"a.py", sha(b""), 0),
        (["a.py"], sha(b""), 0),
        ("a.py", sha(b"")[:-1], 0),
        ("a.py", sha(b"").upper(), 0),
        ("a.py", sha(b"") + "\n", 0),
        ("a.py", 7, 0),
        ("a.py", sha(b""), -1),
        ("a.py", sha(b""), True),
        ("a.py", sha(b""), 1.0),
        ("a.py", sha(b""), "0"),
        {"path": "a.py"},
    ],
)
def test_entries_of_other_types_are_refused(folder: CodeFolder, entry: object) -> None:
    with pytest.raises(CodeRefused) as caught:
        folder.publish([entry])
    assert isinstance(caught.value, CloudException)
    assert isinstance(caught.value, ValueError)


def test_limits_of_files_and_bytes(folder: CodeFolder, place: Path) -> None:
    empty = sha(b"")
    assert len(check_manifest((f"{n}.py", empty, 0) for n in range(MAX_FILES))) == MAX_FILES

    def endless() -> Iterator[Any]:
        n = 0
        while True:
            n += 1
            yield f"{n}.py", empty, 0

    with pytest.raises(CodeRefused, match="2,000 files"):
        folder.missing(endless())
    assert check_manifest([("a.py", empty, MAX_TOTAL_BYTES)])
    with pytest.raises(CodeRefused, match=r"'b\.py' \(50,000,000 bytes\)"):
        folder.missing([("a.py", empty, 1), ("b.py", empty, MAX_TOTAL_BYTES)])
    assert not place.exists()


@pytest.mark.parametrize(
    "digest", ["..", ".", "contents", "../../outside", "/", "A" * 64, "a" * 63, "a" * 64 + "/..", "\0"]
)
def test_a_digest_that_is_none_is_refused(folder: CodeFolder, place: Path, digest: str) -> None:
    send(folder, PACKAGE)
    before = tree(place.parent.parent)
    assert not folder.has(digest)
    with pytest.raises(CodeRefused):
        folder.folder(digest)
    folder.sweep(0, keep=[digest])
    assert tree(place.parent.parent) == before


part = st.one_of(
    st.sampled_from(["a", "b.py", "..", ".", "", "A", "é", "e\u0301", "\0", "\\", "~", "con", "contents", ".part-x"]),
    st.text(max_size=8),
)
paths = st.one_of(st.lists(part, min_size=1, max_size=5).map("/".join), st.text(max_size=30))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(paths, st.sampled_from([b"", b"x", b"yy"]), min_size=1, max_size=4))
def test_whatever_the_paths_nothing_outside_is_touched(place: Path, content: Content) -> None:
    folder = CodeFolder(str(place))
    surroundings = tree(place.parent.parent)
    own = str(place.relative_to(place.parent.parent))
    try:
        digest = send(folder, content)
    except CodeRefused:
        after = tree(place.parent.parent)
        assert after == surroundings
        return
    made = Path(folder.folder(digest))
    assert {str(p.relative_to(made)): p.read_bytes() for p in made.rglob("*") if p.is_file()} == content
    assert not any(p.is_symlink() for p in place.rglob("*"))
    after = tree(place.parent.parent)
    outside = {path: found for path, found in after.items() if path.split("/")[:2] != own.split("/")[:2]}
    assert outside == {path: found for path, found in surroundings.items() if path.split("/")[:2] != own.split("/")[:2]}
    folder.sweep(time.time() + 60)
    assert not made.exists()
