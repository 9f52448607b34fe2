"""Analyse every file of this interpreter's own standard library, on all cores. Run it with `make demo`.

Shown on the way: progress, one file that cannot be parsed with its traceback, and a job that never ends being killed.
"""

from __future__ import annotations

import ast
import os
import platform
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import cloud

BROKEN = '''\
"""A file that this demo wrote, with a mistake in it."""

def average(numbers):
    return sum(numbers / len(numbers)
'''
BRANCHES = frozenset(
    (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)
)
T = TypeVar("T")
IN_COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass
class Function:
    """One function of the library. The ways through it are one, and one more for each place where it branches."""

    name: str
    path: str
    line: int
    n_lines: int
    n_ways: int = 1


@dataclass
class Report:
    """What one file holds."""

    n_lines: int
    n_functions: int = 0
    n_classes: int = 0
    imports: set[str] = field(default_factory=set)
    longest: Function | None = None
    most_complex: Function | None = None


def analyse(path: str) -> Report:
    """Parse one file and measure what is in it."""
    source = Path(path).read_bytes()
    report = Report(n_lines=source.count(b"\n"))
    functions: list[Function] = []
    tree = ast.parse(source, path)
    nodes: list[tuple[ast.AST, Function | None]] = [(tree, None)]
    while nodes:
        node, inside = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = Function(node.name, path, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
            functions.append(inside)
        elif isinstance(node, ast.ClassDef):
            report.n_classes += 1
        elif isinstance(node, ast.Import):
            report.imports.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            report.imports.add(node.module.partition(".")[0])
        elif inside is not None and type(node) in BRANCHES:
            inside.n_ways += 1
        nodes += [(child, inside) for child in ast.iter_child_nodes(node)]
    report.n_functions = len(functions)
    report.longest = max(functions, key=lambda each: each.n_lines, default=None)
    report.most_complex = max(functions, key=lambda each: each.n_ways, default=None)
    return report


def run_for_ever() -> None:
    """A job gone wrong: it never ends, and no `except Exception` of its own lets it be stopped."""
    try:
        while True:
            try:
                sum(range(1000))
            except Exception:
                pass
    finally:
        print("the 'finally' block of the job was run")


# --- the demo ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the demo; the exit code is 1 if something did not go as it should."""
    began = time.perf_counter()
    # What old files look like to this interpreter is no concern of the demo.
    warnings.simplefilter("ignore")
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library_files(library))
    if not files:
        print(f"The standard library of {sys.executable} has no source files in {library}.", file=sys.stderr)
        return 1
    n_procs = cloud.connection_info()["num_procs"]
    say(bold("cloud") + ": every file of this interpreter's own standard library, analysed")
    fact("interpreter", f"{platform.python_implementation()} {platform.python_version()}, {library}")
    fact("input", f"{len(files):,} files, {sum(map(os.path.getsize, files)) / 1e6:.1f} MB")
    fact("workers", count(n_procs, "process", "processes"))

    step(1, "A plain loop in this process, to compare with")
    loop_s, in_loop = timed(lambda: [attempt(path) for path in files])
    say(f"{len(files):,} files in {loop_s:.1f} s")

    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        broken = Path(folder) / "average.py"
        broken.write_text(BROKEN)
        step(2, "cloud.map(analyse, files), with one more file that is broken")
        map_s, reports = timed(lambda: analyse_all([*files, str(broken)]))
        failed = {path: report for path, report in reports.items() if isinstance(report, cloud.CloudException)}
        good = [report for report in reports.values() if isinstance(report, Report)]
        gain = f"{loop_s / map_s:.1f} times as fast as the loop" if map_s < loop_s else "no faster than the loop"
        say(f"{len(reports):,} jobs in {map_s:.1f} s, the start of the workers included: {gain}")
        same = good == [report for report in in_loop if report is not None]
        say("the results are equal to those of the loop" if same else "THE RESULTS DIFFER FROM THOSE OF THE LOOP")
        show_library(good, library)

        step(3, f"{count(len(failed), 'file')} cannot be parsed; the other jobs did not notice")
        n_tests = sum(not {"test", "tests"}.isdisjoint(Path(path).parts) for path in failed)
        if n_tests:
            say(f"{n_tests} are test data of the library, wrong on purpose or Python 2. The one this demo wrote:")
        error = failed[str(broken)]
        quote(str(error))
        say(f"and for programs: exception.__cause__ is a {type(error.__cause__).__name__}")

    step(4, "A job that never ends, killed")
    killed = kill_runaway()

    step(5, "Summary")
    fact("analysed", f"{len(good):,} files, {sum(each.n_lines for each in good):,} lines")
    fact("failed", f"{count(len(failed), 'file')}, each with its own traceback")
    fact("killed", "1 job" if killed else "0 jobs")
    fact("plain loop", f"{loop_s:.1f} s")
    fact("cloud.map", f"{map_s:.1f} s, with {count(n_procs, 'worker')}")
    fact("machine", f"{platform.machine()}, {count(os.cpu_count() or 1, 'core')}")
    fact("whole demo", f"{time.perf_counter() - began:.1f} s")
    return 0 if same and killed else 1


def library_files(library: Path) -> list[str]:
    """Paths of the source files of the standard library, without what was installed beside it."""
    foreign = {"site-packages", "dist-packages"}
    return [str(path) for path in library.rglob("*.py") if foreign.isdisjoint(path.parts) and path.is_file()]


def attempt(path: str) -> Report | None:
    """The report on a file, None for one that cannot be parsed."""
    try:
        return analyse(path)
    except SyntaxError:
        return None


def analyse_all(paths: list[str]) -> dict[str, Report | cloud.CloudException]:
    """The report on each path, or the exception of its job; shows how far it is."""
    jids = cloud.map(analyse, paths, _label="standard library")
    found: dict[int, Report | cloud.CloudException] = {}
    quarter = len(jids) // 4
    for jid, report in cloud.iresult_unordered(jids, ignore_errors=False, progress=True):
        found[jid] = report
        if not sys.stderr.isatty() and len(found) % quarter == 0:
            say(f"{len(found):,} of {len(jids):,} jobs are finished")
    return {path: found[jid] for jid, path in zip(jids, paths, strict=True)}


def kill_runaway() -> bool:
    """Start a job that never ends, kill it, and show what became of it; True if it ended as it should."""
    jid = cloud.call(run_for_ever, _label="runaway")
    while cloud.status(jid) != "processing":
        time.sleep(0.01)
    time.sleep(1.0)
    facts = cloud.info(jid, ["status", "runtime", "pid"])[jid]
    say(f"job {jid} is {facts['status']}, for {facts['runtime']:.1f} s, in process {facts['pid']}")
    kill_s, _ = timed(lambda: cloud.kill(jid))
    facts = cloud.info(jid)[jid]
    say(f"cloud.kill({jid}) took {kill_s * 1000:.0f} ms; the job is {facts['status']}")
    say(f"what it printed: {facts['stdout'].strip()}")
    return cloud.status(jid) == "killed"


# --- what is shown ----------------------------------------------------------------------------------------------------


def show_library(reports: list[Report], library: Path) -> None:
    """Show what stands in the library."""
    say("")
    fact("lines", f"{sum(each.n_lines for each in reports):,}")
    fact("functions", f"{sum(each.n_functions for each in reports):,}")
    fact("classes", f"{sum(each.n_classes for each in reports):,}")
    longest = max((each.longest for each in reports if each.longest), key=lambda each: each.n_lines)
    fact("longest", f"{longest.n_lines:,} lines: {place(longest, library)}")
    twisted = max((each.most_complex for each in reports if each.most_complex), key=lambda each: each.n_ways)
    fact("most complex", f"{twisted.n_ways:,} ways: {place(twisted, library)}")
    show_bars("imported by", Counter(name for each in reports for name in each.imports).most_common(6))


def place(function: Function, library: Path) -> str:
    """Where a function stands."""
    return f"{function.name}, {Path(function.path).relative_to(library)}:{function.line}"


def show_bars(title: str, counts: Iterable[tuple[str, int]]) -> None:
    """Show numbers as bars, the largest 30 characters long."""
    rows = list(counts)
    for index, (name, n) in enumerate(rows):
        bar = "█" * max(1, round(30 * n / rows[0][1]))
        fact(title if index == 0 else "", f"{name:<12}{bar} {n:,} files")


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """How many seconds a function took, and what it returned."""
    began = time.perf_counter()
    value = action()
    return time.perf_counter() - began, value


def count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def say(text: str) -> None:
    print(f"  {text}".rstrip(), flush=True)


def step(number: int, text: str) -> None:
    print(f"\n{bold(f'{number}  {text}')}", flush=True)


def fact(name: str, text: str) -> None:
    say(f"{name:<14}{text}")


def quote(text: str) -> None:
    bar = "\033[31m│\033[0m" if IN_COLOUR else "|"
    for line in text.splitlines():
        say(f"  {bar} {line}")


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if IN_COLOUR else text


if __name__ == "__main__":
    sys.exit(main())
