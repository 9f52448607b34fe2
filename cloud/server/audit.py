"""The audit log: who did what, with which key, from where, when, and to what; one line of JSON each.

Owns the file's format and how lines get into it. What is worth a line is the business of whoever records.

Each line ends with its own SHA-256 and holds that of the line before. Changing, removing or inserting a line breaks
the chain at that place, which `verify` finds. Whoever can write the file can also write it anew from some line to the
end, chain and all: keep the head that `verify` tells, or copies of the file, elsewhere to notice that, too.

Several processes may record into one file, such as a server and the operator's commands: each line is appended under
a lock of the file. A line is in the file, and so safe from the end of this process, when ``record`` returns. It is
safe from power loss within a second of traffic: ``record`` itself waits for the disk when the last wait is a second
ago or more, and ``sync`` and ``close`` do it for the last lines. No thread and no timer is behind it.

A process killed while it wrote leaves part of a line. The next one to record cuts that off, and says so in a line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cloud.resources import make_folder

__all__ = ["AuditLog", "Verdict", "records", "verify"]

SYNC_EVERY_S: Final = 1.0

_FIRST: Final = "0" * 64
_END: Final = re.compile(rb',"hash":"([0-9a-f]{64})"\}')
_N_END: Final = len(',"hash":""}') + 64
_MAX_CHARS: Final = 1000
_MAX_ITEMS: Final = 100
_TAIL_BYTES: Final = 1 << 16

_SECRET: Final = re.compile(r"cld_[A-Za-z0-9_-]{16,}")
_SECRET_NAMES: Final = re.compile("secret|password|authorization|pepper", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `verify` found."""

    n_lines: int  #: Lines that are sound, from the first on.
    head: str  #: Hash of the last of them: with it, this state of the log can be recognized later.
    bad_line: int | None = None  #: The first line that is not sound, from 1; None when all are.
    problem: str = ""  #: What is wrong with it.


class AuditLog:
    """Appends to one audit log. Safe in threads and beside other processes.

    Args:
        path: The file; made with its folder, readable by its owner only, by the first record.
        now: Seconds since the epoch.
        clock: Monotonic seconds.
    """

    def __init__(
        self, path: str, now: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = os.path.abspath(path)
        self._now = now
        self._clock = clock
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        # The end of the file as we left it. Another end means that another process has written.
        self._end_bytes = -1
        self._hash = _FIRST
        self._synced_s = float("-inf")
        self._is_synced = True

    def record(
        self, who: str | None, key: int | None, address: str | None, action: str, target: object, **details: object
    ) -> None:
        """Append one line; it is in the file when this returns. Waits for the disk at most once a second.

        Secrets of API keys are blacked out wherever they occur, and long texts are cut.

        Args:
            who: The user; None for nobody who signed in.
            key: Number of the API key; None for a password, or an operator at the machine itself.
            address: Where the request came from.
            action: What was done, such as the name of the operation.
            target: To what: jids, a name, a number; what JSON knows.
            details: More of that.

        Raises:
            OSError: It cannot be written, and the file is as before.
            ValueError: A detail has a name such as "password": what is so called does not belong here.
        """
        secret = next((name for name in details if _SECRET_NAMES.search(name)), None)
        if secret is not None:
            raise ValueError(f"{secret!r} must not be recorded: leave it out")
        with self._lock, self._locked() as descriptor:
            self._find_end(descriptor)
            facts = {"who": who, "key": key, "address": address, "action": action, "target": target}
            self._append(descriptor, {**facts, "details": details})
            self._is_synced = False
            if self._clock() - self._synced_s >= SYNC_EVERY_S:
                self._sync()

    def sync(self) -> None:
        """Wait until all recorded lines are on disk."""
        with self._lock:
            self._sync()

    def close(self) -> None:
        """Sync and close the file. Idempotent; a later record opens it anew."""
        with self._lock:
            descriptor = self._descriptor
            if descriptor is None:
                return
            try:
                self._sync()
            finally:
                self._descriptor = None
                os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        if self._descriptor is None:
            make_folder(os.path.dirname(self._path))
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            self._end_bytes = -1
            if os.geteuid() == 0:
                # An operator may be root where the server is not: it must be able to write what root has made.
                owner = os.stat(os.path.dirname(self._path))
                os.fchown(self._descriptor, owner.st_uid, owner.st_gid)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield self._descriptor
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _find_end(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size == self._end_bytes:
            return
        # Whoever wrote has let go of the lock: if its last line is not whole, it is dead.
        line, end = _last_line(descriptor, size)
        self._hash, self._end_bytes = _hash_of(line), end
        if end < size:
            os.ftruncate(descriptor, end)
            facts = {"who": None, "key": None, "address": None, "action": "audit.repair", "target": None}
            self._append(descriptor, {**facts, "details": {"removed_bytes": size - end}})

    def _append(self, descriptor: int, facts: dict[str, object]) -> None:
        at = datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds")
        facts = {"at": at, **{name: _clean(value) for name, value in facts.items()}, "prev": self._hash}
        body = json.dumps(facts, separators=(",", ":"), allow_nan=False).encode()
        found = hashlib.sha256(body).hexdigest()
        line = b'%s,"hash":"%s"}\n' % (body[:-1], found.encode())
        try:
            # One write: a reader without the lock sees the whole line or none of it, as a rule.
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written to {self._path}")
        except OSError:
            os.ftruncate(descriptor, self._end_bytes)
            raise
        self._hash, self._end_bytes = found, self._end_bytes + len(line)

    def _sync(self) -> None:
        if self._descriptor is not None and not self._is_synced:
            os.fsync(self._descriptor)
            self._is_synced, self._synced_s = True, self._clock()


def verify(path: str) -> Verdict:
    """Check every line of an audit log, up to the first that is not sound. May run while others record.

    Raises:
        OSError: It cannot be read.
    """
    n_lines, head = 0, _FIRST
    for line in _lines(path):
        problem = _problem(line, head)
        if problem:
            return Verdict(n_lines=n_lines, head=head, bad_line=n_lines + 1, problem=problem)
        n_lines, head = n_lines + 1, _hash_of(line.rstrip(b"\n"))
    return Verdict(n_lines=n_lines, head=head)


def records(path: str) -> Iterator[dict[str, Any]]:
    """Yield what the lines of an audit log say, without checking them; for one that is no JSON, where it stands.

    Raises:
        OSError: It cannot be read.
    """
    for number, line in enumerate(_lines(path), 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        yield found if isinstance(found, dict) else {"unreadable_line": number}


def _lines(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        # Between two records: what is written from now on is not looked at.
        fcntl.flock(file, fcntl.LOCK_SH)
        left = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        while left > 0 and (line := file.readline(left)):
            left -= len(line)
            yield line


def _problem(line: bytes, prev: str) -> str:
    if not line.endswith(b"\n"):
        return "it is not whole: who wrote it was stopped, and the next record will repair that"
    body, end = line[: -1 - _N_END], _END.fullmatch(line[-1 - _N_END : -1])
    if end is None:
        return "it does not end with its hash"
    if hashlib.sha256(body + b"}").hexdigest() != end[1].decode():
        return "it was changed: its hash is another"
    try:
        facts = json.loads(body + b"}")
    except ValueError:
        return "it is no JSON"
    if not isinstance(facts, dict) or facts.get("prev") != prev:
        return "it does not follow the line before: lines were removed, inserted or exchanged"
    return ""


def _last_line(descriptor: int, size: int) -> tuple[bytes, int]:
    """The last whole line, without its end, and where it ends."""
    tail, start = b"", size
    while start > 0:
        n = min(_TAIL_BYTES, start)
        start -= n
        tail = os.pread(descriptor, n, start) + tail
        end = tail.rfind(b"\n")
        begin = tail.rfind(b"\n", 0, max(end, 0))
        if end >= 0 and (begin >= 0 or start == 0):
            return tail[begin + 1 : end], start + end + 1
    return b"", 0


def _hash_of(line: bytes) -> str:
    if not line:
        return _FIRST
    end = _END.fullmatch(line[-_N_END:])
    # A line that somebody damaged: recording goes on, and `verify` tells of it.
    return end[1].decode() if end else hashlib.sha256(line).hexdigest()


def _clean(value: object) -> object:
    """The value as it may stand in the log: what JSON knows, not too long, and no secrets."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, dict):
        items = list(value.items())[:_MAX_ITEMS]
        return {
            str(_clean(str(name))): "[removed]" if _SECRET_NAMES.search(str(name)) else _clean(each)
            for name, each in items
        }
    if isinstance(value, list | tuple | set | frozenset):
        shown = [_clean(each) for each in list(value)[:_MAX_ITEMS]]
        return shown if len(value) <= _MAX_ITEMS else [*shown, f"and {len(value) - _MAX_ITEMS} more"]
    text = value if isinstance(value, str) else repr(value)
    # Before it is cut, which might leave part of a secret that is not recognized.
    text = _SECRET.sub("cld_[removed]", text)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}[cut]"
