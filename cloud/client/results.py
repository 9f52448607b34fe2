"""Outcomes into values, and into the exceptions that failed jobs raise in the client."""

from __future__ import annotations

from collections import deque

from cloud.backends.base import Segment
from cloud.errors import CloudException, JobFailed, JobKilled, JobStalled, SerializationError, WorkerLost
from cloud.jobs import (
    DONE,
    ERROR_CHAIN,
    ERROR_TEXT,
    EXITCODE,
    KILLED,
    PACKED,
    PICKLED,
    STALLED,
    STATUS_LABELS,
    VALUE,
    VALUES,
    Jids,
    Outcome,
    unpack_value,
)
from cloud.serialization import pickling
from cloud.serialization.exceptions import loads_exception
from cloud.serialization.flat import PICKLE, REFERENCE, loads_plain
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import SharedBytes, attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_last_read: Final[deque[tuple[bytes, list[Any]]]] = deque(maxlen=1)
"""The outcome that was read in part last, and its values; nothing once its end was read."""


class Ahead:
    """Values that were rebuilt while other jobs of a map still ran: those for which no code of the user's runs.

    Attributes:
        values: Of the first jobs, as far as those of all before are here.
        later: Indices of values that are pickles still.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.later: list[int] = []
        self._parts: dict[int, tuple[list[Any], list[int]]] = {}

    def read(self, at: int, raw: bytes) -> None:
        """Rebuild what an outcome holds that many jobs share from that one on; what fails is left for ``decode``."""
        found = unpack_value(raw) if raw[0] == DONE else None
        if found is None or found[0] == VALUE:
            return
        try:
            many, later = pickling.loads_list(found[1]), []
            if found[0] == PICKLED:
                for index, each in enumerate(many):
                    if each[0] == PICKLE and REFERENCE not in each:
                        many[index] = loads_plain(each)
                    else:
                        later.append(index)
        except Exception:  # noqa: BLE001 - it fails there again, for the job that it is about
            return
        self._parts[at] = many, later
        while self.take(len(self.values), self.values, self.later):
            pass

    def take(self, at: int, values: list[Any], later: list[int]) -> bool:
        """Move what was read of the jobs from that one on to the end of these lists; False if nothing was."""
        part = self._parts.pop(at, None)
        if part is None:
            return False
        later += [len(values) + index for index in part[1]]
        values += part[0]
        return True


def decode(
    jids: Jids, segments: list[Segment], namespace: Namespace | None, ahead: Ahead | None = None
) -> tuple[list[Any], list[CloudException]]:
    """The value of each job in order; a failed job's CloudException takes its place. And these exceptions again."""
    values, later = ([], []) if ahead is None else (ahead.values, ahead.later)
    failures: dict[int, CloudException] = {}
    at, n_known = 0, len(values)
    for skip, n, length, raw in segments:
        if at < n_known or (ahead is not None and ahead.take(at, values, later)):
            pass
        elif raw[0] == DONE:
            tag, content = unpack_value(raw) or _find_value(raw)
            if type(raw) is SharedBytes:
                content = attach(content, raw.segment)
            if tag == VALUE:
                later.append(at)
                values.append(content)
            else:
                if tag == PICKLED:
                    later += range(at, at + n)
                values += _unpacked(raw, content, skip, n, length)
        else:
            for index in range(at, at + n):
                failures[index] = failure(jids[index], Outcome(raw), namespace)
                values.append(failures[index])
        at += n
    for index in later:
        each = values[index]
        try:
            # As loads finds it, without a call for each.
            plain = type(each) is bytes and each[0] == PICKLE and REFERENCE not in each
            values[index] = loads_plain(each) if plain else pickling.loads(each, namespace)
        except Exception as exc:  # noqa: BLE001 - rebuilding runs the user's code
            values[index] = failures[index] = _unreadable(jids[index], exc)
    return values, [failures[index] for index in sorted(failures)] if failures else []


def shared_values(segment: Segment) -> list[Any] | None:
    """The values of jobs that share an outcome, all of them immutable; None if they do not."""
    skip, n, length, raw = segment
    if n == 1 or raw[0] != DONE:
        return None
    tag, content = unpack_value(raw) or _find_value(raw)
    return _unpacked(raw, content, skip, n, length) if tag == PACKED else None


def _unpacked(raw: bytes, content: bytes, skip: int, n: int, length: int) -> list[Any]:
    if n == length:
        return pickling.loads_list(content)
    # Whoever asks for jobs one by one would have thousands of values rebuilt for each; these are immutable, or pickles.
    many = next((values for held, values in tuple(_last_read) if held is raw), None)
    if many is None:
        many = pickling.loads_list(content)
        _last_read.append((raw, many))
    if skip + n == length:
        _last_read.clear()  # he has come to its end
    return many[skip : skip + n]


def _find_value(raw: bytes) -> tuple[int, bytes]:
    return next((tag, content) for tag, content in Outcome(raw).sections() if tag in VALUES)


def _unreadable(jid: int, cause: Exception) -> SerializationError:
    error = SerializationError(
        f"the job's result cannot be rebuilt here ({type(cause).__name__}: {cause})",
        jid=jid,
        status="done",
        hint="Is every module it needs importable in this process?",
    )
    error.__cause__ = cause
    return error


def failure(jid: int, outcome: Outcome, namespace: Namespace | None) -> CloudException:
    """The exception for a job that ended badly, its own exception as ``__cause__`` where it can be rebuilt."""
    status = outcome.status
    label = STATUS_LABELS[status]
    text = outcome.text(ERROR_TEXT) or label
    error: CloudException
    if status == KILLED:
        error = JobKilled(text, jid=jid, status=label)
    elif status == STALLED:
        error = JobStalled(text, jid=jid, status=label)
    elif outcome.section(ERROR_CHAIN) is None and text.startswith(("The job's worker", "Worker processes")):
        error = WorkerLost(text, jid=jid, status=label)
        exitcode = outcome.text(EXITCODE)
        if exitcode is not None:
            error.exitcode = int(exitcode)
    else:
        error = JobFailed(text, jid=jid, status=label)
    chain = outcome.section(ERROR_CHAIN)
    if chain is not None:
        error.__cause__ = loads_exception(chain, namespace)
    return error
