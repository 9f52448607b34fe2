"""Accounts: users, passwords and keys, against bad input, thieves, typos and each other."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import stat
import sys
import threading
import timeit
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cloud
from cloud.errors import AccountError, BackendError
from cloud.resources import accounts, keys
from cloud.resources.accounts import AccountSession, AccountStore, Principal, Role

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

CHEAP = (16, 8, 1)
REAL = accounts._PASSWORD_COST


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_PASSWORD_COST", CHEAP)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(folder: Path) -> Iterator[AccountStore]:
    store = AccountStore(str(folder))
    yield store
    store.close()


@pytest.fixture
def ada(store: AccountStore) -> str:
    store.create_workgroup("lab")
    store.create_user("ada", "engine", "lab")
    return "ada"


def in_child(function: Callable[[], object]) -> Callable[[], int]:
    """Run in a forked child; the returned function waits and gives its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def principal(user: str, role: Role, api_key: int | None = None) -> Principal:
    """Who a user of the first workgroup, lab, is without quotas."""
    return Principal(
        user=user, workgroup="lab", workgroup_id=1, role=role, scopes=frozenset(role.scopes), api_key=api_key
    )


def secret_of(key: accounts.ApiKey) -> str:
    assert key.api_secretkey is not None
    return key.api_secretkey


class TestUsers:
    def test_a_password_tells_who_it_is(self, store: AccountStore) -> None:
        store.create_workgroup("lab")
        for role in Role:
            store.create_user(f"u {role}", "päss", "lab", role)
            assert store.verify_password(f"u {role}", "päss") == principal(f"u {role}", role)
        assert store.verify_password("u admin", "pass") is None
        assert store.verify_password("u admin", "päss ") is None
        assert store.verify_password("nobody", "päss") is None

    def test_composed_and_decomposed_characters_are_one_password(self, store: AccountStore, ada: str) -> None:
        store.create_user("bob", "caf\u00e9", "lab")
        assert store.verify_password("bob", "cafe\u0301")

    def test_members_are_the_default(self, store: AccountStore, ada: str) -> None:
        principal = store.verify_password(ada, "engine")
        assert principal is not None
        assert principal.role is Role.MEMBER

    def test_names_are_taken_once(self, store: AccountStore, ada: str) -> None:
        with pytest.raises(AccountError, match="there is a workgroup 'lab' already"):
            store.create_workgroup("lab")
        store.create_workgroup("other")
        with pytest.raises(AccountError, match="there is a user 'ada' already"):
            store.create_user("ada", "another", "other")
        assert store.verify_password("ada", "engine")

    def test_a_user_needs_a_workgroup(self, store: AccountStore) -> None:
        with pytest.raises(AccountError, match="there is no workgroup 'lab'"):
            store.create_user("ada", "engine", "lab")
        assert store.verify_password("ada", "engine") is None

    @pytest.mark.parametrize("name", ["", " ada", "ada\t", "a\nb", "a\0b", "x" * 129, "\udc80", "a\u202eb"])
    def test_odd_names_are_refused(self, store: AccountStore, folder: Path, name: str) -> None:
        for ask in (
            store.create_workgroup,
            lambda name: store.create_user(name, "p", "lab"),
            lambda name: store.create_first_user(name, "p", "lab"),
            lambda name: store.create_first_user("ada", "p", name),
            lambda name: store.verify_password(name, "p"),
        ):
            with pytest.raises(ValueError, match=r"the name of a (user|workgroup) must"):
                ask(name)
        assert not folder.exists()

    @pytest.mark.parametrize("bad", [None, 5, b"ada"])
    def test_names_and_passwords_are_text(self, store: AccountStore, bad: Any) -> None:
        for ask in (
            lambda: store.create_workgroup(bad),
            lambda: store.create_user(bad, "p", "lab"),
            lambda: store.create_user("ada", bad, "lab"),
            lambda: store.verify_password("ada", bad),
        ):
            with pytest.raises(TypeError, match=f"must be a str, not {type(bad).__name__}"):
                ask()

    @pytest.mark.parametrize("password", ["", "x" * 1025, "secret\udcff"])
    def test_impossible_passwords_are_refused_and_not_shown(self, store: AccountStore, password: str) -> None:
        with pytest.raises(ValueError, match="a password must") as caught:
            store.create_user("ada", password, "lab")
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None

    def test_an_unknown_role_is_refused(self, store: AccountStore, ada: str) -> None:
        with pytest.raises(ValueError, match="king"):
            store.create_user("bob", "p", "lab", "king")  # type: ignore[arg-type]

    def test_names_may_be_hostile_text(self, store: AccountStore) -> None:
        name = "'); DROP TABLE user; --"
        store.create_workgroup(name)
        store.create_user(name, name, name)
        assert store.verify_password(name, name)

    def test_each_password_keeps_its_cost(self, store: AccountStore, ada: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(accounts, "_PASSWORD_COST", (32, 8, 2))
        store.create_user("bob", "p", "lab")
        monkeypatch.setattr(accounts, "_PASSWORD_COST", CHEAP)
        assert store.verify_password("bob", "p")
        assert store.verify_password(ada, "engine")

    def test_unknown_users_cost_as_much_as_wrong_passwords(
        self, store: AccountStore, ada: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        costs: list[tuple[int, int, int]] = []
        scrypt = hashlib.scrypt

        def counted(*args: Any, n: int, r: int, p: int, **kwargs: Any) -> bytes:
            costs.append((n, r, p))
            return scrypt(*args, n=n, r=r, p=p, **kwargs)

        monkeypatch.setattr(hashlib, "scrypt", counted)
        store.verify_password(ada, "wrong")
        store.verify_password("nobody", "wrong")
        assert costs == [CHEAP, CHEAP]

    def test_the_first_user_is_created_once(self, store: AccountStore) -> None:
        assert store.create_first_user("ada", "engine", "lab") is True
        assert store.create_first_user("ada", "engine", "lab") is False
        assert store.create_first_user("bob", "p", "other") is False
        assert store.verify_password("ada", "engine") == principal("ada", Role.ADMIN)
        assert store.verify_password("bob", "p") is None
        store.create_workgroup("other")  # and not left behind by bob

    def test_the_first_user_may_join_a_workgroup_that_exists(self, store: AccountStore) -> None:
        store.create_workgroup("lab")
        assert store.create_first_user("ada", "engine", "lab") is True

    def test_one_of_many_processes_creates_the_first_user(self, folder: Path) -> None:
        def create(number: int) -> None:
            created = AccountStore(str(folder)).create_first_user(f"user {number}", "p", "lab")
            (folder / f"{number} {created}").touch()

        waits = [in_child(lambda number=number: create(number)) for number in range(6)]
        assert [wait() for wait in waits] == [0] * 6
        (winner,) = folder.glob("* True")
        store = AccountStore(str(folder))
        found = [number for number in range(6) if store.verify_password(f"user {number}", "p")]
        store.close()
        assert found == [int(winner.name.split()[0])]


class TestKeys:
    def test_a_key_tells_who_it_is(self, store: AccountStore, ada: str) -> None:
        key = store.create_key(ada, "laptop")
        assert (key.api_key, key.active, key.note) == (1, True, "laptop")
        assert timedelta() <= datetime.now(UTC) - key.created < timedelta(minutes=1)
        expected = principal("ada", Role.MEMBER, api_key=1)
        assert store.verify_key(key.api_key, secret_of(key)) == expected
        reopened = AccountStore(os.path.dirname(store._database._path))
        assert reopened.verify_key(key.api_key, secret_of(key)) == expected
        reopened.close()

    def test_the_secret_is_shown_once(self, store: AccountStore, ada: str) -> None:
        key = store.create_key(ada)
        assert secret_of(key).startswith("cld_")
        assert secret_of(key) not in repr(key)
        (listed,) = store.list_keys(ada)
        assert listed.api_secretkey is None
        assert (listed.api_key, listed.active, listed.note, listed.created) == (1, True, "", key.created)

    def test_no_secret_is_on_disk(self, store: AccountStore, ada: str, folder: Path) -> None:
        secret = secret_of(store.create_key(ada))
        store.close()
        for path in folder.iterdir():
            data = path.read_bytes()
            assert secret.encode() not in data
            assert secret[4:20].encode() not in data
            assert b"engine" not in data
            assert hashlib.sha256(secret.encode()).digest() not in data

    def test_only_the_owner_can_read_what_is_on_disk(self, store: AccountStore, ada: str, folder: Path) -> None:
        folder.chmod(0o755)
        store.create_key(ada)
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
            "accounts.sqlite3": 0o600,
            "pepper": 0o600,
        }

    def test_a_secret_is_good_for_its_own_number_only(self, store: AccountStore, ada: str) -> None:
        one, two = store.create_key(ada), store.create_key(ada)
        assert secret_of(one) != secret_of(two)
        assert store.verify_key(two.api_key, secret_of(one)) is None
        assert store.verify_key(3, secret_of(one)) is None

    def test_who_writes_to_the_database_cannot_move_a_key(self, store: AccountStore, ada: str) -> None:
        store.create_user("root", "p", "lab", Role.ADMIN)
        hers, his = store.create_key(ada), store.create_key("root")
        with store._database.writing() as db:
            db.execute("UPDATE api_key SET digest = (SELECT digest FROM api_key WHERE number = ?)", (hers.api_key,))
        assert store.verify_key(hers.api_key, secret_of(hers))
        assert store.verify_key(his.api_key, secret_of(hers)) is None

    @FEW
    @given(st.data())
    def test_typos_are_refused_without_the_database(self, store: AccountStore, ada: str, data: st.DataObject) -> None:
        secret = keys.new_secret()
        assert keys.can_be_secret(secret)
        position = data.draw(st.integers(0, len(secret) - 1))
        wrong = data.draw(st.characters().filter(lambda c: c != secret[position]))
        typos = [
            secret[:position] + wrong + secret[position + 1 :],
            secret[:position] + secret[position + 1 :],
            secret[:position] + wrong + secret[position:],
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(store, "_database")
            for typo in typos:
                assert store.verify_key(1, typo) is None

    @pytest.mark.parametrize("key", [0, -1, 2**63, 2**80, "1", None, 1.0, b"1"])
    def test_what_is_no_number_is_no_key(self, store: AccountStore, ada: str, key: Any) -> None:
        assert store.verify_key(key, secret_of(store.create_key(ada))) is None

    @pytest.mark.parametrize("secret", [None, 5, b"cld_", "", "cld_", "x" * 10_000_000, "cld_" + "é" * 51])
    def test_what_is_no_secret_is_no_key(self, store: AccountStore, ada: str, secret: Any) -> None:
        store.create_key(ada)
        assert store.verify_key(1, secret) is None

    def test_a_key_can_be_turned_off_and_on_in_all_processes(self, store: AccountStore, ada: str, folder: Path) -> None:
        key = store.create_key(ada)
        other = AccountStore(str(folder))
        assert other.verify_key(1, secret_of(key))
        store.set_key_active(ada, 1, False)
        assert other.verify_key(1, secret_of(key)) is None
        assert [listed.active for listed in other.list_keys(ada)] == [False]
        other.set_key_active(ada, 1, True)
        other.set_key_active(ada, 1, True)
        assert store.verify_key(1, secret_of(key))
        other.close()

    def test_notes(self, store: AccountStore, ada: str) -> None:
        store.create_key(ada, "a")
        store.set_key_note(ada, 1, "ünïcode \0 and more")
        assert [key.note for key in store.list_keys(ada)] == ["ünïcode \0 and more"]
        with pytest.raises(TypeError, match="a note must be a str, not int"):
            store.set_key_note(ada, 1, 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a note must have 0 to 1024 characters"):
            store.create_key(ada, "x" * 1025)
        assert len(store.list_keys(ada)) == 1

    def test_keys_of_others_are_unknown(self, store: AccountStore, ada: str) -> None:
        store.create_user("eve", "p", "lab")
        key = store.create_key(ada, "mine")
        for number in (key.api_key, 99, 0, -5, 2**70):
            with pytest.raises(AccountError) as one:
                store.set_key_active("eve", number, False)
            with pytest.raises(AccountError) as two:
                store.set_key_note("eve", number, "hers")
            assert str(one.value) == str(two.value)
            assert str(number) in str(one.value)
        assert store.list_keys("eve") == []
        assert [(listed.active, listed.note) for listed in store.list_keys(ada)] == [(True, "mine")]

    def test_users_must_exist(self, store: AccountStore, ada: str) -> None:
        for ask in (store.create_key, store.list_keys, lambda user: store.set_key_active(user, 1, True)):
            with pytest.raises(AccountError, match="there is no user 'nobody'"):
                ask("nobody")

    @pytest.mark.parametrize("key", ["1", 1.0, None, b"1", True])
    def test_numbers_must_be_integers(self, store: AccountStore, ada: str, key: Any) -> None:
        store.create_key(ada)
        for ask in (lambda: store.set_key_active(ada, key, False), lambda: store.set_key_note(ada, key, "x")):
            with pytest.raises(TypeError, match=f"an int, not {type(key).__name__}"):
                ask()
        assert store.list_keys(ada)[0].active

    def test_fifty_keys_may_be_active(self, store: AccountStore, ada: str) -> None:
        made = [store.create_key(ada) for _ in range(50)]
        with pytest.raises(AccountError, match=r"50 active API keys.*\n.*Deactivate"):
            store.create_key(ada)
        assert len(store.list_keys(ada)) == 50
        store.set_key_active(ada, made[0].api_key, True)  # is one of the fifty
        store.set_key_active(ada, made[0].api_key, False)
        assert store.create_key(ada).api_key > made[-1].api_key
        with pytest.raises(AccountError, match="50 active"):
            store.set_key_active(ada, made[0].api_key, True)
        assert not store.list_keys(ada)[0].active
        store.set_key_note(ada, made[0].api_key, "retired")
        store.create_user("bob", "p", "lab")
        assert store.create_key("bob").active

    def test_the_limit_holds_when_processes_and_threads_race(self, store: AccountStore, ada: str, folder: Path) -> None:
        for _ in range(44):
            store.create_key(ada)

        def race() -> None:
            own = AccountStore(str(folder))
            refused = []

            def create() -> None:
                for _ in range(3):
                    try:
                        own.create_key(ada)
                    except AccountError:
                        refused.append(1)

            threads = [threading.Thread(target=create) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        waits = [in_child(race) for _ in range(3)]
        assert [wait() for wait in waits] == [0] * 3
        assert [key.active for key in store.list_keys(ada)] == [True] * 50

    def test_a_lost_pepper_is_told_and_not_replaced(self, store: AccountStore, ada: str, folder: Path) -> None:
        key = store.create_key(ada)
        pepper = (folder / "pepper").read_bytes()
        for damage in ((folder / "pepper").unlink, lambda: (folder / "pepper").write_bytes(b"short")):
            damage()
            with pytest.raises(BackendError, match=r"pepper is missing or damaged.*\n.*backup"):
                store.verify_key(1, secret_of(key))
            with pytest.raises(BackendError, match="pepper is missing or damaged"):
                store.create_key(ada)
        (folder / "pepper").write_bytes(pepper)
        assert store.verify_key(1, secret_of(key))
        (folder / "pepper").write_bytes(pepper[::-1])
        assert store.verify_key(1, secret_of(key)) is None

    def test_a_key_is_checked_without_hashing_it_slowly(self, store: AccountStore, ada: str) -> None:
        key = store.create_key(ada)
        secret = secret_of(key)
        best = min(timeit.repeat(lambda: store.verify_key(1, secret), number=50, repeat=20)) / 50
        # A password takes 0.2 s; this is some 20 us.
        assert best < 0.002

    def test_reads_create_nothing(self, store: AccountStore, folder: Path) -> None:
        assert store.verify_password("ada", "p") is None
        assert store.verify_key(1, keys.new_secret()) is None
        with pytest.raises(AccountError, match="no user"):
            store.list_keys("ada")
        store.close()
        store.close()
        assert not folder.exists()

    def test_a_damaged_or_newer_file_is_told(self, store: AccountStore, ada: str, folder: Path) -> None:
        with store._database.writing() as db:
            db.execute("PRAGMA user_version = 99")
        with pytest.raises(BackendError, match="schema version 99"):
            store.list_keys(ada)
        store.close()
        (folder / "accounts.sqlite3").write_bytes(b"not a database at all, sorry" * 50)
        with pytest.raises(BackendError, match="damaged"):
            store.list_keys(ada)


class TestSession:
    def test_nothing_works_before_setuser(self, store: AccountStore, folder: Path) -> None:
        session = AccountSession(store)
        for ask in (
            session.api_keys,
            session.create_api_key,
            lambda: session.activate_api_key(1),
            lambda: session.deactivate_api_key(1),
            lambda: session.update_api_key_note(1, "x"),
        ):
            with pytest.raises(AccountError, match=r"^cloud\.account credentials not set"):
                ask()
        assert not folder.exists()

    def test_the_first_setuser_decides(self, store: AccountStore, folder: Path) -> None:
        AccountSession(store).setuser("ada", "engine")
        session = AccountSession(AccountStore(str(folder)))
        for name, password in [("ada", "wrong"), ("bob", "engine"), ("Ada", "engine")]:
            with pytest.raises(AccountError, match="refused") as caught:
                session.setuser(name, password)
            assert password not in str(caught.value).replace("setuser", "")
            assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
        with pytest.raises(AccountError, match="not set"):
            session.api_keys()
        session.setuser("ada", "engine")
        assert session.api_keys() == []
        with pytest.raises(AccountError, match="refused"):
            session.setuser("ada", "wrong")
        assert session.api_keys() == []
        session.close()
        session.close()
        with pytest.raises(AccountError, match="not set"):
            session.api_keys()

    def test_processes_that_set_the_same_user_first_all_succeed(self, folder: Path) -> None:
        waits = [in_child(lambda: AccountSession(AccountStore(str(folder))).setuser("ada", "p")) for _ in range(5)]
        assert [wait() for wait in waits] == [0] * 5


class TestFace:
    @pytest.fixture
    def face(self, store: AccountStore, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
        session = AccountSession(store)
        current = types.ModuleType("cloud.current")
        current.resources = lambda: types.SimpleNamespace(accounts=session)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cloud.current", current)
        monkeypatch.setattr(cloud, "current", current, raising=False)
        # Under another name, so that the real module stays untouched by this one.
        spec = importlib.util.spec_from_file_location("account_face", Path(cloud.__path__[0]) / "account.py")
        assert spec is not None
        assert spec.loader is not None
        face = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(face)
        return face

    def test_a_key_from_beginning_to_end(self, face: Any, store: AccountStore) -> None:
        with pytest.raises(AccountError, match=r"cloud\.account credentials not set"):
            face.api_keys()
        assert face.setuser("ada", "engine") is None
        assert face.api_keys() == []
        key = face.create_api_key()
        assert {name: value for name, value in key.items() if name not in {"api_key", "api_secretkey", "created"}} == {
            "active": True,
            "note": "",
            "scopes": ("submit", "read", "kill", "files", "cron", "admin"),
            "expires": None,
            "last_used": None,
            "revoked": False,
        }
        assert type(key["api_key"]) is int
        assert key["created"].tzinfo is UTC
        assert store.verify_key(key["api_key"], key["api_secretkey"]) is not None
        assert face.api_keys() == [{**key, "api_secretkey": None}]
        assert face.deactivate_api_key(key["api_key"]) is None
        assert face.api_keys()[0]["active"] is False
        assert store.verify_key(key["api_key"], key["api_secretkey"]) is None
        assert face.activate_api_key(key["api_key"]) is None
        assert face.update_api_key_note(key["api_key"], "laptop") is None
        assert face.api_keys() == [{**key, "api_secretkey": None, "note": "laptop"}]
        with pytest.raises(AccountError, match="no API key 7"):
            face.deactivate_api_key(7)
        with pytest.raises(TypeError, match="not str"):
            face.activate_api_key("1")

    def test_every_exported_name_exists_and_is_documented(self, face: Any) -> None:
        assert face.__all__ == sorted(face.__all__)
        assert all(getattr(face, name).__doc__ for name in face.__all__)


@pytest.mark.parametrize("name", ["ada", "bob"])
def test_the_real_cost_of_a_password_is_paid(store: AccountStore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(accounts, "_PASSWORD_COST", REAL)
    n, r, p = accounts._PASSWORD_COST
    # OWASP's least: 16 MiB, five times over.
    assert 128 * n * r >= 16 << 20
    assert p >= 5
    store.create_first_user("ada", "engine", "lab")
    assert (store.verify_password(name, "engine") is not None) == (name == "ada")
