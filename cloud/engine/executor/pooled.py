"""Worker processes of a pool: they run an initializer, are replaced after so many tasks, and end in good order.

The same processes, template and messages as ``processes``; used by ``backends.pools``.
"""

from __future__ import annotations

import os
import sys

from cloud.engine.executor.base import Task
from cloud.engine.executor.processes import ProcessExecutor
from cloud.engine.executor.template import TemplateProcess
from cloud.engine.executor.workers import WorkerHandle
from cloud.engine.signals import signal
from cloud.engine.worker.pooled import Inherited

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.environment import Environment

_SIGKILL: Final = signal.SIGKILL
_LEAVE_S: Final = 5.0
"""How long a worker may take to end: its queues hand over what they hold, its children are waited for."""


class PooledProcesses(ProcessExecutor):
    """Worker processes of one pool.

    Args:
        n_slots: How many.
        initializer: Pickled (initializer, arguments); None if there is none, or it is inherited.
        inherited: What workers have from the program, if they are to be forked from it: now, and only now.
        max_tasks: A worker is replaced after so many calls and chunks of maps; 0 means never.
        options: As for ``ProcessExecutor``.
    """

    def __init__(
        self,
        n_slots: int,
        *,
        initializer: bytes | None = None,
        inherited: Inherited | None = None,
        max_tasks: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(n_slots, **options)
        self._context = (0, b"")
        self._initializer = initializer
        self._inherited = inherited
        self._max_tasks = max_tasks
        self._n_tasks: dict[int, int] = {}
        self._told: dict[int, list[bool]] = {}
        self._leaving: dict[int, Any] = {}
        self._dismissed = False
        self.whole_chunks = max_tasks > 0
        self.takes_many = not self.whole_chunks
        if inherited is not None:
            self._template = self._listen_to(self._start_template())

    # --- workers ------------------------------------------------------------------------------------------------------

    def _start_template(self) -> TemplateProcess:
        if self._inherited is None:
            return super()._start_template()
        from cloud.engine.executor.forking import ForkedTemplate

        return ForkedTemplate(self._inherited)

    def start(self, context: tuple[int, bytes]) -> None:
        """Start all workers now, and let them run the initializer. Under the engine's lock; does not wait.

        Args:
            context: (id, pickled) surroundings of the initializer, now and in workers that replace others.
        """
        self._context = context
        while len(self._workers) < self._n_slots:
            worker = self._new_worker()
            if worker is None:
                return
            self._idle.append(worker)

    def _spawn(self, environment: Environment | None = None) -> WorkerHandle:
        worker = super()._spawn(environment)
        self._identify(worker)
        if self._context[0]:
            worker.initialize(self._context, self._initializer or b"")
            if worker.pending:
                self._want_write(worker)
        return worker

    def _identify(self, worker: WorkerHandle) -> None:
        """Tell it what the program has of multiprocessing by now."""
        modules, told = sys.modules, self._told.setdefault(worker.number, [False, self._inherited is not None])
        if not told[0] and (process := modules.get("multiprocessing.process")) is not None:
            told[0] = True
            worker.identify(os.getpid(), bytes(process.current_process().authkey))
        if not told[1] and (tracker := modules.get("multiprocessing.resource_tracker")) is not None:
            fd = tracker._resource_tracker._fd
            if fd is not None:
                told[1] = True
                worker.share_tracker(fd)

    def _give(self, worker: WorkerHandle, tasks: list[Task]) -> None:
        self._identify(worker)
        if self._max_tasks:
            self._n_tasks[worker.number] = self._n_tasks.get(worker.number, 0) + len(tasks)
        super()._give(worker, tasks)

    def wake(self) -> None:
        super().wake()
        if self._dismissed and not self._source.has_queued:
            # Not all become idle by ending a job: of some, what they were sent was taken back or killed.
            while self._idle:
                self._retire(self._idle.pop())

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _idled(self, worker: WorkerHandle, *, retire: bool) -> None:
        worn = bool(self._max_tasks) and self._n_tasks.get(worker.number, 0) >= self._max_tasks
        over = self._dismissed and not self._source.has_queued
        super()._idled(worker, retire=retire or worn or over)

    def _retire(self, worker: WorkerHandle) -> None:
        worker.retired = True
        worker.leave()
        self._leaving[worker.number] = self._source.call_later(_LEAVE_S, lambda: self._signal(worker, _SIGKILL))

    def _bury(self, worker: WorkerHandle, status: int) -> None:
        super()._bury(worker, status)
        self._n_tasks.pop(worker.number, None)
        self._told.pop(worker.number, None)
        timer = self._leaving.pop(worker.number, None)
        if timer is not None:
            timer.cancel()

    def dismiss(self) -> None:
        """Let workers end in good order as they become idle. Under the engine's lock; does not wait."""
        self._dismissed = True
        while self._idle:
            self._retire(self._idle.pop())

    @property
    def n_workers(self) -> int:
        """Worker processes that live, or whose end has not been noticed."""
        return len(self._workers)
