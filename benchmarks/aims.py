"""What is to be reached: how a figure is named, which way it is better, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

LOWER = "lower"
HIGHER = "higher"


@dataclass(frozen=True, slots=True)
class Must:
    """The floor.

    Attributes:
        limit: The figure to keep, or how many times that of ``of``.
        of: '' for a figure as such, 'best' for the best peer, or the name of a peer.
    """

    limit: float
    of: str = ""

    def figure(self, peers: dict[str, float], best: float | None) -> float | None:
        """The figure to keep beside these peers; None if the one it is measured by is not there."""
        if not self.of:
            return self.limit
        beside = best if self.of == "best" else peers.get(self.of)
        return None if beside is None else self.limit * beside


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a workload.

    Attributes:
        name: Tells it from the workload's other figures; may be empty.
        unit: Of the figure: us, ms, s, /s, %, MB, GB/s, x.
        better: LOWER or HIGHER.
        must: The floor; None if none is set.
        goal: What we are after, in the unit; None if none is set.
        for_faces: False where it says nothing of a face beside the verbs.
    """

    name: str
    unit: str
    better: str
    must: Must | None = None
    goal: float | None = None
    for_faces: bool = True

    def meets(self, figure: float, limit: float) -> bool:
        return figure <= limit if self.better == LOWER else figure >= limit

    def best(self, figures: dict[str, float]) -> str | None:
        """The name with the best figure; None if there are none."""
        if not figures:
            return None
        return (min if self.better == LOWER else max)(figures, key=lambda name: figures[name])

    def speed(self, figure: float, beside: float) -> float:
        """How many times better than another figure: 2.0 is half the time, or double the rate."""
        if self.better == LOWER:
            figure, beside = beside, figure
        return figure / beside if beside else float("inf")


@dataclass(frozen=True, slots=True)
class Workload:
    """Something that users do, measured the same way with every system.

    Attributes:
        code: Short name, as the aims use it.
        what: What is done, for people.
        metrics: The figures it gives.
        measure: Does it: ``measure(system, effort)`` gives the figures by metric name, and anything else worth keeping.
        needs: Modules that it needs.
        opens: False when it starts the system itself.
        ours_only: A promise of this package alone; peers are not measured.
        limit_s: Seconds that one measurement may take, system's start included, at full size.
    """

    code: str
    what: str
    metrics: tuple[Metric, ...]
    measure: Callable[..., dict[str, float]]
    needs: tuple[str, ...] = ()
    opens: bool = True
    ours_only: bool = False
    limit_s: float = 60.0

    def title(self, metric: Metric) -> str:
        return f"{self.code} {metric.name}".strip()


@dataclass
class Catalogue:
    """Workloads by code, in the order in which they are defined."""

    workloads: dict[str, Workload] = field(default_factory=dict)

    def add(self, code: str, what: str, *metrics: Metric, **details):
        """Decorate the function that measures it."""

        def defined(measure):
            self.workloads[code] = Workload(code, what, metrics, measure, **details)
            return measure

        return defined
