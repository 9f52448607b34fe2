"""What the commands print: a text or one JSON document on standard output, errors in one line on standard error."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from cloud.errors import (
    CloudException,
    ConfigurationError,
    JobFailed,
    JobKilled,
    JobNotFound,
    JobStalled,
    SerializationError,
    UnsupportedOperation,
)

__all__ = ["FAILED", "INTERRUPTED", "OK", "USAGE", "Output", "UsageError", "plain", "safe", "table"]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

_JOB_ERRORS: Final = (JobFailed, JobKilled, JobStalled)


class UsageError(Exception):
    """The command line makes no sense here; the text says why and what to write instead."""


class Output:
    """Where a command tells what it found.

    Args:
        as_json: Documents instead of text.
        debug: Errors with their traceback.
    """

    def __init__(self, *, as_json: bool, debug: bool) -> None:
        self.as_json = as_json
        self.debug = debug

    def show(self, document: Any, text: str) -> None:
        """Print the document, or the text, if it is not empty, and the end of a line."""
        if self.as_json:
            text = json.dumps(plain(document))
        if text:
            _write_line(sys.stdout, text)

    def flush(self) -> None:
        """Have all of it written: a reader that is gone is noticed here at the latest."""
        if sys.stdout is not None:
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a line that is not what was asked for."""
        _write_line(sys.stderr, f"cloud: {text}")

    def fail(self, exc: Exception) -> int:
        """Print an error; the exit code for it."""
        code = _code_of(exc)
        message, remedy = _sentence(exc, code)
        if self.as_json:
            document = {
                "type": type(exc).__name__,
                "message": message,
                "remedy": remedy,
                "jid": getattr(exc, "jid", None),
                "exit_code": code,
            }
            if self.debug:
                document["traceback"] = _traceback(exc)
            _write_line(sys.stderr, json.dumps({"error": plain(document)}))
            return code
        if self.debug:
            _write_line(sys.stderr, _traceback(exc))
        self.warn(f"{message} ({remedy})" if remedy else message)
        return code


def plain(value: Any) -> Any:
    """The value as JSON can hold it: times in ISO 8601, whatever else JSON does not know as Python writes it."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not abs(value) < float("inf"):
        return repr(value)
    return value if value is None or type(value) in (bool, int, float, str) else repr(value)


def safe(text: str) -> str:
    """The text in one line, without what would command the terminal: others may have chosen it."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as aligned columns."""
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts
    )


def _write_line(stream: Any, text: str) -> None:
    if stream is None:
        return
    try:
        stream.write(f"{text}\n")
    except UnicodeEncodeError:
        # A terminal that cannot show everything shows the rest.
        stream.write(f"{text.encode('ascii', 'backslashreplace').decode()}\n")
    stream.flush()


def _code_of(exc: Exception) -> int:
    if isinstance(exc, UsageError | ConfigurationError | UnsupportedOperation | JobNotFound):
        return USAGE
    # A ValueError of ours (an invalid schedule) is about what was written.
    if isinstance(exc, TypeError | ValueError) and not isinstance(exc, SerializationError):
        return USAGE
    return FAILED


def _sentence(exc: Exception, code: int) -> tuple[str, str]:
    """What happened in one line, and what to do about it."""
    if isinstance(exc, _JOB_ERRORS):
        last = str(exc.parameter).strip().rpartition("\n")[2]
        remedy = "--debug shows the traceback" if last != exc.parameter else ""
        return f"job {exc.jid} ended with status {exc.status!r}: {last}", remedy
    if isinstance(exc, CloudException):
        return _one_line(str(exc).partition("\nTIP: ")[0]), _one_line(exc.hint or "")
    if isinstance(exc, OSError):
        return _one_line(f"{exc.filename}: {exc.strerror}" if exc.filename and exc.strerror else str(exc)), ""
    if code == USAGE:
        return _one_line(str(exc)), "" if isinstance(exc, UsageError) else "--debug shows where it comes from"
    return f"unexpected {type(exc).__name__}: {_one_line(str(exc))}", "--debug shows where it comes from"


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _traceback(exc: Exception) -> str:
    if isinstance(exc, _JOB_ERRORS):
        return str(exc.parameter).rstrip()
    return "".join(traceback.format_exception(exc)).rstrip()
