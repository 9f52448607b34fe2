"""The OpenAPI document of a server, made from the table of ``wire``."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from cloud import __version__
from cloud.server.messages import STATUSES, request_schema
from cloud.wire import API, MESSAGE_TYPE, OPERATIONS, RESOURCE_OPERATIONS, SCOPES, Operation

__all__ = ["document"]

_ERROR: Final = {
    "type": "object",
    "required": ["error", "text", "jid", "hint", "fields", "id"],
    "properties": {
        "error": {"type": "string", "description": "class of the exception that the client raises"},
        "text": {"type": "string"},
        "jid": {"description": "of the job, or jobs, that it is about"},
        "hint": {"type": ["string", "null"], "description": "what to do about it"},
        "fields": {"type": "object", "description": "further attributes of the exception"},
        "id": {"type": "string", "description": "of the request, as in the server's log"},
    },
}
_TOO_SOON: Final = {"Retry-After": {"schema": {"type": "string"}, "description": "seconds"}}
_COMMON: Final = {
    "400": "This is no request, or not one of this operation.",
    "401": "The credentials are missing or refused.",
    "403": "The credentials do not allow this.",
    "408": "The body arrives too slowly.",
    "411": "The body has no Content-Length.",
    "413": "The request is larger than this server takes.",
    "415": "The body has a Content-Encoding.",
    "429": "Too many requests.",
    "500": "The server failed; its log says why.",
    "503": "The server is stopping, or has no room at the moment.",
    "507": "The server, or the workgroup, has no room for this at the moment.",
}
_LATE: Final = ("429", "503", "507")
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Repeated with the same one, the request changes nothing more and is answered as before.",
    "schema": {"type": "string", "maxLength": 128, "pattern": "^[ -~]*$"},
}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1 of all operations."""
    paths: dict[str, Any] = {}
    for operation in (*OPERATIONS, *RESOURCE_OPERATIONS):
        paths.setdefault(API + operation.path, {})[operation.method.lower()] = _operation(operation)
    paths["/healthz"] = {"get": _plain("Whether the server lives; without credentials.", {"status", "version"})}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cloud",
            "version": __version__,
            "description": (
                f"Messages are JSON, or `{MESSAGE_TYPE}` where bytes go with them: a u32 (little-endian), JSON of that "
                "length whose key `blobs` lists lengths, then the blobs (`x-blobs` says what they are). The schema of "
                "such a message is that of its JSON without `blobs`. Payloads are opaque to the server."
            ),
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": f"<api_key>:<api_secretkey>; its scopes are among {', '.join(SCOPES)}",
                },
                "password": {"type": "http", "scheme": "basic", "description": "user and password; accounts only"},
            },
            "schemas": {"Error": _ERROR},
            "responses": {status: _error(status, text) for status, text in _COMMON.items()},
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.name.rpartition(".")[0] or "jobs"],
        "summary": operation.summary,
        "description": f"Scope: {operation.scope}." if operation.scope else "Any credentials in force will do.",
        "responses": {"200": _reply(operation)},
    }
    if operation.name.startswith("account."):
        found["security"] = [{"key": []}, {"password": []}]
    if operation.changes:
        found["parameters"] = [_IDEMPOTENCY_KEY]
    if operation.method != "GET":
        content: dict[str, Any] = {"application/json": {"schema": request_schema(operation)}}
        if operation.blobs:
            content = {MESSAGE_TYPE: {"schema": request_schema(operation), "x-blobs": operation.blobs}}
        found["requestBody"] = {"required": True, "content": content}
    known = {str(status) for status in STATUSES.values()} - _COMMON.keys()
    found["responses"] |= {status: {"$ref": f"#/components/responses/{status}"} for status in _COMMON}
    found["responses"] |= {status: _error(status, "See the error.") for status in sorted(known)}
    return found


def _reply(operation: Operation) -> dict[str, Any]:
    schema = {"type": "object", "properties": operation.reply, "required": _always(operation)}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if operation.reply_blobs:
        content[MESSAGE_TYPE] = {"schema": schema, "x-blobs": operation.reply_blobs}
    return {"description": operation.summary, "content": content}


def _always(operation: Operation) -> list[str]:
    return [] if operation.name == "finals" else list(operation.reply)


def _error(status: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return {**found, "headers": _TOO_SOON} if status in _LATE else found


def _plain(summary: str, names: set[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in sorted(names)}}
    reply = {"description": summary, "content": {"application/json": {"schema": schema}}}
    return {"operationId": "health", "summary": summary, "security": [], "responses": {"200": reply}}
