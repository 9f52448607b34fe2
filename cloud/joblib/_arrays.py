"""Large arrays among the arguments of joblib's tasks: written once, mapped by every task that has them.

::

    array ──once──► memory file of this program ◄──/proc/<pid>/fd/<n>── np.memmap in each worker

joblib's users share one large array among many tasks and expect one copy of it, read-only. What other objects hold
travels as arguments of ``cloud.call`` do: private to each task, and writable.
"""

from __future__ import annotations

import copy
import os
import sys
from mmap import mmap
from typing import Any, Final

from cloud.serialization.memory import memory_file

__all__ = ["SharedArrays"]

_MAX_DEPTH: Final = 3
_CONTAINERS: Final = frozenset((list, tuple, dict))
_WRITE_BYTES: Final = 1 << 30


class SharedArrays:
    """The arrays of one call of ``Parallel``.

    Args:
        max_nbytes: Arrays with more bytes are shared; None for none.
        mode: Of the memmap: 'r' (read-only), 'c' (changes are the task's own) or 'r+' (all tasks see them).
    """

    def __init__(self, max_nbytes: int | None, mode: str | None) -> None:
        self._max_nbytes = max_nbytes
        # As in joblib: a new file would be one without the contents.
        self._mode = "r+" if mode == "w+" else mode
        self._written: dict[int, tuple[Any, Any]] = {}
        self._fds: list[int] = []

    def share(self, batch: Any) -> Any:
        """A batch of calls with its large arrays replaced by what becomes a memmap where they run."""
        calls = getattr(batch, "items", None)
        # Without numpy there can be no arrays.
        if self._max_nbytes is None or self._mode is None or "numpy" not in sys.modules or not isinstance(calls, list):
            return batch
        shared = [(func, self._replaced(args, 0), self._replaced(kwargs, 0)) for func, args, kwargs in calls]
        if all(new[1] is old[1] and new[2] is old[2] for new, old in zip(shared, calls, strict=True)):
            return batch
        batch = copy.copy(batch)
        batch.items = shared
        return batch

    def _replaced(self, value: Any, depth: int) -> Any:
        if type(value) in _CONTAINERS:
            if depth > _MAX_DEPTH:
                return value
            items = list(value.values()) if type(value) is dict else value
            new = [self._replaced(item, depth + 1) for item in items]
            if all(one is other for one, other in zip(new, items, strict=True)):
                return value
            return dict(zip(value, new, strict=True)) if type(value) is dict else type(value)(new)
        numpy = sys.modules["numpy"]
        if isinstance(value, numpy.memmap):
            return _of_file(value) or value
        if type(value) is not numpy.ndarray or value.dtype.hasobject or value.nbytes <= self._max_nbytes:
            return value
        found = self._written.get(id(value))
        if found is None:
            # The array is kept, so that no other gets its id.
            found = self._written[id(value)] = (value, self._write(value))
        return found[1]

    def _write(self, array: Any) -> Any:
        numpy = sys.modules["numpy"]
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        content = memoryview(numpy.asarray(array, order=order).reshape(-1, order="A").view(numpy.uint8))
        fd = memory_file()
        path = f"/proc/{os.getpid()}/fd/{fd}"
        if not os.path.exists(path):
            os.close(fd)
            return array
        self._fds.append(fd)
        written = 0
        while written < content.nbytes:
            written += os.pwrite(fd, content[written : written + _WRITE_BYTES], written)
        return _Mapped(path, array.dtype, self._mode, 0, array.shape, order)

    def close(self) -> None:
        """Let go of the files; those that are mapped stay until nobody maps them. Idempotent."""
        fds, self._fds = self._fds, []
        self._written.clear()
        for fd in fds:
            os.close(fd)


class _Mapped:
    """Stands for an array; becomes a memmap where it is unpickled."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> Any:
        from numpy import memmap

        return memmap, self._arguments


def _of_file(array: Any) -> _Mapped | None:
    """What maps the same part of the same file; None for a view that is no plain part of it."""
    base = array.base
    plain = array.flags.c_contiguous or array.flags.f_contiguous
    if array.filename is None or not plain or not isinstance(base, mmap) or not os.path.isfile(array.filename):
        return None
    # A new file would be one without the contents.
    mode = "r+" if array.mode == "w+" else array.mode
    order = "C" if array.flags.c_contiguous else "F"
    return _Mapped(str(array.filename), array.dtype, mode, array.offset, array.shape, order)
