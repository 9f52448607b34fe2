"""Jobs kept and run by an engine in this process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from cloud.backends.base import Backend, Finals, MapWriter, Segment
from cloud.engine.engine import Engine
from cloud.engine.store.base import Batch
from cloud.engine.watching import on_each_final, when_final
from cloud.engine.worker.surroundings import snapshot, unchanged_since
from cloud.jobs import Jids, JobOptions, Outcome
from cloud.serialization import pickling
from cloud.serialization.functions import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.engine.reading import Read
    from cloud.environment import Environment


class Contexts:
    """Surroundings of submissions, pickled once for as long as they stay the same."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None
        self._context = (0, b"")
        self._ids: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def current(self) -> tuple[int, bytes]:
        """(id, pickled) of this process's surroundings as they are now."""
        if self._last is None or not unchanged_since(self._last):
            self._take(snapshot())
        return self._context

    def _take(self, now: tuple[Any, ...]) -> None:
        self._context = self.intern(pickling.dumps_plain(now))
        self._last = now

    def intern(self, payload: bytes) -> tuple[int, bytes]:
        """(id, pickled) of surroundings already pickled."""
        with self._lock:
            if len(self._ids) > 256 and payload not in self._ids:
                self._ids = {content: number for content, number in self._ids.items() if number > self._newest - 64}
            number = self._ids.setdefault(payload, self._newest + 1)
            self._newest = max(self._newest, number)
        return number, payload

    _newest = 0


class _EngineMap(MapWriter):
    def __init__(self, engine: Engine, batch: Batch) -> None:
        self._engine = engine
        self._batch = batch

    def extend(self, kind: int, n: int, payload: bytes) -> None:
        self._engine.extend(self._batch, kind, n, payload)

    def seal(self) -> range:
        return self._engine.seal(self._batch)

    def abandon(self) -> None:
        self._engine.abandon(self._batch)


class _EngineFinals(Finals):
    def __init__(self, engine: Engine, jids: Jids) -> None:
        self._engine = engine
        self._seen: deque[tuple[int, int, int]] = deque()
        self._released = False
        self.watch(jids)

    def watch(self, jids: Jids) -> None:
        on_each_final(self._engine, jids, lambda first, n, status: self._seen.append((first, n, status)))

    def next(self, timeout_s: float | None) -> tuple[int, int, int] | None:
        if not self._seen:
            self._engine.wait_until(lambda: bool(self._seen) or self._released, timeout_s)
            self._released = False
        return self._seen.popleft() if self._seen else None

    def release(self) -> None:
        self._released = True
        self._engine.executor.interrupt()


class LocalBackend(Backend):
    """An engine in this process behind the contract.

    Args:
        name: Of the backend.
        engine: Already over its executor.
        connection_type: What ``connection_info`` calls it.
        facts: What ``connection_info`` tells beside that.
    """

    def __init__(self, name: str, engine: Engine, connection_type: str, **facts: Any) -> None:
        self.name = name
        self.simulated = True
        self.engine = engine
        self._connection_type = connection_type
        self._facts = facts
        self._contexts = Contexts()

    def submit(
        self,
        function: Function,
        arguments: bytes,
        options: JobOptions,
        context: bytes | None = None,
        depth: int = 0,
        environment: Environment | None = None,
    ) -> int:
        where = self._contexts.current() if context is None else self._contexts.intern(context)
        depth = depth or self.engine.executor.depth_here()
        return self.engine.submit(function, where, arguments, options, depth, environment)

    def open_map(self, function: Function, options: JobOptions) -> MapWriter:
        depth = self.engine.executor.depth_here()
        return _EngineMap(self.engine, self.engine.open_map(function, self._contexts.current(), options, depth))

    def open_batch(
        self, function: Function, context: bytes, options: JobOptions, depth: int, environment: Environment | None
    ) -> Batch:
        """Begin a map with the surroundings of another process: of the job or client that submits it."""
        return self.engine.open_map(function, self._contexts.intern(context), options, depth, environment)

    def wait(self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool) -> list[int] | None:
        return self.engine.wait(jids, timeout_s, stop_on_error=stop_on_error)

    def wait_outcomes(
        self, jids: Jids, timeout_s: float | None, *, stop_on_error: bool, read: Read | None = None
    ) -> tuple[list[int] | None, list[Segment] | None]:
        return self.engine.wait(jids, timeout_s, stop_on_error=stop_on_error, read=read), None

    def when_final(self, jids: Jids, action: Callable[[], None], *, stop_on_error: bool = False) -> Callable[[], None]:
        return when_final(self.engine, jids, action, stop_on_error=stop_on_error)

    def on_each_final(self, jids: Jids, notify: Callable[[int, int, int], None]) -> None:
        on_each_final(self.engine, jids, notify)

    def finals(self, jids: Jids) -> Finals:
        return _EngineFinals(self.engine, jids)

    def outcomes(self, jids: Jids) -> list[Segment]:
        return self.engine.outcomes(jids)

    def statuses(self, jids: Jids) -> bytearray:
        return self.engine.statuses(jids)

    def describe(self, jids: Jids) -> list[dict[str, Any]]:
        from cloud.engine.overview import describe

        ends: dict[int, Outcome] = {}
        return [describe(self.engine, jid, ends) for jid in jids]

    def select(
        self, *, label: str | None = None, status: Iterable[int] | None = None, function: str | None = None
    ) -> list[int]:
        from cloud.engine.overview import select

        return select(self.engine, label=label, status=status, function=function)

    def listing(
        self,
        *,
        label: str | None = None,
        status: Iterable[int] | None = None,
        function: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> tuple[list[dict[str, Any]], int | None]:
        from cloud.engine.overview import listing

        return listing(self.engine, label=label, status=status, function=function, before=before, limit=limit)

    def overview(self) -> dict[str, Any]:
        from cloud.engine.overview import overview

        return overview(self.engine)

    def when_closed(self, action: Callable[[], None]) -> None:
        self.engine.when_closed.append(action)

    def cancel(self, jids: Jids | None, *, begun: bool = True) -> list[int]:
        return self.engine.cancel(jids, begun=begun)

    def delete(self, jids: Jids) -> None:
        self.engine.delete(jids)

    def connection_info(self) -> dict[str, Any]:
        return {
            "opened": not self.engine.closed,
            "connection_type": self._connection_type,
            "num_procs": self.engine.executor.n_slots,
            **self._facts,
        }

    def now(self) -> float:
        return self.engine.clock.now()

    def close(self) -> None:
        self.engine.close()

    def abandon(self) -> None:
        self.engine.abandon_all()
