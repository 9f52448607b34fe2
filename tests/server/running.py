"""Servers for tests: each a process of its own, started as a user starts one."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.leaks import MARK, SHARED

ROOT = Path(__file__).parents[2]


class RunningServer:
    """``cloud serve`` on a free port.

    Args:
        data: Its data folder; a second server on it goes on where the first was.
        options: Further words of the command line.
        env: Further environment variables.
        port: 0: any.
        module: What is run: `cloud`, or a module of the tests that does something before it.

    Attributes:
        env: As given; what is changed holds from the next start on.
        url: Where it answers.
        api_key, api_secretkey: Of the first administrator; kept from the first start of the folder.
    """

    def __init__(
        self, data: Path, *options: str, env: dict[str, str] | None = None, port: int = 0, module: str = "cloud"
    ) -> None:
        self.data = data
        self._options = options
        self.env = {} if env is None else env
        self._module = module
        self.port = port
        self.url = ""
        self.api_key = 0
        self.api_secretkey = ""
        self.process: subprocess.Popen[str] | None = None
        self.log = data.parent / f"{data.name}.log"

    def start(self, timeout_s: float = 30.0) -> Self:
        """Start it, and wait until it is ready."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("CLOUD_") and name != MARK}
        environ |= {"PYTHONPATH": str(ROOT), "CLOUD_HOME": str(self.data.parent / "server-home"), **self.env}
        command = [sys.executable, "-m", self._module, "serve", "--port", str(self.port), "--data", str(self.data)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--print-json", *self._options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
                start_new_session=True,
            )
        SHARED.add(self.process.pid)
        line = self._first_line(time.monotonic() + timeout_s)
        facts = json.loads(line)
        assert self.process is not None
        assert self.process.stdout is not None
        # Not kept open: a test that counts descriptors must not meet one of a server that it started by the way.
        self.process.stdout.close()
        self.url = facts["url"]
        self.port = int(self.url.rpartition(":")[2])
        if facts["api_key"] is not None:
            self.api_key, self.api_secretkey = facts["api_key"], facts["api_secretkey"]
        return self

    def _first_line(self, until: float) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        while time.monotonic() < until:
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                line = self.process.stdout.readline()
                if line:
                    return line
                break
        self.kill()
        raise AssertionError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def kill(self, *, group: bool = False) -> None:
        """kill -9: of the server, or with ``group`` of all that it started as well."""
        if self.process is not None:
            if group:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self._buried()

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and wait for its end; the exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self._buried(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill(group=True)
            raise

    def _buried(self, timeout_s: float = 10.0) -> int:
        assert self.process is not None
        code = self.process.wait(timeout_s)
        SHARED.discard(self.process.pid)
        self.process = None
        return code

    def new_group(self, **quotas: Any) -> tuple[int, str]:
        """A workgroup of its own: (key, secret) of its administrator."""
        from cloud.resources import accounts
        from cloud.resources.principals import Role

        # Nobody signs in with this password, and hashing it well takes 0.2 s.
        cost, accounts._PASSWORD_COST = accounts._PASSWORD_COST, (2, 8, 1)
        store = accounts.AccountStore(str(self.data))
        try:
            name = f"group{time.monotonic_ns()}"
            store.create_workgroup(name)
            if quotas:
                store.change_quotas(name, quotas)
            store.create_user(name, "a password", name, Role.ADMIN)
            key = store.create_key(name)
        finally:
            store.close()
            accounts._PASSWORD_COST = cost
        assert key.api_secretkey is not None
        return key.api_key, key.api_secretkey

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.stop()
