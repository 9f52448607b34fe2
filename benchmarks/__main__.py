"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import page
from benchmarks.aims import Workload
from benchmarks.chart import svg
from benchmarks.results import VERBS, Results, about_this_run
from benchmarks.runner import measure_all
from benchmarks.systems import SYSTEMS, VARIANTS, System
from benchmarks.tables import (
    aims_table,
    as_text,
    faces_table,
    failure_lines,
    promises_table,
    systems_table,
    workloads_table,
)
from benchmarks.workloads import WORKLOADS

_SHORT_S = 140.0
"""Seconds after which a short run begins no further measurement: with the last one it stays below three minutes."""
_PROMISES = ("A", "B", "BP", "C", "C1", "D")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure how fast cloud is, beside the other ways of running Python functions on one machine.",
    )
    add = options.add_argument
    add("--full", action="store_true", help="every installed peer, at full size: most of an hour")
    add("--only", type=names_of(WORKLOADS), metavar="A,B", help=f"workloads: {', '.join(WORKLOADS)}")
    add("--systems", type=names_of(SYSTEMS), metavar="A,B", help=f"systems: {', '.join(SYSTEMS)}")
    add("--repeats", type=positive, metavar="N", help="runs of each pair (default: 3)")
    add("--promises", action="store_true", help="measure cloud with each promise switched off instead of the peers")
    add("--no-promises", action="store_true", help="with --write: leave that table out")
    add("--no-details", action="store_true", help="print only how cloud stands, not every figure")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--svg", type=Path, metavar="FILE", help="write the chart there")
    add("--write", type=Path, metavar="FOLDER", help="write the figures into the folder's performance.md, with chart")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: take the figures of a --json FILE")
    return options


def names_of(known: Iterable[str]):
    def names(text: str) -> list[str]:
        given = [name.strip() for name in text.split(",") if name.strip()]
        wrong = [name for name in given if name not in known]
        if wrong or not given:
            raise argparse.ArgumentTypeError(f"no {wrong[0] if wrong else text!r}; there are {', '.join(known)}")
        return given

    return names


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 when ``cloud`` itself failed somewhere."""
    given = parser().parse_args(arguments)
    if given.source:
        content = json.loads(given.source.read_text(encoding="utf-8"))
        parts = [content["results"], content["promises"]]
        results, promises = [None if part is None else Results.from_dict(part) for part in parts]
    else:
        results, promises = _measure(given)
    workloads = list(WORKLOADS.values())
    if results is not None:
        _print(results, workloads, details=not given.no_details)
    if promises is not None:
        print("\nWhat the promises cost: the figure, and how many times the cost of the first column")
        print(as_text(promises_table(promises, workloads)))
        print("\n" + page.variants_list().replace("- **", "  ").replace("**", ""))
        print("".join(f"\n{line}" for line in failure_lines(promises)))
    if given.json:
        content = {"results": results and results.as_dict(), "promises": promises and promises.as_dict()}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if results is not None and given.svg:
        given.svg.write_text(svg(results, workloads), encoding="utf-8")
    if results is not None and given.write:
        page.write(given.write, results, promises, workloads)
    failed = [found for found in (results, promises) if found and _own_failures(found)]
    return 1 if failed else 0


def _measure(given: argparse.Namespace) -> tuple[Results | None, Results | None]:
    # `timeout` and the like end it as Ctrl-C does: an hour's figures must not be lost.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    repeats = given.repeats or 3
    about = about_this_run(full=given.full, repeats=repeats)
    most_s = float("inf") if given.full or given.repeats or given.only or given.systems else _SHORT_S

    def run(codes: Iterable[str], systems: Iterable[type[System]]) -> Results:
        results = Results(about=about)
        workloads = [WORKLOADS[code] for code in codes]
        try:
            measure_all(workloads, systems, results, full=given.full, repeats=repeats, most_s=most_s, tell=_Progress())
        except KeyboardInterrupt:
            print("\nInterrupted: these are the figures so far.", file=sys.stderr)
        return results

    results = promises = None
    if not given.promises:
        results = run(given.only or WORKLOADS, _systems(given))
    if given.promises or (given.write and not given.no_promises):
        promises = run(given.only or _PROMISES, [SYSTEMS[VERBS], *VARIANTS.values()])
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return results, promises


def _systems(given: argparse.Namespace) -> list[type[System]]:
    if given.systems:
        return [SYSTEMS[name] for name in given.systems]
    return [system for system in SYSTEMS.values() if given.full or not system.heavy]


class _Progress:
    """Shows what is being measured: in one line at a terminal, else in one a repeat and workload."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = ""

    def __call__(self, line: str) -> None:
        seconds = time.monotonic() - self._began
        if sys.stderr.isatty():
            print(f"\r\033[K{seconds:4.0f} s  {line}", end="", file=sys.stderr, flush=True)
            return
        workload = line.rpartition(" ")[0]
        if workload != self._last:
            self._last = workload
            print(f"{seconds:4.0f} s  {workload}", file=sys.stderr, flush=True)


def _print(results: Results, workloads: list[Workload], *, details: bool) -> None:
    about = results.about
    print(f"{about['cores']} cores of {about['processor']}, {about['system']}, {about['python']},", end=" ")
    print(f"{about['workers']} workers, {about['size']} size, {about['repeats']} repeats, {about['date']}")
    print("\n" + as_text(aims_table(results, workloads)))
    for table in (faces_table(results, workloads), *([systems_table(results, workloads)] if details else [])):
        if table:
            print("\n" + as_text(table))
    if details:
        print("\n" + as_text(workloads_table(results, workloads)))
    for line in failure_lines(results):
        print(f"\n{line}", end="")
    print()
    if results.out_of_time:
        print("\nSome measurements were left out to end in three minutes; --full takes all of them.")
    _print_missing(results)


def _print_missing(results: Results) -> None:
    if results.missing:
        print("\nNot measured: " + "; ".join(results.missing.values()) + ".")
    install = [SYSTEMS[name].install for name in results.missing if SYSTEMS[name].install]
    if install:
        print("To add them:  pip install " + " ".join(f"'{each}'" if "[" in each else each for each in install))


def _own_failures(results: Results) -> list[str]:
    return [line for line in failure_lines(results) if line.split()[1].rstrip(":") in {VERBS, *VARIANTS}]


if __name__ == "__main__":
    sys.exit(main())
