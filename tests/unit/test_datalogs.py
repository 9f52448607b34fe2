"""Reports of what is serialised: what they tell, where they lie, when they go, and that no job notices them."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.datalogs import DataLog, _safe
from cloud.serialization.describe import describe_function, describe_value
from cloud.settings import Settings
from tests import sample_functions as sf
from tests.backends import OPENERS, forget_settings

KINDS = {"mp": "Multiprocessing", "simulator": "Simulation"}
"""Those whose jobs end with the program, so that a report is complete when it does."""
FACTOR = [2, 3]


def scale(x: int, y: int = 5, *, z: int = 6) -> float:
    print("printed", x)
    return math.pi * x * len(FACTOR)


class Unfriendly:
    """Pickles the first time, which is for the job, and never again."""

    n_pickled = 0

    def __reduce__(self) -> tuple[Any, ...]:
        Unfriendly.n_pickled += 1
        if Unfriendly.n_pickled > 1:
            raise RuntimeError("not again")
        return int, (7,)


class Run:
    """The reports of one backend."""

    def __init__(self, name: str, home: Path, cloud: ModuleType) -> None:
        self.cloud = cloud
        self.folder = home / "datalogs" / KINDS[name]

    def files(self) -> dict[str, Path]:
        """By name, once everything is written."""
        self.cloud.close()
        folders = sorted(self.folder.iterdir()) if self.folder.exists() else []
        assert len(folders) <= 1
        return {path.name: path for folder in folders for path in folder.iterdir()}

    def json(self, pattern: str) -> Any:
        """The only document whose name matches."""
        found = [path for name, path in self.files().items() if re.fullmatch(pattern, name)]
        assert len(found) == 1, self.files()
        return json.loads(found[0].read_text())


@pytest.fixture(params=KINDS)
def run(
    request: pytest.FixtureRequest, home: Path, closed_after: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    monkeypatch.setenv("CLOUD_SERIALIZE_LOGGING", "1")
    forget_settings()
    yield Run(request.param, home, OPENERS[request.param]())


class TestCalls:
    def test_the_report_of_a_call(self, run: Run) -> None:
        jid = run.cloud.call(sf.add, [1, 2], b=[3.5])
        assert run.cloud.result(jid) == [1, 2, 3.5]
        report = run.json(rf"call\.tests\.sample_functions\.add\.{jid}\.json")
        assert report["jid"] == jid
        assert report["function"]["name"] == "tests.sample_functions.add"
        assert report["function"]["travels"] == "by reference"
        assert report["function"]["modules"] == ["tests.sample_functions"]
        assert report["function"]["size_bytes"] > 0
        items = report["arguments"]["items"]
        assert [(item["name"], item["type"]) for item in items] == [("a", "list"), ("b", "list")]
        assert all(0 < item["size_bytes"] < report["arguments"]["size_bytes"] for item in items)
        assert report["result"]["status"] == "done"
        assert report["result"]["type"] == "list"
        assert report["result"]["size_bytes"] > 10
        assert report["result"]["runtime_s"] >= 0

    def test_output_lies_beside_it(self, run: Run) -> None:
        jid = run.cloud.call(sf.print_both, "to out", "to err")
        run.cloud.join(jid)
        files = run.files()
        name = f"call.tests.sample_functions.print_both.{jid}"
        assert sorted(files) == [f"{name}.json", f"{name}.stderr", f"{name}.stdout"]
        assert files[f"{name}.stdout"].read_text() == "to out\n"
        assert files[f"{name}.stderr"].read_text() == "to err\n"

    def test_a_failed_job(self, run: Run) -> None:
        jid = run.cloud.call(sf.boom, "no luck")
        run.cloud.join(jid, ignore_errors=True)
        result = run.json(r".*\.json")["result"]
        assert result["status"] == "error"
        assert result["exception"].endswith("ValueError: no luck")

    def test_a_killed_job(self, run: Run) -> None:
        first = run.cloud.call(sf.sleep_then, 100)
        run.cloud.kill(run.cloud.call(sf.nothing, _depends_on=first))
        run.cloud.kill(first)
        assert run.json(r".*nothing.*\.json")["result"]["status"] == "killed"
        assert run.json(r".*sleep_then.*\.json")["result"]["status"] == "killed"

    def test_a_job_without_an_end_has_no_result(self, run: Run) -> None:
        run.cloud.call(sf.nothing, _depends_on=run.cloud.call(sf.sleep_then, 100))
        assert run.json(r".*nothing.*\.json")["result"] is None

    def test_a_result_that_cannot_be_rebuilt_here(self, run: Run) -> None:
        jid = run.cloud.call(sf.ununpicklable_result)
        run.cloud.join(jid, ignore_errors=True)
        result = run.json(r".*\.json")["result"]
        assert result["error"] == "cannot be rebuilt here: ValueError: while unpickling"
        assert result["size_bytes"] > 0

    def test_a_large_result(self, run: Run) -> None:
        numpy = pytest.importorskip("numpy")
        jid = run.cloud.call(numpy.zeros, 1_000_000)
        assert run.cloud.result(jid).size == 1_000_000
        report = run.json(r"call\.numpy\.zeros\..*\.json")
        assert report["result"]["type"] == "numpy.ndarray"
        assert report["result"]["size_bytes"] > 8_000_000

    def test_a_deleted_job_keeps_its_report(self, run: Run) -> None:
        jid = run.cloud.call(sf.square, 3)
        run.cloud.join(jid)
        run.cloud.delete(jid)
        assert run.json(r".*\.json")["result"]["type"] == "int"

    def test_names_that_are_no_file_names(self, run: Run) -> None:
        jid = run.cloud.call(lambda: 1)
        run.cloud.join(jid)
        names = sorted(run.files())
        assert len(names) == 3
        assert all(re.fullmatch(r"call\.[\w.]+\.1\.(json|stdout|stderr)", name) for name in names), names

    def test_jobs_from_several_threads(self, run: Run) -> None:
        def submit() -> None:
            run.cloud.join([run.cloud.call(sf.square, number) for number in range(20)])

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reports = [json.loads(path.read_text()) for name, path in run.files().items() if name.endswith(".json")]
        assert sorted(report["jid"] for report in reports) == list(range(1, 81))
        assert {report["result"]["status"] for report in reports} == {"done"}

    def test_a_job_that_submits_jobs(self, run: Run) -> None:
        jid = run.cloud.call(sf.nested, 2)
        assert run.cloud.result(jid) == 2
        assert run.json(rf"call\.tests\.sample_functions\.nested\.{jid}\.json")["result"]["type"] == "int"

    def test_a_cron_run_by_hand(self, run: Run) -> None:
        import cloud

        cloud.cron.register(sf.nothing, "label", "0 0 1 1 *")
        jid = cloud.cron.manual_run("label")
        cloud.join(jid)
        assert run.json(rf"call\.tests\.sample_functions\.nothing\.{jid}\.json")["result"]["type"] == "NoneType"


class TestMaps:
    def test_one_report_and_a_line_for_each_job(self, run: Run) -> None:
        jids = run.cloud.map(sf.add, [1, "a", 2.5], [1, "b", 2])
        assert run.cloud.result(jids) == [2, "ab", 4.5]
        name = f"map.tests.sample_functions.add.{jids[0]}"
        files = run.files()
        assert sorted(files) == [f"{name}.json", f"{name}.results.jsonl"]
        report = json.loads(files[f"{name}.json"].read_text())
        assert (report["jids"], report["n_jobs"]) == ([jids[0], jids[-1]], 3)
        assert report["arguments"]["size_bytes"] > 20
        assert sorted((item["types"], item["n_jobs"]) for item in report["arguments"]["items"]) == [
            (["float", "int"], 1),
            (["int", "int"], 1),
            (["str", "str"], 1),
        ]
        lines = [json.loads(line) for line in files[f"{name}.results.jsonl"].read_text().splitlines()]
        assert {line["jid"]: line["type"] for line in lines} == dict(zip(jids, ["int", "str", "float"], strict=True))

    def test_many_small_jobs_have_a_line_each(self, run: Run) -> None:
        jids = run.cloud.map(sf.boom_if, (n == 700 for n in range(1000)))
        run.cloud.join(jids, ignore_errors=True)
        (path,) = (path for name, path in run.files().items() if name.endswith(".jsonl"))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(line["jid"] for line in lines) == list(jids)
        assert [line["jid"] for line in lines if line["status"] != "done"] == [jids[700]]

    def test_output_of_the_jobs_that_printed(self, run: Run) -> None:
        jids = run.cloud.map(sf.print_both, ["one", "two"], ["x", "y"])
        run.cloud.join(jids)
        files = run.files()
        texts = {name: path.read_text() for name, path in files.items() if name.endswith(("stdout", "stderr"))}
        name = f"map.tests.sample_functions.print_both.{jids[0]}"
        assert "".join(texts[key] for key in sorted(texts) if key.endswith("stdout")) == "one\ntwo\n"
        assert f"{name}.{jids[0]}.stderr" in texts

    def test_an_empty_map_and_one_that_fails_leave_nothing(self, run: Run) -> None:
        def broken() -> Iterator[int]:
            yield 1
            raise ValueError("broken iterable")

        assert len(run.cloud.map(sf.square, [])) == 0
        with pytest.raises(ValueError, match="broken iterable"):
            run.cloud.map(sf.square, broken())
        assert run.files() == {}


class TestDescriptions:
    def test_what_a_function_captures(self) -> None:
        inner = {"a": 1}

        def uses(x: int, y: tuple[int, ...] = (1, 2)) -> Any:
            return scale(x) + len(inner) + math.tau

        uses.__module__ = scale.__module__ = "__main__"
        try:
            facts = describe_function(uses, None)
        finally:
            uses.__module__ = scale.__module__ = __name__
        assert facts["travels"] == "by value"
        assert [(each["name"], each["type"]) for each in facts["closure"]] == [("inner", "dict")]
        assert [(each["name"], each["type"]) for each in facts["defaults"]] == [
            ("y", "tuple"),
            ("y", "int"),
            ("z", "int"),
        ]
        assert {(each["name"], each["type"]) for each in facts["globals"]} == {
            ("scale", "function"),
            ("FACTOR", "list"),
        }
        assert facts["modules"] == ["math"]
        assert all(each["size_bytes"] > 0 for key in ("closure", "defaults", "globals") for each in facts[key])

    def test_methods_partials_and_callable_objects(self) -> None:
        assert describe_function([1].append, None)["modules"] == ["builtins"]
        facts = describe_function(functools.partial(sf.add, 1, b=2), None)
        assert [(each["name"], each["type"]) for each in facts["bound"]] == [("argument 1", "int"), ("b", "int")]
        assert (facts["travels"], facts["modules"]) == ("by reference", ["tests.sample_functions"])
        facts = describe_function(Path("x").exists, None)
        assert facts["bound"][0]["type"] == "pathlib.PosixPath"
        assert facts["modules"] == ["pathlib"]

    def test_recursion_ends(self) -> None:
        def odd(n: int) -> bool:
            return n > 0 and even(n - 1)

        def even(n: int) -> bool:
            return n == 0 or odd(n - 1)

        assert [each["name"] for each in describe_function(odd, None)["closure"]] == ["even"]

    def test_what_refuses_gets_a_note(self) -> None:
        facts = describe_value(threading.Lock(), None, "lock")
        assert (facts["name"], facts["type"]) == ("lock", "_thread.lock")
        assert facts["error"].startswith("TypeError: cannot pickle")

    @given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda x: st.lists(x) | st.tuples(x, x)))
    def test_every_value_has_type_and_size(self, value: object) -> None:
        facts = describe_value(value, None)
        assert facts["type"] == type(value).__name__
        assert facts["size_bytes"] > 0

    @given(st.text())
    def test_every_name_makes_a_file_name(self, name: str) -> None:
        safe = _safe(name)
        assert len(safe.encode()) <= 150
        assert not set(safe) & set("/\\<>\0 \n:*?")
        assert _safe("a.<locals>.<lambda>") == "a.locals.lambda"


class TestFolders:
    def test_nothing_before_the_first_job(self, run: Run) -> None:
        run.cloud.connection_info()
        run.cloud.find()
        assert run.files() == {}
        assert not run.folder.parent.exists()

    def test_a_folder_for_each_run(self, home: Path, closed_after: None, monkeypatch: pytest.MonkeyPatch) -> None:
        import cloud

        monkeypatch.setenv("CLOUD_SERIALIZE_LOGGING", "1")
        forget_settings()
        for _ in range(3):
            cloud.join(cloud.call(sf.nothing))
            cloud.mp.join(cloud.mp.call(sf.nothing))
            cloud.close()
        folders = sorted((home / "datalogs" / "Multiprocessing").iterdir())
        assert len(folders) == 3
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d\.\d{6}(-\d+)?", folder.name) for folder in folders)
        assert [len(list(folder.glob("*.json"))) for folder in folders] == [2, 2, 2]

    def test_mp_reports_only_when_asked_to(self, home: Path, closed_after: None) -> None:
        import cloud

        cloud.join(cloud.call(sf.nothing))
        cloud.close()
        assert not home.exists()

    @pytest.mark.parametrize("forced", [True, False])
    def test_the_simulator_reports_unless_told_not_to(
        self, forced: bool, home: Path, closed_after: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import cloud

        if not forced:
            monkeypatch.setenv("CLOUD_FORCE_SERIALIZE_LOGGING", "0")
            forget_settings()
        cloud.start_simulator()
        cloud.join(cloud.call(sf.nothing))
        cloud.close()
        assert (home / "datalogs" / "Simulation").exists() == forced

    def test_serialize_logging_path(self, tmp_path: Path, closed_after: None, monkeypatch: pytest.MonkeyPatch) -> None:
        import cloud

        monkeypatch.setenv("CLOUD_SERIALIZE_LOGGING", "1")
        monkeypatch.setenv("CLOUD_SERIALIZE_LOGGING_PATH", str(tmp_path / "elsewhere"))
        forget_settings()
        cloud.join(cloud.call(sf.nothing))
        cloud.close()
        assert len(list((tmp_path / "elsewhere" / "Multiprocessing").glob("*/call.*.json"))) == 1

    @pytest.mark.parametrize(("purge_days", "left"), [(7, ["2020-01-02.000000-2"]), (0, None), (400, None)])
    def test_old_runs_go_when_a_new_one_begins(self, home: Path, purge_days: int, left: list[str] | None) -> None:
        folder = home / "datalogs" / "Multiprocessing"
        names = ["2020-01-01.000000", "2020-01-02.000000-2", "my notes"]
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "call.x.json").write_text("{}")
        old = time.time() - 8 * 86400
        os.utime(folder / "2020-01-01.000000", (old, old))
        os.utime(folder / "my notes", (old, old))
        log = DataLog(Settings({"purge_days": purge_days}), "Multiprocessing")
        log.do(lambda: log.write("x", b""))
        log.close()
        kept = {path.name for path in folder.iterdir() if path.name in names}
        assert kept == {"my notes", *(names if left is None else left)}

    def test_two_runs_of_the_same_second(self, home: Path) -> None:
        logs = [DataLog(Settings(), "Multiprocessing") for _ in range(12)]
        for log in logs:
            log.do(functools.partial(log.write, "x", b""))
        for log in logs:
            log.close()
        assert len(list((home / "datalogs" / "Multiprocessing").iterdir())) == 12


class TestFailures:
    def test_a_disk_that_refuses_disturbs_no_job(self, run: Run, home: Path, caplog: pytest.LogCaptureFixture) -> None:
        home.mkdir()
        (home / "datalogs").write_text("a file where the folder should be")
        assert run.cloud.result([run.cloud.call(sf.square, n) for n in range(5)]) == [0, 1, 4, 9, 16]
        assert run.cloud.result(run.cloud.map(sf.square, range(50))) == [n * n for n in range(50)]
        run.cloud.close()
        told = [record.getMessage() for record in caplog.records if record.name == "Cloud.datalogs"]
        assert len(told) == 1
        assert str(home / "datalogs") in told[0]

    def test_a_folder_that_goes_in_the_middle(self, run: Run, caplog: pytest.LogCaptureFixture) -> None:
        run.cloud.join(run.cloud.call(sf.nothing))
        (folder,) = wait_for_folders(run.folder)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        for _ in range(3):
            assert run.cloud.result(run.cloud.call(sf.square, 3)) == 9
        run.cloud.close()
        assert len([record for record in caplog.records if record.name == "Cloud.datalogs"]) == 1

    def test_arguments_that_do_not_like_to_be_looked_at(self, run: Run) -> None:
        Unfriendly.n_pickled = 0
        assert run.cloud.result(run.cloud.call(sf.identity, Unfriendly())) == 7
        (item,) = run.json(r".*\.json")["arguments"]["items"]
        assert item["error"] == "RuntimeError: not again"


def wait_for_folders(folder: Path) -> list[Path]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = list(folder.iterdir()) if folder.exists() else []
        if found and len(list(found[0].iterdir())) == 3:
            return found
        time.sleep(0.005)
    raise AssertionError("no report was written")
