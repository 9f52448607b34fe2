"""Where buffers lie in memory, and what only the C library can do there: by ctypes, where that can be had."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap
    from typing import Any, Final

_MAP_FIXED: Final = 0x10


def has_addresses() -> bool:
    """Whether they can be told here."""
    try:
        import ctypes  # noqa: F401
    except Exception:  # noqa: BLE001 - a Python without it, or no descriptor is left to read it by
        return False
    return True


def address(memory: Any) -> int:
    """Of a writable buffer; true for as long as the caller holds the buffer or a view of it."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def map_privately(mapping: mmap, fd: int) -> None:
    """Map the file privately, where it is mapped already: what was read there is read there still.

    Raises:
        OSError: The system does not let us.
    """
    import ctypes
    from mmap import MAP_PRIVATE, PROT_READ, PROT_WRITE

    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    place = address(mapping)
    if function(place, len(mapping), PROT_READ | PROT_WRITE, MAP_PRIVATE | _MAP_FIXED, fd, 0) != place:
        raise OSError(ctypes.get_errno(), "large arguments could not be mapped anew")


__all__ = ["address", "has_addresses", "map_privately"]
