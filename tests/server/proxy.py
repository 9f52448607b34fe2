"""A hostile network between a client and a server: a TCP proxy that cuts, delays, doubles and swallows.

Faults are told to the proxy while it runs and hold for the connections that are made afterwards; `next_only` ones hold
for one connection. Bytes are counted for each connection and direction.

::

    client ──UP──► FaultProxy ──► server
           ◄─DOWN─           ◄──
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
from dataclasses import dataclass, replace
from typing import Self

_PIECE_BYTES = 64 * 1024
_REPLY = b"HTTP/1.1 "
_SILENT_S = 10.0


class Direction(enum.Enum):
    UP = "from the client to the server"
    DOWN = "from the server to the client"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a connection."""

    #: Each direction's number of bytes that pass before both sides are closed.
    cut_up: int | None = None
    cut_down: int | None = None
    #: The cut is a reset instead of an orderly end.
    reset: bool = False
    #: Each piece waits so long.
    delay_s: float = 0.0
    #: 0 for unlimited.
    bytes_per_s: float = 0.0
    #: What the client sends is taken and never answered; the server hears nothing.
    silent: bool = False
    #: What the client sends goes to the server a second time, over a connection of its own, when the first has ended.
    duplicate: bool = False

    def cut(self, direction: Direction) -> int | None:
        return self.cut_up if direction is Direction.UP else self.cut_down


class FaultProxy:
    """A proxy on 127.0.0.1 to ``target`` ('host:port', or a port of this machine), while the context is open.

    Attributes:
        host, port, url: Where it listens; the url is for servers that speak plain HTTP.
        n_connections: How many were made so far.
        n_up, n_down: Bytes that passed so far, in all.
        n_duplicated: Connections that were replayed to the end so far.
    """

    def __init__(self, target: str | int) -> None:
        host, _, port = str(target).rpartition(":")
        self._target = (host or "127.0.0.1", int(port))
        self._fault = Fault()
        self._next: list[Fault] = []
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self.host = "127.0.0.1"
        self.port = 0
        self.n_connections = 0
        self.n_up = 0
        self.n_down = 0
        self.n_duplicated = 0
        self._listener: socket.socket | None = None
        self._listen()
        self.url = f"http://{self.host}:{self.port}"

    def heal(self) -> None:
        """No faults any more, for new connections; listen again if it refused."""
        with self._lock:
            self._fault = Fault()
            self._next.clear()
        if self._listener is None:
            self._listen()

    def cut_after(self, n_bytes: int, direction: Direction, *, reset: bool = False, next_only: bool = False) -> None:
        """Close both sides when so many bytes have passed in that direction."""
        cut = {"cut_up": n_bytes} if direction is Direction.UP else {"cut_down": n_bytes}
        self._set(next_only=next_only, reset=reset, **cut)

    def duplicate(self, *, next_only: bool = False) -> None:
        """Send to the server, a second time, all that a client sends; the second answers are thrown away."""
        self._set(next_only=next_only, duplicate=True)

    def delay(self, delay_s: float, *, next_only: bool = False) -> None:
        """Hold each piece back for so long, in both directions."""
        self._set(next_only=next_only, delay_s=delay_s)

    def limit(self, bytes_per_s: float, *, next_only: bool = False) -> None:
        """Let no more than that pass in each direction."""
        self._set(next_only=next_only, bytes_per_s=bytes_per_s)

    def answer_nothing(self, *, next_only: bool = False) -> None:
        """Take what clients send, and be silent."""
        self._set(next_only=next_only, silent=True)

    def refuse(self) -> None:
        """Refuse new connections until `heal`; those that exist go on."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            self._acceptor.join()

    def cut_all(self, *, reset: bool = False) -> None:
        """Cut all connections there are, now."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut(reset=reset)

    def close(self) -> None:
        self._closed.set()
        self.refuse()
        self.cut_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set(self, *, next_only: bool, **changes: object) -> None:
        with self._lock:
            if next_only:
                self._next.append(replace(Fault(), **changes))
            else:
                self._fault = replace(self._fault, **changes)

    def _listen(self) -> None:
        self._listener = socket.create_server((self.host, self.port), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._acceptor.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                fault = self._next.pop(0) if self._next else self._fault
                self.n_connections += 1
            thread = threading.Thread(target=self._serve, args=(client, fault), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        link = _Link(self, client, fault)
        self._run(link)
        if fault.duplicate and not self._closed.is_set():
            ours, theirs = socket.socketpair()
            again = _Link(self, theirs, Fault())
            swallow = threading.Thread(target=_play_again, args=(ours, bytes(link.said), link.n_replies), daemon=True)
            swallow.start()
            self._run(again)
            swallow.join()
            ours.close()
            self.n_duplicated += 1

    def _run(self, link: _Link) -> None:
        with self._lock:
            self._links.add(link)
        if self._closed.is_set():
            link.cut()
        link.run(None if link.fault.silent else self._target)
        with self._lock:
            self._links.discard(link)

    def passed(self, n_bytes: int, direction: Direction, pause_s: float) -> None:
        """Count a piece and hold it back; for the connections."""
        with self._lock:
            if direction is Direction.UP:
                self.n_up += n_bytes
            else:
                self.n_down += n_bytes
        if pause_s:
            self._closed.wait(pause_s)


class _Link:
    """One client's connection, and the one to the server that belongs to it."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, fault: Fault) -> None:
        self.fault = fault
        self.said = bytearray()
        self.n_replies = 0
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._is_cut = False

    def run(self, target: tuple[str, int] | None) -> None:
        """Pass everything on, until both sides are done, or it is cut."""
        try:
            if target is not None:
                self._server = socket.create_connection(target, 10)
                self._server.settimeout(None)
            down = threading.Thread(target=self._pass, args=(self._server, self._client, Direction.DOWN), daemon=True)
            down.start()
            self._pass(self._client, self._server, Direction.UP)
            down.join()
        except OSError:
            pass  # no server
        finally:
            self._client.close()
            if self._server is not None:
                self._server.close()

    def cut(self, *, reset: bool = False) -> None:
        """End both sides; `run` closes them once nobody reads them any more."""
        self._is_cut = True
        for sock in (self._client, self._server):
            with contextlib.suppress(OSError):
                if sock is not None and reset:
                    # Without lingering RST follows the close instead of FIN, and what was not read yet is lost.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_RD)
                elif sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)

    def _pass(self, source: socket.socket | None, sink: socket.socket | None, direction: Direction) -> None:
        if source is None:
            return
        fault, left = self.fault, self.fault.cut(direction)
        with contextlib.suppress(OSError):
            while left != 0:
                piece = source.recv(_PIECE_BYTES)[:left]
                if not piece:
                    break
                left = None if left is None else left - len(piece)
                pause_s = fault.delay_s + (len(piece) / fault.bytes_per_s if fault.bytes_per_s else 0.0)
                self._proxy.passed(len(piece), direction, pause_s)
                if direction is Direction.UP and fault.duplicate:
                    self.said += piece
                elif fault.duplicate:
                    self.n_replies += piece.count(_REPLY)
                if sink is not None:
                    sink.sendall(piece)
        if left == 0:
            self.cut(reset=fault.reset)
        elif not self._is_cut:
            with contextlib.suppress(OSError):
                if sink is not None:
                    sink.shutdown(socket.SHUT_WR)
            if direction is Direction.DOWN:
                with contextlib.suppress(OSError):
                    self._client.shutdown(socket.SHUT_RDWR)


def _play_again(sock: socket.socket, said: bytes, n_replies: int) -> None:
    """Say all of it, and hang up when as many replies came as the first time, or none comes any more."""
    feed = threading.Thread(target=_say, args=(sock, said), daemon=True)
    feed.start()
    sock.settimeout(_SILENT_S)
    with contextlib.suppress(OSError):
        while n_replies > 0 and (piece := sock.recv(_PIECE_BYTES)):
            n_replies -= piece.count(_REPLY)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    feed.join()


def _say(sock: socket.socket, said: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(said)
