"""Requests into content and blobs, replies into bytes: checked against the table, within limits, never unpickled."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import fastjsonschema
from aiohttp import web

from cloud.wire import MESSAGE_TYPE, OPERATIONS, RESOURCE_OPERATIONS, Operation, pack_message, unpack_message

_SLOW_AFTER_S: Final = 10.0
_SLOWEST_BYTES_PER_S: Final = 1024
_SEND_BYTES: Final = 256 << 10
_MAX_JIDS: Final = 20_000_000
_MAX_SCATTERED: Final = 2_000_000
"""Of several runs: a run costs what its ends cost, several are a list of all."""

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
    "StoredFileCorrupt": 409,
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
    request: web.Request,
    operation: Operation,
    take: Callable[[int], None],
    *,
    max_json_bytes: int,
    max_message_bytes: int,
) -> tuple[dict[str, Any], list[bytes]]:
    """What a client asks, checked against the table.

    Args:
        request: Its request.
        operation: What it asks for.
        take: Called with the number of bytes that came; see `Held`.
        max_json_bytes: Of the JSON.
        max_message_bytes: Of all.

    Raises:
        Refusal: It is not a message, is not what the operation takes, is too large or arrives too slowly; or the
            server holds as much as it may.
    """
    if "Content-Encoding" in request.headers:
        # A few compressed bytes may be any number of bytes.
        raise Refusal(415, "a body comes as it is, without a Content-Encoding")
    if operation.method == "GET":
        return {}, []
    packed = request.content_type == MESSAGE_TYPE
    limit = max_message_bytes if packed else max_json_bytes
    body = await _read(request, limit, take)
    try:
        content, blobs = _unpack(body, max_json_bytes) if packed else (_loads(body or b"{}"), [])
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, f"the body is not a message: {exc}") from None
    try:
        _validators()[operation.name](content)
    except fastjsonschema.JsonSchemaValueException as exc:
        raise Refusal(400, f"{operation.name} does not take this: {exc.message[:300]}") from None
    _check_counts(operation.name, content, len(blobs))
    return content, blobs


def _check_counts(name: str, content: dict[str, Any], n_blobs: int) -> None:
    wanted = {"submit": 3, "open_map": 2, "cron.register": 3, "files.put": 1, "files.append": 1}.get(name, 0)
    wanted += len(content.get("chunks", ())) + len(content.get("contents", ()))
    if n_blobs != wanted:
        raise Refusal(400, f"{name} takes {wanted} blobs here, and {n_blobs} came")
    pairs = content.get("jids") or ()
    if any(stop < start for start, stop in pairs):
        raise Refusal(400, "a run of jids ends before it begins")
    limit = _MAX_JIDS if len(pairs) == 1 else _MAX_SCATTERED
    if sum(stop - start for start, stop in pairs) > limit:
        raise Refusal(413, f"more than {limit} jids in one request", hint="Ask for fewer at once.")


class Held:
    """Bytes in memory for as long as a request is on its way in, or its reply on its way out; of all together.

    Args:
        what: Whose bytes they are, for people.
        limit: How many there may be.
        share: How many of them for one workgroup.

    Attributes:
        n: How many there are.
    """

    def __init__(self, what: str, limit: int, share: int) -> None:
        self.what = what
        self.limit = limit
        self.share = share
        self.n = 0
        self._n_of: Counter[int] = Counter()

    @contextmanager
    def of_request(self, workgroup: int) -> Iterator[Callable[[int], None]]:
        """Count those of one request, until it is answered. What is called with each number raises `Refusal`."""
        mine = 0

        def take(n: int) -> None:
            nonlocal mine
            if self.n + n > self.limit or self._n_of[workgroup] + n > self.share:
                raise Refusal(
                    503,
                    f"the server holds {self.n} bytes of {self.what}, {self._n_of[workgroup]} of them of this "
                    f"workgroup, and may hold {self.limit} and {self.share}",
                    headers={"Retry-After": "1", "Connection": "close"},
                )
            self.n += n
            self._n_of[workgroup] += n
            mine += n

        try:
            yield take
        finally:
            self.n -= mine
            self._n_of[workgroup] -= mine
            if not self._n_of[workgroup]:
                del self._n_of[workgroup]


async def _read(request: web.Request, limit: int, take: Callable[[int], None]) -> bytes:
    length = request.content_length
    if length is None and request.body_exists:
        raise Refusal(411, "a body needs a Content-Length here")
    if length is not None and length > limit:
        raise too_large(length, limit)
    pieces: list[bytes] = []
    n, began = 0, time.monotonic()
    while not request.content.at_eof():
        n += len(piece := await read_piece(request, began, n))
        take(len(piece))
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
    if request.content.is_eof():
        # All of it is here, as with most requests: there is nothing to wait for, nor to make a task for.
        return await request.content.readany()
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
    return unpack_message(body, _loads)


def _loads(text: bytes) -> Any:
    """JSON as RFC 8259 has it, and nothing that two readers might read differently.

    Raises:
        ValueError: It is not that.
    """
    content = json.loads(text.decode(), object_pairs_hook=_object, parse_float=_number, parse_constant=_no_number)
    if b"\\u" in text:
        # Half of a surrogate pair is no character: no file, database or log takes it.
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _number(text: str) -> int | float:
    number = float(text)
    if abs(number) == math.inf:
        raise ValueError("a number is too large")
    # To JSON 1.0 is an integer.
    return int(number) if number.is_integer() else number


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def reply(content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> web.Response:
    """A reply as bytes: JSON, or a message if bytes go with it."""
    if not blobs:
        status = error_status(content) if "error" in content else 200
        return web.json_response(content, status=status)
    return web.Response(body=b"".join(pack_message(content, blobs)), content_type=MESSAGE_TYPE)


async def send(request: web.Request, content: dict[str, Any], blobs: tuple[bytes, ...]) -> web.StreamResponse:
    """Send a large reply piece by piece, with no second copy; returns when the last piece is on its way.

    Raises:
        ConnectionError, asyncio.CancelledError: The client is gone, or reads too slowly.
    """
    pieces = pack_message(content, blobs)
    response = web.StreamResponse()
    response.content_type = MESSAGE_TYPE
    response.content_length = sum(map(len, pieces))
    await response.prepare(request)
    for piece in pieces:
        with memoryview(piece) as whole:
            for start in range(0, len(whole), _SEND_BYTES):
                await response.write(whole[start : start + _SEND_BYTES])
    await response.write_eof()
    return response


def error_status(content: dict[str, Any]) -> int:
    """HTTP status of an error reply."""
    if content.get("fields", {}).get("retry"):
        return 507
    return STATUSES.get(content["error"], 400)
