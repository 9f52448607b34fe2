"""Reports of what is serialised for each job, as files: what ``serialize_logging`` asks for.

::

    <home>/datalogs/<Multiprocessing|Simulation>/<date>.<hhmmss>[-n]/     one folder a run, UTC, made with its first job
        call.<module>.<function>.<jid>.json  .stdout  .stderr             a call; its result is added when it ends
        map.<module>.<function>.<first jid>.json                          a map, once for all of its jobs
        map.<module>.<function>.<first jid>.results.jsonl                 a line for each of them that has ended
        map.<module>.<function>.<first jid>.<jid>.stdout  .stderr         if it printed anything

Objects are described in the thread that submits, before they can change. Everything else (files, rebuilding a result
to see what it is) happens on one thread, in order, so that no job and no submission waits for a disk. The first
failure ends the reports of this run with one message; no job notices.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue

from cloud.configuration import home_path
from cloud.errors import JobNotFound
from cloud.jobs import DONE, ERROR_TEXT, PACKED, PICKLED, STATUS_LABELS, STDERR, STDOUT, VALUE, Outcome
from cloud.logs import logger
from cloud.serialization import pickling
from cloud.serialization.describe import describe_arguments, describe_function, describe_value, type_name
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import SharedBytes, attach, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, Protocol

    from cloud.serialization.functions import Function
    from cloud.settings import Settings

    class Jobs(Protocol):
        """What the reports need of a backend."""

        @property
        def namespace(self) -> Namespace | None: ...
        def now(self) -> float: ...
        def outcomes(self, jids: range) -> list[tuple[int, int, int, bytes]]: ...
        def on_each_final(self, jids: range, notify: Callable[[int, int, int], None]) -> None: ...


__all__ = ["DataLog", "MapReport"]

_RUN: Final = re.compile(r"\d{4}-\d\d-\d\d\.\d{6}(-\d+)?")
_DAY_S: Final = 86_400
_MAX_NAME: Final = 150
_CLOSE_S: Final = 5.0


class DataLog:
    """The reports of one run: of the jobs of one backend, from its opening to its end. Thread-safe.

    Args:
        settings: ``serialize_logging_path`` and ``purge_days``.
        kind: 'Multiprocessing' or 'Simulation'.
    """

    def __init__(self, settings: Settings, kind: str) -> None:
        self._base = home_path(settings.serialize_logging_path)
        self._kind = kind
        self._purge_days = settings.purge_days
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._folder = ""
        self._over = False

    def called(
        self,
        backend: Jobs,
        jid: int,
        function: Function,
        size_bytes: int,
        func: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Report a call that was just submitted, and, once it has ended, its result. Does not block.

        Args:
            backend: Has the job.
            jid: Of the job.
            function: As it travels.
            size_bytes: Of its pickled arguments.
            func, args, kwargs: What was called, if this process has it (a cron's function is bytes here).
        """
        if self._over:
            return
        report = _head(backend, function, func)
        report["jid"] = jid
        report["arguments"] = {"size_bytes": size_bytes}
        if func is not None:
            report["arguments"]["items"] = describe_arguments(func, args, kwargs or {}, backend.namespace)
        report["result"] = None
        name = f"call.{_safe(function.name)}.{jid}"

        def ended(found: range, results: list[dict[str, Any]], outcome: Outcome) -> None:
            report["result"] = results[0]
            self.write(f"{name}.json", _document(report))
            for tag, stream in ((STDOUT, "stdout"), (STDERR, "stderr")):
                self.write(f"{name}.{stream}", outcome.section(tag) or b"")

        self.do(lambda: self.write(f"{name}.json", _document(report)))
        self.watch(backend, range(jid, jid + 1), ended)

    def mapping(self, backend: Jobs, function: Function, func: Callable[..., Any]) -> MapReport:
        """Begin the report of a map."""
        return MapReport(self, backend, function, func)

    def watch(self, backend: Jobs, jids: range, ended: Callable[[range, list[dict[str, Any]], Outcome], None]) -> None:
        """Have ``ended(jids, results, outcome)`` called, on the reports' thread, for each run of them that ends."""

        def notify(first: int, n: int, status: int) -> None:
            # Under the engine's lock. The outcomes are taken now: the program may delete the job at any time.
            at = first
            for skip, wanted, length, raw in backend.outcomes(range(first, first + n)):
                self.do(partial(tell, range(at, at + wanted), skip, length, Outcome(raw)))
                at += wanted

        def tell(found: range, skip: int, length: int, outcome: Outcome) -> None:
            results = _results(outcome, length, backend.namespace)
            ended(found, results[skip : skip + len(found)], outcome)

        try:
            backend.on_each_final(jids, notify)
        except JobNotFound:
            pass  # it has ended, and mp_cache_size_limit made the engine forget it

    def do(self, action: Callable[[], None]) -> None:
        """Have an action done on the thread of the reports, after those before it."""
        if self._over:
            return
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="cloud-datalogs", daemon=True)
                    self._thread.start()
        self._queue.put(action)

    def write(self, name: str, content: bytes, *, append: bool = False) -> None:
        """Write a file into the folder of this run. Blocks; on the thread of the reports only."""
        if not self._folder:
            self._folder = self._begin()
        with open(os.path.join(self._folder, name), "ab" if append else "wb") as file:
            file.write(content)

    def close(self) -> None:
        """Write what is still to be written, for 5 s at most. Idempotent; nothing is reported afterwards."""
        with self._lock:
            thread, self._over = self._thread, True
        if thread is not None and thread is not threading.current_thread():
            self._queue.put(None)
            thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                action()
            except Exception as exc:  # noqa: BLE001 - a report is never worth more than the program
                self._over = True
                logger("Cloud.datalogs").error(
                    "reports of jobs cannot be written to %s, and this run goes on without: %s", self._base, exc
                )
                return

    def _begin(self) -> str:
        folder = os.path.join(self._base, self._kind)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if self._purge_days:
            _purge(folder, time.time() - self._purge_days * _DAY_S)
        stamp = datetime.now(UTC).strftime("%Y-%m-%d.%H%M%S")
        n = 1
        while True:
            path = os.path.join(folder, stamp if n == 1 else f"{stamp}-{n}")
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                n += 1
                continue
            return path


class MapReport:
    """The report of one map while it is being submitted.

    Attributes:
        size_bytes: Of the pickled items; added up by who submits them.
    """

    def __init__(self, log: DataLog, backend: Jobs, function: Function, func: Callable[..., Any]) -> None:
        self._log = log
        self._backend = backend
        self._name = f"map.{_safe(function.name)}"
        self._report = _head(backend, function, func)
        self._types: Counter[tuple[str, ...]] = Counter()
        self.size_bytes = 0

    def counting(self, items: Iterator[Any], *, tuples: bool) -> Iterator[Any]:
        """The same items, each noted by the types of its arguments as it passes."""
        for item in items:
            self._types[tuple(map(type_name, item if tuples else (item,)))] += 1
            yield item

    def submitted(self, jids: range) -> None:
        """Write the report, and a line of results for each job when it ends."""
        self._report |= {
            "jids": [jids.start, jids.stop - 1],
            "n_jobs": len(jids),
            "arguments": {
                "size_bytes": self.size_bytes,
                "items": [{"types": list(types), "n_jobs": n} for types, n in self._types.most_common()],
            },
        }
        name = f"{self._name}.{jids.start}"

        def ended(found: range, results: list[dict[str, Any]], outcome: Outcome) -> None:
            lines = [json.dumps({"jid": jid, **result}) for jid, result in zip(found, results, strict=True)]
            self._log.write(f"{name}.results.jsonl", "".join(f"{line}\n" for line in lines).encode(), append=True)
            for tag, stream in ((STDOUT, "stdout"), (STDERR, "stderr")):
                printed = outcome.section(tag)
                if printed:
                    self._log.write(f"{name}.{found.start}.{stream}", printed)

        self._log.do(lambda: self._log.write(f"{name}.json", _document(self._report)))
        self._log.watch(self._backend, jids, ended)


def _head(backend: Jobs, function: Function, func: Callable[..., Any] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": function.name, "size_bytes": size_of(function.payload)}
    if func is not None:
        try:
            facts |= describe_function(func, backend.namespace)
        except Exception as exc:  # noqa: BLE001 - objects that look like functions may raise anything
            facts["error"] = f"{type(exc).__name__}: {exc}"
    return {"submitted": datetime.fromtimestamp(backend.now(), UTC).isoformat(), "function": facts}


def _results(outcome: Outcome, n: int, namespace: Namespace | None) -> list[dict[str, Any]]:
    """What each of the n jobs of an outcome returned, or how else it ended."""
    facts: dict[str, Any] = {"status": STATUS_LABELS[outcome.status], "runtime_s": outcome.runtime_s / n}
    if outcome.status != DONE:
        return [{**facts, "exception": outcome.text(ERROR_TEXT)}] * n
    packed = outcome.section(PACKED)
    if packed is not None:
        return [{**facts, **describe_value(value, namespace)} for value in pickling.loads_list(packed)]
    pickled = outcome.section(PICKLED)
    if pickled is not None:
        return [{**facts, **_describe_pickle(content, namespace)} for content in pickling.loads_list(pickled)]
    content = outcome.section(VALUE) or b""
    if isinstance(outcome.raw, SharedBytes):
        content = attach(content, outcome.raw.segment)
    return [{**facts, **_describe_pickle(content, namespace)}]


def _describe_pickle(content: bytes, namespace: Namespace | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"size_bytes": size_of(content)}
    try:
        facts["type"] = type_name(pickling.loads(content, namespace))
    except BaseException as exc:  # noqa: BLE001 - rebuilding runs the user's code
        facts["error"] = f"cannot be rebuilt here: {type(exc).__name__}: {exc}"
    return facts


def _document(report: dict[str, Any]) -> bytes:
    return json.dumps(report, indent=2).encode() + b"\n"


def _safe(name: str) -> str:
    """A function's name as a part of a file name: ``f.<locals>.<lambda>`` becomes ``f.locals.lambda``."""
    return re.sub(r"[^\w.-]", "_", re.sub(r"[<>]", "", name), flags=re.ASCII)[-_MAX_NAME:]


def _purge(folder: str, before: float) -> None:
    # By the last change, not by the name: a program that has run for weeks may still be writing.
    with os.scandir(folder) as entries:
        old = [
            entry.path
            for entry in entries
            if _RUN.fullmatch(entry.name)
            and entry.is_dir(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_mtime < before
        ]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
