"""PiCloud's ``cloud.pool_interface``: the functions of a pool, on whatever cloud is current.

Source: PiCloud client 2.1.1. Mended here: ``imap`` took its chunksize for a timeout, ``AsyncResult`` ignored timeouts.
"""

from __future__ import annotations

import builtins

from cloud import current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

__all__ = ["AsyncResult", "apply", "apply_async", "imap", "imap_unordered", "map", "map_async"]

_AHEAD = 10


class AsyncResult:
    """The result of jobs of the current cloud.

    Args:
        jid: A jid, or a sequence of them.
    """

    def __init__(self, jid: Any) -> None:
        self._jid = jid

    def get(self, timeout: float | None = None) -> Any:
        """Block until the jobs have ended; their result, a list for several.

        Raises:
            CloudTimeoutError: Not in ``timeout`` seconds; None waits for ever.
            CloudException: One failed.
        """
        return current.cloud().result(self._jid, timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Block until the jobs have ended, whether well or not, or for ``timeout`` seconds."""
        from cloud.errors import CloudTimeoutError

        try:
            current.cloud().join(self._jid, timeout, ignore_errors=True)
        except CloudTimeoutError:
            pass  # the caller asks ready()

    def ready(self) -> bool:
        """True when all have ended. Does not block."""
        from cloud.jobs import DONE

        return all(code >= DONE for code in self._codes())

    def successful(self) -> bool:
        """True when none failed.

        Raises:
            AssertionError: Not all have ended.
        """
        from cloud.jobs import DONE

        codes = self._codes()
        if any(code < DONE for code in codes):
            raise AssertionError(f"{self!r} is not ready")
        return all(code == DONE for code in codes)

    def _codes(self) -> list[int]:
        from cloud.jobs import jid_list

        return builtins.list(current.cloud().backend.statuses(jid_list(self._jid, "AsyncResult")))


def apply(func: Callable[..., Any], args: Iterable[Any] = ()) -> Any:
    """Run ``func(*args)`` as a job and return its value. Blocks.

    Raises:
        CloudException: It failed.
    """
    return apply_async(func, args).get()


def apply_async(
    func: Callable[..., Any], args: Iterable[Any] = (), callback: Callable[[int], object] | None = None
) -> AsyncResult:
    """Run ``func(*args)`` as a job.

    Args:
        func: Any callable.
        args: Its arguments.
        callback: Called with the jid, not the value, once the job has succeeded.
    """
    return AsyncResult(current.cloud().call(func, *args, _callback=callback))


def map(func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
    """Run ``func`` once for each item, as jobs; the values in order. Blocks. ``chunksize`` is ignored.

    Raises:
        CloudException: One failed.
    """
    values: list[Any] = map_async(func, iterable, chunksize).get()
    return values


def map_async(func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> AsyncResult:
    """As ``map``, without waiting."""
    return AsyncResult(current.cloud().map(func, iterable))


def imap(func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> Iterator[Any]:
    """As ``map``; an iterator over the values in order, each as soon as it is there.

    Args:
        func: Any callable.
        iterable: Its items.
        chunksize: How many results to fetch at once; None means 10.
    """
    cloud = current.cloud()
    return cloud.iresult(cloud.map(func, iterable), num_in_parallel=chunksize or _AHEAD)


def imap_unordered(func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> Iterator[Any]:
    """The same as ``imap``: in order, as PiCloud's was."""
    return imap(func, iterable, chunksize)
