"""The user's account on a server, for who signed in with user and password."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from cloud.errors import AccountError
from cloud.resources import check_text
from cloud.resources.keys import check_key

if TYPE_CHECKING:
    from typing import Any, Final

    AskAs = Callable[[str, str, dict[str, Any]], dict[str, Any]]

__all__ = ["RemoteAccounts"]

_TIMES: Final = ("created", "expires", "last_used")


class RemoteAccounts:
    """What ``cloud.account`` can do on a server: see ``cloud.resources.accounts.AccountSession``.

    User and password are kept in the memory of this process, and sent with operations on accounts only.

    Args:
        ask_as: Asks the server with an Authorization header: the operation, the header, and the content; gives the
            content of the reply.
        close: Lets go of the connection.
    """

    def __init__(self, ask_as: AskAs, close: Callable[[], None]) -> None:
        self._ask_as = ask_as
        self._close = close
        self._header: str | None = None

    def __repr__(self) -> str:
        return f"RemoteAccounts(signed in: {self._header is not None})"

    def setuser(self, username: str, password: str) -> None:
        """Sign in. The users of a server are created by its administrators.

        Raises:
            AccountError: Name or password are refused. Who was signed in before still is.
        """
        check_text("the name of a user", username, 1, 256)
        check_text("a password", password, 1, 1024)
        if ":" in username:
            raise AccountError(f"no user has a name with ':' in it: {username!r}")
        header = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode("ascii")
        self._ask_as("account.sign_in", header, {})
        self._header = header

    def api_keys(self) -> list[dict[str, object]]:
        """Return the user's keys as dicts, without their secrets."""
        return [_key(key) for key in self._ask("account.list_keys")["keys"]]

    def create_api_key(self) -> dict[str, object]:
        """Create a key and return it with its secret."""
        return _key(self._ask("account.create_key"))

    def activate_api_key(self, key: int) -> None:
        """Accept a key again."""
        self._ask("account.activate_key", api_key=check_key(key))

    def deactivate_api_key(self, key: int) -> None:
        """Refuse a key from now on."""
        self._ask("account.deactivate_key", api_key=check_key(key))

    def update_api_key_note(self, key: int, note: str) -> None:
        """Replace the note of a key."""
        self._ask("account.note_key", api_key=check_key(key), note=check_text("a note", note, 0, 1024))

    def close(self) -> None:
        """Sign out. Idempotent."""
        self._header = None
        self._close()

    def _ask(self, op: str, **content: Any) -> dict[str, Any]:
        if self._header is None:
            raise AccountError("cloud.account credentials not set; call cloud.account.setuser(username, password)")
        return self._ask_as(op, self._header, content)


def _key(found: dict[str, Any]) -> dict[str, object]:
    key = {"api_key": found["api_key"], "api_secretkey": found.get("api_secretkey")}
    key |= {name: found[name] for name in ("active", "created", "note", "scopes", "expires", "last_used", "revoked")}
    for name in _TIMES:
        if key[name] is not None:
            key[name] = datetime.fromisoformat(key[name])
    return {**key, "scopes": tuple(found["scopes"])}
