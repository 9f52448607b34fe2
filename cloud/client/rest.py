"""What verbs need once a backend is open. Loaded as one is opened: workers start meanwhile.

Later a program may have no descriptor left to read a module by.
"""

from __future__ import annotations

from cloud.client import callbacks, info, ordered, progress, results
from cloud.serialization import explain

__all__ = ["callbacks", "explain", "info", "ordered", "progress", "results"]
