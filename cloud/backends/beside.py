"""What stands beside the jobs of a server, as `cloud.resources.embedded` has it for this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cloud.backends.crons import RemoteCrons
from cloud.backends.files import RemoteFiles
from cloud.errors import UnsupportedOperation

if TYPE_CHECKING:
    from typing import Any, NoReturn

    from cloud.backends.accounts import RemoteAccounts
    from cloud.backends.remote import RemoteBackend
    from cloud.jobs import JobOptions
    from cloud.serialization.functions import Function

__all__ = ["RemoteResources"]


class RemoteResources:
    """Files, crons and accounts of a server.

    Args:
        backend: Gives the backend in use.
        pickle_call: See ``RemoteCrons``.
        accounts: Gives who is signed in.
    """

    def __init__(
        self,
        backend: Callable[[], RemoteBackend],
        pickle_call: Callable[[Callable[..., Any], dict[str, Any]], tuple[Function, bytes, JobOptions]],
        accounts: Callable[[], RemoteAccounts],
    ) -> None:
        self._backend = backend
        self._pickle_call = pickle_call
        self._accounts = accounts

    @property
    def files(self) -> RemoteFiles:
        """Named files."""
        return RemoteFiles(self._backend().ask)

    @property
    def crons(self) -> RemoteCrons:
        """What ``cloud.cron`` does."""
        backend = self._backend()
        return RemoteCrons(backend.ask, backend.ask_with_call, self._pickle_call)

    @property
    def accounts(self) -> RemoteAccounts:
        """The user's keys."""
        return self._accounts()

    @property
    def home(self) -> NoReturn:
        """Nothing of a server is in a folder of this machine."""
        raise self._unsupported()

    @property
    def cron_store(self) -> NoReturn:
        """The server keeps the entries."""
        raise self._unsupported()

    @property
    def cron_runner(self) -> NoReturn:
        """The server fires them."""
        raise self._unsupported()

    def _unsupported(self) -> UnsupportedOperation:
        return UnsupportedOperation(
            "crons that are registered on a server are fired by the server",
            hint="Without a key and server_url, 'cloud cron run' fires those of this machine.",
        )
