"""``cloud account``: the user of this machine, and the API keys."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from cloud import account
from cloud.cli.arguments import Commands
from cloud.cli.output import OK, Output, UsageError, table
from cloud.configuration import home_folder
from cloud.errors import AccountError

__all__ = ["add_to"]

_USER: Final = "CLOUD_ACCOUNT_USER"
_PASSWORD: Final = "CLOUD_ACCOUNT_PASSWORD"  # noqa: S105 - the name of a variable


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    epilog = f"User name and password are asked for, or taken from the variables {_USER} and {_PASSWORD}."
    parser = commands.add("account", None, "look after your user and API keys", epilog=epilog)
    group = parser.add_commands("ACTION")
    _add(group, "setuser", _setuser, "create the user of this machine, or see that name and password are right")
    _add(group, "list", _list, "list the API keys")
    _add(group, "create", _create, "create an API key; its secret is shown now and never again").add_argument(
        "--note", metavar="TEXT", help="what the key is for"
    )
    for name, run, summary in (
        ("activate", _activate, "make an API key valid again"),
        ("deactivate", _deactivate, "make an API key invalid"),
        ("note", _note, "replace the note of an API key"),
    ):
        parser = _add(group, name, run, summary)
        parser.add_argument("key", metavar="KEY", type=int, help="its number")
    parser.add_argument("note", metavar="TEXT", help="what the key is for")


def _add(group: Commands, name: str, run: Callable[[argparse.Namespace, Output], int], summary: str) -> Any:
    parser = group.add(name, run, summary)
    parser.add_argument("--user", metavar="NAME", help=f"your user name; default: {_USER}, or it is asked for")
    return parser


def _setuser(options: argparse.Namespace, output: Output) -> int:
    user, password = _credentials(options)
    if _PASSWORD not in os.environ and not _is_known(user, password):
        # This may create the user: a password mistyped once would lock them out.
        again = _ask_password("Password again: ")
        if again != password:
            raise AccountError("the two passwords differ; nothing was changed")
    account.setuser(user, password)
    output.show({"user": user}, "")
    return OK


def _list(options: argparse.Namespace, output: Output) -> int:
    _sign_in(options)
    keys = [_without_secret(key) for key in account.api_keys()]
    rows = [("key", "active", "created", "note")]
    rows += [(str(key["api_key"]), _yes(key["active"]), _moment(key["created"]), str(key["note"])) for key in keys]
    output.show(keys, table(rows) if keys else "")
    return OK


def _create(options: argparse.Namespace, output: Output) -> int:
    _sign_in(options)
    key = account.create_api_key()
    if options.note is not None:
        number = key["api_key"]
        assert isinstance(number, int)
        account.update_api_key_note(number, options.note)
        key["note"] = options.note
    output.show(key, f"api_key = {key['api_key']}\napi_secretkey = {key['api_secretkey']}")
    return OK


def _activate(options: argparse.Namespace, output: Output) -> int:
    _sign_in(options)
    account.activate_api_key(options.key)
    output.show({"api_key": options.key, "active": True}, "")
    return OK


def _deactivate(options: argparse.Namespace, output: Output) -> int:
    _sign_in(options)
    account.deactivate_api_key(options.key)
    output.show({"api_key": options.key, "active": False}, "")
    return OK


def _note(options: argparse.Namespace, output: Output) -> int:
    _sign_in(options)
    account.update_api_key_note(options.key, options.note)
    output.show({"api_key": options.key, "note": options.note}, "")
    return OK


def _sign_in(options: argparse.Namespace) -> None:
    user, password = _credentials(options)
    # setuser alone would create a user: of a mistyped name, in a fresh folder.
    if not _is_known(user, password):
        raise AccountError(
            f"user name or password refused for {user!r}", hint="cloud account setuser creates the user of this machine"
        )
    account.setuser(user, password)


def _is_known(user: str, password: str) -> bool:
    from cloud.resources.accounts import AccountStore

    store = AccountStore(home_folder())
    try:
        return store.verify_password(user, password) is not None
    finally:
        store.close()


def _credentials(options: argparse.Namespace) -> tuple[str, str]:
    user = options.user or os.environ.get(_USER)
    if not user:
        _require_terminal(_USER)
        sys.stderr.write("User name: ")
        sys.stderr.flush()
        user = sys.stdin.readline().strip()
    password = os.environ.get(_PASSWORD)
    return user, _ask_password("Password: ") if password is None else password


def _ask_password(prompt: str) -> str:
    import getpass

    _require_terminal(_PASSWORD)
    return getpass.getpass(prompt)


def _require_terminal(variable: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"there is no terminal to ask on: set {variable}")


def _without_secret(key: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in key.items() if name != "api_secretkey"}


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _moment(value: Any) -> str:
    return f"{value:%Y-%m-%d %H:%M} UTC"
