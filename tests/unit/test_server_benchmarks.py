"""The benchmarks of servers: tables and page, and that every workload measures what it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import Results
from benchmarks.runner import measure_pair
from benchmarks.server import page
from benchmarks.server.__main__ import CHILD, parser
from benchmarks.server.systems import SERVERS, Cloud
from benchmarks.server.tables import every_figure, failures
from benchmarks.server.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]


def results() -> Results:
    found = Results(about=dict.fromkeys(("date", "cores", "processor", "memory_gb", "system", "python"), "x"))
    found.about.update(workers=2, size="short", repeats=1, load_before=0.0)
    found.add("R", "cloud serve", {"figures": {"p50": 2.0, "p99": 4.0}})
    found.add("R", "RQ", {"figures": {"p50": 8.0, "p99": 2.0}})
    found.add("M", "cloud serve", {"figures": {"": 1000.0}})
    found.add("M", "RQ", {"failed": "not done within 40 s"})
    found.add("F", "RQ", {"not_offered": "has no files"})
    return found


def test_a_peer_s_figure_says_how_many_times_better_the_server_is() -> None:
    rows = {row[0]: row[1:] for row in every_figure(results())}
    assert rows[""] == ["cloud serve", "RQ"]
    assert rows["R p50"] == ["2.00 ms", "8.00 ms (4.00x)"]
    assert rows["R p99"] == ["4.00 ms", "2.00 ms (0.50x)"]
    assert rows["M"] == ["1.00k/s", "> 40 s"]


def test_only_what_should_work_is_a_failure() -> None:
    assert failures(results()) == ["M RQ: not done within 40 s"]


def test_the_page_keeps_what_is_not_measured(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "explanation" / page.PAGE).read_text(encoding="utf-8")
    (tmp_path / page.PAGE).write_text(text, encoding="utf-8")
    page.write(tmp_path, results())
    written = (tmp_path / page.PAGE).read_text(encoding="utf-8")
    assert "8.00 ms (4.00x)" in written
    assert written.partition(page.BEGIN)[0] == text.partition(page.BEGIN)[0]
    assert written.partition(page.END)[2] == text.partition(page.END)[2]
    assert Cloud.durability in written


def test_a_page_without_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / page.PAGE).write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="has no lines"):
        page.write(tmp_path, results())


def test_every_system_says_what_it_keeps() -> None:
    assert all(system.durability for system in SERVERS.values())


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--systems", "nothing"], ["--repeats", "0"]])
def test_wrong_words_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(words)


@pytest.mark.skipif(bool(Cloud.missing()), reason="the server's packages are not installed")
@pytest.mark.parametrize("code", ["R", "M", "L"])
def test_a_workload_gives_the_figures_it_names(code: str, tmp_path: Path) -> None:
    found = measure_pair(code, Cloud.name, str(tmp_path), full=False, limit_s=60.0, child=CHILD)
    assert "figures" in found, found
    assert "left" not in found
    assert {metric.name for metric in WORKLOADS[code].metrics} <= set(found["figures"])
    assert all(value > 0 for value in found["figures"].values())
