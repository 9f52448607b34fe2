"""Writes the measured part of docs/explanation/server-performance.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Results
from benchmarks.server.systems import SERVERS
from benchmarks.server.tables import every_figure, failures, measured, spreads
from benchmarks.server.workloads import WORKLOADS
from benchmarks.tables import as_markdown, workloads_table

PAGE = "server-performance.md"
BEGIN = "<!-- measured: what stands between these two lines is written by `python -m benchmarks.server --write` -->"
END = "<!-- measured: end -->"


def write(folder: Path, results: Results) -> None:
    """Replace the measured part of the page in this folder.

    Raises:
        ValueError: The page has lost the lines that mark the part.
    """
    page = folder / PAGE
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}; put them where the figures are to stand")
    figures = "\n\n".join(_sections(results))
    page.write_text(f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}", encoding="utf-8")


def _sections(results: Results) -> list[str]:
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items() if version)
    parts = [
        f"Measured on {about['date']}: {about['cores']} cores of {about['processor']}, {about['memory_gb']} GB, "
        f"{about['system']}, {about['python']}, {about['workers']} workers for each system, {about['size']} size, "
        f"{about['repeats']} repeats, load {about['load_before']} before. {versions}.",
        as_markdown(every_figure(results)),
    ]
    failed = failures(results)
    if failed:
        parts.append("What failed, and what else was seen:\n\n" + "\n".join(f"- {_plain(line)}" for line in failed))
    if results.missing:
        parts.append(f"Not measured: {'; '.join(results.missing.values())}.")
    parts += ["### The workloads", as_markdown(workloads_table(results, WORKLOADS.values()))]
    parts += ["### What each system keeps when the machine loses power"]
    parts += ["\n".join(f"- **{name}**: {SERVERS[name].durability}." for name in measured(results))]
    spread = spreads(results)
    if len(spread) > 1:
        parts += ["### How far the figures of `cloud serve` spread", as_markdown(spread)]
    return parts


def _plain(line: str) -> str:
    """No markup by accident."""
    return line.replace("<", "&lt;").replace("|", "\\|")
