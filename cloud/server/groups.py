"""Workgroups at work: each has an engine, files and crons in a folder of its own, and shares only worker slots."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any, Final

from cloud import __version__
from cloud.backends.ahead import PRELOAD
from cloud.backends.local import LocalBackend
from cloud.backends.requests import Request, Requests
from cloud.configuration import usable_cores
from cloud.engine.clock import RealClock
from cloud.engine.engine import Engine
from cloud.engine.executor.served import ServedProcesses
from cloud.engine.executor.setup import WorkerSetup, default_environ
from cloud.engine.executor.slots import Slots
from cloud.engine.store.sqlite import SqliteStore
from cloud.engine.worker.limits import Limits
from cloud.environment import Environment
from cloud.errors import BackendClosed, BackendError, CloudException, UnsupportedOperation
from cloud.resources.accounts import AccountStore
from cloud.resources.code import CodeFolder
from cloud.resources.principals import Quotas
from cloud.server.beside import ResourceRequests
from cloud.server.config import ServerConfig
from cloud.wire import MAX_WAIT_S

OWN_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"

_EXPIRE_AT_ONCE: Final = 1000
_KEEP_CODE_S: Final = 400 * 86_400.0
"""Modules that nothing used for so long are forgotten: more than a year, for crons that run once a year."""

_ON_CODE: Final = {"missing_code": "_missing_code", "publish_code": "_publish_code"}

Answer = tuple[dict[str, Any], tuple[bytes, ...]]


class Group:
    """One workgroup at work. Blocks while it opens: it takes up the jobs of the process before.

    Args:
        folder: Everything of the workgroup is in it.
        number: Of the workgroup.
        config: The server's.
        slots: Shared by all workgroups.
        lock_fd: Held by the processes that run jobs, for as long as any lives.
        quotas: Its limits.
    """

    def __init__(
        self, folder: str, number: int, config: ServerConfig, slots: Slots, lock_fd: int, quotas: Quotas
    ) -> None:
        self.number = number
        self.folder = folder
        self._config = config
        self._quotas = quotas
        self._slots = slots
        self._suspended = self._draining = False
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if config.job_users is not None:
            # Workers of another user must come to their code and scratch folders: they may pass, and list nothing.
            for path in (config.data, os.path.dirname(folder), folder):
                os.chmod(path, 0o711)  # noqa: S103
        self.code = CodeFolder(os.path.join(folder, "code"))
        scratch = os.path.join(folder, "scratch")
        # What the workers of an earlier process left; none of them lives, or the lock would not be ours.
        shutil.rmtree(scratch, ignore_errors=True)
        setup = WorkerSetup(
            scratch=scratch,
            interpreters=config.interpreters,
            code_folder=os.path.join(folder, "code"),
            # The folders of code are named by their content: no bytecode may come into them.
            environ={**default_environ(), "PYTHONDONTWRITEBYTECODE": "1"},
            limits=Limits(
                memory_bytes=config.job_memory_bytes,
                n_files=config.job_open_files,
                file_bytes=config.job_file_bytes,
                n_processes=config.job_processes,
            ),
            user=None if config.job_users is None else _user_of(number, config.job_users),
            lock_fd=lock_fd,
        )
        self.pythons = sorted({OWN_PYTHON, *config.interpreters})
        self.store = SqliteStore(folder)
        self.executor = ServedProcesses(
            _n_slots(slots, quotas),
            output_limit_bytes=config.output_limit_bytes,
            grace_s=config.kill_grace_s,
            max_transmit_bytes=config.max_result_bytes,
            preload=PRELOAD,
            setup=setup,
            slots=slots,
            idle_s=config.idle_s,
        )
        self.engine = Engine(self.store, self.executor, RealClock(), max_nesting=config.max_nesting)
        self.backend = LocalBackend("server", self.engine, "server", version=__version__, pythons=self.pythons)
        self.requests = Requests(self.backend)
        self.beside = ResourceRequests(
            folder,
            self._serve,
            self.environment,
            self.store.recall,
            self.engine.lock,
            max_file_bytes=_max_file_bytes(config, quotas),
            max_storage_bytes=quotas.max_storage_bytes,
        )
        self.requests.beside = self.beside
        self.requests.admit = self._check_room
        self.engine.serve_requests(self.requests)
        assert self.engine.durable is not None
        self.engine.durable.recover()
        self.beside.start()

    def _serve(self, request: Request) -> None:
        with self.engine.changing:
            self.requests.serve(request)

    async def ask(self, op: str, content: dict[str, Any], blobs: list[bytes], key: str = "") -> Answer:
        """Answer one request of a client of this workgroup."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        ours = threading.get_ident()

        def reply(content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> None:
            if threading.get_ident() == ours:
                _settle(future, (content, blobs))
                return
            try:
                loop.call_soon_threadsafe(_settle, future, (content, blobs))
            except RuntimeError:
                pass  # the server has stopped; the client will ask its successor

        if "timeout_s" in content:
            wanted_s = content["timeout_s"]
            content["timeout_s"] = MAX_WAIT_S if wanted_s is None else min(wanted_s, MAX_WAIT_S)
        # Given again with another operation, a key is another key.
        request = Request(op, content, blobs, reply, key=f"{op}:{key}" if key else "")
        try:
            if op in _ON_CODE:
                return await asyncio.to_thread(getattr(self, _ON_CODE[op]), content, blobs), ()
            if op in ("submit", "open_map"):
                request.environment = self.environment(content)
            self._serve(request)
        except CloudException as exc:
            request.refuse(exc)
        try:
            return await future
        except asyncio.CancelledError:
            if request.give_up is not None:
                with self.engine.changing:
                    request.give_up()
            raise

    def _missing_code(self, content: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
        return {"missing": self.code.missing(content["files"])}

    def _publish_code(self, content: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
        for digest, blob in zip(content["contents"], blobs, strict=True):
            self.code.store(digest, blob)
        return {"code": self.code.publish(content["files"])}

    def environment(self, content: dict[str, Any]) -> Environment:
        """What the workers of a client's submission must be.

        Raises:
            UnsupportedOperation: The server has no such interpreter, or another generation of cloudpickle.
            BackendError: The client's modules were not published here; ``lacks_code`` names the set.
        """
        python = content.pop("python", OWN_PYTHON)
        made_by, code = content.pop("cloudpickle", None), content.pop("code", "")
        if python not in self.pythons:
            raise UnsupportedOperation(
                f"this program runs on Python {python}, and the server runs jobs on Python "
                f"{', '.join(self.pythons)}: bytes made by one cannot be loaded by another",
                hint=f"Use one of these, or ask the operator for --python with an interpreter of {python}.",
            )
        ours = _cloudpickle_version()
        if made_by is not None and made_by.split(".")[0] != ours.split(".")[0]:
            raise UnsupportedOperation(
                f"this program has cloudpickle {made_by}, and the server {ours}",
                hint=f"Install cloudpickle {ours.split('.')[0]} where the program runs.",
            )
        if code and not self.code.has(code):
            error = BackendError("the modules of this program are not on the server")
            error.lacks_code = code  # type: ignore[attr-defined]
            raise error
        return Environment(python, code)

    def _check_room(self, n_jobs: int) -> None:
        if self._suspended:
            raise BackendError("this workgroup is suspended", hint="Ask the operator of the server.")
        n = self.engine.n_unfinished
        limit = self._config.max_queued_jobs if self._quotas.max_queued_jobs is None else self._quotas.max_queued_jobs
        if n + n_jobs > limit:
            raise BackendError(
                f"this workgroup has {n} unfinished jobs, and may have {limit}; these are {n_jobs} more",
                retry=n_jobs <= limit,
                hint="Wait for some, or kill some.",
            )

    def allow(self, quotas: Quotas, *, suspended: bool) -> None:
        """Take up what the operator has changed.

        Args:
            quotas: The limits from now on. Jobs that run go on.
            suspended: Begin no more jobs, of crons and of jobs neither; those that run may end.
        """
        with self.engine.changing:
            if quotas != self._quotas:
                self._quotas = quotas
                self.executor.limit(_n_slots(self._slots, quotas))
                self.beside.uploads.max_storage_bytes = quotas.max_storage_bytes
                self.beside.uploads.max_file_bytes = _max_file_bytes(self._config, quotas)
            if suspended != self._suspended and not self._draining:
                self._suspended = suspended
                if suspended:
                    self.engine.pause()
                else:
                    self.engine.resume()

    def tidy(self, now_s: float) -> None:
        """Forget what is too old to be kept. Blocks for the disk."""
        if self._config.retention_s:
            while True:
                with self.engine.changing:
                    n = self.store.expire(now_s - self._config.retention_s, limit=_EXPIRE_AT_ONCE)
                if n < _EXPIRE_AT_ONCE:
                    break
        with self.engine.changing:
            needed = {each.environment.code for each in self.store.batches(unfinished=True) if each.environment}
        self.code.sweep(now_s - _KEEP_CODE_S, needed | self.beside.crons.codes())

    def drain(self) -> None:
        """Begin no more jobs."""
        with self.engine.changing:
            self._draining = True
            self.engine.pause()

    @property
    def busy(self) -> bool:
        """True while jobs run."""
        return bool(self.engine.executor.running())

    def close(self) -> None:
        """End its workers; what is unfinished waits on disk. Blocks; idempotent."""
        self.beside.stop()
        self.engine.close()
        self.beside.close()


def _n_slots(slots: Slots, quotas: Quotas) -> int:
    return slots.n if quotas.max_slots is None else min(slots.n, max(1, quotas.max_slots))


def _max_file_bytes(config: ServerConfig, quotas: Quotas) -> int:
    return config.max_file_bytes if quotas.max_file_bytes is None else min(config.max_file_bytes, quotas.max_file_bytes)


@cache
def _cloudpickle_version() -> str:
    return version("cloudpickle")


def _settle(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():  # the client may have gone away
        future.set_result(answer)


def _user_of(number: int, users: tuple[int, int]) -> tuple[int, int]:
    first, n = users
    if number >= n:
        raise BackendError(f"workgroup {number} has no OS user: --job-users names {n}; give it more")
    return first + number, first + number


class Groups:
    """The workgroups of a server; one opens when it is first needed.

    Args:
        config: The server's.
        accounts: Where the quotas are.
        lock_fd: See ``Group``.
    """

    def __init__(self, config: ServerConfig, accounts: AccountStore, lock_fd: int) -> None:
        self._config = config
        self.accounts = accounts
        self._lock_fd = lock_fd
        self.slots = Slots(config.workers or usable_cores())
        self._groups: dict[int, Group] = {}
        self._lock = threading.Lock()
        self._closed = False

    async def get(self, number: int) -> Group:
        """The workgroup's engine."""
        group = self._groups.get(number)
        # Opening one with 100,000 jobs takes a second: the others must not wait for that.
        return group if group is not None else await asyncio.to_thread(self._open, number)

    def _open(self, number: int) -> Group:
        with self._lock:
            if self._closed:
                raise BackendClosed("the server is stopping", retry=True)
            group = self._groups.get(number)
            if group is None:
                folder = os.path.join(self._config.data, "groups", str(number))
                known = {each.id: each for each in self.accounts.list_workgroups()}.get(number)
                quotas = Quotas() if known is None else known.quotas
                group = Group(folder, number, self._config, self.slots, self._lock_fd, quotas)
                if known is not None and known.suspended:
                    group.allow(quotas, suspended=True)
                self._groups[number] = group
            return group

    def open_all(self, on_error: Callable[[int, Exception], None]) -> None:
        """Open those that there are: they may have jobs to go on with, and crons to fire. Blocks."""
        folder = os.path.join(self._config.data, "groups")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        for name in sorted(name for name in names if name.isdigit()):
            try:
                self._open(int(name))
            except Exception as exc:  # noqa: BLE001 - one that is damaged must not keep the others from their work
                on_error(int(name), exc)

    def opened(self) -> list[Group]:
        """Those that are open."""
        return list(self._groups.values())

    def refresh(self) -> None:
        """Take up quotas that were changed, and workgroups that were suspended. Blocks for the accounts."""
        for each in self.accounts.list_workgroups():
            group = self._groups.get(each.id)
            if group is not None:
                group.allow(each.quotas, suspended=each.suspended)

    def tidy(self) -> None:
        """Forget, in each, what is too old to be kept. Blocks for the disk."""
        for group in self.opened():
            group.tidy(time.time())

    def close(self) -> None:
        """Close all. Blocks; idempotent."""
        with self._lock:
            self._closed = True
            groups = list(self._groups.values())
        for group in groups:
            group.close()
