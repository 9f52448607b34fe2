"""Jobs and their bytes: never read by the server, run within limits, and read by clients only as they were written."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import cloud
from cloud.errors import CloudException, JobFailed
from tests.server.raw import ask
from tests.server.running import ROOT, RunningServer

pytestmark = pytest.mark.usefixtures("closed_after")


@contextlib.contextmanager
def client_of(server: RunningServer) -> Iterator[None]:
    cloud.setkey(server.api_key, server.api_secretkey, server.url)
    try:
        yield
    finally:
        cloud.close()


# --- S2: the server unpickles nothing ---------------------------------------------------------------------------------


class Mine:
    """A value of a class of the user's."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mine) and other.n == self.n

    __hash__ = None  # type: ignore[assignment]


def test_a_whole_run_without_unpickling(tmp_path: Path) -> None:
    witness = tmp_path / "unpickled"
    env = {"UNPICKLED": str(witness)}
    server = RunningServer(tmp_path / "data", env=env, module="tests.server.never_unpickles").start()
    with client_of(server):
        assert cloud.result(cloud.call(lambda x: x + 1, 1)) == 2
        assert cloud.result(cloud.map(lambda x: x * x, range(2000))) == [x * x for x in range(2000)]
        assert cloud.result(cloud.call(Mine, 7)) == Mine(7)
        large = os.urandom(5_000_000)
        assert cloud.result(cloud.call(lambda data: data[::-1], large)) == large[::-1]

        def nested(n: int) -> Any:
            import cloud

            cloud.files.putf(str(n), "from a job")
            return cloud.result(cloud.call(lambda: n + 1))

        assert cloud.result(cloud.call(nested, 4)) == 5

        def fails() -> None:
            raise ValueError("as it should")

        failed = cloud.call(fails, _label="failing")
        with pytest.raises(JobFailed) as caught:
            cloud.result(failed)
        assert isinstance(caught.value.__cause__, ValueError)
        assert cloud.info(failed, ["status", "exception"])[failed]["status"] == "error"
        after = cloud.call(lambda: 1, _depends_on=[failed])
        with contextlib.suppress(CloudException):
            cloud.join(after)
        assert cloud.status(after) == "stalled"
        killed = cloud.call(time.sleep, 60)
        cloud.kill(killed)
        assert list(cloud.iresult(cloud.map(lambda x: x, range(20)))) == list(range(20))
        assert cloud.find(label="failing") == [failed]
        cloud.files.putf("contents", "name")
        assert cloud.files.getf("name").read() in ("contents", b"contents")
        cloud.cron.register(lambda: 5, "each minute", "* * * * *")
        assert cloud.result(cloud.cron.manual_run("each minute")) == 5
        assert cloud.cron.info("each minute")
        kept = cloud.call(lambda: {"kept": Mine(1)})
        cloud.join(kept)
    server.stop()
    with server, client_of(server):
        assert cloud.result(kept) == {"kept": Mine(1)}
        assert cloud.result(cloud.cron.manual_run("each minute")) == 5
        cloud.delete(kept)
        # What no client of ours sends: bytes that would run when they are read.
        bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
        content = {"function": "f", "reusable": True, "options": {}}
        for blobs in ([bomb, b"", b""], [b"", bomb, b""], [bomb, bomb, bomb]):
            jid = ask(server, "submit", content, blobs).content["jid"]
            ask(server, "describe", {"jids": [[jid, jid + 1]]})
            ask(server, "outcomes", {"jids": [[jid, jid + 1]]})
    assert not witness.exists(), witness.read_text()


def test_the_check_of_unpickling_can_fail(tmp_path: Path) -> None:
    source = """
import sys
sys.argv = ["cloud", "--version"]
import tests.server.never_unpickles as checked
try:
    checked.main()
except SystemExit:
    pass
import pickle
pickle.loads(pickle.dumps(1))
"""
    env = {**os.environ, "UNPICKLED": str(tmp_path / "witness"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, timeout=30, check=False)
    assert b"the server unpickles" in done.stderr
    assert (tmp_path / "witness").exists()


# --- S20: a client reads only what was written ------------------------------------------------------------------------


def test_a_changed_outcome_is_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"

    class Marks:
        def __init__(self, size: int) -> None:
            self.data = b"CONTENTS" * size

        def __setstate__(self, state: dict[str, Any]) -> None:
            marker.touch()
            self.__dict__.update(state)

    with RunningServer(tmp_path / "data") as server:
        with client_of(server):
            jids = [cloud.call(Marks, size) for size in (10, 200_000)]
            cloud.join(jids)
        server.stop()
        marker.unlink(missing_ok=True)
        n_changed = 0
        for path in (tmp_path / "data" / "groups" / "1").rglob("*"):
            if path.is_file() and "scratch" not in path.parts:
                data = path.read_bytes()
                if b"CONTENTSCONTENTS" in data:
                    n_changed += 1
                    path.write_bytes(data.replace(b"CONTENTSCONTENTS", b"CONTENTSXONTENTS"))
        assert n_changed
        server.start()
        with client_of(server):
            for jid in jids:
                with pytest.raises(CloudException):
                    cloud.result(jid)
    assert not marker.exists()


# --- S16, S18: limits and surroundings --------------------------------------------------------------------------------

LIMITS = ("--job-memory", "512M", "--job-processes", "40", "--job-file-size", "8M", "--workers", "2")


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    secret = {"AWS_SECRET_ACCESS_KEY": "hunter2", "DATABASE_URL": "postgres://hunter2"}
    with RunningServer(tmp_path_factory.mktemp("jobs") / "data", *LIMITS, env=secret) as server:
        yield server


def fork_bomb() -> None:
    import os
    import time

    for _ in range(100_000):
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)


def allocate() -> int:
    return len(bytearray(100 << 30))


def fill_disk() -> None:
    with open("filler", "wb") as file:
        for _ in range(100):
            file.write(b"x" * (1 << 20))


def flood() -> None:
    import sys

    for _ in range(200):
        sys.stdout.write("x" * (1 << 20))


@pytest.mark.parametrize("bad", [fork_bomb, allocate, fill_disk])
def test_a_job_that_wants_everything_fails_alone(limited: RunningServer, bad: Callable[[], Any]) -> None:
    assert limited.process is not None
    server = psutil.Process(limited.process.pid)
    before = server.memory_info().rss
    with client_of(limited):
        neighbour = cloud.call(lambda: sum(range(1000)))
        jid = cloud.call(bad)
        after = cloud.map(lambda x: x + 1, range(20))
        with pytest.raises(CloudException):
            cloud.result(jid)
        assert cloud.status(jid) == "error"
        assert cloud.result(neighbour) == 499_500
        assert cloud.result(after) == list(range(1, 21))
        until = time.monotonic() + 10
        while len(server.children(recursive=True)) > 20:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert server.memory_info().rss - before < 64 << 20


def test_a_flood_of_output_is_cut(limited: RunningServer) -> None:
    assert limited.process is not None
    server = psutil.Process(limited.process.pid)
    before = server.memory_info().rss
    with client_of(limited):
        jid = cloud.call(flood)
        with contextlib.suppress(CloudException):
            cloud.join(jid)
        assert len(cloud.info(jid, ["stdout"])[jid]["stdout"]) < 200_000
        assert cloud.result(cloud.call(lambda: 1)) == 1
    assert server.memory_info().rss - before < 64 << 20


def test_a_job_inherits_nothing_of_the_server(limited: RunningServer) -> None:
    assert limited.process is not None

    def look() -> dict[str, Any]:
        import os
        import resource

        files = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                files[int(name)] = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                pass
        with open("/proc/self/status") as status:
            facts = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        return {
            "environ": dict(os.environ),
            "raw": open("/proc/self/environ").read(),
            "files": files,
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "no_new_privs": facts.get("NoNewPrivs", "").strip(),
            "group": os.getpgrp(),
            "session": os.getsid(0),
            "cwd": os.getcwd(),
        }

    with client_of(limited):
        seen = cloud.result(cloud.call(look))
    assert "hunter2" not in json.dumps(seen["environ"]) + seen["raw"]
    assert limited.api_secretkey not in json.dumps(seen)
    kinds = {target.split(":")[0] for fd, target in seen["files"].items() if fd > 2}
    # Its channel, what it is called to life by, and files of its own: nothing of the server's.
    data = str(limited.data)
    opened = [target for target in seen["files"].values() if target.startswith(data)]
    assert not [path for path in opened if "scratch" not in path and not path.endswith("/lock")], opened
    assert "sqlite" not in str(seen["files"])
    assert kinds <= {"socket", "pipe", "anon_inode", "/dev/null", "/dev/shm", "/memfd", data} | set(opened) | {
        target for target in seen["files"].values() if target.startswith(("/proc/", "/dev/", "/memfd"))
    }, seen["files"]
    assert seen["core"] == (0, 0)
    assert seen["no_new_privs"] == "1"
    assert seen["group"] != os.getpgid(limited.process.pid)
    assert seen["session"] != os.getsid(limited.process.pid)
    assert "scratch" in seen["cwd"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes of other users")
def test_jobs_of_another_user_reach_nothing() -> None:
    for file in (os.path.realpath(sys.executable), __file__):
        for folder in Path(file).parents:
            if not os.stat(folder).st_mode & 0o001:
                pytest.skip(f"the interpreter, or the package, is in {folder}, which is closed to other users")
    Path(tempfile.gettempdir()).chmod(0o711)
    scratch = Path(tempfile.mkdtemp())
    scratch.chmod(0o711)
    with RunningServer(scratch / "data", "--job-users", "54000:10") as server:
        assert server.process is not None
        paths = [
            str(server.data / name) for name in ("accounts.sqlite3", "pepper", "audit.log", "groups/1/jobs.sqlite3")
        ]

        def attack(paths: list[str], pid: int) -> dict[str, str]:
            import os

            tries: dict[str, Callable[[], Any]] = {path: lambda path=path: open(path).read() for path in paths}
            tries["kill"] = lambda: os.kill(pid, 9)
            tries["environ"] = lambda: open(f"/proc/{pid}/environ").read()
            tries["memory"] = lambda: open(f"/proc/{pid}/mem", "rb").read(1)
            tries["root"] = lambda: os.setuid(0)
            found = {"uid": str(os.getuid())}
            for name, attempt in tries.items():
                try:
                    attempt()
                    found[name] = "done"
                except OSError as exc:
                    found[name] = type(exc).__name__
            return found

        with client_of(server):
            found = cloud.result(cloud.call(attack, paths, server.process.pid))
        assert int(found.pop("uid")) >= 54000
        assert set(found.values()) <= {"PermissionError"}, found


def test_the_accounts_keep_no_secret(limited: RunningServer) -> None:
    with contextlib.closing(sqlite3.connect(limited.data / "accounts.sqlite3")) as db:
        text = "".join(db.iterdump())
    assert limited.api_secretkey not in text
    assert limited.api_secretkey[4:40] not in text
