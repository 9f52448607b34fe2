"""Where a pool's tasks go: worker processes of its own, or a Cloud that it shares with all others."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from cloud import current
from cloud.backends.base import Backend, MapWriter
from cloud.client.cloud import Cloud
from cloud.errors import BackendClosed, UnsupportedOperation
from cloud.jobs import JobOptions
from cloud.serialization import pickling
from cloud.serialization.functions import Function
from cloud.serialization.namespace import CopiedNamespace, Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["OwnWorkers", "Place", "Shared", "shared_place"]


class Place(ABC):
    """Where tasks go.

    Attributes:
        cloud: The Cloud they go to now.
        shared: True when it is not the pool's own.
    """

    shared: bool = False

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        # Whatever happens to a worker costs the task that ran there, once and for all.
        self._options = JobOptions()
        self._options.restartable, self._options.reports_late = False, True

    def submit(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwds: dict[str, Any]
    ) -> tuple[Backend, tuple[int]]:
        """One task: where it went, and its jid.

        Raises:
            Exception: It cannot be pickled.
            BackendClosed: The pool has ended.
        """
        try:
            return self.cloud.submit(func, args, kwds, self._options)
        except Exception:
            if not self._adapt(func):
                raise
        return self.cloud.submit(func, args, kwds, self._options)

    def pickled(self, func: Callable[..., Any]) -> tuple[Backend, Function]:
        """A function of maps, and where it can go. Errors as ``submit``."""
        try:
            return self.cloud.pickled(func)
        except Exception:
            if not self._adapt(func):
                raise
        return self.cloud.pickled(func)

    def open_map(self, backend: Backend, function: Function) -> MapWriter:
        """Begin a map there."""
        return backend.open_map(function, self._options)

    @abstractmethod
    def _adapt(self, func: Callable[..., Any]) -> bool:
        """A function was refused: True if ``cloud`` is another now that may take it."""

    @abstractmethod
    def dismiss(self) -> None:
        """No more tasks will come: workers end as they become idle. Does not block."""

    @abstractmethod
    def wait_for_workers(self) -> None:
        """After ``dismiss``, with all tasks ended: block until the workers have, at most some seconds."""

    @abstractmethod
    def close(self) -> None:
        """End the workers. Idempotent; bounded."""

    def reset(self) -> None:
        """In a forked child."""
        return


class OwnWorkers(Place):
    """Worker processes that run this pool's tasks only.

    Args:
        cloud: Open.
        open_cloud: Makes another; takes ``fork``.
        start_method: Of multiprocessing: 'fork' means that workers are forked from this program now; None means only
            if they need what must be inherited.
    """

    def __init__(self, cloud: Cloud, open_cloud: Callable[..., Cloud], start_method: str | None) -> None:
        super().__init__(cloud)
        self._open_cloud = open_cloud
        self._former: Cloud | None = None
        self._lock = threading.Lock()
        self._may_inherit = self.cloud.backend.namespace is None and start_method is None

    def _adapt(self, func: Callable[..., Any]) -> bool:
        # A function that uses globals of __main__ that cannot be pickled: with multiprocessing, where that forks, its
        # workers had inherited them. Ours do from now on, as they are now.
        with self._lock:
            if not self._may_inherit or not _needs_inheritance(func):
                return False
            self._may_inherit = False
            inheriting = self._open_cloud(fork=True)
            inheriting.backend  # noqa: B018 - forks now
            former = self._former = self.cloud
            self.cloud = inheriting
        with suppress(BackendClosed):
            former.backend.dismiss()
        return True

    @property
    def _clouds(self) -> list[Cloud]:
        return [self.cloud] if self._former is None else [self.cloud, self._former]

    def dismiss(self) -> None:
        for cloud in self._clouds:
            with suppress(BackendClosed):
                cloud.backend.dismiss()

    def wait_for_workers(self) -> None:
        for cloud in self._clouds:
            with suppress(BackendClosed):
                cloud.backend.wait_for_workers()

    def close(self) -> None:
        for cloud in self._clouds:
            cloud.close()

    def reset(self) -> None:
        self._lock = threading.Lock()


class Shared(Place):
    """A Cloud that runs other jobs too.

    Args:
        cloud: That.
        one_task: True when each task is to be the last of its process.
    """

    shared = True

    def __init__(self, cloud: Cloud, *, one_task: bool) -> None:
        super().__init__(cloud)
        self._options.kill_process = one_task

    def _adapt(self, func: Callable[..., Any]) -> bool:
        return False

    def dismiss(self) -> None:
        return

    def wait_for_workers(self) -> None:
        return

    def close(self) -> None:
        return


def shared_place(backend: str, processes: int, initializer: Any, maxtasksperchild: int | None) -> Place:
    """The place of ``Pool(backend=…)``.

    Raises:
        ValueError: There is no such backend.
        UnsupportedOperation: Workers that run other jobs too cannot do what is asked for.
    """
    if backend not in ("current", "mp", "simulator"):
        raise ValueError(f"backend must be 'current', 'mp', 'simulator' or None, not {backend!r}")
    if initializer is not None:
        raise UnsupportedOperation(
            f"a pool with backend={backend!r} has no workers of its own that could have an initializer",
            hint="Leave out backend=, or let the tasks themselves make what they need.",
        )
    if maxtasksperchild not in (None, 1):
        raise UnsupportedOperation(f"with backend=, maxtasksperchild can be 1 or None, not {maxtasksperchild!r}")
    if backend == "simulator":
        return OwnWorkers(current.open_simulator(processes), partial(_open_simulator, processes), "spawn")
    cloud = current.cloud() if backend == "current" else current.mp()
    return Shared(cloud, one_task=maxtasksperchild == 1)


def _open_simulator(processes: int, *, fork: bool) -> Cloud:
    return current.open_simulator(processes)


def _needs_inheritance(func: Callable[..., Any]) -> bool:
    return not _can_pickle(func, None) and _can_pickle(func, CopiedNamespace())


def _can_pickle(func: Callable[..., Any], namespace: Namespace | None) -> bool:
    try:
        pickling.dumps(func, namespace)
    except Exception:  # noqa: BLE001 - whatever the user's objects raise when they refuse
        return False
    return True
