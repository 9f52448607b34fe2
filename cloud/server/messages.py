"""Requests into content and blobs, replies into bytes: checked against the table, within limits, never unpickled."""

from __future__ import annotations

import asyncio
import json
import time
from functools import cache
from typing import Any, Final

import fastjsonschema
from aiohttp import web

from cloud.wire import MESSAGE_TYPE, OPERATIONS, RESOURCE_OPERATIONS, Operation, pack_message, unpack_message

_SLOW_AFTER_S: Final = 10.0
_SLOWEST_BYTES_PER_S: Final = 1024
_MAX_JIDS: Final = 20_000_000

#: By error class, what HTTP calls it. Those not named are the request's fault.
STATUSES: Final = {
    "JobNotFound": 404,
    "CronNotFound": 404,
    "StoredFileNotFound": 404,
    "PayloadTooLarge": 413,
    "AccountError": 403,
    "BackendClosed": 503,
    "BackendError": 409,
    "UnsupportedOperation": 422,
    "StoredFileCorrupt": 500,
}


class Refusal(Exception):
    """The request cannot be taken.

    Args:
        status: Of the reply.
        text: Why, for the client.
        hint: What to do about it.
        headers: Of the reply.
    """

    def __init__(
        self, status: int, text: str, *, hint: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.hint = hint
        self.headers = headers or {}


@cache
def _validators() -> dict[str, Any]:
    return {
        operation.name: fastjsonschema.compile(request_schema(operation))
        for operation in (*OPERATIONS, *RESOURCE_OPERATIONS)
    }


def request_schema(operation: Operation) -> dict[str, Any]:
    """JSON Schema of what an operation is asked with."""
    return {
        "type": "object",
        "properties": operation.request,
        "required": [name for name in operation.request if name not in operation.optional],
        "additionalProperties": False,
    }


async def read_message(
    request: web.Request, operation: Operation, *, max_json_bytes: int, max_message_bytes: int
) -> tuple[dict[str, Any], list[bytes]]:
    """What a client asks, checked against the table.

    Raises:
        Refusal: It is not a message, is not what the operation takes, is too large or arrives too slowly.
    """
    if operation.method == "GET":
        return {}, []
    packed = request.content_type == MESSAGE_TYPE
    limit = max_message_bytes if packed else max_json_bytes
    body = await _read(request, limit)
    try:
        content, blobs = _unpack(body, max_json_bytes) if packed else (json.loads(body or b"{}"), [])
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, f"the body is not a message: {exc}") from None
    if bool(blobs) != bool(operation.blobs) and not (operation.name == "extend" and not blobs):
        raise Refusal(400, f"{operation.name} takes " + (operation.blobs or "no blobs") + f", and {len(blobs)} came")
    try:
        _validators()[operation.name](content)
    except fastjsonschema.JsonSchemaValueException as exc:
        raise Refusal(400, f"{operation.name} does not take this: {exc.message[:300]}") from None
    _check_counts(operation.name, content, len(blobs))
    return content, blobs


def _check_counts(name: str, content: dict[str, Any], n_blobs: int) -> None:
    wanted = {"submit": 3, "open_map": 2, "cron.register": 1}.get(name, 0)
    wanted += len(content.get("chunks", ())) + len(content.get("contents", ()))
    if n_blobs != wanted:
        raise Refusal(400, f"{name} takes {wanted} blobs here, and {n_blobs} came")
    pairs = content.get("jids") or ()
    if any(stop < start for start, stop in pairs):
        raise Refusal(400, "a run of jids ends before it begins")
    if sum(stop - start for start, stop in pairs) > _MAX_JIDS:
        raise Refusal(413, f"more than {_MAX_JIDS} jids in one request")


async def _read(request: web.Request, limit: int) -> bytes:
    length = request.content_length
    if length is None and request.body_exists:
        raise Refusal(411, "a body needs a Content-Length here")
    if length is not None and length > limit:
        raise too_large(length, limit)
    pieces: list[bytes] = []
    n, began = 0, time.monotonic()
    while not request.content.at_eof():
        n += len(piece := await read_piece(request, began, n))
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def read_piece(request: web.Request, began: float, n: int) -> bytes:
    """The next bytes of a body, of which ``n`` arrived since ``began``; b"" at its end.

    Raises:
        Refusal: It arrives at less than 1 KB/s, measured from 10 s on: such senders only hold connections.
    """
    spent = time.monotonic() - began
    allowed_s = max(_SLOW_AFTER_S, (n + 65_536) / _SLOWEST_BYTES_PER_S) - spent
    if spent > _SLOW_AFTER_S and n < spent * _SLOWEST_BYTES_PER_S:
        raise slow()
    try:
        return await asyncio.wait_for(request.content.readany(), min(max(allowed_s, 0.1), _SLOW_AFTER_S))
    except TimeoutError:
        raise slow() from None


def slow() -> Refusal:
    """For a body that does not arrive."""
    return Refusal(408, "the body arrives too slowly", headers={"Connection": "close"})


def too_large(n_bytes: int, limit: int) -> Refusal:
    """For a body over its limit."""
    return Refusal(
        413,
        f"the request has {n_bytes} bytes, more than the {limit} this server takes",
        hint="Put large data into cloud.files, or ask the operator to raise the limit.",
        headers={"Connection": "close"},
    )


def _unpack(body: bytes, max_json_bytes: int) -> tuple[dict[str, Any], list[bytes]]:
    if int.from_bytes(body[:4], "little") > max_json_bytes:
        raise ValueError(f"its JSON is longer than {max_json_bytes} bytes")
    return unpack_message(body)


def reply(content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> web.Response:
    """A reply as bytes: JSON, or a message if bytes go with it."""
    if not blobs:
        status = error_status(content) if "error" in content else 200
        return web.json_response(content, status=status)
    return web.Response(body=b"".join(pack_message(content, blobs)), content_type=MESSAGE_TYPE)


def error_status(content: dict[str, Any]) -> int:
    """HTTP status of an error reply."""
    if content.get("fields", {}).get("retry"):
        return 507
    return STATUSES.get(content["error"], 400)
