"""What speaks HTTP on a connection: aiohttp's, but for what it says of requests that are none."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

Log = Callable[[dict[str, Any]], None]

_LINE_BYTES: Final = 16 * 1024
_N_HEADERS: Final = 100
_KEEP_ALIVE_S: Final = 75.0
_LINGER_S: Final = 2.0
"""So long the rest of a body that is not wanted is read and dropped: who is still sending may miss the reply."""


class Protocol(RequestHandler):
    """Speaks HTTP on one connection.

    What cannot be understood is repeated neither to who sent it nor in the log: it may hold a key.

    Args:
        server: Whose requests they are.
        log: Told of requests that are none.
    """

    __slots__ = ("_report",)

    def __init__(self, server: web.Server, log: Log) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=_KEEP_ALIVE_S,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=_LINE_BYTES,
            max_field_size=_LINE_BYTES,
            max_headers=_N_HEADERS,
            lingering_time=_LINGER_S,
            # A few compressed bytes may be any number of bytes.
            auto_decompress=False,
        )
        self._report = log

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The reply to a request that is none, or that failed where the application could not see it."""
        number = secrets.token_hex(8)
        is_malformed = isinstance(exc, HttpProcessingError)
        self._report(
            {
                "event": "malformed" if is_malformed else "failed",
                "id": number,
                "address": request.remote,
                "status": status,
                "exception": type(exc).__name__ if is_malformed else exc,
            }
        )
        if request.writer.output_size > 0:
            raise ConnectionError("the reply has begun: nothing else can be said on this connection")
        text = (
            "this is no HTTP request, or its head is too large"
            if is_malformed
            else f"the server failed; its log says why under {number}"
        )
        response = error_reply(status if is_malformed else 500, "BackendError", text, number)
        response.force_close()
        return response


def error_reply(
    status: int,
    kind: str,
    text: str,
    number: str,
    *,
    hint: str | None = None,
    fields: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    """A reply that tells of an error, as `cloud.wire` has it.

    Args:
        status: Of HTTP.
        kind: Class of the exception that the client raises.
        text: What it says.
        number: Under which the log tells of it.
        hint: What to do about it.
        fields: Further attributes of the exception.
        headers: Further headers.
    """
    content = {"error": kind, "text": text, "jid": None, "hint": hint, "fields": fields or {}, "id": number}
    return web.json_response(content, status=status, headers={"X-Request-Id": number, **(headers or {})})
