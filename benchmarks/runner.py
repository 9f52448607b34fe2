"""Runs every pair of workload and system, each in a process of its own, repeats interleaved between the systems.

What disturbs the machine for a while disturbs all systems alike: they take turns, in another order each time. A pair
that hangs is ended with all its processes, and costs itself only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.aims import Workload
from benchmarks.processes import end_marked
from benchmarks.results import TOO_LONG, Results
from benchmarks.systems import N_WORKERS, System

ROOT = Path(__file__).resolve().parent.parent
CHILD = (sys.executable, "-m", "benchmarks.child")
_SHORT_LIMIT_S = 10.0
_START_LIMIT_S = 30.0


def measure_all(
    workloads: Iterable[Workload],
    systems: Iterable[type[System]],
    results: Results,
    *,
    full: bool,
    repeats: int,
    most_s: float = float("inf"),
    tell: Callable[[str], None] = lambda line: None,
    child: Sequence[str] = (),
) -> None:
    """Measure all pairs.

    Args:
        workloads: What to measure.
        systems: With what; ones that are missing are noted, not run.
        results: Receives what was measured.
        full: Full size.
        repeats: How often each pair runs.
        most_s: No further measurement begins after so many seconds. Peers that had to be installed give way to the
            others while the first repeats are behind this time.
        tell: Told what begins.
        child: The program that takes one measurement; `benchmarks.child` if none is named.
    """
    began = time.monotonic()
    workloads = list(workloads)
    with tempfile.TemporaryDirectory(prefix="b", ignore_cleanup_errors=True) as folder:
        for repeat in range(repeats):
            for place, workload in enumerate(workloads, 1):
                due_s = most_s * place / len(workloads) if repeat == 0 else most_s
                missing = [name for name in workload.needs if importlib.util.find_spec(name) is None]
                for system in _in_turn(_present(systems, results), repeat):
                    if results.given_up(workload.code, system.name) or (workload.ours_only and not system.ours):
                        continue
                    if missing:
                        results.add(workload.code, system.name, {"not_offered": f"needs {', '.join(missing)}"})
                    elif time.monotonic() - began > (due_s if system.install else most_s):
                        results.out_of_time = True
                    else:
                        tell(f"{repeat + 1}/{repeats} {workload.code} {system.name}")
                        limit_s = workload.limit_s if full else min(workload.limit_s, _SHORT_LIMIT_S)
                        limit_s += _START_LIMIT_S * system.heavy
                        found = measure_pair(
                            workload.code, system.name, folder, full=full, limit_s=limit_s, child=child
                        )
                        results.add(workload.code, system.name, found)


def _present(systems: Iterable[type[System]], results: Results) -> list[type[System]]:
    present = []
    for system in systems:
        why = system.missing()
        if why:
            results.missing[system.name] = why
        else:
            results.versions[system.name] = system.version()
            present.append(system)
    return present


def _in_turn(systems: list[type[System]], repeat: int) -> Iterator[type[System]]:
    """Another one begins each time, and every other time they go backwards."""
    first = repeat % max(1, len(systems))
    turned = systems[first:] + systems[:first]
    return iter(turned if repeat % 2 == 0 else turned[::-1])


def measure_pair(
    code: str, name: str, folder: str, *, full: bool, limit_s: float, child: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one workload with one system; what the child found, or why it found nothing."""
    mark = uuid.uuid4().hex
    file, errors = Path(folder, f"{mark}.json"), Path(folder, f"{mark}.err")
    arguments = [*(child or CHILD), code, name, "full" if full else "short", str(file)]
    why = ""
    with errors.open("wb") as stderr:
        # Output to nowhere: what jobs print costs the same on every terminal.
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            env=environment(folder, mark),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code_of_exit = process.wait(limit_s)
            why = f"ended with exit code {code_of_exit}"
        except subprocess.TimeoutExpired:
            why = f"{TOO_LONG}{limit_s:g} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            left = end_marked(mark)
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        found = {"failed": f"{why}: {lines[-1]}" if lines and "exit code" in why else why}
    if left and "figures" in found:
        found["left"] = left
    return found


def environment(folder: str, mark: str) -> dict[str, str]:
    """Variables of every measured program: nothing of this shell's settings for Python or for ``cloud``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLOUD_", "PYTHON"))}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "BENCHMARK": mark,
        "CLOUD_HOME": os.path.join(folder, "home"),
        "CLOUD_NUM_PROCS": str(N_WORKERS),
        "PYTHONPATH": os.pathsep.join(path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": folder,
    }
