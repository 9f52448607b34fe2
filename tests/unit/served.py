"""A real engine over the worker processes of a server, and shorthands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cloud.client.arguments import pack_items, pickle_call
from cloud.client.results import decode
from cloud.engine.clock import RealClock
from cloud.engine.engine import Engine
from cloud.engine.executor.served import ServedProcesses
from cloud.engine.executor.setup import OWN_VERSION, WorkerSetup
from cloud.engine.executor.slots import Slots
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.environment import Environment
from cloud.jobs import DEFAULT_OPTIONS, ERROR_TEXT, Jids, JobOptions, Outcome
from cloud.serialization import pickling
from cloud.serialization.functions import FunctionCache

SOON_S: Final = 30.0
CONTEXT: Final = pickling.dumps_plain((None, "", {}, None))


def code(name: str) -> Environment:
    """The environment of this interpreter and a set of modules."""
    return Environment(OWN_VERSION, name)


class ServedHouse:
    """One workgroup's engine: jobs have the surroundings that a client over HTTP sends."""

    def __init__(self, setup: WorkerSetup, slots: Slots | int = 2, max_slots: int = 0, **options: Any) -> None:
        slots = Slots(slots) if isinstance(slots, int) else slots
        self.executor = ServedProcesses(max_slots or slots.n, setup=setup, slots=slots, grace_s=0.3, **options)
        self.engine = Engine(MemoryStore(JidSource()), self.executor, RealClock())
        self._functions = FunctionCache()

    def call(
        self, function: Callable[..., Any], *args: Any, environment: Environment | None = None, **values: Any
    ) -> int:
        options = JobOptions.from_dict(values) if values else DEFAULT_OPTIONS
        arguments = pickle_call(args, {}, None, plain=False, limit=0)
        made = self._functions.get(function, None)
        return self.engine.submit(made, (1, CONTEXT), arguments, options, 0, environment)

    def map(self, function: Callable[..., Any], items: list[Any], environment: Environment | None = None) -> range:
        made = self._functions.get(function, None)
        batch = self.engine.open_map(made, (1, CONTEXT), DEFAULT_OPTIONS, 0, environment)
        for chunk in pack_items(items, None, tuples=False):
            self.engine.extend(batch, *chunk)
        return self.engine.seal(batch)

    def results(self, jids: Jids) -> list[Any]:
        """Values in order; the exception of a failed job in its place."""
        assert self.engine.wait(jids, SOON_S) == []
        return decode(jids, self.engine.outcomes(jids), None)[0]

    def result(self, jid: int) -> Any:
        value = self.results((jid,))[0]
        if isinstance(value, Exception):
            raise value
        return value

    def error(self, jid: int) -> str:
        """Text of a job's error."""
        assert self.engine.wait((jid,), SOON_S) == []
        return Outcome(self.engine.outcomes((jid,))[0][3]).text(ERROR_TEXT) or ""

    @property
    def n_workers(self) -> int:
        with self.engine.lock:
            return len(self.executor._workers)

    def pids(self) -> dict[Environment | None, list[int]]:
        """Process ids of the workers, by environment."""
        found: dict[Environment | None, list[int]] = {}
        with self.engine.lock:
            for worker in self.executor._workers.values():
                found.setdefault(worker.environment, []).append(worker.pid)
        return found

    def template_pids(self) -> list[int]:
        with self.engine.lock:
            return [template._pid for template in self.executor._templates.values()]


def code_folder(folder: Path, **modules: str) -> Path:
    """Folders named by the keywords, each with a module ``served_code``."""
    for name, source in modules.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "served_code.py").write_text(source)
    return folder


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for another process's doing, of which nothing here is told."""
    until = time.monotonic() + SOON_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < until, what
        pause.wait(0.01)
