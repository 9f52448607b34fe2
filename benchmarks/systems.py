"""What is measured: `cloud`, its faces, and every peer, one adapter each, all with two workers.

An adapter says how a user of that package would write each thing, at its best. What a package does not offer, its
adapter does not imitate: it raises `NotOffered`, and the table says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from typing import Any, ClassVar

N_WORKERS = 2


class NotOffered(Exception):
    """The system has no way to do this."""


class System(ABC):
    """One way of running functions in other processes.

    Attributes:
        name: As the tables show it.
        module: What must be importable.
        install: What to give to pip; empty for the standard library and this package.
        ours: True for `cloud` and its faces, False for a peer.
        heavy: True when it starts servers: for full runs only.
        closures: True when lambdas and closures can be jobs.
        threads: True when several threads may use it at once.
        cold: Program for a cold start. ``imported()`` and ``done(value)`` take the time; ``noop`` is its own function.
    """

    name: str
    module: str
    install = ""
    ours = False
    heavy = False
    closures = True
    threads = True
    cold: str

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be measured here; empty if it can."""
        found = importlib.util.find_spec(cls.module) is not None
        return "" if found else f"{cls.module} is not installed"

    @classmethod
    def version(cls) -> str:
        """Of the package; empty for the standard library and this package."""
        return importlib.metadata.version(cls.module) if cls.install else ""

    @abstractmethod
    def open(self) -> None:
        """Start it."""

    @abstractmethod
    def close(self) -> None:
        """Stop it."""

    def submit(self, function, *args):
        """Start a job; a handle for it."""
        raise NotOffered("has no handles for single jobs")

    def result(self, handle):
        """Block for the value of one job."""
        raise NotOffered("has no handles for single jobs")

    def call(self, function, *args):
        """Run one job and give its value."""
        return self.result(self.submit(function, *args))

    def results(self, handles):
        """Block for the values of many jobs."""
        return [self.result(handle) for handle in handles]

    def outcomes(self, handles):
        """As ``results``, with the exception in the place of a job that failed."""
        found = []
        for handle in handles:
            try:
                found.append(self.result(handle))
            except Exception as exc:
                found.append(exc)
        return found

    @abstractmethod
    def map(self, function, items):
        """The values of a function for many items, as a list, the way the package does it if nothing is asked of it."""

    def map_singly(self, function, items):
        """As ``map``, with a message for each item."""
        return self.map(function, items)

    def submit_after(self, function, dependencies):
        """Start a job once others have ended."""
        raise NotOffered("has no dependencies")

    def printed(self, handle):
        """What a job wrote to its standard output; empty if the package does not keep it."""
        return ""


class Cloud(System):
    """The verbs of the module."""

    name = "cloud"
    module = "cloud"
    ours = True
    options: ClassVar[dict[str, Any]] = {}
    settings: ClassVar[dict[str, Any]] = {}
    cold = """
        import cloud
        imported()
        done(cloud.result(cloud.call(noop, 7)))
    """

    def open(self):
        import cloud

        self.cloud = cloud
        for name, value in self.settings.items():
            setattr(cloud.config, name, value)
        if self.settings:
            cloud.config.commit()
        cloud.call.__self__.backend  # noqa: B018 - opens it

    def close(self):
        self.cloud.close()

    def submit(self, function, *args):
        return self.cloud.call(function, *args, **self.options)

    def result(self, handle):
        return self.cloud.result(handle)

    def results(self, handles):
        return self.cloud.result(handles)

    def outcomes(self, handles):
        return self.cloud.result(handles, ignore_errors=True)

    def map(self, function, items):
        return self.cloud.result(self.cloud.map(function, items, **self.options))

    def map_singly(self, function, items):
        # There is no chunksize. This hands over each outcome by itself, before the next item begins.
        return self.cloud.result(self.cloud.map(function, items, **{**self.options, "_restartable": False}))

    def submit_after(self, function, dependencies):
        return self.cloud.call(function, _depends_on=dependencies, **self.options)

    def printed(self, handle):
        return self.cloud.info(handle, "stdout")[handle]["stdout"]


class PoolLike(System):
    """What has the methods of ``multiprocessing.Pool``."""

    def close(self):
        self.pool.terminate()
        self.pool.join()

    def submit(self, function, *args):
        return self.pool.apply_async(function, args)

    def result(self, handle):
        return handle.get()

    def call(self, function, *args):
        return self.pool.apply(function, args)

    def map(self, function, items):
        return self.pool.map(function, items)

    def map_singly(self, function, items):
        return self.pool.map(function, items, chunksize=1)


class CloudPool(PoolLike):
    name = "cloud.pool"
    module = "cloud"
    ours = True
    cold = """
        from cloud.pool import Pool
        imported()
        with Pool(2) as pool:
            done(pool.apply(noop, (7,)))
    """

    def open(self):
        from cloud.pool import Pool

        self.pool = Pool(N_WORKERS)

    def map_singly(self, function, items):
        raise NotOffered("groups items by how long they run, whatever the chunksize")


class Multiprocessing(PoolLike):
    name = "multiprocessing"
    module = "multiprocessing"
    closures = False
    cold = """
        from multiprocessing.pool import Pool
        imported()
        with Pool(2) as pool:
            done(pool.apply(noop, (7,)))
    """

    def open(self):
        from multiprocessing.pool import Pool

        self.pool = Pool(N_WORKERS)


class ExecutorLike(System):
    """What is a ``concurrent.futures.Executor``."""

    def close(self):
        self.executor.shutdown()

    def submit(self, function, *args):
        return self.executor.submit(function, *args)

    def result(self, handle):
        return handle.result()

    def map(self, function, items):
        return list(self.executor.map(function, items))


class CloudExecutor(ExecutorLike):
    name = "cloud.Executor"
    module = "cloud"
    ours = True
    cold = """
        from cloud import Executor
        imported()
        with Executor(2) as executor:
            done(executor.submit(noop, 7).result())
    """

    @classmethod
    def missing(cls):
        cloud = importlib.import_module("cloud")
        return "" if hasattr(cloud, "Executor") else "cloud has no Executor yet"

    def open(self):
        from cloud import Executor

        self.executor = Executor(N_WORKERS)

    def map_singly(self, function, items):
        raise NotOffered("groups items by how long they run, whatever the chunksize")


class Futures(ExecutorLike):
    name = "futures"
    module = "concurrent.futures"
    closures = False
    cold = """
        from concurrent.futures import ProcessPoolExecutor
        imported()
        with ProcessPoolExecutor(2) as executor:
            done(executor.submit(noop, 7).result())
    """

    def open(self):
        from concurrent.futures import ProcessPoolExecutor

        self.executor = ProcessPoolExecutor(N_WORKERS)


class Loky(ExecutorLike):
    name = "loky"
    module = "loky"
    install = "loky"
    cold = """
        from loky import get_reusable_executor
        imported()
        with get_reusable_executor(max_workers=2) as executor:
            done(executor.submit(noop, 7).result())
    """

    def open(self):
        from loky import get_reusable_executor

        self.executor = get_reusable_executor(max_workers=N_WORKERS, timeout=600)


class Joblib(System):
    """`Parallel` kept open between its calls, which is its fast way. It runs groups of calls only."""

    name = "joblib"
    module = "joblib"
    install = "joblib"
    threads = False
    cold = """
        from joblib import Parallel, delayed
        imported()
        with Parallel(n_jobs=2) as parallel:
            done(parallel([delayed(noop)(7)])[0])
    """

    def open(self):
        from joblib import Parallel, delayed

        self.delayed = delayed
        self.parallel = Parallel(n_jobs=N_WORKERS).__enter__()
        self.one_by_one = Parallel(n_jobs=N_WORKERS, batch_size=1)

    def close(self):
        self.parallel.__exit__(None, None, None)

    def call(self, function, *args):
        return self.parallel([self.delayed(function)(*args)])[0]

    def map(self, function, items):
        delayed = self.delayed(function)
        return self.parallel(delayed(item) for item in items)

    def map_singly(self, function, items):
        delayed = self.delayed(function)
        return self.one_by_one(delayed(item) for item in items)


class Mpire(PoolLike):
    name = "mpire"
    module = "mpire"
    install = "mpire"
    closures = False
    cold = """
        from mpire import WorkerPool
        imported()
        with WorkerPool(2) as pool:
            done(pool.apply(noop, (7,)))
    """

    def open(self):
        from mpire import WorkerPool

        self.pool = WorkerPool(N_WORKERS, keep_alive=True)

    def close(self):
        self.pool.terminate()

    def map(self, function, items, **options):
        # Its default joins the values into one array if they are arrays; and it takes tuples as several arguments.
        return self.pool.map(function, items, concatenate_numpy_output=False, **options)

    def map_singly(self, function, items):
        return self.map(function, items, chunk_size=1)


class Dask(System):
    name = "dask"
    module = "distributed"
    install = "dask[distributed]"
    heavy = True
    cold = """
        from distributed import Client, LocalCluster
        imported()
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
            with Client(cluster) as client:
                done(client.submit(noop, 7).result())
    """

    def open(self):
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(n_workers=N_WORKERS, threads_per_worker=1, dashboard_address=None)
        self.client = Client(self.cluster)

    def close(self):
        self.client.close()
        self.cluster.close()

    def submit(self, function, *args):
        # pure: it would give the same job for the same arguments.
        return self.client.submit(function, *args, pure=False)

    def result(self, handle):
        return handle.result()

    def results(self, handles):
        return self.client.gather(handles)

    def map(self, function, items):
        return self.client.gather(self.client.map(function, items, pure=False))

    def submit_after(self, function, dependencies):
        return self.client.submit(function, *dependencies, pure=False)


class Ray(System):
    name = "ray"
    module = "ray"
    install = "ray"
    heavy = True
    cold = """
        import ray
        imported()
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        done(ray.get(ray.remote(noop).remote(7)))
        ray.shutdown()
    """

    def open(self):
        import ray

        self.ray = ray
        self.remote = {}
        ray.init(
            num_cpus=N_WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=os.path.join(tempfile.gettempdir(), "ray"),
        )

    def close(self):
        self.ray.shutdown()

    def _remote(self, function):
        # A user decorates a function once.
        known = self.remote.get(id(function))
        if known is None:
            known = self.remote[id(function)] = (self.ray.remote(function), function)
        return known[0]

    def submit(self, function, *args):
        return self._remote(function).remote(*args)

    def result(self, handle):
        return self.ray.get(handle)

    def results(self, handles):
        return self.ray.get(handles)

    def map(self, function, items):
        remote = self._remote(function)
        return self.ray.get([remote.remote(item) for item in items])

    def submit_after(self, function, dependencies):
        return self.submit(function, *dependencies)


class Executorlib(ExecutorLike):
    name = "executorlib"
    module = "executorlib"
    install = "executorlib"
    cold = """
        from executorlib import SingleNodeExecutor
        imported()
        with SingleNodeExecutor(max_workers=2, block_allocation=True) as executor:
            done(executor.submit(noop, 7).result())
    """

    def open(self):
        from executorlib import SingleNodeExecutor

        self.executor = SingleNodeExecutor(max_workers=N_WORKERS, block_allocation=True)

    def submit_after(self, function, dependencies):
        return self.submit(function, *dependencies)


class WithoutCapture(Cloud):
    """Output goes where the program's goes."""

    name = "no capture"
    settings: ClassVar[dict[str, Any]] = {"redirect_job_output": False}


class PlainPickle(Cloud):
    """Arguments and results by plain pickle: no lambdas in them."""

    name = "plain pickle"
    options: ClassVar[dict[str, Any]] = {"_fast_serialization": 2}


class AtMostOnce(Cloud):
    """Stricter than the default: an outcome is delivered before the next item begins."""

    name = "at most once"
    options: ClassVar[dict[str, Any]] = {"_restartable": False}


class WithDeadline(Cloud):
    """Stricter than the default: each job has a time limit, and a message of its own."""

    name = "time limit"
    options: ClassVar[dict[str, Any]] = {"_max_runtime": 60}


class WithProfile(Cloud):
    """More than the default: each job is profiled."""

    name = "profiled"
    options: ClassVar[dict[str, Any]] = {"_profile": True}


SYSTEMS: dict[str, type[System]] = {
    system.name: system
    for system in (
        Cloud,
        CloudPool,
        CloudExecutor,
        Multiprocessing,
        Futures,
        Loky,
        Joblib,
        Mpire,
        Executorlib,
        Dask,
        Ray,
    )
}

#: The verbs with one promise switched off, or one more asked for.
VARIANTS: dict[str, type[System]] = {
    system.name: system for system in (WithoutCapture, PlainPickle, AtMostOnce, WithDeadline, WithProfile)
}
