"""What ``Executor.map`` reads its results from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import islice

from cloud.backends.base import Backend
from cloud.client.results import decode
from cloud.errors import BackendClosed, CloudException, CloudTimeoutError, JobKilled
from cloud.futures.errors import lost_error, task_error
from cloud.jobs import Jids
from cloud.pool.iterators import IMapIterator, Raised

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.futures.future import Future
    from cloud.futures.work import Work

__all__ = ["MapResults", "buffered", "results_of"]


class MapResults(IMapIterator):
    """Results of one map, in the order of the items. Its jobs are kept as long as it is.

    For one reader, ``values``: ready are lists of values, the next one last, and perhaps the error that ends them.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._work = work
        self._n_open = 1  # the iterable itself
        self._withdrawn = False

    def add(self, backend: Backend, jids: range) -> None:
        with self._changed:
            self._n_open += 1
        # Before anybody knows of them: who takes the last result deletes the jobs.
        with suppress(BackendClosed):
            backend.when_final(jids, self._end_part)
        super().add(backend, jids)

    def end(self, error: BaseException | None = None) -> None:
        if not self._ended:
            super().end(error)
            self._end_part()

    def _end_part(self) -> None:
        with self._changed:
            self._n_open -= 1
        if not self._n_open:
            self._work.end_map(self)

    def withdraw(self) -> None:
        """End those jobs that have not begun."""
        self._withdrawn = True
        if self.feed is not None:
            self.feed.stop()
        for backend, jids in self._submitted():
            self._work.withdraw(backend, jids)

    def _keep(self, backend: Backend, jids: Jids) -> None:
        values, failures = decode(jids, backend.outcomes(jids), backend.namespace)
        if failures:
            first = next(index for index, value in enumerate(values) if value is failures[0])
            del values[first:]
        values.reverse()
        self._ready.append(values)
        if failures:
            self._ready.append(Raised(self._raised(failures[0])))

    def _raised(self, failure: CloudException) -> BaseException:
        if self._withdrawn and isinstance(failure, JobKilled):
            return CancelledError()
        return task_error(failure)

    def _look(self, deadline: float | None) -> None:
        try:
            super()._look(deadline)
        except BackendClosed as exc:
            raise lost_error(exc, None) from None

    def values(self, deadline: float | None) -> Iterator[Any]:
        """See ``results_of``."""
        ready = self._ready
        try:
            while True:
                while ready:
                    if type(ready[0]) is Raised:
                        raise ready.popleft().error
                    values = ready.popleft()
                    # Not kept in a variable here: whoever has the value is the only one to have it.
                    while values:
                        yield values.pop()
                try:
                    self._look(deadline)
                except StopIteration:
                    return
                except CloudTimeoutError as exc:
                    raise CloudTimeoutError("not all results were there in time", jid=exc.jid) from None
        finally:
            self.withdraw()

    def __del__(self) -> None:
        # Not here: this may be called anywhere, with any lock held.
        forgotten = self._work.forgotten
        forgotten.extend(self._submitted())


def results_of(results: MapResults, timeout: float | None) -> Iterator[Any]:
    """The values, as a generator: what it raises ends it, and the rest is not run."""
    return results.values(None if timeout is None else time.monotonic() + timeout)


def buffered(
    submit: Callable[..., Future[Any]], items: Iterator[tuple[Any, ...]], n: int, timeout: float | None
) -> Iterator[Any]:
    """As ``results_of``, with only ``n`` tasks submitted ahead of the results taken."""
    deadline = None if timeout is None else time.monotonic() + timeout
    ahead = deque(submit(*item) for item in islice(items, n))
    return _buffered(submit, items, ahead, deadline)


def _buffered(
    submit: Callable[..., Future[Any]],
    items: Iterator[tuple[Any, ...]],
    ahead: deque[Future[Any]],
    deadline: float | None,
) -> Iterator[Any]:
    try:
        while ahead:
            future = ahead[0]
            left_s = None if deadline is None else deadline - time.monotonic()
            try:
                found = [future.result(left_s)]
            finally:
                future.cancel()
                del future
            ahead.popleft()
            for item in islice(items, 1):
                ahead.append(submit(*item))
            yield found.pop()
    finally:
        for future in ahead:
            future.cancel()
