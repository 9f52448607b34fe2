"""The HTTP application: routes from the table of ``wire``, each request checked before anything is done with it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from cloud import __version__
from cloud.errors import CloudException
from cloud.resources.principals import Principal
from cloud.server import auth
from cloud.server.audit import AuditLog
from cloud.server.auth import Authenticator, require
from cloud.server.config import ServerConfig
from cloud.server.groups import Groups
from cloud.server.guard import Guard
from cloud.server.messages import Refusal, error_status, read_message, reply
from cloud.wire import API, OPERATIONS, RESOURCE_OPERATIONS, Operation

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_AUDITED: Final = frozenset(
    {"submit", "open_map", "cancel", "delete", "cron.register", "cron.deregister", "files.delete"}
)
_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Server": "cloud",
}


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
        self._audit = audit
        self._log = log
        self.connections = Guard(config.header_s, config.max_connections_per_address)
        self.ready = False
        self.draining = False
        self._n_open: Counter[int | str] = Counter()
        self.web = web.Application(middlewares=[self._guard], client_max_size=1 << 62)
        self.web.on_response_prepare.append(_add_headers)
        for operation in (*OPERATIONS, *RESOURCE_OPERATIONS):
            self.web.router.add_route(operation.method, API + operation.path, self._answering(operation))
        self.web.router.add_get("/healthz", self._health)
        self.web.router.add_get("/readyz", self._readiness)

    # --- every request ------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request["id"] = secrets.token_hex(8)
        began = time.monotonic()
        self.connections.head_arrived(request.transport)
        try:
            response = await handler(request)
        except auth.Refusal as exc:
            response = self._error(
                request, exc.http_status, str(exc.parameter), hint=exc.hint, headers=exc.http_headers
            )
        except Refusal as exc:
            response = self._error(request, exc.status, exc.text, hint=exc.hint, headers=exc.headers)
        except web.HTTPException as exc:
            response = self._error(request, exc.status, exc.reason)
        except CloudException as exc:
            status = error_status({"error": type(exc).__name__, "fields": {"retry": exc.retry}})
            response = self._error(request, status, str(exc.parameter), hint=exc.hint, kind=type(exc).__name__)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as exc:  # noqa: BLE001 - the client gets a number, the log all there is
            self._log({"event": "failed", "id": request["id"], "exception": exc})
            response = self._error(request, 500, f"the server failed; its log says why under {request['id']}")
        finally:
            self.connections.answered(request.transport)
        if not response.prepared:
            response.headers["X-Request-Id"] = request["id"]
        self._log(
            {
                "event": "request",
                "id": request["id"],
                "method": request.method,
                "path": request.path,
                "status": response.status,
                "address": request.remote,
                "key": request.get("key"),
                "duration_s": round(time.monotonic() - began, 6),
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
    ) -> web.Response:
        names = {401: "AccountError", 403: "AccountError", 413: "PayloadTooLarge"}
        content = {
            "error": kind or names.get(status, "BackendError"),
            "text": text,
            "jid": None,
            "hint": hint,
            "fields": {},
            "id": request["id"],
        }
        response = web.json_response(content, status=status, headers=headers)
        if status >= 400 and request.body_exists and not request.content.at_eof():
            # What is left of the body is not worth reading.
            response.force_close()
        return response

    # --- operations ---------------------------------------------------------------------------------------------------

    async def _who(self, request: web.Request, scope: str | None) -> Principal:
        if self.draining:
            raise Refusal(503, "the server is stopping", headers={"Retry-After": "1"})
        header = request.headers.get("Authorization")
        principal = self.authenticator.quick(header)
        if principal is None:
            principal = await asyncio.to_thread(self.authenticator.check, header, request.remote or "")
        if scope is not None:
            require(principal, scope)
        request["key"] = principal.api_key or principal.user
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
            principal = await self._who(request, operation.scope)
            self._n_open[request["key"]] += 1
            try:
                content, blobs = await read_message(
                    request,
                    operation,
                    max_json_bytes=self._config.max_json_bytes,
                    max_message_bytes=self._config.max_message_bytes,
                )
                key = _idempotency_key(request) if operation.changes else ""
                group = await self.groups.get(principal.workgroup_id)
                answer, out = await group.ask(operation.name, content, blobs, key)
                if operation.name in _AUDITED and "error" not in answer:
                    self._record(request, principal, operation.name, content, answer)
                if "error" in answer:
                    answer["id"] = request["id"]
                return reply(answer, out)
            finally:
                self._closed_one(request["key"])

        return handle

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
        for name in ("label", "name"):
            if name in content:
                target[name] = content[name]
        self._audit.record(
            who=principal.user,
            key=principal.api_key,
            address=request.remote or "",
            action=action,
            target=json.dumps(target),
            id=request["id"],
        )

    # --- how it is ----------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "version": __version__})

    async def _readiness(self, request: web.Request) -> web.Response:
        ready = self.ready and not self.draining
        return web.json_response({"ready": ready}, status=200 if ready else 503)


def _idempotency_key(request: web.Request) -> str:
    key = request.headers.get("Idempotency-Key", "")
    if len(key) > 128 or not key.isascii() or not key.isprintable():
        raise Refusal(400, "an Idempotency-Key has at most 128 printable ASCII characters")
    return key


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_SECURITY_HEADERS)
