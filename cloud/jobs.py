"""The words: what a job is, the states it passes through, its options and how it ended.

Records only; nothing here runs, stores or sends anything. The engine, the workers, the backends and the client
all speak in these.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

from cloud.errors import CloudException

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeAlias

Jids: TypeAlias = Sequence[int]
"""Job ids as the engine takes them: a ``range``, or a list of ints; duplicates allowed."""


# Where a job stands; the four states from DONE on are final. Plain ints: an enum costs a look-up in hot paths, and its
# module a millisecond of the time to the first result, here and in the workers.
#
#                ┌───────► STALLED      a dependency failed
#    WAITING ────┤
#                └─► QUEUED ─► PROCESSING ─► DONE | ERROR
#                       └────────────┴─────► KILLED        (WAITING may be killed too)
WAITING: Final = 0  #: for a dependency, or for the back-off before a retry
QUEUED: Final = 1  #: ready, waiting for a worker
PROCESSING: Final = 2  #: its function runs
DONE: Final = 3  #: its function returned
ERROR: Final = 4  #: its function raised, or its worker died
KILLED: Final = 5  #: by ``kill`` or its ``_max_runtime``
STALLED: Final = 6  #: a dependency failed, so it never ran

STATUS_LABELS: Final = ("waiting", "queued", "processing", "done", "error", "killed", "stalled")
FINISHED_LABELS: Final = ["done", "stalled", "error", "killed"]

TRANSITIONS: Final[dict[int, frozenset[int]]] = {
    WAITING: frozenset({QUEUED, STALLED, KILLED}),
    # A queued job that is given back with a back-off waits again.
    QUEUED: frozenset({PROCESSING, KILLED}),
    # QUEUED and WAITING: a new attempt, at once or after a back-off.
    PROCESSING: frozenset({DONE, ERROR, KILLED, QUEUED, WAITING}),
    DONE: frozenset(),
    ERROR: frozenset(),
    KILLED: frozenset(),
    STALLED: frozenset(),
}


class JobOptions:
    """How a job is to be run: the reserved ``_names`` of ``call`` and ``map``, checked.

    Treat as frozen. Most jobs share ``DEFAULT_OPTIONS``.
    """

    __slots__ = (
        "cores",
        "depends_on",
        "env_vars",
        "fast_serialization",
        "ignore_dependency_errors",
        "kill_process",
        "label",
        "max_runtime_s",
        "priority",
        "profile",
        "reports_late",
        "restartable",
        "retries",
        "retry_delay_s",
    )

    def __init__(self) -> None:
        self.label: str | None = None
        self.priority: int = 5
        self.restartable: bool = True
        #: With restartable False: an outcome may be on its way while the next item runs. Lost with its worker, such an
        #: item runs again; the one that was running does not.
        self.reports_late: bool = False
        self.profile: bool = False
        self.cores: int = 1
        self.max_runtime_s: float | None = None
        self.env_vars: dict[str, str] | None = None
        self.kill_process: bool = False
        self.fast_serialization: int = 0
        self.depends_on: Jids = ()
        self.ignore_dependency_errors: bool = False
        self.retries: int = 0
        self.retry_delay_s: float = 1.0

    @property
    def alone(self) -> bool:
        """True when the job must not share a message with others: it needs care of its own."""
        return self.max_runtime_s is not None or self.kill_process or self.cores > 1 or self.profile

    def as_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, JSON-able."""
        return {
            name: _plain(value)
            for name in self.__slots__
            if (value := getattr(self, name)) != getattr(DEFAULT_OPTIONS, name)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JobOptions:
        """Rebuild from ``as_dict``; unknown names are refused with TypeError."""
        options = cls()
        for name, value in values.items():
            if name not in cls.__slots__:
                raise TypeError(f"unknown job option {name!r}")
            setattr(options, name, value)
        return options


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, range | tuple) else value


DEFAULT_OPTIONS: Final = JobOptions()

_values_of: Final = attrgetter(*JobOptions.__slots__)
_DEFAULTS: Final = _values_of(DEFAULT_OPTIONS)
_LAST: Final = [(_DEFAULTS, DEFAULT_OPTIONS)]


def _shared(options: JobOptions) -> JobOptions:
    """One object for options that equal the defaults, or those before: calls with the same ones may share a batch.

    Later calls have these too: every value must be our own, none an object that the user may change.
    """
    values = _values_of(options)
    last_values, last = _LAST[0]
    if values == last_values:
        return last
    if values == _DEFAULTS:
        return DEFAULT_OPTIONS
    _LAST[0] = values, options
    return options


_CORE_TYPES: Final = ("c1", "c2", "f2", "m1", "s1")


def split_options(kwargs: dict[str, Any], *, accept: frozenset[str]) -> tuple[JobOptions, dict[str, Any]]:
    """Take the reserved ``_names`` out of ``kwargs`` (in place) and check them.

    Args:
        kwargs: The user's keyword arguments; reserved names are removed, whatever the function's parameters are called.
        accept: Names this verb takes; another reserved name raises TypeError naming it.

    Returns:
        The options, and a dict of the callbacks given (`_callback`, `_callback_on_error`).

    Raises:
        TypeError, ValueError, CloudException: As PiCloud's, naming option and value.

    Source: PiCloud client 2.1.1-2.8.5 (`cloud.call`, reserved kwargs).
    """
    taken = {name: kwargs.pop(name) for name in list(kwargs) if name in _RESERVED}
    if not taken:
        return DEFAULT_OPTIONS, taken
    options = JobOptions()
    callbacks: dict[str, Any] = {}
    for name, value in taken.items():
        if name not in accept:
            raise TypeError(f"{name} cannot be used here; remove it")
        if name in ("_callback", "_callback_on_error"):
            callbacks[name] = _callbacks(value)
        else:
            _RESERVED[name](options, name, value)
    return _shared(options), callbacks


def _callbacks(value: Any) -> list[Callable[..., Any]]:
    if value is None:
        return []
    values = [value] if callable(value) else list(value) if isinstance(value, Iterable) else [value]
    if not all(callable(each) for each in values):
        raise CloudException("All callbacks must be callable")
    return values


def _integer(name: str, value: Any, minimum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value!r}")
    return value


def _number(name: str, value: Any, *, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if value < 0 or (positive and value == 0) or value != value:
        raise ValueError(f"{name} must be {'greater than' if positive else 'at least'} 0, not {value!r}")
    return float(value)


def _set_label(options: JobOptions, name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.isascii()):
        raise TypeError(f"_job_label must be an ASCII string, not {value!r}")
    options.label = value


def _set_priority(options: JobOptions, name: str, value: Any) -> None:
    options.priority = _integer(name, value)


def _set_restartable(options: JobOptions, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {value!r}")
    options.restartable = value


def _set_fast_serialization(options: JobOptions, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1, 2):
        raise TypeError(f"{name} must be 0, 1 or 2, not {value!r}")
    options.fast_serialization = value


def _set_cores(options: JobOptions, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TypeError(f"{name} must be an integer greater than 0, not {value!r}")
    options.cores = value


def _set_max_runtime(options: JobOptions, name: str, value: Any) -> None:
    if value is not None and value != float("inf"):
        options.max_runtime_s = 60.0 * _number(name, value, positive=True)


def _set_env_vars(options: JobOptions, name: str, value: Any) -> None:
    import os

    if isinstance(value, dict):
        pairs = dict(value)  # the user may change his
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        names = list(value)
        missing = [each for each in names if isinstance(each, str) and each not in os.environ]
        if missing:
            raise ValueError(f"{name} names variables that are not set here: {', '.join(missing)}")
        pairs = {each: os.environ[each] if isinstance(each, str) else None for each in names}
    else:
        raise TypeError(f"{name} must be a list of names, or a dict of names and values, not {value!r}")
    if not all(isinstance(key, str) and isinstance(text, str) for key, text in pairs.items()):
        raise TypeError(f"{name} must hold strings only, not {value!r}")
    options.env_vars = pairs or None


def _set_depends_on(options: JobOptions, name: str, value: Any) -> None:
    if value is None:
        return
    try:
        options.depends_on = jid_list(value, name)
    except TypeError:
        raise TypeError(f"{name} must be a jid or list of jids, not {value!r}") from None


def _set_depends_on_errors(options: JobOptions, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be 'abort' or 'ignore', not {value!r}")
    if value not in ("abort", "ignore"):
        raise ValueError(f"{name} must be 'abort' or 'ignore', not {value!r}")
    options.ignore_dependency_errors = value == "ignore"


def _set_profile(options: JobOptions, name: str, value: Any) -> None:
    options.profile = bool(value)


def _set_kill_process(options: JobOptions, name: str, value: Any) -> None:
    options.kill_process = bool(value)


def _set_retries(options: JobOptions, name: str, value: Any) -> None:
    options.retries = _integer(name, value, minimum=0)


def _set_retry_delay(options: JobOptions, name: str, value: Any) -> None:
    options.retry_delay_s = _number(name, value, positive=False)


def _check_type(options: JobOptions, name: str, value: Any) -> None:
    # Core types chose a machine on PiCloud's service; here every job runs on the machine it has.
    if value not in _CORE_TYPES:
        raise ValueError(f"{name} must be one of {', '.join(_CORE_TYPES)}, not {value!r}")


def _check_high_cpu(options: JobOptions, name: str, value: Any) -> None:
    bool(value)


_RESERVED: Final[dict[str, Callable[[JobOptions, str, Any], None]]] = {
    "_callback": lambda options, name, value: None,
    "_callback_on_error": lambda options, name, value: None,
    "_cores": _set_cores,
    "_depends_on": _set_depends_on,
    "_depends_on_errors": _set_depends_on_errors,
    "_fast_serialization": _set_fast_serialization,
    "_high_cpu": _check_high_cpu,
    "_kill_process": _set_kill_process,
    "_label": _set_label,
    "_max_runtime": _set_max_runtime,
    "_os_env_vars": _set_env_vars,
    "_priority": _set_priority,
    "_profile": _set_profile,
    "_restartable": _set_restartable,
    "_retries": _set_retries,
    "_retry_delay": _set_retry_delay,
    "_type": _check_type,
}

CALL_OPTIONS: Final = frozenset(_RESERVED)
CRON_OPTIONS: Final = CALL_OPTIONS - {"_callback", "_callback_on_error"}


def jid_list(jids: Any, verb: str) -> Jids:
    """Flatten what users may pass as jids: an int, a map's range, or any iterable mixing the two.

    Returns:
        A ``range`` if one was given, else a list of ints in the order given, duplicates kept.

    Raises:
        TypeError: Anything else; ``str`` and ``bytes`` are never sequences of jids, nor is a bool a jid.
    """
    if type(jids) is range:
        return jids
    if type(jids) is int:
        return (jids,)
    if not isinstance(jids, str | bytes | bytearray) and isinstance(jids, Iterable):
        flat: list[int] = []
        for each in jids:
            if type(each) is int:
                flat.append(each)
            elif isinstance(each, range):
                flat.extend(each)
            else:
                flat.append(_one_jid(each, verb))
        return flat
    return (_one_jid(jids, verb),)


def _one_jid(value: Any, verb: str) -> int:
    # operator.index lets numpy integers through, which users get from np.arange over jids.
    if not isinstance(value, bool | str | bytes | float) and hasattr(value, "__index__"):
        return int(value.__index__())
    raise TypeError(f"{verb} requires numeric jid(s), not {value!r}")


# --- how a job ended -------------------------------------------------------------------------------------------------

_HEADER: Final = struct.Struct("<BBHIddffI")
_SECTION: Final = struct.Struct("<BQ")

OUTCOME_HEADER_BYTES: Final = _HEADER.size
"""Of an outcome's beginning, in which its times are."""

VALUE: Final = 1  #: the pickled result
PACKED: Final = 2  #: one pickle of a list: the results of a run of map items
ERROR_TEXT: Final = 3  #: the traceback, or what happened, as text
ERROR_CHAIN: Final = 4  #: the pickled exception with its causes
STDOUT: Final = 5
STDERR: Final = 6
PROFILE: Final = 7  #: marshalled statistics of cProfile
EXITCODE: Final = 8  #: of a lost worker, as decimal text
TIMES: Final = 9
"""Beside PACKED or PICKLED, or the VALUE of an item that could have shared its outcome: records of ITEM_TIMES, of those
items that were not too small for times of their own."""
PICKLED: Final = 10  #: as PACKED, but of the results' pickles: they may be changed, or need the program to be rebuilt
VALUES: Final = (VALUE, PACKED, PICKLED)  #: one of these is there if the job is DONE

ITEM_TIMES: Final = struct.Struct("<IddffI")
"""Index in the run, then started, runtime, user and system CPU in seconds, and peak memory in kB."""


class Outcome:
    """How a job, or a run of small map items, ended. Immutable; decoded from its bytes only as far as asked.

    Attributes:
        raw: Header and sections, as the worker packed them. Values stay pickled.
    """

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    @property
    def status(self) -> int:
        """A final status code."""
        return self.raw[0]

    @property
    def pid(self) -> int:
        """Process that ran it; 0 if none did."""
        return int(_HEADER.unpack_from(self.raw)[3])

    @property
    def started(self) -> float:
        """Seconds since the epoch; 0.0 if it never started."""
        return float(_HEADER.unpack_from(self.raw)[4])

    @property
    def runtime_s(self) -> float:
        """Wall-clock seconds it ran."""
        return float(_HEADER.unpack_from(self.raw)[5])

    @property
    def usage(self) -> tuple[float, float, int]:
        """CPU seconds in user and system mode, peak resident memory of its process in bytes."""
        fields = _HEADER.unpack_from(self.raw)
        return fields[6], fields[7], fields[8] * 1024

    def sections(self) -> Iterator[tuple[int, bytes]]:
        """(tag, bytes) of all sections, in order."""
        raw, offset = self.raw, _HEADER.size
        for _ in range(raw[1]):
            tag, length = _SECTION.unpack_from(raw, offset)
            offset += _SECTION.size
            yield tag, raw[offset : offset + length]
            offset += length

    def section(self, tag: int) -> bytes | None:
        """Bytes of one section, or None."""
        return next((content for found, content in self.sections() if found == tag), None)

    def of_item(self, index: int, n: int) -> tuple[Outcome, int]:
        """The times of one item of a run, as an outcome without sections; and how many share them.

        Args:
            index: Its index in the run.
            n: Items of the run.
        """
        left_s, left = self.runtime_s, n
        for at, started, runtime_s, user_s, system_s, rss_kb in ITEM_TIMES.iter_unpack(self.section(TIMES) or b""):
            if at == index:
                fields = {"cpu_user_s": user_s, "cpu_system_s": system_s, "max_rss_kb": rss_kb}
                return Outcome(pack_outcome(DONE, pid=self.pid, started=started, runtime_s=runtime_s, **fields)), 1
            left_s, left = left_s - runtime_s, left - 1
        user_s, system_s, rss_bytes = self.usage
        fields = {"cpu_user_s": user_s, "cpu_system_s": system_s, "max_rss_kb": rss_bytes // 1024}
        runtime_s = max(0.0, left_s) / left
        return Outcome(pack_outcome(DONE, pid=self.pid, started=self.started, runtime_s=runtime_s, **fields)), left

    def text(self, tag: int) -> str | None:
        """One section as text, or None."""
        section = self.section(tag)
        return None if section is None else str(section, "utf-8", "replace")


def pack_outcome(
    status: int,
    sections: Sequence[tuple[int, bytes]] = (),
    *,
    pid: int = 0,
    started: float = 0.0,
    runtime_s: float = 0.0,
    cpu_user_s: float = 0.0,
    cpu_system_s: float = 0.0,
    max_rss_kb: int = 0,
) -> bytes:
    """Bytes of an Outcome. ``sections`` are (tag, bytes) pairs, each tag at most once."""
    parts = [
        _HEADER.pack(status, len(sections), 0, pid, started, runtime_s, cpu_user_s, cpu_system_s, max_rss_kb),
    ]
    for tag, content in sections:
        parts.append(_SECTION.pack(tag, len(content)))
        parts.append(content)
    return b"".join(parts)


_VALUE_HEADER: Final = struct.Struct("<BBHIddffIBQ")


def pack_value(
    tag: int, value: bytes, pid: int, started: float, runtime_s: float, user_s: float, system_s: float, rss_kb: int
) -> bytes:
    """``pack_outcome`` for the common case, DONE with one section, in one step."""
    return _VALUE_HEADER.pack(DONE, 1, 0, pid, started, runtime_s, user_s, system_s, rss_kb, tag, len(value)) + value


def unpack_value(raw: bytes) -> tuple[int, bytes] | None:
    """(tag, content) of an outcome that begins with its value, as nearly all do that have one; None for any other."""
    if not raw[1]:
        return None
    tag, n_bytes = _SECTION.unpack_from(raw, _HEADER.size)
    if tag not in VALUES:
        return None
    return tag, raw[_VALUE_HEADER.size : _VALUE_HEADER.size + n_bytes]


def as_killed(outcome: bytes, why: bytes) -> bytes:
    """The outcome of a job that was being killed: whatever it managed to report, it was killed."""
    before = Outcome(outcome)
    text = (before.section(ERROR_TEXT) or b"") if before.status == KILLED else b""
    sections = [(ERROR_TEXT, text if text and why == b"Killed" else why)]
    sections += [(tag, data) for tag in (STDOUT, STDERR) if (data := before.section(tag))]
    return pack_outcome(KILLED, sections, pid=before.pid, started=before.started, runtime_s=before.runtime_s)
