"""Requests to a server as anybody may write them, without the package's own client."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from cloud.wire import API, MESSAGE_TYPE, OPERATIONS, RESOURCE_OPERATIONS, Operation, pack_message, unpack_message
from tests.server.running import RunningServer

TABLE = {operation.name: operation for operation in (*OPERATIONS, *RESOURCE_OPERATIONS)}
HASH = "f" * 64


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes
    content: Any
    blobs: list[bytes]


def tuned(data: Path, *options: str, **tuning: Any) -> RunningServer:
    """A server whose limits and patience are others than the command line can say; see `tests.server.tuned`."""
    return RunningServer(data, *options, env={"SERVER_TUNING": json.dumps(tuning)}, module="tests.server.tuned")


def bearer(key: int, secret: str) -> str:
    """The Authorization header of a key."""
    return f"Bearer {key}:{secret}"


def of_server(server: RunningServer) -> str:
    """That of its administrator."""
    return bearer(server.api_key, server.api_secretkey)


def request(
    server: RunningServer,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    timeout_s: float = 20.0,
) -> Reply:
    """One request on a connection of its own."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        connection.request(method, path, body or None, headers or {})
        response = connection.getresponse()
        found = response.read()
    finally:
        connection.close()
    content, blobs = None, []
    if found and response.headers.get_content_type() == MESSAGE_TYPE:
        content, blobs = unpack_message(found)
    elif found and response.headers.get_content_type() == "application/json":
        content = json.loads(found)
    return Reply(response.status, dict(response.headers.items()), found, content, blobs)


def ask(
    server: RunningServer,
    op: str,
    content: dict[str, Any] | None = None,
    blobs: Sequence[bytes] = (),
    *,
    authorization: str | None = "",
    key: str = "",
    timeout_s: float = 20.0,
) -> Reply:
    """One operation; as the server's administrator unless said otherwise."""
    operation = TABLE[op]
    headers = {"Content-Type": MESSAGE_TYPE if blobs else "application/json"}
    authorization = of_server(server) if authorization == "" else authorization
    if authorization is not None:
        headers["Authorization"] = authorization
    if key:
        headers["Idempotency-Key"] = key
    body = b"".join(pack_message(content or {}, blobs)) if blobs else json.dumps(content or {}).encode()
    if operation.method == "GET":
        body = b""
    return request(server, operation.method, API + operation.path, body, headers, timeout_s)


def sent(server: RunningServer, data: bytes, timeout_s: float = 5.0) -> tuple[int, bytes, bool]:
    """(status, all that came back, whether the server closed) of raw bytes on a connection of their own."""
    found = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout_s) as connection:
        try:
            connection.sendall(data)
        except OSError:
            pass  # refused before it was all sent; the reply says why
        closed = True
        try:
            while piece := connection.recv(65_536):
                found += piece
        except TimeoutError:
            closed = False
        except ConnectionError:
            pass
    line = found.split(b"\r\n", 1)[0].split(b" ")
    return (int(line[1]) if len(line) > 1 else 0), found, closed


def example(operation: Operation) -> tuple[dict[str, Any], list[bytes]]:
    """A request that the table takes, about nothing that exists."""
    content = {name: _of_schema(name, operation.request[name]) for name in operation.request}
    for name in operation.optional:
        del content[name]
    n_blobs = {"submit": 3, "cron.register": 3, "open_map": 2}.get(operation.name, 0)
    if operation.name in ("files.put", "files.append"):
        n_blobs = 1
    return content, [b""] * n_blobs


def _of_schema(name: str, schema: dict[str, Any]) -> Any:
    known = {
        "sha256": HASH,
        "upload": "0" * 32,
        "schedule": "0 0 1 1 *",
        "tz": "UTC",
        "label": "nobody",
        "name": "nothing",
    }
    if name in known:
        return known[name]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _of_schema(name, schema["anyOf"][0])
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    return {"integer": 0, "number": 0, "string": "x", "boolean": False, "array": [], "object": {}}[kind]


@contextmanager
def held_open(server: RunningServer, data: bytes, n: int) -> Iterator[list[socket.socket]]:
    """So many connections on which ``data`` was sent and nothing more."""
    found: list[socket.socket] = []
    try:
        for _ in range(n):
            found.append(socket.create_connection(("127.0.0.1", server.port), 10.0))
            found[-1].sendall(data)
        yield found
    finally:
        for each in found:
            each.close()


class Answering:
    """A request under way in a thread of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.reply: Reply | None = None
        self._thread = threading.Thread(target=self._run, args=(args, options))
        self._thread.start()

    def _run(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.reply = ask(*args, **options)

    def result(self) -> Reply:
        """What came back."""
        self._thread.join(30.0)
        assert self.reply is not None
        return self.reply
