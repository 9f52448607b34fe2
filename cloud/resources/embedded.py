"""The resources of this machine: files, crons and accounts in one home folder, each opened when first used."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from typing import Any

from cloud.resources.accounts import AccountSession, AccountStore
from cloud.resources.crons import CronEntry, CronRunner, CronService, CronStore
from cloud.resources.files import FileStore
from cloud.resources.schedule import Schedule


class Jobs:
    """What crons need of whoever runs jobs.

    Attributes:
        dumps: Function and reserved names to (payload, options).
        submit: Submits an entry's job; its jid.
        is_finished: Whether a job has ended, or is forgotten.
        kill: Ends a job.
        now: The time by which crons run, aware.
    """

    def __init__(
        self,
        dumps: Callable[[Callable[..., Any], dict[str, Any]], tuple[bytes, dict[str, Any]]],
        submit: Callable[[CronEntry], int],
        is_finished: Callable[[int], bool],
        kill: Callable[[int], object],
        now: Callable[[], datetime],
    ) -> None:
        self.dumps = dumps
        self.submit = submit
        self.is_finished = is_finished
        self.kill = kill
        self.now = now


class Resources:
    """What stands beside the jobs, in a home folder.

    Args:
        home: The folder; created when something is first written.
        jobs: How crons run.
        simulated: Crons are a copy of the folder's, gone with ``close``: what a simulation fires has not been fired.
    """

    def __init__(self, home: str, jobs: Jobs, *, simulated: bool = False) -> None:
        self.home = home
        self.simulated = simulated
        self._jobs = jobs
        self._copy: str | None = None

    @cached_property
    def files(self) -> FileStore:
        """Named files."""
        return FileStore(self.home)

    @cached_property
    def accounts(self) -> AccountSession:
        """Users and their keys."""
        return AccountSession(AccountStore(self.home))

    @cached_property
    def cron_store(self) -> CronStore:
        """Cron entries."""
        if not self.simulated:
            return CronStore(self.home, self._jobs.now)
        self._copy = tempfile.mkdtemp(prefix="cloud-")
        copy = CronStore(self._copy, self._jobs.now)
        real = CronStore(self.home, self._jobs.now)
        for entry in real.list():
            copy.register(
                entry.label,
                Schedule(entry.schedule, entry.tz),
                entry.payload,
                options=dict(entry.options),
                func_name=entry.func_name,
                missed=entry.missed,
                overlap=entry.overlap,
            )
        real.close()
        return copy

    @cached_property
    def cron_runner(self) -> CronRunner:
        """Fires what is due."""
        jobs = self._jobs
        return CronRunner(self.cron_store, jobs.submit, jobs.is_finished, jobs.now, kill=jobs.kill)

    @cached_property
    def crons(self) -> CronService:
        """What ``cloud.cron`` does."""
        return CronService(self.cron_store, self.cron_runner, self._jobs.dumps)

    def close(self) -> None:
        """Close what was opened. Idempotent."""
        opened = self.__dict__
        for name in ("files", "accounts", "cron_runner", "cron_store"):
            resource = opened.pop(name, None)
            if resource is not None:
                resource.close()
        opened.pop("crons", None)
        copy, self._copy = self._copy, None
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)
