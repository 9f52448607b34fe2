"""A copy of a data folder while its owners go on writing.

Databases are copied by SQLite itself, each as of one moment. All other files are immutable once they have their name
(blobs, the users' modules) or only grow (the audit log). They are copied before the databases, most of the work, and
those that are new once more after them: what a copied database names is there, unless it was deleted meanwhile.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from cloud.errors import BackendError
from cloud.resources import LOCK_WAIT_S, make_folder, sync

__all__ = ["back_up"]

_DATABASE = ".sqlite3"
_BESIDE_DATABASE = tuple(f"{_DATABASE}-{kind}" for kind in ("wal", "shm", "journal"))
# Of the process that runs on the folder, of writers of stored files that are not done, and of workers.
_PASSING = ("lock", "files/incoming", "groups/*/files/incoming", "groups/*/scratch")
_PART = ".part-"


def back_up(data: str, destination: str) -> tuple[int, int]:
    """Copy a data folder, secrets and all, into a new folder that its owner only may enter; blocks until it is on disk.

    A copy that is not complete is called ``<destination>.partial`` and never as asked for.

    Args:
        data: The data folder.
        destination: Must not exist, nor lie within the data folder.

    Returns:
        Number of files in the copy, and their size in bytes.

    Raises:
        BackendError: A database cannot be copied.
        FileExistsError: The destination exists.
        ValueError: The destination lies within the data folder.
        OSError: The disk is full or fails.
    """
    source, target = Path(data).resolve(), Path(destination).resolve()
    if target.is_relative_to(source):
        raise ValueError(f"{target} lies within {source}: choose a folder beside it, or on another disk")
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: choose a folder that does not")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(str(partial))
    copied: dict[Path, tuple[int, int]] = {}
    _copy_files(source, partial, copied)
    for path in _files(source):
        if _is_database(path.relative_to(source)):
            _copy_database(path, partial / path.relative_to(source))
    _copy_files(source, partial, copied)
    _drop_broken_sets(source, partial)
    sizes = [path.stat().st_size for path in partial.rglob("*") if path.is_file()]
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync(str(folder))
        if folder != partial:
            # Jobs may run as another user, who must be able to read their modules in a copy, too.
            shutil.copymode(source / folder.relative_to(partial), folder)
    os.rename(partial, target)
    sync(str(target.parent))
    return len(sizes), sum(sizes)


def _files(source: Path) -> Iterator[Path]:
    """What is to be copied, databases included; what goes away meanwhile is left out."""
    for root, folders, names in os.walk(source):
        here = Path(root).relative_to(source)
        folders[:] = sorted(name for name in folders if not _is_passing(here / name))
        yield from (Path(root, name) for name in sorted(names) if not _is_passing(here / name))


def _is_passing(path: Path) -> bool:
    if _is_code(path):
        # Below, names are the users'.
        return len(path.parts) <= 5 and path.name.startswith(_PART)
    if path.name.startswith(".") or path.name.endswith(_BESIDE_DATABASE):
        return True
    return any(len(path.parts) == len(Path(pattern).parts) and path.match(pattern) for pattern in _PASSING)


def _is_code(path: Path) -> bool:
    """Whether this is in the folder of a workgroup that keeps the users' modules: ``groups/<id>/code/…``."""
    return len(path.parts) > 3 and path.parts[0] == "groups" and path.parts[2] == "code"


def _is_database(path: Path) -> bool:
    return path.name.endswith(_DATABASE) and not _is_code(path)


def _drop_broken_sets(source: Path, target: Path) -> None:
    # A set of modules that was removed while it was copied may be a part of itself, and is sent again when needed.
    for folder in target.glob("groups/*/code/*"):
        if not (source / folder.relative_to(target)).is_dir():
            shutil.rmtree(folder)


def _copy_files(source: Path, target: Path, copied: dict[Path, tuple[int, int]]) -> None:
    for path in _files(source):
        # A database is never opened here: closing it again would drop the locks that this process has on it.
        if _is_database(path.relative_to(source)):
            continue
        with suppress(FileNotFoundError):
            found = path.stat(follow_symlinks=False)
            state = found.st_size, found.st_mtime_ns
            if stat.S_ISREG(found.st_mode) and copied.get(path) != state:
                _copy_file(path, target / path.relative_to(source))
                copied[path] = state


def _copy_file(path: Path, target: Path) -> None:
    with open(path, "rb") as reader:
        make_folder(str(target.parent))
        with open(target, "wb", opener=_private) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fchmod(writer.fileno(), stat.S_IMODE(os.fstat(reader.fileno()).st_mode))
            os.fsync(writer.fileno())


def _copy_database(path: Path, target: Path) -> None:
    make_folder(str(target.parent))
    os.close(_private(str(target), os.O_WRONLY | os.O_CREAT))
    try:
        # Reading only: such a connection never moves a write-ahead log into its database, which is the server's part.
        # A database that was interrupted in the middle of a change must be repaired first, and so be written.
        try:
            _copy_pages(path, "ro", target)
        except sqlite3.OperationalError:
            _copy_pages(path, "rw", target)
    except sqlite3.Error as exc:
        raise BackendError(f"{path} cannot be copied: {exc}") from exc
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _copy_pages(path: Path, mode: str, target: Path) -> None:
    uri = f"file:{quote(os.fsencode(path))}?mode={mode}"
    with (
        closing(sqlite3.connect(uri, uri=True, timeout=LOCK_WAIT_S)) as reader,
        closing(sqlite3.connect(target, timeout=LOCK_WAIT_S)) as writer,
    ):
        reader.backup(writer)
        # Without a write-ahead log of its own the copy is one file.
        writer.execute("PRAGMA journal_mode = DELETE")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
