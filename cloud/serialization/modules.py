"""The user's modules: which of those this process has imported a server lacks, and what is in them.

A module of the user is one that lies neither in the standard library nor in a distribution installed from an index:
next to the script, in the current directory, on PYTHONPATH, in an editable install, or in a package that was installed
from a folder, a repository or a file. Each travels under the path by which it is imported, so that one folder at the
front of ``sys.path`` serves them all. What travels:

- of a package, all of it: every ``.py`` file, and other files of up to ``MAX_DATA_BYTES``; no hidden files, no caches,
  no virtual environments. Not asked for is what git ignores: generated modules are often ignored;
- of a namespace package (a folder without ``__init__.py``) the modules and packages in it that are used;
- modules of the user that are not imported yet, but which those, or the script, mention in an import;
- the metadata of the user's distributions, since packages ask for their own version when they are imported.

Not ``__main__``, whose functions travel by value, nor modules made at run time, nor this package. Compiled extension
modules stay behind: they run on one kind of machine only, and against the libraries of one.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from types import CodeType, FunctionType
from typing import NamedTuple

from cloud.errors import SerializationError
from cloud.serialization.imports import absolute_names, imported_by_code, imported_by_source
from cloud.serialization.locating import INSIDE, Unit, find_in, findable, imported
from cloud.serialization.manifest import (
    MAX_FILES,
    CodeRefused,
    FileEntry,
    check_limits,
    check_manifest,
    check_path,
    digest_of,
)
from cloud.serialization.origins import Origins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["NO_CODE", "CodeFinder", "CodeSet"]

MAX_DATA_BYTES: Final = 1_000_000
_SKIPPED_FOLDERS: Final = frozenset({"__pycache__", "node_modules"})
_COMPILED: Final = (*EXTENSION_SUFFIXES, ".so", ".pyd", ".dll", ".dylib", ".a", ".o")
#: This package and what it needs; a server has them.
_OWN: Final = frozenset({"__main__", "__mp_main__", "cloud", "cloudpickle", "croniter", "filelock"})
#: What the start of an interpreter, an editable install and a debugger put into ``sys.modules``.
_NOT_THE_PROGRAMS: Final = frozenset({"debugpy", "pydev_console", "pydev_ipython", "sitecustomize", "usercustomize"})
_NOT_THE_PROGRAMS_EITHER: Final = ("__editable__", "pydevd", "_pydev")
_COMPILED_REASON: Final = "it is a compiled extension module, which runs on one kind of machine only"
_ATTEMPTS: Final = 3
#: Where a walk through a folder that is no package in earnest ends.
_MAX_WALKED: Final = 10 * MAX_FILES
#: A file changed twice within one tick of its file system's clock may look unchanged; ticks are 1 to 10 ms.
_SETTLED_NS: Final = 100_000_000

_Stamp = tuple[int, int, int, int]


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


class CodeSet(NamedTuple):
    """The modules that travel with a submission.

    Attributes:
        digest: Names the set; "" for an empty one. Equal files give equal digests, wherever they lie.
        files: Sorted by path.
        left_out: (path, why) of files of the user's modules that do not travel.
        sources: Path -> the file here.
    """

    digest: str
    files: tuple[FileEntry, ...]
    left_out: tuple[tuple[str, str], ...]
    sources: dict[str, str]

    def read(self, path: str) -> bytes:
        """Read one file of the set.

        Raises:
            KeyError: The set has no such path.
            SerializationError: The file cannot be read, or is not what it was; ``retry`` is then True: ask
                ``CodeFinder.current`` again.
        """
        source = self.sources[path]
        content = _read(source)
        expected = next(entry.sha256 for entry in self.files if entry.path == path)
        if hashlib.sha256(content).hexdigest() != expected:
            raise SerializationError(f"{source} was changed while it was being sent", retry=True)
        return content


NO_CODE: Final = CodeSet("", (), (), {})


class _Source(NamedTuple):
    """One file as it was read."""

    stamp: _Stamp
    settled: bool
    sha256: str
    size_bytes: int
    imports: tuple[tuple[int, str], ...]


class _State(NamedTuple):
    """What a code set was made from; as long as it holds, so does the set."""

    code: CodeSet
    modules: tuple[str, ...]
    path: list[str]
    codes: tuple[CodeType, ...]
    files: list[tuple[str, _Stamp]]
    folders: list[tuple[str, int]]
    settled: bool

    def holds(self) -> bool:
        if not self.settled or tuple(sys.modules) != self.modules or sys.path != self.path:
            return False
        if _interactive_codes() != self.codes:
            return False
        stat = os.stat
        try:
            for path, stamp in self.files:
                if _stamp(stat(path)) != stamp:
                    return False
            return all(stat(path).st_mtime_ns == changed_ns for path, changed_ns in self.folders)
        except OSError:
            return False


class CodeFinder:
    """Finds the user's modules, again and again at little cost.

    Thread-safe and fork-safe: it holds no lock, and two threads that look at once find the same.

    Args:
        enabled: False: no module travels.
        whitelist: Top-level names that may travel; empty: all.
    """

    def __init__(self, enabled: bool, whitelist: Sequence[str] = ()) -> None:
        self.enabled = enabled
        self.whitelist = frozenset(whitelist)
        self._origins = Origins()
        self._sources: dict[str, _Source] = {}
        self._state: _State | None = None

    def current(self) -> CodeSet:
        """Find the user's modules as they are now. Reads files that are new or changed; else only looks at them.

        Raises:
            SerializationError: A file cannot be read; names it.
            CodeRefused: More files or bytes than may travel; names the largest. Or two paths differ only in case.
        """
        if not self.enabled:
            return NO_CODE
        state = self._state
        if state is None or not state.holds():
            state = self._state = self._look()
        return state.code

    def _look(self) -> _State:
        for _ in range(_ATTEMPTS - 1):
            try:
                return _Look(self._origins, self._sources, self.whitelist).state()
            except SerializationError as exc:
                # An editor removes a file, or puts another in its place, while we look.
                if not exc.retry:
                    raise
        return _Look(self._origins, self._sources, self.whitelist).state()

    def not_sent(self) -> dict[str, str]:
        """Tell which of the user's modules stay behind, and why: dotted name -> reason. For the moment of an error."""
        look = _Look(self._origins, self._sources, self.whitelist if self.enabled else frozenset())
        look.search()
        if not self.enabled:
            look.refused.update(
                dict.fromkeys(look.units, "modules do not travel: automatic_dependency_transfer is off")
            )
        return look.refused


class _Look:
    """One search through ``sys.modules`` and what those modules mention."""

    def __init__(self, origins: Origins, sources: dict[str, _Source], whitelist: frozenset[str]) -> None:
        self.refused: dict[str, str] = {}
        self.units: dict[str, Unit] = {}
        self._origins = origins
        self._sources = sources
        self._whitelist = whitelist
        self._judged: dict[str, Unit | None] = {}
        self._files: dict[str, str] = {}
        self._sizes: list[FileEntry] = []
        self._left_out: dict[str, str] = {}
        self._read: dict[str, _Source] = {}
        self._folders: dict[str, int] = {}
        self._modules = tuple(sys.modules)
        self._path = sys.path[:]
        self._codes = _interactive_codes()
        self._n_known = -1
        self._known_names: frozenset[str] = frozenset()

    def state(self) -> _State:
        self.search()
        files = [
            FileEntry(path, self._read[source].sha256, self._read[source].size_bytes)
            for path, source in self._files.items()
        ]
        entries = check_manifest(files)
        code = CodeSet(digest_of(entries), entries, tuple(sorted(self._left_out.items())), self._files)
        return _State(
            code if entries else NO_CODE._replace(left_out=code.left_out),
            self._modules,
            self._path,
            self._codes,
            [(path, source.stamp) for path, source in self._read.items()],
            list(self._folders.items()),
            all(source.settled for source in self._read.values()),
        )

    def search(self) -> None:
        """Find all units and their files."""
        for name in (*self._modules, *sorted(self._whitelist)):
            if isinstance(name, str):
                self._consider(name)
        self._follow_main()
        done: set[str] = set()
        while len(done) < len(self.units):
            for unit in [unit for name, unit in self.units.items() if name not in done]:
                done.add(unit.name)
                self._take(unit)

    def _follow_main(self) -> None:
        for code in self._codes:
            self._consider_all(imported_by_code(code))
        main = sys.modules.get("__main__")
        path = getattr(main, "__file__", None)
        if isinstance(path, str) and path.endswith(".py") and os.path.isfile(path):
            spec = getattr(main, "__spec__", None)
            name = getattr(spec, "name", "__main__")
            self._consider_all(absolute_names(self._source(path).imports, name, is_package=False))

    def _consider_all(self, names: Iterable[str]) -> None:
        for name in names:
            self._consider(name)

    def _consider(self, name: str) -> None:
        """Judge the unit that a module is in, if it was not judged yet."""
        folders: tuple[str, ...] | None = None
        prefix = ""
        for part in name.split("."):
            prefix = f"{prefix}.{part}" if prefix else part
            if prefix in self._judged:
                found = self._judged[prefix]
            else:
                found = self._judged[prefix] = self._judge(prefix, part, folders)
            if found is None or found.origin is not None:
                return
            folders = found.folders

    def _judge(self, name: str, last: str, folders: tuple[str, ...] | None) -> Unit | None:
        if folders is None and _is_not_the_users(name):
            return None
        unit = (
            imported(name)
            if name in sys.modules
            else findable(name)
            if folders is None
            else find_in(folders, name, last)
        )
        if unit is None or unit.origin is None:
            return unit
        if unit.origin in INSIDE or not self._origins.is_users(name, unit.origin):
            return unit
        if unit.origin.endswith(_COMPILED):
            self.refused[name] = _COMPILED_REASON
        elif not os.path.isfile(unit.origin):
            if name not in sys.stdlib_module_names:
                self.refused[name] = f"it is not a file of its own: {unit.origin}"
        elif self._whitelist and name.partition(".")[0] not in self._whitelist:
            self.refused[name] = "dependency_whitelist does not name it"
        else:
            self.units[name] = unit
        return unit

    def _take(self, unit: Unit) -> None:
        assert unit.origin is not None
        base = unit.name.replace(".", "/")
        before = len(self._files)
        if unit.folders:
            for folder in unit.folders:
                self._walk(folder, base, ())
        else:
            self._add(f"{base}{os.path.splitext(unit.origin)[1]}", unit.origin)
        for path, source in self._origins.metadata_files(unit.name, unit.origin):
            self._add(path, source)
        # Before anything is read.
        check_limits(self._sizes)
        package = unit.name if unit.folders and "." not in unit.name else ""
        for path, source in list(self._files.items())[before:]:
            imports = self._source(source, package).imports
            if imports:
                stem, is_package = path.removesuffix(".py"), path.endswith("/__init__.py")
                name = stem.removesuffix("/__init__").replace("/", ".")
                self._consider_all(absolute_names(imports, name, is_package=is_package))

    def _walk(self, folder: str, base: str, above: tuple[tuple[int, int], ...]) -> None:
        try:
            found = os.stat(folder)
            here = found.st_dev, found.st_ino
            if here in above:
                return  # a link to a folder that it lies in
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as exc:
            raise _unreadable(folder, exc) from exc
        if any(entry.name == "pyvenv.cfg" for entry in entries):
            return
        self._folders[folder] = found.st_mtime_ns
        for entry in entries:
            name, path = entry.name, f"{base}/{entry.name}"
            if name.startswith(".") or name.endswith("~"):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:
                continue  # a link to itself
            if is_file:
                self._add_of_package(path, entry)
            elif is_folder and name not in _SKIPPED_FOLDERS:
                self._walk(entry.path, path, (*above, here))

    def _add_of_package(self, path: str, entry: os.DirEntry[str]) -> None:
        if entry.name.endswith(_COMPILED):
            self._left_out[path] = "compiled for one kind of machine"
            module = os.path.join(os.path.dirname(path), entry.name.partition(".")[0])
            self.refused[module.replace("/", ".")] = _COMPILED_REASON
        elif not entry.name.endswith((".py", ".pyc")) and entry.stat().st_size > MAX_DATA_BYTES:
            self._left_out[path] = f"data of more than {MAX_DATA_BYTES:,} bytes"
        else:
            self._add(path, entry.path)

    def _add(self, path: str, source: str) -> None:
        # Folders of one package may hold the same name; the first is what is imported.
        if path in self._files:
            return
        try:
            check_path(path)
        except CodeRefused as exc:
            self._left_out[ascii(path)] = exc.parameter
            return
        try:
            size_bytes = os.stat(source).st_size
        except OSError as exc:
            raise _unreadable(source, exc) from exc
        self._files[path] = source
        self._sizes.append(FileEntry(path, "", size_bytes))
        if len(self._files) > _MAX_WALKED:
            check_limits(self._sizes)

    def _source(self, path: str, package: str = "") -> _Source:
        """Read a file, unless it is what it was; ``package`` is the top-level package that it travels with."""
        found = self._read.get(path)
        if found is None:
            found = self._sources.get(path)
            try:
                stamp = _stamp(os.stat(path))
            except OSError as exc:
                raise _unreadable(path, exc) from exc
            if found is None or found.stamp != stamp or not found.settled:
                found = self._sources[path] = self._load(path, stamp, package)
            self._read[path] = found
        return found

    def _load(self, path: str, stamp: _Stamp, package: str) -> _Source:
        began_ns = time.time_ns()
        content = _read(path)
        return _Source(
            stamp,
            began_ns - max(stamp[:2]) > _SETTLED_NS,
            hashlib.sha256(content).hexdigest(),
            len(content),
            imported_by_source(content, self._known() | {package}) if path.endswith(".py") else (),
        )

    def _known(self) -> frozenset[str]:
        """Top-level names that lead to nothing of the user's."""
        if self._n_known != len(self._judged):
            self._n_known = len(self._judged)
            self._known_names = frozenset(
                {*_OWN, *sys.builtin_module_names}.union(
                    name
                    for name, unit in self._judged.items()
                    if unit is not None
                    and unit.origin is not None
                    and name not in self.units
                    and name not in self.refused
                )
            )
        return self._known_names


def _is_not_the_users(top: str) -> bool:
    return not top or top in _OWN or top in _NOT_THE_PROGRAMS or top.startswith(_NOT_THE_PROGRAMS_EITHER)


def _interactive_codes() -> tuple[CodeType, ...]:
    """The code of the functions of a ``__main__`` that is no file: of a notebook or an interactive session."""
    main = sys.modules.get("__main__")
    # Read from its standard input, a program has the file '<stdin>'.
    if main is None or not str(getattr(main, "__file__", "<")).startswith("<"):
        return ()
    return tuple(value.__code__ for value in list(vars(main).values()) if type(value) is FunctionType)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _unreadable(path: str, exc: OSError) -> SerializationError:
    return SerializationError(
        f"{path} is one of your modules, or beside one in its package, and cannot be read: {exc}",
        retry=isinstance(exc, FileNotFoundError),
        hint="Make it readable, or name the modules to send in dependency_whitelist.",
    )
