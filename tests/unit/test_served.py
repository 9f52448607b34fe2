"""Workers of a server: keyed by environment, with surroundings and limits of their own."""

from __future__ import annotations

import builtins
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from cloud.backends.local import LocalBackend
from cloud.backends.requests import Requests
from cloud.engine.executor.setup import OWN_VERSION, WorkerSetup
from cloud.environment import Environment
from cloud.jobs import DEFAULT_OPTIONS
from cloud.serialization import pickling
from tests.unit.served import ServedHouse, code, code_folder, eventually

Opener = Callable[..., ServedHouse]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def opened(scratch: Path) -> Iterator[Opener]:
    """Open a house with a setup of these fields; closed at the end, when no folder of a worker may be left."""
    houses: list[ServedHouse] = []

    def opened(slots: Any = 2, *, idle_s: float = 60.0, max_slots: int = 0, **fields: Any) -> ServedHouse:
        fields.setdefault("scratch", str(scratch))
        houses.append(ServedHouse(WorkerSetup(**fields), slots, idle_s=idle_s, max_slots=max_slots))
        return houses[-1]

    yield opened
    for house in houses:
        house.engine.close()
    assert list(scratch.iterdir()) == []


# --- environments -----------------------------------------------------------------------------------------------------


def test_a_worker_meets_one_environment_only(opened: Opener) -> None:
    house = opened(2)
    seen: dict[int, set[str]] = {}
    jids = [(name, house.call(os.getpid, environment=code(name))) for _ in range(10) for name in ("", "a", "b")]
    for name, jid in jids:
        seen.setdefault(house.result(jid), set()).add(name)
    assert all(len(names) == 1 for names in seen.values())
    assert house.n_workers <= 3  # two, and one that is ending


def test_another_environment_at_the_head_blocks_nobody(opened: Opener, tmp_path: Path) -> None:
    house = opened(2)
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def held(path: str) -> str:
        with open(path) as file:
            return file.read()

    waiting = house.call(held, str(gate), environment=code("a"))
    others = [house.call(os.getpid, environment=code(name)) for name in ("b", "c", "b", "")]
    assert all(isinstance(value, int) for value in house.results(others))
    gate.write_text("open")
    assert house.result(waiting) == "open"


def test_a_stream_of_one_environment_does_not_starve_another(opened: Opener) -> None:
    house = opened(1)
    stream = house.map(abs, list(range(-300_000, 0)), code("a"))
    late = house.call(os.getpid, environment=code("b"))
    after = house.map(abs, list(range(-300_000, 0)), code("a"))
    assert house.result(late)
    # It was submitted before the second map, so that cannot have ended before it.
    assert house.engine.statuses(after).count(3) < len(after)
    assert house.results(after)[0] == 300_000
    assert house.results(stream)[0] == 300_000


def test_priorities_hold_across_environments(opened: Opener, tmp_path: Path) -> None:
    house = opened(1)
    gate, log = tmp_path / "gate", tmp_path / "log"
    os.mkfifo(gate)

    def note(path: str, word: str) -> None:
        with open(path, "a") as file:
            file.write(word)

    def held(path: str) -> None:
        open(path).close()

    first = house.call(held, str(gate), environment=code("a"))
    eventually(lambda: house.engine.statuses((first,))[0] == 2, "the first job did not begin")
    jids = [
        house.call(note, str(log), word, environment=code(name), priority=priority)
        for word, name, priority in (("4", "a", 7), ("2", "b", 2), ("3", "a", 5), ("1", "c", 1))
    ]
    open(gate, "w").close()
    house.results(jids)
    assert log.read_text() == "1234"


def test_code_of_an_environment_heads_the_path(opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = code_folder(tmp_path / "code", one="def who(): return 'one'", two="def who(): return 'two'")
    monkeypatch.syspath_prepend(str(folder / "one"))
    import served_code  # type: ignore[import-not-found]

    house = opened(2, code_folder=str(folder))
    jids = [house.call(served_code.who, environment=code(name)) for name in ("one", "two", "one")]
    assert house.results(jids) == ["one", "two", "one"]
    sys.modules.pop("served_code")


# --- interpreters -----------------------------------------------------------------------------------------------------


def test_an_unknown_interpreter_ends_the_jobs_that_want_it(opened: Opener) -> None:
    house = opened(2)
    lost = [house.call(os.getpid, environment=Environment("2.7", "")) for _ in range(3)]
    assert house.result(house.call(os.getpid))
    assert all("has no Python 2.7" in house.error(jid) and OWN_VERSION in house.error(jid) for jid in lost)


def test_an_interpreter_without_cloudpickle_is_named(opened: Opener, tmp_path: Path) -> None:
    # As a virtual environment that nothing was installed in.
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nshift 2; exec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    house = opened(2, interpreters={OWN_VERSION: str(bare)})
    text = house.error(house.call(os.getpid))
    assert str(bare) in text
    assert "No module named 'cloudpickle'" in text
    assert "pip install cloudpickle" in text


def test_an_interpreter_of_another_version_than_configured_is_refused(opened: Opener) -> None:
    house = opened(2, interpreters={"3.99": sys.executable})
    text = house.error(house.call(os.getpid, environment=Environment("3.99", "")))
    assert f"it is Python {OWN_VERSION}" in text
    assert house.result(house.call(os.getpid))


def test_an_interpreter_that_is_not_there_ends_the_jobs(opened: Opener, tmp_path: Path) -> None:
    house = opened(2, interpreters={"3.99": str(tmp_path / "missing")})
    assert house.result(house.call(os.getpid))
    assert "missing" in house.error(house.call(os.getpid, environment=Environment("3.99", "")))


def other_interpreters() -> dict[str, str]:
    """Other interpreters with cloudpickle that an operator of this machine names in TEST_INTERPRETERS."""
    named = filter(None, os.environ.get("TEST_INTERPRETERS", "").split(":"))
    return dict(each.split("=", 1) for each in named)


@pytest.mark.skipif(not other_interpreters(), reason="TEST_INTERPRETERS names none (3.12=/path:3.13=/path)")
def test_each_job_runs_on_the_interpreter_of_its_environment(opened: Opener) -> None:
    house = opened(2, interpreters=other_interpreters())
    versions = [*other_interpreters(), OWN_VERSION] * 2
    jids = [house.call(platform.python_version, environment=Environment(each, "")) for each in versions]
    for version, found in zip(versions, house.results(jids), strict=True):
        assert found.startswith(f"{version}.")


# --- surroundings -----------------------------------------------------------------------------------------------------


def test_nothing_of_the_servers_environment_reaches_template_or_worker(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_SERVER", "hunter2")
    house = opened(1)
    seen = house.result(house.call(lambda: dict(__import__("os").environ)))
    assert {"PATH", "LANG", "HOME", "TMPDIR"} <= set(seen)
    assert "SECRET_OF_SERVER" not in seen
    pids = [*house.template_pids(), *house.pids()[None]]
    assert len(pids) == 2
    for each in pids:
        assert b"hunter2" not in Path(f"/proc/{each}/environ").read_bytes()


def test_variables_of_a_job_go_on_top_and_end_with_it(opened: Opener) -> None:
    house = opened(1)

    def look() -> tuple[str | None, bool]:
        return os.environ.get("OF_JOB"), "HOME" in os.environ

    assert house.result(house.call(look, env_vars={"OF_JOB": "1"})) == ("1", True)
    assert house.result(house.call(look)) == (None, True)


def test_a_worker_has_a_private_folder_that_goes_with_it(opened: Opener, scratch: Path) -> None:
    house = opened(1)

    def look() -> tuple[str, str, str, int, int]:
        import tempfile

        mode = os.stat(os.getcwd()).st_mode, os.stat(tempfile.gettempdir()).st_mode
        Path("left").mkdir()
        Path("left/file").write_text("x")
        return os.getcwd(), os.environ["HOME"], tempfile.gettempdir(), *(stat.S_IMODE(each) for each in mode)

    cwd, home, temporary, *modes = house.result(house.call(look))
    assert cwd == home
    assert Path(cwd).parent == scratch
    assert Path(temporary).parent == Path(cwd)
    assert modes == [0o700, 0o700]
    os.kill(house.pids()[None][0], 9)
    eventually(lambda: not Path(cwd).exists(), "the folder outlived its worker")


def test_what_a_job_changes_is_put_back(opened: Opener) -> None:
    house = opened(1)

    def change() -> str:
        before = os.getcwd()
        os.chdir("/")
        os.environ.clear()
        sys.path.insert(0, "/nowhere")
        return before

    def look() -> tuple[str, bool, bool]:
        return os.getcwd(), "PATH" in os.environ, "/nowhere" in sys.path

    before = house.result(house.call(change))
    assert house.result(house.call(look)) == (before, True, False)


def test_surroundings_of_a_client_do_not_apply(opened: Opener, tmp_path: Path) -> None:
    house = opened(1)
    context = pickling.dumps_plain((["/of/client"], str(tmp_path), {b"OF_CLIENT": b"1"}, None))

    def look() -> tuple[bool, str, bool]:
        return "/of/client" in sys.path, os.getcwd(), "OF_CLIENT" in os.environ

    jid = house.engine.submit(house._functions.get(look, None), (2, context), pickling.dumps(((), {})), DEFAULT_OPTIONS)
    on_path, cwd, in_environ = house.result(jid)
    assert (on_path, in_environ) == (False, False)
    assert cwd != str(tmp_path)


def test_a_job_that_submits_jobs_sends_no_surroundings(opened: Opener) -> None:
    house = opened(1)

    def look() -> Any:
        from cloud.engine.worker.surroundings import snapshot

        return snapshot()[:3]

    assert house.result(house.call(look)) == (None, "", {})


def test_jobs_submit_jobs(opened: Opener) -> None:
    house = opened(2)
    house.engine.serve_requests(Requests(LocalBackend("server", house.engine, "server")))

    def outer(n: int) -> tuple[str, list[str]]:
        import cloud

        return os.getcwd(), cloud.result(cloud.map(lambda _: os.getcwd(), range(n)))

    here, there = house.result(house.call(outer, 3))
    assert here not in there  # each worker keeps to its own folder
    assert len(there) == 3
    # A job that waits leaves its slot to others, and takes it again: none may be lost.
    house.results([house.call(outer, 2) for _ in range(6)])
    eventually(lambda: house.executor._slots.n_used == 0, "slots were kept")


def test_a_job_sees_no_descriptor_but_its_own(opened: Opener, tmp_path: Path) -> None:
    secret = (tmp_path / "secret").open("w")
    os.set_inheritable(secret.fileno(), True)
    house = opened(1)

    def look() -> list[str]:
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:
                pass  # of the listing itself
        return found

    seen = house.result(house.call(look))
    template = [os.readlink(each) for each in Path(f"/proc/{house.template_pids()[0]}/fd").iterdir()]
    secret.close()
    sockets = [each for each in seen if each.startswith("socket:")]
    assert len(sockets) == 1
    assert all(each == "/dev/null" or "memfd:" in each or each in sockets for each in seen)
    assert len([each for each in template if each.startswith("socket:")]) == 1
    # Besides, the pipe by which it wakes itself.
    assert all(each == "/dev/null" or each.startswith(("socket:", "pipe:")) or "memfd:" in each for each in template)
    assert len([each for each in template if each.startswith("pipe:")]) == 2


# --- the user ---------------------------------------------------------------------------------------------------------


def test_another_user_is_for_root_only(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="only if the server runs as root"):
        WorkerSetup(str(scratch), user=(65534, 65534))


def everybody_reads(path: str) -> bool:
    return all(each.stat().st_mode & 0o005 == 0o005 for each in Path(path).resolve().parents)


@pytest.fixture
def open_scratch() -> Path:
    """A folder that other users get into."""
    Path(tempfile.gettempdir()).chmod(0o711)
    scratch = Path(tempfile.mkdtemp())
    scratch.chmod(0o755)
    (scratch / "workers").mkdir(mode=0o711)
    return scratch


@pytest.fixture
def open_python(open_scratch: Path) -> dict[str, Any]:
    """An interpreter that everybody may read, as fields of a setup."""
    executable = next((each for each in (sys.executable, f"/usr/bin/python{OWN_VERSION}") if works_for_all(each)), None)
    if executable is None:
        pytest.skip("no interpreter here can be read by everybody")
    shutil.copytree(Path(cloudpickle.__file__).parent, open_scratch / "site" / "cloudpickle")
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(open_scratch / "site")}
    return {"interpreters": {OWN_VERSION: executable}, "environ": environ}


def works_for_all(executable: str) -> bool:
    try:
        told = subprocess.check_output([executable, "-c", "import os; print(os.__file__)"], text=True)
    except OSError:
        return False
    return everybody_reads(executable) and everybody_reads(told.strip())


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run workers as others")


@only_root
def test_workers_run_as_the_user_given(opened: Opener, open_scratch: Path, open_python: dict[str, Any]) -> None:
    scratch = open_scratch / "workers"
    house = opened(1, scratch=str(scratch), user=(65534, 65534), **open_python)

    def look() -> tuple[Any, ...]:
        Path("mine").write_text("x")
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        mode = stat.S_IMODE(os.stat("mine").st_mode)
        return os.getresuid(), os.getresgid(), os.getgroups(), status["NoNewPrivs"], mode, os.stat(".").st_uid

    ids, gids, groups, sealed, mode, owner = house.result(house.call(look))
    assert (ids, gids, groups) == ((65534,) * 3, (65534,) * 3, [])
    assert (sealed, mode, owner) == ("1", 0o600, 65534)

    def regain() -> None:
        os.setuid(0)

    assert "PermissionError" in house.error(house.call(regain))
    worker = house.pids()[None][0]
    # A change of user clears what ends a worker with its template.
    os.kill(house.template_pids()[0], 9)
    eventually(lambda: not Path(f"/proc/{worker}").exists(), "the worker outlived its template")
    house.engine.close()
    assert list(scratch.iterdir()) == []


@only_root
@pytest.mark.skipif(everybody_reads(os.__file__), reason="everybody may read this interpreter")
def test_an_interpreter_that_the_user_cannot_read_is_named(opened: Opener, open_scratch: Path) -> None:
    house = opened(1, scratch=str(open_scratch / "workers"), user=(65534, 65534))
    text = house.error(house.call(os.getpid))
    assert f"(uid 65534) cannot read {os.__file__}" in text


# --- idle workers -----------------------------------------------------------------------------------------------------


def test_idle_workers_and_templates_are_ended(opened: Opener) -> None:
    house = opened(2, idle_s=0.2)
    first = house.result(house.call(os.getpid))
    assert house.template_pids()
    eventually(lambda: house.n_workers == 0, "an idle worker was kept")
    eventually(lambda: not house.template_pids(), "a template without workers was kept")
    assert house.result(house.call(os.getpid)) != first


def test_those_that_were_used_meanwhile_are_ended_later(opened: Opener) -> None:
    house = opened(2, idle_s=2.0)
    pid = house.result(house.call(os.getpid))
    time.sleep(1.0)  # half of the time after which the first look finds it used
    assert house.result(house.call(os.getpid)) == pid
    eventually(lambda: not house.template_pids(), "nobody looked again")


def test_a_busy_worker_is_not_idle(opened: Opener, tmp_path: Path) -> None:
    house = opened(2, idle_s=0.05)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    held = house.call(builtins.open, str(gate), kill_process=True)
    quick = house.call(os.getpid)
    house.result(quick)
    eventually(lambda: house.n_workers == 1, "the idle one was kept")
    open(gate, "w").close()
    house.error(held)
