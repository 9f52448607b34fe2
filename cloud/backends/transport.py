"""Requests to a server, and their replies: tried again until they arrive, and known to be the server's own.

Owns when a request is sent again, for how long, and what is said meanwhile; what a reply must look like to be one of a
cloud server's. What is in requests and replies is the business of `cloud.backends.http` and `cloud.wire`.

::

    request ──► connection ──► send ──► head of the reply ──► body ──► Response
       ▲            └────────────┴─────────────┴────────────────┘
       └── back off ◄── cut, refused, silent, 429, 502, 503, 504: if sending it twice does no harm

Sending twice does no harm if nothing was sent, for GET and HEAD, and for requests with an idempotency key, which the
server carries out once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead, RemoteDisconnected

from cloud.backends.address import Address
from cloud.backends.bodies import Body
from cloud.backends.connections import Connection, Connections, NoConnection
from cloud.errors import BackendClosed, BackendError, ConfigurationError
from cloud.logs import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Final, Self

    from cloud.backends.bodies import Readable

__all__ = ["Reader", "Response", "Transport"]

_BACK_OFF_S: Final = (0.05, 5.0)
_TELL_EACH_S: Final = 30.0
_PIECE_BYTES: Final = 1024 * 1024
_MAX_ERROR_BYTES: Final = 1024 * 1024
_N_SHOWN: Final = 200
_TYPES: Final = ("application/json", "application/octet-stream", "application/vnd.cloudcall")
_TOO_MANY: Final = 429
_AGAIN: Final = (_TOO_MANY, 502, 503, 504)
_REDIRECTS: Final = (301, 302, 303, 307, 308)


class Response:
    """What the server answered.

    Attributes:
        status: Of HTTP. From 400 on the body is a JSON object with the key ``error``.
        headers: A mapping; names are found in any case.
        body: All of it; empty if it is streamed.
        reader: The body of a streamed reply below 400, to be read or closed; else None.
    """

    __slots__ = ("body", "headers", "reader", "status")

    def __init__(self, status: int, headers: HTTPMessage, body: bytes, reader: Reader | None = None) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.reader = reader

    def __repr__(self) -> str:
        return f"Response({self.status}, {len(self.body)} bytes)"


class Reader:
    """The body of a streamed reply; its connection serves other requests once it was read to the end.

    A context manager, and an iterator over pieces. Not thread-safe.

    Attributes:
        n_bytes: The length; None if the server did not know it.
    """

    def __init__(self, pool: Connections, connection: Connection, reply: HTTPResponse, url: str) -> None:
        self._pool = pool
        self._connection: Connection | None = connection
        self._reply = reply
        self._url = url
        self._n_read = 0
        self._ended = False
        self.n_bytes: int | None = reply.length

    def read(self, n_bytes: int) -> bytes:
        """Return the next ``n_bytes`` at most; none at the end. Blocks until there are that many, or the end.

        Raises:
            BackendError: The connection was cut or went silent, or the reader was closed. What was read before is good.
        """
        try:
            return self.receive(n_bytes)
        except (OSError, HTTPException) as exc:
            raise BackendError(
                f"The reply of {self._url} ended after {self._n_read} bytes: {_told(exc)}.", retry=True
            ) from exc

    def receive(self, n_bytes: int) -> bytes:
        """`read`, with the errors of the connection as they are."""
        connection = self._connection
        if connection is None:
            if self._ended:
                return b""
            raise BackendError("This reader is closed.")
        try:
            left = None if self.n_bytes is None else self.n_bytes - self._n_read
            wanted = n_bytes if left is None else min(n_bytes, left)
            piece = self._reply.read(wanted) if wanted else b""
            self._n_read += len(piece)
            if left is None:
                self._ended = len(piece) < wanted
            elif len(piece) < wanted:  # http.client minds only when it is asked for everything
                raise IncompleteRead(b"", left - len(piece))
            else:
                self._ended = wanted == left
            if self._ended:
                self._finish(connection)
        except BaseException:
            self.close()
            raise
        return piece

    def close(self) -> None:
        """Drop what is left, and its connection. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _finish(self, connection: Connection) -> None:
        # Once it is back, it belongs to another thread.
        self._connection = None
        self._reply.close()
        if self._reply.will_close or connection.spilled:
            connection.close()
        else:
            self._pool.give_back(connection)

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(_PIECE_BYTES):
            yield piece

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Failed(Exception):
    """One try failed, in a way that another may not.

    Attributes:
        cause: Why, in words.
        unsent: The server got nothing of the request.
        after_s: When the server wants to be asked again.
        response: What it answered, if that is one of its own replies.
    """

    def __init__(
        self, cause: str, *, unsent: bool = False, after_s: float = 0.0, response: Response | None = None
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.unsent = unsent
        self.after_s = after_s
        self.response = response


class Transport:
    """One server, to be asked by the threads of this process and of those forked from it.

    Opens no connection before the first request. Thread-safe and fork-safe.

    Args:
        url: The server; see `Address`.
        api_key, api_secretkey: Who asks; both None for requests that need no key.
        insecure: Allow ``http://`` to other machines. Certificates are verified in any case.
        ca_file: Certificates in PEM form to trust instead of the system's.
        patience_s: For how long a request that fails is tried again.
        max_reply_bytes: The largest reply that is taken, unless it is streamed.

    Attributes:
        url: The server's, without a secret.

    Raises:
        ConfigurationError: The url, the key or ``ca_file`` cannot be used.
    """

    def __init__(
        self,
        url: str,
        api_key: int | None,
        api_secretkey: str | None,
        *,
        insecure: bool = False,
        ca_file: str | None = None,
        patience_s: float = 600.0,
        max_reply_bytes: int = 1 << 30,
    ) -> None:
        self._address = Address(url, insecure=insecure)
        self.url = self._address.url
        self._api_key = api_key
        self._patience_s = patience_s
        self._max_reply_bytes = max_reply_bytes
        self._fields = {"Host": self._address.authority, "User-Agent": "cloudcall", "Accept-Encoding": "identity"}
        if api_key is not None or api_secretkey is not None:
            self._fields["Authorization"] = f"Bearer {_credentials(api_key, api_secretkey)}"
        if self._address.proxy and not self._address.secure:
            self._fields.update(self._address.proxy.headers)
        self._pool = Connections(self._address, ca_file)
        self._outage = _Outage(self.url)

    def __repr__(self) -> str:
        return f"Transport({self.url!r}, api_key={self._api_key!r})"

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Sequence[bytes] | Readable | None = None,
        n_bytes: int | None = None,
        timeout_s: float = 60.0,
        patience_s: float | None = None,
        idempotency_key: str | None = None,
        retry: bool = True,
        stream: bool = False,
    ) -> Response:
        """Send a request and return its reply. Blocks.

        Args:
            method: Of HTTP, in capitals.
            path: Below the url, quoted, with its query; begins with a slash.
            headers: Beside, or instead of, those that every request has.
            body: Bytes, pieces of them in order, or a binary file, read in pieces; see `Body`. Nothing large is copied.
            n_bytes: How much of a file to send.
            timeout_s: How long a try may be silent: nothing sent and nothing received. For a long poll more than the
                server may take.
            patience_s: No new try begins after so long; None for the transport's. 0 tries once.
            idempotency_key: The server carries out requests with the same key once; sent with each try.
            retry: False sends it once at most.
            stream: Leave the body to the `Reader` of the response, of any length.

        Raises:
            BackendError: There was no reply within the patience, or none of a cloud server; its certificate is not to
                be trusted; the reply is too large; the body cannot be read. A request without an idempotency key, other
                than GET and HEAD, may have been carried out.
            BackendClosed: The transport was closed before or meanwhile.
            ValueError: The path or a header cannot be part of a request.
        """
        content = Body(body, n_bytes)
        head = self._head(method, path, headers or {}, content.n_bytes, idempotency_key)
        may_repeat = method in ("GET", "HEAD") or idempotency_key is not None
        begun = time.monotonic()
        give_up = begun + (self._patience_s if patience_s is None else patience_s)
        longest_s, n_tries = _BACK_OFF_S[0], 0
        while True:
            self._check_open()
            n_tries += 1
            try:
                response = self._try(method, head, content, timeout_s, may_repeat=may_repeat, stream=stream)
            except _Failed as failed:
                failure = failed
            else:
                self._outage.over()
                return response
            self._check_open()
            can_repeat = retry and (failure.unsent or (may_repeat and content.can_be_sent))
            delay_s = failure.after_s + random.uniform(0.0, longest_s)
            now = time.monotonic()
            if not can_repeat or now + delay_s >= give_up:
                return self._given_up(method, failure, n_tries, now - begun)
            self._outage.failed(failure.cause)
            self._pool.pause(delay_s)
            longest_s = min(longest_s * 2, _BACK_OFF_S[1])

    def close(self) -> None:
        """Close all connections; requests under way end with BackendClosed. Idempotent."""
        self._pool.close()

    def _check_open(self) -> None:
        if self._pool.is_closed:
            raise BackendClosed(f"The connection to {self.url} was closed.")

    def _head(
        self, method: str, path: str, headers: Mapping[str, str], n_bytes: int | None, idempotency_key: str | None
    ) -> bytes:
        address = self._address
        target = address.base + path
        if not path.startswith("/") or " " in path or not (path.isascii() and path.isprintable()):
            raise ValueError(f"not a quoted path: {path!r}")
        if address.proxy and not address.secure:
            target = f"http://{address.authority}{target}"
        fields = {**self._fields, **headers}
        if idempotency_key is not None:
            fields["Idempotency-Key"] = idempotency_key
        if n_bytes is not None or method not in ("GET", "HEAD"):
            fields["Content-Length"] = str(n_bytes or 0)
        lines = [f"{method} {target} HTTP/1.1"]
        for name, value in fields.items():
            if not (value.isascii() and value.isprintable()):  # the value may be secret
                raise ValueError(f"the header {name} has characters that no header may have")
            lines.append(f"{name}: {value}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def _try(
        self, method: str, head: bytes, body: Body, timeout_s: float, *, may_repeat: bool, stream: bool
    ) -> Response:
        reply, reader = self._replied(method, head, body, timeout_s, may_repeat=may_repeat)
        try:
            return self._received(reply, reader, method, stream=stream)
        except (OSError, HTTPException) as exc:
            raise _Failed(_told(exc, timeout_s)) from exc
        except BaseException:
            reader.close()
            raise

    def _replied(
        self, method: str, head: bytes, body: Body, timeout_s: float, *, may_repeat: bool
    ) -> tuple[HTTPResponse, Reader]:
        fresh = False
        while True:
            connection = self._connection(timeout_s, fresh=fresh)
            try:
                reply = self._exchange(connection, method, head, body, timeout_s)
                return reply, Reader(self._pool, connection, reply, self.url)
            except (OSError, HTTPException) as exc:
                connection.close()
                if not _is_cut(exc):
                    shown = _shown(str(exc).encode("utf-8", "replace"))
                    raise self._not_ours(f"something that is not HTTP: {shown}") from exc
                # The server closed it in the moment in which it was used again: nothing is wrong with the server.
                stale = connection.reused and not connection.began and not isinstance(exc, TimeoutError)
                if fresh or not (stale and may_repeat and body.can_be_sent):
                    raise _Failed(_told(exc, timeout_s)) from exc
                fresh = True
            except BaseException:
                connection.close()
                raise

    def _connection(self, timeout_s: float, *, fresh: bool) -> Connection:
        try:
            return self._pool.open(timeout_s) if fresh else self._pool.take(timeout_s)
        except NoConnection as exc:
            import socket

            cause = exc.__cause__
            if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN and not self._outage.was_reached:
                raise BackendError(
                    f"There is no host of the name in {self.url}: {_told(cause)}.", hint="Check server_url."
                ) from exc
            if isinstance(cause, UnicodeError):
                raise BackendError(f"{self.url} names no host: {cause}.", hint="Check server_url.") from exc
            raise _Failed(f"{exc}: {_told(cause or exc)}", unsent=True) from exc

    def _exchange(self, connection: Connection, method: str, head: bytes, body: Body, timeout_s: float) -> HTTPResponse:
        def pieces() -> Iterator[bytes | memoryview]:
            yield head
            yield from body.pieces()

        cut: OSError | None = None
        try:
            connection.send(pieces(), timeout_s)
        except TimeoutError:
            raise
        except OSError as exc:
            cut = exc  # a server that refuses a body says so before it has read it
        try:
            reply = connection.reply(method)
        except (OSError, HTTPException):
            if cut is not None:
                raise cut from None
            raise
        if cut is not None:
            reply.will_close = True
        return reply

    def _received(self, reply: HTTPResponse, reader: Reader, method: str, *, stream: bool) -> Response:
        status, headers = reply.status, reply.headers
        if status in _REDIRECTS:
            reader.close()
            raise self._redirected(headers.get("Location", ""))
        ours = _may_be_ours(reply)
        if stream and status < 400 and ours:
            return Response(status, headers, b"", reader)
        limit = self._max_reply_bytes if status < 400 else _MAX_ERROR_BYTES
        body = reader.receive(limit + 1) if (reader.n_bytes or 0) <= limit else b""
        reader.close()
        if max(reader.n_bytes or 0, len(body)) > limit:
            raise BackendError(
                f"{self.url} answered {status} with more than the {limit} bytes that are taken at once.",
                hint="Ask for less at once.",
            )
        response = Response(status, headers, body)
        ours = ours and (status < 400 or method == "HEAD" or _is_error(body))
        if status in _AGAIN:
            raise _Failed(
                f"it answered {status}{_reason(body) if ours else ''}",
                after_s=_seconds(headers.get("Retry-After", "")),
                response=response if ours else None,
            )
        if not ours:
            raise self._not_ours(f"{status}, {ascii(headers.get('Content-Type', 'no type'))[1:-1]}: {_shown(body)}")
        return response

    def _given_up(self, method: str, failure: _Failed, n_tries: int, tried_s: float) -> Response:
        """The end of a request without success: a reply that speaks for itself, or an error."""
        response = failure.response
        if response is not None and (n_tries == 1 or response.status == _TOO_MANY):
            return response
        tried = f", tried {n_tries} times in {tried_s:.0f} s" if n_tries > 1 else ""
        raise BackendError(
            f"{method} at {self.url} failed{tried}: {failure.cause}.",
            retry=True,
            hint="Check that the server runs and that server_url names it; what was submitted before is kept there.",
        ) from failure.__cause__

    def _not_ours(self, what: str) -> BackendError:
        return BackendError(
            f"{self.url} does not answer like a cloud server, but with {what}",
            hint="Check server_url, its port and path, and any proxy before the server.",
        )

    def _redirected(self, location: str) -> BackendError:
        return BackendError(
            f"{self.url} sends requests on to {_shown(location.encode('utf-8', 'surrogateescape'))}, which is not "
            "followed: your key would go there too.",
            hint="Set server_url to that address, if it is your server.",
        )


class _Outage:
    """What is said while the server cannot be reached: at once, each half minute, and when it is back.

    Has no lock, which a forked child might inherit taken: at worst two threads say the same.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._since_s: float | None = None
        self._told_s = 0.0
        self.was_reached = False

    def failed(self, cause: str) -> None:
        now = time.monotonic()
        since = self._since_s
        if since is None:
            self._since_s = self._told_s = now
            logger().warning("%s: %s; trying again", self._url, cause)
        elif now - self._told_s >= _TELL_EACH_S:
            self._told_s = now
            logger().warning("%s: %s; trying again, for %.0f s now", self._url, cause, now - since)

    def over(self) -> None:
        self.was_reached = True
        since, self._since_s = self._since_s, None
        if since is not None:
            logger().warning("%s is back after %.1f s", self._url, time.monotonic() - since)


def _credentials(api_key: int | None, api_secretkey: str | None) -> str:
    if not isinstance(api_key, int) or isinstance(api_key, bool) or api_key <= 0:
        raise ConfigurationError(f"api_key {api_key!r} is none: give the number of your key, beside api_secretkey.")
    if not isinstance(api_secretkey, str) or not api_secretkey:
        raise ConfigurationError(f"There is no api_secretkey for the api_key {api_key}.")
    if not (api_secretkey.isascii() and api_secretkey.isprintable()) or " " in api_secretkey:
        raise ConfigurationError(f"The api_secretkey for the api_key {api_key} has characters that no secret has.")
    return f"{api_key}:{api_secretkey}"


def _is_cut(exc: Exception) -> bool:
    """Tell a connection that ended, or was silent, from one that carries nonsense."""
    return isinstance(exc, (OSError, IncompleteRead, RemoteDisconnected))


def _told(exc: BaseException, timeout_s: float = 0.0) -> str:
    if isinstance(exc, TimeoutError):
        return f"no answer within {timeout_s:g} s" if timeout_s else "no answer in time"
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused"
    if isinstance(exc, (ConnectionError, HTTPException)):
        return "the connection was cut"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)


def _may_be_ours(reply: HTTPResponse) -> bool:
    if reply.length is None and not reply.chunked:
        return False  # it ends where the connection does: nobody could tell whether it was cut
    kind = reply.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind in _TYPES or (not kind and reply.length == 0)


def _is_error(body: bytes) -> bool:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("error"), str)


def _reason(body: bytes) -> str:
    text = json.loads(body).get("text") if body else None
    return f", {text}" if isinstance(text, str) and text else ""


def _seconds(retry_after: str) -> float:
    """Read Retry-After: seconds, or a date. What is neither, or past, counts as none."""
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after[:9])
    if not retry_after:
        return 0.0
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _shown(content: bytes) -> str:
    """The beginning of what a stranger sent, without characters that a terminal would obey."""
    more = "…" if len(content) > _N_SHOWN else ""
    return ascii(content[:_N_SHOWN].decode("utf-8", "replace")) + more
