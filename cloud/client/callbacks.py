"""Runs callbacks, in the process that submitted the jobs, on one thread of their own."""

from __future__ import annotations

import threading
from _queue import SimpleQueue
from collections.abc import Callable
from types import FunctionType

from cloud.client.arguments import fits
from cloud.jobs import DONE
from cloud.logs import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Callbacks:
    """The callback thread of one Cloud. It starts with the first callback."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[list[Callable[..., Any]], int] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def notifier(
        self, on_done: list[Callable[..., Any]], on_error: list[Callable[..., Any]]
    ) -> Callable[[int, int, int], None]:
        """What to hand to ``Backend.on_each_final``: queues the callbacks for each job."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cloud-callbacks", daemon=True)
                self._thread.start()

        def notify(first: int, n: int, status: int) -> None:
            callbacks = on_done if status == DONE else on_error
            if callbacks:
                for jid in range(first, first + n):
                    self._queue.put((callbacks, jid))

        return notify

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            callbacks, jid = item
            for callback in callbacks:
                try:
                    if _takes_argument(callback):
                        callback(jid)
                    else:
                        callback()
                except BaseException:  # noqa: BLE001 - a raising callback must stop neither the others nor this thread
                    logger().exception("callback %r of job %s raised", callback, jid)

    def close(self) -> None:
        """Finish what is queued, then end the thread. Bounded: a callback that never returns is left behind."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._queue.put(None)
            thread.join(2.0)


def _takes_argument(callback: Callable[..., Any]) -> bool:
    if type(callback) is FunctionType and not callback.__dict__:  # where a decorator tells of another's arguments
        return fits(callback, 1, {})
    import inspect

    try:
        inspect.signature(callback).bind(0)
    except TypeError:
        return False
    except ValueError:
        return True  # a builtin that does not tell
    return True
