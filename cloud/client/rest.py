"""What verbs need once a backend is open. Loaded as one is opened: workers start meanwhile.

Later a program may have no descriptor left to read a module by.
"""

from __future__ import annotations

from contextlib import suppress

from cloud.client import callbacks, info, ordered, progress, results  # noqa: F401 - verbs import from them
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
from cloud.serialization import explain  # noqa: F401 - for what cannot be pickled
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
    "check_call",
    "chunks_of",
    "function_name",
    "items_of",
    "jid_list",
    "pickle_call",
    "size_of",
    "split_options",
    "suppress",
    "too_large",
]
