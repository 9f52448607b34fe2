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
from dataclasses import asdict, replace
from datetime import datetime

from cloud.errors import AccountError
from cloud.resources import Database, check_name, check_text
from cloud.resources.keys import MAX_KEY, ApiKey, Pepper, can_be_secret, check_key, check_scopes, digest, new_secret
from cloud.resources.principals import Principal, Quotas, Role, User, Workgroup

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


class AccountStore:
    """The workgroups, users and keys of one data folder.

    Safe in threads, in forked children, and beside other processes on the same folder. The folder, `home`, need not
    exist: the first workgroup or user creates it. Every method may raise what `Database` raises. Methods that change
    something block until the change is on disk; from then on it holds in every process.

    Args:
        home: The data folder.
        now: Seconds since the epoch; what keys expire by.
    """

    def __init__(self, home: str, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._pepper = Pepper(home)
        self._database = Database(os.path.abspath(os.path.join(home, "accounts.sqlite3")), _MIGRATIONS)

    def bootstrap(self, workgroup: str = "main", user: str = "admin") -> tuple[Workgroup, User, ApiKey] | None:
        """Create what the first start of a server needs: a workgroup, an administrator and a key, all or nothing.

        The administrator has a password that nobody knows, until another is set. Of several processes that try at
        once, one succeeds.

        Returns:
            What was created, the key with its secret; None, and no change, if there is a user already.
        """
        check_name("the name of a user", user)
        check_name("the name of a workgroup", workgroup)
        if self._has_users():
            return None
        sealed = _sealed(secrets.token_urlsafe(32))
        with self._database.writing() as db:
            if not _insert_first(db, user, sealed, workgroup, self._now()):
                return None
            key = self._insert_key(db, user, "made by the first start", Role.ADMIN.scopes, None)
            return _workgroup(db, workgroup), _user(db, user), key

    # --- workgroups ---------------------------------------------------------------------------------------------------

    def create_workgroup(self, name: str) -> Workgroup:
        """Create an empty workgroup without quotas.

        Args:
            name: 1 to 128 printable characters, no blank at either end; ``ValueError`` otherwise.

        Raises:
            AccountError: The name is taken.
        """
        check_name("the name of a workgroup", name)
        with self._database.writing() as db:
            if not db.execute(_INSERT_WORKGROUP, (name, self._now())).rowcount:
                raise AccountError(f"there is a workgroup {name!r} already")
            return _workgroup(db, name)

    def list_workgroups(self) -> list[Workgroup]:
        """Return all workgroups, oldest first."""
        with self._database.reading() as db:
            return [Workgroup.of_row(*row) for row in db.execute(f"{_WORKGROUPS} ORDER BY id")]

    def set_workgroup_suspended(self, name: str, suspended: bool) -> None:
        """Refuse all users of a workgroup from now on, or accept them again.

        Raises:
            AccountError: There is no such workgroup.
        """
        with self._database.writing() as db:
            found = _workgroup(db, name)
            db.execute("UPDATE workgroup SET suspended = ? WHERE id = ?", (bool(suspended), found.id))

    def change_quotas(self, workgroup: str, changes: Mapping[str, object]) -> Quotas:
        """Replace some quotas of a workgroup, and return all of them.

        Raises:
            AccountError: There is no such workgroup.
            ValueError: There is no such quota, or a value is neither None nor an integer from 0 on.
        """
        with self._database.writing() as db:
            found = _workgroup(db, workgroup)
            quotas = found.quotas.changed(changes)
            db.execute("UPDATE workgroup SET quotas = ? WHERE id = ?", (json.dumps(asdict(quotas)), found.id))
        return quotas

    # --- users --------------------------------------------------------------------------------------------------------

    def create_user(self, name: str, password: str, workgroup: str, role: Role = Role.MEMBER) -> User:
        """Create a user of an existing workgroup. Takes as long as checking a password.

        Args:
            name: As for workgroups, and without a colon, which ends the name where HTTP sends name and password. No
                two users have the same, whatever their workgroups.
            password: 1 to 1024 characters.
            workgroup: Its name.
            role: What the user may do there.

        Raises:
            AccountError: The name is taken, or there is no such workgroup.
        """
        check_name("the name of a user", name)
        if ":" in name:
            raise ValueError(f"the name of a user must have no colon: {name!r}")
        check_text("a password", password, 1, 1024)
        role = Role(role)
        sealed = _sealed(password)  # before the lock is taken: it is slow
        with self._database.writing() as db:
            _insert_user(db, name, sealed, workgroup, role, self._now())
            return _user(db, name)

    def create_first_user(self, name: str, password: str, workgroup: str) -> bool:
        """Create an administrator and the workgroup, unless there is a user already.

        Of several processes that try at once, one succeeds.

        Returns:
            Whether the user was created; False changes nothing.
        """
        check_name("the name of a user", name)
        check_name("the name of a workgroup", workgroup)
        check_text("a password", password, 1, 1024)
        if self._has_users():
            return False
        sealed = _sealed(password)
        with self._database.writing() as db:
            return _insert_first(db, name, sealed, workgroup, self._now())

    def list_users(self, workgroup: str | None = None) -> list[User]:
        """Return the users of a workgroup, or all, active or not, oldest first."""
        with self._database.reading() as db:
            where, values = ("", ()) if workgroup is None else ("WHERE workgroup.name = ?", (workgroup,))
            return [User.of_row(*row) for row in db.execute(f"{_USERS} {where} ORDER BY user.id", values)]

    def set_role(self, user: str, role: Role) -> None:
        """Give a user another role. Keys do no more than it allows, and no more than they were made for.

        Raises:
            AccountError: There is no such user.
        """
        self._change_user(user, "UPDATE user SET role = ? WHERE id = ?", Role(role).value)

    def set_password(self, user: str, password: str) -> None:
        """Replace the password of a user; keys stay as they are. Takes as long as checking a password.

        Raises:
            AccountError: There is no such user.
        """
        check_text("a password", password, 1, 1024)
        self._change_user(user, "UPDATE user SET password = ? WHERE id = ?", _sealed(password))

    def set_user_active(self, user: str, active: bool) -> None:
        """Accept a user's password and keys from now on, or refuse all of them.

        Raises:
            AccountError: There is no such user.
        """
        self._change_user(user, "UPDATE user SET active = ? WHERE id = ?", bool(active))

    def verify_password(self, user: str, password: str) -> Principal | None:
        """Return who the user is if the password is right, else None; also for users who may not sign in.

        Takes the same time, some 0.2 s, for a wrong password and for a user who does not exist.
        """
        check_name("the name of a user", user)
        check_text("a password", password, 1, 1024)
        with self._database.reading() as db:
            row = db.execute(_SIGN_IN_BY_PASSWORD, (user,)).fetchone()
        if row is None:
            _sealed(password)
            return None
        name, role, accepted, workgroup, workgroup_id, quotas, sealed = row
        if not _opens(password, sealed) or not accepted:
            return None
        return Principal(
            user=name,
            workgroup=workgroup,
            workgroup_id=workgroup_id,
            role=Role(role),
            scopes=frozenset(Role(role).scopes),
            quotas=Quotas.of_text(quotas),
        )

    # --- keys ---------------------------------------------------------------------------------------------------------

    def create_key(
        self, user: str, note: str = "", scopes: Iterable[str] | None = None, expires: datetime | None = None
    ) -> ApiKey:
        """Create an active key; the returned record alone has its secret.

        Args:
            user: Whose.
            note: What it is for, at most 1024 characters.
            scopes: What it may do, some of ``SCOPES``; None for all that the user's role allows.
            expires: When it stops being valid, aware; None for never.

        Raises:
            AccountError: There is no such user, its role has not all of the scopes, or it has 50 active keys.
            BackendError: The pepper of earlier keys is missing.
            ValueError: There is no such scope, or `expires` is naive or past.
        """
        check_text("a note", note, 0, 1024)
        wanted = None if scopes is None else check_scopes(scopes)
        if expires is not None and (expires.tzinfo is None or expires.timestamp() <= self._now()):
            raise ValueError(f"a key must expire in the future, at a datetime with a time zone, not {expires}")
        with self._database.writing() as db:
            return self._insert_key(db, user, note, wanted, expires)

    def list_keys(self, user: str) -> list[ApiKey]:
        """Return the user's keys, active or not, oldest first, without their secrets.

        Raises:
            AccountError: There is no such user.
        """
        with self._database.reading() as db:
            owner = _user_id(db, user)
            return [ApiKey.of_row(*row) for row in db.execute(f"{_KEYS} WHERE user = ? ORDER BY number", (owner,))]

    def set_key_active(self, user: str, key: int, active: bool) -> None:
        """Accept a key from now on, or refuse it.

        Raises:
            AccountError: The user has no such key, or has 50 active ones and it would be the next, or it is to be
                active and was revoked.
            TypeError: `key` is not an integer.
        """
        # A revoked key stays as it is; whether that is an error is seen below.
        row = self._change_key(
            user,
            key,
            "UPDATE api_key SET active = ? AND digest IS NOT NULL WHERE number = ? AND user = ?",
            bool(active),
        )
        if active and row.revoked:
            raise AccountError(f"API key {row.api_key} was revoked for good", hint="Create another one.")

    def set_key_note(self, user: str, key: int, note: str) -> None:
        """Replace the note of a key.

        Raises:
            AccountError: The user has no such key.
        """
        check_text("a note", note, 0, 1024)
        self._change_key(user, key, "UPDATE api_key SET note = ? WHERE number = ? AND user = ?", note)

    def revoke_key(self, user: str, key: int) -> None:
        """Refuse a key for good: what its secret could be verified by is deleted. No effect on a revoked one.

        Raises:
            AccountError: The user has no such key.
        """
        self._change_key(user, key, "UPDATE api_key SET active = 0, digest = ? WHERE number = ? AND user = ?", None)

    def owner_of_key(self, key: int) -> str:
        """Return whose key has this number. For the operator: it tells which numbers exist.

        Raises:
            AccountError: No key has it.
        """
        number = check_key(key)
        with self._database.reading() as db:
            row = db.execute(
                "SELECT name FROM user JOIN api_key ON user.id = user WHERE number = ?", (number,)
            ).fetchone()
        if row is None:
            raise AccountError(f"there is no API key {number}")
        return str(row[0])

    def verify_key(self, api_key: int, api_secretkey: str) -> Principal | None:
        """Return whose key this is, or None for whatever is not a key in force with its secret. Takes microseconds.

        In force: active, neither expired nor revoked, of an active user of a workgroup that is not suspended.
        """
        if not isinstance(api_key, int) or not 0 < api_key <= MAX_KEY or not can_be_secret(api_secretkey):
            return None
        with self._database.reading() as db:
            row = db.execute(_SIGN_IN_BY_KEY, (api_key,)).fetchone()
        # Hashed for unknown keys too, so that the time taken does not tell which numbers exist.
        found = digest(self._pepper.read() if row is not None else None, api_key, api_secretkey)
        if row is None:
            return None
        user, role, accepted, workgroup, workgroup_id, quotas, expected, scopes, expires_s, active = row
        if not hmac.compare_digest(found, expected or b"") or not accepted or not active:
            return None
        if expires_s is not None and expires_s <= self._now():
            return None
        return Principal(
            user=user,
            workgroup=workgroup,
            workgroup_id=workgroup_id,
            role=Role(role),
            scopes=frozenset(scopes.split()).intersection(Role(role).scopes),
            quotas=Quotas.of_text(quotas),
            api_key=api_key,
        )

    def note_use(self, api_key: int) -> None:
        """Note that a verified key was used now. Writes at most once a minute for each key."""
        now_s = self._now()
        with self._database.reading() as db:
            row = db.execute("SELECT last_used_s FROM api_key WHERE number = ?", (api_key,)).fetchone()
        # A note of the future is as good as none: the clock was set back.
        if row is None or (row[0] is not None and 0 <= now_s - row[0] < USE_NOTED_EVERY_S):
            return
        with self._database.writing() as db:
            db.execute("UPDATE api_key SET last_used_s = ? WHERE number = ?", (now_s, api_key))

    def close(self) -> None:
        """Close the database connections. Idempotent; a later use connects anew."""
        self._database.close()

    def _has_users(self) -> bool:
        with self._database.reading() as db:
            return _has_users(db)

    def _change_user(self, user: str, statement: str, value: str | bool) -> None:
        with self._database.writing() as db:
            db.execute(statement, (value, _user_id(db, user)))

    def _insert_key(
        self, db: sqlite3.Connection, user: str, note: str, scopes: tuple[str, ...] | None, expires: datetime | None
    ) -> ApiKey:
        secret = new_secret()
        owner, role = _user_id(db, user), _user(db, user).role
        scopes = role.scopes if scopes is None else scopes
        above = [scope for scope in scopes if scope not in role.scopes]
        if above:
            raise AccountError(
                f"a key of user {user!r} cannot have scope {above[0]!r}: role {role} has {', '.join(role.scopes)}"
            )
        # Made anew beside existing keys, a pepper would silently invalidate them all. This transaction keeps other
        # processes from making one at the same time.
        if db.execute("SELECT 1 FROM api_key").fetchone() is None:
            self._pepper.make()
        pepper = self._pepper.read()
        expires_s = None if expires is None else expires.timestamp()
        (number,) = db.execute(
            "INSERT INTO api_key (user, active, note, created_s, scopes, expires_s) VALUES (?, 1, ?, ?, ?, ?)"
            " RETURNING number",
            (owner, note, self._now(), " ".join(scopes), expires_s),
        ).fetchone()
        db.execute("UPDATE api_key SET digest = ? WHERE number = ?", (digest(pepper, number, secret), number))
        self._refuse_above_limit(db, owner, user)
        made = ApiKey.of_row(*db.execute(f"{_KEYS} WHERE number = ?", (number,)).fetchone())
        return replace(made, api_secretkey=secret)

    def _change_key(self, user: str, key: int, statement: str, value: str | bool | None) -> ApiKey:
        number = check_key(key)
        with self._database.writing() as db:
            owner = _user_id(db, user)
            if not db.execute(statement, (value, number, owner)).rowcount:
                raise AccountError(f"user {user!r} has no API key {number}")
            self._refuse_above_limit(db, owner, user)
            return ApiKey.of_row(*db.execute(f"{_KEYS} WHERE number = ?", (number,)).fetchone())

    def _refuse_above_limit(self, db: sqlite3.Connection, owner: int, user: str) -> None:
        (n_active,) = db.execute(
            "SELECT count(*) FROM api_key WHERE user = ? AND active AND ifnull(expires_s > ?, 1)", (owner, self._now())
        ).fetchone()
        if n_active > MAX_ACTIVE_KEYS:
            raise AccountError(
                f"user {user!r} has {MAX_ACTIVE_KEYS} active API keys, and more are not allowed",
                hint="Deactivate one that is no longer used.",
            )


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
    _, n, r, p, salt, expected = sealed.split("$")
    found = _scrypt(password, int(n), int(r), int(p), bytes.fromhex(salt))
    return hmac.compare_digest(found, bytes.fromhex(expected))


def _has_users(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM user").fetchone() is not None


def _insert_first(db: sqlite3.Connection, name: str, sealed: str, workgroup: str, now_s: float) -> bool:
    if _has_users(db):
        return False
    db.execute(_INSERT_WORKGROUP, (workgroup, now_s))
    _insert_user(db, name, sealed, workgroup, Role.ADMIN, now_s)
    return True


def _insert_user(db: sqlite3.Connection, name: str, sealed: str, workgroup: str, role: Role, now_s: float) -> None:
    values = (name, sealed, _workgroup(db, workgroup).id, role.value, now_s)
    if not db.execute(_INSERT_USER, values).rowcount:
        raise AccountError(f"there is a user {name!r} already")


def _workgroup(db: sqlite3.Connection, name: str) -> Workgroup:
    row = db.execute(f"{_WORKGROUPS} WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise AccountError(f"there is no workgroup {name!r}", hint="create_workgroup() makes one.")
    return Workgroup.of_row(*row)


def _user(db: sqlite3.Connection, name: str) -> User:
    return User.of_row(*db.execute(f"{_USERS} WHERE user.name = ?", (name,)).fetchone())


def _user_id(db: sqlite3.Connection, user: str) -> int:
    row = db.execute("SELECT id FROM user WHERE name = ?", (user,)).fetchone()
    if row is None:
        raise AccountError(f"there is no user {user!r}")
    return int(row[0])
