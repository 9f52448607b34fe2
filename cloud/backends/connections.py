"""Connections to one server: opened, kept alive between requests, and never shared with a forked child.

A connection is used by one thread at a time. Between requests it is idle, and any thread takes the one that was used
last. What is left on one after its request failed or was interrupted is never read: it is closed. A child forked from
this process closes its copies without a word to the server (a goodbye of TLS would end the parent's session) and opens
its own.

::

    take ──► in use ──► give_back ──► idle ──► take …
                └─────► close            └───► closed when too old, too many, or closed by the server

Lock order: the pool's lock is a leaf; nothing is sent, opened or closed under it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from http.client import HTTPException, HTTPResponse
from io import BufferedReader
from weakref import WeakSet

from cloud.backends.address import Address
from cloud.errors import BackendError, ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any, Final

    from _typeshed import WriteableBuffer as Buffer

__all__ = ["Connection", "Connections", "NoConnection"]

_CONNECT_S: Final = 10.0
_MAX_IDLE: Final = 8
#: Below what servers (75 s) and the routers between wait before they forget an idle connection.
_MAX_IDLE_S: Final = 60.0
_JOINED_BYTES: Final = 64 * 1024
_SEND_BYTES: Final = 1024 * 1024


class NoConnection(OSError):
    """There is no connection to the server, so nothing was sent; ``__cause__`` is why."""


class _Raw(socket.SocketIO):
    """The bytes of a socket, until no more are wanted."""

    ended = False

    def readinto(self, buffer: Buffer, /) -> int | None:
        return 0 if self.ended else super().readinto(buffer)


class _Reader(BufferedReader):
    """What a server sends, where the end of the stream inside of a line is an error.

    `http.client` takes it for the end of the headers: a reply cut there would look whole and empty.
    """

    began = False
    #: More came than the reply; known when it is closed.
    spilled = False

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if line:
            self.began = True
        if not line.endswith(b"\n") and (self.began and len(line) != size):
            raise ConnectionResetError("the connection was cut")
        return line

    def flush(self) -> None:
        pass  # there is nothing to; a reply that lets go of this later must not fail because it is closed

    def close(self) -> None:
        raw = self.raw
        assert isinstance(raw, _Raw)
        raw.ended = True  # or peek would wait for more
        try:
            self.spilled = bool(self.peek(1)) or self.spilled
        except ValueError:
            pass  # closed already, or halfway: that was interrupted
        super().close()


class _Incoming:
    """As much of a socket as `HTTPResponse` uses."""

    def __init__(self, sock: socket.socket) -> None:
        self.reader = _Reader(_Raw(sock, "r"))

    def makefile(self, _mode: str) -> _Reader:
        return self.reader


class Connection:
    """One socket to the server, for one thread at a time.

    Attributes:
        reused: It has carried a request before.
        began: The first byte of the reply to the current request has come.
        spilled: More came than that reply, which was read to its end.
    """

    __slots__ = ("__weakref__", "_incoming", "_sock", "idle_since_s", "reused")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._incoming: _Incoming | None = None
        self.reused = False
        self.idle_since_s = 0.0

    @property
    def began(self) -> bool:
        return self._incoming is not None and self._incoming.reader.began

    @property
    def spilled(self) -> bool:
        return self._incoming is not None and self._incoming.reader.spilled

    def send(self, pieces: Iterable[bytes | memoryview], timeout_s: float) -> None:
        """Send all pieces; large ones are not copied, small ones that follow each other are sent as one.

        Raises:
            OSError: The connection is gone, or took nothing for ``timeout_s``.
        """
        self._incoming = None
        self._sock.settimeout(timeout_s)
        small = bytearray()
        for piece in pieces:
            if len(small) + len(piece) <= _JOINED_BYTES:
                small += piece
                continue
            if small:
                self._sock.sendall(small)
                small = bytearray()
            with memoryview(piece) as whole:
                # The time limit of sendall is for all that it is given.
                for start in range(0, len(whole), _SEND_BYTES):
                    self._sock.sendall(whole[start : start + _SEND_BYTES])
        if small:
            self._sock.sendall(small)

    def reply(self, method: str) -> HTTPResponse:
        """Wait for the reply and read its head.

        Raises:
            OSError: The connection is gone, or silent for longer than its time limit.
            HTTPException: What came is not HTTP.
        """
        self._incoming = _Incoming(self._sock)
        reply = HTTPResponse(self._incoming, method=method)  # type: ignore[arg-type]  # uses its makefile alone
        reply.begin()
        return reply

    def is_stale(self) -> bool:
        """Tell whether an idle connection was closed by the server, or has bytes that nobody asked for."""
        try:
            self._sock.settimeout(0)
            # Past SSLSocket.recv, which knows no flags: between requests not even TLS has anything to say.
            socket.socket.recv(self._sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def shut(self) -> None:
        """Wake the thread that uses it, with an error; that thread closes it."""
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            pass  # gone already

    def close(self) -> None:
        """Close it, whatever was under way. Idempotent."""
        try:
            if self._incoming is not None:
                self._incoming.reader.close()
        finally:
            self._sock.close()

    def abandon(self) -> None:
        """Close this process's copy only. Takes no lock: the thread that held one may not exist here."""
        descriptor = self._sock.detach()
        if descriptor >= 0:
            os.close(descriptor)


class Connections:
    """The connections of this process to one server. Thread-safe and fork-safe.

    Args:
        address: The server.
        ca_file: Certificates in PEM form to trust instead of the system's; None for the system's. Verification cannot
            be switched off.

    Raises:
        ConfigurationError: ``ca_file`` cannot be read, or holds no certificates.
    """

    def __init__(self, address: Address, ca_file: str | None = None) -> None:
        self._address = address
        self._tls = _tls(ca_file) if address.secure else None
        self._open: WeakSet[Connection] = WeakSet()
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = threading.Event()
        _pools.add(self)

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def pause(self, delay_s: float) -> bool:
        """Sleep so long, and return whether it was closed meanwhile, which ends the sleep."""
        return self._closed.wait(delay_s)

    def take(self, timeout_s: float) -> Connection:
        """Return an idle connection that is alive, or a new one. Blocks for at most 10 s or ``timeout_s`` an address.

        Raises:
            NoConnection: The server, or the proxy, cannot be reached.
            BackendError: The certificate is not to be trusted, the server speaks no TLS, or the proxy refuses.
        """
        while (connection := self._idle_one()) is not None:
            old = time.monotonic() - connection.idle_since_s > _MAX_IDLE_S
            if not old and not connection.is_stale():
                return connection
            connection.close()
        return self.open(timeout_s)

    def open(self, timeout_s: float) -> Connection:
        """Return a new connection; see `take`."""
        limit_s = min(timeout_s, _CONNECT_S)
        address = self._address
        peer = address.proxy or address
        try:
            sock = socket.create_connection((peer.host, peer.port), limit_s)
        except (OSError, UnicodeError) as exc:  # UnicodeError: a label of the name is too long, or empty
            raise NoConnection(f"no connection to {peer.url}") from exc
        connection = Connection(sock)
        try:
            _keep_watch(sock)
            if address.secure:
                if address.proxy:
                    _tunnel(connection, address, limit_s)
                connection = Connection(self._handshake(sock))
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._open.add(connection)
        if self.is_closed:  # while it was opened: whoever closed may not have seen it
            connection.close()
            raise NoConnection(f"no connection to {peer.url}") from OSError("closed meanwhile")
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request; its reply must have been read to the end."""
        connection.reused = True
        connection.idle_since_s = time.monotonic()
        with self._lock:
            keep = not self.is_closed and len(self._idle) < _MAX_IDLE
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def close(self) -> None:
        """Close the idle ones; threads that use another meet an error. Idempotent."""
        with self._lock:
            self._closed.set()
            idle, self._idle = self._idle, []
            in_use = set(self._open).difference(idle)
        for connection in idle:
            connection.close()
        for connection in in_use:
            connection.shut()

    def forked(self) -> None:
        """Let go of all that belongs to the parent; for the child of a fork."""
        for connection in list(self._open):
            connection.abandon()
        was_closed = self._closed.is_set()
        self._open = WeakSet()
        self._lock = threading.Lock()
        self._idle = []
        self._closed = threading.Event()
        if was_closed:
            self._closed.set()

    def _idle_one(self) -> Connection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _handshake(self, sock: socket.socket) -> socket.socket:
        import ssl

        assert self._tls is not None
        url = self._address.url
        try:
            return self._tls.wrap_socket(sock, server_hostname=self._address.host)
        except ssl.SSLCertVerificationError as exc:
            raise BackendError(
                f"The certificate of {url} is not to be trusted: {exc.verify_message}.",
                hint="Set ca_file to the certificate of the authority that signed it, or check the name in the url.",
            ) from exc
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as exc:
            raise NoConnection(f"no connection to {url}") from exc
        except ssl.SSLError as exc:
            raise BackendError(
                f"{url} and this program agree on no secure connection: {exc.reason or exc}.",
                hint="Check that the port is one for https, and that the server offers TLS 1.2 or newer.",
            ) from exc
        except OSError as exc:
            raise NoConnection(f"no connection to {url}") from exc


def _tls(ca_file: str | None) -> ssl.SSLContext:
    import ssl

    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as exc:  # ssl.SSLError is one
        why = exc.strerror or "it holds no certificates"
        raise ConfigurationError(f"ca_file {ca_file!r} cannot be used: {why}. Name a file in PEM form.") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _keep_watch(sock: socket.socket) -> None:
    """No waiting for more to send, and a server that vanished during a long poll is noticed within a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tunnel(connection: Connection, address: Address, timeout_s: float) -> None:
    proxy = address.proxy
    assert proxy is not None
    host = f"[{address.host}]" if ":" in address.host else address.host
    target = f"{host}:{address.port}"
    fields: dict[str, Any] = {"Host": target, **proxy.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    try:
        connection.send([f"CONNECT {target} HTTP/1.1\r\n{head}\r\n".encode("ascii")], timeout_s)
        status = connection.reply("CONNECT").status
    except (OSError, HTTPException) as exc:
        raise NoConnection(f"no connection through the proxy {proxy.url}") from exc
    if status in (502, 503, 504):
        raise NoConnection(f"no connection through the proxy {proxy.url}") from OSError(f"it answered {status}")
    if status // 100 != 2:
        raise BackendError(
            f"The proxy {proxy.url} does not connect to {address.url}: it answered {status}.",
            hint="Check https_proxy in the environment, or name the server's host in no_proxy.",
        )


_pools: Final[WeakSet[Connections]] = WeakSet()


def _forked() -> None:
    for pool in list(_pools):
        pool.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
