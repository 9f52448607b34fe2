"""The benchmarks' machinery: processes that end, results that are checked, figures that are compared rightly.

Nothing here looks at how long something took.
"""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import page, runner, workloads
from benchmarks.__main__ import main
from benchmarks.aims import HIGHER, LOWER, Metric, Must, Workload
from benchmarks.chart import svg
from benchmarks.child import measure
from benchmarks.pace import SHORT, Effort, as_many_as_fit
from benchmarks.processes import marked
from benchmarks.results import Results, standing
from benchmarks.systems import SYSTEMS, NotOffered, System
from benchmarks.tables import aims_table, as_markdown, as_text, faces_table, failure_lines, promises_table, shown

ABOUT = {
    "date": "2026-01-01",
    "cores": 2,
    "processor": "a <processor>",
    "memory_gb": 8,
    "system": "Linux",
    "python": "CPython",
    "workers": 2,
    "size": "short",
    "repeats": 3,
}
RATE = Workload("R", "a rate", (Metric("", "/s", HIGHER, Must(2, "best"), 500),), measure=lambda *_: {})
TIME = Workload("L", "a time", (Metric("", "us", LOWER, Must(1, "loky"), 5),), measure=lambda *_: {})


class Here(System):
    """Runs everything at once in this process."""

    name = "here"
    module = "json"

    def open(self) -> None:
        self.opened = True

    def close(self) -> None:
        pass

    def submit(self, function, *args):
        try:
            return function(*args), None
        except ValueError as exc:
            return None, exc

    def result(self, handle):
        value, error = handle
        if error is not None:
            raise error
        return value

    def map(self, function, items):
        return [function(item) for item in items]


class Wrong(Here):
    """Gives other values than the jobs do."""

    def result(self, handle):
        return -1

    def map(self, function, items):
        return [-1 for _ in items]


TINY = Effort(seconds=0.01, patience_s=1.0, full=False)
SIMPLE = ["A", "H", "B", "B1k", "B30k", "B1M", "BN", "BM", "BR", "T", "C", "CM", "CD", "CN", "C1"]


def results_of(workload: Workload, figures: dict[str, list[float]]) -> Results:
    results = Results(about=ABOUT)
    for name, values in figures.items():
        for value in values:
            results.add(workload.code, name, {"figures": {workload.metrics[0].name: value}})
    return results


# --- one measurement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", SIMPLE)
def test_a_workload_gives_the_figures_it_names(code: str) -> None:
    workload = workloads.WORKLOADS[code]
    figures = measure(workload, Here(), TINY)["figures"]
    assert {metric.name for metric in workload.metrics} - {"peak"} <= set(figures)
    assert all(figure >= 0 for figure in figures.values())


@pytest.mark.parametrize("code", SIMPLE)
def test_a_wrong_result_is_no_figure(code: str) -> None:
    found = measure(workloads.WORKLOADS[code], Wrong(), TINY)
    assert "figures" not in found
    assert found["failed"].startswith("WrongResult")


def test_what_a_system_does_not_offer_is_told() -> None:
    assert measure(workloads.WORKLOADS["I"], Here(), TINY) == {"not_offered": "has no dependencies"}


def test_every_workload_can_be_named_and_has_a_goal_to_show() -> None:
    assert all(code == workload.code for code, workload in workloads.WORKLOADS.items())
    assert all(workload.metrics and workload.what for workload in workloads.WORKLOADS.values())


def test_the_slow_do_fewer() -> None:
    counts: list[int] = []

    def run(count: int) -> float:
        counts.append(count)
        return count * 1.0

    seconds, count = as_many_as_fit(run, 10_000, Effort(seconds=100.0, patience_s=1.0, full=True))
    assert (seconds, count) == (1.0, 100)
    assert max(counts) == 100


def test_the_fast_do_all() -> None:
    assert as_many_as_fit(lambda count: count * 1e-6, 10_000, SHORT) == (1e-6, 10_000)


def test_the_fast_do_all_again_and_one_slow_run_does_not_count() -> None:
    runs: list[int] = []

    def run(count: int) -> float:
        runs.append(count)
        return 0.09 if runs.count(10_000) == 1 else 0.01

    seconds, count = as_many_as_fit(run, 10_000, SHORT)
    assert (round(seconds * count, 6), count) == (0.01, 10_000)
    assert 1 < runs.count(10_000) <= 7


def test_who_takes_all_the_time_runs_once() -> None:
    runs: list[int] = []

    def run(count: int) -> float:
        runs.append(count)
        return count * SHORT.seconds / 1000

    as_many_as_fit(run, 1000, SHORT)
    assert runs.count(1000) == 1


# --- processes --------------------------------------------------------------------------------------------------------


def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> str:
    """Let the runner start this program for a measurement; the folder for it."""
    program = tmp_path / "child.py"
    program.write_text(source, encoding="utf-8")
    monkeypatch.setattr(runner, "CHILD", (sys.executable, str(program)))
    return str(tmp_path)


def test_the_runner_gives_what_the_child_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = child(
        monkeypatch,
        tmp_path,
        'import json, os, sys; json.dump({"figures": {n: 1.0 for n in sys.argv[1:4]}}, open(sys.argv[4], "w"))',
    )
    found = runner.measure_pair("A", "cloud", folder, full=False, limit_s=60)
    assert found == {"figures": {"A": 1.0, "cloud": 1.0, "short": 1.0}}


def test_a_crash_is_a_failure_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = child(monkeypatch, tmp_path, "raise RuntimeError('no luck')")
    found = runner.measure_pair("A", "cloud", folder, full=False, limit_s=60)
    assert found == {"failed": "ended with exit code 1: RuntimeError: no luck"}


def test_what_hangs_is_ended_with_all_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = child(
        monkeypatch,
        tmp_path,
        """
import os, subprocess, sys, time
# A session of its own, as daemons have.
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
with open(os.environ["TMPDIR"] + "/mark", "w") as file:
    file.write(os.environ["BENCHMARK"])
time.sleep(100)
""",
    )
    found = runner.measure_pair("A", "cloud", folder, full=False, limit_s=2)
    assert found == {"failed": "not done within 2 s"}
    assert marked((tmp_path / "mark").read_text()) == []


def test_figures_count_though_the_system_hangs_at_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = child(
        monkeypatch,
        tmp_path,
        'import sys, time; open(sys.argv[4], "w").write(\'{"figures": {"": 3}}\'); time.sleep(100)',
    )
    assert runner.measure_pair("A", "cloud", folder, full=False, limit_s=2)["figures"] == {"": 3}


def test_children_see_nothing_of_this_shells_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "CLOUD_API_KEY", "CLOUD_USE_SIMULATOR"):
        monkeypatch.setenv(name, "1")
    seen = runner.environment(str(tmp_path), "mark")
    assert {name for name in seen if name.startswith(("PYTHON", "CLOUD_"))} == {
        "CLOUD_HOME",
        "CLOUD_NUM_PROCS",
        "PYTHONPATH",
    }
    assert seen["PYTHONPATH"].split(os.pathsep)[0] == str(runner.ROOT)


def test_systems_take_turns_and_what_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measure_pair(
        code: str, name: str, folder: str, *, full: bool, limit_s: float, child: object
    ) -> dict[str, object]:
        order.append(name)
        return {"failed": "broken"} if name == "futures" else {"figures": {"": float(len(order))}}

    monkeypatch.setattr(runner, "measure_pair", measure_pair)
    results = Results()
    systems = [SYSTEMS[name] for name in ("cloud", "multiprocessing", "futures")]
    runner.measure_all([RATE], systems, results, full=False, repeats=3)
    assert order[:3] == ["cloud", "multiprocessing", "futures"]
    assert order.count("futures") == 1
    assert order.count("cloud") == order.count("multiprocessing") == 3
    assert order[3:5] == ["cloud", "multiprocessing"] or order[3:5] == ["multiprocessing", "cloud"]
    assert failure_lines(results) == ["R futures: broken"]
    assert len(results.values("R", RATE.metrics[0], "cloud")) == 3


def test_without_time_nothing_more_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_pair", lambda *args, **options: pytest.fail("began"))
    results = Results()
    runner.measure_all([RATE], [SYSTEMS["cloud"]], results, full=False, repeats=2, most_s=-1)
    assert results.out_of_time
    assert results.figures == {}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(Here):
        name = "absent"
        module = "no_such_package_anywhere"

    results = Results()
    runner.measure_all([RATE], [Absent], results, full=False, repeats=1)
    assert results.missing == {"absent": "no_such_package_anywhere is not installed"}


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_rate_is_compared_with_the_best_peer() -> None:
    results = results_of(RATE, {"cloud": [90, 100, 300], "multiprocessing": [40], "futures": [60], "cloud.pool": [900]})
    found = standing(results, RATE, RATE.metrics[0])
    assert (found.figure, found.best_peer, found.best, found.limit) == (100, "futures", 60, 120)
    assert found.speed == pytest.approx(100 / 60)
    assert (found.must_met, found.goal_met) == (False, False)


def test_a_time_is_better_when_it_is_less() -> None:
    results = results_of(TIME, {"cloud": [4.0], "futures": [3.0], "loky": [8.0]})
    found = standing(results, TIME, TIME.metrics[0])
    assert (found.best_peer, found.limit) == ("futures", 8.0)
    assert found.speed == 0.75
    assert (found.must_met, found.goal_met) == (True, True)


def test_without_the_peer_that_is_asked_for_there_is_no_verdict() -> None:
    found = standing(results_of(TIME, {"cloud": [4.0], "futures": [3.0]}), TIME, TIME.metrics[0])
    assert found.must_met is None


def test_no_figure_of_its_own_misses_what_is_asked() -> None:
    results = results_of(RATE, {"futures": [60.0]})
    results.add("R", "cloud", {"failed": "broken"})
    assert standing(results, RATE, RATE.metrics[0]).must_met is False
    assert aims_table(results, [RATE])[1][1] == "FAILED"


def test_the_spread_is_that_of_the_repeats() -> None:
    metric = RATE.metrics[0]
    assert results_of(RATE, {"cloud": [1.0]}).spread("R", metric, "cloud") is None
    assert results_of(RATE, {"cloud": [3.0, 1.0, 2.0]}).spread("R", metric, "cloud") == (1.0, 3.0)
    assert results_of(RATE, {"cloud": [1.0, 2.0, 3.0, 4.0, 50.0]}).spread("R", metric, "cloud") == (2.0, 4.0)


def test_a_face_may_cost_a_little_more() -> None:
    table = faces_table(results_of(TIME, {"cloud": [10.0], "cloud.pool": [11.0], "cloud.Executor": [12.0]}), [TIME])
    assert table[1] == ["L", "1.10x", "met", "1.20x", "MISSED"]
    table = faces_table(results_of(RATE, {"cloud": [100.0], "cloud.pool": [80.0]}), [RATE])
    assert table[1] == ["R", "1.25x", "MISSED"]


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [
        (17.31, "us", "17.3 µs"),
        (10_700, "us", "10.7 ms"),
        (0.131, "s", "131 ms"),
        (447_000, "/s", "447k/s"),
        (8_770_000, "/s", "8.77M/s"),
        (97.53, "%", "97.5 %"),
        (0.05, "%", "0.05 %"),
        (1802, "s", "1,802 s"),
        (None, "s", "–"),
    ],
)
def test_figures_are_shown_in_a_size_that_suits_them(figure: float | None, unit: str, text: str) -> None:
    assert shown(figure, unit) == text


# --- what is written --------------------------------------------------------------------------------------------------


def test_tables_line_up() -> None:
    rows = [["", "cloud"], ["A", "1 s"], ["long", "–"]]
    assert as_text(rows) == "      cloud\nA       1 s\nlong      –"
    assert as_markdown(rows).splitlines() == ["|  | cloud |", "| --- | ---: |", "| A | 1 s |", "| long | – |"]


def test_the_chart_has_a_bar_a_system_in_proportion() -> None:
    results = results_of(RATE, {"cloud": [100.0], "cloud.pool": [50.0], "futures": [25.0]})
    drawing = ET.fromstring(svg(results, [RATE]))
    bars = {
        bar.get("class"): float(bar.get("width") or 0)
        for bar in drawing.iter("{http://www.w3.org/2000/svg}rect")
        if bar.get("class") != "page"
    }
    assert bars["verbs"] == pytest.approx(2 * bars["face"], abs=0.2)
    assert bars["verbs"] == pytest.approx(4 * bars["peer"], abs=0.2)


def test_the_page_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    text = f"before\n\n{page.BEGIN}\nold figures\n{page.END}\n\nafter\n"
    (tmp_path / page.PAGE).write_text(text, encoding="utf-8")
    results = results_of(RATE, {"cloud": [100.0], "futures": [25.0]})
    promises = results_of(RATE, {"cloud": [100.0], "no capture": [200.0]})
    page.write(tmp_path, results, promises, [RATE])
    written = (tmp_path / page.PAGE).read_text(encoding="utf-8")
    assert written.startswith("before\n\n") and written.endswith("\n\nafter\n")
    assert "old figures" not in written
    assert "100/s" in written and "200/s (0.50x)" in written
    assert (tmp_path / page.CHART).exists()
    page.write(tmp_path, results, promises, [RATE])
    assert (tmp_path / page.PAGE).read_text(encoding="utf-8") == written


def test_a_page_without_its_marks_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / page.PAGE).write_text("by hand", encoding="utf-8")
    with pytest.raises(ValueError, match="has no lines"):
        page.write(tmp_path, results_of(RATE, {"cloud": [1.0]}), None, [RATE])
    assert (tmp_path / page.PAGE).read_text(encoding="utf-8") == "by hand"


def test_the_pages_own_marks_are_there() -> None:
    text = (runner.ROOT / "docs" / "explanation" / page.PAGE).read_text(encoding="utf-8")
    assert text.index(page.BEGIN) < text.index(page.END)


def test_promises_show_their_cost() -> None:
    results = results_of(TIME, {"cloud": [10.0], "no capture": [5.0]})
    assert promises_table(results, [TIME])[1] == ["L", "10.0 µs", "5.00 µs (0.50x)"]


def test_the_command_measures_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    chart = tmp_path / "chart.svg"
    arguments = ["--only", "A", "--systems", "cloud,futures", "--repeats", "1", "--json", str(file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "futures" in printed
    assert set(json.loads(file.read_text())["results"]["figures"]["A"]) == {"cloud", "futures"}
    assert main(["--from", str(file), "--svg", str(chart)]) == 0
    assert capsys.readouterr().out == printed
    assert "cloud" in chart.read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["--only", "Z"], ["--systems", "abacus"], ["--repeats", "0"]])
def test_a_wrong_word_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_what_a_job_cannot_offer_is_not_a_failure() -> None:
    results = Results()
    results.add("R", "joblib", {"not_offered": str(NotOffered("has no handles"))})
    assert failure_lines(results) == []
    assert results.given_up("R", "joblib")
