"""What stands beside the jobs of a workgroup, asked by its clients and by its jobs: files and crons.

Owns the threads in which that happens, since it blocks for the disk, and how it ends: each request is answered once.
What is asked is in the table of ``wire``; nothing here is unpickled.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, Final

from cloud.backends.requests import Beside, Request
from cloud.environment import Environment
from cloud.errors import AccountError, BackendClosed, CloudException
from cloud.logs import logger
from cloud.resources.files import FileStore
from cloud.resources.principals import Principal
from cloud.resources.uploads import Uploads
from cloud.server.account import AccountOperations
from cloud.server.crons import CronRequests, Jobs
from cloud.server.files import FileRequests

__all__ = ["AccountRequests", "ResourceRequests"]

Answer = tuple[dict[str, Any], tuple[bytes, ...]]

_N_THREADS: Final = 4
#: Readers of large files that pause for longer may find that the file was replaced.
_LEASE_S: Final = 600.0
_ACCOUNT: Final = "account."
_N_REMEMBERED: Final = 256


class ResourceRequests(Beside):
    """Answers the operations on files and crons of one workgroup. Fires its crons from `start` on.

    Args:
        folder: The workgroup's.
        serve_job: Answers a request on jobs, from any thread.
        environment: What the workers of a client's submission must be, from its content; refuses what cannot run here.
        recall: The reply that was given to a request on jobs, by its idempotency key; called under the lock.
        lock: Held while a job's request is answered.
        max_file_bytes: Of one stored file; None is without limit.
        max_storage_bytes: Of all stored files; None is without limit.
        now: The time by which crons are fired, aware.
    """

    def __init__(
        self,
        folder: str,
        serve_job: Callable[[Request], None],
        environment: Callable[[dict[str, Any]], Environment],
        recall: Callable[[str], dict[str, Any] | None],
        lock: AbstractContextManager[Any],
        *,
        max_file_bytes: int | None = None,
        max_storage_bytes: int | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._lock = lock
        self._recall = recall
        self._closing = threading.Event()
        self._store = FileStore(folder, lease_s=_LEASE_S)
        self.uploads = Uploads(self._store, max_file_bytes=max_file_bytes, max_storage_bytes=max_storage_bytes)
        self.crons = CronRequests(folder, Jobs(serve_job, self._closing), environment, self._recalled, now, self._tidy)
        files = FileRequests(self._store, self.uploads)
        self._handlers: dict[str, Callable[[Request], Answer]] = {**files.handlers, **self.crons.handlers}
        self._pool = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="cloud-beside")

    def start(self) -> None:
        """Begin to fire crons, those first that the process before left half done."""
        self.crons.start()

    def answers(self, op: str) -> bool:
        """True for operations on files, crons and accounts; the last are refused, as they are not for jobs."""
        return op in self._handlers or op.startswith(_ACCOUNT)

    def serve(self, request: Request) -> None:
        """Answer a request later, from another thread. Does not block."""
        if request.op.startswith(_ACCOUNT):
            request.refuse(
                AccountError(
                    "accounts are not managed from inside jobs, which have no credentials",
                    hint="Call cloud.account where the program runs.",
                )
            )
            return
        try:
            self._pool.submit(self._answer, request)
        except RuntimeError:
            request.refuse(BackendClosed("the server is stopping", retry=True))

    def _answer(self, request: Request) -> None:
        refused: Exception | None = None
        answer: Answer = {}, ()
        try:
            if self._closing.is_set():
                raise BackendClosed("the server is stopping", retry=True)
            answer = self._handlers[request.op](request)
        except (CloudException, OSError, TypeError, ValueError) as exc:
            refused = exc
        except Exception as exc:  # noqa: BLE001 - a job's request may be any nonsense, and must be answered all the same
            logger("Cloud.server").exception("%s failed", request.op)
            refused = exc
        with self._lock:
            if refused is None:
                request.reply(*answer)
            else:
                request.refuse(refused)

    def _recalled(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            return self._recall(key)

    def _tidy(self) -> None:
        self.uploads.sweep()
        self._store.tidy()

    def stop(self) -> None:
        """Fire no more crons, and take no more requests; those begun are answered. Blocks for them. Idempotent."""
        self._closing.set()
        self.crons.stop()
        self._pool.shutdown()

    def close(self) -> None:
        """`stop`, and let go of the files. Idempotent."""
        self.stop()
        self.crons.close()
        self._store.close()

    @property
    def used_bytes(self) -> int:
        """Size of the stored files."""
        return self._store.used_bytes()


class AccountRequests:
    """Answers the operations on accounts. Thread-safe.

    Args:
        operations: Carries them out.
    """

    def __init__(self, operations: AccountOperations) -> None:
        self._operations = operations
        self._lock = threading.Lock()
        self._replies: OrderedDict[tuple[str, str, str], dict[str, Any]] = OrderedDict()

    def answer(self, op: str, principal: Principal, content: dict[str, Any], key: str) -> Answer:
        """Answer one. Blocks for the database, with a new password some 0.2 s more.

        Args:
            op: Name of the operation.
            principal: Who asks.
            content: As checked against the table.
            key: Idempotency key; "" for none. Asked again with it, nothing is changed again.

        Raises:
            AccountError: As `AccountOperations`; its ``TypeError`` and ``ValueError`` become one, too.
        """
        verb = getattr(self._operations, op.removeprefix(_ACCOUNT))
        try:
            if not key:
                return verb(principal, content), ()
            # One at a time: a second try may come before the first has ended.
            with self._lock:
                known = self._replies.get((principal.user, op, key))
                if known is None:
                    known = self._replies[principal.user, op, key] = verb(principal, content)
                    if len(self._replies) > _N_REMEMBERED:
                        self._replies.popitem(last=False)
                return known, ()
        except (TypeError, ValueError) as exc:
            if isinstance(exc, CloudException):
                raise
            raise AccountError(str(exc)) from exc
