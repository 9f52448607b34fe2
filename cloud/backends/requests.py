"""Answers the operations of ``wire`` on jobs: for jobs over their worker's channel, and for a server's clients.

Nothing here is unpickled. Waits are answered when the jobs are final; the slot of a job that waits is free meanwhile.
What a durable store has to write is on disk before a reply tells of it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable

from cloud.backends.base import Segment
from cloud.backends.local import LocalBackend
from cloud.engine.overview import describe
from cloud.engine.store.base import Batch
from cloud.engine.watching import finals, when_final
from cloud.errors import BackendError, CloudException, JobNotFound
from cloud.jobs import DONE, Jids, JobOptions, Outcome
from cloud.serialization.functions import Function
from cloud.serialization.plain import plain_outcome, without_value
from cloud.wire import pack_jids, unpack_jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.environment import Environment

Reply = Callable[..., None]

_MAX_REPLY_BYTES: Final = 32 << 20
_MAX_DESCRIBED: Final = 1000
_MAX_DESCRIBED_BYTES: Final = 8 << 20
_MAX_RELEASED: Final = 1024
_KILL_S: Final = 10.0
_MAX_AT_HAND_BYTES: Final = 1 << 16
_MAX_GONE: Final = 1000
_WHOLE: Final = frozenset({"submit", "open_map", "extend", "delete"})
"""What is one commit together with its reply. None of these makes the executor begin a job, which may wait for one."""


class Request:
    """One request that waits for its reply.

    Attributes:
        op: Name of the operation.
        content, blobs: As received; for a client's, checked against the table.
        reply: Takes (content, blobs), once.
        caller: What the executor calls the job that asks; None for a client, or for a thread beside the job.
        depth: Of jobs that it submits.
        environment: What their workers must be.
        key: Idempotency key; "" for none.
        give_up: Stops waiting for what it waits for, if it does: nobody wants the reply any more.
    """

    __slots__ = ("blobs", "caller", "content", "depth", "environment", "give_up", "key", "op", "reply")

    def __init__(
        self,
        op: str,
        content: dict[str, Any],
        blobs: list[bytes],
        reply: Reply,
        *,
        caller: Any = None,
        depth: int = 0,
        environment: Environment | None = None,
        key: str = "",
    ) -> None:
        self.op = op
        self.content = content
        self.blobs = blobs
        self.reply = reply
        self.caller = caller
        self.depth = depth
        self.environment = environment
        self.key = key
        self.give_up: Callable[[], None] | None = None

    def refuse(self, exc: Exception) -> None:
        """Reply with an error."""
        if not isinstance(exc, CloudException):
            exc = BackendError(f"{type(exc).__name__}: {_told(exc)}", retry=isinstance(exc, OSError))
        fields = {
            name: value
            for name, value in vars(exc).items()
            if name not in ("parameter", "jid", "hint", "status") and isinstance(value, str | int | float | None)
        }
        self.reply(
            {
                "error": type(exc).__name__,
                "text": str(exc.parameter),
                "jid": exc.jid,
                "hint": exc.hint,
                "fields": fields,
            }
        )


class Beside(ABC):
    """Answers requests about what stands beside the jobs."""

    @abstractmethod
    def answers(self, op: str) -> bool:
        """True for the operations that it answers."""

    @abstractmethod
    def serve(self, request: Request) -> None:
        """Answer one; does not block, so that the answer may come later from another thread."""


def _told(exc: Exception) -> str:
    # The text of others names files and statements of whoever answers.
    if isinstance(exc, TypeError | ValueError):
        return str(exc)
    return exc.strerror or "it failed" if isinstance(exc, OSError) else "it failed"


class Requests:
    """Serves requests over a local backend; called under the engine's lock."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        #: Answers what is not about jobs, where there is such.
        self.beside: Beside | None = None
        #: Called with how many jobs are about to be submitted; raises a `CloudException` if they may not be.
        self.admit: Callable[[int], None] = lambda n_jobs: None
        self._maps: dict[int, Batch] = {}
        self._n_maps = 0
        self._functions: dict[bytes, Function] = {}
        self._polls: dict[str, Callable[[], None]] = {}
        self._released: dict[str, None] = {}
        self._handlers: dict[str, Callable[[Request], None]] = {
            "submit": self._submit,
            "open_map": self._open_map,
            "extend": self._extend,
            "abandon": self._abandon,
            "wait": self._wait,
            "finals": self._finals,
            "release": self._release,
            "outcomes": self._outcomes,
            "statuses": self._statuses,
            "describe": self._describe,
            "select": self._select,
            "list": self._list,
            "overview": self._overview,
            "cancel": self._cancel,
            "delete": self._delete,
            "connection_info": self._connection_info,
        }

    def __call__(
        self, caller: Any, batch: Batch | None, content: dict[str, Any], blobs: list[bytes], reply: Reply
    ) -> None:
        """Answer a request that came over a worker's channel."""
        depth, environment = (1, None) if batch is None else (batch.depth + 1, batch.environment)
        if content.get("background"):
            caller = None
        self.serve(Request(content["op"], content, blobs, reply, caller=caller, depth=depth, environment=environment))

    def serve(self, request: Request) -> None:
        """Answer one request; errors of ours travel back as class name and arguments."""
        if self.beside is not None and self.beside.answers(request.op):
            self.beside.serve(request)
            return
        try:
            if request.key:
                known = self._backend.engine.store.recall(request.key)
                if known is not None:
                    self._answer(Request(request.op, {}, [], request.reply), known)
                    return
            handler = self._handlers[request.op]
            if request.op in _WHOLE:
                with self._backend.engine.store.together():
                    handler(request)
            else:
                handler(request)
        except CloudException as exc:
            request.refuse(exc)

    def _answer(self, request: Request, content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> None:
        engine = self._backend.engine
        if request.key:
            engine.store.remember(request.key, content)
        if not engine.store.durable:
            request.reply(content, blobs)
            return

        def tell(error: Exception | None) -> None:
            with engine.lock:
                # To who only asks, the error is that of another's submission.
                if error is None or request.op not in _WHOLE:
                    request.reply(content, blobs)
                else:
                    request.refuse(error)

        engine.store.after(tell)

    # --- submitting ---------------------------------------------------------------------------------------------------

    def _function(self, request: Request) -> Function:
        # The same function again, perhaps from another worker, is one function: its runtimes tell how to send it.
        payload = request.blobs[0]
        function = self._functions.get(payload)
        if function is None:
            if len(self._functions) > 256:
                self._functions.clear()
            function = Function(payload, request.content["function"], reusable=request.content["reusable"])
            if function.reusable:
                self._functions[payload] = function
        return function

    def _submit(self, request: Request) -> None:
        self.admit(1)
        options = JobOptions.from_dict(request.content["options"])
        jid = self._backend.submit(
            self._function(request), request.blobs[2], options, request.blobs[1], request.depth, request.environment
        )
        self._answer(request, {"jid": jid})

    def _open_map(self, request: Request) -> None:
        options = JobOptions.from_dict(request.content["options"])
        batch = self._backend.open_batch(
            self._function(request), request.blobs[1], options, request.depth, request.environment
        )
        # A durable store names it, so that it can go on after a restart.
        self._n_maps += 1
        number = batch.key or self._n_maps
        self._maps[number] = batch
        try:
            self._add_chunks(request, number, request.blobs[2:])
        except BaseException:
            del self._maps[number]
            self._backend.engine.abandon(batch)
            raise

    def _extend(self, request: Request) -> None:
        self._add_chunks(request, request.content["map"], request.blobs)

    def _add_chunks(self, request: Request, number: int, payloads: list[bytes]) -> None:
        engine, batch = self._backend.engine, self._open(number)
        self.admit(sum(n for _, n in request.content["chunks"]))
        for (kind, n), payload in zip(request.content["chunks"], payloads, strict=True):
            engine.extend(batch, kind, n, payload)
        jids = range(0)
        if request.content["sealed"]:
            jids = engine.seal(batch)
            self._maps.pop(number, None)
        self._answer(request, {"map": number, "start": jids.start, "stop": jids.stop})

    def _open(self, number: int) -> Batch:
        batch, durable = self._maps.get(number), self._backend.engine.durable
        if batch is None and durable is not None:
            batch = durable.open_maps.get(number)
        if batch is None or batch.sealed:
            raise BackendError(f"there is no open map {number}: it was sealed, or given up")
        return batch

    def _abandon(self, request: Request) -> None:
        number = request.content["map"]
        self._backend.engine.abandon(self._open(number))
        self._maps.pop(number, None)
        self._answer(request, {})

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _wait(self, request: Request) -> None:
        engine, content = self._backend.engine, request.content
        jids, stop_on_error = unpack_jids(content["jids"]), content["stop_on_error"]

        def answer() -> None:
            codes = engine.statuses(jids)
            unfinished = (
                None
                if stop_on_error and max(codes, default=0) > DONE
                else pack_jids([jid for jid, code in zip(jids, codes, strict=True) if code < DONE])
            )
            segments = self._at_hand(jids) if unfinished == [] and content.get("outcomes") else None
            if segments is None:
                self._answer(request, {"unfinished": unfinished, "segments": None})
            else:
                self._answer_segments(request, segments, unfinished=unfinished)

        codes = engine.statuses(jids)
        over = all(code >= DONE for code in codes)
        self._hold(
            request,
            answer,
            None if over else lambda action: when_final(engine, jids, action, stop_on_error=stop_on_error),
        )

    def _at_hand(self, jids: Jids) -> list[Segment] | None:
        """Outcomes of final jobs; None if they are many bytes, or would have to be read from disk."""
        n_bytes = 0
        for batch, start, stop in self._backend.engine.store.runs(jids):
            for _, _, outcome in batch.segments_in(start, stop):
                if type(outcome) is not bytes or (n_bytes := n_bytes + len(outcome)) > _MAX_AT_HAND_BYTES:
                    return None
        return self._backend.outcomes(jids)

    def _finals(self, request: Request) -> None:
        engine, poll = self._backend.engine, request.content["poll"]
        runs, gone = self._known(request.content["jids"])

        def answer() -> None:
            self._polls.pop(poll, None)
            released = self._released.pop(poll, False) is None
            found = [run for known in runs for run in finals(engine, known)]
            self._answer(request, {"found": found, "gone": gone, "released": released or not runs})

        at_once = poll in self._released or gone or any(finals(engine, known) for known in runs) or not runs
        jids: Jids = runs[0] if len(runs) == 1 else [jid for run in runs for jid in run]
        self._hold(
            request, answer, None if at_once else lambda action: when_final(engine, jids, action, first=True), poll
        )

    def _known(self, pairs: list[list[int]]) -> tuple[list[range], list[tuple[int, int]]]:
        """Runs of jids that exist, and those that do not."""
        runs = [range(start, stop) for start, stop in pairs]
        known: list[range] = []
        gone: list[int] = []
        store = self._backend.engine.store
        # Those that it does not come to are looked at when the rest is asked for again.
        while runs and len(gone) < _MAX_GONE:
            run = runs.pop()
            try:
                store.runs(run)
            except JobNotFound:
                if len(run) > 1:
                    runs += [run[: len(run) // 2], run[len(run) // 2 :]]
                else:
                    gone += run
            else:
                known.append(run)
        return sorted(known, key=lambda run: run.start), pack_jids(sorted(gone))

    def _hold(
        self,
        request: Request,
        answer: Callable[[], None],
        subscribe: Callable[[Callable[[], None]], Callable[[], None]] | None,
        poll: str = "",
    ) -> None:
        """Answer when ``subscribe`` calls back, or the request's time is up; at once without one."""
        engine, timeout_s = self._backend.engine, request.content["timeout_s"]
        over: list[bool] = []
        ends: list[Callable[[], None]] = []

        def finish() -> None:
            if over:
                return
            over.append(True)
            for end in ends:
                end()
            if request.caller is not None:
                engine.executor.resume(request.caller)
            try:
                answer()
            except CloudException as exc:
                # Deleted meanwhile, or purged. Nobody above could answer: this is called where a job's end is recorded.
                request.refuse(exc)

        def give_up() -> None:
            over.append(True)
            for end in ends:
                end()
            if self._polls.get(poll) is finish:
                del self._polls[poll]

        if request.caller is not None:
            engine.executor.suspend(request.caller)
        if subscribe is None or timeout_s == 0:
            finish()
            return
        if timeout_s is not None:
            ends.append(engine.call_later(timeout_s, finish).cancel)
        request.give_up = give_up
        if poll:
            self._polls[poll] = finish
        ends.append(subscribe(finish))

    def _release(self, request: Request) -> None:
        poll = request.content["poll"]
        # Kept: it may overtake the request that it is to end.
        self._released[poll] = None
        while len(self._released) > _MAX_RELEASED:
            self._released.pop(next(iter(self._released)))
        finish = self._polls.pop(poll, None)
        if finish is not None:
            finish()
        self._answer(request, {})

    # --- asking -------------------------------------------------------------------------------------------------------

    def _outcomes(self, request: Request) -> None:
        # Those that one reply should not have, whoever asks will ask for again.
        jids = unpack_jids(request.content["jids"])
        self._answer_segments(request, self._backend.engine.outcomes(jids, _MAX_REPLY_BYTES))

    def _answer_segments(self, request: Request, segments: list[Segment], **content: Any) -> None:
        content["segments"] = [segment[:3] for segment in segments]
        self._answer(request, content, tuple(plain_outcome(segment[3]) for segment in segments))

    def _statuses(self, request: Request) -> None:
        self._answer(request, {}, (bytes(self._backend.statuses(unpack_jids(request.content["jids"]))),))

    def _describe(self, request: Request) -> None:
        described: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        ends: dict[int, Outcome] = {}
        numbers: dict[int, int] = {}
        node, n_bytes = os.uname().nodename, 0
        for jid in unpack_jids(request.content["jids"])[:_MAX_DESCRIBED]:
            facts = describe(self._backend.engine, jid, ends)
            facts["node"] = node
            if "outcome" in facts:
                raw = facts["outcome"].raw
                first = jid - facts["index"]
                if first not in numbers:  # the items of a run ended together
                    numbers[first] = len(blobs)
                    blobs.append(without_value(raw))
                    n_bytes += len(raw)
                facts["outcome"] = numbers[first]
            if live := facts.get("live"):
                blobs += [live["stdout"], live["stderr"]]
                n_bytes += len(live["stdout"]) + len(live["stderr"])
                live["stdout"], live["stderr"] = len(blobs) - 2, len(blobs) - 1
            described.append(facts)
            # Of what is large, the value was read, too.
            if n_bytes > _MAX_DESCRIBED_BYTES:
                break
        self._answer(request, {"facts": described}, tuple(blobs))

    def _select(self, request: Request) -> None:
        content = request.content
        found = self._backend.select(label=content["label"], status=content["status"], function=content["function"])
        self._answer(request, {"jids": pack_jids(found)})

    def _list(self, request: Request) -> None:
        content = request.content
        jobs, before = self._backend.listing(
            label=content.get("label"),
            status=content.get("status"),
            function=content.get("function"),
            before=content.get("before"),
            limit=content["limit"],
        )
        self._answer(request, {"jobs": jobs, "before": before})

    def _overview(self, request: Request) -> None:
        self._answer(request, self._backend.overview())

    def _connection_info(self, request: Request) -> None:
        self._answer(request, {"info": self._backend.connection_info()})

    # --- ending jobs --------------------------------------------------------------------------------------------------

    def _cancel(self, request: Request) -> None:
        engine = self._backend.engine
        jids = None if request.content["jids"] is None else unpack_jids(request.content["jids"])
        pending = self._backend.cancel(jids, begun=request.content.get("begun", True))

        def answer() -> None:
            self._answer(request, {"pending": pack_jids(pending)})

        if not pending or not engine.store.durable:
            answer()
            return
        # Told before their end is on disk, a crash would start them again, and the kill would be forgotten.
        request.content["timeout_s"] = _KILL_S
        self._hold(request, answer, lambda action: when_final(engine, pending, action))

    def _delete(self, request: Request) -> None:
        self._backend.delete(unpack_jids(request.content["jids"]))
        self._answer(request, {})
