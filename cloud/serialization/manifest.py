"""The manifest of a set of modules: which files, what is in them, and the digest that names the set.

What the client that sends modules and the server that keeps them must agree on. Touches no file.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cloud.errors import CloudException

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

__all__ = [
    "MAX_FILES",
    "MAX_PATH_BYTES",
    "MAX_TOTAL_BYTES",
    "CodeRefused",
    "FileEntry",
    "check_limits",
    "check_manifest",
    "check_path",
    "digest_of",
    "is_digest",
]

MAX_FILES: Final = 2_000
MAX_TOTAL_BYTES: Final = 50_000_000
MAX_PART_BYTES: Final = 255
#: Leaves room for the folder in front of it: Linux takes 4,096 bytes in all.
MAX_PATH_BYTES: Final = 1_024

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class CodeRefused(CloudException, ValueError):
    """A set of modules cannot be sent or kept: a path, a digest or a limit is at fault.

    Attributes:
        path: The path at fault; "" when it is no single one.
    """

    def __init__(self, value: str, path: str = "", hint: str | None = None) -> None:
        super().__init__(value, hint=hint)
        self.path = path


class FileEntry(NamedTuple):
    """One file of a set.

    Attributes:
        path: Relative, with '/', as it is imported: 'pkg/sub/mod.py'.
        sha256: Of its contents, 64 hexadecimal digits.
        size_bytes: Of its contents.
    """

    path: str
    sha256: str
    size_bytes: int


def is_digest(text: object) -> bool:
    """True for 64 lowercase hexadecimal digits."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def digest_of(files: Iterable[FileEntry]) -> str:
    """Name a set of files: equal paths and contents give equal names, in whatever order; "" for no files."""
    lines = sorted(f"{path}\0{sha256}\n" for path, sha256, _ in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""


def check_path(path: str) -> str:
    """Return ``path`` if it is safe below any folder, else raise.

    Raises:
        CodeRefused: It is absolute, leaves the folder, or has a part no file system takes; names the path.
    """
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise CodeRefused(f"module path {path!r} is not valid Unicode", path) from None
    problem = ""
    if len(encoded) > MAX_PATH_BYTES:
        problem = f"is longer than {MAX_PATH_BYTES} bytes"
    elif _CONTROL.search(path) or "\\" in path:
        problem = "contains a control character or a backslash"
    else:
        for part in path.split("/"):
            if part in ("", ".", ".."):
                problem = "must be relative, without empty parts, '.' or '..'"
            elif len(part.encode()) > MAX_PART_BYTES:
                problem = f"has a part longer than {MAX_PART_BYTES} bytes"
    if problem:
        raise CodeRefused(f"module path {_shown(path)} {problem}", path)
    return path


def check_manifest(files: Iterable[Any]) -> tuple[FileEntry, ...]:
    """Check a manifest as it came from anywhere, and return it sorted by path.

    Args:
        files: Triples (path, sha256, size in bytes), as tuples or lists.

    Raises:
        CodeRefused: A triple has the wrong types, a path is unsafe or there twice, two paths differ only in case or in
            how Unicode composes them, one is both file and folder, or there are too many files or bytes.
    """
    found: list[FileEntry] = []
    for n, each in enumerate(files):
        if n >= MAX_FILES:
            raise CodeRefused(f"a set of modules may have {MAX_FILES:,} files, not more")
        found.append(_entry(each))
    check_limits(found)
    found.sort()
    _check_spellings(entry.path for entry in found)
    return tuple(found)


def _entry(triple: Any) -> FileEntry:
    if not isinstance(triple, tuple | list) or len(triple) != 3:
        raise CodeRefused(f"a file of a set of modules is (path, sha256, size in bytes), not {_shown(triple)}")
    path, sha256, size_bytes = triple
    if not isinstance(path, str):
        raise CodeRefused(f"a module path must be text, not {_shown(path)}")
    check_path(path)
    if not is_digest(sha256):
        raise CodeRefused(f"module path {path!r} needs a SHA-256 in lowercase hexadecimal, not {_shown(sha256)}", path)
    if isinstance(size_bytes, bool) or not isinstance(size_bytes, int) or size_bytes < 0:
        raise CodeRefused(f"module path {path!r} needs a size in bytes, not {_shown(size_bytes)}", path)
    return FileEntry(path, sha256, size_bytes)


def _check_spellings(paths: Iterable[str]) -> None:
    """Refuse paths that are one on some file system; ``paths`` are sorted."""
    spellings: dict[str, tuple[str, bool]] = {}
    before = ""
    for path in paths:
        if path == before:
            raise CodeRefused(f"module path {_shown(path)} is there twice", path)
        before = path
        parts = path.split("/")
        for n in range(1, len(parts) + 1):
            here = "/".join(parts[:n]), n < len(parts)
            other = spellings.setdefault(_folded(here[0]), here)
            if other != here:
                raise CodeRefused(
                    f"module paths {_shown(other[0])} and {_shown(path)} cannot be told apart on every file system",
                    path,
                )


def _folded(text: str) -> str:
    # Unicode's canonical caseless match (D145): folding is not closed under composition, so both sides of it.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def check_limits(files: Sequence[FileEntry]) -> None:
    """Raise unless a set of files is small enough to travel.

    Raises:
        CodeRefused: More than ``MAX_FILES`` files or ``MAX_TOTAL_BYTES`` bytes; names the largest files, or the folders
            with the most.
    """
    total_bytes = sum(entry.size_bytes for entry in files)
    hint = (
        "Move data out of the package (cloud.files keeps it), or name the modules to send in dependency_whitelist; "
        "what is not sent must be installed on the server."
    )
    if total_bytes > MAX_TOTAL_BYTES:
        largest = sorted(files, key=lambda entry: -entry.size_bytes)[:10]
        named = ", ".join(f"{_shown(entry.path)} ({entry.size_bytes:,} bytes)" for entry in largest)
        raise CodeRefused(
            f"your modules have {total_bytes:,} bytes, and {MAX_TOTAL_BYTES:,} may travel. The largest: {named}",
            largest[0].path,
            hint,
        )
    if len(files) > MAX_FILES:
        folders = Counter(entry.path.rpartition("/")[0] or entry.path for entry in files)
        named = ", ".join(f"{_shown(folder)} ({n:,} files)" for folder, n in folders.most_common(10))
        largest_path = max(files, key=lambda entry: entry.size_bytes).path
        raise CodeRefused(
            f"your modules have {len(files):,} files or more, and {MAX_FILES:,} may travel. Where most are: {named}. "
            f"The largest file: {_shown(largest_path)}",
            folders.most_common(1)[0][0],
            hint,
        )


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
