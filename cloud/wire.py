"""What is said between an engine and those who use it from elsewhere: the table of operations, and their messages.

A client says it over HTTP, a job over its worker's channel. Client stub, routes, checks of what comes in, the OpenAPI
document and the tests of authorization are all made from ``OPERATIONS``. A message is JSON, with raw bytes beside it
(``blobs``) where bytes are what it is about: they are never put into the JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
_SEGMENTS: Final = {"type": "array", "items": {"type": "array", "items": _COUNT, "minItems": 3, "maxItems": 3}}
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
        {
            "jids": _JIDS,
            "timeout_s": _SECONDS,
            "stop_on_error": _BOOL,
            "background": _BOOL,
            "outcomes": {**_BOOL, "description": "send how they ended, too, if all are final and that is little"},
        },
        {"unfinished": _ANY_JIDS, "segments": {"anyOf": [_SEGMENTS, {"type": "null"}]}},
        optional=("background", "outcomes"),
        reply_blobs="one outcome a segment",
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
        {"segments": _SEGMENTS},
        reply_blobs="one outcome a segment",
    ),
    Operation(
        "statuses", "POST /jobs/statuses", "read", "Where jobs stand.", {"jids": _JIDS}, reply_blobs="a byte a jid"
    ),
    Operation(
        "describe",
        "POST /jobs/describe",
        "read",
        "What is known of jobs, or of the first of them: as many as one reply should have.",
        {"jids": _JIDS},
        {"facts": {"type": "array", "items": _OBJECT, "description": "one a job, in order"}},
        reply_blobs="what the facts name by number: how a job ended, without its value; its output so far",
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
        "list",
        "POST /jobs/list",
        "read",
        "Jobs that match all that is given, in short and newest first; before: where to go on, null at the end.",
        {
            "label": _OPTIONAL_TEXT,
            "status": {"anyOf": [{"type": "array", "items": _STATUS, "maxItems": 16}, {"type": "null"}]},
            "function": _OPTIONAL_TEXT,
            "before": {"anyOf": [_JID, {"type": "null"}]},
            "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
        },
        {"jobs": {"type": "array", "items": _OBJECT}, "before": {"type": ["integer", "null"]}},
        optional=("label", "status", "function", "before"),
    ),
    Operation(
        "overview",
        "GET /overview",
        "read",
        "How many jobs there are, by status code; worker slots, those in use, and workers.",
        {},
        {"counts": {"type": "array", "items": _JID}, "n_slots": _COUNT, "n_used": _COUNT, "n_workers": _COUNT},
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

MAX_PIECE_BYTES: Final = 16 << 20
"""The most that one request carries of a stored file; what is larger goes in pieces."""

_NAME: Final = {"type": "string", "minLength": 1, "maxLength": 1024, "description": "of a stored file; never a path"}
_PREFIX: Final = {"type": "string", "maxLength": 1024}
_SIZE: Final = {"type": "integer", "minimum": 0, "maximum": _MAX_INT}
_PIECE: Final = {"type": "integer", "minimum": 0, "maximum": MAX_PIECE_BYTES}
_SHA256: Final = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_UPLOAD: Final = {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "names an upload"}
_LABEL: Final = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[\\x00-\\x7f]*$"}
_TIME: Final = {"type": ["string", "null"], "description": "ISO 8601, in UTC"}
_USER: Final = {"type": "string", "minLength": 1, "maxLength": 256}
_KEY: Final = {"type": "integer", "minimum": 0, "maximum": _MAX_INT, "description": "number of an API key"}
_PASSWORD: Final = {"type": "string", "minLength": 1, "maxLength": 1024}
_ROLE: Final = {"type": "string", "enum": ["admin", "member", "read_only"]}
_ONE_KEY: Final = {
    "api_key": _KEY,
    "active": _BOOL,
    "created": _TIME,
    "note": {"type": "string"},
    "scopes": {"type": "array", "items": {"type": "string"}},
    "expires": _TIME,
    "last_used": _TIME,
    "revoked": _BOOL,
}
_ONE_USER: Final = {
    "user": _USER,
    "workgroup": {"type": "string"},
    "role": _ROLE,
    "active": _BOOL,
    "created": _TIME,
}
_FILE_FACTS: Final = {"size": _SIZE, "md5": {"type": "string"}, "sha256": _SHA256}

_FILE_OPERATIONS: Final = (
    Operation(
        "files.put",
        "POST /files/put",
        "files",
        "Store a small file, in one request. It is on disk when this is answered.",
        {"name": _NAME, "sha256": _SHA256},
        blobs="the contents",
        changes=True,
    ),
    Operation(
        "files.begin",
        "POST /files/begin",
        "files",
        "Begin an upload, to be sent in pieces. It is given up when a day has passed since its last piece.",
        {},
        {"upload": _UPLOAD},
        changes=True,
    ),
    Operation(
        "files.append",
        "POST /files/append",
        "files",
        "Add a piece where the upload ends; a piece for another place changes nothing. How much there is then.",
        {"upload": _UPLOAD, "offset": _SIZE},
        {"size": _SIZE},
        blobs="the piece",
        changes=True,
    ),
    Operation(
        "files.commit",
        "POST /files/commit",
        "files",
        "Make an upload the contents of a name, if they are as said. On disk when this is answered.",
        {"upload": _UPLOAD, "name": _NAME, "sha256": _SHA256},
        changes=True,
    ),
    Operation("files.abort", "POST /files/abort", "files", "Give an upload up.", {"upload": _UPLOAD}, changes=True),
    Operation(
        "files.open",
        "POST /files/open",
        "files",
        "What a name stands for now, and the first bytes of a range of it.",
        {"name": _NAME, "start": _SIZE, "n": _PIECE},
        {**_FILE_FACTS, "piece_sha256": _SHA256},
        reply_blobs="at most n bytes, from start on",
    ),
    Operation(
        "files.read",
        "POST /files/read",
        "files",
        "Bytes of contents that were opened, whatever their name stands for by now.",
        {"sha256": _SHA256, "name": _NAME, "start": _SIZE, "n": _PIECE},
        {"piece_sha256": _SHA256},
        reply_blobs="at most n bytes, from start on",
    ),
    Operation(
        "files.list",
        "POST /files/list",
        "files",
        "Names in order, those that begin with a prefix and come after another name; more: there are others.",
        {"prefix": _PREFIX, "after": _PREFIX},
        {"names": {"type": "array", "items": _NAME}, "more": _BOOL},
    ),
    Operation(
        "files.exists", "POST /files/exists", "files", "Whether there is a name.", {"name": _NAME}, {"exists": _BOOL}
    ),
    Operation(
        "files.info",
        "POST /files/info",
        "files",
        "What is known of a stored file.",
        {"name": _NAME},
        {**_FILE_FACTS, "modified": _TIME},
    ),
    Operation(
        "files.delete",
        "POST /files/delete",
        "files",
        "Delete a stored file; whether there was one.",
        {"name": _NAME},
        {"deleted": _BOOL},
        changes=True,
    ),
)

_CRON_OPERATIONS: Final = (
    Operation(
        "cron.register",
        "POST /crons/register",
        "cron",
        "Store a call, to be made by a schedule.",
        {
            **_SUBMISSION,
            "label": _LABEL,
            "schedule": {"type": "string", "maxLength": 1024},
            "tz": {"type": "string", "maxLength": 128},
            "missed": {"type": "string", "enum": ["skip", "run_once", "run_all"]},
            "overlap": {"type": "string", "enum": ["allow", "skip", "kill_previous"]},
            "func_name": _TEXT,
            "creator_host": {"type": "string", "maxLength": 256},
        },
        optional=_OF_CLIENTS,
        blobs="function, surroundings, arguments",
        changes=True,
    ),
    Operation("cron.deregister", "POST /crons/deregister", "cron", "Forget a cron.", {"label": _LABEL}, changes=True),
    Operation(
        "cron.manual_run",
        "POST /crons/run",
        "cron",
        "Make a cron's call now.",
        {"label": _LABEL},
        {"jid": _JID},
        changes=True,
    ),
    Operation(
        "cron.list",
        "POST /crons/list",
        "cron",
        "Labels of all crons, sorted.",
        {},
        {"labels": {"type": "array", "items": _LABEL}},
    ),
    Operation(
        "cron.info",
        "POST /crons/info",
        "cron",
        "What is known of a cron.",
        {"label": _LABEL},
        {
            "label": _LABEL,
            "schedule": _TEXT,
            "tz": _TEXT,
            "missed": _TEXT,
            "overlap": _TEXT,
            "func_name": _TEXT,
            "created": _TIME,
            "creator_host": _TEXT,
            "last_run": _TIME,
            "last_jid": {"type": ["integer", "null"]},
            "next_run": _TIME,
        },
    ),
)

_ACCOUNT_OPERATIONS: Final = (
    Operation(
        "account.sign_in",
        "POST /account/sign-in",
        None,
        "Who asks.",
        {},
        {
            "user": _USER,
            "workgroup": {"type": "string"},
            "role": _ROLE,
            "scopes": {"type": "array", "items": {"type": "string"}},
            "api_key": {"type": ["integer", "null"]},
        },
    ),
    Operation(
        "account.list_keys",
        "POST /account/keys/list",
        None,
        "The API keys of a user, oldest first, without their secrets.",
        {"user": _USER},
        {"keys": {"type": "array", "items": _OBJECT}},
        optional=("user",),
    ),
    Operation(
        "account.create_key",
        "POST /account/keys/create",
        None,
        "Create an API key; its secret is told now and never again.",
        {
            "note": {"type": "string", "maxLength": 1024},
            "scopes": {
                "type": ["array", "null"],
                "items": {"type": "string", "enum": list(SCOPES)},
                "maxItems": len(SCOPES),
            },
            "expires": _TIME,
            "user": _USER,
        },
        {**_ONE_KEY, "api_secretkey": {"type": "string"}},
        optional=("note", "scopes", "expires", "user"),
        changes=True,
    ),
    *(
        Operation(
            f"account.{verb}_key",
            f"POST /account/keys/{verb}",
            None,
            summary,
            {"api_key": _KEY, "user": _USER},
            _ONE_KEY,
            optional=("user",),
            changes=True,
        )
        for verb, summary in (
            ("activate", "Accept an API key again."),
            ("deactivate", "Refuse an API key from now on."),
            ("revoke", "Refuse an API key for good."),
        )
    ),
    Operation(
        "account.note_key",
        "POST /account/keys/note",
        None,
        "Replace the note of an API key.",
        {"api_key": _KEY, "note": {"type": "string", "maxLength": 1024}, "user": _USER},
        _ONE_KEY,
        optional=("user",),
        changes=True,
    ),
    Operation(
        "account.set_password",
        "POST /account/password",
        None,
        "Replace a user's password.",
        {"password": _PASSWORD, "user": _USER},
        _ONE_USER,
        optional=("user",),
        changes=True,
    ),
    Operation(
        "account.list_users",
        "POST /account/users/list",
        "admin",
        "The users of the workgroup, oldest first.",
        {},
        {"users": {"type": "array", "items": _OBJECT}},
    ),
    Operation(
        "account.create_user",
        "POST /account/users/create",
        "admin",
        "Create a user of the workgroup.",
        {"user": _USER, "password": _PASSWORD, "role": _ROLE},
        _ONE_USER,
        optional=("role",),
        changes=True,
    ),
    Operation(
        "account.set_user_role",
        "POST /account/users/role",
        "admin",
        "Give a user of the workgroup another role.",
        {"user": _USER, "role": _ROLE},
        _ONE_USER,
        changes=True,
    ),
    Operation(
        "account.set_user_active",
        "POST /account/users/active",
        "admin",
        "Accept or refuse a user of the workgroup.",
        {"user": _USER, "active": _BOOL},
        _ONE_USER,
        changes=True,
    ),
)

RESOURCE_OPERATIONS: Final = (*_FILE_OPERATIONS, *_CRON_OPERATIONS, *_ACCOUNT_OPERATIONS)
"""Operations on what stands beside the jobs. Those of accounts are for who signed in; no job may ask them."""


def pack_message(content: dict[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """A message as pieces to be sent one after the other; the blobs are not copied."""
    import json

    text = json.dumps({**content, "blobs": [len(blob) for blob in blobs]}, separators=(",", ":")).encode()
    return [len(text).to_bytes(4, "little") + text, *blobs]


def unpack_message(body: bytes, loads: Callable[[bytes], Any] | None = None) -> tuple[dict[str, Any], list[bytes]]:
    """(content, blobs) of a message.

    Args:
        body: The message.
        loads: Reads its JSON; None for ``json.loads``.

    Raises:
        ValueError: It is not one.
    """
    if loads is None:
        import json

        loads = json.loads
    offset = 4 + int.from_bytes(body[:4], "little")
    if len(body) < offset:
        raise ValueError("the message is cut off")
    content = loads(body[4:offset])
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
