"""What verbs need once a backend is open. Loaded as one is opened: workers start meanwhile.

Later a program may have no descriptor left to read a module by.
"""

from __future__ import annotations

from contextlib import suppress

from cloud.client import callbacks, info, ordered, progress, results
from cloud.client.arguments import check_call, chunks_of, items_of, pickle_call, too_large
from cloud.errors import BackendClosed, CloudTimeoutError, JobNotFound
from cloud.jobs import (
    CALL_OPTIONS,
    DEFAULT_OPTIONS,
    DONE,
    STATUS_LABELS,
    JobOptions,
    Outcome,
    jid_list,
    split_options,
)
from cloud.serialization import explain
from cloud.serialization.functions import FunctionCache, function_name
from cloud.serialization.shared import size_of

__all__ = [
    "CALL_OPTIONS",
    "DEFAULT_OPTIONS",
    "DONE",
    "STATUS_LABELS",
    "BackendClosed",
    "CloudTimeoutError",
    "FunctionCache",
    "JobNotFound",
    "JobOptions",
    "Outcome",
    "callbacks",
    "check_call",
    "chunks_of",
    "explain",
    "function_name",
    "info",
    "items_of",
    "jid_list",
    "ordered",
    "pickle_call",
    "progress",
    "results",
    "size_of",
    "split_options",
    "suppress",
    "too_large",
]
