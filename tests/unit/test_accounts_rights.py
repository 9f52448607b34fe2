"""Who may do what: roles, scopes, expiry, revocation, suspension, quotas; and files of earlier versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cloud.errors import AccountError
from cloud.resources import Database, accounts, keys
from cloud.resources.accounts import AccountStore, ApiKey, Principal, Quotas, Role


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self) -> None:
        self.now_s = 1_900_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def moment(self, later_s: float) -> datetime:
        return datetime.fromtimestamp(self.now_s + later_s, UTC)


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_PASSWORD_COST", (2, 1, 1))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[AccountStore]:
    store = AccountStore(str(tmp_path / "data"), clock)
    store.create_workgroup("lab")
    store.create_workgroup("other")
    for role in Role:
        store.create_user(role.value, "engine", "lab", role)
    store.create_user("eve", "engine", "other", Role.ADMIN)
    yield store
    store.close()


def signed_in(store: AccountStore, key: ApiKey) -> Principal | None:
    assert key.api_secretkey is not None
    return store.verify_key(key.api_key, key.api_secretkey)


def scopes(store: AccountStore, key: ApiKey) -> set[str]:
    principal = signed_in(store, key)
    return set() if principal is None else set(principal.scopes)


class TestScopes:
    ALL = {"submit", "read", "kill", "files", "cron", "admin"}

    @pytest.mark.parametrize(("role", "can"), [("admin", ALL), ("member", ALL - {"admin"}), ("read_only", {"read"})])
    def test_a_role_decides_what_a_key_may_do(self, store: AccountStore, role: str, can: set[str]) -> None:
        key = store.create_key(role)
        assert set(key.scopes) == scopes(store, key) == can
        by_password = store.verify_password(role, "engine")
        assert by_password is not None
        assert by_password.scopes == can

    def test_a_key_may_do_less_than_its_user(self, store: AccountStore) -> None:
        key = store.create_key("member", scopes=["kill", "read", "kill"])
        assert key.scopes == ("read", "kill")
        assert scopes(store, key) == {"read", "kill"}
        assert store.list_keys("member")[0].scopes == ("read", "kill")

    def test_and_never_more(self, store: AccountStore) -> None:
        with pytest.raises(
            AccountError, match=r"user 'member' cannot have scope 'admin': role member has submit, read"
        ):
            store.create_key("member", scopes=["read", "admin"])
        assert store.list_keys("member") == []

    def test_a_new_role_counts_for_keys_that_exist(self, store: AccountStore) -> None:
        key = store.create_key("admin")
        store.set_role("admin", Role.READ_ONLY)
        found = signed_in(store, key)
        assert found is not None
        assert (found.role, found.scopes) == (Role.READ_ONLY, {"read"})
        store.set_role("admin", Role.ADMIN)
        assert scopes(store, key) == self.ALL

    def test_a_higher_role_gives_no_key_more_than_it_was_made_for(self, store: AccountStore) -> None:
        key = store.create_key("member")
        store.set_role("member", Role.ADMIN)
        assert "admin" not in scopes(store, key)

    @pytest.mark.parametrize(
        ("bad", "error", "text"),
        [
            (["root"], ValueError, "there is no scope 'root': the scopes are submit, read"),
            ([5], ValueError, "there is no scope 5"),
            ([], ValueError, "at least one scope"),
            ("read", TypeError, "several str"),
            (5, TypeError, "several str"),
        ],
    )
    def test_bad_scopes(self, store: AccountStore, bad: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            store.create_key("admin", scopes=bad)
        assert store.list_keys("admin") == []


class TestExpiry:
    def test_a_key_stops_when_it_expires(self, store: AccountStore, clock: Clock) -> None:
        key = store.create_key("member", expires=clock.moment(100))
        assert key.expires == clock.moment(100)
        clock.now_s += 99.9
        assert signed_in(store, key)
        clock.now_s += 0.1
        assert signed_in(store, key) is None
        store.set_key_active("member", key.api_key, True)
        assert signed_in(store, key) is None

    def test_a_moment_needs_a_time_zone_and_a_future(self, store: AccountStore, clock: Clock) -> None:
        for bad in (clock.moment(0), clock.moment(-5), clock.moment(100).replace(tzinfo=None)):
            with pytest.raises(ValueError, match="a key must expire in the future"):
                store.create_key("member", expires=bad)

    def test_expired_keys_leave_room_for_others(self, store: AccountStore, clock: Clock) -> None:
        for _ in range(50):
            store.create_key("member", expires=clock.moment(10))
        with pytest.raises(AccountError, match="50 active"):
            store.create_key("member")
        clock.now_s += 10
        assert store.create_key("member").active


class TestRevocation:
    def test_a_revoked_key_never_works_again(self, store: AccountStore, tmp_path: Path) -> None:
        key, neighbour = store.create_key("member"), store.create_key("member")
        other = AccountStore(str(tmp_path / "data"))
        assert signed_in(other, key)
        store.revoke_key("member", key.api_key)
        assert signed_in(other, key) is None
        assert signed_in(other, neighbour)
        with pytest.raises(AccountError, match="API key 1 was revoked for good"):
            other.set_key_active("member", key.api_key, True)
        assert not store.list_keys("member")[0].active
        assert signed_in(other, key) is None
        store.set_key_active("member", key.api_key, False)
        store.revoke_key("member", key.api_key)
        listed = store.list_keys("member")
        assert [(each.active, each.revoked) for each in listed] == [(False, True), (True, False)]
        with other._database.reading() as db:
            assert db.execute("SELECT digest FROM api_key WHERE number = 1").fetchone() == (None,)
        other.close()

    def test_only_keys_of_ones_own(self, store: AccountStore) -> None:
        key = store.create_key("member")
        for number in (key.api_key, 99):
            with pytest.raises(AccountError, match=f"user 'eve' has no API key {number}"):
                store.revoke_key("eve", number)
        assert signed_in(store, key)

    def test_the_operator_finds_the_owner(self, store: AccountStore) -> None:
        assert store.owner_of_key(store.create_key("member").api_key) == "member"
        with pytest.raises(AccountError, match="there is no API key 2"):
            store.owner_of_key(2)


class TestUse:
    def test_it_is_noted_once_a_minute(self, store: AccountStore, clock: Clock) -> None:
        key = store.create_key("member")
        assert key.last_used is None
        used = []
        for later_s in (0, 59, 1, 30, 30, -100):
            clock.now_s += later_s
            store.note_use(key.api_key)
            used.append(store.list_keys("member")[0].last_used)
        start = 1_900_000_000
        times = [start, start, start + 60, start + 60, start + 120, start + 20]
        assert used == [datetime.fromtimestamp(each, UTC) for each in times]

    def test_most_notes_write_nothing(self, store: AccountStore, monkeypatch: pytest.MonkeyPatch) -> None:
        key = store.create_key("member")
        store.note_use(key.api_key)
        monkeypatch.delattr(Database, "writing")
        store.note_use(key.api_key)
        store.note_use(99)


class TestUsers:
    def test_a_deactivated_user_is_refused_with_all_keys(self, store: AccountStore) -> None:
        made = [store.create_key("member") for _ in range(3)]
        store.set_user_active("member", False)
        assert [signed_in(store, key) for key in made] == [None] * 3
        assert store.verify_password("member", "engine") is None
        assert store.verify_password("admin", "engine")
        assert [user.active for user in store.list_users("lab")] == [True, False, True]
        store.set_user_active("member", True)
        assert all(signed_in(store, key) for key in made)

    def test_a_new_password(self, store: AccountStore) -> None:
        key = store.create_key("member")
        store.set_password("member", "another")
        assert store.verify_password("member", "engine") is None
        assert store.verify_password("member", "another")
        assert signed_in(store, key)
        with pytest.raises(ValueError, match="a password must"):
            store.set_password("member", "")

    def test_lists(self, store: AccountStore) -> None:
        assert [user.name for user in store.list_users()] == ["admin", "member", "read_only", "eve"]
        (eve,) = store.list_users("other")
        assert (eve.name, eve.workgroup, eve.workgroup_id, eve.role, eve.active) == ("eve", "other", 2, "admin", True)
        assert store.list_users("nowhere") == []

    def test_who_does_not_exist_cannot_be_changed(self, store: AccountStore) -> None:
        for change in (
            lambda: store.set_role("nobody", Role.ADMIN),
            lambda: store.set_password("nobody", "p"),
            lambda: store.set_user_active("nobody", False),
        ):
            with pytest.raises(AccountError, match="there is no user 'nobody'"):
                change()

    def test_a_colon_would_end_the_name_in_http(self, store: AccountStore) -> None:
        with pytest.raises(ValueError, match="no colon: 'a:b'"):
            store.create_user("a:b", "p", "lab")


class TestWorkgroups:
    def test_ids_are_stable_and_in_principals(self, store: AccountStore) -> None:
        assert [(each.id, each.name) for each in store.list_workgroups()] == [(1, "lab"), (2, "other")]
        assert store.create_workgroup("third").id == 3
        found = signed_in(store, store.create_key("eve"))
        assert found is not None
        assert (found.workgroup_id, found.workgroup, found.user, found.api_key) == (2, "other", "eve", 1)

    def test_a_suspended_workgroup_is_refused_whole_and_alone(self, store: AccountStore) -> None:
        key, hers = store.create_key("member"), store.create_key("eve")
        store.set_workgroup_suspended("lab", True)
        assert signed_in(store, key) is None
        assert store.verify_password("admin", "engine") is None
        assert signed_in(store, hers)
        assert [each.suspended for each in store.list_workgroups()] == [True, False]
        store.set_workgroup_suspended("lab", False)
        assert signed_in(store, key)
        with pytest.raises(AccountError, match="there is no workgroup 'nowhere'"):
            store.set_workgroup_suspended("nowhere", True)

    def test_quotas(self, store: AccountStore) -> None:
        key = store.create_key("member")
        assert store.change_quotas("lab", {"max_slots": 4, "max_file_bytes": 2**62}).max_slots == 4
        assert store.change_quotas("lab", {"max_slots": 0}) == Quotas(max_slots=0, max_file_bytes=2**62)
        found = signed_in(store, key)
        assert found is not None
        assert found.quotas == Quotas(max_slots=0, max_file_bytes=2**62)
        assert [each.quotas for each in store.list_workgroups()] == [found.quotas, Quotas()]
        assert store.change_quotas("lab", {"max_slots": None, "max_file_bytes": None}) == Quotas()

    @pytest.mark.parametrize("bad", [-1, 1.5, "4", True, float("nan")])
    def test_bad_quotas(self, store: AccountStore, bad: Any) -> None:
        with pytest.raises(ValueError, match="quota max_slots must be an integer from 0 on, or None"):
            store.change_quotas("lab", {"max_queued_jobs": 5, "max_slots": bad})
        with pytest.raises(ValueError, match="there is no quota 'slots': the quotas are max_slots"):
            store.change_quotas("lab", {"slots": 5})
        assert store.list_workgroups()[0].quotas == Quotas()


class TestBootstrap:
    def test_it_makes_all_that_is_needed_once(self, tmp_path: Path) -> None:
        store = AccountStore(str(tmp_path / "new"))
        made = store.bootstrap()
        assert made is not None
        workgroup, user, key = made
        assert (workgroup.id, workgroup.name, user.name, user.role) == (1, "main", "admin", Role.ADMIN)
        found = signed_in(store, key)
        assert found is not None
        assert (found.user, found.workgroup_id, found.scopes) == ("admin", 1, set(keys.SCOPES))
        assert store.bootstrap() is None
        assert store.bootstrap("another", "root") is None
        assert [len(store.list_users()), len(store.list_workgroups()), len(store.list_keys("admin"))] == [1, 1, 1]
        store.close()

    def test_nobody_knows_the_first_password(self, tmp_path: Path) -> None:
        store = AccountStore(str(tmp_path / "new"))
        assert store.bootstrap()
        assert store.verify_password("admin", "admin") is None
        store.set_password("admin", "known")
        assert store.verify_password("admin", "known")
        store.close()

    def test_not_beside_users(self, store: AccountStore) -> None:
        assert store.bootstrap() is None
        assert [each.name for each in store.list_workgroups()] == ["lab", "other"]

    def test_it_is_all_or_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = AccountStore(str(tmp_path / "new"))
        with monkeypatch.context() as patch:
            patch.setattr(keys, "write_private", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                store.bootstrap()
        assert store.list_users() == []
        assert store.list_workgroups() == []
        assert store.bootstrap() is not None
        store.close()

    def test_one_of_many_processes_does_it(self, tmp_path: Path) -> None:
        pids = []
        for number in range(6):
            pid = os.fork()
            if pid == 0:
                made = AccountStore(str(tmp_path / "new")).bootstrap()
                (tmp_path / f"{number}.{made is not None}").touch()
                os._exit(0)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
        assert len(list(tmp_path.glob("*.True"))) == 1


class TestMigration:
    @pytest.mark.parametrize("role", list(Role))
    def test_a_file_of_the_first_version_goes_on(self, tmp_path: Path, clock: Clock, role: Role) -> None:
        old = Database(str(tmp_path / "accounts.sqlite3"), accounts._MIGRATIONS[:1])
        secret = keys.new_secret()
        pepper = keys.Pepper(str(tmp_path))
        with old.writing() as db:
            pepper.make()
            db.execute("INSERT INTO workgroup VALUES (7, 'local', 1.0)")
            db.execute("INSERT INTO user VALUES (3, 'ada', ?, 7, ?, 2.0)", (accounts._sealed("engine"), role.value))
            sealed = keys.digest(pepper.read(), 5, secret)
            db.execute("INSERT INTO api_key VALUES (5, 3, ?, 1, 'laptop', 3.0)", (sealed,))
        old.close()
        store = AccountStore(str(tmp_path), clock)
        found = store.verify_key(5, secret)
        assert found == Principal(
            user="ada",
            workgroup="local",
            workgroup_id=7,
            role=role,
            scopes=frozenset(role.scopes),
            api_key=5,
        )
        assert store.verify_password("ada", "engine")
        (key,) = store.list_keys("ada")
        assert (key.scopes, key.note, key.active, key.revoked) == (role.scopes, "laptop", True, False)
        assert store.create_key("ada").api_key == 6
        store.close()
