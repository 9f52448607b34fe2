"""What a job may use of the machine, and how a job that wanted more is told.

Memory is limited by RLIMIT_DATA, where no cgroup does it: that counts what a process may write to and shares with
nobody. RLIMIT_AS counts address space, of which allocators, thread stacks and numeric libraries reserve many times
what they use. Either way the allocation itself fails: the job gets a MemoryError, and its worker lives to report it.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_MIN_FILES: Final = 32
_MIN_MEMORY_BYTES: Final = 64 << 20
_MIN_FILE_BYTES: Final = 1 << 20
_MAX_CHAIN: Final = 10
_RESERVED_FILES: Final = 16
_RESERVED_BYTES: Final = 64 << 20


class Limits(NamedTuple):
    """Of one worker, and so of one job at a time. 0 means no limit.

    Attributes:
        memory_bytes: Private memory: of each process, and of the job's processes together.
        n_files: Open files of each process.
        file_bytes: Size of each file it writes, and of what it prints.
        n_processes: Processes of a job at the same time, its worker among them.
    """

    memory_bytes: int = 0
    n_files: int = 0
    file_bytes: int = 0
    n_processes: int = 0

    def check(self) -> None:
        """Raise ValueError for a limit under which no worker could start."""
        least = Limits(_MIN_MEMORY_BYTES, _MIN_FILES, _MIN_FILE_BYTES, 1)
        for name, value, minimum in zip(self._fields, self, least, strict=True):
            if value and value < minimum:
                raise ValueError(f"the limit {name} must be 0 (none) or at least {minimum}, not {value}")

    def text(self, name: str) -> str:
        """What a job is told that met one, and what to do."""
        return _TEXTS[name].format(getattr(self, name))

    def apply(self, *, memory: bool) -> None:
        """Set them for this process and its children, for good.

        Args:
            memory: False where a cgroup limits the memory.

        Raises:
            OSError, ValueError: The system refuses one.
        """
        import resource

        _lower(resource.RLIMIT_CORE, 0)
        if self.n_files:
            _lower(resource.RLIMIT_NOFILE, self.n_files, _RESERVED_FILES)
        if self.file_bytes:
            _lower(resource.RLIMIT_FSIZE, self.file_bytes)
        if self.memory_bytes and memory:
            _lower(resource.RLIMIT_DATA, self.memory_bytes, _RESERVED_BYTES)

    def use_reserve(self) -> None:
        """Let this process have a little more: what it takes to tell of the limit that its job has met."""
        import resource

        for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_DATA):
            hard = resource.getrlimit(which)[1]
            resource.setrlimit(which, (hard, hard))


_REMEDY: Final = "or ask the server's operator to raise it."
_TEXTS: Final = {
    "memory_bytes": "The job met the server's memory limit of {:,} bytes: let it hold less at a time, " + _REMEDY,
    "n_files": "The job met the server's limit of {:,} open files: close what it no longer needs, " + _REMEDY,
    "file_bytes": "The job met the server's limit of {:,} bytes for a file, or for what it prints: write less to each, "
    + _REMEDY,
    "n_processes": "The job met the server's limit of {:,} processes: let it start fewer at a time, " + _REMEDY,
}


def _lower(which: int, value: int, reserve: int = 0) -> None:
    import resource

    hard = resource.getrlimit(which)[1]
    most = value + reserve if hard == resource.RLIM_INFINITY else min(value + reserve, hard)
    resource.setrlimit(which, (min(value, most), most))


class Limited:
    """The limits in force in this worker.

    Args:
        limits: Those.
        cgroup: Folder of the worker's own cgroup; "" if it has none.
        dirty: A one-item list, set to True when a job has met one: it may have left the worker without room.

    Attributes:
        met: True from then on.
    """

    def __init__(self, limits: Limits, cgroup: str, dirty: list[bool]) -> None:
        self._limits = limits
        self._cgroup = cgroup
        self._dirty = dirty
        self.met = False

    def explain(self, error: BaseException) -> None:
        """Add to an error that comes of a limit which one, and what to do."""
        name = next(filter(None, map(self._name, _chain(error))), None)
        if name is not None and getattr(self._limits, name):
            self.met = self._dirty[0] = True
            self._limits.use_reserve()
            error.add_note(self._limits.text(name))

    def _name(self, error: BaseException) -> str | None:
        if isinstance(error, MemoryError):
            return "memory_bytes"
        if isinstance(error, OSError) and error.errno in _BY_ERRNO:
            return _BY_ERRNO[error.errno]
        if isinstance(error, BlockingIOError | RuntimeError) and self._cgroup:
            return "n_processes" if n_events(self._cgroup, "pids", "max") else None
        return None


_BY_ERRNO: Final = {errno.EMFILE: "n_files", errno.EFBIG: "file_bytes", errno.ENOMEM: "memory_bytes"}
_IN_FORCE: Final[list[Limited]] = []


def put_in_force(limited: Limited) -> None:
    """Let ``explain`` know of this worker's limits."""
    _IN_FORCE[:] = [limited]


def explain(error: BaseException) -> None:
    """Name the limit that an error comes of, if limits are in force here and it comes of one."""
    for limited in _IN_FORCE:
        try:
            limited.explain(error)
        except Exception:  # noqa: BLE001, S110 - add_note of the user's; the error itself is still told
            pass


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    here: Any = error
    while here is not None and len(found) < _MAX_CHAIN:
        found.append(here)
        here = here.__cause__ or here.__context__
    return found


def n_events(cgroup: str, controller: str, name: str) -> int:
    """How often something happened in a cgroup, by its ``CONTROLLER.events``; 0 where that is not told."""
    try:
        with open(f"{cgroup}/{controller}.events") as file:
            return next((int(line.split()[1]) for line in file if line.split()[0] == name), 0)
    except OSError:
        return 0
