"""Writes the measured part of docs/explanation/performance.md, and the chart that it shows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.aims import Workload
from benchmarks.chart import svg
from benchmarks.results import Results
from benchmarks.systems import VARIANTS
from benchmarks.tables import (
    aims_table,
    as_markdown,
    faces_table,
    failure_lines,
    promises_table,
    systems_table,
    workloads_table,
)

PAGE, CHART = "performance.md", "performance.svg"
BEGIN = "<!-- measured: what stands between these two lines is written by `python -m benchmarks --write` -->"
END = "<!-- measured: end -->"


def write(folder: Path, results: Results, promises: Results | None, workloads: Iterable[Workload]) -> None:
    """Replace the measured part of the page in this folder, and the chart beside it.

    Raises:
        ValueError: The page has lost the lines that mark the part.
    """
    page = folder / PAGE
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}; put them where the figures are to stand")
    workloads = list(workloads)
    measured = "\n\n".join(_sections(results, promises, workloads))
    page.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}", encoding="utf-8")
    (folder / CHART).write_text(svg(results, workloads), encoding="utf-8")


def _sections(results: Results, promises: Results | None, workloads: list[Workload]) -> list[str]:
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items() if version)
    parts = [
        f"Measured on {about['date']}: {about['cores']} cores of {about['processor']}, {about['memory_gb']} GB, "
        f"{about['system']}, {about['python']}, {about['workers']} workers for each system, {about['size']} size, "
        f"{about['repeats']} repeats.",
        f"Versions: {versions}." if versions else "No peers beside the standard library.",
        f"![The figures below as bars, longer is better]({CHART})",
        "### Beside the best peer",
        as_markdown(aims_table(results, workloads)),
    ]
    faces = faces_table(results, workloads)
    if faces:
        parts += ["### `cloud.pool` and `cloud.Executor` beside the verbs", as_markdown(faces)]
    parts += ["### Every system", as_markdown(systems_table(results, workloads))]
    failures = failure_lines(results)
    if failures:
        parts += ["What failed, and what else was seen:", "\n".join(f"- {_plain(line)}" for line in failures)]
    parts += ["### The workloads", as_markdown(workloads_table(results, workloads))]
    if promises is not None and promises.figures:
        parts += ["### What the promises cost", as_markdown(promises_table(promises, workloads)), variants_list()]
    return parts


def variants_list() -> str:
    """What each column of the table of promises changes."""
    return "\n".join(f"- **{name}**: {(variant.__doc__ or '').strip()}" for name, variant in VARIANTS.items())


def _plain(line: str) -> str:
    """No markup by accident."""
    return line.replace("<", "&lt;").replace("|", "\\|")
