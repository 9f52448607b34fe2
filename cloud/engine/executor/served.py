"""Worker processes of a server: keyed by environment, shut in by limits, and with slots shared with other executors.

The same processes, template and messages as ``processes``. A worker is made for one environment and runs jobs of that
environment only; there is one template an interpreter.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from typing import Any, Final

from cloud.engine.executor.cgroups import WorkerGroup
from cloud.engine.executor.descendants import private_bytes, tree
from cloud.engine.executor.processes import ProcessExecutor
from cloud.engine.executor.server_template import ServerTemplate
from cloud.engine.executor.setup import OWN_VERSION, WorkerSetup
from cloud.engine.executor.slots import Share, Slots
from cloud.engine.executor.template import TemplateProcess
from cloud.engine.executor.workers import WorkerHandle
from cloud.engine.worker.surroundings import thread_defaults
from cloud.environment import Environment
from cloud.errors import CloudException

_COUNT_S: Final = 0.05
_REMOVE_AGAIN_S: Final = 0.1
_N_REMOVALS: Final = 50
_SIGKILL: Final = 9


class ServedWorker(WorkerHandle):
    """A worker with a folder, and perhaps a cgroup, of its own.

    Attributes:
        home: Its folder.
        group: Its cgroup, or None.
        verdict: Why it was ended for what its job did; "" if it was not.
    """

    def __init__(
        self,
        number: int,
        settings: dict[str, Any],
        environment: Environment | None,
        home: str,
        group: WorkerGroup | None,
    ) -> None:
        self.home = home
        self.group = group
        self.verdict = ""
        super().__init__(number, settings, capture=True, environment=environment)


class ServedProcesses(ProcessExecutor):
    """Worker processes of one workgroup of a server.

    Args:
        n_slots: Jobs of this executor that run at the same time, at most.
        setup: What the workers are. Its folder ``scratch`` is made if it is missing.
        slots: Shared with the other executors of this process; None for as many of its own.
        idle_s: A worker that had nothing to do for so long, up to twice, is ended; then the template, too.
        options: As for ``ProcessExecutor``.
    """

    def __init__(
        self, n_slots: int, *, setup: WorkerSetup, slots: Slots | None = None, idle_s: float = 60.0, **options: Any
    ) -> None:
        slots = Slots(n_slots) if slots is None else slots
        os.makedirs(setup.scratch, mode=0o700 if setup.user is None else 0o711, exist_ok=True)
        super().__init__(min(n_slots, slots.n), **options)
        self._share: Share = slots.join(self.interrupt, n_slots)
        self._settings["thread_defaults"] = thread_defaults(self._n_cores, slots.n)
        self._setup = setup
        self._slots = slots
        self._idle_s = idle_s
        self._by_version: dict[str, ServerTemplate] = {}
        self._positions: dict[int, int] | None = None
        self._counted = 0.0
        self._removals: list[threading.Thread] = []

    def limit(self, n_slots: int) -> None:
        """Run so many jobs at the same time from now on, at most; those that run go on."""
        with self._slots.lock:
            self._n_slots = self._share.most = min(n_slots, self._slots.n)
        self.wake()

    # --- giving work --------------------------------------------------------------------------------------------------

    def _give_idle(self, room_s: float) -> None:
        while not self._closed:
            environment = self._source.next_environment
            if not self._source.has_queued:
                self._share.content()
                return
            with self._slots.lock:
                if self._share.free() <= 0:
                    self._share.wait()
                    return
            worker = self._worker_of(environment)
            if worker is None:
                if self._source.has_queued and self._source.next_environment != environment:
                    continue  # it could not be had, and what wanted it has ended
                self._share.content()
                return
            with self._slots.lock:
                # Another executor may have taken them meanwhile.
                free = self._share.free()
                tasks = self._source.claim(free, room_s, idle=True, environment=environment) if free > 0 else []
                if not tasks:
                    self._idle.append(worker)
                    self._share.wait(declined=free > 0)
                    return
                worker.cores = tasks[0].batch.options.cores
                self._occupy(worker)
                self._share.rotate()
            self._begin(worker, tasks)

    def _worker_of(self, environment: Environment | None) -> WorkerHandle | None:
        for worker in reversed(self._idle):
            if worker.environment == environment:
                self._idle.remove(worker)
                return worker
        if self._idle and sum(1 for each in self._workers.values() if not each.retired) >= self._n_slots:
            self._retire(self._idle.pop(0))
        new = self._new_worker(environment)
        if new is None and self._idle:
            # Its descriptors may be what is missing; it asks for work again at its end.
            self._retire(self._idle.pop(0))
        return new

    def _new_worker(self, environment: Environment | None = None) -> WorkerHandle | None:
        try:
            return super()._new_worker(environment)
        except CloudException as exc:
            self._fail_queued(str(exc), environment)
            return None

    def _occupy(self, worker: WorkerHandle) -> None:
        before = worker.held_slots
        super()._occupy(worker)
        self._share.take(worker.held_slots - before)

    def _vacate(self, worker: WorkerHandle) -> None:
        n = worker.held_slots
        super()._vacate(worker)
        if n:
            self._share.give(n)

    def _refill(self) -> None:
        if not self._idle:
            self.wake()  # a slot may have come free elsewhere
        super()._refill()

    def _give_busy(self) -> None:
        if not self._share.must_yield:
            super()._give_busy()

    def _steal(self) -> None:
        if self._share.free() > 0:
            super()._steal()

    def _is_rich(self, worker: WorkerHandle, now: float) -> bool:
        return super()._is_rich(worker, now) and any(each.environment == worker.environment for each in self._idle)

    # --- workers ------------------------------------------------------------------------------------------------------

    def _template_for(self, environment: Environment | None) -> TemplateProcess:
        version = environment.python if environment is not None else OWN_VERSION
        template = self._by_version.get(version)
        if template is None or self._templates.get(template.fd) is not template:
            template = ServerTemplate(self._setup, version, self._preload)
            self._by_version[version] = template
            self._listen_to(template)
        return template

    def _open_worker(self, number: int, environment: Environment | None) -> WorkerHandle:
        setup = self._setup
        home = tempfile.mkdtemp(prefix="worker-", dir=setup.scratch)
        group = None
        try:
            temporary = os.path.join(home, "tmp")
            os.mkdir(temporary, 0o700)
            if setup.user is not None:
                os.chown(temporary, *setup.user)
                os.chown(home, *setup.user)
            if setup.cgroups:
                group = WorkerGroup(setup.cgroups, os.path.basename(home), setup.limits)
            confinement = {
                "home": home,
                "temporary": temporary,
                "code": setup.code_path(environment),
                "environ": dict(setup.environ),
                "limits": tuple(setup.limits),
                "cgroup": group.path if group is not None else "",
                "user": setup.user,
            }
            return ServedWorker(number, {**self._settings, "confinement": confinement}, environment, home, group)
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            if group is not None:
                group.remove()
            raise

    def _bury(self, worker: WorkerHandle, status: int) -> None:
        super()._bury(worker, status)
        assert isinstance(worker, ServedWorker)
        self._remove(worker)

    def _remove(self, worker: ServedWorker) -> None:
        # A job may leave a million files: nobody is to wait for that.
        self._removals = [each for each in self._removals if each.is_alive()]
        removal = threading.Thread(target=_remove_all, args=(worker.home, worker.group), name="cloud-removal")
        self._removals.append(removal)
        removal.start()

    def _describe_death(self, worker: WorkerHandle, status: int) -> tuple[str, int | None, bool]:
        assert isinstance(worker, ServedWorker)
        if worker.group is not None and worker.group.ran_out_of_memory:
            worker.verdict = self._setup.limits.text("memory_bytes")
        if worker.verdict:
            return worker.verdict, None, True
        return super()._describe_death(worker, status)

    def _why_not_started(self, worker: WorkerHandle, reason: str) -> str:
        version = worker.environment.python if worker.environment is not None else OWN_VERSION
        template = self._by_version.get(version)
        if template is not None and template.failure:
            return template.failure
        printed = worker.output()[1].decode(errors="replace").strip().rpartition("\n")[2]
        return f"Worker processes cannot be started on this server: {printed or reason}"

    # --- looking after ------------------------------------------------------------------------------------------------

    def _look_after_workers(self) -> None:
        super()._look_after_workers()
        limits, now = self._setup.limits, time.monotonic()
        if (limits.n_processes or limits.memory_bytes) and not self._setup.cgroups and now - self._counted > _COUNT_S:
            self._counted = now
            for worker in self._workers.values():
                if worker.pid and not worker.dead:
                    self._count(worker)
        if self._positions is None:
            self._look_again_later()

    def _look_again_later(self) -> None:
        if self._workers or self._templates:
            self._positions = {worker.number: worker.position for worker in self._idle}
            self._source.call_later(self._idle_s, self._end_unused)

    def _count(self, worker: WorkerHandle) -> None:
        assert isinstance(worker, ServedWorker)
        limits = self._setup.limits
        pids = tree(worker.pid, (limits.n_processes or 1_000) + 1)
        if limits.n_processes and len(pids) > limits.n_processes:
            worker.verdict = limits.text("n_processes")
        elif limits.memory_bytes and private_bytes(pids) > limits.memory_bytes:
            worker.verdict = limits.text("memory_bytes")
        if worker.verdict:
            self._signal(worker, _SIGKILL)

    def _end_unused(self) -> None:
        positions, self._positions = self._positions or {}, None
        if self._closed:
            return
        if self._templates and not self._workers and not positions:
            for template in list(self._templates.values()):
                self._poller.forget(template.fd)
                del self._templates[template.fd]
                template.end()
            return
        for worker in [each for each in self._idle if positions.get(each.number) == each.position]:
            self._idle.remove(worker)
            self._retire(worker)
        # Not at the next event: without jobs nobody waits for one, nor hears of the ends that were just asked for.
        self._look_again_later()

    def close(self) -> None:
        with self._lock:
            workers = list(self._workers.values())
        # First: nobody may interrupt an executor whose descriptors are closed.
        self._share.leave()
        super().close()
        for worker in workers:
            assert isinstance(worker, ServedWorker)
            self._remove(worker)
        for removal in self._removals:
            removal.join()


def _remove_all(home: str, group: WorkerGroup | None) -> None:
    for _ in range(_N_REMOVALS):
        # What a job left running may still write there while it is ended.
        shutil.rmtree(home, ignore_errors=True)
        gone = group is None or group.remove()
        if gone and not os.path.lexists(home):
            return
        time.sleep(_REMOVE_AGAIN_S)
