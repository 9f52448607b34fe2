"""What users do with accounts over HTTP: their own keys, and, for administrators, the users of their workgroup.

Each operation takes who asks and the content of the request, and returns the content of the reply; both are what JSON
can hold, times in ISO 8601. They block for the database, and those that set a password some 0.2 s more: for a thread.

A key that leaks must not be able to make itself successors. Keys and users are therefore managed by who signed in
with user and password, or with a key that has scope ``admin``.

Other workgroups do not exist here: their users and keys are answered for as those that never were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from cloud.errors import AccountError
from cloud.resources.accounts import AccountStore, ApiKey, Principal, Role, User
from cloud.resources.keys import SCOPES, check_key, check_scopes
from cloud.server.auth import NotAllowed, NotFound, require

__all__ = ["AccountOperations"]

Content = Mapping[str, object]
Reply = dict[str, Any]


class AccountOperations:
    """The operations on accounts.

    All of them raise `NotAllowed` for whoever may not do this, `NotFound` for a user or key that is not there for
    who asks, another `AccountError` for a limit or a name that is taken, and ``TypeError`` or ``ValueError`` for
    content that makes no sense; nothing is changed then. Where ``user`` may be named, it is who asks unless an
    administrator names another user of the workgroup.

    Args:
        store: The accounts.
    """

    def __init__(self, store: AccountStore) -> None:
        self._store = store

    def sign_in(self, principal: Principal, content: Content) -> Reply:
        """Tell who asks: ``user``, ``workgroup``, ``role``, ``scopes`` and ``api_key`` (None for a password)."""
        _check_names(content)
        return {
            "user": principal.user,
            "workgroup": principal.workgroup,
            "role": principal.role.value,
            "scopes": [scope for scope in SCOPES if scope in principal.scopes],
            "api_key": principal.api_key,
        }

    def list_keys(self, principal: Principal, content: Content) -> Reply:
        """Give the ``keys`` of a user (``user``), oldest first, without their secrets."""
        _check_names(content, optional=("user",))
        owner = self._owner(principal, content)
        return {"keys": [_plain_key(key) for key in self._store.list_keys(owner.name)]}

    def create_key(self, principal: Principal, content: Content) -> Reply:
        """Create a key and give it with its secret (``note``, ``scopes``, ``expires``, ``user``).

        It may do no more than who asks: without ``scopes`` all that both that and the user's role allow.
        """
        _check_names(content, optional=("note", "scopes", "expires", "user"))
        owner = self._owner(principal, content)
        if content.get("scopes") is None:
            scopes = [scope for scope in owner.role.scopes if scope in principal.scopes]
            if not scopes:
                raise NotAllowed(f"there is nothing that both you and user {owner.name!r} may do")
        else:
            wanted: Any = content["scopes"]
            scopes = list(check_scopes(wanted))
            for scope in scopes:
                require(principal, scope)
        note: Any = content.get("note", "")
        key = self._store.create_key(owner.name, note, scopes, _moment(content.get("expires")))
        return {**_plain_key(key), "api_secretkey": key.api_secretkey}

    def activate_key(self, principal: Principal, content: Content) -> Reply:
        """Accept a key (``api_key``, ``user``) again; give it."""
        return self._change_key(principal, content, lambda user, key: self._store.set_key_active(user, key, True))

    def deactivate_key(self, principal: Principal, content: Content) -> Reply:
        """Refuse a key (``api_key``, ``user``) from now on; give it."""
        return self._change_key(principal, content, lambda user, key: self._store.set_key_active(user, key, False))

    def revoke_key(self, principal: Principal, content: Content) -> Reply:
        """Refuse a key (``api_key``, ``user``) for good; give it."""
        return self._change_key(principal, content, self._store.revoke_key)

    def note_key(self, principal: Principal, content: Content) -> Reply:
        """Replace the note of a key (``api_key``, ``note``, ``user``); give it."""
        note: Any = content.get("note")
        return self._change_key(
            principal, content, lambda user, key: self._store.set_key_note(user, key, note), needs=("note",)
        )

    def list_users(self, principal: Principal, content: Content) -> Reply:
        """Give the ``users`` of the workgroup, oldest first. For administrators."""
        _check_names(content)
        require(principal, "admin")
        return {"users": [_plain_user(user) for user in self._store.list_users(principal.workgroup)]}

    def create_user(self, principal: Principal, content: Content) -> Reply:
        """Create a user of the workgroup (``user``, ``password``, ``role``) and give it. For administrators.

        Names are unique on the whole server, so that one that is taken would tell of another workgroup's user. The
        user is therefore called as asked for, followed by ``@`` and the workgroup: names that no other workgroup gives.
        """
        _check_names(content, ("user", "password"), ("role",))
        require(principal, "admin")
        name, password = content["user"], content["password"]
        if not isinstance(name, str) or not isinstance(password, str):
            raise TypeError("user and password must be text")
        if "@" in name:
            raise ValueError(f"the name of a user must have no '@', which is followed by the workgroup: {name!r}")
        if name != name.strip():
            raise ValueError(f"the name of a user must have no blank at either end: {name!r}")
        role = _role(content.get("role", Role.MEMBER.value))
        return _plain_user(
            self._store.create_user(f"{name}@{principal.workgroup}", password, principal.workgroup, role)
        )

    def set_user_role(self, principal: Principal, content: Content) -> Reply:
        """Give a user of the workgroup (``user``) another ``role``; give the user. For administrators."""
        _check_names(content, ("user", "role"))
        require(principal, "admin")
        role = _role(content["role"])
        return self._change_user(principal, content, lambda user: self._store.set_role(user, role))

    def set_user_active(self, principal: Principal, content: Content) -> Reply:
        """Accept or refuse (``active``) a user of the workgroup (``user``); give the user. For administrators."""
        _check_names(content, ("user", "active"))
        require(principal, "admin")
        active = content["active"]
        if not isinstance(active, bool):
            raise TypeError(f"active must be true or false, not {active!r}")
        return self._change_user(principal, content, lambda user: self._store.set_user_active(user, active))

    def set_password(self, principal: Principal, content: Content) -> Reply:
        """Replace a user's ``password`` (``user``); give the user."""
        _check_names(content, ("password",), ("user",))
        password: Any = content["password"]
        return self._change_user(principal, content, lambda user: self._store.set_password(user, password))

    def _change_key(
        self,
        principal: Principal,
        content: Content,
        change: Callable[[str, int], None],
        needs: tuple[str, ...] = (),
    ) -> Reply:
        _check_names(content, ("api_key", *needs), ("user",))
        user = self._owner(principal, content).name
        number = content["api_key"]
        self._key(user, number)
        change(user, check_key(number))
        return _plain_key(self._key(user, number))

    def _change_user(self, principal: Principal, content: Content, change: Callable[[str], None]) -> Reply:
        change(self._owner(principal, content).name)
        return _plain_user(self._owner(principal, content))

    def _key(self, user: str, number: object) -> ApiKey:
        # Before anything is changed, so that what is not there is told apart from what must not be done.
        try:
            wanted = check_key(number)
        except AccountError:
            wanted = 0
        for key in self._store.list_keys(user):
            if key.api_key == wanted:
                return key
        raise NotFound(f"user {user!r} has no API key {number}")

    def _owner(self, principal: Principal, content: Content) -> User:
        if principal.api_key is not None and "admin" not in principal.scopes:
            raise NotAllowed(
                "keys and users are managed with user and password, or with a key that has scope 'admin'",
                hint="Call cloud.account.setuser(username, password).",
            )
        name = content.get("user")
        if name is None:
            name = principal.user
        if name != principal.user:
            # Also for names that do not exist: who may not ask learns nothing.
            require(principal, "admin")
        for user in self._store.list_users(principal.workgroup):
            if user.name == name:
                return user
        raise NotFound(f"workgroup {principal.workgroup!r} has no user {name!r}")


def _check_names(content: Content, needed: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> None:
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing")
    unknown = [name for name in content if name not in needed and name not in optional]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is unknown here: {', '.join((*needed, *optional)) or 'nothing'} may be given")


def _role(value: object) -> Role:
    if not isinstance(value, str) or value not in tuple(Role):
        raise ValueError(f"there is no role {value!r}: the roles are {', '.join(Role)}")
    return Role(value)


def _moment(value: object) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"expires must be a time in ISO 8601, as text, not {value!r}")
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(
            f"expires must be a time in ISO 8601, such as 2030-12-31T00:00:00+00:00, not {value!r}"
        ) from None


def _plain_key(key: ApiKey) -> Reply:
    found = asdict(key)
    del found["api_secretkey"]
    return {name: _plain(value) for name, value in found.items()}


def _plain_user(user: User) -> Reply:
    return {
        "user": user.name,
        "workgroup": user.workgroup,
        "role": user.role.value,
        "active": user.active,
        "created": user.created.isoformat(),
    }


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    return list(value) if isinstance(value, tuple) else value
