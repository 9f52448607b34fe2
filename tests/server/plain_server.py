"""A small HTTP server to test clients against: it records what it is asked, and answers as it is told to, also wrongly.

It reads requests of HTTP/1.1 with a Content-Length, one thread for each connection. With an idempotency key it carries
a request out once, and gives every other with that key the same answer.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Request:
    """One request, as it came in whole."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    #: Of the connection, counted from 0.
    connection: int


@dataclass
class Answer:
    """What is sent back, byte by byte, and what then happens to the connection."""

    status: int = 200
    body: bytes = b'{"ok": true}'
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    #: None for the true length; a number to lie; -1 for no such header at all.
    length: int | None = None
    #: All that is sent, instead of the above.
    raw: bytes | None = None
    close: bool = False
    delay_s: float = 0.0
    #: Only so many bytes are sent before the connection is closed.
    cut: int | None = None

    def content(self, method: str) -> bytes:
        if self.raw is not None:
            return self.raw
        headers = dict(self.headers)
        if self.length != -1:
            headers["Content-Length"] = str(len(self.body) if self.length is None else self.length)
        lines = [f"HTTP/1.1 {self.status} Said", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1") + (b"" if method == "HEAD" else self.body)


def echo(request: Request) -> Answer:
    """The default: tell the client what it asked."""
    told = {"method": request.method, "target": request.target, "n_bytes": len(request.body)}
    return Answer(body=json.dumps(told).encode())


def error(status: int, text: str, **headers: str) -> Answer:
    """An error as the server of this project words it."""
    content = {"error": "BackendError", "text": text, "jid": None, "hint": None, "id": "r1"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **named})


class PlainServer:
    """A server on 127.0.0.1, running while the context is open.

    Args:
        answer: Makes the answer to each request; may block and may be replaced at any time.
        port: 0 for any that is free.
        tls: Certificate and key to speak TLS with, as paths.

    Attributes:
        requests: Those that came in whole, in order.
        executed: Those that were carried out: without a key all, with a key the first.
    """

    def __init__(
        self, answer: Callable[[Request], Answer] = echo, *, port: int = 0, tls: tuple[str, str] | None = None
    ) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.executed: list[Request] = []
        self._answered: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._n_connections = 0
        self._context = None
        if tls is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*tls)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def n_connections(self) -> int:
        """How many were opened so far."""
        return self._n_connections

    @property
    def n_open(self) -> int:
        """How many are open now."""
        with self._lock:
            return len(self._connections)

    def close_connections(self) -> None:
        """Close all that are open, as a server does with idle ones."""
        with self._lock:
            for each in self._connections:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(each, socket.SHUT_RDWR)
        wait_until(lambda: self.n_open == 0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        self.close_connections()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number, self._n_connections = self._n_connections, self._n_connections + 1
            with self._lock:
                self._connections.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock, number), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket, number: int) -> None:
        sock = plain
        try:
            if self._context is not None:
                with self._lock:
                    self._connections.discard(plain)
                sock = self._context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
                with self._lock:
                    self._connections.add(sock)
                sock.do_handshake()
            with sock.makefile("rb") as incoming:
                while (request := _read(incoming, number)) is not None:
                    answer = self._executed(request)
                    content = answer.content(request.method)
                    if answer.delay_s:
                        time.sleep(answer.delay_s)
                    sock.sendall(content if answer.cut is None else content[: answer.cut])
                    if answer.close or answer.cut is not None:
                        return
        except OSError:
            pass
        finally:
            sock.close()
            with self._lock:
                self._connections.discard(sock)
                self._connections.discard(plain)

    def _executed(self, request: Request) -> Answer:
        key = request.headers.get("idempotency-key")
        with self._lock:
            self.requests.append(request)
            if key is not None and key in self._answered:
                return self._answered[key]
            self.executed.append(request)
        answer = self.answer(request)
        if key is not None and answer.status < 400:
            with self._lock:
                self._answered[key] = answer
        return answer


def _read(incoming, number: int) -> Request | None:
    """The next request; None at the end, also in the middle of one."""
    lines = []
    while (line := incoming.readline()) not in (b"\r\n", b""):
        lines.append(line.decode("latin-1").rstrip("\r\n"))
    if line == b"" or not lines:
        return None
    method, target, _ = lines[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    n_bytes = int(headers.get("content-length", "0"))
    body = incoming.read(n_bytes)
    return Request(method, target, headers, body, number) if len(body) == n_bytes else None


def wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait for what has no event; fail the test if it does not come."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)
