"""What is said between an engine and those who use it from elsewhere: the table of operations, and their messages.

A client says it over HTTP, a job over its worker's channel. Client stub, routes, checks of what comes in, the OpenAPI
document and the tests of authorization are all made from ``OPERATIONS``. A message is JSON, with raw bytes beside it
(``blobs``) where bytes are what it is about: they are never put into the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cloud.jobs import Jids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

API: Final = "/v1"
MESSAGE_TYPE: Final = "application/vnd.cloudcall"
"""A u32 length, JSON of that length, then the blobs whose lengths its key 'blobs' lists."""

MAX_WAIT_S: Final = 30.0
"""How long a server lets one request wait; who waits longer asks again."""

SCOPES: Final = ("submit", "read", "kill", "files", "cron", "admin")


class Operation:
    """One line of the table.

    Attributes:
        name: What it is called in messages between processes.
        method, path: Of its HTTP request, below ``API``.
        scope: What the key must allow; None where any valid key or password will do.
        summary: One sentence.
        request: JSON Schema of the members of its content.
        optional: Those that may be missing.
        blobs: What the blobs beside it are.
        reply: JSON Schema of the members of the reply.
        reply_blobs: What the blobs beside the reply are.
        changes: It changes something: repeated with the same idempotency key it changes nothing more.
        waits: It may be answered late.
    """

    __slots__ = (
        "blobs",
        "changes",
        "method",
        "name",
        "optional",
        "path",
        "reply",
        "reply_blobs",
        "request",
        "scope",
        "summary",
        "waits",
    )

    def __init__(  # noqa: PLR0913 - one line of a table
        self,
        name: str,
        route: str,
        scope: str | None,
        summary: str,
        request: dict[str, Any] | None = None,
        reply: dict[str, Any] | None = None,
        *,
        optional: Sequence[str] = (),
        blobs: str = "",
        reply_blobs: str = "",
        changes: bool = False,
        waits: bool = False,
    ) -> None:
        self.name = name
        self.method, self.path = route.split(" ")
        self.scope = scope
        self.summary = summary
        self.request = request or {}
        self.reply = reply or {}
        self.optional = tuple(optional)
        self.blobs = blobs
        self.reply_blobs = reply_blobs
        self.changes = changes
        self.waits = waits


_MAX_INT: Final = 2**63 - 1
_JID: Final = {"type": "integer", "minimum": 0, "maximum": _MAX_INT}
_COUNT: Final = {"type": "integer", "minimum": 0, "maximum": 2**31}
_PAIR: Final = {"type": "array", "items": _JID, "minItems": 2, "maxItems": 2}
_JIDS: Final = {"type": "array", "items": _PAIR, "maxItems": 1_000_000, "description": "runs of jids: [first, end)"}
_ANY_JIDS: Final = {"anyOf": [_JIDS, {"type": "null"}]}
_BOOL: Final = {"type": "boolean"}
_SECONDS: Final = {"type": ["number", "null"], "minimum": 0, "maximum": 1e9}
_TEXT: Final = {"type": "string", "maxLength": 4096}
_OPTIONAL_TEXT: Final = {"type": ["string", "null"], "maxLength": 4096}
_NUMBER: Final = {"type": ["number", "null"]}
_OBJECT: Final = {"type": "object"}
_STATUS: Final = {"type": "integer", "minimum": 0, "maximum": 6}
_DIGEST: Final = {"type": "string", "pattern": "^([0-9a-f]{64})?$"}
_CHUNKS: Final = {
    "type": "array",
    "maxItems": 100_000,
    "description": "[kind, number of items] of each chunk of arguments",
    "items": {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "integer", "minimum": 1, "maximum": 2**31},
    },
}
_OPTIONS: Final = {
    "type": "object",
    "description": "options that differ from their defaults, as JobOptions.as_dict gives them",
    "additionalProperties": False,
    "properties": {
        "cores": {"type": "integer", "minimum": 1, "maximum": 4096},
        "depends_on": {
            "anyOf": [{"type": "array", "items": _JID, "maxItems": 1_000_000}],
        },
        "env_vars": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "string", "maxLength": 131_072},
            "maxProperties": 10_000,
        },
        "fast_serialization": {"type": "integer", "minimum": 0, "maximum": 2},
        "ignore_dependency_errors": _BOOL,
        "kill_process": _BOOL,
        "label": _OPTIONAL_TEXT,
        "max_runtime_s": _SECONDS,
        "priority": {"type": "integer", "minimum": -_MAX_INT, "maximum": _MAX_INT},
        "profile": _BOOL,
        "reports_late": _BOOL,
        "restartable": _BOOL,
        "retries": {"type": "integer", "minimum": 0, "maximum": 2**31},
        "retry_delay_s": {"type": "number", "minimum": 0, "maximum": 1e9},
    },
}
_VERSION: Final = {"type": "string", "maxLength": 32, "pattern": "^[0-9]+([.][0-9A-Za-z+-]+)*$"}
_SUBMISSION: Final = {
    "function": {"type": "string", "maxLength": 4096, "description": "its name, for people"},
    "reusable": {"type": "boolean", "description": "loading the function once serves any number of calls"},
    "options": _OPTIONS,
    "python": {**_VERSION, "description": "major.minor of the client's interpreter"},
    "cloudpickle": {**_VERSION, "description": "version that made the payloads"},
    "code": {**_DIGEST, "description": "digest of the client's modules, published before; empty for none"},
}
_OF_CLIENTS: Final = ("python", "cloudpickle", "code")
_RANGE_REPLY: Final = {"start": _JID, "stop": _JID}

OPERATIONS: Final = (
    Operation(
        "submit",
        "POST /jobs",
        "submit",
        "Take one call. Its jid is told once it is on disk.",
        _SUBMISSION,
        {"jid": _JID},
        optional=_OF_CLIENTS,
        blobs="function, surroundings, arguments",
        changes=True,
    ),
    Operation(
        "open_map",
        "POST /maps",
        "submit",
        "Begin a map, with its first chunks; a short one is sealed at once.",
        {**_SUBMISSION, "chunks": _CHUNKS, "sealed": _BOOL},
        {"map": _JID, **_RANGE_REPLY},
        optional=_OF_CLIENTS,
        blobs="function, surroundings, then the chunks",
        changes=True,
    ),
    Operation(
        "extend",
        "POST /maps/extend",
        "submit",
        "Add chunks to an open map; sealed: they are the last.",
        {"map": _JID, "chunks": _CHUNKS, "sealed": _BOOL},
        _RANGE_REPLY,
        blobs="the chunks",
        changes=True,
    ),
    Operation(
        "abandon",
        "POST /maps/abandon",
        "submit",
        "Give an open map up: its jobs are killed.",
        {"map": _JID},
        changes=True,
    ),
    Operation(
        "wait",
        "POST /jobs/wait",
        "read",
        "Wait until all jobs are final, one has failed (unfinished: null), or the time is up.",
        {"jids": _JIDS, "timeout_s": _SECONDS, "stop_on_error": _BOOL, "background": _BOOL},
        {"unfinished": _ANY_JIDS},
        optional=("background",),
        waits=True,
    ),
    Operation(
        "finals",
        "POST /jobs/finals",
        "read",
        "Wait until at least one of the jobs is final: runs of those that are, as [first, n, status].",
        {"jids": _JIDS, "timeout_s": _SECONDS, "poll": _TEXT, "background": _BOOL},
        {
            "found": {"type": "array", "items": {"type": "array", "items": _JID, "minItems": 3, "maxItems": 3}},
            "gone": {**_JIDS, "description": "those that nothing is known of any more"},
            "released": {**_BOOL, "description": "it was ended early"},
        },
        optional=("background",),
        waits=True,
    ),
    Operation("release", "POST /jobs/release", "read", "End the 'finals' of this name early.", {"poll": _TEXT}),
    Operation(
        "outcomes",
        "POST /jobs/outcomes",
        "read",
        "How final jobs ended.",
        {"jids": _JIDS},
        {"segments": {"type": "array", "items": {"type": "array", "items": _COUNT, "minItems": 3, "maxItems": 3}}},
        reply_blobs="one outcome a segment",
    ),
    Operation(
        "statuses", "POST /jobs/statuses", "read", "Where jobs stand.", {"jids": _JIDS}, reply_blobs="a byte a jid"
    ),
    Operation(
        "describe",
        "POST /jobs/describe",
        "read",
        "What is known of one job.",
        {"jid": _JID},
        {"facts": _OBJECT},
        reply_blobs="its outcome if it is final; stdout and stderr so far if it runs",
    ),
    Operation(
        "select",
        "POST /jobs/select",
        "read",
        "Jids of the jobs that match all that is given.",
        {
            "label": _OPTIONAL_TEXT,
            "status": {"anyOf": [{"type": "array", "items": _STATUS, "maxItems": 16}, {"type": "null"}]},
            "function": _OPTIONAL_TEXT,
        },
        {"jids": _JIDS},
    ),
    Operation(
        "cancel",
        "POST /jobs/kill",
        "kill",
        "Kill jobs, or all that are unfinished (null); those whose end is still to come.",
        {"jids": _ANY_JIDS, "begun": _BOOL},
        {"pending": _JIDS},
        changes=True,
    ),
    Operation("delete", "POST /jobs/delete", "kill", "Forget final jobs.", {"jids": _JIDS}, changes=True),
    Operation("connection_info", "GET /server", "read", "What runs the jobs.", {}, {"info": _OBJECT}),
    Operation(
        "missing_code",
        "POST /code/missing",
        "submit",
        "Which of these contents the server lacks, of a set of the client's modules.",
        {
            "files": {
                "type": "array",
                "maxItems": 10_000,
                "description": "[path, sha256, size] of each file",
                "items": {"type": "array", "minItems": 3, "maxItems": 3, "items": {"type": ["string", "integer"]}},
            }
        },
        {"missing": {"type": "array", "items": _DIGEST}},
    ),
    Operation(
        "publish_code",
        "POST /code",
        "submit",
        "Publish a set of modules, with the contents that were missing.",
        {
            "files": {
                "type": "array",
                "maxItems": 10_000,
                "items": {"type": "array", "minItems": 3, "maxItems": 3, "items": {"type": ["string", "integer"]}},
            },
            "contents": {"type": "array", "items": _DIGEST, "maxItems": 10_000},
        },
        {"code": _DIGEST},
        blobs="the contents, in the order named",
        changes=True,
    ),
)
"""Every operation on jobs; those of the resources follow in ``RESOURCE_OPERATIONS``."""

RESOURCE_OPERATIONS: Final[tuple[Operation, ...]] = ()
"""Operations on what stands beside the jobs."""


def pack_message(content: dict[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """A message as pieces to be sent one after the other; the blobs are not copied."""
    import json

    text = json.dumps({**content, "blobs": [len(blob) for blob in blobs]}, separators=(",", ":")).encode()
    return [len(text).to_bytes(4, "little") + text, *blobs]


def unpack_message(body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """(content, blobs) of a message.

    Raises:
        ValueError: It is not one.
    """
    import json

    offset = 4 + int.from_bytes(body[:4], "little")
    if len(body) < offset:
        raise ValueError("the message is cut off")
    content = json.loads(body[4:offset])
    lengths = content.pop("blobs", None) if isinstance(content, dict) else None
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise ValueError("the message does not begin with a JSON object that lists the lengths of its blobs")
    if offset + sum(lengths) != len(body):
        raise ValueError("the message's blobs have other lengths than it says")
    blobs = []
    for length in lengths:
        blobs.append(body[offset : offset + length])
        offset += length
    return content, blobs


def pack_jids(jids: Jids) -> list[tuple[int, int]]:
    """Jids as [start, stop) pairs."""
    if type(jids) is range and jids.step == 1:
        return [(jids.start, jids.stop)] if jids else []
    pairs: list[tuple[int, int]] = []
    for jid in jids:
        if pairs and pairs[-1][1] == jid:
            pairs[-1] = pairs[-1][0], jid + 1
        else:
            pairs.append((jid, jid + 1))
    return pairs


def unpack_jids(pairs: Iterable[Sequence[int]]) -> Jids:
    """The jids of ``pack_jids``."""
    runs = [range(start, stop) for start, stop in pairs]
    if len(runs) == 1:
        return runs[0]
    return [jid for run in runs for jid in run]
