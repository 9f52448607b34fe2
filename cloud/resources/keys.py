"""API keys: their records, what they may do, and how their secrets are made and hashed.

Owns ``<home>/pepper``. No secret is kept: of each key there is an HMAC-SHA256 under the pepper (256 random bits need
no slow hash, and are checked with every request). A stolen database alone verifies nothing.

A secret reads ``cld_``, 43 random characters (256 bits), 8 of checksum. The prefix lets secret scanners find leaked
ones; the checksum tells a typo from a wrong key without a look into the database.
"""

from __future__ import annotations

import hmac
import operator
import os
import secrets
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from cloud.errors import AccountError, BackendError
from cloud.resources import write_private

__all__ = [
    "MAX_KEY",
    "SCOPES",
    "ApiKey",
    "Pepper",
    "can_be_secret",
    "check_key",
    "check_scopes",
    "digest",
    "new_secret",
]

#: What a key may be allowed to do, in the order in which scopes are shown.
SCOPES: Final = ("submit", "read", "kill", "files", "cron", "admin")

MAX_KEY: Final = 2**63 - 1  # SQLite's largest integer

_PREFIX = "cld_"
_N_CHARS = 4 + 43 + 8
_PEPPER_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One API key."""

    api_key: int  #: Its public number, 1 or more.
    active: bool
    created: datetime
    note: str
    scopes: tuple[str, ...]  #: What it may do, some of `SCOPES`, as far as its user's role allows that, too.
    expires: datetime | None = None  #: When it stops being valid.
    last_used: datetime | None = None  #: When it last signed in, a minute more or less; noted by servers only.
    revoked: bool = False  #: Its secret was forgotten: it can never be active again.
    #: The secret, only on the record that creating the key returns; it cannot be shown again.
    api_secretkey: str | None = field(default=None, repr=False)

    @classmethod
    def of_row(
        cls,
        number: int,
        active: int,
        note: str,
        created_s: float,
        scopes: str,
        expires_s: float | None,
        last_used_s: float | None,
        revoked: int,
    ) -> ApiKey:
        """The record from what the database has of it."""
        return cls(
            api_key=number,
            active=bool(active),
            created=datetime.fromtimestamp(created_s, UTC),
            note=note,
            scopes=tuple(scopes.split()),
            expires=_moment(expires_s),
            last_used=_moment(last_used_s),
            revoked=bool(revoked),
        )


class Pepper:
    """The secret of a data folder under which the secrets of its keys are hashed.

    Args:
        home: The data folder.
    """

    def __init__(self, home: str) -> None:
        self._path = os.path.abspath(os.path.join(home, "pepper"))

    def read(self) -> bytes:
        """The pepper.

        Raises:
            BackendError: It is missing or damaged.
        """
        pepper = b""
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            pepper = file.read()
        if len(pepper) != _PEPPER_BYTES:
            hint = "Restore this file from a backup; without it no API key can be verified."
            raise BackendError(f"{self._path} is missing or damaged", hint=hint)
        return pepper

    def make(self) -> None:
        """Make one unless there is one. Only for the holder of a lock under which no other process does the same."""
        if not os.path.exists(self._path):
            write_private(self._path, secrets.token_bytes(_PEPPER_BYTES))


def new_secret() -> str:
    """A secret nobody has."""
    body = _PREFIX + secrets.token_urlsafe(32)
    return body + _checksum(body)


def can_be_secret(value: object) -> bool:
    """False for what has a typo, or never was a secret."""
    if not isinstance(value, str) or len(value) != _N_CHARS or not value.isascii():
        return False
    return value.startswith(_PREFIX) and _checksum(value[:-8]) == value[-8:]


def digest(pepper: bytes | None, number: int, secret: str) -> bytes:
    """What is kept of a secret. It is good for its own number only, which is part of what is hashed.

    Without a pepper it is no key's digest, and takes as long.
    """
    return hmac.digest(pepper or bytes(_PEPPER_BYTES), f"{number}:{secret}".encode(), "sha256")


def check_key(key: object) -> int:
    """Return the number of a key as an int.

    Raises:
        AccountError: No key has such a number.
        TypeError: It is no integer.
    """
    if isinstance(key, bool) or not hasattr(key, "__index__"):  # True is an int, and never meant as key 1
        raise TypeError(f"an API key is identified by its number, an int, not {type(key).__name__}")
    number = operator.index(key)
    if not 0 < number <= MAX_KEY:
        raise AccountError(f"{number} is not the number of an API key")
    return number


def check_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    """Return the scopes in their order, each once.

    Raises:
        TypeError: They are no collection of str.
        ValueError: There is none, or one that does not exist.
    """
    if isinstance(scopes, str) or not isinstance(scopes, Iterable):
        raise TypeError(f"scopes must be several str, such as ['read'], not {type(scopes).__name__}")
    wanted = list(scopes)
    unknown = [scope for scope in wanted if not isinstance(scope, str) or scope not in SCOPES]
    if unknown:
        raise ValueError(f"there is no scope {unknown[0]!r}: the scopes are {', '.join(SCOPES)}")
    if not wanted:
        raise ValueError(f"a key needs at least one scope of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in wanted)


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
