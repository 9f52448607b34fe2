"""What a server writes to its log: one line an event, as text or as JSON, that no input can forge."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, Final, TextIO

_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics"})


class ServerLog:
    """A log of events. Thread-safe; never raises for a stream that fails.

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
        # A log that cannot be written, for want of space or of a reader, must not end the work.
        with self._lock, suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    def take_messages(self) -> None:
        """From now on have what is logged by way of `logging`, by this package and by others, as events 'message'."""
        root = logging.getLogger()
        for handler in [each for each in root.handlers if isinstance(each, _Messages)]:
            root.removeHandler(handler)
        root.addHandler(_Messages(self))


class _Messages(logging.Handler):
    def __init__(self, log: ServerLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001 - a message whose arguments do not fit it is still a message
            text = str(record.msg)
        facts: dict[str, Any] = {"event": "message", "level": record.levelname.lower(), "logger": record.name}
        facts["text"] = text
        if record.exc_info and record.exc_info[1] is not None:
            facts["exception"] = record.exc_info[1]
        self._log(facts)


def _shown(value: Any) -> str:
    text = str(value)
    plain = text and text.isascii() and text.isprintable() and not {" ", '"', "="} & set(text)
    return text if plain else json.dumps(text)
