"""``cloud admin``: what the operator of a server does, on its data folder itself, also while the server runs.

Whoever can write that folder may do all of this: no key is asked for. Each change is in the audit log.
"""

from __future__ import annotations

import argparse
import getpass
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cloud.cli.arguments import Commands, Parser
from cloud.cli.output import FAILED, OK, Output, UsageError, table
from cloud.cli.serve import data_folder
from cloud.errors import AccountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloud.resources.accounts import AccountStore, ApiKey, Role

__all__ = ["add_to"]

# As text, for help: the accounts themselves are loaded by commands that need them.
_ROLES: Final = "admin, member, read_only"
_SCOPES: Final = "submit, read, kill, files, cron, admin"
_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([hdw])")
_HOURS: Final = {"h": 1, "d": 24, "w": 168}

Run = Callable[[argparse.Namespace, Output], int]


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = commands.add("admin", None, "look after a server: workgroups, users, keys, audit log, backup")
    _add_data(parser)
    group = parser.add_commands("WHAT")
    _add_workgroups(group.add("workgroup", None, "look after workgroups").add_commands("ACTION"))
    _add_users(group.add("user", None, "look after users").add_commands("ACTION"))
    _add_keys(group.add("key", None, "look after API keys").add_commands("ACTION"))
    audit = group.add("audit", None, "read the audit log").add_commands("ACTION")
    shown = _add(audit, "show", _show_audit, "print the last lines of the audit log")
    shown.add_argument("--last", type=int, metavar="N", default=50, help="how many lines; default: 50")
    _add(audit, "verify", _verify_audit, "see that no line of the audit log was changed, removed or inserted")
    backup = _add(group, "backup", _back_up, "copy the data folder, secrets and all, while the server runs")
    backup.add_argument("destination", metavar="DEST", help="a folder that does not exist yet")


def _add_workgroups(group: Commands) -> None:
    _add(group, "list", _list_workgroups, "list the workgroups")
    _add(group, "add", _add_workgroup, "create a workgroup").add_argument("name", metavar="NAME")
    parser = _add(group, "suspend", _suspend, "refuse all users of a workgroup")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--undo", action="store_true", help="accept them again")
    parser = _add(group, "quota", _quota, "show or change what a workgroup may use")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "changes", metavar="QUOTA=VALUE", nargs="*", help="such as max_slots=4; the value none is without limit"
    )


def _add_users(group: Commands) -> None:
    parser = _add(group, "list", _list_users, "list the users")
    parser.add_argument("--workgroup", metavar="NAME", help="only those of this one")
    parser = _add(group, "add", _add_user, "create a user; the password is asked for, or read from standard input")
    parser.add_argument("name", metavar="USER")
    parser.add_argument("--workgroup", metavar="NAME", required=True, help="the user's workgroup")
    parser.add_argument("--role", metavar="ROLE", default="member", help=f"one of {_ROLES}; default: member")
    parser = _add(group, "role", _set_role, "give a user another role")
    parser.add_argument("name", metavar="USER")
    parser.add_argument("role", metavar="ROLE", help=f"one of {_ROLES}")
    parser = _add(group, "password", _set_password, "replace a password, asked for or read from standard input")
    parser.add_argument("name", metavar="USER")
    parser = _add(group, "deactivate", _deactivate, "refuse a user's password and keys")
    parser.add_argument("name", metavar="USER")
    parser.add_argument("--undo", action="store_true", help="accept them again")


def _add_keys(group: Commands) -> None:
    parser = _add(group, "list", _list_keys, "list API keys")
    parser.add_argument("user", metavar="USER", nargs="?", help="only those of this user")
    parser = _add(group, "create", _create_key, "create an API key; its secret is shown now and never again")
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--note", metavar="TEXT", default="", help="what the key is for")
    parser.add_argument(
        "--scopes", metavar="SCOPES", help=f"such as read,kill, of {_SCOPES}; default: all that the role has"
    )
    parser.add_argument("--expires", metavar="WHEN", help="such as 12h, 30d, 8w or 2030-12-31; default: never")
    parser = _add(group, "revoke", _revoke, "refuse an API key for good")
    parser.add_argument("key", metavar="KEY", type=int, help="its number")


def _add(group: Commands, name: str, run: Run, summary: str) -> Parser:
    parser = group.add(name, run, summary)
    _add_data(parser)
    return parser


def _add_data(parser: Parser) -> None:
    # Before or after the command, as --json.
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="the server's data folder; default: that of cloud serve",
    )


def _list_workgroups(options: argparse.Namespace, output: Output) -> int:
    with _accounts(options) as store:
        found = store.list_workgroups()
    rows: list[tuple[object, ...]] = [("id", "workgroup", "suspended", "quotas")]
    rows += [(each.id, each.name, _yes(each.suspended), _limits(asdict(each.quotas))) for each in found]
    output.show([asdict(each) for each in found], table(rows) if found else "")
    return OK


def _add_workgroup(options: argparse.Namespace, output: Output) -> int:
    with _changing(options, "workgroup.add", options.name) as store:
        found = store.create_workgroup(options.name)
    output.show(asdict(found), "")
    return OK


def _suspend(options: argparse.Namespace, output: Output) -> int:
    suspended = not options.undo
    with _changing(options, "workgroup.suspend", options.name, suspended=suspended) as store:
        store.set_workgroup_suspended(options.name, suspended)
    output.show({"workgroup": options.name, "suspended": suspended}, "")
    return OK


def _quota(options: argparse.Namespace, output: Output) -> int:
    changes = dict(map(_quota_change, options.changes))
    if changes:
        with _changing(options, "workgroup.quota", options.name, **changes) as store:
            quotas = store.change_quotas(options.name, changes)
    else:
        with _accounts(options) as store:
            found = [each for each in store.list_workgroups() if each.name == options.name]
        if not found:
            raise AccountError(f"there is no workgroup {options.name!r}")
        quotas = found[0].quotas
    lines = [f"{name}={'none' if value is None else value}" for name, value in asdict(quotas).items()]
    output.show({"workgroup": options.name, "quotas": asdict(quotas)}, "\n".join(lines))
    return OK


def _list_users(options: argparse.Namespace, output: Output) -> int:
    with _accounts(options) as store:
        found = store.list_users(options.workgroup)
    rows: list[tuple[object, ...]] = [("user", "workgroup", "role", "active", "created")]
    rows += [(each.name, each.workgroup, each.role, _yes(each.active), _moment(each.created)) for each in found]
    document = [{**asdict(each), "role": each.role.value} for each in found]
    output.show(document, table(rows) if found else "")
    return OK


def _add_user(options: argparse.Namespace, output: Output) -> int:
    _folder(options)
    role = _role(options.role)
    password = _new_password()
    with _changing(options, "user.add", options.name, workgroup=options.workgroup, role=role.value) as store:
        store.create_user(options.name, password, options.workgroup, role)
    output.show({"user": options.name, "workgroup": options.workgroup, "role": role.value}, "")
    return OK


def _set_role(options: argparse.Namespace, output: Output) -> int:
    role = _role(options.role)
    with _changing(options, "user.role", options.name, role=role.value) as store:
        store.set_role(options.name, role)
    output.show({"user": options.name, "role": role.value}, "")
    return OK


def _set_password(options: argparse.Namespace, output: Output) -> int:
    _folder(options)
    password = _new_password()
    with _changing(options, "user.password", options.name) as store:
        store.set_password(options.name, password)
    output.show({"user": options.name}, "")
    return OK


def _deactivate(options: argparse.Namespace, output: Output) -> int:
    active = bool(options.undo)
    with _changing(options, "user.deactivate", options.name, active=active) as store:
        store.set_user_active(options.name, active)
    output.show({"user": options.name, "active": active}, "")
    return OK


def _list_keys(options: argparse.Namespace, output: Output) -> int:
    with _accounts(options) as store:
        names = [user.name for user in store.list_users()] if options.user is None else [options.user]
        found = [(name, key) for name in names for key in store.list_keys(name)]
    rows: list[tuple[object, ...]] = [("key", "user", "state", "scopes", "expires", "last used", "note")]
    rows += [
        (
            key.api_key,
            name,
            _state(key),
            ",".join(key.scopes),
            _moment(key.expires),
            _moment(key.last_used),
            _printable(key.note),
        )
        for name, key in found
    ]
    output.show([{"user": name, **_shown(key)} for name, key in found], table(rows) if found else "")
    return OK


def _create_key(options: argparse.Namespace, output: Output) -> int:
    scopes = None if options.scopes is None else [scope.strip() for scope in options.scopes.split(",")]
    expires = None if options.expires is None else _expiry(options.expires)
    with _changing(options, "key.create", options.user, scopes=scopes, expires=options.expires) as store:
        key = store.create_key(options.user, options.note, scopes, expires)
    document = {"user": options.user, **_shown(key), "api_secretkey": key.api_secretkey}
    output.show(document, f"api_key = {key.api_key}\napi_secretkey = {key.api_secretkey}")
    return OK


def _revoke(options: argparse.Namespace, output: Output) -> int:
    with _changing(options, "key.revoke", options.key) as store:
        user = store.owner_of_key(options.key)
        store.revoke_key(user, options.key)
    output.show({"api_key": options.key, "user": user, "revoked": True}, "")
    return OK


def _show_audit(options: argparse.Namespace, output: Output) -> int:
    from cloud.server.audit import records

    if options.last < 1:
        raise UsageError(f"--last must be 1 or more, not {options.last}")
    found = list(deque(records(_audit_path(options)), maxlen=options.last))
    output.show(found, "\n".join(map(_audit_line, found)))
    return OK


def _verify_audit(options: argparse.Namespace, output: Output) -> int:
    from cloud.server.audit import verify

    verdict = verify(_audit_path(options))
    if verdict.bad_line is not None:
        text = f"line {verdict.bad_line} is bad: {verdict.problem}"
    else:
        text = f"{verdict.n_lines} lines are sound; head {verdict.head}"
    output.show(asdict(verdict), text)
    return OK if verdict.bad_line is None else FAILED


def _back_up(options: argparse.Namespace, output: Output) -> int:
    from cloud.resources.backup import back_up

    folder = _folder(options)
    n_files, n_bytes = back_up(folder, options.destination)
    _record(folder, "backup", os.path.abspath(options.destination))
    output.show(
        {"destination": os.path.abspath(options.destination), "files": n_files, "size_bytes": n_bytes},
        f"{n_files} files, {n_bytes} bytes",
    )
    return OK


def _folder(options: argparse.Namespace) -> str:
    folder = data_folder(getattr(options, "data", None))
    # A mistyped folder must not become a new, empty one.
    if not os.path.exists(os.path.join(folder, "accounts.sqlite3")):
        raise UsageError(
            f"{folder} is not the data folder of a server: 'cloud serve --data {folder}' would make it one"
        )
    return folder


@contextmanager
def _accounts(options: argparse.Namespace) -> Iterator[AccountStore]:
    from cloud.resources.accounts import AccountStore

    with closing(AccountStore(_folder(options))) as store:
        yield store


@contextmanager
def _changing(options: argparse.Namespace, action: str, target: object, **details: object) -> Iterator[AccountStore]:
    with _accounts(options) as store:
        yield store
    _record(_folder(options), action, target, **details)


def _record(folder: str, action: str, target: object, **details: object) -> None:
    from cloud.server.audit import AuditLog

    with closing(AuditLog(os.path.join(folder, "audit.log"))) as log:
        log.record(f"operator {_operator()}", None, None, f"admin.{action}", target, **details)


def _operator() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _audit_path(options: argparse.Namespace) -> str:
    path = os.path.join(_folder(options), "audit.log")
    if not os.path.exists(path):
        raise UsageError(f"there is no audit log yet: {path}")
    return path


def _new_password() -> str:
    if sys.stdin is None:
        raise UsageError("there is no standard input to read the password from")
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("New password: ")
    if getpass.getpass("New password again: ") != password:
        raise AccountError("the two passwords differ; nothing was changed")
    return password


def _role(text: str) -> Role:
    from cloud.resources.accounts import Role

    if text not in tuple(Role):
        raise UsageError(f"there is no role {text!r}: the roles are {_ROLES}")
    return Role(text)


def _quota_change(text: str) -> tuple[str, int | None]:
    name, equals, value = text.partition("=")
    if not equals or not (value == "none" or re.fullmatch("[0-9]{1,18}", value)):
        raise UsageError(f"{text!r} is no quota: write QUOTA=NUMBER or QUOTA=none, such as max_slots=4")
    return name, None if value == "none" else int(value)


def _expiry(text: str) -> datetime:
    match = _DURATION.fullmatch(text)
    if match:
        return datetime.now(UTC) + timedelta(hours=int(match[1]) * _HOURS[match[2]])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no time: write such as 12h, 30d, 8w, or 2030-12-31 for that day's start"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _shown(key: ApiKey) -> dict[str, object]:
    return {name: value for name, value in asdict(key).items() if name != "api_secretkey"}


def _state(key: ApiKey) -> str:
    if key.revoked:
        return "revoked"
    if not key.active:
        return "inactive"
    return "expired" if key.expires is not None and key.expires <= datetime.now(UTC) else "active"


def _audit_line(facts: dict[str, Any]) -> str:
    if "action" not in facts:
        return f"(line {facts.get('unreadable_line', '?')} cannot be read)"
    who = facts.get("who") or "-"
    if facts.get("key") is not None:
        who = f"{who} key {facts['key']}"
    details = facts.get("details") or {}
    rest = [str(facts.get("target")), *(f"{name}={value}" for name, value in details.items())]
    return _printable(f"{facts.get('at')}  {facts.get('address') or '-'}  {who}  {facts['action']}  {' '.join(rest)}")


def _limits(quotas: dict[str, int | None]) -> str:
    return " ".join(f"{name}={value}" for name, value in quotas.items() if value is not None) or "none"


def _printable(text: str) -> str:
    """Text of users, which must not speak to the operator's terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _moment(value: datetime | None) -> str | None:
    return None if value is None else f"{value:%Y-%m-%d %H:%M} UTC"
