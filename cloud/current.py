"""The one place with process-wide state: which Cloud is current, its settings and the resources beside it."""

from __future__ import annotations

import atexit
import os
import sys
import time
from _thread import RLock
from _weakref import ref
from _weakrefset import WeakSet

from cloud.client.cloud import Cloud
from cloud.configuration import CloudConfig, Settings, home_folder
from cloud.logs import configure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from typing import Any

    from cloud.backends.accounts import RemoteAccounts
    from cloud.backends.base import Backend
    from cloud.backends.beside import RemoteResources
    from cloud.backends.remote import RemoteBackend
    from cloud.engine.store.memory import JidSource
    from cloud.jobs import JobOptions
    from cloud.resources.crons import CronEntry
    from cloud.resources.embedded import Resources
    from cloud.serialization.functions import Function


class _Process:
    """What this process has: two Clouds (``cloud`` and ``cloud.mp``), settings, keys, resources."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.config = CloudConfig(self._committed)
        self.simulating: bool | None = None
        self.simulator_options: dict[str, Any] = {}
        self.immutable = False
        self.key: tuple[Any, Any, Any] | None = None
        self._jids: JidSource | None = None
        self._resources: Resources | None = None
        self._accounts: tuple[str, RemoteAccounts] | None = None
        self._in_server: bool | None = None
        self.own: WeakSet[Cloud] = WeakSet()
        self.cloud = Cloud("cloud", self._open_current, self._closed, self._max_transmit_bytes, others=self._list_own)
        self.mp = Cloud("cloud.mp", self._open_mp, self._closed, self._max_transmit_bytes, others=self._list_own)
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    @property
    def settings(self) -> Settings:
        return self.config.settings

    def _max_transmit_bytes(self) -> int:
        return self.settings.max_transmit_data

    # --- backends -----------------------------------------------------------------------------------------------------

    def jids(self) -> JidSource:
        """Numbers jobs of ``cloud.mp`` and the simulator alike."""
        if self._jids is None:
            from cloud.engine.store.memory import JidSource

            self._jids = JidSource()
        return self._jids

    def uses_simulator(self) -> bool:
        return self.settings.use_simulator if self.simulating is None else self.simulating

    def credentials(self) -> tuple[Any, Any, Any] | None:
        """(api_key, api_secretkey, server_url) if work is to go to a server."""
        if self.key is not None:
            return self.key
        settings = self.settings
        if settings.api_key or settings.server_url:
            return settings.api_key, settings.api_secretkey, settings.server_url
        return None

    def _open_current(self) -> Backend:
        from cloud.backends import open_backend

        worker = this_worker()
        if worker is not None:
            return open_backend("worker", self.settings, link=worker.link, namespace=worker.namespace)
        if self.uses_simulator():
            return open_backend("simulator", self.settings, jids=self.jids, **self.simulator_options)
        credentials = self.credentials()
        if credentials is not None:
            return open_backend("http", self.settings, credentials=credentials)
        # Jobs of cloud and of cloud.mp run on the same workers: together they must not take more than num_procs.
        return self.mp.backend

    def _open_mp(self) -> Backend:
        from cloud.backends import open_backend

        worker = this_worker()
        if worker is not None:
            return open_backend("worker", self.settings, link=worker.link, namespace=worker.namespace)
        return open_backend("mp", self.settings, jids=self.jids)

    def open_own(self, name: str, kind: str, **options: Any) -> Cloud:
        """A Cloud over a backend of its own."""

        def opener() -> Backend:
            from cloud.backends import open_backend

            backend = open_backend(kind, self.settings, jids=self.jids, **options)
            owner = made()
            if owner is not None:
                import weakref

                # One that is forgotten ends its workers; those alive at exit are closed by ``close``.
                weakref.finalize(owner, backend.close).atexit = False
            return backend

        cloud = Cloud(name, opener, self._closed, _no_limit, reopens=False)
        made = ref(cloud)
        self.own.add(cloud)
        return cloud

    def _list_own(self) -> list[Cloud]:
        return list(self.own)

    def _closed(self, backend: Backend) -> None:
        for each in (self.cloud, self.mp):
            each.drop(backend)

    def is_simulated(self) -> bool:
        if this_worker() is not None:
            return not self.is_on_server()
        return self.uses_simulator() or self.credentials() is None

    def is_on_server(self) -> bool:
        """True in a job that a server runs."""
        if this_worker() is None:
            return False
        from cloud.engine.worker import surroundings

        return surroundings.are_own()

    # --- switching ----------------------------------------------------------------------------------------------------

    def setkey(self, api_key: Any, api_secretkey: Any, server_url: Any, *, restart: bool, immutable: bool) -> None:
        with self.lock:
            if self.immutable:
                return
            key = (api_key, api_secretkey, server_url)
            if self.key != key or self.uses_simulator() or restart:
                self.cloud.close()
            self.key, self.simulating, self.immutable = key, False, immutable

    def start_simulator(self, *, force_restart: bool, options: dict[str, Any]) -> None:
        with self.lock:
            if self.immutable or (self.uses_simulator() and not force_restart and not options):
                return
            self.cloud.close()
            self.simulating, self.simulator_options = True, options

    def _committed(self, settings: Settings) -> None:
        with self.lock:
            self._close_current()
            self.key, self.simulating, self.immutable = None, None, False
            self.simulator_options = {}
            self._jids = None
            configure(settings)

    # --- resources ----------------------------------------------------------------------------------------------------

    def resources(self) -> Resources | RemoteResources:
        if self._uses_server():
            from cloud.backends.beside import RemoteResources

            return RemoteResources(self._remote, _pickle_call, self._remote_accounts)
        from cloud.resources.embedded import Jobs, Resources

        home = home_folder()
        with self.lock:
            simulated = self.uses_simulator()
            present = self._resources
            if present is None or present.home != home or present.simulated != simulated:
                if present is not None:
                    present.close()
                jobs = Jobs(_dumps, _submit, _is_finished, _kill, self._now)
                present = self._resources = Resources(home, jobs, simulated=simulated)
            return present

    def _uses_server(self) -> bool:
        if this_worker() is None:
            return not self.uses_simulator() and self.credentials() is not None
        if self._in_server is None:
            self._in_server = self.cloud.backend.connection_info()["connection_type"] == "server"
        return self._in_server

    def _remote(self) -> RemoteBackend:
        opened: Any = self.cloud.backend
        backend: RemoteBackend = opened
        return backend

    def _remote_accounts(self) -> RemoteAccounts:
        """Who is signed in to the server in use: a password is for one server only."""
        from cloud.backends.accounts import RemoteAccounts
        from cloud.errors import AccountError

        credentials = self.credentials()
        url = "" if credentials is None else credentials[2] or self.settings.server_url
        if not url or this_worker() is not None:
            raise AccountError(
                "accounts are managed where the program runs, with the server named",
                hint="Pass server_url to cloud.setkey(), or set CLOUD_SERVER_URL; jobs have no credentials.",
            )
        with self.lock:
            if self._accounts is None or self._accounts[0] != url:
                from cloud.backends.http import open_accounts

                self._sign_out()
                self._accounts = url, RemoteAccounts(*open_accounts(self.settings, url))
            return self._accounts[1]

    def _sign_out(self) -> None:
        accounts, self._accounts = self._accounts, None
        if accounts is not None:
            accounts[1].close()

    def _now(self) -> datetime:
        from datetime import UTC, datetime

        return datetime.fromtimestamp(self.cloud.now() if self.uses_simulator() else time.time(), UTC)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything this process started."""
        for each in list(self.own):
            each.close()
        self._close_current()

    def _close_current(self) -> None:
        self.cloud.close()
        self.mp.close()
        resources, self._resources = self._resources, None
        self._sign_out()
        if resources is not None:
            resources.close()

    def _forked(self) -> None:
        # The parent's jobs, workers and threads are not the child's. Its locks may be held by threads that are gone.
        self.lock = RLock()
        self._jids = None
        self._resources = self._accounts = None
        interrupts = sys.modules.get("cloud.engine.interrupts")
        if interrupts is not None:
            interrupts.forget_main_thread()
        for each in (self.cloud, self.mp, *self.own):
            each.abandon()


def _no_limit() -> int:
    return 0


def this_worker() -> Any:
    """The worker this process is; None in any other process."""
    # Looked up, not imported: only a process that is a worker has this module.
    main = sys.modules.get("cloud.engine.worker.main")
    return None if main is None else main.current_worker()


def _dumps(func: Any, reserved: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    from cloud.client.later import pickle_job

    return pickle_job(func, reserved)


def _pickle_call(func: Callable[..., Any], reserved: dict[str, Any]) -> tuple[Function, bytes, JobOptions]:
    from cloud.client.later import pickle_job, unpickle_job
    from cloud.jobs import JobOptions

    payload, options = pickle_job(func, reserved)
    function, arguments, _ = unpickle_job(payload)
    return function, arguments, JobOptions.from_dict(options)


def _submit(entry: CronEntry) -> int:
    from cloud.client.later import submit_pickled

    return submit_pickled(process.cloud, entry.payload, entry.options, label=entry.label)


def _is_finished(jid: int) -> bool:
    from cloud.errors import JobNotFound
    from cloud.jobs import FINISHED_LABELS

    try:
        return process.cloud.status(jid) in FINISHED_LABELS
    except JobNotFound:
        return True


def _kill(jid: int) -> None:
    process.cloud.kill(jid)


process = _Process()


def cloud() -> Cloud:
    """What ``cloud.call`` and friends use."""
    return process.cloud


def mp() -> Cloud:
    """What ``cloud.mp`` uses."""
    return process.mp


def resources() -> Resources | RemoteResources:
    """Files, crons and accounts beside the current backend."""
    return process.resources()


def open_pool(
    n: int,
    *,
    name: str = "cloud.pool",
    initializer: Callable[..., Any] | None = None,
    initargs: tuple[Any, ...] = (),
    max_jobs_per_worker: int = 0,
    capture: bool = False,
    fork: bool = False,
) -> Cloud:
    """A Cloud of its own, with worker processes of its own. Opens on first use; closed at exit if it is not before.

    Args:
        n: Worker processes.
        name: For messages.
        initializer: Called with ``initargs`` in each worker before its first job. What it changes (globals, directory,
            environment, signal handlers) stays for the life of that worker. With one, the workers start when it opens.
            If it raises, each job of that worker ends with InitializerFailed, from what it raised.
        initargs: Pickled when the Cloud opens. If that fails, workers are forked as with ``fork``.
        max_jobs_per_worker: A worker is replaced after so many calls and chunks of maps; 0 means never.
        capture: Keep what jobs print, for ``info``; else it goes where the program prints.
        fork: Fork the workers from this program as it is when the Cloud opens: they have its globals, open files,
            locks, queues. Its dangers are those of ``os.fork`` in a program with threads.

    A forked child of the program that uses it gets workers of its own.
    """
    return process.open_own(
        name,
        "pool",
        n=n,
        initializer=initializer,
        initargs=initargs,
        max_jobs_per_worker=max_jobs_per_worker,
        capture=capture,
        fork=fork,
    )


def open_simulator(n: int, *, name: str = "cloud.pool") -> Cloud:
    """A Cloud of its own over a simulation with ``n`` virtual workers, whatever ``cloud`` itself is set to."""
    return process.open_own(name, "simulator", num_procs=n)
