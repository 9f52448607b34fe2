"""Opens the worker processes of a pool or an executor, before what works with them is loaded."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.client.cloud import Cloud
    from cloud.pool.placing import OwnWorkers

__all__ = ["open_workers"]


def open_workers(open_cloud: Callable[..., Cloud], start_method: str | None) -> OwnWorkers:
    """Where tasks go that have workers of their own. Arguments and errors as for ``OwnWorkers``."""
    cloud = open_cloud(fork=start_method == "fork")
    cloud.backend  # noqa: B018 - opened at once: what the workers inherit is what there is now
    from cloud.pool.placing import OwnWorkers

    return OwnWorkers(cloud, open_cloud, start_method)
