"""For code that is itself a job: the engine that runs it, reached over the worker's own channel.

No address and no credential is in the job; what it may do is what its channel lets it.
"""

from __future__ import annotations

from cloud import errors
from cloud.backends.remote import RemoteBackend, raise_remote
from cloud.engine.worker.link import Link, LinkClosed
from cloud.engine.worker.surroundings import snapshot
from cloud.jobs import JobOptions
from cloud.serialization import pickling
from cloud.serialization.functions import Function
from cloud.serialization.namespace import Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class WorkerBackend(RemoteBackend):
    """The engine around this job.

    Args:
        link: Its channel.
        namespace: The program's ``__main__`` in this worker.
    """

    name = "worker"
    simulated = True
    namespace: Namespace | None = None

    def __init__(self, link: Link, namespace: Namespace) -> None:
        super().__init__()
        self._link = link
        self.namespace = namespace

    def ask(self, op: str, *blobs: bytes, **content: Any) -> tuple[dict[str, Any], list[bytes]]:
        try:
            answer, found = self._link.request({"op": op, **content}, blobs)
        except LinkClosed:
            raise errors.BackendClosed("the engine that runs this job is gone") from None
        raise_remote(answer)
        return answer, found

    def _submission(self, function: Function, options: JobOptions) -> dict[str, Any]:
        return {"function": function.name, "reusable": function.reusable, "options": options.as_dict()}

    def _surroundings(self) -> bytes:
        return pickling.dumps_plain(snapshot())

    def close(self) -> None:
        """Nothing: the channel is the worker's, and outlives the job."""
