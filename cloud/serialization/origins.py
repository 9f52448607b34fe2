"""Where a module comes from: the standard library, an installed distribution from an index, or the user.

A distribution is from an index unless its ``direct_url.json`` (PEP 610) says that it was installed from a folder, a
repository or a file. Conda writes that file too, for the machine it built the package on; its packages count as from
an index. Read by hand: ``importlib.metadata`` would parse the headers of every distribution.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

__all__ = ["Origins", "installed_packages"]

_SITE_PARTS: Final = frozenset({"site-packages", "dist-packages"})
_METADATA_FILES: Final = ("METADATA", "entry_points.txt", "top_level.txt")


class _Distributions(NamedTuple):
    """What is installed in one folder.

    Attributes:
        changed_ns: When the folder's entries last changed.
        owners: 'pkg' or 'namespace/pkg' -> its dist-info folder, and whether it is from an index.
        projects: Project folder of each editable install, and its dist-info folder.
    """

    changed_ns: int
    owners: dict[str, tuple[str, bool]]
    projects: list[tuple[str, str]]


class Origins:
    """Judges files; remembers what it has read. Thread-safe: what two threads read at once is equal."""

    def __init__(self) -> None:
        paths = sysconfig.get_paths()
        self._stdlib = _with_real(paths["stdlib"], paths["platstdlib"])
        self._site = _with_real(paths["purelib"], paths["platlib"])
        self._folders: dict[str, _Distributions] = {}

    def is_users(self, name: str, origin: str) -> bool:
        """True when a module or package is the user's own: a server cannot be expected to have it.

        Args:
            name: Dotted, of a module or package whose parents are all namespace packages.
            origin: Its file; for a package its ``__init__``.
        """
        owner = self._owner(name, origin)
        if owner is not None:
            return not owner[1]
        return not any(self._is_installed(path) for path in {os.path.abspath(origin), os.path.realpath(origin)})

    def metadata_files(self, name: str, origin: str) -> Iterator[tuple[str, str]]:
        """Metadata of the user's distribution that a module belongs to, for ``importlib.metadata`` elsewhere.

        Yields:
            Path relative to a folder of ``sys.path``, and the file.
        """
        owner = self._owner(name, origin)
        folder = owner[0] if owner is not None else self._editable(os.path.realpath(origin))
        for each in _METADATA_FILES if folder else ():
            path = os.path.join(folder, each)
            if os.path.isfile(path):
                yield f"{os.path.basename(folder)}/{each}", path

    def _is_installed(self, path: str) -> bool:
        if _is_below(path, self._site) or not _SITE_PARTS.isdisjoint(path.split(os.sep)):
            return True
        return _is_below(path, self._stdlib)

    def _owner(self, name: str, origin: str) -> tuple[str, bool] | None:
        root = os.path.dirname(os.path.abspath(origin))
        is_package = os.path.basename(origin).partition(".")[0] == "__init__"
        for _ in range(name.count(".") + is_package):
            root = os.path.dirname(root)
        return self._distributions(root).owners.get(name.replace(".", "/"))

    def _editable(self, origin: str) -> str:
        found = ("", "")
        for entry in list(sys.path):
            if isinstance(entry, str) and not _SITE_PARTS.isdisjoint(entry.split(os.sep)):
                for project, folder in self._distributions(entry).projects:
                    # The longest: projects may lie in one another.
                    if origin.startswith(os.path.join(project, "")) and len(project) > len(found[0]):
                        found = project, folder
        return found[1]

    def _distributions(self, root: str) -> _Distributions:
        try:
            changed_ns = os.stat(root).st_mtime_ns
        except OSError:
            return _Distributions(0, {}, [])
        known = self._folders.get(root)
        if known is None or known.changed_ns != changed_ns:
            known = self._folders[root] = self._read(root, changed_ns)
        return known

    def _read(self, root: str, changed_ns: int) -> _Distributions:
        found = _Distributions(changed_ns, {}, [])
        try:
            names = sorted(name for name in os.listdir(root) if name.endswith(".dist-info"))
        except OSError:
            return found
        everything_else_is_from_an_index = self._is_installed(os.path.join(root, ""))
        for name in names:
            folder = os.path.join(root, name)
            direct = _direct_url(folder)
            if direct is None and everything_else_is_from_an_index:
                continue
            found.owners.update((part, (folder, direct is None)) for part in _recorded(folder))
            if direct is not None and (project := _editable_project(direct)):
                found.projects.append((project, folder))
        return found


def _with_real(*folders: str) -> tuple[str, ...]:
    return tuple({os.path.join(each, "") for folder in folders for each in (folder, os.path.realpath(folder))})


def _is_below(path: str, folders: tuple[str, ...]) -> bool:
    return path.startswith(folders)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _direct_url(folder: str) -> dict[str, Any] | None:
    text = _text(os.path.join(folder, "direct_url.json"))
    if not text or _text(os.path.join(folder, "INSTALLER")).strip() == "conda":
        return None
    import json

    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _editable_project(direct: dict[str, Any]) -> str:
    info, url = direct.get("dir_info"), direct.get("url")
    if not isinstance(info, dict) or not info.get("editable") or not isinstance(url, str):
        return ""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return os.path.realpath(url2pathname(urlsplit(url).path))


def _recorded(folder: str) -> Iterator[str]:
    """Everything that a distribution's RECORD lists, as modules are named: 'pkg', 'pkg/sub', 'pkg/sub/mod'."""
    for line in _text(os.path.join(folder, "RECORD")).splitlines():
        parts = line.rpartition(",")[0].rpartition(",")[0].strip('"').split("/")
        yield from ("/".join(parts[:n]) for n in range(1, len(parts)))
        yield "/".join([*parts[:-1], parts[-1].partition(".")[0]])


def installed_packages() -> dict[str, str]:
    """The installed distributions behind the modules imported here: module -> 'distribution==version'.

    Reads the metadata of every distribution: for the moment of an error, not of a submission.
    """
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    found: dict[str, str] = {}
    for module, names in packages_distributions().items():
        if module in sys.modules:
            try:
                found[module] = f"{names[0]}=={version(names[0])}"
            except PackageNotFoundError:
                continue  # removed meanwhile
    return found
