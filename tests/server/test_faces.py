"""The other faces on a server: pool, Executor, callbacks, crons' jobs; and a program's own modules."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

import cloud
from cloud.errors import CloudTimeoutError, JobFailed
from cloud.jobs import DONE
from cloud.pool import Pool
from tests import sample_functions as sample
from tests.backends import new_credentials
from tests.server.running import ROOT, RunningServer

ON_A_SERVER = pytest.mark.parametrize("backend_name", ["http"], indirect=True)


@ON_A_SERVER
def test_a_pool_s_tasks_run_there(api: ModuleType) -> None:
    with Pool(2, backend="current") as pool:
        assert pool.map(sample.square, range(20)) == [n * n for n in range(20)]
        assert list(pool.imap_unordered(sample.square, [3, 3])) == [9, 9]
        assert "scratch" in pool.apply_async(sample.cwd).get(20)  # a folder of a server's worker


@ON_A_SERVER
def test_an_executor_s_tasks_run_there(api: ModuleType) -> None:
    with cloud.Executor(backend="current") as executor:
        assert executor.submit(sample.square, 3).result(20) == 9
        assert list(executor.map(sample.square, range(20))) == [n * n for n in range(20)]
        assert "scratch" in executor.submit(sample.cwd).result(20)


@ON_A_SERVER
def test_a_jid_is_good_in_another_process(api: ModuleType) -> None:
    key, secret, url = new_credentials()
    env = {"CLOUD_API_KEY": str(key), "CLOUD_API_SECRETKEY": secret, "CLOUD_SERVER_URL": url, "PYTHONPATH": str(ROOT)}

    def program(source: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", dedent(source)], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    jid = int(program("import cloud; print(cloud.call(lambda x: x + 1, 41))"))
    assert program(f"import cloud; print(cloud.result({jid}))") == "42\n"


@ON_A_SERVER
def test_what_is_asked_about_a_job_brings_no_result(api: ModuleType) -> None:
    jids = [api.call(bytes, 1_000_000), *api.map(bytes, [100] * 50)]
    api.join(jids)
    described = api.call.__self__.backend.describe(jids)
    assert [facts["status"] for facts in described] == [DONE] * 51
    assert sum(len(facts["outcome"].raw) for facts in described) < 10_000
    assert [len(value) for value in api.result(jids)] == [1_000_000] + [100] * 50


@ON_A_SERVER
@pytest.mark.parametrize("n_bytes", [(256 << 10) - 100, (256 << 10) + 100, 3_000_001])
def test_results_of_any_size_come_whole(api: ModuleType, n_bytes: int) -> None:
    jids = api.map(sample.random_bytes, [n_bytes, n_bytes + 1], [1, 2])
    values = api.result(jids)
    assert values == [sample.random_bytes(n_bytes, 1), sample.random_bytes(n_bytes + 1, 2)]
    # The connection is good for more.
    assert api.status(jids) == ["done", "done"]


class Program:
    """A script with modules beside it, run as a user runs it, against a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        key, secret, url = new_credentials()
        self._env = {"CLOUD_API_KEY": str(key), "CLOUD_API_SECRETKEY": secret, "CLOUD_SERVER_URL": url}

    def write(self, name: str, source: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source))

    def run(self, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "main.py"],
            cwd=self.folder,
            env={**self._env, **env, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def user(home: Path, tmp_path: Path) -> Program:
    folder = tmp_path / "user"
    folder.mkdir()
    return Program(folder)


def test_modules_beside_the_script_travel_and_travel_again_when_edited(user: Program) -> None:
    user.write(
        "helper.py", "from package.inner import base\n\ndef value():\n    import lazily\n    return base + lazily.ADD\n"
    )
    user.write("lazily.py", "ADD = 2\n")
    user.write("package/__init__.py", "")
    user.write("package/inner.py", "base = 40\n")
    user.write("main.py", "import cloud, helper\nprint(cloud.result(cloud.call(helper.value)))\n")
    assert user.run() == "42\n"
    user.write("package/inner.py", "base = 50\n")
    assert user.run() == "52\n"
    user.write(
        "main.py", "import cloud, helper\nprint(cloud.result(cloud.map(lambda n: helper.value() + n, range(3))))\n"
    )
    assert user.run() == "[52, 53, 54]\n"


def test_users_modules_of_one_name_are_not_mixed(tmp_path: Path, home: Path) -> None:
    users = []
    for number in (1, 2):
        folder = tmp_path / f"user{number}"
        folder.mkdir()
        user = Program(folder)
        user.write("helper.py", f"NUMBER = {number}\n\ndef value():\n    return NUMBER\n")
        user.write("main.py", "import cloud, helper\nprint(cloud.result(cloud.call(helper.value)))\n")
        users.append(user)
    assert [user.run() for user in users * 2] == ["1\n", "2\n"] * 2


def test_a_module_that_stays_behind_is_named_with_the_reason(user: Program) -> None:
    user.write("helper.py", "def value():\n    return 1\n")
    user.write(
        "main.py",
        """
        import cloud, helper
        try:
            cloud.result(cloud.call(helper.value))
        except cloud.CloudException as exc:
            print(exc)
        """,
    )
    for env in ({"CLOUD_AUTOMATIC_DEPENDENCY_TRANSFER": "false"}, {"CLOUD_DEPENDENCY_WHITELIST": "other"}):
        told = user.run(**env)
        assert "no module 'helper'" in told
        assert "not sent" in told


@ON_A_SERVER
def test_jobs_know_that_they_run_on_the_cloud(api: ModuleType) -> None:
    assert (cloud.is_simulated(), cloud.running_on_cloud()) == (False, False)
    assert api.result(api.call(lambda: (cloud.is_simulated(), cloud.running_on_cloud()))) == (False, True)


@ON_A_SERVER
def test_a_job_has_no_credentials(api: ModuleType) -> None:
    def look() -> tuple[str, str]:
        import os

        import cloud

        inside = cloud.result(cloud.call(len, "four"))
        return repr(dict(os.environ)), str(inside)

    environ, inside = api.result(api.call(look))
    assert inside == "4"
    assert "CLOUD_API" not in environ
    assert "cld_" not in environ


@ON_A_SERVER
def test_a_callback_runs_here(api: ModuleType) -> None:
    told = threading.Event()
    seen: list[int] = []

    def note(jid: int) -> None:
        seen.append(jid)
        told.set()

    jid = api.call(sample.square, 3, _callback=note)
    assert told.wait(20)
    assert seen == [jid]


@ON_A_SERVER
def test_an_exception_of_the_program_s_own_comes_back_as_it_is(api: ModuleType) -> None:
    with pytest.raises(JobFailed) as raised:
        api.result(api.call(sample.boom))
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_wait_ends_in_time_though_the_server_is_gone(home: Path, tmp_path: Path, closed_after: None) -> None:
    with RunningServer(tmp_path / "data") as server:
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        jid = cloud.call(sample.sleep_then, 60)
        server.kill(group=True)
        began = time.monotonic()
        with pytest.raises(CloudTimeoutError) as raised:
            cloud.join(jid, timeout=0.5)
        assert raised.value.jid == [jid]
        assert time.monotonic() - began < 10
        server.start()
        cloud.kill(jid)
        assert cloud.status(jid) == "killed"
