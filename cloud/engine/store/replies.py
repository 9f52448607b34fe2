"""Replies to requests by their idempotency keys: who asks again is told the same, and nothing happens twice."""

from __future__ import annotations

import json
from collections.abc import Callable

from cloud.engine.store.journal import Change, Transaction
from cloud.engine.store.rows import Reader, row_digest
from cloud.errors import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_KEPT_S: Final = 86400.0
_PURGE_EVERY_S: Final = 600.0


class Replies:
    """Replies on disk, and those on their way there.

    Args:
        reader: Of the store's file.
        now: Seconds since the epoch.
    """

    def __init__(self, reader: Reader, now: Callable[[], float]) -> None:
        self._reader = reader
        self._now = now
        self._pending: dict[str, tuple[Change, dict[str, Any]]] = {}
        self._purge_at = 0.0

    def writing(self, key: str, reply: dict[str, Any]) -> Callable[[Transaction], None]:
        """What writes a reply, and now and then removes those older than a day."""
        body, now = json.dumps(reply), self._now()
        purge = now >= self._purge_at
        if purge:
            self._purge_at = now + _PURGE_EVERY_S

        def write(transaction: Transaction) -> None:
            if purge:
                transaction.execute("DELETE FROM reply WHERE created < ?", (now - _KEPT_S,))
            row = (key, now, body, row_digest(key, now, body))
            transaction.execute("INSERT OR REPLACE INTO reply VALUES (?, ?, ?, ?)", row)

        return write

    def expect(self, key: str, reply: dict[str, Any], change: Change) -> None:
        """It will be on disk with this change."""
        self._pending[key] = change, reply

    def settle(self, key: str) -> None:
        """It is on disk, or was given up."""
        if key in self._pending and self._pending[key][0].over:
            del self._pending[key]

    def pending(self, key: str) -> tuple[Change, dict[str, Any]] | None:
        """A reply that is not on disk yet, and the change that it will be written with."""
        return self._pending.get(key)

    def stored(self, key: str) -> dict[str, Any] | None:
        """A reply that is on disk, and not older than a day.

        Raises:
            BackendError: It is damaged.
        """
        rows = self._reader.rows("SELECT created, body, digest FROM reply WHERE key = ?", (key,))
        if not rows or rows[0][0] < self._now() - _KEPT_S:
            return None
        created, body, digest = rows[0]
        if row_digest(key, created, body) != digest:
            raise BackendError(f"The reply kept for request {key} is damaged", hint="Use a new idempotency key.")
        found: dict[str, Any] = json.loads(body)
        return found


__all__ = ["Replies"]
