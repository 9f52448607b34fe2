"""`cloud serve`: starts the server, keeps it going and ends it in good order."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

from cloud.errors import BackendError, ConfigurationError
from cloud.resources import make_folder
from cloud.resources.accounts import AccountStore
from cloud.server.app import Application
from cloud.server.audit import AuditLog
from cloud.server.auth import Authenticator
from cloud.server.config import ServerConfig, is_loopback
from cloud.server.groups import Groups
from cloud.server.protocol import Protocol

_OTHERS_END_S: Final = 10.0
_DRAIN_S: Final = 30.0
_BACKLOG: Final = 4096
_REFRESH_S: Final = 1.0
_TIDY_S: Final = 60.0
_OWN_FILES: Final = 512
"""Descriptors that are no connections."""


class Server:
    """A server on one data folder.

    Args:
        config: The operator's choices.
        log: Called with facts about what happens.

    Raises:
        ConfigurationError: These choices would be unsafe, or do not fit each other.
        BackendError: Another server works on the data folder.
    """

    def __init__(self, config: ServerConfig, log: Callable[[dict[str, Any]], None]) -> None:
        self.config = config
        self._log = log
        self._tls = _tls(config)
        make_folder(config.data)
        self._lock_fd = _lock(os.path.join(config.data, "lock"))
        self.accounts = AccountStore(config.data)
        self.audit = AuditLog(os.path.join(config.data, "audit.log"))
        self.groups = Groups(config, self.accounts, self._lock_fd)
        self.application = Application(config, self.groups, Authenticator(self.accounts), self.audit, log)
        self._stop: asyncio.Event | None = None
        self._stopping = 0
        self.port = 0

    @property
    def url(self) -> str:
        """Where it answers."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self.port}"

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends it at once.

        Args:
            on_ready: Called when it answers.
        """
        loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        runner = web.AppRunner(
            self.application.web,
            shutdown_timeout=1.0,
            handler_cancellation=True,
        )
        await runner.setup()
        server = runner.server
        assert server is not None
        self.application.connections.max_total = _allow_connections()
        listening = await loop.create_server(
            self.application.connections.around(lambda: Protocol(server, self._log)),
            self.config.host,
            self.config.port,
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else self.config.header_s,
            backlog=_BACKLOG,
            reuse_address=True,
        )
        try:
            self.port = listening.sockets[0].getsockname()[1]
            await asyncio.to_thread(
                self.groups.open_all,
                lambda number, exc: self._log({"event": "workgroup_failed", "workgroup": number, "exception": exc}),
            )
            self.application.ready = True
            on_ready()
            await self._until_stopped(self._stop)
            self.application.draining = True
            await self._drain()
        finally:
            listening.close()
            await runner.cleanup()
            await asyncio.to_thread(self.close)

    async def _until_stopped(self, stop: asyncio.Event) -> None:
        tidied = time.monotonic()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _REFRESH_S)
                return
            try:
                await asyncio.to_thread(self.groups.refresh)
                if time.monotonic() - tidied > _TIDY_S:
                    tidied = time.monotonic()
                    await asyncio.to_thread(self.groups.tidy)
                    await asyncio.to_thread(self.audit.sync)
            except (BackendError, OSError) as exc:
                self._log({"event": "housekeeping_failed", "exception": exc})

    def _on_signal(self) -> None:
        self._stopping += 1
        if self._stop is not None:
            self._stop.set()

    async def _drain(self) -> None:
        """Let the jobs that run end; those that do not in time run again after the next start."""
        until = time.monotonic() + _DRAIN_S
        for group in self.groups.opened():
            group.drain()
        while self._stopping < 2 and time.monotonic() < until:
            if not any(group.busy for group in self.groups.opened()):
                return
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End everything. Blocks; idempotent."""
        self.groups.close()
        self.audit.close()
        self.accounts.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def _allow_connections() -> int:
    """As many as the system lets this process have; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # some systems say "infinity", and mean less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return max(16, (1 << 20 if soft == resource.RLIM_INFINITY else soft) - _OWN_FILES)


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if bool(config.tls_cert) != bool(config.tls_key):
        raise ConfigurationError("--tls-cert and --tls-key belong together: give both")
    if config.tls_cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(config.tls_cert, config.tls_key)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigurationError(
                f"the certificate {config.tls_cert} or its key {config.tls_key} cannot be used: {exc}"
            ) from exc
        return context
    if not config.insecure and not is_loopback(config.host):
        raise ConfigurationError(
            f"--host {config.host} serves other machines, and without TLS whoever sees the traffic can run code here: "
            "give --tls-cert and --tls-key, or --insecure behind a proxy that does TLS"
        )
    return None


def _lock(path: str) -> int:
    """Descriptor of the locked file: of this server, and of the processes under it for as long as they live."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + _OTHERS_END_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # A server that was killed leaves workers behind for a moment.
            if time.monotonic() < until:
                time.sleep(0.02)
                continue
            os.close(fd)
            raise BackendError(
                f"another server works on {os.path.dirname(path)}",
                hint="Stop it first, or give this one another folder with --data.",
            ) from None
        return fd
