"""A server's files and crons without the server: requests checked against the table, answered in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastjsonschema

from cloud.backends.remote import raise_remote
from cloud.backends.requests import Request
from cloud.environment import Environment
from cloud.jobs import DONE, QUEUED
from cloud.server.beside import ResourceRequests
from cloud.server.messages import _check_counts, request_schema
from cloud.wire import RESOURCE_OPERATIONS

OPERATIONS = {operation.name: operation for operation in RESOURCE_OPERATIONS}
VALIDATORS = {name: fastjsonschema.compile(request_schema(each)) for name, each in OPERATIONS.items()}

Answer = tuple[dict[str, Any], list[bytes]]


class FakeJobs:
    """An engine whose jobs do nothing; it outlives the servers over it, as one on disk does.

    Attributes:
        submitted: Requests that were carried out, by jid.
        statuses: By jid.
        replies: By idempotency key.
    """

    def __init__(self) -> None:
        self.submitted: dict[int, Request] = {}
        self.statuses: dict[int, int] = {}
        self.replies: dict[str, dict[str, Any]] = {}
        self.before_submit: Callable[[], None] = lambda: None

    def serve(self, request: Request) -> None:
        if request.op == "submit":
            self.before_submit()
            reply = self.replies.get(request.key) if request.key else None
            if reply is None:
                reply = {"jid": len(self.submitted) + 1}
                self.submitted[reply["jid"]] = request
                self.statuses[reply["jid"]] = QUEUED
                if request.key:
                    self.replies[request.key] = reply
            request.reply(reply)
        elif request.op == "statuses":
            ((jid, _),) = request.content["jids"]
            request.reply({}, (bytes([self.statuses[jid]]),))
        else:
            assert request.op == "cancel"
            ((jid, _),) = request.content["jids"]
            self.statuses[jid] = DONE
            request.reply({"pending": []})


class Beside:
    """What stands beside the jobs of one workgroup, and how it is asked.

    Attributes:
        asked: Names of the operations asked, in order.
        environment: Of the job that asks; None for a client.
        keys: Give each request that changes something an idempotency key, as HTTP does.
    """

    def __init__(self, folder: Path, jobs: FakeJobs | None = None, **options: Any) -> None:
        self.folder = folder
        self.jobs = jobs or FakeJobs()
        self.options = options
        self.asked: list[str] = []
        self.environment: Environment | None = None
        self.now = datetime(2024, 1, 1, 10, 0, tzinfo=UTC)
        self.lock = threading.RLock()
        self._n_keys = 0
        self.server = self._start()

    def _start(self) -> ResourceRequests:
        return ResourceRequests(
            str(self.folder),
            self.jobs.serve,
            self.checked,
            self.jobs.replies.get,
            self.lock,
            now=lambda: self.now,
            **self.options,
        )

    def checked(self, content: dict[str, Any]) -> Environment:
        return Environment(content.get("python", "3.11"), content.get("code", ""))

    def restart(self) -> None:
        """End it, and begin anew on the same folder."""
        self.server.close()
        self.server = self._start()

    def ask(self, op: str, *blobs: bytes, **content: Any) -> Answer:
        key = ""
        if OPERATIONS[op].changes:
            self._n_keys += 1
            key = f"key{self._n_keys}"
        return self.ask_with_key(key, op, *blobs, **content)

    def ask_with_key(self, key: str, op: str, *blobs: bytes, **content: Any) -> Answer:
        self.asked.append(op)
        content = json.loads(json.dumps(content))
        VALIDATORS[op](content)
        _check_counts(op, content, len(blobs))
        return self.ask_unchecked(op, *blobs, key=key, **content)

    def ask_unchecked(self, op: str, *blobs: bytes, key: str = "", **content: Any) -> Answer:
        future: Future[Answer] = Future()

        def reply(content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> None:
            future.set_result((json.loads(json.dumps(content)), list(blobs)))

        self.server.serve(Request(op, content, list(blobs), reply, key=key, environment=self.environment))
        answer, found = future.result(30)
        raise_remote(answer)
        if op in OPERATIONS:
            assert set(answer) == set(OPERATIONS[op].reply)
            assert bool(found) == bool(OPERATIONS[op].reply_blobs)
        return answer, found

    def close(self) -> None:
        self.server.close()
