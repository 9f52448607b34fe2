"""Jobs of a server, over HTTP."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache

from cloud.backends.remote import RemoteBackend, raise_remote
from cloud.backends.transport import Transport
from cloud.configuration import Settings
from cloud.engine.worker.surroundings import log_level
from cloud.errors import BackendClosed, BackendError, CloudException, ConfigurationError
from cloud.jobs import JobOptions
from cloud.serialization import pickling
from cloud.serialization.functions import Function
from cloud.serialization.modules import CodeFinder, CodeSet
from cloud.serialization.shared import inline
from cloud.wire import API, MAX_WAIT_S, MESSAGE_TYPE, OPERATIONS, RESOURCE_OPERATIONS, pack_message, unpack_message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeVar

    _Reply = TypeVar("_Reply")

_ROUTES: Final = {operation.name: operation for operation in (*OPERATIONS, *RESOURCE_OPERATIONS)}
_SILENT_S: Final = 60.0
_MAX_REPUBLISHED: Final = 3
_N_PUBLISHED: Final = 64


class HttpBackend(RemoteBackend):
    """A server's jobs.

    Args:
        transport: To the server.
        code: Finds the program's modules, which travel with its jobs.
        patience_s: For how long a server that does not answer is asked again.
    """

    name = "http"
    simulated = False

    def __init__(self, transport: Transport, code: CodeFinder, patience_s: float) -> None:
        super().__init__()
        self._patience_s = patience_s
        self._transport = transport
        self._code = code
        self._closed = False
        self._published: deque[str] = deque(maxlen=_N_PUBLISHED)
        self._publishing = threading.Lock()
        self._context = b""
        self._level: int | None = None

    # --- requests -----------------------------------------------------------------------------------------------------

    def ask(self, op: str, *blobs: bytes, **content: Any) -> tuple[dict[str, Any], list[bytes]]:
        operation = _ROUTES[op]
        if operation.waits:
            return self._ask_patiently(op, **content)
        return self._ask(op, blobs, content)

    def _ask(
        self,
        op: str,
        blobs: tuple[bytes, ...],
        content: dict[str, Any],
        wait_s: float = 0.0,
        patience_s: float | None = None,
    ) -> tuple[dict[str, Any], list[bytes]]:
        operation = _ROUTES[op]
        get = operation.method == "GET"
        response = self._transport.request(
            operation.method,
            API + operation.path,
            headers={} if get else {"Content-Type": MESSAGE_TYPE},
            body=None if get else pack_message(content, [inline(blob) for blob in blobs]),
            timeout_s=_SILENT_S + wait_s,
            patience_s=patience_s,
            # Questions have one, too: it says that asking again does no harm.
            idempotency_key=os.urandom(16).hex(),
        )
        answer, found = decode(response)
        raise_remote(answer)
        return answer, found

    def _ask_patiently(self, op: str, **content: Any) -> tuple[dict[str, Any], list[bytes]]:
        """One that waits: in pieces, so that neither proxies nor a restart of the server end it."""
        limit_s = content.pop("timeout_s")
        until = None if limit_s is None else time.monotonic() + limit_s
        while True:
            left_s = None if until is None else max(0.0, until - time.monotonic())
            wait_s = MAX_WAIT_S if left_s is None else min(MAX_WAIT_S, left_s)
            patience_s = None if left_s is None else min(self._patience_s, left_s)
            try:
                answer, blobs = self._ask(op, (), {**content, "timeout_s": wait_s}, wait_s, patience_s)
            except BackendError as exc:
                if not limit_s or not exc.retry or patience_s == self._patience_s:
                    raise
                # Nothing was heard in time: that is all that who waits for so long, and no longer, asked to know.
                return {"unfinished": content["jids"], "segments": None, "found": [], "gone": [], "released": False}, []
            over = not answer["unfinished"] if op == "wait" else any(answer.values())
            if over or (until is not None and time.monotonic() >= until):
                return answer, blobs

    def _submission(self, function: Function, options: JobOptions) -> dict[str, Any]:
        return {
            "function": function.name,
            "reusable": function.reusable,
            "options": options.as_dict(),
            "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
            "cloudpickle": _cloudpickle_version(),
            "code": self._publish(),
        }

    def _surroundings(self) -> bytes:
        level = log_level()
        if not self._context or level != self._level:
            self._context, self._level = pickling.dumps_plain((None, "", {}, level)), level
        return self._context

    def _publish(self) -> str:
        """Have this program's modules on the server; the name of their set."""
        code = self._code.current()
        if not code.digest or code.digest in self._published:
            return code.digest
        with self._publishing:
            for _ in range(_MAX_REPUBLISHED):
                try:
                    return self._publish_set(code)
                except CloudException as exc:
                    if not exc.retry:
                        raise
                    # A file was edited meanwhile, or the server lost a part.
                    code = self._code.current()
            return self._publish_set(code)

    def _publish_set(self, code: CodeSet) -> str:
        if code.digest not in self._published:
            files = [list(each) for each in code.files]
            missing = set(self.ask("missing_code", files=files)[0]["missing"])
            contents = {digest: code.read(path) for path, digest, _ in code.files if digest in missing}
            answer, _ = self.ask("publish_code", *contents.values(), files=files, contents=list(contents))
            self._published.append(answer["code"])
        return code.digest

    def submit(self, function: Function, arguments: bytes, options: JobOptions, context: bytes | None = None) -> int:
        return self._with_code(lambda: super(HttpBackend, self).submit(function, arguments, options, None))

    def ask_with_call(
        self, op: str, function: Function, arguments: bytes, options: JobOptions, content: dict[str, Any]
    ) -> dict[str, Any]:
        return self._with_code(
            lambda: super(HttpBackend, self).ask_with_call(op, function, arguments, options, content)
        )

    def _with_code(self, send: Callable[[], _Reply]) -> _Reply:
        """Send something that needs this program's modules on the server; again if they are not there any more."""
        for _ in range(_MAX_REPUBLISHED):
            try:
                return send()
            except BackendError as exc:
                if not getattr(exc, "lacks_code", None):
                    raise
                # The server tidied up, or is another one.
                self._published.clear()
        raise BackendError("the server keeps losing the modules of this program")

    def check_open(self) -> None:
        if self._closed:
            raise BackendClosed("the connection to the server was closed")

    def explain(self, error: CloudException) -> None:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and error.hint is None:
            from cloud.serialization.explain import explain_missing_module
            from cloud.serialization.origins import installed_packages

            error.hint = explain_missing_module(cause, installed_packages(), self._code.not_sent()) or None

    # --- ends ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the connections. The jobs go on: they are the server's."""
        self._closed = True
        self._transport.close()
        self._watcher.close()


@cache
def _code_finder(enabled: bool, whitelist: str) -> CodeFinder:
    # Kept from one connection to the next: what it knows of this program's files took a while to find out.
    return CodeFinder(enabled, whitelist.split())


@cache
def _cloudpickle_version() -> str:
    import cloudpickle

    version: str = cloudpickle.__version__
    return version


def decode(response: Any) -> tuple[dict[str, Any], list[bytes]]:
    """(content, blobs) of a reply."""
    import json

    if response.headers.get("Content-Type", "").startswith(MESSAGE_TYPE):
        try:
            return unpack_message(response.body)
        except ValueError as exc:
            raise BackendError(f"the server's reply cannot be read: {exc}") from exc
    content: dict[str, Any] = json.loads(response.body)
    return content, []


def open_accounts(
    settings: Settings, url: str
) -> tuple[Callable[[str, str, dict[str, Any]], dict[str, Any]], Callable[[], None]]:
    """What ``RemoteAccounts`` needs to ask a server. Needs no key.

    Raises:
        ConfigurationError: The url cannot be one.
    """
    transport = Transport(
        url,
        None,
        None,
        insecure=settings.insecure_server,
        ca_file=settings.server_ca_file or None,
        patience_s=settings.server_patience_s,
    )

    def ask_as(op: str, authorization: str, content: dict[str, Any]) -> dict[str, Any]:
        operation = _ROUTES[op]
        response = transport.request(
            operation.method,
            API + operation.path,
            headers={"Content-Type": MESSAGE_TYPE, "Authorization": authorization},
            body=pack_message(content),
            timeout_s=_SILENT_S,
            idempotency_key=os.urandom(16).hex(),
        )
        answer, _ = decode(response)
        raise_remote(answer)
        return answer

    return ask_as, transport.close


def open_http(settings: Settings, *, credentials: tuple[Any, Any, Any]) -> HttpBackend:
    """The server that the credentials name.

    Args:
        settings: In force.
        credentials: (api_key, api_secretkey, server_url); what is None comes from the settings.

    Raises:
        ConfigurationError: No server or no key is named, or one of them cannot be.
    """
    api_key, secret, url = credentials
    url = url or settings.server_url
    problems = []
    if not url:
        problems.append(
            "a key is set and no server: pass server_url to cloud.setkey(), or set CLOUD_SERVER_URL; "
            "without a key jobs run on this machine"
        )
    try:
        number = int(api_key)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        problems.append(
            f"api_key must be the number of a key, from 1 on, not {api_key!r}: 'cloud admin key' lists them"
        )
    if not isinstance(secret, str) or not secret:
        problems.append("api_secretkey is missing: it was shown once, when the key was made")
    if problems:
        raise ConfigurationError(problems)
    transport = Transport(
        url,
        number,
        secret,
        insecure=settings.insecure_server,
        ca_file=settings.server_ca_file or None,
        patience_s=settings.server_patience_s,
    )
    finder = _code_finder(settings.automatic_dependency_transfer, settings.dependency_whitelist)
    return HttpBackend(transport, finder, settings.server_patience_s)
