"""A backend whose engine is elsewhere: every verb is one request, whatever carries it."""

from __future__ import annotations

import threading
from abc import abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count

from cloud import errors
from cloud.backends.base import Backend, Finals, MapWriter, Segment
from cloud.engine.store.base import Watch, Watches
from cloud.jobs import DONE, Jids, JobOptions, Outcome
from cloud.serialization.functions import Function
from cloud.serialization.shared import SharedBytes, attach, inline
from cloud.wire import pack_jids, unpack_jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.engine.reading import Read

_BACKGROUND_S: Final = 30.0
_LENGTH_BYTES: Final = 4
_MAX_JID: Final = 1 << 63


class RemoteBackend(Backend):
    """An engine behind a connection. Subclasses carry requests to it, and say what goes with a submission."""

    def __init__(self) -> None:
        self._watcher = Watcher(lambda forget: RemoteFinals(self, (), background=True, forget=forget))

    @abstractmethod
    def ask(self, op: str, *blobs: bytes, **content: Any) -> tuple[dict[str, Any], list[bytes]]:
        """Make one request and wait for its reply: (content, blobs).

        Raises:
            BackendClosed: The engine is gone.
            CloudException: What the engine raised.
        """

    def check_open(self) -> None:
        """Return if it is open.

        Raises:
            BackendClosed: It is not.
        """
        return

    @abstractmethod
    def _submission(self, function: Function, options: JobOptions) -> dict[str, Any]:
        """What is told of a submission beside its bytes."""

    @abstractmethod
    def _surroundings(self) -> bytes:
        """This process's surroundings now, pickled."""

    # --- submitting ---------------------------------------------------------------------------------------------------

    def ask_with_call(
        self, op: str, function: Function, arguments: bytes, options: JobOptions, content: dict[str, Any]
    ) -> dict[str, Any]:
        """Make a request with a call beside, as ``submit`` has one; the content of the reply."""
        blobs = (function.payload, self._surroundings(), arguments)
        return self.ask(op, *blobs, **self._submission(function, options), **content)[0]

    def submit(self, function: Function, arguments: bytes, options: JobOptions, context: bytes | None = None) -> int:
        where = self._surroundings() if context is None else context
        answer, _ = self.ask("submit", function.payload, where, arguments, **self._submission(function, options))
        jid: int = answer["jid"]
        return jid

    def open_map(self, function: Function, options: JobOptions) -> MapWriter:
        self.check_open()
        if options.depends_on:
            try:
                self.statuses(options.depends_on)
            except errors.JobNotFound as exc:
                # Before an item is taken from what is mapped.
                raise errors.JobNotFound("This dependency does not exist.", jid=exc.jid) from None
        return RemoteMap(self, (function.payload, self._surroundings()), self._submission(function, options))

    # --- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool) -> list[int] | None:
        return self._wait(jids, timeout_s, stop_on_error=stop_on_error)[0]

    def wait_outcomes(
        self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool, read: Read | None = None
    ) -> tuple[list[int] | None, list[Segment] | None]:
        return self._wait(jids, timeout_s, stop_on_error=stop_on_error, outcomes=True)

    def _wait(
        self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool, outcomes: bool = False
    ) -> tuple[list[int] | None, list[Segment] | None]:
        content = {"timeout_s": timeout_s, "stop_on_error": stop_on_error, "background": False, "outcomes": outcomes}
        answer, blobs = self.ask("wait", jids=_pairs(jids), **content)
        unfinished, segments = answer["unfinished"], answer["segments"]
        return (
            None if unfinished is None else list(unpack_jids(unfinished)),
            None if segments is None else _with_blobs(segments, blobs),
        )

    def when_final(self, jids: Jids, action: Callable[[], None], *, stop_on_error: bool = False) -> Callable[[], None]:
        left = [len(set(jids))]
        lock = threading.Lock()

        def count_down(first: int, n: int, status: int) -> None:
            with lock:
                was = left[0]
                left[0] = 0 if stop_on_error and status != DONE else max(0, was - n)
                over = was and not left[0]
            if over:
                action()

        if not left[0]:
            action()
            return lambda: None
        self.statuses(jids)  # an unknown jid raises here
        return self._watcher.watch(jids, count_down)

    def on_each_final(self, jids: Jids, notify: Callable[[int, int, int], None]) -> None:
        self.statuses(jids)
        self._watcher.watch(jids, notify)

    def finals(self, jids: Jids) -> Finals:
        self.statuses(jids)
        return RemoteFinals(self, jids, background=False)

    # --- asking -------------------------------------------------------------------------------------------------------

    def outcomes(self, jids: Jids) -> list[Segment]:
        found: list[Segment] = []
        n_told = 0
        while n_told < len(jids) or not found:
            answer, blobs = self.ask("outcomes", jids=_pairs(jids[n_told:] if n_told else jids))
            found += _with_blobs(answer["segments"], blobs)
            if not answer["segments"]:
                break
            # One reply has so much; what is large comes in several.
            n_told += sum(n for _, n, _ in answer["segments"])
        return found

    def statuses(self, jids: Jids) -> bytes:
        return self.ask("statuses", jids=_pairs(jids))[1][0]

    def describe(self, jids: Jids) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(found) < len(jids):
            # One reply has so much; what is large comes in several.
            answer, blobs = self.ask("describe", jids=_pairs(jids[len(found) :]))
            if not answer["facts"]:
                raise errors.BackendError("the server told nothing of these jobs; is it one of this package?")
            for facts in answer["facts"]:
                if "outcome" in facts:
                    facts["outcome"] = Outcome(blobs[facts["outcome"]])
                if live := facts.get("live"):
                    live["stdout"], live["stderr"] = blobs[live["stdout"]], blobs[live["stderr"]]
                found.append(facts)
        return found

    def select(
        self, *, label: str | None = None, status: Iterable[int] | None = None, function: str | None = None
    ) -> list[int]:
        codes = None if status is None else list(status)
        answer, _ = self.ask("select", label=label, status=codes, function=function)
        return list(unpack_jids(answer["jids"]))

    def listing(
        self,
        *,
        label: str | None = None,
        status: Iterable[int] | None = None,
        function: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> tuple[list[dict[str, Any]], int | None]:
        codes = None if status is None else list(status)
        answer, _ = self.ask("list", label=label, status=codes, function=function, before=before, limit=limit)
        return answer["jobs"], answer["before"]

    def overview(self) -> dict[str, Any]:
        return self.ask("overview")[0]

    def connection_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self.ask("connection_info")[0]["info"]
        return info

    # --- ending jobs --------------------------------------------------------------------------------------------------

    def cancel(self, jids: Jids | None, *, begun: bool = True) -> list[int]:
        answer, _ = self.ask("cancel", jids=None if jids is None else _pairs(jids), begun=begun)
        return list(unpack_jids(answer["pending"]))

    def delete(self, jids: Jids) -> None:
        self.ask("delete", jids=_pairs(jids))


def _with_blobs(segments: list[tuple[int, int, int]], blobs: list[bytes]) -> list[Segment]:
    return [(*numbers, blob) for numbers, blob in zip(segments, blobs, strict=True)]


def raise_remote(answer: dict[str, Any]) -> None:
    """Raise what the engine raised, if the reply says that it did."""
    if "error" in answer:
        kind = getattr(errors, answer["error"], None)
        if not (isinstance(kind, type) and issubclass(kind, errors.CloudException)):
            kind = errors.CloudException
        error = errors.CloudException.__new__(kind)
        errors.CloudException.__init__(error, answer["text"], jid=answer.get("jid"), hint=answer.get("hint"))
        vars(error).update(answer.get("fields", {}))
        raise error


class RemoteMap(MapWriter):
    """A map on its way: chunks go out together until they are many bytes, or the first of them has waited for long.

    A map whose items come quickly is one request; the first items of a slow iterable need not wait for its last.
    """

    _SEND_BYTES: Final = 1 << 20
    _SEND_S: Final = 0.02

    def __init__(self, backend: RemoteBackend, blobs: tuple[bytes, bytes], submission: dict[str, Any]) -> None:
        self._backend = backend
        self._opening: tuple[tuple[bytes, bytes], dict[str, Any]] | None = (blobs, submission)
        self._number = 0
        self._chunks: list[tuple[int, int]] = []
        self._payloads: list[bytes] = []
        self._n_bytes = 0
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._failure: Exception | None = None

    def extend(self, kind: int, n: int, payload: bytes) -> None:
        self._backend.check_open()
        if type(payload) is SharedBytes:
            # A chunk of one item: its length, and what travels beside it.
            item = inline(attach(payload[_LENGTH_BYTES:], payload.segment))
            payload = len(item).to_bytes(_LENGTH_BYTES, "little") + item
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._chunks.append((kind, n))
            self._payloads.append(payload)
            self._n_bytes += len(payload)
            if self._n_bytes >= self._SEND_BYTES:
                self._send(sealed=False)
            elif self._timer is None:
                self._timer = threading.Timer(self._SEND_S, self._send_late)
                self._timer.daemon = True
                self._timer.start()

    def _send_late(self) -> None:
        with self._lock:
            self._timer = None
            if self._chunks:
                try:
                    self._send(sealed=False)
                except Exception as exc:  # noqa: BLE001 - raised where the map is submitted
                    self._failure = exc

    def _send(self, *, sealed: bool) -> dict[str, Any]:
        chunks, payloads = self._chunks, self._payloads
        self._chunks, self._payloads, self._n_bytes = [], [], 0
        if self._opening is not None:
            blobs, submission = self._opening
            answer, _ = self._backend.ask("open_map", *blobs, *payloads, chunks=chunks, sealed=sealed, **submission)
            self._opening = None
            self._number = answer["map"]
        else:
            answer, _ = self._backend.ask("extend", *payloads, map=self._number, chunks=chunks, sealed=sealed)
        return answer

    def seal(self) -> range:
        self._backend.check_open()
        with self._lock:
            self._stop_timer()
            if self._failure is not None:
                raise self._failure
            answer = self._send(sealed=True)
        return range(answer["start"], answer["stop"])

    def abandon(self) -> None:
        with self._lock:
            self._stop_timer()
            if self._opening is None:
                self._backend.ask("abandon", map=self._number)

    def _stop_timer(self) -> None:
        # One that waits for the lock finds nothing to send.
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


class RemoteFinals(Finals):
    """Jobs as they become final, by asking for those that were not told yet.

    Args:
        backend: Where they run.
        jids: The jobs.
        background: Nobody's job waits for this.
        forget: Told of jobs, (first jid, n), that nothing is known of any more.
    """

    _names = count(1)

    def __init__(
        self,
        backend: RemoteBackend,
        jids: Jids,
        *,
        background: bool,
        forget: Callable[[int, int], None] = lambda first, n: None,
    ) -> None:
        self._backend = backend
        self._background = background
        self._forget = forget
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._left: list[tuple[int, int]] = []
        self._seen: deque[tuple[int, int, int]] = deque()
        self._poll: str | None = None
        self._released = self._changed = False
        self.watch(jids)

    def watch(self, jids: Jids) -> None:
        with self._lock:
            self._left = _united(self._left, _pairs(jids))
            self._changed = True
            poll = self._poll
            self._news.notify_all()
        if poll is not None:
            self._backend.ask("release", poll=poll)

    def close(self) -> None:
        """Make ``next`` return, asking nobody: the connection is closed."""
        with self._lock:
            self._released = True
            self._news.notify_all()

    def release(self) -> None:
        with self._lock:
            self._released = True
            poll = self._poll
            self._news.notify_all()
        if poll is not None:
            self._backend.ask("release", poll=poll)

    def next(self, timeout_s: float | None) -> tuple[int, int, int] | None:
        while True:
            with self._lock:
                if self._seen:
                    return self._seen.popleft()
                if self._released:
                    self._released = False
                    return None
                self._changed = False
                if not self._left:
                    # Nothing to ask for until somebody adds some.
                    if not self._news.wait(timeout_s):
                        return None
                    continue
                left = list(self._left)
                # Named by this object: a release that comes before the poll it is meant for waits for that.
                self._poll = poll = f"{id(self):x}.{next(self._names)}"
            try:
                answer, _ = self._backend.ask(
                    "finals", jids=left, timeout_s=timeout_s, poll=poll, background=self._background
                )
            finally:
                with self._lock:
                    self._poll = None
            found = [(first, n, status) for first, n, status in answer["found"]]
            for low, high in answer["gone"]:
                self._forget(low, high - low)
            with self._lock:
                self._left = _without(self._left, [*found, *((low, high - low, 0) for low, high in answer["gone"])])
                self._seen.extend(found)
                if not found and not answer["gone"] and not self._released and not self._changed:
                    return None


def _pairs(jids: Jids) -> list[tuple[int, int]]:
    pairs = pack_jids(jids)
    for start, stop in pairs:
        if start < 0 or stop > _MAX_JID:
            # No message may have such a number.
            raise errors.JobNotFound("Does not exist or was purged from cache", jid=start if start < 0 else stop - 1)
    return pairs


def _united(runs: list[tuple[int, int]], more: Iterable[Iterable[int]]) -> list[tuple[int, int]]:
    united: list[tuple[int, int]] = []
    for start, stop in sorted([*runs, *((start, stop) for start, stop in more)]):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(stop, united[-1][1])
        else:
            united.append((start, stop))
    return united


def _without(runs: list[tuple[int, int]], found: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    starts = [start for start, _ in runs]
    gone: dict[int, list[tuple[int, int]]] = {}
    for first, n, _ in found:
        gone.setdefault(bisect_right(starts, first) - 1, []).append((first, first + n))
    left: list[tuple[int, int]] = []
    for at, (begin, stop) in enumerate(runs):
        start = begin
        for low, high in sorted(gone.get(at, ())):
            if start < low:
                left.append((start, low))
            start = high
        if start < stop:
            left.append((start, stop))
    return left


class Watcher:
    """Calls back when jobs become final, from one thread that lives while any are watched.

    Args:
        open_finals: Makes what the thread waits on.
    """

    def __init__(self, open_finals: Callable[[Callable[[int, int], None]], RemoteFinals]) -> None:
        self._open_finals = open_finals
        self._lock = threading.Lock()
        self._watches = Watches()
        self._left: dict[Watch, int] = {}
        self._finals: RemoteFinals | None = None

    def watch(self, jids: Jids, notify: Callable[[int, int, int], None]) -> Callable[[], None]:
        """Call ``notify(first jid, n, status)`` for each run of these jobs that becomes final, or is; once a job.

        Returns:
            A function that calls it off.
        """
        watches = [Watch(start, stop, notify) for start, stop in _united([], _pairs(jids))]
        with self._lock:
            for each in watches:
                self._watches.add(each)
            finals = self._finals
            if finals is None:
                finals = self._finals = self._open_finals(self._forget)
                threading.Thread(target=self._run, args=(finals,), name="cloud-watch", daemon=True).start()
        finals.watch(jids)

        def call_off() -> None:
            with self._lock:
                for each in watches:
                    self._watches.remove(each)
                over = not self._watches
            if over:
                finals.release()

        return call_off

    def close(self) -> None:
        """Watch nothing any more."""
        with self._lock:
            self._watches = Watches()
            self._left.clear()
            finals = self._finals
        if finals is not None:
            finals.close()

    def _forget(self, first: int, n: int) -> None:
        with self._lock:
            self._count(first, n)

    def _count(self, first: int, n: int) -> list[Watch]:
        """Who watches these; those that were told of all they watch go."""
        watching = self._watches.take(first, n)
        for watch in watching:
            left = self._left.get(watch, watch.stop - watch.start)
            left -= min(first + n, watch.stop) - max(first, watch.start)
            if left:
                self._left[watch] = left
            else:
                self._left.pop(watch, None)
                self._watches.remove(watch)
        return watching

    def _run(self, finals: RemoteFinals) -> None:
        while True:
            with self._lock:
                if not self._watches:
                    self._finals = None
                    return
            try:
                found = finals.next(_BACKGROUND_S)
            except errors.CloudException:
                # The connection was closed, or a job deleted: whoever waits for these hears no more of them.
                with self._lock:
                    self._watches, self._finals = Watches(), None
                    self._left.clear()
                return
            if found is None:
                continue
            first, n, status = found
            with self._lock:
                watching = self._count(first, n)
            for watch in watching:
                low, high = max(first, watch.start), min(first + n, watch.stop)
                try:
                    watch.notify(low, high - low, status)
                except errors.BackendClosed:
                    return  # meanwhile; nobody is told any more
