"""``cloud serve``: a server for a team."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from typing import Any

from cloud.cli.arguments import Commands
from cloud.cli.output import OK, Output, UsageError
from cloud.configuration import home_folder
from cloud.errors import ConfigurationError, UnsupportedOperation

__all__ = ["add_to", "data_folder"]


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = commands.add("serve", _serve, "run a server: other machines, and this one, run their jobs here")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8642, help="port to listen on (8642; 0: any that is free)")
    parser.add_argument("--data", metavar="DIR", help="folder for everything that is kept (~/.cloud/server)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="jobs at the same time (one a core)")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", metavar="FILE", help="its key, PEM")
    parser.add_argument("--insecure", action="store_true", help="listen on other addresses without TLS")
    parser.add_argument(
        "--python", action="append", default=[], metavar="EXE", help="a further interpreter for jobs (repeatable)"
    )
    parser.add_argument(
        "--job-users", metavar="UID:N", help="run each workgroup's jobs as an OS user of its own, from UID on (as root)"
    )
    parser.add_argument(
        "--job-memory", type=_bytes, default=0, metavar="BYTES", help="memory of one worker, such as 4G"
    )
    parser.add_argument("--job-processes", type=int, default=512, metavar="N", help="processes of one worker (512)")
    parser.add_argument("--job-file-size", type=_bytes, default=0, metavar="BYTES", help="largest file a job may write")
    parser.add_argument("--output-limit", type=_bytes, default=64_000, metavar="BYTES", help="output kept of a job")
    parser.add_argument("--kill-grace", type=float, default=0.5, metavar="SECONDS", help="what a killed job has to end")
    parser.add_argument("--max-result", type=_bytes, default=0, metavar="BYTES", help="largest result (no limit)")
    parser.add_argument(
        "--idle", type=float, default=60.0, metavar="SECONDS", help="workers end after so long without a job (60)"
    )
    parser.add_argument("--max-nesting", type=int, default=100, metavar="N", help="how deep jobs may submit jobs")
    parser.add_argument("--keep-days", type=float, default=0.0, metavar="DAYS", help="forget finished jobs (never)")
    parser.add_argument("--max-body", type=_bytes, default=1 << 30, metavar="BYTES", help="largest request (1G)")
    parser.add_argument("--json-logs", action="store_true", help="log JSON lines")
    parser.add_argument(
        "--print-json", action="store_true", help="once ready, print one line with url, api_key and api_secretkey"
    )


def data_folder(given: str | None) -> str:
    """The data folder of a server."""
    return os.path.abspath(given or os.path.join(home_folder(), "server"))


def _serve(options: argparse.Namespace, output: Output) -> int:
    try:
        import aiohttp  # noqa: F401 - only looked for
    except ImportError:
        raise UnsupportedOperation(
            "a server needs packages that are not installed here", hint="pip install 'cloudcall[server]'"
        ) from None
    from cloud.server.config import ServerConfig
    from cloud.server.log import ServerLog
    from cloud.server.serve import Server

    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port} is no port: 0 to 65535")
    if options.workers < 0:
        raise UsageError(f"--workers {options.workers} is no number of workers: 0 means one a core")
    config = ServerConfig(
        data=data_folder(options.data),
        host=options.host,
        port=options.port,
        workers=options.workers,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        insecure=options.insecure,
        interpreters=dict(_version_of(path) for path in options.python),
        job_users=_users(options.job_users),
        job_memory_bytes=options.job_memory,
        job_processes=options.job_processes,
        job_file_bytes=options.job_file_size,
        output_limit_bytes=options.output_limit,
        kill_grace_s=options.kill_grace,
        max_nesting=options.max_nesting,
        idle_s=options.idle,
        max_result_bytes=options.max_result,
        retention_s=options.keep_days * 86_400.0,
        max_message_bytes=options.max_body,
        json_logs=options.json_logs,
    )
    log = ServerLog(sys.stderr, as_json=config.json_logs)
    log.take_messages()
    server = Server(config, log)
    if config.job_users is None and os.geteuid() == 0:
        text = "running as root: jobs have all of root's rights; use an ordinary user, or --job-users"
        if config.json_logs:
            log({"event": "warning", "text": text})
        else:
            output.warn(text)
    made = server.accounts.bootstrap()

    def ready() -> None:
        log({"event": "started", "url": server.url, "data": config.data, "slots": server.groups.slots.n})
        _show(server.url, made, output, as_json=options.print_json)

    _run(server.run(ready))
    log({"event": "stopped", "url": server.url})
    return OK


def _run(main: Any) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def _show(url: str, made: Any, output: Output, *, as_json: bool) -> None:
    key = None if made is None else made[2]
    facts: dict[str, Any] = {"url": url, "api_key": None, "api_secretkey": None}
    if key is not None:
        facts.update(api_key=key.api_key, api_secretkey=key.api_secretkey)
    if as_json:
        print(json.dumps(facts), flush=True)
        return
    text = f"Serving at {url}"
    if key is not None:
        text += (
            "\n\nA first workgroup, 'main', an administrator, 'admin', and a key were made. "
            "The secret is shown this once:\n\n"
            f"    cloud.setkey({key.api_key}, {key.api_secretkey!r}, {url!r})\n"
        )
    print(text, flush=True)


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    try:
        number = int(float(text[:-1]) * units[text[-1].upper()]) if text[-1:].upper() in units else int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, or 512K, 64M, 4G")
    return number


def _version_of(path: str) -> tuple[str, str]:
    try:
        done = subprocess.run(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2]); import cloudpickle"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigurationError(f"--python {path} cannot be run: {exc}") from exc
    version = done.stdout.strip()
    if done.returncode:
        raise ConfigurationError(
            f"--python {path} cannot run jobs ({done.stderr.strip().rpartition(chr(10))[2]}): "
            f"{path} -m pip install cloudpickle"
        )
    return version, path


def _users(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, n = text.partition(":")
    if not (first.isdigit() and n.isdigit() and int(first) > 0 and int(n) > 0):
        raise UsageError(f"--job-users {text!r} is not FIRST_UID:HOW_MANY, such as 20000:1000")
    if os.geteuid() != 0:
        raise UsageError("--job-users needs a server that runs as root: nobody else may start processes of other users")
    return int(first), int(n)
