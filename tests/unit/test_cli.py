"""The command line: inside a program, and as the command that users type."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloud
from cloud.cli import main, streams
from cloud.cli.arguments import parse_jids, split_command
from cloud.cli.output import UsageError, plain, table
from cloud.client.later import pickle_job
from cloud.resources import accounts
from cloud.resources.crons import CronStore
from cloud.resources.schedule import Schedule
from tests import sample_functions as sf
from tests.scripts import program_environment

COMMAND = (sys.executable, "-m", "cloud")
Captured = pytest.CaptureFixture[str]


def tick() -> None:
    print("tick")


def fail() -> None:
    raise ValueError("no luck\ntoday")


def sleep_and_clean_up() -> None:
    try:
        Path("begun").touch()
        time.sleep(100)
    finally:
        Path("cleaned").touch()


def shell(*words: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    return subprocess.run(
        [*COMMAND, *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=program_environment(env),
        check=False,
    )


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=program_environment(options.pop("env", None)),
        **options,
    )


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(closed_after: None, capsys: Captured) -> Callable[..., tuple[int, str, str]]:
    """Run a command line inside this program: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        return (code, *capsys.readouterr())

    return run


class TestItself:
    def test_version(self, cli: Any) -> None:
        assert cli("--version") == (0, f"cloud {cloud.__version__}\n", "")
        assert shell("--version").stdout == f"cloud {cloud.__version__}\n"

    @pytest.mark.parametrize("words", [[], ["files"], ["cron"], ["config"], ["account"], ["exec"]])
    def test_help(self, cli: Any, words: Sequence[str]) -> None:
        code, out, err = cli(*words, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: {' '.join(['cloud', *words])} ")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "no command was given; see 'cloud --help'"),
            (["files"], "a command is missing; see 'cloud files --help'"),
            (["nonsense"], "invalid choice: 'nonsense'"),
            (["--nonsense"], "unrecognized arguments: --nonsense"),
            (["kill"], "the following arguments are required: JIDS; see 'cloud kill --help'"),
            (["exec", "--cores", "x", "--", "ls"], "argument --cores: invalid int value: 'x'"),
            (["exec", "ls", "-l"], "unrecognized arguments: -l; write -- before a command with options"),
            (["config", "sho"], "invalid choice: 'sho'"),
            (["--js", "config", "show"], "unrecognized arguments: --js"),
        ],
    )
    def test_wrong_usage_is_one_line_and_2(self, cli: Any, words: Sequence[str], said: str) -> None:
        code, out, err = cli(*words)
        assert (code, out) == (2, "")
        assert err.startswith("cloud: ")
        assert said in err
        assert err.count("\n") == 1

    def test_errors_as_json(self, cli: Any) -> None:
        for words in (["status", "x", "--json"], ["--json", "status", "x"], ["--json"]):
            code, out, err = cli(*words)
            assert (code, out) == (2, "")
            error = json.loads(err)["error"]
            assert (error["type"], error["exit_code"]) == ("UsageError", 2)
            assert error["message"]

    def test_debug_shows_the_traceback(self, cli: Any) -> None:
        assert "Traceback" not in cli("files", "get", "none")[2]
        assert "Traceback (most recent call last)" in cli("files", "get", "none", "--debug")[2]
        assert "Traceback" in json.loads(cli("--debug", "files", "get", "none", "--json")[2])["error"]["traceback"]

    def test_a_malformed_configuration_file(self, home: Path) -> None:
        home.mkdir()
        (home / "cloudconf.py").write_text("num_procs = -1\nnonsense = 3\n")
        done = shell("config", "show")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert "line 1" in done.stderr
        assert "line 2" in done.stderr
        assert shell("config", "path").returncode == 0

    def test_a_key_without_a_server(self) -> None:
        for words in (["status", "1"], ["exec", "--", "true"], ["cron", "run"]):
            done = shell(*words, env={"CLOUD_API_KEY": "3"})
            assert (done.returncode, done.stdout) == (2, "")
            assert "a key is set and no server: pass server_url" in done.stderr

    def test_a_reader_that_is_gone(self, tmp_path: Path) -> None:
        (tmp_path / "big").write_bytes(b"x" * 5_000_000)
        assert shell("files", "put", "big").returncode == 0
        process = start("files", "get", "big", "-")
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()

    @given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.binary(), st.lists))
    def test_everything_can_be_json(self, value: Any) -> None:
        json.dumps(plain({"value": value, 3: datetime(2024, 1, 1, tzinfo=UTC)}), allow_nan=False)

    def test_tables_line_up(self) -> None:
        assert table([("a", "bb"), ("ccc", None), (1, "")]) == "a    bb\nccc  -\n1"


class TestJids:
    @given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 50)), min_size=1, max_size=10))
    def test_ranges_include_both_ends(self, pieces: list[tuple[int, int]]) -> None:
        text = ",".join(f"{first}-{first + more}" if more else f"{first}" for first, more in pieces)
        found = parse_jids(text)
        flat = [jid for piece in ([found] if isinstance(found, range) else found) for jid in piece]
        assert flat == [jid for first, more in pieces for jid in range(first, first + more + 1)]

    @pytest.mark.parametrize("text", ["", "x", "0", "-1", "4-1", "1-", "1,,2", "1-2-3", "1.5", "\u0661", "1 2"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="write numbers and ranges, such as 1-4,7"):
            parse_jids(text)

    def test_a_huge_range_costs_nothing(self) -> None:
        assert parse_jids(f"1-{10**15}") == range(1, 10**15 + 1)


class TestJobs:
    @pytest.mark.parametrize("words", [["status", "1"], ["result", "1"], ["info", "1-3"], ["kill", "1"]])
    def test_a_process_without_jobs_says_so(self, words: list[str]) -> None:
        done = shell(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "cloud: there are no jobs here: without a server, jobs live in the program that made them and end with it; "
            f"ask inside that program, with cloud.{words[0]}(jids) or cloud.cli.main()\n"
        )

    def test_status(self, cli: Any) -> None:
        jids = cloud.map(sf.boom_if, [0, 1, 0])
        cloud.join(jids, ignore_errors=True)
        assert cli("status", "1") == (0, "1 done\n", "")
        assert cli("status", "1-3,2") == (0, "1 done\n2 error\n3 done\n2 error\n", "")
        code, out, _err = cli("status", "2,3", "--json")
        assert (code, json.loads(out)) == (0, [{"jid": 2, "status": "error"}, {"jid": 3, "status": "done"}])

    def test_jobs_of_mp_are_found(self, cli: Any) -> None:
        cloud.mp.join(cloud.mp.call(sf.nothing))
        assert cli("status", "1") == (0, "1 done\n", "")

    def test_an_unknown_job(self, cli: Any) -> None:
        cloud.join(cloud.call(sf.nothing))
        for words in (["status", "7"], ["result", "1,7"], ["info", "7"], ["kill", "7"]):
            code, out, err = cli(*words)
            assert (code, out) == (2, "")
            assert err.startswith("cloud: Job 7: ")

    def test_result(self, cli: Any) -> None:
        cloud.map(sf.identity, [3, "text", {"a": (1, None)}, b"x"])
        assert cli("result", "1") == (0, "3\n", "")
        assert cli("result", "2") == (0, "'text'\n", "")
        assert cli("result", "1-2,4") == (0, "1 3\n2 'text'\n4 b'x'\n", "")
        _code, out, _err = cli("result", "1-4", "--json")
        assert [row["result"] for row in json.loads(out)] == [3, "text", {"a": [1, None]}, "b'x'"]

    def test_the_result_of_a_failed_job(self, cli: Any) -> None:
        cloud.call(sf.boom, "bad luck")
        code, out, err = cli("result", "1")
        assert (code, out) == (1, "")
        assert err == "cloud: job 1 ended with status 'error': ValueError: bad luck (--debug shows the traceback)\n"
        code, out, err = cli("result", "1", "--debug")
        assert "sample_functions.py" in err
        error = json.loads(cli("result", "1", "--json")[2])["error"]
        assert (error["type"], error["jid"], error["exit_code"]) == ("JobFailed", 1, 1)

    def test_a_result_that_takes_too_long(self, cli: Any) -> None:
        cloud.call(sf.sleep_then, 100)
        code, out, err = cli("result", "1", "--timeout", "0.05")
        assert (code, out) == (1, "")
        assert "timed out" in err

    def test_info(self, cli: Any) -> None:
        cloud.join(cloud.call(sf.print_both, "one\ntwo", "three", _label="mine"))
        code, out, err = cli("info", "1", "status", "stdout", "label")
        assert (code, out) == (0, "job 1\n  status: done\n  stdout:\n    one\n    two\n  label: mine\n")
        (facts,) = json.loads(cli("info", "1", "all", "--json")[1])
        assert facts["jid"] == 1
        assert datetime.fromisoformat(facts["created"]).tzinfo is not None
        assert "stdout" in cli("info", "1")[1]
        code, out, err = cli("info", "1", "nonsense")
        assert (code, out) == (2, "")
        assert "no key is called 'nonsense': there are all, status, " in err

    def test_kill(self, cli: Any) -> None:
        cloud.map(sf.sleep_then, [100, 100])
        assert cli("kill", "1-2") == (0, "1 killed\n2 killed\n", "")
        assert cloud.status([1, 2]) == ["killed", "killed"]

    def test_in_the_simulator(self, cli: Any) -> None:
        cloud.start_simulator()
        cloud.call(sf.sleep_then, 1000, "late")
        assert cli("result", "1") == (0, "'late'\n", "")

    def test_in_a_program_of_the_users(self, run_script: Any) -> None:
        result = run_script(
            """
            import cloud, cloud.cli
            cloud.call(lambda: 3 * 3)
            raise SystemExit(cloud.cli.main(["result", "1"]))
            """
        )
        assert (result.stdout, result.returncode) == ("9\n", 0)


class TestExec:
    def test_output_and_exit_code_are_those_of_the_command(self) -> None:
        done = shell("exec", "--", "sh", "-c", 'echo "$1"; echo error >&2; exit 7', "sh", "a b")
        assert (done.returncode, done.stdout, done.stderr) == (7, "a b\n", "error\n")

    def test_one_word_is_a_line_for_the_shell(self, in_a_folder: Path) -> None:
        (in_a_folder / "a file").touch()
        done = shell("exec", "ls | tr a-z A-Z")
        assert (done.returncode, done.stdout) == (0, "A FILE\nHOME\n")

    def test_every_byte_arrives(self) -> None:
        source = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 40_000); sys.stderr.write('e' * 300_000)"
        done = subprocess.run(
            [*COMMAND, "exec", "--", sys.executable, "-c", source],
            capture_output=True,
            env=program_environment(),
            timeout=60,
            check=True,
        )
        assert done.stdout == bytes(range(256)) * 40_000
        assert done.stderr == b"e" * 300_000

    def test_output_comes_while_the_command_runs(self) -> None:
        process = start("exec", "--", "sh", "-c", "echo early; exec sleep 100")
        assert process.stdout is not None
        assert process.stdout.readline() == "early\n"
        assert process.poll() is None
        finish(process, signal.SIGINT)

    def test_ctrl_c_kills_the_job(self, in_a_folder: Path) -> None:
        process = start("exec", "--", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo $$; while :; do sleep 0.05; done")
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        out, err = finish(process, signal.SIGINT)
        assert (process.returncode, out, err) == (130, "bye\n", "")
        assert not psutil.pid_exists(pid)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_nothing_outlives_it(self, number: signal.Signals) -> None:
        process = start("exec", "--", "sh", "-c", "trap '' TERM INT; echo $$; sleep 100")
        assert process.stdout is not None
        command = psutil.Process(int(process.stdout.readline()))
        finish(process, number)
        assert process.returncode == -number
        psutil.wait_procs([command], timeout=5)
        assert not command.is_running()

    def test_a_reader_that_is_gone_ends_the_command(self) -> None:
        process = start("exec", "--", "yes")
        assert process.stdout is not None
        assert process.stdout.readline() == "y\n"
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()

    @pytest.mark.parametrize(
        ("command", "code", "said"),
        [
            (["no-such-command", "x"], 127, "cloud: no-such-command: No such file or directory\n"),
            (["/", "x"], 126, "cloud: /: Permission denied\n"),
            (["sh", "-c", "kill -9 $$"], 137, ""),
        ],
    )
    def test_commands_that_fail_as_in_a_shell(self, command: list[str], code: int, said: str) -> None:
        done = shell("exec", "--", *command)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", said)

    def test_options(self) -> None:
        done = shell("exec", "--max-runtime", "0.002", "--label", "mine", "--", "sleep", "100")
        assert done.returncode == 1
        assert done.stderr == "cloud: job 1 ended with status 'killed': Killed: it ran longer than its _max_runtime\n"
        done = shell("exec", "--cores", "99", "--", "true", env={"CLOUD_NUM_PROCS": "2"})
        assert done.returncode == 2
        assert "raise cloud.config.num_procs" in done.stderr

    def test_json(self) -> None:
        done = shell("exec", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
        document = json.loads(done.stdout)
        assert (done.returncode, done.stderr) == (3, "")
        assert 0 < document.pop("runtime") < 60
        assert document == {"jid": 1, "exit_code": 3, "stdout": "out\n", "stderr": "err\n"}

    def test_the_commands_own_options_are_its_own(self) -> None:
        assert split_command(["exec", "--json", "--", "ls", "--json", "--"]) == (
            ["exec", "--json"],
            ["ls", "--json", "--"],
        )
        assert split_command(["--json", "exec", "ls"]) == (["--json", "exec", "ls"], None)
        assert split_command(["files", "put", "exec", "--", "x"]) == (["files", "put", "exec", "--", "x"], None)
        assert split_command(["--", "exec"]) == (["--", "exec"], None)
        assert shell("exec", "--", "echo", "--json", "--help").stdout == "--json --help\n"

    def test_it_sees_directory_and_environment(self, in_a_folder: Path) -> None:
        done = shell("exec", "--", "sh", "-c", 'pwd; echo "$MINE"; cat', env={"MINE": "set"}, stdin="not for it")
        assert done.stdout == f"{in_a_folder}\nset\n"

    def test_without_proc(self, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "_PROC", "/nonexistent")
        words = ("exec", "--", "sh", "-c", "head -c 1000000 /dev/zero; echo err >&2; exit 3")
        assert cli(*words) == (3, "\0" * 1_000_000, "err\n")

    def test_in_the_simulator(self) -> None:
        done = shell("exec", "--", "sh", "-c", "echo out; exit 3", env={"CLOUD_USE_SIMULATOR": "1"})
        assert (done.returncode, done.stdout) == (3, "out\n")

    def test_inside_a_program_with_jobs(self, cli: Any) -> None:
        cloud.join(cloud.call(sf.nothing))
        assert cli("exec", "--", "echo", "hi") == (0, "hi\n", "")
        assert cloud.status([1, 2]) == ["done", "done"]

    def test_no_command(self, cli: Any) -> None:
        for words in (["exec"], ["exec", "--"]):
            code, out, err = cli(*words)
            assert (code, out) == (2, "")
            assert "write cloud exec -- COMMAND ARGS..., or --function" in err


class TestExecFunction:
    def test_the_result_is_printed(self, cli: Any) -> None:
        assert cli("exec", "--function", "math:hypot", "3", "4") == (0, "5.0\n", "")
        assert cli("exec", "--function", "tests.sample_functions:identity", '{"a": [null, "x"]}')[1] == (
            "{'a': [None, 'x']}\n"
        )
        assert cli("exec", "--function", "os:path.basename", '"/a/b"')[1] == "'b'\n"
        assert cli("exec", "--function", "builtins:abs", "--", "-3")[1] == "3\n"

    def test_a_module_of_the_current_directory(self, in_a_folder: Path) -> None:
        (in_a_folder / "mine.py").write_text("import sys\ndef f(x):\n    print('hello')\n    return [x]\n")
        done = shell("exec", "--function", "mine:f", '"x"')
        assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n['x']\n", "")
        document = json.loads(shell("exec", "--json", "--function", "mine:f", "1").stdout)
        assert (document["result"], document["stdout"]) == ([1], "hello\n")

    def test_a_function_that_raises(self, cli: Any) -> None:
        code, out, err = cli("exec", "--function", "tests.sample_functions:boom", '"bad"')
        assert (code, out) == (1, "")
        assert err == "cloud: job 1 ended with status 'error': ValueError: bad (--debug shows the traceback)\n"

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["math"], "'math' names no function: write package.module:function"),
            (["nowhere.at_all:x"], "module 'nowhere.at_all' cannot be imported here: ModuleNotFoundError"),
            (["math:nothing"], "module 'math' has no 'nothing'"),
            (["math:pi"], "'math:pi' is no function but float"),
            (["math:sqrt", "text"], "argument 'text' is not JSON: write numbers as they are and text as '\"text\"'"),
            (["tests.sample_functions:square"], "missing a required argument: 'x'"),
        ],
    )
    def test_what_cannot_be_called(self, cli: Any, words: list[str], said: str) -> None:
        code, out, err = cli("exec", "--function", *words)
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1

    def test_ctrl_c_kills_the_job(self, in_a_folder: Path) -> None:
        process = start("exec", "--function", "tests.unit.test_cli:sleep_and_clean_up")
        wait_until(lambda: (in_a_folder / "begun").exists())
        finish(process, signal.SIGINT)
        assert process.returncode == 130
        assert (in_a_folder / "cleaned").exists()


class TestFiles:
    def test_round_trip(self, cli: Any, in_a_folder: Path) -> None:
        (in_a_folder / "data.txt").write_bytes(b"\0data\n")
        assert cli("files", "put", "data.txt") == (0, "", "")
        assert cli("files", "put", "data.txt", "other/name") == (0, "", "")
        assert cli("files", "list") == (0, "data.txt\nother/name\n", "")
        assert cli("files", "list", "oth") == (0, "other/name\n", "")
        assert cli("files", "get", "other/name", "copy") == (0, "", "")
        assert (in_a_folder / "copy").read_bytes() == b"\0data\n"
        assert cli("files", "exists", "copy") == (1, "no\n", "")
        assert cli("files", "exists", "data.txt") == (0, "yes\n", "")
        assert cli("files", "delete", "data.txt", "other/name") == (0, "", "")
        assert cli("files", "list") == (0, "", "")

    def test_standard_input_and_output(self) -> None:
        assert shell("files", "put", "-", "name", stdin="piped").returncode == 0
        done = shell("files", "get", "name", "-")
        assert (done.returncode, done.stdout, done.stderr) == (0, "piped", "")

    def test_json(self, cli: Any, in_a_folder: Path) -> None:
        import hashlib

        (in_a_folder / "x").write_bytes(b"abc")
        md5 = hashlib.md5(b"abc").hexdigest()
        assert json.loads(cli("files", "put", "x", "--json")[1]) == {"name": "x", "md5": md5}
        assert json.loads(cli("files", "md5", "x", "--json")[1]) == {"name": "x", "md5": md5}
        assert json.loads(cli("files", "list", "--json")[1]) == ["x"]
        assert json.loads(cli("files", "exists", "x", "--json")[1]) == {"name": "x", "exists": True}
        assert json.loads(cli("files", "get", "x", "y", "--json")[1]) == {"name": "x", "path": "y"}
        code, out, _err = cli("files", "delete", "x", "z", "--json")
        assert (code, json.loads(out)) == (1, {"deleted": ["x"], "missing": ["z"]})
        assert cli("files", "get", "x", "-", "--json")[0] == 2

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            (["get", "none"], 1, "no stored file is named 'none'"),
            (["md5", "none"], 1, "no stored file is named 'none'"),
            (["delete", "none"], 1, "no stored file is called 'none'"),
            (["put", "none"], 1, "none: No such file or directory"),
            (["put", "-"], 2, "write cloud files put - NAME"),
            (["put", "none", ""], 2, "1 to 1024 characters"),
        ],
    )
    def test_what_goes_wrong(self, cli: Any, words: list[str], code: int, said: str) -> None:
        found, out, err = cli("files", *words)
        assert (found, out) == (code, "")
        assert said in err
        assert err.count("\n") == 1


class TestCron:
    def test_register_list_info_deregister(self, cli: Any) -> None:
        words = ("cron", "register", "tests.unit.test_cli:tick", "ticker", "0 3 * * mon-fri", "--tz", "Europe/Berlin")
        assert cli(*words) == (0, "", "")
        code, out, _err = cli("cron", "list")
        assert code == 0
        assert re.fullmatch(
            r"label   schedule         zone           function  next run\n"
            r"ticker  0 3 \* \* mon-fri  Europe/Berlin  tick      \d{4}-\d\d-\d\d \d\d:00 UTC\n",
            out,
        )
        facts = json.loads(cli("cron", "info", "ticker", "--json")[1])
        assert (facts["schedule"], facts["missed"], facts["last_run"]) == ("0 3 * * mon-fri", "run_once", None)
        assert "func_name:     tick\n" in cli("cron", "info", "ticker")[1]
        assert [row["label"] for row in json.loads(cli("cron", "list", "--json")[1])] == ["ticker"]
        assert cli("cron", "deregister", "ticker") == (0, "", "")
        assert cli("cron", "list") == (0, "", "")

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            (["info", "none"], 1, "no cron is registered as 'none'"),
            (["deregister", "none"], 1, "no cron is registered as 'none'"),
            (["run-now", "none"], 1, "no cron is registered as 'none'"),
            (["register", "tests.unit.test_cli:tick", "x", "99 * * * *"], 2, "Invalid min 99"),
            (["register", "tests.unit.test_cli:tick", "x", "* * * * *", "--tz", "Mars"], 2, "Invalid tz 'Mars'"),
            (["register", "tests.unit.test_cli:tick", "x", "* * * * *", "--missed", "no"], 2, "missed must be one of"),
            (["register", "tests.sample_functions:square", "x", "* * * * *"], 2, "0 (required) arguments"),
            (["preview", "@daily"], 2, "write 0 0 * * *"),
            (["preview", "* * * * *", "-n", "-3"], 2, "n must be 0 or more"),
        ],
    )
    def test_what_goes_wrong(self, cli: Any, words: list[str], code: int, said: str) -> None:
        found, out, err = cli("cron", *words)
        assert (found, out) == (code, "")
        assert said in err
        assert err.count("\n") == 1

    def test_preview(self, cli: Any) -> None:
        code, out, _err = cli("cron", "preview", "30 12 1 1 *", "-n", "3", "--tz", "Europe/Berlin")
        assert code == 0
        assert re.fullmatch(r"(\d{4}-01-01 11:30 UTC\n){3}", out)
        assert len(json.loads(cli("cron", "preview", "0 * * * *", "--json")[1])) == 5

    def test_run_now(self, cli: Any) -> None:
        cli("cron", "register", "tests.unit.test_cli:tick", "good", "0 0 1 1 *")
        cli("cron", "register", "tests.unit.test_cli:fail", "bad", "0 0 1 1 *")
        assert cli("cron", "run-now", "good") == (0, "tick\n", "")
        document = json.loads(cli("cron", "run-now", "good", "--json")[1])
        assert (document["label"], document["status"], document["stdout"]) == ("good", "done", "tick\n")
        code, out, err = cli("cron", "run-now", "bad")
        assert (code, out) == (1, "")
        assert err == "cloud: job 3 ended with status 'error': today (--debug shows the traceback)\n"

    def test_run_once(self, home: Path) -> None:
        register_late(home, "tick", "fail")
        done = shell("cron", "run", "--once")
        assert (done.returncode, done.stderr) == (1, "")
        assert sorted(re.sub(r"job \d", "job N", line) for line in done.stdout.splitlines()) == [
            "fail: job N error: today",
            "tick: job N done",
        ]
        again = shell("cron", "run", "--once", "--json")
        # A minute may have begun meanwhile.
        assert again.returncode == (1 if json.loads(again.stdout) else 0)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_run_until_a_signal(self, home: Path, in_a_folder: Path, number: signal.Signals) -> None:
        register_late(home, "tick", "fail", "sleep_and_clean_up")
        process = start("cron", "run")
        assert process.stdout is not None
        lines = read_until(process.stdout, 5)
        wait_until(lambda: (in_a_folder / "begun").exists())
        out, err = finish(process, number)
        assert process.returncode == 0
        told = [re.sub(r"^\S+Z |job \d", "", line) for line in [*lines, *out.splitlines()]]
        assert sorted(told[:5]) == [
            "fail:  error: today",
            "fail:  started",
            "sleep_and_clean_up:  started",
            "tick:  done",
            "tick:  started",
        ]
        assert "sleep_and_clean_up:  killed: cloud.errors.KilledException: Job terminated by user" in told[5:]
        assert err == f"cloud: firing the crons of {home} until Ctrl-C or SIGTERM\n"
        assert (in_a_folder / "cleaned").exists()

    def test_run_sees_what_is_registered_later(self, home: Path) -> None:
        process = start("cron", "run", "--json")
        try:
            assert process.stdout is not None
            register_late(home, "tick")
            events = [json.loads(line) for line in read_until(process.stdout, 2)]
            assert [(event["label"], event["what"]) for event in events] == [("tick", "started"), ("tick", "done")]
        finally:
            finish(process, signal.SIGTERM)
        assert process.returncode == 0

    def test_a_store_that_cannot_be_used(self, home: Path) -> None:
        home.mkdir()
        (home / "crons.sqlite3").write_text("this is no database, whatever its name says")
        done = shell("cron", "run")
        assert done.returncode == 1
        assert "is damaged" in done.stderr
        assert "Traceback" not in done.stderr


class TestConfig:
    def test_show(self, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLOUD_NUM_PROCS", "3")
        monkeypatch.setenv("CLOUD_API_SECRETKEY", "sesame")
        code, out, _err = cli("config", "show")
        assert code == 0
        assert re.search(r"^    num_procs +3 +environment CLOUD_NUM_PROCS$", out, re.MULTILINE)
        rows = {row["name"]: row for row in json.loads(cli("config", "show", "--json")[1])}
        assert (rows["num_procs"]["value"], rows["num_procs"]["origin"]) == (3, "environment CLOUD_NUM_PROCS")
        assert "sesame" not in out + json.dumps(rows)

    def test_write_and_path(self, cli: Any, home: Path, in_a_folder: Path) -> None:
        path = home / "cloudconf.py"
        assert cli("config", "path") == (0, f"{path}\n", "")
        assert json.loads(cli("config", "path", "--json")[1]) == {"path": str(path), "exists": False}
        assert cli("config", "write") == (0, f"{path}\n", "")
        written = path.read_text()
        assert "num_procs = 0" in written
        path.write_text("num_procs = 1 + 1\n")
        code, out, err = cli("config", "write")
        assert (code, out) == (2, "")
        assert f"{path} exists: --force replaces it" in err
        assert path.read_text() == "num_procs = 1 + 1\n"
        assert cli("config", "write", "--force")[0] == 0
        assert json.loads(cli("config", "write", "mine.py", "--json")[1]) == {"path": str(in_a_folder / "mine.py")}

    def test_a_folder_that_cannot_be_written(self, cli: Any) -> None:
        code, out, err = cli("config", "write", "/nonexistent/cloudconf.py")
        assert (code, out) == (1, "")
        assert "No such file or directory" in err


class TestAccount:
    ADA = {"CLOUD_ACCOUNT_USER": "ada", "CLOUD_ACCOUNT_PASSWORD": "correct horse"}

    @pytest.fixture
    def ada(self, cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        for name, value in self.ADA.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(accounts, "_PASSWORD_COST", (2, 1, 1))
        return lambda *words: cli("account", *words)

    def test_keys(self, ada: Any) -> None:
        assert ada("setuser") == (0, "", "")
        code, out, _err = ada("create", "--note", "for tests")
        assert code == 0
        assert re.fullmatch(r"api_key = 1\napi_secretkey = cld_\S+\n", out)
        key = json.loads(ada("create", "--json")[1])
        assert (key["api_key"], key["active"], key["note"]) == (2, True, "")
        assert ada("deactivate", "1") == (0, "", "")
        assert ada("note", "2", "newer") == (0, "", "")
        code, out, _err = ada("list")
        assert [line.split()[:2] for line in out.splitlines()] == [["key", "active"], ["1", "no"], ["2", "yes"]]
        keys = json.loads(ada("list", "--json")[1])
        assert [(key["note"], key["active"]) for key in keys] == [("for tests", False), ("newer", True)]
        assert "api_secretkey" not in keys[0]
        assert json.loads(ada("activate", "1", "--json")[1]) == {"api_key": 1, "active": True}

    def test_a_mistyped_password_creates_nobody(self, ada: Any, home: Path) -> None:
        code, out, err = ada("list")
        assert (code, out) == (1, "")
        assert "refused for 'ada' (cloud account setuser creates the user" in err
        assert not home.exists()

    def test_a_wrong_password(self, ada: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        ada("setuser")
        monkeypatch.setenv("CLOUD_ACCOUNT_PASSWORD", "wrong")
        for words in (["setuser"], ["list"], ["create"]):
            code, out, err = ada(*words)
            assert (code, out) == (1, "")
            assert "refused for 'ada'" in err
            assert "wrong" not in err
        assert ada("list", "--user", "bob")[0] == 1

    def test_what_goes_wrong(self, ada: Any) -> None:
        ada("setuser")
        assert "user 'ada' has no API key 7" in ada("activate", "7")[2]
        assert ada("activate", "x")[0] == 2

    def test_without_a_terminal(self) -> None:
        done = shell("account", "list")
        assert (done.returncode, done.stderr) == (2, "cloud: there is no terminal to ask on: set CLOUD_ACCOUNT_USER\n")
        done = shell("account", "list", "--user", "ada")
        assert done.stderr == "cloud: there is no terminal to ask on: set CLOUD_ACCOUNT_PASSWORD\n"

    @pytest.mark.parametrize(
        ("typed", "code", "said"),
        [
            ("ada\nhorse\nhorse\n", 0, "Password again: "),
            ("ada\nhorse\nhouse\n", 1, "the two passwords differ; nothing was changed"),
        ],
    )
    def test_at_a_terminal(self, typed: str, code: int, said: str, home: Path) -> None:
        found, shown = at_a_terminal(["account", "setuser"], typed)
        assert (found, said in shown) == (code, True), shown
        assert "horse" not in shown
        assert home.exists() == (code == 0)


def at_a_terminal(words: Sequence[str], typed: str) -> tuple[int, str]:
    """Run the real command at a terminal; each line is typed when something was asked."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(sys.executable, [*COMMAND, *words], program_environment())
    shown = ""
    try:
        for line in typed.splitlines(keepends=True):
            seen = len(shown)
            while not shown[seen:].rstrip("\r\n ").endswith((":",)):
                shown += os.read(terminal, 1024).decode()
            os.write(terminal, line.encode())
        while chunk := os.read(terminal, 1024):
            shown += chunk.decode()
    except OSError:
        pass  # Linux reports the end of the other side as an error
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def register_late(home: Path, *names: str) -> None:
    """Register functions of this module so that a slot of each was missed: it is due at once."""
    store = CronStore(str(home), lambda: datetime.now(UTC) - timedelta(minutes=3))
    for name in names:
        payload, options = pickle_job(getattr(sys.modules[__name__], name), {})
        store.register(name, Schedule("* * * * *"), payload, options=options, func_name=name)
    store.close()


def read_until(stream: IO[str], n: int) -> list[str]:
    return [stream.readline().rstrip("\n") for _ in range(n)]


def finish(process: subprocess.Popen[str], number: signal.Signals) -> tuple[str, str]:
    process.send_signal(number)
    return process.communicate(timeout=30)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
