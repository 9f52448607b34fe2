"""Crons of a server: registered by programs and jobs, fired by the server, each slot once however often it is killed."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import cloud
from cloud.errors import CronNotFound, UnsupportedOperation
from tests.server.running import RunningServer

WAIT_S = 30.0


@pytest.fixture
def server(tmp_path: Path, closed_after: None) -> Iterator[RunningServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = RunningServer(folder / "data").start()
    cloud.setkey(server.api_key, server.api_secretkey, server.url)
    yield server
    if server.process is not None:
        server.stop()


def set_back(server: RunningServer, minutes: int) -> None:
    """Have every cron be so many minutes behind, as if the server had slept; it must not run meanwhile."""
    (path,) = (server.data / "groups").glob("*/crons.sqlite3")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE cron SET claimed = claimed - ?", (minutes * 60_000_000,))
    db.close()


def jobs_of(label: str) -> list[int]:
    found: list[int] = list(cloud.find(label=label))
    return found


def wait_for(label: str, n: int) -> list[int]:
    until = time.monotonic() + WAIT_S
    while len(found := jobs_of(label)) < n:
        assert time.monotonic() < until, (label, found)
        time.sleep(0.02)
    return found


def test_register_list_info_run_deregister(server: RunningServer, home: Path) -> None:
    factor = 6
    cloud.cron.register(lambda: factor * 7, "answer", "30 2 * * *", tz="Europe/Berlin", _priority=2)
    assert cloud.cron.list() == ["answer"]
    info = cloud.cron.info("answer")
    assert (info["schedule"], info["tz"], info["last_jid"]) == ("30 2 * * *", "Europe/Berlin", None)
    assert info["next_run"] == cloud.cron.preview("30 2 * * *", 1, "Europe/Berlin")[0]
    assert abs(info["created"] - datetime.now(UTC)) < timedelta(minutes=1)
    jid = cloud.cron.manual_run("answer")
    assert cloud.result(jid) == 42
    assert cloud.cron.info("answer")["last_jid"] == jid
    assert jobs_of("answer") == [jid]
    cloud.cron.deregister("answer")
    with pytest.raises(CronNotFound, match="answer"):
        cloud.cron.info("answer")
    assert not (home / "crons.sqlite3").exists()


def test_a_job_may_register_and_run_them(server: RunningServer) -> None:
    def job() -> object:
        import cloud

        cloud.cron.register(lambda: "from a job's cron", "inner", "0 0 1 1 *")
        return cloud.result(cloud.cron.manual_run("inner"))

    assert cloud.result(cloud.call(job)) == "from a job's cron"
    assert cloud.cron.list() == ["inner"]


def test_another_workgroup_knows_nothing_of_them(server: RunningServer) -> None:
    cloud.cron.register(lambda: 1, "mine", "0 0 1 1 *")
    key, secret = server.new_group()
    cloud.setkey(key, secret, server.url)
    assert cloud.cron.list() == []
    for verb in (cloud.cron.info, cloud.cron.deregister, cloud.cron.manual_run):
        with pytest.raises(CronNotFound):
            verb("mine")


def test_this_machine_does_not_fire_them(server: RunningServer) -> None:
    from cloud import current

    with pytest.raises(UnsupportedOperation, match="fired by the server"):
        current.resources().cron_store  # noqa: B018 - reading it is what is refused


def test_the_server_fires_what_it_missed_when_it_is_back(server: RunningServer) -> None:
    cloud.cron.register(lambda: "fired", "often", "* * * * *")
    server.kill(group=True)
    set_back(server, 10)
    server.start()
    (jid,) = wait_for("often", 1)
    assert cloud.result(jid) == "fired"
    assert cloud.cron.info("often")["last_jid"] == jid


@pytest.mark.timeout(300)
def test_killed_again_and_again_each_slot_is_run_once(server: RunningServer) -> None:
    """Hundreds of missed slots are fired while the server is killed at random moments."""
    n = 240
    cloud.cron.register(lambda: None, "every", "* * * * *", missed="run_all", overlap="allow")
    created = cloud.cron.info("every")["created"]
    server.kill(group=True)
    set_back(server, n)
    for kill in range(12):
        server.start()
        time.sleep(0.03 * kill)  # what is under way then differs each time
        server.kill(group=True)
    server.start()
    until = time.monotonic() + WAIT_S
    last = None
    while last is None or last < created - timedelta(minutes=1):
        assert time.monotonic() < until
        with sqlite3.connect(next((server.data / "groups").glob("*/crons.sqlite3"))) as db:
            ((claimed, unsettled),) = db.execute("SELECT claimed, unsettled FROM cron").fetchall()
        db.close()
        last = None if unsettled else datetime.fromtimestamp(claimed / 1e6, UTC)
        time.sleep(0.05)
    server.stop()
    with sqlite3.connect(next((server.data / "groups").glob("*/crons.sqlite3"))) as db:
        slots = Counter(due for (due,) in db.execute("SELECT due FROM slot"))
    db.close()
    server.start()
    jids = jobs_of("every")
    assert max(slots.values()) == 1
    assert n <= len(slots) <= n + 3
    # One more slot may have come while the server was started to be asked.
    assert len(slots) <= len(set(jids)) <= len(slots) + 1
