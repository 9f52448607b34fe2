"""Accounts over HTTP: one's own keys, an administrator's own users, and nothing of other workgroups."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cloud.errors import AccountError
from cloud.resources import accounts
from cloud.resources.accounts import AccountStore, Principal
from cloud.server.account import AccountOperations
from cloud.server.audit import AuditLog
from cloud.server.auth import Authenticator, NotAllowed, NotFound, Refusal

ALL = ["submit", "read", "kill", "files", "cron", "admin"]


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_PASSWORD_COST", (2, 1, 1))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AccountStore]:
    store = AccountStore(str(tmp_path / "data"))
    for workgroup in ("lab", "other"):
        store.create_workgroup(workgroup)
        for role in accounts.Role:
            store.create_user(f"{role} of {workgroup}", f"password of {role}", workgroup, role)
    yield store
    store.close()


@pytest.fixture
def do(store: AccountStore) -> Callable[..., dict[str, Any]]:
    """Carry out an operation as app would: content and reply pass through JSON."""
    operations = AccountOperations(store)

    def do(principal: Principal, name: str, **content: Any) -> dict[str, Any]:
        plain: Mapping[str, Any] = json.loads(json.dumps(content))
        reply: dict[str, Any] = getattr(operations, name)(principal, plain)
        assert json.loads(json.dumps(reply)) == reply
        return reply

    return do


def by_password(store: AccountStore, role: str, workgroup: str = "lab") -> Principal:
    found = store.verify_password(f"{role} of {workgroup}", f"password of {role}")
    assert found is not None
    return found


def by_key(store: AccountStore, reply: Mapping[str, Any]) -> Principal | None:
    return store.verify_key(reply["api_key"], reply["api_secretkey"])


class TestOwnKeys:
    def test_from_beginning_to_end(self, store: AccountStore, do: Any) -> None:
        ada = by_password(store, "member")
        assert do(ada, "sign_in") == {
            "user": "member of lab",
            "workgroup": "lab",
            "role": "member",
            "scopes": ALL[:-1],
            "api_key": None,
        }
        assert do(ada, "list_keys") == {"keys": []}
        key = do(ada, "create_key", note="laptop")
        assert by_key(store, key)
        listed = {name: value for name, value in key.items() if name != "api_secretkey"}
        assert do(ada, "list_keys") == {"keys": [listed]}
        assert do(ada, "deactivate_key", api_key=1) == {**listed, "active": False}
        assert by_key(store, key) is None
        assert do(ada, "activate_key", api_key=1) == listed
        assert do(ada, "note_key", api_key=1, note="desk") == {**listed, "note": "desk"}
        assert by_key(store, key)
        assert do(ada, "revoke_key", api_key=1) == {**listed, "note": "desk", "active": False, "revoked": True}
        assert by_key(store, key) is None
        with pytest.raises(AccountError, match="revoked for good") as caught:
            do(ada, "activate_key", api_key=1)
        assert not isinstance(caught.value, Refusal)

    def test_scopes_and_expiry(self, store: AccountStore, do: Any) -> None:
        ada = by_password(store, "member")
        key = do(ada, "create_key", scopes=["read"], expires="2099-01-01T00:00:00+00:00")
        assert (key["scopes"], key["expires"]) == (["read"], "2099-01-01T00:00:00+00:00")
        found = by_key(store, key)
        assert found is not None
        assert found.scopes == {"read"}

    def test_a_password_is_ones_own(self, store: AccountStore, do: Any) -> None:
        do(by_password(store, "member"), "set_password", password="another")
        assert store.verify_password("member of lab", "another")

    @pytest.mark.parametrize("role", ["member", "read_only"])
    def test_no_key_is_made_for_more_than_its_maker_may(self, store: AccountStore, do: Any, role: str) -> None:
        asking = by_password(store, role)
        for scope in ALL:
            if scope not in asking.scopes:
                with pytest.raises(NotAllowed, match=f"needs scope '{scope}'"):
                    do(asking, "create_key", scopes=["read", scope])
        assert do(asking, "list_keys") == {"keys": []}
        made = do(asking, "create_key")
        assert set(made["scopes"]) == asking.scopes

    def test_nor_by_a_key_that_may_do_less_than_its_user(self, store: AccountStore, do: Any) -> None:
        narrow = by_key(store, do(by_password(store, "admin"), "create_key", scopes=["read", "admin"]))
        assert narrow is not None
        assert do(narrow, "create_key")["scopes"] == ["read", "admin"]
        with pytest.raises(NotAllowed, match="needs scope 'submit'; API key 1"):
            do(narrow, "create_key", scopes=["submit"])
        assert do(narrow, "create_key", user="member of lab")["scopes"] == ["read"]
        only_admin = by_key(store, do(by_password(store, "admin"), "create_key", scopes=["admin"]))
        assert only_admin is not None
        with pytest.raises(NotAllowed, match="nothing that both you and user"):
            do(only_admin, "create_key", user="member of lab")

    def test_an_ordinary_key_manages_no_keys(self, store: AccountStore, do: Any) -> None:
        ordinary = by_key(store, do(by_password(store, "member"), "create_key"))
        assert ordinary is not None
        assert do(ordinary, "sign_in")["api_key"] == 1
        for name, content in (
            ("list_keys", {}),
            ("create_key", {}),
            ("deactivate_key", {"api_key": 1}),
            ("note_key", {"api_key": 1, "note": "x"}),
            ("set_password", {"password": "x"}),
        ):
            with pytest.raises(NotAllowed, match="managed with user and password"):
                do(ordinary, name, **content)

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("list_keys", {"user": 5}, "needs scope 'admin'"),
            ("list_keys", {"all": True}, "'all' is unknown here: user may be given"),
            ("sign_in", {"user": "x"}, "'user' is unknown here: nothing may be given"),
            ("create_key", {"scopes": "read"}, "several str"),
            ("create_key", {"scopes": ["root"]}, "no scope 'root'"),
            ("create_key", {"scopes": [[]]}, "no scope"),
            ("create_key", {"scopes": 5}, "several str"),
            ("create_key", {"expires": 5}, "ISO 8601"),
            ("create_key", {"expires": "tomorrow"}, "ISO 8601"),
            ("create_key", {"expires": "2099-01-01T00:00:00"}, "with a time zone"),
            ("create_key", {"expires": "2001-01-01T00:00:00+00:00"}, "in the future"),
            ("create_key", {"note": 5}, "a note must be a str"),
            ("create_key", {"note": "x" * 2000}, "a note must have"),
            ("deactivate_key", {}, "'api_key' is missing"),
            ("deactivate_key", {"api_key": "1"}, "an int, not str"),
            ("deactivate_key", {"api_key": None}, "an int, not NoneType"),
            ("note_key", {"api_key": 1}, "'note' is missing"),
            ("set_password", {"password": 5}, "a password must be a str"),
            ("set_password", {"password": ""}, "a password must have"),
        ],
    )
    def test_bad_content(self, store: AccountStore, do: Any, name: str, content: dict[str, Any], text: str) -> None:
        ada = by_password(store, "member")
        do(ada, "create_key", note="mine")
        with pytest.raises((TypeError, ValueError, NotAllowed), match=text):
            do(ada, name, **content)
        assert [(key["note"], key["active"]) for key in do(ada, "list_keys")["keys"]] == [("mine", True)]
        assert store.verify_password("member of lab", "password of member")


class TestAdministrators:
    def test_users_of_the_workgroup(self, store: AccountStore, do: Any) -> None:
        admin = by_password(store, "admin")
        names = [user["user"] for user in do(admin, "list_users")["users"]]
        assert names == ["admin of lab", "member of lab", "read_only of lab"]
        bob = do(admin, "create_user", user="bob", password="p", role="read_only")
        assert (bob["user"], bob["workgroup"], bob["role"], bob["active"]) == ("bob@lab", "lab", "read_only", True)
        found = store.verify_password("bob@lab", "p")
        assert found is not None
        assert found.workgroup == "lab"
        assert do(admin, "set_user_role", user="bob@lab", role="member")["role"] == "member"
        assert do(admin, "set_password", user="bob@lab", password="q")["user"] == "bob@lab"
        key = do(admin, "create_key", user="bob@lab", note="robot")
        assert (key["scopes"], by_key(store, key) is not None) == (ALL[:-1], True)
        assert do(admin, "list_keys", user="bob@lab")["keys"][0]["note"] == "robot"
        assert do(admin, "set_user_active", user="bob@lab", active=False)["active"] is False
        assert store.verify_password("bob@lab", "q") is None
        assert by_key(store, key) is None
        do(admin, "set_user_active", user="bob@lab", active=True)
        assert do(admin, "deactivate_key", user="bob@lab", api_key=key["api_key"])["active"] is False

    @pytest.mark.parametrize("role", ["member", "read_only"])
    def test_others_are_no_administrators(self, store: AccountStore, do: Any, role: str) -> None:
        asking = by_password(store, role)
        key = do(by_password(store, "admin"), "create_key")
        for name, content in (
            ("list_users", {}),
            ("create_user", {"user": "x", "password": "p"}),
            ("set_user_role", {"user": f"{role} of lab", "role": "admin"}),
            ("set_user_active", {"user": "admin of lab", "active": False}),
            ("set_password", {"user": "admin of lab", "password": "x"}),
            ("list_keys", {"user": "admin of lab"}),
            ("create_key", {"user": "admin of lab"}),
            ("revoke_key", {"user": "admin of lab", "api_key": key["api_key"]}),
        ):
            with pytest.raises(NotAllowed, match="needs scope 'admin'"):
                do(asking, name, **content)
        assert len(store.list_users("lab")) == 3
        assert by_key(store, key)
        assert store.verify_password("admin of lab", "password of admin")

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("create_user", {"user": "x"}, "'password' is missing"),
            ("create_user", {"user": 5, "password": "p"}, "must be text"),
            ("create_user", {"user": "x", "password": None}, "must be text"),
            ("create_user", {"user": "x@other", "password": "p"}, "no '@'"),
            ("create_user", {"user": " x", "password": "p"}, "no blank"),
            ("create_user", {"user": "x ", "password": "p"}, "no blank"),
            ("create_user", {"user": "x:y", "password": "p"}, "no colon"),
            ("create_user", {"user": "x" * 125, "password": "p"}, "1 to 128"),
            ("create_user", {"user": "x", "password": "p", "role": "king"}, "no role 'king'"),
            ("create_user", {"user": "x", "password": "p", "role": ["admin"]}, "no role"),
            ("create_user", {"user": "x", "password": "p", "workgroup": "other"}, "'workgroup' is unknown"),
            ("set_user_active", {"user": "member of lab", "active": "no"}, "true or false"),
        ],
    )
    def test_bad_content(self, store: AccountStore, do: Any, name: str, content: dict[str, Any], text: str) -> None:
        with pytest.raises((TypeError, ValueError), match=text):
            do(by_password(store, "admin"), name, **content)
        assert len(store.list_users()) == 6


class TestOtherWorkgroups:
    KEY_OPERATIONS = (
        ("activate_key", {}),
        ("deactivate_key", {}),
        ("revoke_key", {}),
        ("note_key", {"note": "theirs"}),
    )

    @pytest.mark.parametrize("role", ["admin", "member"])
    def test_their_keys_look_like_numbers_never_used(self, store: AccountStore, do: Any, role: str) -> None:
        asking = by_password(store, role)
        own = do(asking, "create_key")["api_key"]
        theirs = do(by_password(store, "member", "other"), "create_key", note="secret plan")
        never = 9
        assert theirs["api_key"] == own + 1
        for name, content in self.KEY_OPERATIONS:
            answers = []
            for number in (theirs["api_key"], never, 0, -1, 2**80):
                with pytest.raises(NotFound) as caught:
                    do(asking, name, api_key=number, **content)
                assert caught.value.http_status == 404
                answers.append(
                    f"{caught.value!r} {caught.value} {caught.value.__cause__}".replace(str(number), "NUMBER")
                )
            assert len(set(answers)) == 1
        assert by_key(store, theirs)
        assert store.list_keys("member of other")[0].note == "secret plan"

    def test_their_users_look_like_nobody(self, store: AccountStore, do: Any) -> None:
        admin = by_password(store, "admin")
        theirs = do(by_password(store, "member", "other"), "create_key")
        for name, content in (
            ("list_keys", {}),
            ("create_key", {}),
            *((name, {"api_key": theirs["api_key"], **content}) for name, content in self.KEY_OPERATIONS),
            ("set_user_role", {"role": "admin"}),
            ("set_user_active", {"active": False}),
            ("set_password", {"password": "x"}),
        ):
            answers = []
            for user in ("member of other", "nobody at all", "nobody@other", "", 5):
                with pytest.raises(NotFound) as caught:
                    do(admin, name, user=user, **content)
                answers.append(f"{caught.value!r} {caught.value} {caught.value.__cause__}".replace(repr(user), "USER"))
            assert len(set(answers)) == 1, name
        assert by_key(store, theirs)
        assert len(store.list_keys("member of other")) == 1
        assert store.verify_password("member of other", "password of member")

    def test_a_new_name_tells_nothing_of_theirs(self, store: AccountStore, do: Any) -> None:
        here, there = by_password(store, "admin"), by_password(store, "admin", "other")
        for admin in (here, there):
            do(admin, "create_user", user="bob", password="p")
        # Also of users that only the operator can have made.
        assert do(here, "create_user", user="member of other", password="p")["user"] == "member of other@lab"
        with pytest.raises(AccountError, match="there is a user 'bob@lab' already"):
            do(here, "create_user", user="bob", password="p")

    def test_workgroups_with_odd_names_give_no_name_twice(self, store: AccountStore, do: Any) -> None:
        store.create_workgroup("b@lab")
        store.create_user("admin of b@lab", "password of admin", "b@lab", accounts.Role.ADMIN)
        odd = by_password(store, "admin", "b@lab")
        assert do(odd, "create_user", user="a", password="p")["user"] == "a@b@lab"
        with pytest.raises(ValueError, match="no '@'"):
            do(by_password(store, "admin"), "create_user", user="a@b", password="p")


def test_no_secret_is_left_anywhere(
    store: AccountStore, do: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    door = Authenticator(store)
    log = AuditLog(str(tmp_path / "data" / "audit.log"))
    ada = by_password(store, "admin")
    made = [do(ada, "create_key", note="n") for _ in range(3)]
    do(ada, "create_user", user="bob", password="sesame street")
    do(ada, "set_password", password="open sesame")
    for key in made:
        header = f"Bearer {key['api_key']}:{key['api_secretkey']}"
        door.check(header, "::1")
        # As careless as possible: the header itself, and the whole reply.
        log.record(ada.user, key["api_key"], header, "create_key", key, note=header)
        with pytest.raises(Refusal):
            door.check(header[:-1], "::1")
        do(ada, "revoke_key", api_key=key["api_key"])
    log.close()
    store.close()
    contents = [path.read_bytes() for path in (tmp_path / "data").iterdir()]
    contents.append(caplog.text.encode())
    assert len(contents) == 4
    parts = ["sesame", *(part for key in made for part in (key["api_secretkey"][4:24], key["api_secretkey"][-30:]))]
    for part in parts:
        assert [content for content in contents if part.encode() in content] == []
