"""The local backend over a simulation: virtual worker slots on a virtual clock, in this process."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cloud.backends.local import Contexts, LocalBackend
from cloud.configuration import Settings, usable_cores
from cloud.engine.clock import VirtualClock
from cloud.engine.engine import Engine
from cloud.engine.executor.simulated import SimulatedExecutor
from cloud.engine.executor.swapped import program_snapshot
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.serialization.namespace import Namespace


class _ProgramContexts(Contexts):
    """The program's surroundings, also while those of a job stand in for them."""

    def current(self) -> tuple[int, bytes]:
        now = program_snapshot()
        if now != self._last:
            self._take(now)
        return self._context


class SimulatorBackend(LocalBackend):
    """A simulation: code of the program itself and code of its jobs use it from one process."""

    def __init__(self, engine: Engine, executor: SimulatedExecutor) -> None:
        super().__init__("simulator", engine, "simulation")
        self._executor = executor
        self._contexts = _ProgramContexts()

    @property
    def namespace(self) -> Namespace | None:
        return self._executor.namespace_here()


def open_simulator(
    settings: Settings,
    *,
    jids: Callable[[], JidSource],
    seed: int | None = None,
    fail: float = 0.0,
    lose_worker: float = 0.0,
    num_procs: int | None = None,
) -> LocalBackend:
    """A simulation as the settings say; see ``cloud.start_simulator``."""
    clock = VirtualClock()
    executor = SimulatedExecutor(
        num_procs or settings.num_procs or usable_cores(),
        clock,
        output_limit_bytes=settings.output_limit_bytes,
        max_transmit_bytes=settings.max_transmit_data,
        capture=settings.redirect_job_output or settings.force_redirect_job_output,
        random=Random(seed),
        fail=fail,
        lose_worker=lose_worker,
    )
    engine = Engine(
        MemoryStore(jids()),
        executor,
        clock,
        max_nesting=settings.max_nesting,
        max_kept=settings.mp_cache_size_limit,
    )
    return SimulatorBackend(engine, executor)
