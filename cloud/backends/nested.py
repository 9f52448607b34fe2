"""Answers the verbs that jobs use: the engine's end of ``backends.worker``, over the worker's channel.

Nothing here is unpickled. Waits are answered when the jobs are final; the waiting job's slot is free meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cloud.backends.base import MapWriter
from cloud.backends.local import LocalBackend
from cloud.engine.store.base import Batch
from cloud.errors import CloudException
from cloud.jobs import DONE, VALUE, Jids, JobOptions, Outcome, pack_outcome
from cloud.serialization.functions import Function
from cloud.serialization.shared import SharedBytes, attach, inline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Reply = Callable[..., None]


def pack_jids(jids: Jids) -> list[list[int]]:
    """Jids as [start, stop] pairs."""
    if type(jids) is range and jids.step == 1:
        return [[jids.start, jids.stop]]
    pairs: list[list[int]] = []
    for jid in jids:
        if pairs and pairs[-1][1] == jid:
            pairs[-1][1] = jid + 1
        else:
            pairs.append([jid, jid + 1])
    return pairs


def unpack_jids(pairs: list[list[int]]) -> Jids:
    """The jids of ``pack_jids``."""
    if len(pairs) == 1:
        return range(*pairs[0])
    return [jid for start, stop in pairs for jid in range(start, stop)]


def _inline(raw: bytes) -> bytes:
    """An outcome with what travelled beside it put into its bytes: a reply carries bytes only."""
    if type(raw) is not SharedBytes:
        return raw
    outcome = Outcome(raw)
    sections = []
    for tag, content in outcome.sections():
        sections.append((tag, inline(attach(content, raw.segment)) if tag == VALUE else content))
    user_s, system_s, rss_bytes = outcome.usage
    return pack_outcome(
        outcome.status,
        sections,
        pid=outcome.pid,
        started=outcome.started,
        runtime_s=outcome.runtime_s,
        cpu_user_s=user_s,
        cpu_system_s=system_s,
        max_rss_kb=rss_bytes // 1024,
    )


def _refuse(exc: CloudException, reply: Reply) -> None:
    reply({"error": type(exc).__name__, "text": str(exc.parameter), "jid": exc.jid})


class _Stream:
    """Jobs that became final and were not asked for, or the request that waits for the next."""

    def __init__(self) -> None:
        self.seen: deque[tuple[int, int, int]] = deque()
        self.waiter: Callable[[tuple[int, int, int] | None], None] | None = None
        self.released = False

    def add(self, first: int, n: int, status: int) -> None:
        if self.waiter is not None:
            self.waiter((first, n, status))
        else:
            self.seen.append((first, n, status))


class NestedRequests:
    """Serves requests of jobs over a local backend; called under the engine's lock."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self._maps: dict[int, MapWriter] = {}
        self._n_maps = 0
        self._functions: dict[bytes, Function] = {}
        self._streams: dict[int, _Stream] = {}

    def __call__(
        self, caller: Any, batch: Batch | None, content: dict[str, Any], blobs: list[bytes], reply: Reply
    ) -> None:
        """Answer one request; errors travel back as class name and arguments."""
        try:
            handler = getattr(self, f"_on_{content['op']}")
            depth = 1 if batch is None else batch.depth + 1
            handler(caller, depth, content, blobs, reply)
        except CloudException as exc:
            _refuse(exc, reply)

    def _function(self, content: dict[str, Any], payload: bytes) -> Function:
        # The same function again, perhaps from another worker, is one function: its runtimes tell how to send it.
        function = self._functions.get(payload)
        if function is None:
            if len(self._functions) > 256:
                self._functions.clear()
            function = Function(payload, content["function"], reusable=content["reusable"])
            if function.reusable:
                self._functions[payload] = function
        return function

    def _on_submit(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        payload, context, arguments = blobs
        options = JobOptions.from_dict(content["options"])
        function = self._function(content, payload)
        reply({"jid": self._backend.submit(function, arguments, options, context, depth)})

    def _on_open_map(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        payload, context = blobs
        options = JobOptions.from_dict(content["options"])
        self._n_maps += 1
        self._maps[self._n_maps] = self._backend.open_map_as(self._function(content, payload), context, options, depth)
        reply({"map": self._n_maps})

    def _on_extend(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        self._maps[content["map"]].extend(content["kind"], content["n"], blobs[0])
        reply({})

    def _on_seal(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        jids = self._maps.pop(content["map"]).seal()
        reply({"start": jids.start, "stop": jids.stop})

    def _on_abandon(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        self._maps.pop(content["map"]).abandon()
        reply({})

    def _on_wait(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        engine = self._backend.engine
        jids = unpack_jids(content["jids"])
        if content["background"]:
            caller = None
        over: list[bool] = []
        ends: list[Callable[[], None]] = []

        def answer() -> None:
            if over:
                return
            over.append(True)
            for end in ends:
                end()
            self._resume(caller)
            try:
                codes = engine.statuses(jids)
            except CloudException as exc:
                # Deleted meanwhile, or purged. Nobody above could answer: this is called where a job's end is recorded.
                _refuse(exc, reply)
                return
            unfinished = (
                None
                if content["stop_on_error"] and max(codes, default=0) > DONE
                else [jid for jid, code in zip(jids, codes, strict=True) if code < DONE]
            )
            reply({"unfinished": unfinished})

        codes = engine.statuses(jids)
        self._suspend(caller)
        if content["timeout_s"] == 0 or all(code >= DONE for code in codes):
            answer()
            return
        if content["timeout_s"] is not None:
            ends.append(engine.call_later(content["timeout_s"], answer).cancel)
        ends.append(engine.when_final(jids, answer, stop_on_error=content["stop_on_error"]))

    def _suspend(self, caller: Any) -> None:
        if caller is not None:
            self._backend.engine.executor.suspend(caller)

    def _resume(self, caller: Any) -> None:
        if caller is not None:
            self._backend.engine.executor.resume(caller)

    def _on_finals(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        stream = _Stream()
        self._n_maps += 1
        self._streams[self._n_maps] = stream
        self._backend.on_each_final(unpack_jids(content["jids"]), stream.add)
        reply({"stream": self._n_maps})

    def _on_next_final(
        self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply
    ) -> None:
        if content["background"]:
            caller = None
        stream = self._streams[content["stream"]]
        self._suspend(caller)
        timer: list[Any] = []

        def answer(found: tuple[int, int, int] | None) -> None:
            stream.waiter = None
            for each in timer:
                each.cancel()
            self._resume(caller)
            reply({"found": found})

        if stream.seen or stream.released:
            stream.released = False
            answer(stream.seen.popleft() if stream.seen else None)
            return
        stream.waiter = answer
        if content["timeout_s"] is not None:
            timer.append(
                self._backend.engine.call_later(
                    content["timeout_s"], lambda: answer(None) if stream.waiter is answer else None
                )
            )

    def _on_watch(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        self._backend.on_each_final(unpack_jids(content["jids"]), self._streams[content["stream"]].add)
        reply({})

    def _on_release(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        stream = self._streams[content["stream"]]
        if stream.waiter is not None:
            stream.waiter(None)
        else:
            stream.released = True
        reply({})

    def _on_outcomes(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        segments = self._backend.outcomes(unpack_jids(content["jids"]))
        reply({"segments": [segment[:3] for segment in segments]}, tuple(_inline(segment[3]) for segment in segments))

    def _on_statuses(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        reply({}, (bytes(self._backend.statuses(unpack_jids(content["jids"]))),))

    def _on_describe(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        facts = self._backend.describe(content["jid"])
        outcome = facts.pop("outcome", None)
        live = facts.pop("live", None)
        if live:
            facts["live"] = {
                name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                for name, value in live.items()
            }
        reply({"facts": facts}, () if outcome is None else (_inline(outcome.raw),))

    def _on_select(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        found = self._backend.select(label=content["label"], status=content["status"], function=content["function"])
        reply({"jids": pack_jids(found)})

    def _on_cancel(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        jids = None if content["jids"] is None else unpack_jids(content["jids"])
        reply({"pending": self._backend.cancel(jids, begun=content.get("begun", True))})

    def _on_delete(self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply) -> None:
        self._backend.delete(unpack_jids(content["jids"]))
        reply({})

    def _on_connection_info(
        self, caller: Any, depth: int, content: dict[str, Any], blobs: list[bytes], reply: Reply
    ) -> None:
        reply({"info": self._backend.connection_info()})
