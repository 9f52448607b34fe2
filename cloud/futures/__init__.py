"""``concurrent.futures`` over this package's workers.

::

    import cloud

    with cloud.Executor(4) as executor:       # in place of: concurrent.futures.ProcessPoolExecutor(4)
        print(list(executor.map(f, range(10))))

``Executor``  gives work to worker processes of its own, or to those of ``cloud.call``
``Future``    what ``Executor.submit`` returns; works with ``concurrent.futures.wait``, ``as_completed`` and asyncio
"""

from __future__ import annotations

from cloud.futures.executor import Executor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cloud.futures.future import Future

__all__ = ["Executor", "Future"]


def __getattr__(name: str) -> Any:
    if name != "Future":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cloud.futures import future

    globals()[name] = future.Future
    return future.Future
