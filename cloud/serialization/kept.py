"""Functions that were rebuilt once for many jobs, each as long as the definitions that came with it are in force."""

from __future__ import annotations

import _pickle as pickle
from collections.abc import Callable

from cloud.serialization.namespace import Definitions, Namespace
from cloud.serialization.shared import is_shared, unpack_shared
from cloud.serialization.variants import unpack_variant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class KeptFunctions:
    """Functions by the token of their payload.

    All functions of a program share one set of globals: what came with one job may have replaced some since.

    Args:
        namespace: Where they were rebuilt.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._kept: dict[int, tuple[Callable[..., Any], Definitions]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, token: int) -> Callable[..., Any] | None:
        """The function, if it is kept and finds the globals that it was sent with."""
        found = self._kept.get(token)
        if found is None:
            return None
        function, definitions = found
        return function if self._namespace.has(definitions) else None

    def keep(self, token: int, function: Callable[..., Any], payload: Any) -> None:
        """Keep what was just rebuilt from this payload."""
        self._kept[token] = function, definitions_of(payload)

    def forget(self, token: int) -> None:
        """Keep it no longer. No effect if it is not kept."""
        self._kept.pop(token, None)

    def clear(self) -> None:
        """Keep none."""
        self._kept.clear()


def definitions_of(payload: Any) -> Definitions:
    """Names and digests of what travels with a payload of ``pickling.dumps``."""
    if is_shared(payload):
        payload, _ = unpack_shared(payload)
    if payload[0] == 86:  # b"V"
        payload, _, _ = unpack_variant(payload)
    if payload[0] != 77:  # b"M"
        return []
    return [(row[0], row[1]) for row in pickle.loads(memoryview(payload)[1:])[1]]
