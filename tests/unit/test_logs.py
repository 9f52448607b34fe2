"""The log: what is printed, what goes into the file, and what a program's own logging sees."""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud import logs
from cloud.logs import LogFile, logger
from cloud.settings import Settings
from tests.scripts import ScriptRunner, program_environment

LINE = re.compile(r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\] - \[(\w+)\] - (Cloud[\w.]*): (.*)")


@pytest.fixture(autouse=True)
def nothing_set_up() -> Iterator[None]:
    logs.configure(None)
    yield
    logs.configure(None)


@contextmanager
def no_program_handlers() -> Iterator[None]:
    """As in a program that never configured logging: pytest did, and does so again for each test's own phase."""
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        yield
    finally:
        logging.root.handlers = handlers


def parsed(text: str) -> list[tuple[str, ...]]:
    """(level, name, message) of each line."""
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [match.groups() for match in found if match]


class TestConsole:
    def test_errors_are_printed_and_nothing_less(self, capsys: pytest.CaptureFixture[str]) -> None:
        with no_program_handlers():
            logger().error("one")
            logger("Cloud.mp").warning("two")
            logger("Cloud.mp").critical("three %d", 3)
        assert parsed(capsys.readouterr().err) == [("ERROR", "Cloud", "one"), ("CRITICAL", "Cloud.mp", "three 3")]

    @pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    def test_print_log_level(self, level: str, capsys: pytest.CaptureFixture[str]) -> None:
        logs.configure(Settings({"print_log_level": level}))
        levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
        with no_program_handlers():
            for each in levels:
                logger("Cloud.x").log(logging.getLevelName(each), "m")
        assert [row[0] for row in parsed(capsys.readouterr().err)] == levels[levels.index(level) :]

    def test_settings_that_cannot_be_read_count_as_defaults(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        home.mkdir()
        (home / "cloudconf.py").write_text("this is no python")
        with no_program_handlers():
            logger().error("still told")
        assert parsed(capsys.readouterr().err) == [("ERROR", "Cloud", "still told")]

    def test_it_follows_a_replaced_stderr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        with no_program_handlers():
            logger().error("before")
            monkeypatch.setattr(sys, "stderr", stream)
            logger().error("after")
        assert parsed(stream.getvalue()) == [("ERROR", "Cloud", "after")]


class TestTheProgramsOwnLogging:
    def test_it_decides_by_its_level_and_nothing_is_told_twice(self, run_script: ScriptRunner) -> None:
        source = """
            import logging
            logging.basicConfig(level=logging.WARNING, format="mine %(levelname)s %(message)s")
            from cloud.logs import logger
            logger("Cloud.x").info("quiet")
            logger("Cloud.x").warning("loud")
            logger("Cloud.x").error("louder")
        """
        expected = "mine WARNING loud\nmine ERROR louder\n"
        assert run_script(source).stderr == expected
        assert run_script(source, env={"CLOUD_SAVE_LOG": "1", "CLOUD_PRINT_LOG_LEVEL": "DEBUG"}).stderr == expected

    @pytest.mark.parametrize("save_log", [False, True])
    def test_levels_of_single_loggers_count(self, save_log: bool, caplog: pytest.LogCaptureFixture) -> None:
        logs.configure(Settings({"save_log": save_log}))
        logging.getLogger("Cloud.fine").setLevel(logging.DEBUG)
        try:
            caplog.handler.setLevel(0)
            logger("Cloud.fine").debug("seen")
            logger("Cloud.other").info("not seen")
            logger("Cloud.other").warning("seen too")
        finally:
            logging.getLogger("Cloud.fine").setLevel(0)
        seen = [record.getMessage() for record in caplog.records if record.name.startswith("Cloud")]
        assert seen == ["seen", "seen too"]

    @pytest.mark.parametrize("before", [True, False])
    def test_the_level_that_the_program_gives_our_logger_counts(
        self, before: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        cloud = logging.getLogger("Cloud")
        if before:
            cloud.setLevel(logging.INFO)
        logs.configure(Settings({"save_log": True}))
        if not before:
            cloud.setLevel(logging.INFO)
        try:
            logger("Cloud.x").debug("no")
            logger("Cloud.x").info("yes")
            assert [record.getMessage() for record in caplog.records] == ["yes"]
            logs.configure(None)
            assert (cloud.level, cloud.propagate) == (logging.INFO, True)
        finally:
            cloud.setLevel(0)

    def test_handlers_of_the_program_on_our_logger_stay(self) -> None:
        seen: list[str] = []

        class Keeps(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                seen.append(record.getMessage())

        mine = Keeps()
        logging.getLogger("Cloud").addHandler(mine)
        try:
            for settings in (Settings(), Settings({"save_log": True}), None):
                logs.configure(settings)
                logger("Cloud.x").error("told")
        finally:
            logging.getLogger("Cloud").removeHandler(mine)
        assert seen == ["told"] * 3


class TestFile:
    def test_save_log_writes_from_log_level_on(self, home: Path) -> None:
        logs.configure(Settings({"save_log": True, "log_level": "INFO"}))
        assert not home.exists()
        logger("Cloud.mp").debug("no")
        logger("Cloud.mp").info("yes")
        file = home / "cloud.log"
        assert parsed(file.read_text()) == [("INFO", "Cloud.mp", "yes")]
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(home.stat().st_mode) == 0o700

    def test_without_save_log_there_is_no_file(self, home: Path) -> None:
        logger().error("x")
        assert not home.exists()

    def test_log_filename(self, tmp_path: Path) -> None:
        logs.configure(Settings({"save_log": True, "log_filename": str(tmp_path / "a" / "b.log")}))
        logger().error("x")
        assert parsed((tmp_path / "a" / "b.log").read_text()) == [("ERROR", "Cloud", "x")]

    def test_a_commit_takes_effect_at_once(self, home: Path, closed_after: None) -> None:
        import cloud

        cloud.config.save_log = True
        cloud.config.log_filename = "one.log"
        cloud.config.commit()
        logger().error("first")
        cloud.config.log_filename = "two.log"
        cloud.config.commit()
        logger().error("second")
        cloud.config.save_log = False
        cloud.config.commit()
        logger().error("third")
        assert [parsed((home / f"{name}.log").read_text()) for name in ("one", "two")] == [
            [("ERROR", "Cloud", "first")],
            [("ERROR", "Cloud", "second")],
        ]

    def test_messages_with_lone_surrogates(self, home: Path) -> None:
        logs.configure(Settings({"save_log": True}))
        logger().error("%s", "\udc80")
        assert parsed((home / "cloud.log").read_text()) == [("ERROR", "Cloud", "\\udc80")]

    def test_failed_jobs_and_callbacks_are_logged(self, run_script: ScriptRunner, home: Path) -> None:
        run_script(
            """
            import cloud
            done = cloud.call(int, _callback=lambda jid: 1 / 0)
            failed = cloud.call(int, "x")
            try:
                cloud.result(failed)
            except cloud.CloudException:
                pass
            cloud.result(done)
            cloud.close()
            """,
            env={"CLOUD_SAVE_LOG": "1", "CLOUD_PRINT_LOG_LEVEL": "CRITICAL"},
        )
        text = (home / "cloud.log").read_text()
        assert "[INFO] - Cloud: Job 2: " in text
        assert "[ERROR] - Cloud: callback <function <lambda>" in text
        assert "ZeroDivisionError" in text

    def test_a_file_that_cannot_be_written_is_told_once(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        home.mkdir()
        (home / "cloud.log").mkdir()
        for level in ("CRITICAL", "ERROR"):
            logs.configure(Settings({"save_log": True, "print_log_level": level}))
            with no_program_handlers():
                logger().critical("one")
                logger().critical("two")
        assert [row[2] for row in parsed(capsys.readouterr().err)] == [
            "one",
            "two",
            "one",
            f"the log file {home / 'cloud.log'} cannot be written: Is a directory",
            "two",
        ]

    def test_threads_set_up_once(self, home: Path) -> None:
        start = threading.Barrier(8)

        def log() -> None:
            start.wait()
            logger().error("x")

        threads = [threading.Thread(target=log) for _ in range(8)]
        os.environ["CLOUD_SAVE_LOG"] = "1"
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            del os.environ["CLOUD_SAVE_LOG"]
        assert parsed((home / "cloud.log").read_text()) == [("ERROR", "Cloud", "x")] * 8


class TestRotation:
    @given(sizes=st.lists(st.integers(1, 60), max_size=60), n_old=st.integers(1, 4))
    def test_files_stay_small_and_the_newest_messages_are_kept(
        self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], n_old: int
    ) -> None:
        folder = tmp_path_factory.mktemp("log")
        path = folder / "x.log"
        log = LogFile(str(path), max_bytes=100, n_old=n_old)
        written = []
        for number, size in enumerate(sizes):
            written.append(f"{number}:".ljust(size, "x") + "\n")
            log.write(written[-1])
        files = [folder / f"x.log.{number}" for number in range(n_old + 1, 0, -1)] + [path]
        kept = [file.read_text() for file in files if file.exists()]
        assert "".join(written).endswith("".join(kept))
        assert all(len(text) <= 100 for text in kept)
        assert len(kept) <= n_old + 1
        assert len(kept) == n_old + 1 or "".join(kept) == "".join(written)

    def test_the_sizes_of_picloud(self, home: Path) -> None:
        log = LogFile(str(home / "cloud.log"))
        for _ in range(9):
            log.write("x" * (512 * 1024 - 1) + "\n")
        assert sorted(path.name for path in home.iterdir() if not path.name.endswith(".lock")) == [
            "cloud.log",
            *(f"cloud.log.{number}" for number in range(1, 8)),
        ]

    def test_processes_that_write_at_once_lose_and_mix_nothing(self, tmp_path: Path) -> None:
        source = (
            "import sys; from cloud.logs import LogFile\n"
            "log = LogFile(sys.argv[1], max_bytes=4000, n_old=1000)\n"
            "sys.stdin.read(1)\n"
            "for n in range(500): log.write(f'{sys.argv[2]} {n} ' + 'x' * (n % 90) + '.\\n')\n"
        )
        path = tmp_path / "shared.log"
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", source, str(path), str(number)], stdin=subprocess.PIPE, env=program_environment()
            )
            for number in range(4)
        ]
        for writer in writers:
            writer.communicate(b"go")
        assert [writer.returncode for writer in writers] == [0] * 4
        lines = [line for file in tmp_path.glob("shared.log*") for line in file.read_text().splitlines()]
        expected = {f"{number} {n} " + "x" * (n % 90) + "." for number in range(4) for n in range(500)}
        assert len(lines) == 2000
        assert set(lines) == expected
        assert len(list(tmp_path.glob("shared.log.*"))) > 10

    def test_a_forked_child_writes_too_whatever_its_parent_was_doing(
        self, run_script: ScriptRunner, home: Path
    ) -> None:
        source = """
            import os, signal, threading
            from cloud.logs import logger

            stop = threading.Event()

            def busy():
                while not stop.is_set():
                    logger("Cloud.parent").error("x" * 5000)

            logger("Cloud.parent").error("begins")
            thread = threading.Thread(target=busy)
            thread.start()
            for number in range(100):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(10)  # a child that waits for a lock of its parent's waits for ever
                    logger("Cloud.child").error("%d", number)
                    os._exit(0)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if code:
                    break
            stop.set()
            thread.join()
            print(number, code)
        """
        done = run_script(source, env={"CLOUD_SAVE_LOG": "1", "CLOUD_PRINT_LOG_LEVEL": "CRITICAL"})
        assert done.stdout == "99 0\n"
        assert len(list(home.glob("cloud.log.[1-7]"))) > 0
        rows = [row for file in home.glob("cloud.log*") if file.suffix != ".lock" for row in parsed(file.read_text())]
        kept = [int(row[2]) for row in rows if row[1] == "Cloud.child"]
        assert 99 in kept


def test_a_program_without_messages_does_not_import_logging(run_script: ScriptRunner) -> None:
    source = """
        import sys, cloud
        assert cloud.result(cloud.call(divmod, 7, 2)) == (3, 1)
        print("logging" in sys.modules)
        cloud.close()
    """
    assert run_script(source).stdout == "False\n"
    assert run_script(source, env={"CLOUD_SAVE_LOG": "1"}).stdout == "True\n"
