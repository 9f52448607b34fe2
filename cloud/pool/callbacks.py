"""The thread of a pool that runs callbacks."""

from __future__ import annotations

import threading
from _queue import SimpleQueue
from collections.abc import Callable

from cloud.logs import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["CallbackThread"]

_STOP_S: Final = 2.0


class CallbackThread:
    """Runs what it is given, one after the other; it starts with the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def put(self, action: Callable[[], None]) -> None:
        """Do this next. Does not block."""
        self._queue.put(action)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="cloud-pool-callbacks", daemon=True)
                    if self._stopped:
                        self._queue.put(None)  # a report that came late: nobody stops this thread any more
                    else:
                        self._thread = thread
                    thread.start()

    def is_current(self) -> bool:
        """True in a callback."""
        return self._thread is threading.current_thread()

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                action()
            except BaseException:  # noqa: BLE001 - a raising callback must stop neither the others nor this thread
                logger("Cloud.pool").exception("a callback of a pool raised")

    def stop(self) -> None:
        """End the thread after what is queued. Bounded: a callback that never returns is left behind."""
        with self._lock:
            thread, self._thread, self._stopped = self._thread, None, True
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(_STOP_S)
