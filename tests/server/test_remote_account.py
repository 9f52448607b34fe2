"""``cloud.account`` on a server: signed in with user and password, with or without a key of one's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import cloud
from cloud.errors import AccountError, CloudException
from cloud.resources.accounts import AccountStore
from cloud.resources.principals import Role
from tests.server.running import RunningServer

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def shared(_own_temporary_folder: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server") / "data") as server:
        yield server


@pytest.fixture
def user(shared: RunningServer, closed_after: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user without a key; the server is named in the environment."""
    name = f"user{time.monotonic_ns()}"
    store = AccountStore(str(shared.data))
    store.create_workgroup(name)
    store.create_user(name, PASSWORD, name, Role.MEMBER)
    store.close()
    monkeypatch.setenv("CLOUD_SERVER_URL", shared.url)
    return name


def test_from_a_password_to_a_key_that_runs_jobs(shared: RunningServer, user: str, home: Path) -> None:
    cloud.account.setuser(user, PASSWORD)
    assert cloud.account.api_keys() == []
    key = cloud.account.create_api_key()
    assert key["active"]
    assert isinstance(key["created"], datetime)
    assert abs(key["created"] - datetime.now(UTC)) < timedelta(minutes=1)
    assert key["scopes"] == ("submit", "read", "kill", "files", "cron")
    cloud.setkey(key["api_key"], key["api_secretkey"], shared.url)
    assert cloud.result(cloud.call(lambda: 42)) == 42
    cloud.account.update_api_key_note(key["api_key"], "laptop")
    (listed,) = cloud.account.api_keys()
    assert (listed["note"], listed["api_secretkey"], listed["api_key"]) == ("laptop", None, key["api_key"])
    cloud.account.deactivate_api_key(key["api_key"])
    time.sleep(1.0)  # within a second
    with pytest.raises(AccountError):
        cloud.call(lambda: 42)
    cloud.account.activate_api_key(key["api_key"])
    assert cloud.result(cloud.call(lambda: 42)) == 42
    assert not home.exists(), "nothing belongs on this machine"


def test_wrong_passwords_and_keys_of_others(shared: RunningServer, user: str) -> None:
    with pytest.raises(AccountError, match="setuser"):
        cloud.account.api_keys()
    with pytest.raises(AccountError):
        cloud.account.setuser(user, "wrong")
    with pytest.raises(AccountError, match="':'"):
        cloud.account.setuser("a:b", PASSWORD)
    with pytest.raises(AccountError, match="setuser"):
        cloud.account.api_keys()
    cloud.account.setuser(user, PASSWORD)
    with pytest.raises(AccountError):
        cloud.account.setuser(user, "wrong")
    assert cloud.account.api_keys() == [], "who was signed in before still is"
    for verb in (cloud.account.activate_api_key, cloud.account.deactivate_api_key):
        with pytest.raises(AccountError):
            verb(shared.api_key)
    with pytest.raises(TypeError):
        cloud.account.activate_api_key("1")  # type: ignore[arg-type]


def test_passwords_are_for_one_server(shared: RunningServer, user: str) -> None:
    cloud.account.setuser(user, PASSWORD)
    cloud.setkey(1, "cld_x", shared.url.replace("127.0.0.1", "localhost"))
    with pytest.raises(AccountError, match="setuser"):
        cloud.account.api_keys()


def test_jobs_have_no_account(shared: RunningServer, closed_after: None) -> None:
    cloud.setkey(*shared.new_group(), shared.url)

    def job() -> None:
        import cloud

        cloud.account.setuser("a", "b")

    with pytest.raises(CloudException, match="accounts are managed where the program runs"):
        cloud.result(cloud.call(job))
