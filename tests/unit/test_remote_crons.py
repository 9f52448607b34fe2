"""Crons over the table of operations, and how a server fires them: each slot once, whenever it is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloud.backends.crons import RemoteCrons
from cloud.environment import Environment
from cloud.errors import BackendClosed, BackendError, CronNotFound, InvalidSchedule
from cloud.jobs import DONE, JobOptions
from cloud.resources.cron_store import CronStore
from cloud.serialization.functions import Function
from tests.unit.beside import Beside, FakeJobs


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    beside = Beside(tmp_path / "group")
    yield beside
    beside.close()


def submit_over(beside: Beside) -> Callable[..., dict[str, Any]]:
    def submit(
        op: str, function: Function, arguments: bytes, options: JobOptions, content: dict[str, Any]
    ) -> dict[str, Any]:
        facts = {"function": function.name, "reusable": function.reusable, "options": options.as_dict(), **content}
        if beside.environment is None:
            facts |= {"python": "3.12", "cloudpickle": "3.1.1", "code": "c" * 64}
        return beside.ask(op, function.payload, b"surroundings", arguments, **facts)[0]

    return submit


def pickle_call(func: Any, reserved: dict[str, Any]) -> tuple[Function, bytes, JobOptions]:
    options = JobOptions()
    options.priority = reserved.get("_priority", options.priority)
    return Function(b"function", "module.func"), b"arguments", options


@pytest.fixture
def crons(beside: Beside) -> RemoteCrons:
    return RemoteCrons(beside.ask, submit_over(beside), pickle_call)


def func() -> None: ...


def register(crons: RemoteCrons, label: str = "a", schedule: str = "* * * * *", **more: Any) -> None:
    crons.register(func, label, schedule, reserved=more.pop("reserved", {}), **more)


def fire(beside: Beside) -> list[str]:
    runner = beside.server.crons._runner
    return [f"{firing.label}@{firing.slot:%H:%M}" for firing in runner.resume(beside.now) + runner.fire_due(beside.now)]


class TestOperations:
    def test_register_list_info_deregister(self, beside: Beside, crons: RemoteCrons) -> None:
        register(crons, "b", "30 2 * * *", tz="Europe/Berlin", missed="skip", overlap="allow")
        register(crons)
        assert crons.list() == ["a", "b"]
        info = crons.info("b")
        assert info["schedule"] == "30 2 * * *"
        assert (info["tz"], info["missed"], info["overlap"]) == ("Europe/Berlin", "skip", "allow")
        assert (info["func_name"], info["funcname"]) == ("func", "func")
        assert (info["created"], info["last_run"], info["last_jid"]) == (beside.now, None, None)
        assert info["next_run"] == datetime(2024, 1, 2, 1, 30, tzinfo=UTC)
        crons.deregister("b")
        assert crons.list() == ["a"]

    @pytest.mark.parametrize("verb", ["deregister", "info", "manual_run"])
    def test_unknown_labels(self, crons: RemoteCrons, verb: str) -> None:
        with pytest.raises(CronNotFound, match="'nothing'"):
            getattr(crons, verb)("nothing")

    def test_bad_ones_are_refused_before_anything_is_sent(self, beside: Beside, crons: RemoteCrons) -> None:
        with pytest.raises(InvalidSchedule):
            register(crons, schedule="61 * * * *")
        with pytest.raises(ValueError, match="overlap must be one of"):
            register(crons, overlap="never")
        assert beside.asked == []

    def test_manual_run(self, beside: Beside, crons: RemoteCrons) -> None:
        register(crons, reserved={"_priority": 2})
        jid = crons.manual_run("a")
        request = beside.jobs.submitted[jid]
        assert request.blobs == [b"function", b"surroundings", b"arguments"]
        assert request.content["options"] == {"priority": 2, "label": "a"}
        assert request.environment == Environment("3.12", "c" * 64)
        info = crons.info("a")
        assert (info["last_jid"], info["last_run"]) == (jid, beside.now)
        assert beside.server.crons.codes() == {"c" * 64}

    def test_asked_again_it_is_the_same_run(self, beside: Beside, crons: RemoteCrons) -> None:
        register(crons)
        first = beside.ask_with_key("k", "cron.manual_run", label="a")
        beside.restart()
        assert beside.ask_with_key("k", "cron.manual_run", label="a") == first
        assert len(beside.jobs.submitted) == 1
        beside.ask_with_key("d", "cron.deregister", label="a")
        beside.ask_with_key("d", "cron.deregister", label="a")

    def test_a_cron_of_a_job_runs_where_the_job_ran(self, beside: Beside, crons: RemoteCrons) -> None:
        beside.environment = Environment("3.13", "d" * 64)
        register(crons)
        beside.environment = None
        jid = crons.manual_run("a")
        assert beside.jobs.submitted[jid].environment == Environment("3.13", "d" * 64)

    def test_what_cannot_run_here_is_not_registered(
        self, beside: Beside, crons: RemoteCrons, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(content: dict[str, Any]) -> Environment:
            raise BackendError("no such Python")

        monkeypatch.setattr(beside.server.crons, "_environment", refuse)
        with pytest.raises(BackendError, match="no such Python"):
            register(crons)
        assert crons.list() == []


class Killed(BaseException):
    """The process ends here."""


class TestSlots:
    def test_each_is_fired_once(self, beside: Beside, crons: RemoteCrons) -> None:
        register(crons, overlap="allow")
        assert fire(beside) == []
        for minute in (1, 2, 3):
            beside.now = beside.now.replace(minute=minute)
            assert fire(beside) == [f"a@10:0{minute}"]
            beside.restart()
            assert fire(beside) == []
        assert len(beside.jobs.submitted) == 3

    @pytest.mark.parametrize("missed", ["skip", "run_once", "run_all"])
    @pytest.mark.parametrize("where", ["claimed", "submitted", "recorded"])
    @pytest.mark.parametrize("down_s", [1, 150])
    def test_killed_anywhere_each_slot_is_run_once(
        self,
        beside: Beside,
        crons: RemoteCrons,
        monkeypatch: pytest.MonkeyPatch,
        where: str,
        missed: str,
        down_s: int,
    ) -> None:
        register(crons, missed=missed, overlap="allow")
        beside.now = beside.now.replace(minute=1)

        def die(*args: Any, **options: Any) -> Any:
            raise Killed

        with monkeypatch.context() as patch:
            if where == "claimed":
                beside.jobs.before_submit = die
            elif where == "submitted":
                patch.setattr(CronStore, "record_run", die)
            else:
                record = CronStore.record_run

                def record_and_die(*args: Any, **options: Any) -> None:
                    record(*args, **options)
                    raise Killed

                patch.setattr(CronStore, "record_run", record_and_die)
            with pytest.raises(Killed):
                fire(beside)
        beside.jobs.before_submit = lambda: None
        beside.restart()
        beside.now += timedelta(seconds=down_s)
        fire(beside)
        later = {"skip": ["10:03"], "run_once": ["10:03"], "run_all": ["10:02", "10:03"]}[missed] if down_s > 60 else []
        lost = missed == "skip" and where == "claimed" and down_s > 60  # it passed while nobody ran, which 'skip' drops
        wanted = [*(() if lost else ("10:01",)), *later]
        keys = [request.key for request in beside.jobs.submitted.values()]
        assert [key.split("T")[1][:5] for key in keys] == wanted
        assert crons.info("a")["last_jid"] == len(wanted)
        beside.restart()
        assert fire(beside) == []

    def test_a_job_submitted_just_before_the_end_counts_as_unfinished(
        self, beside: Beside, crons: RemoteCrons, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        register(crons, missed="skip", overlap="skip")
        beside.now = beside.now.replace(minute=1)

        def die(*args: Any, **options: Any) -> Any:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(CronStore, "record_run", die)
            with pytest.raises(Killed):
                fire(beside)
        beside.restart()
        beside.now = beside.now.replace(minute=5)
        assert fire(beside) == ["a@10:01"]
        beside.now = beside.now.replace(minute=6)
        assert fire(beside) == []
        beside.jobs.statuses[1] = DONE
        beside.now = beside.now.replace(minute=7)
        assert fire(beside) == ["a@10:07"]

    def test_an_end_of_the_server_leaves_the_slot_to_the_next(self, beside: Beside, crons: RemoteCrons) -> None:
        register(crons)
        beside.now = beside.now.replace(minute=1)

        def closed() -> None:
            raise BackendClosed("the server is stopping")

        beside.jobs.before_submit = closed
        assert fire(beside) == []
        beside.jobs.before_submit = lambda: None
        beside.restart()
        assert fire(beside) == ["a@10:01"]

    def test_a_call_that_is_refused_is_over(
        self, beside: Beside, crons: RemoteCrons, caplog: pytest.LogCaptureFixture
    ) -> None:
        register(crons)
        beside.now = beside.now.replace(minute=1)

        def refuse() -> None:
            raise BackendError("the modules are gone")

        beside.jobs.before_submit = refuse
        assert fire(beside) == []
        beside.jobs.before_submit = lambda: None
        assert "the modules are gone" in caplog.text
        beside.restart()
        assert fire(beside) == []

    def test_a_registration_anew_keeps_what_is_unsettled(
        self, beside: Beside, crons: RemoteCrons, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        register(crons)
        beside.now = beside.now.replace(minute=1)

        def die(*args: Any, **options: Any) -> Any:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(CronStore, "record_run", die)
            with pytest.raises(Killed):
                fire(beside)
        register(crons)
        beside.restart()
        fire(beside)
        assert len(beside.jobs.submitted) == 1


class TestThread:
    @pytest.fixture
    def live(self, tmp_path: Path) -> Iterator[Beside]:
        beside = Beside(tmp_path / "live")
        beside.server.start()
        yield beside
        beside.close()

    def test_it_sees_a_registration_and_fires_at_its_slot(self, live: Beside) -> None:
        fired = threading.Event()
        live.jobs.before_submit = fired.set
        register(RemoteCrons(live.ask, submit_over(live), pickle_call))
        assert not fired.wait(0.2)
        live.now = live.now.replace(minute=1)
        assert fired.wait(10)

    def test_it_goes_on_where_the_process_before_ended(self, tmp_path: Path) -> None:
        jobs = FakeJobs()
        before = Beside(tmp_path / "group", jobs)
        register(RemoteCrons(before.ask, submit_over(before), pickle_call))
        before.close()
        after = Beside(tmp_path / "group", jobs)
        after.now = after.now.replace(minute=1)
        fired = threading.Event()
        jobs.before_submit = fired.set
        after.server.start()
        assert fired.wait(10)
        after.close()
        assert len(jobs.submitted) == 1

    def test_a_clock_set_back_by_years_is_noticed(self, live: Beside) -> None:
        fired = threading.Event()
        live.jobs.before_submit = fired.set
        register(RemoteCrons(live.ask, submit_over(live), pickle_call), schedule="0 10 * * *")
        assert not fired.wait(0.2)
        live.now = datetime(2020, 1, 1, 10, 0, 1, tzinfo=UTC)
        assert fired.wait(10)
