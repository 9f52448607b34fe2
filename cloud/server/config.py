"""What the operator of a server may choose."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

MB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Choices of one server; the command line is made from them."""

    data: str
    """Its data folder."""
    host: str = "127.0.0.1"
    port: int = 8642
    """0: any that is free."""
    workers: int = 0
    """Jobs that run at the same time; 0: one a core."""
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False
    """Serve other addresses than the loopback without TLS."""
    interpreters: dict[str, str] = field(default_factory=dict)
    """Executables by 'major.minor', beside the server's own."""
    job_users: tuple[int, int] | None = None
    """(first uid, how many): each workgroup's jobs run as a user of its own."""
    max_message_bytes: int = 1024 * MB
    """Of one request with payloads, or one reply."""
    max_held_bytes: int = 2048 * MB
    """Of all requests that are being received or answered."""
    max_replying_bytes: int = 1024 * MB
    """Of all large replies that are being sent; a quarter for one workgroup. One counts as an eighth of it at most."""
    max_json_bytes: int = MB
    """Of the JSON of one request."""
    max_file_bytes: int = 1024 * 1024 * MB
    max_queued_jobs: int = 5_000_000
    """Of one workgroup that has no quota of its own."""
    max_requests_per_key: int = 1024
    """Held open at the same time by one key."""
    max_connections_per_address: int = 16_384
    job_memory_bytes: int = 0
    """Limits of one worker; 0: none."""
    job_processes: int = 512
    job_file_bytes: int = 0
    job_open_files: int = 1024
    output_limit_bytes: int = 64_000
    kill_grace_s: float = 0.5
    max_nesting: int = 100
    max_result_bytes: int = 0
    """Of one job's result; 0: no limit."""
    retention_s: float = 0.0
    """Finished jobs are forgotten after so long; 0: never."""
    idle_s: float = 60.0
    """Workers end after so long without a job."""
    header_s: float = 10.0
    """A request's headers must be there within this time, and its body keep arriving."""
    json_logs: bool = False
    trusted_hosts: tuple[str, ...] = ()
    """Further names by which clients may address this server; empty: any."""


def is_loopback(host: str) -> bool:
    """True for a name or address that only this machine itself reaches."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
