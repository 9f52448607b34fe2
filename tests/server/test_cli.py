"""The command line against a server: what a user types in a shell."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cloud as cloud_module
from cloud.cli.logs import Follower, _overlap
from cloud.jobs import DONE, STDERR, STDOUT, Outcome, pack_outcome
from tests.contract.jobs import Gate
from tests.scripts import program_environment
from tests.server.running import RunningServer

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("cli") / "data", "--workers", "2") as server:
        yield server


@pytest.fixture
def key(running: RunningServer) -> dict[str, str]:
    """The environment of a user in a workgroup of its own."""
    number, secret = running.new_group()
    return {"CLOUD_API_KEY": str(number), "CLOUD_API_SECRETKEY": secret, "CLOUD_SERVER_URL": running.url}


@pytest.fixture
def api(key: dict[str, str], closed_after: None) -> ModuleType:
    cloud_module.setkey(key["CLOUD_API_KEY"], key["CLOUD_API_SECRETKEY"], key["CLOUD_SERVER_URL"])
    return cloud_module


@pytest.fixture
def shell(key: dict[str, str], home: Path) -> Shell:
    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cloud", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env=program_environment({**key, **env}),
            check=False,
        )

    return run


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    (tmp_path / "gate").mkdir()
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def table_of(text: str) -> list[dict[str, str]]:
    header, *rows = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def fail() -> None:
    raise ValueError("no")


def test_status_without_jids(api: ModuleType, shell: Shell, running: RunningServer) -> None:
    api.join([*api.map(abs, range(3)), api.call(fail)], ignore_errors=True)
    done = shell("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"at {running.url} (cloud {cloud_module.__version__}), with key " in done.stdout
    assert "3 done, 1 error" in done.stdout
    assert "0 of 2 in use" in done.stdout
    found = json.loads(shell("status", "--json").stdout)
    assert (found["jobs"]["done"], found["jobs"]["error"], found["n_slots"]) == (3, 1, 2)


def test_jobs(api: ModuleType, shell: Shell) -> None:
    assert (shell("jobs").stdout, shell("jobs").stderr) == ("", "cloud: there are no such jobs\n")
    first = api.call(abs, 1, _label="one\x1b[31m")
    bad = api.call(fail)
    many = api.map(abs, range(30), _label="many")
    api.join([first, bad, *many], ignore_errors=True)
    rows = table_of(shell("jobs").stdout)
    assert [int(row["jid"]) for row in rows] == list(many)[::-1][:25]
    assert [int(row["jid"]) for row in table_of(shell("jobs", "--limit", "500").stdout)] == [
        *list(many)[::-1],
        bad,
        first,
    ]
    (row,) = table_of(shell("jobs", "--status", "error,killed").stdout)
    assert (row["jid"], row["status"], row["label"], row["function"]) == (str(bad), "error", "-", f"{__name__}.fail")
    (row,) = table_of(shell("jobs", "--label", "one\x1b[31m").stdout)
    assert row["label"] == "one\\x1b[31m"
    assert len(table_of(shell("jobs", "--function", "abs", "--limit", "5").stdout)) == 5
    (document,) = json.loads(shell("jobs", "--json", "--function", "fail").stdout)
    assert (document["jid"], document["status"], document["label"], document["attempt"]) == (bad, "error", None, 1)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(document["created"])).total_seconds()) < 60
    assert json.loads(shell("jobs", "--json", "--label", "none").stdout) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("jobs", "--status", "finished"), "no status is called 'finished'"),
        (("jobs", "--limit", "0"), "--limit 0"),
        (("logs", "1-3"), "more than one job"),
        (("logs", "1", "--stdout", "--stderr"), "not allowed with"),
        (("top", "--interval", "0"), "--interval 0"),
        (("logs", "12345"), "12345"),
    ],
)
def test_wrong_usage(shell: Shell, words: tuple[str, ...], text: str) -> None:
    done = shell(*words)
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_that_is_gone_is_told_soon(shell: Shell) -> None:
    began = time.monotonic()
    done = shell("status", CLOUD_SERVER_URL="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "http://127.0.0.1:9" in done.stderr
    assert time.monotonic() - began < 20


class Talker:
    """A job that prints what it is told to, when it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, n: int) -> None:
        for step in range(n):
            while not os.path.exists(os.path.join(self.folder, str(step))):
                time.sleep(0.005)
            print(f"out {step} ä", flush=True)
            print(f"err {step}", file=sys.stderr, flush=True)

    def go_on(self, step: int) -> None:
        Path(self.folder, str(step)).touch()


def test_logs_follow_a_job(api: ModuleType, key: dict[str, str], home: Path, tmp_path: Path) -> None:
    talker = Talker(tmp_path)
    jid = api.call(talker, 3)
    command = [sys.executable, "-m", "cloud", "logs", "-f", str(jid), "--stdout"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=program_environment(key)) as following:
        assert following.stdout is not None
        for step in range(3):
            talker.go_on(step)
            # Read while the job goes on: it waits for the next step.
            assert following.stdout.readline().decode() == f"out {step} ä\n"
        assert following.stdout.read() == b""
        assert following.wait(30) == 0
    done = cloud_module.result(jid)
    assert done is None


def test_logs_of_a_job_that_ended(api: ModuleType, shell: Shell, tmp_path: Path) -> None:
    talker = Talker(tmp_path)
    for step in range(2):
        talker.go_on(step)
    jid = api.call(talker, 2)
    bad = api.call(fail)
    api.join([jid, bad], ignore_errors=True)
    done = shell("logs", str(jid))
    assert (done.stdout, done.stderr, done.returncode) == ("out 0 ä\nout 1 ä\n", "err 0\nerr 1\n", 0)
    assert shell("logs", str(jid), "--stderr").stdout == ""
    assert json.loads(shell("logs", "--json", str(jid), "--stdout").stdout) == {
        "jid": jid,
        "status": "done",
        "stdout": "out 0 ä\nout 1 ä\n",
    }
    followed = shell("logs", "-f", str(bad))
    assert followed.returncode == 1
    assert f"job {bad} ended with status 'error'" in followed.stderr


class Seen:
    """Facts of a job, step by step, through a follower that keeps 8 bytes of each stream."""

    def __init__(self) -> None:
        self.text = b""
        self.warnings: list[str] = []
        self._follower = Follower({"stdout": self._add}, self.warnings.append)

    def _add(self, content: bytes) -> None:
        self.text += content

    def live(self, printed: bytes, *, attempt: int = 1, limit: int = 8) -> None:
        live = {"stdout": printed[-limit:], "n_stdout": len(printed), "stderr": b"", "n_stderr": 0}
        self._follower.look({"attempt": attempt, "status": 2, "live": live})

    def end(self, printed: bytes, *, attempt: int = 1, limit: int = 8) -> None:
        outcome = Outcome(pack_outcome(DONE, [(STDOUT, printed[-limit:]), (STDERR, b"")]))
        self._follower.look({"attempt": attempt, "status": DONE, "outcome": outcome})


def test_a_follower_shows_everything_once() -> None:
    seen = Seen()
    seen.live(b"abc")
    seen.live(b"abc")
    seen.live(b"abcdefgh")
    seen.live(b"abcdefghijk")
    seen.end(b"abcdefghijklmn")
    assert (seen.text, seen.warnings) == (b"abcdefghijklmn", [])


def test_a_follower_tells_what_it_missed() -> None:
    seen = Seen()
    seen.live(b"abc")
    seen.live(b"abcdefghijklmno")
    assert seen.text == b"abchijklmno"
    assert seen.warnings == ["4 bytes of stdout came too fast and are not kept"]
    seen.end(b"abcdefghijklmnopq")
    assert seen.text == b"abchijklmnopq"


def test_a_follower_begins_anew_with_each_attempt() -> None:
    seen = Seen()
    seen.live(b"abc")
    seen.live(b"abcd", attempt=2)
    seen.end(b"abcde", attempt=2)
    assert (seen.text, seen.warnings) == (b"abcabcde", ["attempt 2 begins"])


@pytest.mark.parametrize(
    ("before", "after", "n"),
    [
        (b"", b"", 0),
        (b"abc", b"", 0),
        (b"", b"abc", 0),
        (b"abc", b"bcd", 2),
        (b"abc", b"xyz", 0),
        (b"aaaa", b"aaaaaa", 4),
        (b"aabaaab", b"aabx", 3),
        (b"abab", b"ababab", 4),
        (b"xabcabc", b"abcabcabd", 6),
    ],
)
def test_overlaps(before: bytes, after: bytes, n: int) -> None:
    assert _overlap(before, after) == n


def test_top_once(api: ModuleType, shell: Shell, gate: Gate) -> None:
    jid = api.call(gate.hold, _label="held")
    gate.await_begun()
    done = shell("top")
    assert (done.returncode, done.stderr) == (0, "")
    assert "slots   1 of 2 in use" in done.stdout
    assert "1 processing" in done.stdout
    assert re.search(rf"^{jid} .* held +\S*hold$", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout
    found = json.loads(shell("top", "--json").stdout)
    assert [each["jid"] for each in found["running"]] == [jid]
    assert found["running"][0]["runtime"] > 0


def test_top_at_a_terminal(api: ModuleType, key: dict[str, str], home: Path, gate: Gate) -> None:
    jid = api.call(gate.hold, _label="held")
    gate.await_begun()
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "cloud", "top", "--interval", "0.1"]
    env = program_environment({**key, "TERM": "xterm", "LINES": "24", "COLUMNS": "60"})
    with subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, env=env) as top:
        os.close(follower)
        try:
            shown = read_until(leader, lambda text: f"\n{jid} " in text and "held" in text)
            assert shown.startswith("\x1b[?1049h")
            gate.open()
            api.join(jid)
            shown += read_until(leader, lambda text: "no job runs" in text and "1 done" in text and "a second" in text)
            plain = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", shown)
            assert max(map(len, plain.split("\r\n"))) < 60
            top.send_signal(signal.SIGINT)
            shown = read_until(leader, lambda text: "\x1b[?1049l" in text)
            assert top.wait(20) == 0
        finally:
            os.close(leader)
            top.kill()


def read_until(fd: int, enough: Callable[[str], Any], timeout_s: float = 20.0) -> str:
    until, found = time.monotonic() + timeout_s, b""
    while not enough(found.decode("utf-8", "replace")):
        left = until - time.monotonic()
        assert left > 0, found
        if select.select([fd], [], [], left)[0]:
            found += os.read(fd, 65536)
    return found.decode("utf-8", "replace")
