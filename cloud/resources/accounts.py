"""Accounts: workgroups, their users, and the users' API keys. Used by `cloud.account` and by the server.

Owns ``<home>/accounts.sqlite3``, readable by its owner only. Passwords are kept as scrypt hashes: guessable secrets
need a slow hash. Of the secrets of keys see `cloud.resources.keys`.

A *principal* is who asks, as the server sees it: user, workgroup, and what both allow. It is made anew from the
database each time credentials are verified, so that whatever is changed here counts from the next time on.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache

from cloud.errors import AccountError
from cloud.resources import Database, check_name, check_text
from cloud.resources.keys import MAX_KEY, SCOPES, ApiKey, Pepper, can_be_secret, check_key, check_scopes, digest, new_secret

__all__ = ["AccountSession", "AccountStore", "ApiKey", "Principal", "Quotas", "Role", "User", "Workgroup"]

MAX_ACTIVE_KEYS = 50

#: Least time between two notes of when a key was used: noting it is a write.
USE_NOTED_EVERY_S = 60.0

#: scrypt's n, r and p for passwords set from now on; each stored one keeps its own. 16 MB and some 0.2 s a check.
#: Source: OWASP Password Storage Cheat Sheet.
_PASSWORD_COST = (2**14, 8, 5)

_MIGRATIONS = [
    (
        "CREATE TABLE workgroup (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_s REAL NOT NULL)",
        "CREATE TABLE user (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, password TEXT NOT NULL,"
        " workgroup INTEGER NOT NULL REFERENCES workgroup, role TEXT NOT NULL, created_s REAL NOT NULL)",
        # AUTOINCREMENT: a number is never given twice.
        "CREATE TABLE api_key (number INTEGER PRIMARY KEY AUTOINCREMENT, user INTEGER NOT NULL REFERENCES user,"
        " digest BLOB, active INTEGER NOT NULL, note TEXT NOT NULL, created_s REAL NOT NULL)",
        "CREATE INDEX api_key_user ON api_key (user, active)",
    ),
    (
        "ALTER TABLE workgroup ADD COLUMN suspended INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE workgroup ADD COLUMN quotas TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE user ADD COLUMN active INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE api_key ADD COLUMN scopes TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE api_key ADD COLUMN expires_s REAL",
        "ALTER TABLE api_key ADD COLUMN last_used_s REAL",
        "UPDATE api_key SET scopes = CASE (SELECT role FROM user WHERE user.id = api_key.user)"
        " WHEN 'admin' THEN 'submit read kill files cron admin' WHEN 'member' THEN 'submit read kill files cron'"
        " ELSE 'read' END",
    ),
]

_INSERT_WORKGROUP = "INSERT OR IGNORE INTO workgroup (name, created_s) VALUES (?, ?)"
_INSERT_USER = "INSERT OR IGNORE INTO user (name, password, workgroup, role, created_s) VALUES (?, ?, ?, ?, ?)"

_WORKGROUPS = "SELECT id, name, suspended, quotas, created_s FROM workgroup"
_USERS = (
    "SELECT user.name, workgroup.name, workgroup.id, role, active, user.created_s"
    " FROM user JOIN workgroup ON workgroup.id = workgroup"
)
# A revoked key has no digest.
_KEYS = "SELECT number, active, note, created_s, scopes, expires_s, last_used_s, digest IS NULL FROM api_key"
_SIGN_IN = (
    "SELECT user.name, role, user.active AND NOT workgroup.suspended, workgroup.name, workgroup.id, quotas, {} FROM {}"
    " JOIN workgroup ON workgroup.id = workgroup WHERE {} = ?"
)
_SIGN_IN_BY_PASSWORD = _SIGN_IN.format("password", "user", "user.name")
_SIGN_IN_BY_KEY = _SIGN_IN.format(
    "digest, scopes, expires_s, api_key.active", "api_key JOIN user ON user.id = user", "number"
)


class Role(StrEnum):
    """What a user may do in the workgroup."""

    ADMIN = "admin"  #: Everything, also to the jobs and keys of others.
    MEMBER = "member"  #: Run jobs and keep files.
    READ_ONLY = "read_only"  #: Look, and change nothing.

    @property
    def scopes(self) -> tuple[str, ...]:
        """What keys of such a user may do at most, and do unless they were made for less."""
        return _ROLE_SCOPES[self]


_ROLE_SCOPES = {Role.ADMIN: SCOPES, Role.MEMBER: SCOPES[:-1], Role.READ_ONLY: ("read",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What a workgroup may use at most; None is without limit."""

    max_slots: int | None = None  #: Jobs that run at the same time.
    max_queued_jobs: int | None = None  #: Jobs that are not in a final state.
    max_storage_bytes: int | None = None  #: Stored files, payloads and outcomes together.
    max_file_bytes: int | None = None  #: One stored file.

    def changed(self, changes: Mapping[str, object]) -> Quotas:
        """These quotas with some replaced.

        Raises:
            ValueError: There is no such quota, or a value is neither None nor an integer from 0 on.
        """
        known = [each.name for each in fields(Quotas)]
        values: dict[str, int | None] = {}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"there is no quota {name!r}: the quotas are {', '.join(known)}")
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"quota {name} must be an integer from 0 on, or None for no limit, not {value!r}")
            values[name] = value
        return replace(self, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workgroup:
    """One workgroup: users who share jobs, files and crons, apart from all others."""

    id: int  #: Never changes, and never names another one.
    name: str
    suspended: bool  #: None of its users can sign in.
    quotas: Quotas
    created: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """One user."""

    name: str
    workgroup: str
    workgroup_id: int
    role: Role
    active: bool  #: Otherwise neither the password nor any key of the user is accepted.
    created: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is asking, once credentials were verified."""

    user: str
    workgroup: str
    workgroup_id: int
    role: Role
    #: What may be asked for: the key's scopes as far as the role has them, too.
    scopes: frozenset[str]
    quotas: Quotas = Quotas()
    #: The key that was used; None for a password.
    api_key: int | None = None


class AccountStore:
    """The workgroups, users and keys of one data folder.

    Safe in threads, in forked children, and beside other processes on the same folder. The folder, `home`, need not
    exist: the first workgroup or user creates it. Every method may raise what `Database` raises.
    """

    def __init__(self, home: str) -> None:
        self._pepper_path = os.path.abspath(os.path.join(home, "pepper"))
        self._database = Database(os.path.abspath(os.path.join(home, "accounts.sqlite3")), _MIGRATIONS)

    def create_workgroup(self, name: str) -> None:
        """Create an empty workgroup.

        Args:
            name: 1 to 128 printable characters, no blank at either end; ``ValueError`` otherwise.

        Raises:
            AccountError: The name is taken.
        """
        check_name("the name of a workgroup", name)
        with self._database.writing() as db:
            if not db.execute(_INSERT_WORKGROUP, (name, time.time())).rowcount:
                raise AccountError(f"there is a workgroup {name!r} already")

    def create_user(self, name: str, password: str, workgroup: str, role: Role = Role.MEMBER) -> None:
        """Create a user of an existing workgroup. Takes as long as checking a password.

        Args:
            name: As for workgroups; no two users have the same, whatever their workgroups.
            password: 1 to 1024 characters.
            workgroup: Its name.
            role: What the user may do there.

        Raises:
            AccountError: The name is taken, or there is no such workgroup.
        """
        check_name("the name of a user", name)
        check_text("a password", password, 1, 1024)
        role = Role(role)
        sealed = _sealed(password)  # before the lock is taken: it is slow
        with self._database.writing() as db:
            _insert_user(db, name, sealed, workgroup, role)

    def create_first_user(self, name: str, password: str, workgroup: str) -> bool:
        """Create an administrator and the workgroup, unless there is a user already.

        Of several processes that try at once, one succeeds.

        Returns:
            Whether the user was created; False changes nothing.
        """
        check_name("the name of a user", name)
        check_name("the name of a workgroup", workgroup)
        check_text("a password", password, 1, 1024)
        with self._database.reading() as db:
            if db.execute("SELECT 1 FROM user").fetchone() is not None:
                return False
        sealed = _sealed(password)
        with self._database.writing() as db:
            if db.execute("SELECT 1 FROM user").fetchone() is not None:
                return False
            db.execute(_INSERT_WORKGROUP, (workgroup, time.time()))
            _insert_user(db, name, sealed, workgroup, Role.ADMIN)
        return True

    def verify_password(self, user: str, password: str) -> Principal | None:
        """Return who the user is if the password is right, else None.

        Takes the same time, some 0.2 s, for a wrong password and for a user who does not exist.
        """
        check_name("the name of a user", user)
        check_text("a password", password, 1, 1024)
        with self._database.reading() as db:
            row = db.execute(
                "SELECT password, workgroup.name, role FROM user JOIN workgroup ON workgroup.id = workgroup"
                " WHERE user.name = ?",
                (user,),
            ).fetchone()
        if row is None:
            _sealed(password)
            return None
        sealed, workgroup, role = row
        return Principal(user=user, workgroup=workgroup, role=Role(role)) if _opens(password, sealed) else None

    def create_key(self, user: str, note: str = "") -> ApiKey:
        """Create an active key; the returned record alone has its secret.

        Raises:
            AccountError: There is no such user, or the user has 50 active keys.
            BackendError: The pepper of earlier keys is missing.
        """
        check_text("a note", note, 0, 1024)
        created_s = time.time()
        secret = _new_secret()
        with self._database.writing() as db:
            owner = _user_id(db, user)
            pepper = self._pepper_for_new_key(db)
            (number,) = db.execute(
                "INSERT INTO api_key (user, active, note, created_s) VALUES (?, 1, ?, ?) RETURNING number",
                (owner, note, created_s),
            ).fetchone()
            # The number is part of what is hashed: a secret is good for its own number only.
            db.execute("UPDATE api_key SET digest = ? WHERE number = ?", (_digest(pepper, number, secret), number))
            _refuse_above_limit(db, owner, user)
        return _record(number, True, note, created_s, secret)

    def list_keys(self, user: str) -> list[ApiKey]:
        """Return the user's keys, active or not, oldest first, without their secrets.

        Raises:
            AccountError: There is no such user.
        """
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT number, active, note, created_s FROM api_key WHERE user = ? ORDER BY number",
                (_user_id(db, user),),
            ).fetchall()
        return [_record(*row) for row in rows]

    def set_key_active(self, user: str, key: int, active: bool) -> None:
        """Accept a key from now on, or refuse it; in every process at once.

        Raises:
            AccountError: The user has no such key, or has 50 active ones and it would be the next.
            TypeError: `key` is not an integer.
        """
        self._change_key(user, key, "UPDATE api_key SET active = ? WHERE number = ? AND user = ?", bool(active))

    def set_key_note(self, user: str, key: int, note: str) -> None:
        """Replace the note of a key.

        Raises:
            AccountError: The user has no such key.
        """
        check_text("a note", note, 0, 1024)
        self._change_key(user, key, "UPDATE api_key SET note = ? WHERE number = ? AND user = ?", note)

    def verify_key(self, api_key: int, api_secretkey: str) -> Principal | None:
        """Return whose key this is, or None for whatever is not an active key with its secret. Takes microseconds."""
        if not isinstance(api_key, int) or not 0 < api_key <= _MAX_KEY or not _can_be_secret(api_secretkey):
            return None
        with self._database.reading() as db:
            row = db.execute(
                "SELECT digest, active, user.name, workgroup.name, role FROM api_key"
                " JOIN user ON user.id = user JOIN workgroup ON workgroup.id = workgroup WHERE number = ?",
                (api_key,),
            ).fetchone()
        # Hashed for unknown keys too, so that the time taken does not tell which numbers exist.
        pepper = self._pepper() if row is not None else bytes(_PEPPER_BYTES)
        found = _digest(pepper, api_key, api_secretkey)
        digest, active, user, workgroup, role = row or (b"", False, "", "", "")
        if not hmac.compare_digest(found, digest) or not active:
            return None
        return Principal(user=user, workgroup=workgroup, role=Role(role), api_key=api_key)

    def close(self) -> None:
        """Close the database connections. Idempotent; a later use connects anew."""
        self._database.close()

    def _change_key(self, user: str, key: int, statement: str, value: str | bool) -> None:
        number = _check_key(key)
        with self._database.writing() as db:
            owner = _user_id(db, user)
            if not db.execute(statement, (value, number, owner)).rowcount:
                raise AccountError(f"user {user!r} has no API key {number}")
            _refuse_above_limit(db, owner, user)

    def _pepper(self) -> bytes:
        pepper = b""
        with suppress(FileNotFoundError), open(self._pepper_path, "rb") as file:
            pepper = file.read()
        if len(pepper) != _PEPPER_BYTES:
            hint = "Restore this file from a backup; without it no API key can be verified."
            raise BackendError(f"{self._pepper_path} is missing or damaged", hint=hint)
        return pepper

    def _pepper_for_new_key(self, db: sqlite3.Connection) -> bytes:
        # One made anew beside existing keys would silently invalidate them all. The caller's transaction keeps other
        # processes from making one at the same time.
        if not os.path.exists(self._pepper_path) and db.execute("SELECT 1 FROM api_key").fetchone() is None:
            write_private(self._pepper_path, secrets.token_bytes(_PEPPER_BYTES))
        return self._pepper()


class AccountSession:
    """A user signed in to an `AccountStore`, which it closes: what `cloud.account` works on, and describes."""

    def __init__(self, store: AccountStore) -> None:
        self._store = store
        self._user: str | None = None

    def setuser(self, username: str, password: str) -> None:
        """Sign in. The first sign-in of a data folder creates its user.

        Raises:
            AccountError: There is another user already, or another password. Who was signed in before still is.
        """
        created = self._store.create_first_user(username, password, workgroup="local")
        if not created and self._store.verify_password(username, password) is None:
            raise AccountError(
                f"user name or password refused for {username!r}",
                hint="The first setuser() in a data folder fixed both; CLOUD_HOME selects another folder.",
            )
        self._user = username

    def api_keys(self) -> list[dict[str, object]]:
        """Return the user's keys as dicts, without their secrets."""
        return [asdict(key) for key in self._store.list_keys(self._signed_in())]

    def create_api_key(self) -> dict[str, object]:
        """Create a key and return it with its secret."""
        return asdict(self._store.create_key(self._signed_in()))

    def activate_api_key(self, key: int) -> None:
        """Accept a key again."""
        self._store.set_key_active(self._signed_in(), key, True)

    def deactivate_api_key(self, key: int) -> None:
        """Refuse a key from now on."""
        self._store.set_key_active(self._signed_in(), key, False)

    def update_api_key_note(self, key: int, note: str) -> None:
        """Replace the note of a key."""
        self._store.set_key_note(self._signed_in(), key, note)

    def close(self) -> None:
        """Sign out and close the store. Idempotent."""
        self._user = None
        self._store.close()

    def _signed_in(self) -> str:
        if self._user is None:
            raise AccountError("cloud.account credentials not set; call cloud.account.setuser(username, password)")
        return self._user


def _scrypt(password: str, n: int, r: int, p: int, salt: bytes) -> bytes:
    # NFC: the same characters, typed on different systems, arrive composed or decomposed (RFC 8265).
    plain = unicodedata.normalize("NFC", password).encode()
    # maxmem: OpenSSL counts p blocks and some slack beside the table itself.
    return hashlib.scrypt(plain, salt=salt, n=n, r=r, p=p, maxmem=128 * r * (n + p + 4) + (1 << 20), dklen=32)


def _sealed(password: str) -> str:
    n, r, p = _PASSWORD_COST
    salt = secrets.token_bytes(16)
    return f"scrypt${n}${r}${p}${salt.hex()}${_scrypt(password, n, r, p, salt).hex()}"


def _opens(password: str, sealed: str) -> bool:
    _, n, r, p, salt, digest = sealed.split("$")
    found = _scrypt(password, int(n), int(r), int(p), bytes.fromhex(salt))
    return hmac.compare_digest(found, bytes.fromhex(digest))


def _new_secret() -> str:
    body = _PREFIX + secrets.token_urlsafe(32)
    return body + _checksum(body)


def _digest(pepper: bytes, number: int, secret: str) -> bytes:
    return hmac.digest(pepper, f"{number}:{secret}".encode(), "sha256")


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _can_be_secret(value: object) -> bool:
    if not isinstance(value, str) or len(value) != _N_CHARS or not value.isascii():
        return False
    return value.startswith(_PREFIX) and _checksum(value[:-8]) == value[-8:]


def _insert_user(db: sqlite3.Connection, name: str, sealed: str, workgroup: str, role: Role) -> None:
    group = db.execute("SELECT id FROM workgroup WHERE name = ?", (workgroup,)).fetchone()
    if group is None:
        raise AccountError(f"there is no workgroup {workgroup!r}", hint="create_workgroup() makes one.")
    values = (name, sealed, group[0], role.value, time.time())
    if not db.execute(_INSERT_USER, values).rowcount:
        raise AccountError(f"there is a user {name!r} already")


def _record(number: int, active: bool, note: str, created_s: float, secret: str | None = None) -> ApiKey:
    created = datetime.fromtimestamp(created_s, UTC)
    return ApiKey(api_key=number, active=bool(active), created=created, note=note, api_secretkey=secret)


def _user_id(db: sqlite3.Connection, user: str) -> int:
    row = db.execute("SELECT id FROM user WHERE name = ?", (user,)).fetchone()
    if row is None:
        raise AccountError(f"there is no user {user!r}")
    return int(row[0])


def _refuse_above_limit(db: sqlite3.Connection, owner: int, user: str) -> None:
    (n_active,) = db.execute("SELECT count(*) FROM api_key WHERE user = ? AND active", (owner,)).fetchone()
    if n_active > MAX_ACTIVE_KEYS:
        raise AccountError(
            f"user {user!r} has {MAX_ACTIVE_KEYS} active API keys, and more are not allowed",
            hint="Deactivate one that is no longer used.",
        )


def _check_key(key: object) -> int:
    if isinstance(key, bool) or not hasattr(key, "__index__"):  # True is an int, and never meant as key 1
        raise TypeError(f"an API key is identified by its number, an int, not {type(key).__name__}")
    number = operator.index(key)
    if not 0 < number <= _MAX_KEY:
        raise AccountError(f"{number} is not the number of an API key")
    return number
