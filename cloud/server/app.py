"""The HTTP application: routes from the table of ``wire``, each request checked before anything is done with it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import HttpVersion10, web

from cloud import __version__
from cloud.errors import CloudException
from cloud.resources.principals import Principal
from cloud.server import auth, openapi
from cloud.server.account import AccountOperations
from cloud.server.audit import AuditLog
from cloud.server.auth import Authenticator, require
from cloud.server.beside import AccountRequests
from cloud.server.config import ServerConfig, is_loopback
from cloud.server.groups import Groups
from cloud.server.guard import Guard
from cloud.server.messages import Held, Refusal, error_status, read_message, reply, send
from cloud.server.metrics import CONTENT_TYPE, Metrics
from cloud.server.protocol import error_reply
from cloud.wire import API, OPERATIONS, RESOURCE_OPERATIONS, Operation

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ACCOUNT: Final = "account."
_PARTS: Final = frozenset({"extend", "files.append"})
"""What goes on with something whose beginning is in the audit log."""
_TARGETS: Final = ("name", "label", "user", "api_key", "role", "active", "scopes", "map", "upload", "code")
_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Server": "cloud",
}
_FAILED: Final = "the server failed; its log says why under {}"
_LARGE_BYTES: Final = 256 << 10
_MAX_LOGGED: Final = 500
_MAX_RUNS: Final = 8


class Application:
    """Requests into answers of the workgroups.

    Args:
        config: The server's.
        groups: The workgroups.
        authenticator: Says who asks.
        audit: Told of what is changed.
        log: Called with facts about each request that was answered.
    """

    def __init__(
        self,
        config: ServerConfig,
        groups: Groups,
        authenticator: Authenticator,
        audit: AuditLog,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config = config
        self.groups = groups
        self.authenticator = authenticator
        self._accounts = AccountRequests(AccountOperations(groups.accounts))
        self._audit = audit
        self._log = log
        self.connections = Guard(config.header_s, config.max_connections_per_address, log)
        self.ready = False
        self.draining = False
        self._n_open: Counter[int | str] = Counter()
        self._metrics = Metrics(groups.slots.n)
        n_bytes = max(config.max_held_bytes, config.max_message_bytes)
        self._requests = Held("requests", n_bytes, n_bytes)
        self._replies = Held("replies", config.max_replying_bytes, config.max_replying_bytes // 4)
        self.web = web.Application(middlewares=[self._guard], client_max_size=1 << 62)
        self.web.on_response_prepare.append(_add_headers)
        for operation in (*OPERATIONS, *RESOURCE_OPERATIONS):
            self.web.router.add_route(
                operation.method, API + operation.path, self._answering(operation), expect_handler=_expected
            )
        self.web.router.add_get("/openapi.json", self._openapi)
        self.web.router.add_get("/metrics", self._show_metrics)
        self.web.router.add_get("/healthz", self._health)
        self.web.router.add_get("/readyz", self._readiness)

    # --- every request ------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request["id"] = secrets.token_hex(8)
        began = time.monotonic()
        self.connections.head_arrived(request.transport)
        try:
            if request.version < HttpVersion10:
                raise Refusal(505, "HTTP/1.1 is spoken here")
            response = await handler(request)
        except auth.Refusal as exc:
            self._metrics.refused(exc.http_status)
            response = self._told(request, exc, exc.http_status, "AccountError", exc.http_headers)
        except Refusal as exc:
            response = self._error(request, exc.status, exc.text, hint=exc.hint, headers=exc.headers)
        except web.HTTPException as exc:
            response = self._error(request, exc.status, exc.reason)
        except CloudException as exc:
            kind = type(exc).__name__
            response = self._told(request, exc, error_status({"error": kind, "fields": {"retry": exc.retry}}), kind)
        except (asyncio.CancelledError, ConnectionError):
            if request.writer.output_size > 0:
                self._log({"event": "reply_cut", "id": request["id"], "path": request.path[:_MAX_LOGGED]})
            raise
        except Exception as exc:
            self._log({"event": "failed", "id": request["id"], "exception": exc})
            if request.writer.output_size > 0:
                raise ConnectionError("the reply has begun: nothing else can be said on this connection") from exc
            # The client gets a number, the log all there is.
            response = self._error(request, 500, _FAILED.format(request["id"]))
        finally:
            self.connections.answered(request.transport)
        duration_s = time.monotonic() - began
        route = request.match_info.route.resource
        pattern = "" if route is None else route.canonical
        self._metrics.answered(pattern, request.method, response.status, duration_s)
        self._log(
            {
                "event": "request",
                "id": request["id"],
                "method": request.method,
                "path": request.path[:_MAX_LOGGED],
                "status": response.status,
                "address": request.remote,
                "key": request.get("key"),
                "workgroup": request.get("workgroup"),
                "jid": request.get("jid"),
                "duration_s": round(duration_s, 6),
            }
        )
        return response

    def _error(
        self,
        request: web.Request,
        status: int,
        text: str,
        *,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
        kind: str | None = None,
        fields: dict[str, Any] | None = None,
    ) -> web.Response:
        kind = kind or {401: "AccountError", 403: "AccountError", 413: "PayloadTooLarge"}.get(status, "BackendError")
        response = error_reply(status, kind, text, request["id"], hint=hint, fields=fields, headers=headers)
        if request.body_exists and not request.content.at_eof():
            # What is left of the body is not worth reading.
            response.force_close()
        return response

    def _told(
        self, request: web.Request, exc: CloudException, status: int, kind: str, headers: dict[str, str] | None = None
    ) -> web.Response:
        fields = {"retry": exc.retry}
        return self._error(
            request, status, str(exc.parameter), hint=exc.hint, kind=kind, fields=fields, headers=headers
        )

    # --- operations ---------------------------------------------------------------------------------------------------

    async def _who(self, request: web.Request, operation: str, scope: str | None) -> Principal:
        if self.draining:
            raise Refusal(503, "the server is stopping", headers={"Retry-After": "1"})
        headers = request.headers.getall("Authorization", [])
        if len(headers) > 1:
            raise Refusal(400, "there is more than one Authorization header")
        header = headers[0] if headers else None
        if header is not None and header[:5].lower() == "basic" and not operation.startswith(_ACCOUNT):
            # Checking one takes 0.2 s of a core, and a program that keeps a password can lose it.
            raise auth.NotAuthenticated(
                "user and password are for accounts only", hint="Make a key with them: cloud.account.create_api_key()."
            )
        principal = self.authenticator.quick(header)
        if principal is None:
            principal = await asyncio.to_thread(self.authenticator.check, header, request.remote or "")
        if scope is not None:
            require(principal, scope)
        request["key"] = principal.api_key or principal.user
        request["workgroup"] = principal.workgroup_id
        if self._n_open[request["key"]] >= self._config.max_requests_per_key:
            raise Refusal(
                429,
                f"this key has {self._config.max_requests_per_key} requests open",
                hint="Wait for many jobs at once instead of with a thread for each.",
                headers={"Retry-After": "1"},
            )
        return principal

    def _answering(self, operation: Operation) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            principal = await self._who(request, operation.name, operation.scope)
            self._n_open[request["key"]] += 1
            try:
                with self._requests.of_request(principal.workgroup_id) as take:
                    answer, out = await self._answer(request, operation, principal, take)
                return await self._reply(request, principal, answer, out)
            finally:
                self._closed_one(request["key"])

        return handle

    async def _answer(
        self, request: web.Request, operation: Operation, principal: Principal, take: Callable[[int], None]
    ) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        content, blobs = await read_message(
            request,
            operation,
            take,
            max_json_bytes=self._config.max_json_bytes,
            max_message_bytes=self._config.max_message_bytes,
        )
        key = _idempotency_key(request) if operation.changes else ""
        if operation.name.startswith(_ACCOUNT):
            answer, out = await asyncio.to_thread(self._accounts.answer, operation.name, principal, content, key)
        else:
            group = await self.groups.get(principal.workgroup_id)
            answer, out = await group.ask(operation.name, content, blobs, key)
        request["jid"] = answer.get("jid") or _jids(content.get("jid"), content.get("jids"), answer)
        if "error" in answer:
            answer["id"] = request["id"]
        elif operation.changes and operation.name not in _PARTS:
            self._record(request, principal, operation.name, content, answer)
        return answer, out

    async def _reply(
        self, request: web.Request, principal: Principal, answer: dict[str, Any], out: tuple[bytes, ...]
    ) -> web.StreamResponse:
        n_bytes = sum(map(len, out))
        if n_bytes < _LARGE_BYTES:
            return reply(answer, out)
        with self._replies.of_request(principal.workgroup_id) as take:
            # One that is read slowly must leave room for others of its workgroup, however large it is.
            take(min(n_bytes, self._replies.share // 8))
            return await send(request, answer, out)

    def _closed_one(self, key: int | str) -> None:
        self._n_open[key] -= 1
        if not self._n_open[key]:
            del self._n_open[key]

    def _record(
        self, request: web.Request, principal: Principal, action: str, content: dict[str, Any], answer: dict[str, Any]
    ) -> None:
        target: dict[str, Any] = {name: answer[name] for name in ("jid", "start", "stop") if name in answer}
        if "jids" in content:
            target["jids"] = content["jids"] if content["jids"] is None else content["jids"][:16]
        for name in _TARGETS:
            if name in content or name in answer:
                target[name] = content.get(name, answer.get(name))
        if content.get("options", {}).get("label") is not None:
            target["label"] = content["options"]["label"]
        try:
            self._audit.record(
                who=principal.user,
                key=principal.api_key,
                address=request.remote or "",
                action=action,
                target=target,
                id=request["id"],
            )
        except OSError as exc:
            # It is done: told otherwise, the client would do it again.
            self._log({"event": "audit_failed", "id": request["id"], "action": action, "exception": exc})

    # --- what it is ---------------------------------------------------------------------------------------------------

    async def _openapi(self, request: web.Request) -> web.Response:
        await self._who(request, "openapi", None)
        return web.json_response(openapi.document())

    async def _show_metrics(self, request: web.Request) -> web.Response:
        groups = self.groups.opened()
        if not self._is_operator(request):
            principal = await self._who(request, "metrics", "admin")
            groups = [group for group in groups if group.number == principal.workgroup_id]
        text = self._metrics.text(groups, n_slots_used=self.groups.slots.n_used, n_open=self._n_open.total())
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    def _is_operator(self, request: web.Request) -> bool:
        """True for a request of this machine itself, without credentials, that no proxy handed on."""
        forwarded = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via")
        local = is_loopback(self._config.host) and is_loopback(request.remote or "")
        return local and not any(name in request.headers for name in ("Authorization", *forwarded))

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "version": __version__})

    async def _readiness(self, request: web.Request) -> web.Response:
        ready = self.ready and not self.draining
        return web.json_response({"ready": ready}, status=200 if ready else 503)


def _jids(jid: int | None, pairs: list[list[int]] | None, answer: dict[str, Any]) -> str | int | None:
    """Which jobs a request was about, for the log."""
    if jid is not None:
        return jid
    if pairs is None:
        pairs = [[answer["start"], answer["stop"]]] if answer.get("stop") else []
    shown = ",".join(f"{start}-{stop - 1}" if stop - start > 1 else f"{start}" for start, stop in pairs[:_MAX_RUNS])
    return (f"{shown},…" if len(pairs) > _MAX_RUNS else shown) or None


def _idempotency_key(request: web.Request) -> str:
    key = request.headers.get("Idempotency-Key", "")
    if len(key) > 128 or not key.isascii() or not key.isprintable():
        raise Refusal(400, "an Idempotency-Key has at most 128 printable ASCII characters")
    return key


async def _expected(request: web.Request) -> None:
    if request.headers["Expect"].lower() != "100-continue":
        raise web.HTTPExpectationFailed
    assert request.transport is not None
    request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_SECURITY_HEADERS)
    if "id" in request:  # not if an Expect was refused, which is looked at first
        response.headers["X-Request-Id"] = request["id"]
