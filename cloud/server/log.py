"""What a server writes to its log: one line an event, as text or as JSON, that no input can forge."""

from __future__ import annotations

import json
import threading
import time
import traceback
from typing import Any, Final, TextIO

_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics"})


class ServerLog:
    """A log of events.

    Args:
        stream: Where it goes.
        as_json: JSON lines instead of text.
    """

    def __init__(self, stream: TextIO, *, as_json: bool) -> None:
        self._stream = stream
        self._as_json = as_json
        self._lock = threading.Lock()

    def __call__(self, facts: dict[str, Any]) -> None:
        """Write one event; ``facts`` has its name under 'event'. An exception is written with its traceback."""
        if facts.get("path") in _QUIET and facts.get("status") == 200:
            return
        exception = facts.get("exception")
        if isinstance(exception, BaseException):
            facts = {**facts, "exception": "".join(traceback.format_exception(exception))}
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
        if self._as_json:
            line = json.dumps({"time": stamp, **facts}, default=str)
        else:
            # JSON's escapes, so that neither line ends nor terminal codes in what clients send can make lines.
            parts = [
                f"{name}={_shown(value)}" for name, value in facts.items() if name != "event" and value is not None
            ]
            line = f"{stamp} {facts['event']} {' '.join(parts)}"
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def _shown(value: Any) -> str:
    text = str(value)
    return text if text and text.isascii() and text.isprintable() and " " not in text else json.dumps(text)
