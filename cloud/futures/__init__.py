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
from cloud.futures.future import Future

__all__ = ["Executor", "Future"]
