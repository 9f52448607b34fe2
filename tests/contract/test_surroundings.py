"""What a job sees around it: the caller's path, directory and environment as of its submission, put back after it."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cloud
from tests import sample_functions as sample
from tests.contract.conftest import CHILDREN_ONLY, EMBEDDED_ONLY, PROCESSES_ONLY
from tests.contract.jobs import Gate, eventually, note, notes


def look() -> tuple[str, str | None, bool]:
    return os.getcwd(), os.environ.get("SEEN"), "/made/up" in sys.path


@EMBEDDED_ONLY
def test_a_job_sees_what_its_submission_saw(
    api: ModuleType, one_slot: None, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.call(gate.hold)
    gate.await_begun()
    folders = [tmp_path / name for name in "ab"]
    submitted, expected = [], []
    for folder in (*folders, folders[0]):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("SEEN", folder.name)
        submitted.append([api.call(look), *api.map(lambda i: look(), range(2))])
        expected.append([(str(folder), folder.name, False)] * 3)
    monkeypatch.syspath_prepend("/made/up")
    monkeypatch.delenv("SEEN")
    submitted.append([api.call(look)])
    expected.append([(str(folders[0]), None, True)])
    gate.open()
    assert [api.result(jids) for jids in submitted] == expected


@EMBEDDED_ONLY
def test_what_the_program_changes_while_jobs_run_stays(
    api: ModuleType, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jids = [api.call(gate.hold)]
    gate.await_begun()
    monkeypatch.chdir(os.getcwd())
    for number in range(300):
        folder = tmp_path / str(number % 7)
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        monkeypatch.setenv("SEEN", str(number))
        jids.append(api.call(look))
        if not number % 50:
            assert api.result(jids[-1]) == (str(folder), str(number), False)
    gate.open()
    api.join(jids)
    assert (os.getcwd(), os.environ["SEEN"]) == (str(folder), "299")


@EMBEDDED_ONLY
def test_what_a_job_changes_is_put_back(api: ModuleType, one_slot: None, tmp_path: Path) -> None:
    def change(folder: str) -> tuple[str, str | None, bool]:
        os.chdir(folder)
        os.environ["SEEN"] = "changed"
        os.environ.pop("HOME")
        sys.path.insert(0, "/made/up")
        return look()

    before = look(), os.environ["HOME"], list(sys.path)
    for submit in (lambda: api.call(change, str(tmp_path)), lambda: api.map(change, [str(tmp_path)])[0]):
        assert api.result(submit()) == (str(tmp_path), "changed", True)
        assert api.result(api.call(lambda: (look(), os.environ["HOME"], list(sys.path)))) == before
    assert (look(), os.environ["HOME"], list(sys.path)) == before


@pytest.mark.parametrize("how", ["in place", "another list"])
def test_an_item_finds_no_path_of_those_before_it(api: ModuleType, one_slot: None, how: str) -> None:
    def job(i: int) -> tuple[int]:
        found = sum(each.startswith("/made/up") for each in sys.path)
        if how == "in place":
            sys.path.append(f"/made/up/{i}")
        else:
            sys.path = [*sys.path, f"/made/up/{i}"]
        return (found,)

    api.join(api.map(job, range(5)))
    assert set(api.result(api.map(job, range(100)))) == {(0,)}


@CHILDREN_ONLY
def test_an_environment_that_a_job_puts_in_place_of_its_own_goes(api: ModuleType, one_slot: None) -> None:
    def replace() -> None:
        os.environ = {**os.environ, "SEEN": "replaced"}  # type: ignore[assignment]  # noqa: B003
        print("A look at what has changed follows.")

    before = look()
    api.result(api.call(replace))
    assert api.result(api.call(look)) == before


@CHILDREN_ONLY
def test_a_directory_that_was_away_is_gone_into_again(
    api: ModuleType, one_slot: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir()
    monkeypatch.chdir(here)

    def leave() -> None:
        os.chdir(tmp_path)
        here.rename(away)

    api.result(api.call(leave))
    away.rename(here)
    api.result(api.call(print, "A look at what has changed follows."))
    assert api.result(api.call(os.getcwd)) == str(here)


@EMBEDDED_ONLY
def test_a_job_that_fails_is_cleaned_up_after_too(api: ModuleType, one_slot: None) -> None:
    def fail() -> None:
        os.chdir("/")
        os.putenv("SEEN", "changed")
        os.environ["SEEN"] = "changed"
        raise ValueError

    before = look()
    api.join(api.call(fail), ignore_errors=True)
    assert api.result(api.call(look)) == before


def test_modules_of_the_caller_s_path_can_be_imported(
    api: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here_for_this_test.py").write_text("def value(): return 'found'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here_for_this_test  # type: ignore[import-not-found]

    try:
        assert api.result(api.call(only_here_for_this_test.value)) == "found"
        assert api.result(api.map(lambda i: only_here_for_this_test.value(), [1])) == ["found"]
    finally:
        del sys.modules["only_here_for_this_test"]


@EMBEDDED_ONLY
def test_a_directory_that_is_gone_is_an_error_of_its_job(
    api: ModuleType, one_slot: None, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.call(gate.hold)
    gate.await_begun()
    folder = tmp_path / "gone"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        jid = api.call(look)
    folder.rmdir()
    gate.open()
    found = api.result(jid, ignore_errors=True)
    assert (found.status, type(found.__cause__)) == ("error", FileNotFoundError)
    assert api.result(api.call(look)) == look()


@EMBEDDED_ONLY
def test_children_see_their_parent_s_surroundings(api: ModuleType, one_slot: None, tmp_path: Path) -> None:
    def parent() -> Any:
        os.chdir(tmp_path)
        os.environ["SEEN"] = "by the child"
        return cloud.result([cloud.call(look), *cloud.map(lambda i: look(), [0])])

    assert api.result(api.call(parent)) == [(str(tmp_path), "by the child", False)] * 2
    assert api.result(api.call(look)) == look()


@EMBEDDED_ONLY
def test_os_env_vars_are_on_top(api: ModuleType, one_slot: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEN", "of the program")
    assert api.result(api.call(sample.getenv, "SEEN", _os_env_vars={"SEEN": "of the job"})) == "of the job"
    assert api.result(api.map(sample.getenv, ["SEEN"] * 2, _os_env_vars={"SEEN": "of the map"})) == ["of the map"] * 2
    assert api.result(api.call(sample.getenv, "SEEN")) == "of the program"
    assert os.environ["SEEN"] == "of the program"


@PROCESSES_ONLY
def test_signal_handlers_are_put_back(api: ModuleType, one_slot: None) -> None:
    def change() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)

    def handlers() -> list[str]:
        return [repr(signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGUSR1)]

    before = api.result(api.call(handlers))
    api.join(api.call(change))
    assert api.result(api.call(handlers)) == before


@CHILDREN_ONLY
@pytest.mark.parametrize("n_slots", [1, 2, 64])
def test_libraries_get_their_share_of_the_cores(
    api: ModuleType, configure: Any, monkeypatch: pytest.MonkeyPatch, n_slots: int
) -> None:
    configure(num_procs=n_slots)
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    share = str(max(1, len(os.sched_getaffinity(0)) // n_slots))
    assert api.result(api.map(sample.getenv, names)) == [share] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert api.result(api.map(sample.getenv, names)) == ["7", share, share]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def _waits_as_batch(pid: int) -> bool:
    return os.sched_getscheduler(pid) == os.SCHED_BATCH


@PROCESSES_ONLY
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_a_worker_that_waits_does_not_push_aside_who_wakes_it_and_jobs_are_scheduled_as_ever(api: ModuleType) -> None:
    def policy() -> tuple[int, int]:
        return os.getpid(), os.sched_getscheduler(0)

    for jid in (api.call(policy), *api.map(lambda _: policy(), range(3))):
        pid, seen = api.result(jid)
        assert seen == os.sched_getscheduler(0) == os.SCHED_OTHER
        eventually(partial(_waits_as_batch, pid))


@PROCESSES_ONLY
def test_a_worker_is_no_child_of_the_user_s_program_by_import(api: ModuleType, tmp_path: Path) -> None:
    def modules() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in ("pytest", "hypothesis", "tests")]

    assert "pytest" in sys.modules
    assert api.result(api.call(modules)) == []
    log = str(tmp_path / "log")
    api.join(api.call(note, log, "imported now"))
    assert notes(log) == ["imported now"]
