"""Connections that only hold a place: closed when their request does not arrive, or too many come from one address."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

_TEXT: Final = b'{"error": "BackendError", "text": "there are too many connections", "jid": null, "hint": null}'
_SLOWEST_BYTES_PER_S: Final = 1024
_TELL_EVERY_S: Final = 1.0
_TOO_MANY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_TEXT), _TEXT)
)


class Guard:
    """What the connections of a server share. For the event loop's thread.

    aiohttp bounds the silence between two requests, not how long a request's first lines may take.

    Args:
        header_s: By when the head of a request must have arrived, from its first byte or the connection's begin.
        max_connections: Of one address.
        log: Told of those that are closed.

    Attributes:
        header_s: As given.
        max_total: Of all addresses.
    """

    def __init__(self, header_s: float, max_connections: int, log: Callable[[dict[str, Any]], None]) -> None:
        self.header_s = header_s
        self.max_total = 1 << 20
        self._max = max_connections
        self._log = log
        self._n_all = 0
        self._n: Counter[str] = Counter()
        self._guarded: dict[asyncio.BaseTransport, Guarded] = {}

    def around(self, factory: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A factory of guarded protocols."""
        return lambda: Guarded(self, factory())

    def head_arrived(self, transport: asyncio.BaseTransport | None) -> None:
        """The application has a request of this connection."""
        guarded = None if transport is None else self._guarded.get(transport)
        if guarded is not None:
            guarded.begin()

    def answered(self, transport: asyncio.BaseTransport | None) -> None:
        """The application is done with it."""
        guarded = None if transport is None else self._guarded.get(transport)
        if guarded is not None:
            guarded.busy = False

    def admit(self, address: str, transport: asyncio.BaseTransport, guarded: Guarded) -> bool:
        """Count a connection; False if there are too many."""
        if self._n[address] >= self._max or self._n_all >= self.max_total:
            self.closed(address, "too many")
            return False
        self._n[address] += 1
        self._n_all += 1
        self._guarded[transport] = guarded
        return True

    def leave(self, address: str, transport: asyncio.BaseTransport | None) -> None:
        """One is gone."""
        if transport is not None:
            self._guarded.pop(transport, None)
        self._n_all -= 1
        self._n[address] -= 1
        if not self._n[address]:
            del self._n[address]

    def closed(self, address: str, why: str) -> None:
        """Tell of one that was closed; of many in short time, only of the first."""
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            self._log({"event": "connection_closed", "address": address, "why": why, "before": self._n_untold})
            self._n_untold = 0
        else:
            self._n_untold += 1

    _told = float("-inf")
    _n_untold = 0


class Guarded(asyncio.Protocol):
    """A connection on its way through to the protocol that speaks HTTP.

    Args:
        guard: Its rules.
        inner: That protocol.

    Attributes:
        busy: The application works on a request of it.
    """

    def __init__(self, guard: Guard, inner: asyncio.Protocol) -> None:
        self._guard = guard
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._address = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if peer else "local"
        if not self._guard.admit(address, transport, self):
            self._transport.write(_TOO_MANY)  # type: ignore[union-attr]
            transport.close()
            return
        self._address = address
        self._inner.connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._address:
            if not self.busy:
                self._await_head()
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._address else None

    def pause_writing(self) -> None:
        self._inner.pause_writing()
        self._look_at_writing()

    def resume_writing(self) -> None:
        self._stop_watching()
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_watching()
        if self._address:
            self._guard.leave(self._address, self._transport)
            self._inner.connection_lost(exc)

    def begin(self) -> None:
        """The head of its request has arrived."""
        self.busy = True
        self._stop_clock()

    def _await_head(self) -> None:
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(self._guard.header_s, self._too_slow)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.busy and self._transport is not None:
            self._guard.closed(self._address, "no request came")
            self._transport.abort()

    def _look_at_writing(self, before: float = math.inf) -> None:
        """The reply must go on at some rate: who does not read it would hold its bytes for ever."""
        self._stop_watching()
        if self._transport is None:
            return
        left = self._transport.get_write_buffer_size()
        if before - left < _SLOWEST_BYTES_PER_S * self._guard.header_s:
            self._guard.closed(self._address, "the reply was not read")
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._writing = loop.call_later(self._guard.header_s, self._look_at_writing, left)

    def _stop_watching(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
