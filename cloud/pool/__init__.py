"""``multiprocessing.Pool`` over this package's workers, and PiCloud's functions of the same names.

::

    from cloud.pool import Pool             # in place of: from multiprocessing import Pool

    with Pool(4) as pool:
        print(pool.map(f, range(10)))

    import cloud.pool

    cloud.pool.map(f, range(10))            # the same wherever cloud.call runs; there is nothing to close

``Pool``      workers of its own: see ``Pool``
functions     PiCloud's ``cloud.pool_interface``: on the current cloud
"""

from __future__ import annotations

from cloud.pool.calls import AsyncResult, apply, apply_async, imap, imap_unordered, map, map_async
from cloud.pool.pool import Pool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.pool.errors import RemoteTraceback
    from cloud.pool.iterators import IMapIterator, IMapUnorderedIterator
    from cloud.pool.results import ApplyResult, MapResult

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

_WITH_A_POOL = {
    "ApplyResult": "results",
    "IMapIterator": "iterators",
    "IMapUnorderedIterator": "iterators",
    "MapResult": "results",
    "RemoteTraceback": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_A_POOL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_WITH_A_POOL[name]}"), name)
    return value
