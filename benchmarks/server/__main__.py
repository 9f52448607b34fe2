"""The command line: ``python -m benchmarks.server --help``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from benchmarks.__main__ import names_of, positive
from benchmarks.results import Results, about_this_run
from benchmarks.runner import measure_all
from benchmarks.server import page
from benchmarks.server.systems import SERVERS
from benchmarks.server.tables import every_figure, failures
from benchmarks.server.workloads import WORKLOADS
from benchmarks.tables import as_text, workloads_table

CHILD = (sys.executable, "-m", "benchmarks.server.child")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.server",
        description="Measure how fast a cloud server is, beside other servers of jobs on one machine.",
    )
    add = options.add_argument
    add("--full", action="store_true", help="at full size: a map of 1,000,000, 10,000 long polls")
    add("--only", type=names_of(WORKLOADS), metavar="A,B", help=f"workloads: {', '.join(WORKLOADS)}")
    add("--systems", type=_systems, metavar="A/B", help=f"systems: {' / '.join(SERVERS)}")
    add("--repeats", type=positive, metavar="N", default=3, help="runs of each pair (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--write", type=Path, metavar="DIR", help=f"write the figures into the folder's {page.PAGE}")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: take the figures of a --json FILE")
    return options


def _systems(text: str) -> list[str]:
    given = [name.strip() for name in text.split("/") if name.strip()]
    wrong = [name for name in given if name not in SERVERS]
    if wrong or not given:
        raise argparse.ArgumentTypeError(f"no {wrong[0] if wrong else text!r}; there are {' / '.join(SERVERS)}")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 when ``cloud serve`` itself failed somewhere."""
    given = parser().parse_args(arguments)
    if given.source:
        results = Results.from_dict(json.loads(given.source.read_text(encoding="utf-8")))
    else:
        results = _measure(given)
    print("\n" + as_text(every_figure(results)))
    print("\n" + as_text(workloads_table(results, WORKLOADS.values())))
    for line in [*failures(results), *(f"Not measured: {why}." for why in results.missing.values())]:
        print(line)
    if given.json:
        given.json.write_text(json.dumps(results.as_dict(), indent=1) + "\n", encoding="utf-8")
    if given.write:
        page.write(given.write, results)
    return 1 if any("cloud serve" in line for line in failures(results)) else 0


def _measure(given: argparse.Namespace) -> Results:
    # `timeout` and the like end it as Ctrl-C does: the figures so far must not be lost.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = Results(about=about_this_run(full=given.full, repeats=given.repeats))
    workloads = [WORKLOADS[code] for code in given.only or WORKLOADS]
    systems = [SERVERS[name] for name in given.systems or SERVERS]
    try:
        measure_all(
            workloads, systems, results, full=given.full, repeats=given.repeats, tell=_tell, child=CHILD
        )  # fmt: skip
    except KeyboardInterrupt:
        print("\nInterrupted: these are the figures so far.", file=sys.stderr)
    return results


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
