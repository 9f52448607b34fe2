"""What is measured: a `cloud` server and its peers, each with two workers, started here and ended here.

Adapters are written as users of that package would write it. All processes of a system carry the mark of the
measurement, so that the runner can end what is left of one that hangs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, ClassVar

from benchmarks.systems import N_WORKERS, NotOffered, System

_START_S = 20.0
_END_S = 10.0


class ServerSystem(System):
    """One way of running functions by a server.

    Attributes:
        durability: What is kept of a job that was taken, when the machine loses power.
    """

    durability: ClassVar[str]
    heavy = True

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[Any]] = []

    def map(self, function: Callable[[Any], Any], items: Any) -> list[Any]:
        """Submit a job for each item, and block for their values."""
        return self.results([self.submit(function, item) for item in items])

    def server_pid(self) -> int:
        """The process that keeps the jobs."""
        return self._processes[0].pid

    def _start(self, *command: str, **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
        self._processes.append(process)
        return process

    def close(self) -> None:
        # Workers first: a Redis that is gone makes them wait for it.
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Cloud(ServerSystem):
    """`cloud serve`."""

    name = "cloud serve"
    module = "cloud"
    ours = True
    durability = "everything: a jid is told when its job is on disk (SQLite, WAL, synchronous=FULL), so are results"

    @classmethod
    def missing(cls) -> str:
        absent = [name for name in ("aiohttp", "fastjsonschema") if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else ""

    def open(self) -> None:
        self.data = tempfile.mkdtemp(prefix="data")
        with open(os.path.join(self.data, "server.log"), "wb") as log:
            process = self._start(
                sys.executable, "-m", "cloud", "serve", "--port", "0", "--data", self.data,
                "--workers", str(N_WORKERS), "--print-json",
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert process.stdout is not None
        self.facts = json.loads(process.stdout.readline())
        self.cloud = importlib.import_module("cloud")
        self.cloud.setkey(self.facts["api_key"], self.facts["api_secretkey"], self.facts["url"])

    def new_keys(self, n: int) -> list[str]:
        """Further keys of the same user, as they stand in a request: one has a limit of requests open at once."""
        from cloud.resources.accounts import AccountStore

        store = AccountStore(self.data)
        try:
            user = store.list_users()[0].name
            keys = [store.create_key(user) for _ in range(n)]
        finally:
            store.close()
        return [f"{key.api_key}:{key.api_secretkey}" for key in keys]

    def submit(self, function, *args):
        return self.cloud.call(function, *args)

    def result(self, handle):
        return self.cloud.result(handle)

    def results(self, handles):
        return self.cloud.result(handles)

    def map(self, function, items):
        return self.cloud.result(self.cloud.map(function, items))


class _OnRedis(ServerSystem):
    """A Redis of its own, as its package configures it."""

    redis_options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def missing(cls) -> str:
        absent = [name for name in (cls.module, "redis") if importlib.util.find_spec(name) is None]
        absent += [] if shutil.which("redis-server") else ["redis-server"]
        return f"{', '.join(absent)} not installed" if absent else ""

    def open(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder = tempfile.mkdtemp(prefix="redis")
        self._start(
            "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder,
            # Its title would overwrite the environment, by which the runner finds what is left.
            "--set-proc-title", "no", *self.redis_options,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.url = f"redis://127.0.0.1:{port}/0"
        self.connection = importlib.import_module("redis").Redis.from_url(self.url)
        until = time.monotonic() + _START_S
        while True:
            try:
                self.connection.ping()
            except (OSError, importlib.import_module("redis").RedisError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
            else:
                return


_SYNCED = ("--appendonly", "yes", "--appendfsync", "always")
_SHIPPED = (
    "up to an hour of jobs and results is lost: Redis as shipped saves now and then (save 3600 1 300 100 60 10000)"
)
_ALWAYS = "Redis writes and syncs each change before it answers (appendonly yes, appendfsync always)"


class Rq(_OnRedis):
    """RQ, its workers forking a process for each job, as is its default."""

    name = "RQ"
    module = "rq"
    install = "rq"
    durability = _SHIPPED
    worker = "rq.Worker"

    def open(self) -> None:
        super().open()
        self.rq = importlib.import_module("rq")
        for _ in range(N_WORKERS):
            self._start(
                sys.executable, "-m", "rq.cli", "worker", "--url", self.url, "--worker-class", self.worker, "--quiet"
            )
        self.queue = self.rq.Queue(connection=self.connection)

    def submit(self, function, *args):
        return self.queue.enqueue(function, *args)

    def result(self, handle):
        found = handle.latest_result(timeout=60)
        if found is None or found.type != found.Type.SUCCESSFUL:
            raise RuntimeError(f"RQ has no result of {handle.id}")
        return found.return_value

    def map(self, function, items):
        prepare = self.rq.Queue.prepare_data
        return self.results(self.queue.enqueue_many([prepare(function, (item,)) for item in items]))


class RqSynced(Rq):
    """RQ, with a Redis that syncs each change."""

    name = "RQ, synced"
    redis_options = _SYNCED
    durability = _ALWAYS


class RqSimple(RqSynced):
    """RQ with SimpleWorker, which runs jobs in the worker's own process, and a Redis that syncs each change."""

    name = "RQ simple, synced"
    worker = "rq.SimpleWorker"


class Celery(_OnRedis):
    """Celery with prefork workers."""

    name = "Celery"
    module = "celery"
    install = "celery"
    durability = _SHIPPED
    threads = True

    def open(self) -> None:
        super().open()
        os.environ["BENCHMARK_REDIS_URL"] = self.url
        self._start(
            sys.executable, "-m", "celery", "-A", "benchmarks.server.tasks", "worker",
            "--concurrency", str(N_WORKERS), "--loglevel", "ERROR", "--without-gossip", "--without-mingle",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, C_FORCE_ROOT="1"),
        )  # fmt: skip
        self.celery = importlib.import_module("celery")
        self.tasks = importlib.import_module("benchmarks.server.tasks").TASKS

    def submit(self, function, *args):
        return self.tasks[function.__name__].delay(*args)

    def result(self, handle):
        return handle.get(timeout=60)

    def map(self, function, items):
        task = self.tasks[function.__name__]
        # Not the get of the group, which looks twice a second only.
        return self.results(self.celery.group(task.s(item) for item in items)().results)


class CelerySynced(Celery):
    """Celery, with a Redis that syncs each change."""

    name = "Celery, synced"
    redis_options = _SYNCED
    durability = _ALWAYS


class Ray(ServerSystem):
    """Ray on this machine."""

    name = "Ray"
    module = "ray"
    install = "ray"
    durability = "nothing: tasks and results are in memory, and end with the program that submitted them"

    def open(self) -> None:
        self.ray = importlib.import_module("ray")
        self.ray.init(num_cpus=N_WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    def close(self) -> None:
        self.ray.shutdown()

    @functools.cache  # noqa: B019 - one object a process
    def _remote(self, function):
        return self.ray.remote(function)

    def submit(self, function, *args):
        return self._remote(function).remote(*args)

    def result(self, handle):
        return self.ray.get(handle)

    def results(self, handles):
        return self.ray.get(handles)

    def server_pid(self) -> int:
        raise NotOffered("is many processes")


SERVERS: dict[str, type[ServerSystem]] = {
    each.name: each for each in (Cloud, Rq, RqSynced, RqSimple, Celery, CelerySynced, Ray)
}
