"""Who there is: workgroups, users, their roles and quotas, and the principal that credentials prove.

Only records; `cloud.resources.accounts` keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache

from cloud.resources.keys import SCOPES

__all__ = ["Principal", "Quotas", "Role", "User", "Workgroup"]


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

    @staticmethod
    def of_text(text: str) -> Quotas:
        """The quotas from the JSON that the database has of them."""
        return _quotas(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workgroup:
    """One workgroup: users who share jobs, files and crons, apart from all others."""

    id: int  #: Never changes, and never names another one.
    name: str
    suspended: bool  #: None of its users can sign in, and no job begins, of a cron neither; those that run go on.
    quotas: Quotas
    created: datetime

    @classmethod
    def of_row(cls, number: int, name: str, suspended: int, quotas: str, created_s: float) -> Workgroup:
        """The record from what the database has of it."""
        created = datetime.fromtimestamp(created_s, UTC)
        return cls(id=number, name=name, suspended=bool(suspended), quotas=_quotas(quotas), created=created)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """One user."""

    name: str
    workgroup: str
    workgroup_id: int
    role: Role
    active: bool  #: Otherwise neither the password nor any key of the user is accepted.
    created: datetime

    @classmethod
    def of_row(cls, name: str, workgroup: str, workgroup_id: int, role: str, active: int, created_s: float) -> User:
        """The record from what the database has of it."""
        return cls(
            name=name,
            workgroup=workgroup,
            workgroup_id=workgroup_id,
            role=Role(role),
            active=bool(active),
            created=datetime.fromtimestamp(created_s, UTC),
        )


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


# Asked for with every sign-in; workgroups are few, and most have the same.
@lru_cache(maxsize=256)
def _quotas(text: str) -> Quotas:
    return Quotas(**json.loads(text))
