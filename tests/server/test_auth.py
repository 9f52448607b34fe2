"""Signing in: hostile headers, failed attempts, rates, the second between two looks at the accounts; on a clock."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.errors import AccountError, BackendError
from cloud.resources import Database, accounts, keys
from cloud.resources.accounts import AccountStore, ApiKey, Role
from cloud.server import auth
from cloud.server.auth import Authenticator, NotAllowed, NotAuthenticated, TooManyRequests, require

HERE = "192.0.2.7"


class Clock:
    def __init__(self) -> None:
        self.now_s = 5000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_PASSWORD_COST", (2, 1, 1))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(folder: Path) -> Iterator[AccountStore]:
    store = AccountStore(str(folder))
    store.create_workgroup("lab")
    store.create_user("ada", "correct: horse", "lab")
    yield store
    store.close()


@pytest.fixture
def key(store: AccountStore) -> ApiKey:
    return store.create_key("ada")


@pytest.fixture
def door(store: AccountStore, clock: Clock) -> Authenticator:
    return Authenticator(store, clock)


def bearer(key: ApiKey) -> str:
    return f"Bearer {key.api_key}:{key.api_secretkey}"


def wrong(key: ApiKey) -> str:
    """The key's number with another, well-formed secret."""
    return f"Bearer {key.api_key}:{keys.new_secret()}"


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def fail(door: Authenticator, header: str, address: str = HERE, n: int = 10) -> None:
    for _ in range(n):
        with pytest.raises(NotAuthenticated):
            door.check(header, address)


class TestCredentials:
    def test_a_key(self, door: Authenticator, key: ApiKey) -> None:
        found = door.check(bearer(key), HERE)
        assert (found.user, found.workgroup_id, found.api_key, found.role) == ("ada", 1, key.api_key, Role.MEMBER)
        assert door.check(bearer(key).replace("Bearer", "bEARER  "), HERE) == found

    def test_a_password(self, door: Authenticator) -> None:
        found = door.check(basic("ada", "correct: horse"), HERE)
        assert (found.user, found.api_key, found.scopes) == ("ada", None, set(Role.MEMBER.scopes))

    def test_nothing(self, door: Authenticator) -> None:
        for _ in range(30):  # is no failed attempt
            with pytest.raises(NotAuthenticated, match="credentials are missing") as caught:
                door.check(None, HERE)
        assert caught.value.http_status == 401
        assert caught.value.http_headers == {"WWW-Authenticate": 'Bearer realm="cloud"'}

    @pytest.mark.parametrize(
        "header",
        [
            "",
            " ",
            "Bearer",
            "Bearer ",
            "Bearer x",
            "Bearer :",
            "Bearer 1:",
            "Bearer :cld_",
            "Bearer 01:x",
            "Bearer -1:x",
            "Bearer +1:x",
            "Bearer 1_0:x",
            "Bearer \u0661:x",
            "Bearer " + "9" * 5000 + ":x",
            "Bearer " + "9" * 19 + ":x",
            "Bearer 1:" + "x" * 100_000_000,
            "Bearer 1:\0",
            "Bearer 1:x\r\nX: y",
            "Bearer 1:é",
            "Bearer 1:\udcff",
            "Bearer\t1:x",
            "Digest 1:x",
            "Basic",
            "Basic ====",
            "Basic " + base64.b64encode(b"\xff\xfe:x").decode(),
            "Basic " + base64.b64encode(b"ada").decode(),
            "Basic " + base64.b64encode(b":").decode(),
            "Basic " + base64.b64encode(b"ada:").decode(),
            "Basic " + base64.b64encode(b"a\0da:x").decode(),
            "Basic " + base64.b64encode(b"ada\n:x").decode(),
            "Basic " + base64.b64encode(b"ada:" + b"x" * 2000).decode(),
            basic("ada", "correct: horse") + "!",
            basic("ada", "correct: horse").replace("Y", "!Y", 1),
            basic("ada", "correct: horse") + ",",
            "Basic " + base64.b64encode("ada:correct: horse\udcff".encode(errors="surrogatepass")).decode(),
        ],
    )
    def test_what_signs_nobody_in(self, door: Authenticator, header: str) -> None:
        assert door.quick(header) is None
        with pytest.raises(NotAuthenticated) as caught:
            door.check(header, HERE)
        assert len(str(caught.value)) < 200

    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(header=st.one_of(st.text(), st.text().map("Bearer {}".format), st.binary().map(str)), address=st.text())
    def test_no_header_is_an_unexpected_error(self, door: Authenticator, header: str, address: str) -> None:
        assert door.quick(header) is None
        with pytest.raises((NotAuthenticated, TooManyRequests)):
            door.check(header, address)

    def test_an_error_shows_no_secret(self, door: Authenticator, key: ApiKey) -> None:
        for header in (wrong(key), basic("ada", "sesame"), basic("nobody", "sesame")):
            with pytest.raises(NotAuthenticated) as caught:
                door.check(header, HERE)
            text = f"{caught.value!r} {caught.value} {caught.value.__cause__} {vars(caught.value)}"
            assert "cld_" not in text
            assert "sesame" not in text
            assert header.split()[1] not in text

    def test_no_difference_between_what_exists_and_what_does_not(
        self, door: Authenticator, store: AccountStore, key: ApiKey
    ) -> None:
        revoked = store.create_key("ada")
        store.revoke_key("ada", revoked.api_key)
        texts = set()
        for header in (wrong(key), bearer(revoked), f"Bearer 999:{keys.new_secret()}"):
            with pytest.raises(NotAuthenticated) as caught:
                door.check(header, HERE)
            texts.add(repr(caught.value) + str(caught.value))
        assert len(texts) == 1
        texts.clear()
        for header in (basic("ada", "x"), basic("nobody", "x"), basic("a\nb", "x")):
            with pytest.raises(NotAuthenticated) as caught:
                door.check(header, HERE)
            texts.add(repr(caught.value) + str(caught.value))
        assert len(texts) == 1


class TestTheSecondBetween:
    def test_a_verified_key_needs_no_database(
        self, door: Authenticator, key: ApiKey, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert door.quick(bearer(key)) is None
        found = door.check(bearer(key), HERE)
        monkeypatch.setattr(Database, "reading", lambda self: pytest.fail("asked"))
        clock.now_s += 0.999
        assert door.quick(bearer(key)) == door.check(bearer(key), HERE) == found
        assert door.quick(None) is None
        clock.now_s += 0.001
        assert door.quick(bearer(key)) is None

    @pytest.mark.parametrize("change", ["revoke", "deactivate", "user", "workgroup", "role"])
    def test_what_changes_elsewhere_counts_within_a_second(
        self, door: Authenticator, store: AccountStore, folder: Path, key: ApiKey, clock: Clock, change: str
    ) -> None:
        assert "submit" in door.check(bearer(key), HERE).scopes
        clock.now_s += 0.9
        assert door.check(bearer(key), HERE)
        operator = AccountStore(str(folder))
        {
            "revoke": lambda: operator.revoke_key("ada", key.api_key),
            "deactivate": lambda: operator.set_key_active("ada", key.api_key, False),
            "user": lambda: operator.set_user_active("ada", False),
            "workgroup": lambda: operator.set_workgroup_suspended("lab", True),
            "role": lambda: operator.set_role("ada", Role.READ_ONLY),
        }[change]()
        operator.close()
        clock.now_s += 0.1
        if change == "role":
            assert door.check(bearer(key), HERE).scopes == {"read"}
        else:
            fail(door, bearer(key), n=1)

    def test_the_second_begins_before_the_database_is_asked(
        self, door: Authenticator, store: AccountStore, key: ApiKey, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        verify = store.verify_key

        def slow(*args: object) -> object:
            found = verify(*args)  # type: ignore[arg-type]
            clock.now_s += 0.7  # during which the key may be revoked
            return found

        monkeypatch.setattr(store, "verify_key", slow)
        assert door.check(bearer(key), HERE)
        clock.now_s += 0.2
        assert door.quick(bearer(key))
        clock.now_s += 0.2
        assert door.quick(bearer(key)) is None

    def test_only_the_very_header_is_known(self, door: Authenticator, key: ApiKey) -> None:
        door.check(bearer(key), HERE)
        assert door.quick(wrong(key)) is None
        assert door.quick(bearer(key)[:-1]) is None

    def test_nothing_that_is_remembered_holds_a_secret(
        self, door: Authenticator, key: ApiKey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        door.check(bearer(key), HERE)
        door.check(basic("ada", "correct: horse"), HERE)
        assert len(door._verified) == 2
        assert key.api_secretkey is not None
        remembered = repr(vars(door)) + repr(vars(door._failures))
        for secret in (key.api_secretkey, key.api_secretkey[4:30], "horse", basic("ada", "correct: horse")[6:]):
            assert secret not in remembered
            assert secret.encode() not in b"".join(door._verified)

    def test_use_is_noted(self, door: Authenticator, store: AccountStore, key: ApiKey) -> None:
        door.check(bearer(key), HERE)
        assert store.list_keys("ada")[0].last_used is not None

    def test_a_use_that_cannot_be_noted_is_no_reason_to_refuse(
        self, door: Authenticator, store: AccountStore, key: ApiKey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(key: int) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(store, "note_use", full)
        assert door.check(bearer(key), HERE)

    def test_many_keys_take_bounded_memory(
        self, door: Authenticator, store: AccountStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "MAX_REMEMBERED", 5)
        made = [store.create_key("ada") for _ in range(20)]
        for each in made:
            door.check(bearer(each), HERE)
        assert len(door._verified) == len(door._buckets) == 5
        assert door.quick(bearer(made[-1]))
        assert door.quick(bearer(made[0])) is None


class TestFailures:
    def test_ten_a_minute_then_wait(self, door: Authenticator, key: ApiKey, clock: Clock) -> None:
        for _ in range(10):
            fail(door, wrong(key), n=1)
            clock.now_s += 1
        with pytest.raises(TooManyRequests, match="192|address") as caught:
            door.check(wrong(key), HERE)
        assert (caught.value.http_status, caught.value.retry_after_s) == (429, 50.0)
        assert caught.value.http_headers == {"Retry-After": "50"}
        clock.now_s += 49.5
        with pytest.raises(TooManyRequests) as caught:
            door.check("nonsense", HERE)
        assert caught.value.http_headers == {"Retry-After": "1"}
        clock.now_s += 0.5
        fail(door, wrong(key), n=1)
        with pytest.raises(TooManyRequests):
            door.check(wrong(key), HERE)

    def test_waiting_is_not_made_longer_by_asking(self, door: Authenticator, key: ApiKey, clock: Clock) -> None:
        fail(door, wrong(key))
        for _ in range(100):
            clock.now_s += 0.5
            with pytest.raises(TooManyRequests):
                door.check(wrong(key), HERE)
        clock.now_s += 10
        fail(door, wrong(key))

    def test_passwords_wait_even_if_right_and_are_not_looked_at(
        self, door: Authenticator, store: AccountStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail(door, basic("ada", "guess"))
        with monkeypatch.context() as patch:
            patch.setattr(store, "verify_password", lambda *args: pytest.fail("looked at"))
            with pytest.raises(TooManyRequests):
                door.check(basic("ada", "correct: horse"), HERE)
        clock.now_s += 60
        assert door.check(basic("ada", "correct: horse"), HERE)

    def test_right_keys_go_on(self, door: Authenticator, key: ApiKey, clock: Clock) -> None:
        fail(door, wrong(key))
        assert door.check(bearer(key), HERE).user == "ada"
        clock.now_s += 5
        assert door.check(bearer(key), HERE).user == "ada"
        with pytest.raises(TooManyRequests):
            door.check(wrong(key), HERE)

    def test_success_counts_for_nothing(self, door: Authenticator, key: ApiKey, clock: Clock) -> None:
        for _ in range(9):
            fail(door, basic("ada", "guess"), n=1)
            clock.now_s += 1
            assert door.check(basic("ada", "correct: horse"), HERE)
        fail(door, basic("ada", "guess"), n=1)
        with pytest.raises(TooManyRequests):
            door.check(basic("ada", "guess"), HERE)

    def test_each_address_for_itself(self, door: Authenticator, key: ApiKey) -> None:
        fail(door, wrong(key))
        fail(door, wrong(key), "192.0.2.8")
        fail(door, wrong(key), "2001:db8::1", n=5)
        fail(door, wrong(key), "2001:db8::ffff:2", n=5)
        with pytest.raises(TooManyRequests):
            door.check(wrong(key), "2001:db8::3%eth0")
        fail(door, wrong(key), "2001:db8:0:1::1")
        with pytest.raises(TooManyRequests):
            door.check(wrong(key), f"::ffff:{HERE}")

    def test_many_addresses_take_bounded_memory(
        self, door: Authenticator, key: ApiKey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "MAX_REMEMBERED", 50)
        for number in range(300):
            fail(door, wrong(key), f"2001:db8:{number:x}::1", n=1)
            fail(door, wrong(key), "x" * 1000 + str(number), n=1) if number < 10 else None
        assert len(door._failures._times) == 50
        assert max(map(len, door._failures._times)) <= 64

    def test_guesses_at_the_same_time_are_no_more_than_the_limit(
        self, door: Authenticator, store: AccountStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked_at: list[int] = []
        monkeypatch.setattr(store, "verify_password", lambda *args: looked_at.append(1))
        answers: list[int] = []

        def guess() -> None:
            for _ in range(5):
                try:
                    door.check(basic("ada", "guess"), HERE)
                except auth.Refusal as exc:
                    answers.append(exc.http_status)

        threads = [threading.Thread(target=guess) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(looked_at) == answers.count(401) == 10
        assert answers.count(429) == 30


class TestPasswordsAtTheSameTime:
    def test_two_are_checked_eight_wait_and_more_are_refused(
        self, door: Authenticator, store: AccountStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        verify = store.verify_password
        running = threading.Semaphore(0)
        go_on = threading.Event()
        n_running, most, lock = 0, 0, threading.Lock()

        def slow(user: str, password: str) -> object:
            nonlocal n_running, most
            with lock:
                n_running += 1
                most = max(most, n_running)
            running.release()
            go_on.wait(20)
            with lock:
                n_running -= 1
            return verify(user, password)

        monkeypatch.setattr(store, "verify_password", slow)
        users: list[str] = []

        def sign_in(number: int) -> None:
            users.append(door.check(basic("ada", "correct: horse"), f"192.0.2.{number}").user)

        threads = [threading.Thread(target=sign_in, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            assert running.acquire(timeout=20)
        refused = None
        for _ in range(10_000):  # until all ten are inside
            if door._passwords_inside._value == 0:
                with pytest.raises(TooManyRequests, match="too many passwords") as caught:
                    door.check(basic("ada", "correct: horse"), HERE)
                refused = caught.value
                break
            threading.Event().wait(0.001)
        go_on.set()
        for thread in threads:
            thread.join()
        assert refused is not None
        assert refused.http_headers == {"Retry-After": "1"}
        assert (users, most) == (["ada"] * 10, 2)
        assert door.check(basic("ada", "correct: horse"), HERE)

    def test_accounts_that_cannot_be_read_are_nobodys_failure(
        self, door: Authenticator, store: AccountStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*args: object) -> None:
            raise BackendError("damaged")

        with monkeypatch.context() as patch:
            patch.setattr(store, "verify_password", broken)
            patch.setattr(store, "verify_key", broken)
            for _ in range(20):
                for header in (basic("ada", "correct: horse"), f"Bearer 1:{keys.new_secret()}"):
                    with pytest.raises(BackendError, match="damaged"):
                        door.check(header, HERE)
        assert door.check(basic("ada", "correct: horse"), HERE)


class TestRate:
    def test_a_key_has_a_burst_and_a_rate(self, store: AccountStore, clock: Clock, key: ApiKey) -> None:
        door = Authenticator(store, clock, rate_per_s=2, burst=5)
        for _ in range(5):
            door.check(bearer(key), HERE)
        for ask in (lambda: door.check(bearer(key), HERE), lambda: door.quick(bearer(key))):
            with pytest.raises(TooManyRequests, match="more than 2 requests a second") as caught:
                ask()
            assert caught.value.retry_after_s == pytest.approx(0.5)
        clock.now_s += 0.5
        assert door.quick(bearer(key))
        with pytest.raises(TooManyRequests):
            door.check(bearer(key), HERE)
        clock.now_s += 1000
        for _ in range(5):
            door.check(bearer(key), HERE)
        with pytest.raises(TooManyRequests):
            door.check(bearer(key), HERE)

    def test_each_key_for_itself(self, store: AccountStore, clock: Clock, key: ApiKey) -> None:
        door = Authenticator(store, clock, rate_per_s=1, burst=1)
        other = store.create_key("ada")
        for header in (bearer(key), bearer(other), basic("ada", "correct: horse")):
            assert door.check(header, HERE)
            with pytest.raises(TooManyRequests):
                door.check(header, HERE)

    def test_by_default_a_busy_program_never_notices(self, door: Authenticator, key: ApiKey, clock: Clock) -> None:
        door.check(bearer(key), HERE)
        for _ in range(10_000):
            assert door.quick(bearer(key))


class TestScopes:
    def test_what_is_missing_is_named(self, door: Authenticator, store: AccountStore) -> None:
        principal = door.check(bearer(store.create_key("ada", scopes=["read", "submit"])), HERE)
        require(principal, "read")
        with pytest.raises(NotAllowed, match=r"needs scope 'kill'; API key 1 of user 'ada' has submit, read") as caught:
            require(principal, "kill")
        assert caught.value.http_status == 403
        assert isinstance(caught.value, AccountError)
        with pytest.raises(ValueError, match="there is no scope 'reed'"):
            require(principal, "reed")
        with pytest.raises(NotAllowed, match="this password"):
            require(door.check(basic("ada", "correct: horse"), HERE), "admin")
