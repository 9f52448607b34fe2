"""Whether two buffers have the same content: by the C library's ``memcmp`` where it can be had."""

from __future__ import annotations

from functools import cache

from cloud.serialization.addresses import address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_PART_BYTES: Final = 1 << 24
"""Signal handlers run between the parts."""

_COPIED_BYTES: Final = 1 << 17


def alike(one: memoryview, other: memoryview) -> bool:
    """True if two contiguous buffers of one length have the same bytes. Another thread may change them meanwhile."""
    n_bytes, memcmp = one.nbytes, _memcmp()
    if memcmp is None or one.readonly or other.readonly or not n_bytes:
        return _alike_by_copies(one, other)
    first, second = address(one), address(other)
    return not any(
        memcmp(first + start, second + start, min(_PART_BYTES, n_bytes - start))
        for start in range(0, n_bytes, _PART_BYTES)
    )


@cache
def _memcmp() -> Any:
    try:
        import ctypes

        function = ctypes.CDLL(None).memcmp
    except (ImportError, OSError, AttributeError):
        return None  # a Python without ctypes, or a C library of another kind
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return function


def _alike_by_copies(one: memoryview, other: memoryview) -> bool:
    # Of all that Python itself offers, comparing with a bytearray is what ends in memcmp. A copy of this size does not
    # leave the processor's caches.
    return all(
        bytearray(one[start : start + _COPIED_BYTES]) == other[start : start + _COPIED_BYTES]
        for start in range(0, one.nbytes, _COPIED_BYTES)
    )


__all__ = ["alike"]
