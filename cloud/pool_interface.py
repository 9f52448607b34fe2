"""PiCloud's name for ``cloud.pool``."""

from __future__ import annotations

from cloud.pool import (
    ApplyResult,
    AsyncResult,
    IMapIterator,
    IMapUnorderedIterator,
    MapResult,
    Pool,
    RemoteTraceback,
    apply,
    apply_async,
    imap,
    imap_unordered,
    map,
    map_async,
)

__all__ = [
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "Pool",
    "RemoteTraceback",
    "apply",
    "apply_async",
    "imap",
    "imap_unordered",
    "map",
    "map_async",
]
