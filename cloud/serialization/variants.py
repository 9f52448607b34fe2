"""Functions that differ in nothing but their defaults and what their cells hold, as bytes.

A program that makes a closure for each job makes the same function again and again. All but what varies is pickled
once, as its *base*, and where the job runs it is rebuilt once:

::

    b"V" · length · base · pickle((defaults, cells))
"""

from __future__ import annotations

import _pickle as pickle
import struct
from types import CellType, FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, TypeAlias

_HEAD: Final = struct.Struct("<cQ")
_MARK: Final = b"V"

Defaults: TypeAlias = "tuple[Any, ...] | None"


def pack_variant(base: bytes, defaults: Defaults, cells: tuple[Any, ...]) -> bytes:
    """A payload.

    Args:
        base: Payload of ``without_values`` of the function.
        defaults, cells: What it has instead of nothing: immutable, referring to nothing but each other.
    """
    return b"".join((_HEAD.pack(_MARK, len(base)), base, pickle.dumps((defaults, cells), 5)))


def unpack_variant(payload: bytes | memoryview) -> tuple[bytes, Defaults, tuple[Any, ...]]:
    """(base, defaults, cells) of ``pack_variant``."""
    end = _HEAD.size + _HEAD.unpack_from(payload)[1]
    return bytes(payload[_HEAD.size : end]), *pickle.loads(payload[end:])


def without_values(function: FunctionType) -> FunctionType:
    """The same function with no defaults, and nothing in its cells."""
    return _rebuilt(function, function.__globals__, None, [CellType() for _ in function.__code__.co_freevars])


def varied(
    function: FunctionType, variables: dict[str, Any], defaults: Defaults, cells: tuple[Any, ...]
) -> FunctionType:
    """The same function with other globals, defaults and contents of cells."""
    return _rebuilt(function, variables, defaults, [CellType(content) for content in cells])


def _rebuilt(
    function: FunctionType, variables: dict[str, Any], defaults: Defaults, cells: list[CellType]
) -> FunctionType:
    made = FunctionType(function.__code__, variables, function.__name__, defaults, tuple(cells) or None)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    if function.__annotations__:
        made.__annotations__ = function.__annotations__.copy()
    return made
