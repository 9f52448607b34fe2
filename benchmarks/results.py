"""What was measured: figures by workload, system and metric; medians, spread, and how they stand to the aims."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.aims import Metric, Workload
from benchmarks.systems import N_WORKERS, SYSTEMS, VARIANTS

#: The verbs of the module: what the faces are compared with, and what the aims are for.
VERBS = "cloud"
TOO_LONG = "not done within "
"""How a failure begins that was a matter of time."""
FACE_COST = 1.15
"""How many times the cost of the verbs a face may have."""


def is_peer(name: str) -> bool:
    return not {**SYSTEMS, **VARIANTS}[name].ours


@dataclass
class Results:
    """Everything of one run.

    Attributes:
        figures: By workload and system, one dict of figures a repeat.
        failures: By workload and system: why there is none, and whether the system claims to do it.
        missing: Systems that could not be measured, and why.
        versions: Of those that were.
        notes: What else was seen, such as processes that a system left behind.
        about: The machine, the date, and the size of the run.
        out_of_time: Something was left out for want of time.
    """

    figures: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    out_of_time: bool = False

    def add(self, code: str, name: str, found: dict[str, Any]) -> None:
        """Take in what ``benchmarks.child`` found."""
        if "figures" in found:
            self.figures.setdefault(code, {}).setdefault(name, []).append(found["figures"])
        elif "not_offered" in found:
            self.failures.setdefault(code, {})[name] = f"– {found['not_offered']}"
        else:
            self.failures.setdefault(code, {})[name] = found["failed"]
        if found.get("left"):
            note = f"{name} left {found['left']} processes running after {code}"
            if note not in self.notes:
                self.notes.append(note)

    def given_up(self, code: str, name: str) -> bool:
        """True when trying again would only take time."""
        return name in self.failures.get(code, {})

    def values(self, code: str, metric: Metric, name: str) -> list[float]:
        """The figure of each repeat that has it."""
        repeats = self.figures.get(code, {}).get(name, [])
        return [figures[metric.name] for figures in repeats if metric.name in figures]

    def median(self, code: str, metric: Metric, name: str) -> float | None:
        values = self.values(code, metric, name)
        return statistics.median(values) if values else None

    def spread(self, code: str, metric: Metric, name: str) -> tuple[float, float] | None:
        """Quartiles 1 and 3; least and most when there are fewer than four repeats; None for a single one."""
        values = sorted(self.values(code, metric, name))
        if len(values) < 2:
            return None
        if len(values) < 4:
            return values[0], values[-1]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    def medians(self, code: str, metric: Metric) -> dict[str, float]:
        """By system, in the order of the systems."""
        found = {}
        for name in [*SYSTEMS, *VARIANTS]:
            median = self.median(code, metric, name)
            if median is not None:
                found[name] = median
        return found

    def systems(self) -> list[str]:
        """Those with a figure or a failure anywhere, in order."""
        seen = {name for table in (self.figures, self.failures) for found in table.values() for name in found}
        return [name for name in [*SYSTEMS, *VARIANTS] if name in seen]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Results:
        return cls(**content)


@dataclass(frozen=True, slots=True)
class Standing:
    """How the verbs stand in one metric.

    Attributes:
        workload, metric: Which.
        figure: Median of ``cloud``; None if it has none.
        best_peer: Name of the best peer, None without one.
        best: Its median.
        limit: The figure that must be kept; None if none is set or its peer is not there.
    """

    workload: Workload
    metric: Metric
    figure: float | None
    best_peer: str | None
    best: float | None
    limit: float | None

    @property
    def speed(self) -> float | None:
        """Times better than the best peer."""
        if self.figure is None or self.best is None:
            return None
        return self.metric.speed(self.figure, self.best)

    @property
    def must_met(self) -> bool | None:
        """None when that cannot be told."""
        if self.metric.must is None or self.limit is None:
            return None
        return self.figure is not None and self.metric.meets(self.figure, self.limit)

    @property
    def goal_met(self) -> bool | None:
        if self.metric.goal is None:
            return None
        return self.figure is not None and self.metric.meets(self.figure, self.metric.goal)


def standing(results: Results, workload: Workload, metric: Metric) -> Standing:
    """How the verbs stand beside the peers of the same run."""
    medians = results.medians(workload.code, metric)
    peers = {name: figure for name, figure in medians.items() if is_peer(name)}
    best_peer = metric.best(peers)
    best = None if best_peer is None else peers[best_peer]
    limit = None if metric.must is None else metric.must.figure(peers, best)
    return Standing(workload, metric, medians.get(VERBS), best_peer, best, limit)


def about_this_run(*, full: bool, repeats: int) -> dict[str, Any]:
    """The machine and the run: nothing that tells whose machine it is."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "workers": N_WORKERS,
        "size": "full" if full else "short",
        "repeats": repeats,
        "load_before": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
