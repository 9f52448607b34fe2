"""Your user, and the API keys with which programs sign in.

Call `setuser` first; until then every other function raises `AccountError`. Without a server the accounts are those
of the data folder of this machine (``~/.cloud`` or ``CLOUD_HOME``): the first `setuser` creates the user.

::

    import cloud

    cloud.account.setuser("ada", "correct horse")
    key = cloud.account.create_api_key()
    key["api_key"], key["api_secretkey"]     # the secret is shown now and never again

Source: PiCloud client 2.1.1, ``cloud.account``.
"""

from __future__ import annotations

from cloud import current

__all__ = [
    "activate_api_key",
    "api_keys",
    "create_api_key",
    "deactivate_api_key",
    "setuser",
    "update_api_key_note",
]


def setuser(username: str, password: str) -> None:
    """Sign in for the functions of this module. Takes some 0.2 s.

    Args:
        username: 1 to 128 printable characters.
        password: 1 to 1024 characters.

    Raises:
        AccountError: Name or password are refused; who was signed in before still is.
    """
    current.resources().accounts.setuser(username, password)


def api_keys() -> list[dict[str, object]]:
    """Return your API keys, active or not, oldest first.

    Returns:
        One dict per key: ``api_key`` (its number), ``api_secretkey`` (None: it is shown on creation only), ``active``
        (bool), ``created`` (datetime, UTC), ``note`` (str), ``scopes`` (what it may do: some of ``'submit'``,
        ``'read'``, ``'kill'``, ``'files'``, ``'cron'``, ``'admin'``), ``expires`` and ``last_used`` (datetime, UTC, or
        None), and ``revoked`` (bool; then it cannot be activated again).

    Raises:
        AccountError: `setuser` was not called.
    """
    return current.resources().accounts.api_keys()


def create_api_key() -> dict[str, object]:
    """Create an API key, active at once, and return it with its secret.

    Returns:
        A dict as from `api_keys`, with ``api_secretkey`` filled in. Keep it: only a keyed hash of it is stored.

    Raises:
        AccountError: `setuser` was not called, or you have 50 active keys.
    """
    return current.resources().accounts.create_api_key()


def activate_api_key(key: int) -> None:
    """Make a deactivated key valid again.

    Args:
        key: Its number, ``api_key``.

    Raises:
        AccountError: `setuser` was not called, you have no such key, it was revoked, or you have 50 other active keys.
        TypeError: `key` is not an integer.
    """
    current.resources().accounts.activate_api_key(key)


def deactivate_api_key(key: int) -> None:
    """Make a key invalid, in every program that uses it, until it is activated again.

    Args:
        key: Its number, ``api_key``.

    Raises:
        AccountError: `setuser` was not called, or you have no such key.
        TypeError: `key` is not an integer.
    """
    current.resources().accounts.deactivate_api_key(key)


def update_api_key_note(key: int, note: str) -> None:
    """Replace the note of a key, a reminder of what it is for.

    Args:
        key: Its number, ``api_key``.
        note: At most 1024 characters.

    Raises:
        AccountError: `setuser` was not called, or you have no such key.
        TypeError: `key` is not an integer, or `note` not a str.
    """
    current.resources().accounts.update_api_key_note(key, note)
