"""For code that is itself a job: the engine that runs it, reached over the worker's own channel.

No address and no credential is in the job; what it may do is what its channel lets it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from cloud import errors
from cloud.backends.base import Backend, Finals, MapWriter, Segment
from cloud.backends.nested import pack_jids, unpack_jids
from cloud.engine.worker.link import Link, LinkClosed
from cloud.engine.worker.surroundings import snapshot
from cloud.jobs import Jids, JobOptions, Outcome
from cloud.serialization import pickling
from cloud.serialization.functions import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BACKGROUND_S = 0.5


class _WorkerMap(MapWriter):
    def __init__(self, backend: WorkerBackend, number: int) -> None:
        self._backend = backend
        self._number = number

    def extend(self, kind: int, n: int, payload: bytes) -> None:
        self._backend.ask("extend", payload, map=self._number, kind=kind, n=n)

    def seal(self) -> range:
        answer, _ = self._backend.ask("seal", map=self._number)
        return range(answer["start"], answer["stop"])

    def abandon(self) -> None:
        self._backend.ask("abandon", map=self._number)


class _WorkerFinals(Finals):
    def __init__(self, backend: WorkerBackend, number: int, *, background: bool) -> None:
        self._backend = backend
        self._number = number
        self._background = background

    def next(self, timeout_s: float | None) -> tuple[int, int, int] | None:
        answer, _ = self._backend.ask(
            "next_final", stream=self._number, timeout_s=timeout_s, background=self._background
        )
        found = answer["found"]
        return None if found is None else (found[0], found[1], found[2])

    def watch(self, jids: Jids) -> None:
        self._backend.ask("watch", stream=self._number, jids=pack_jids(jids))

    def release(self) -> None:
        self._backend.ask("release", stream=self._number)


class WorkerBackend(Backend):
    """The engine around this job.

    Args:
        link: Its channel.
        namespace: The program's ``__main__`` in this worker.
    """

    name = "worker"
    simulated = True
    namespace: pickling.Namespace | None = None

    def __init__(self, link: Link, namespace: pickling.Namespace) -> None:
        self._link = link
        self.namespace = namespace

    def ask(self, op: str, *blobs: bytes, **content: Any) -> tuple[dict[str, Any], list[bytes]]:
        """One request and its reply.

        Raises:
            BackendClosed: The engine is gone.
            CloudException: What the engine raised.
        """
        try:
            answer, found = self._link.request({"op": op, **content}, blobs)
        except LinkClosed:
            raise errors.BackendClosed("the engine that runs this job is gone") from None
        if "error" in answer:
            kind = getattr(errors, answer["error"], errors.CloudException)
            raise kind(answer["text"], jid=answer["jid"])
        return answer, found

    def submit(self, function: Function, arguments: bytes, options: JobOptions, context: bytes | None = None) -> int:
        answer, _ = self.ask(
            "submit",
            function.payload,
            pickling.dumps_plain(snapshot()) if context is None else context,
            arguments,
            function=function.name,
            reusable=function.reusable,
            options=options.as_dict(),
        )
        jid: int = answer["jid"]
        return jid

    def open_map(self, function: Function, options: JobOptions) -> MapWriter:
        answer, _ = self.ask(
            "open_map",
            function.payload,
            pickling.dumps_plain(snapshot()),
            function=function.name,
            reusable=function.reusable,
            options=options.as_dict(),
        )
        return _WorkerMap(self, answer["map"])

    def wait(self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool) -> list[int] | None:
        return self._wait(jids, timeout_s, stop_on_error=stop_on_error, background=False)

    def _wait(self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool, background: bool) -> list[int] | None:
        # Only a wait of the job itself gives its slot to others; a thread beside it must not.
        answer, _ = self.ask(
            "wait", jids=pack_jids(jids), timeout_s=timeout_s, stop_on_error=stop_on_error, background=background
        )
        unfinished: list[int] | None = answer["unfinished"]
        return unfinished

    def when_final(self, jids: Jids, action: Callable[[], None], *, stop_on_error: bool = False) -> Callable[[], None]:
        over = threading.Event()

        def wait() -> None:
            while not over.is_set():
                try:
                    if not self._wait(jids, _BACKGROUND_S, stop_on_error=stop_on_error, background=True):
                        action()
                        return
                except errors.CloudException:
                    return

        threading.Thread(target=wait, name="cloud-wait", daemon=True).start()
        return over.set

    def on_each_final(self, jids: Jids, notify: Callable[[int, int, int], None]) -> None:
        finals = self._finals(jids, background=True)
        n_left = len(jids)

        def pull() -> None:
            left = n_left
            while left > 0:
                try:
                    found = finals.next(None)
                except errors.CloudException:
                    return
                if found is not None:
                    left -= found[1]
                    notify(*found)

        threading.Thread(target=pull, name="cloud-wait", daemon=True).start()

    def finals(self, jids: Jids) -> Finals:
        return self._finals(jids, background=False)

    def _finals(self, jids: Jids, *, background: bool) -> _WorkerFinals:
        answer, _ = self.ask("finals", jids=pack_jids(jids))
        return _WorkerFinals(self, answer["stream"], background=background)

    def outcomes(self, jids: Jids) -> list[Segment]:
        answer, blobs = self.ask("outcomes", jids=pack_jids(jids))
        return [(*numbers, blob) for numbers, blob in zip(answer["segments"], blobs, strict=True)]

    def statuses(self, jids: Jids) -> bytes:
        return self.ask("statuses", jids=pack_jids(jids))[1][0]

    def describe(self, jid: int) -> dict[str, Any]:
        answer, blobs = self.ask("describe", jid=jid)
        facts: dict[str, Any] = answer["facts"]
        if blobs:
            facts["outcome"] = Outcome(blobs[0])
        live = facts.get("live")
        if live:
            facts["live"] = {name: value.encode() if isinstance(value, str) else value for name, value in live.items()}
        return facts

    def select(
        self, *, label: str | None = None, status: Iterable[int] | None = None, function: str | None = None
    ) -> list[int]:
        codes = None if status is None else list(status)
        answer, _ = self.ask("select", label=label, status=codes, function=function)
        return list(unpack_jids(answer["jids"]))

    def cancel(self, jids: Jids | None, *, begun: bool = True) -> list[int]:
        answer, _ = self.ask("cancel", jids=None if jids is None else pack_jids(jids), begun=begun)
        pending: list[int] = answer["pending"]
        return pending

    def delete(self, jids: Jids) -> None:
        self.ask("delete", jids=pack_jids(jids))

    def connection_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self.ask("connection_info")[0]["info"]
        return info

    def close(self) -> None:
        """Nothing: the channel is the worker's, and outlives the job."""
