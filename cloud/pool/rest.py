"""What a pool needs once its workers start: loaded meanwhile."""

from __future__ import annotations

from contextlib import suppress

from cloud.errors import BackendClosed
from cloud.pool.callbacks import CallbackThread
from cloud.pool.errors import unsent_error
from cloud.pool.feeding import Feed, extend
from cloud.pool.iterators import IMapIterator, IMapUnorderedIterator
from cloud.pool.ledger import Ledger
from cloud.pool.placing import shared_place
from cloud.pool.results import ApplyResult, MapResult

__all__ = [
    "ApplyResult",
    "BackendClosed",
    "CallbackThread",
    "Feed",
    "IMapIterator",
    "IMapUnorderedIterator",
    "Ledger",
    "MapResult",
    "extend",
    "shared_place",
    "suppress",
    "unsent_error",
]
