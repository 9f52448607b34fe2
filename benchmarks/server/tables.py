"""The figures of servers as tables."""

from __future__ import annotations

from benchmarks.results import TOO_LONG, Results
from benchmarks.server.systems import SERVERS, Cloud
from benchmarks.server.workloads import WORKLOADS
from benchmarks.tables import Table, digits, every_metric, shown


def measured(results: Results) -> list[str]:
    """The systems with a figure or a failure anywhere, in order."""
    seen = {name for table in (results.figures, results.failures) for found in table.values() for name in found}
    return [name for name in SERVERS if name in seen]


def every_figure(results: Results) -> Table:
    """The median of each, and of peers how many times better than that `cloud serve` is: below 1 it is worse."""
    names = measured(results)
    rows = [["", *names]]
    for workload, metric in every_metric(results, WORKLOADS.values()):
        own = results.median(workload.code, metric, Cloud.name)
        row = [workload.title(metric)]
        for name in names:
            median = results.median(workload.code, metric, name)
            if median is None:
                row.append(_why_not(results, workload.code, name))
            elif name == Cloud.name or own is None:
                row.append(shown(median, metric.unit))
            else:
                row.append(f"{shown(median, metric.unit)} ({digits(metric.speed(own, median))}x)")
        rows.append(row)
    return rows


def spreads(results: Results) -> Table:
    """From the least to the most, or from the first quartile to the third, of `cloud serve`."""
    rows = [["", "median", "spread"]]
    for workload, metric in every_metric(results, WORKLOADS.values()):
        median = results.median(workload.code, metric, Cloud.name)
        spread = results.spread(workload.code, metric, Cloud.name)
        if median is not None and spread is not None:
            rows.append(
                [
                    workload.title(metric),
                    shown(median, metric.unit),
                    " – ".join(shown(each, metric.unit) for each in spread),
                ]
            )
    return rows


def failures(results: Results) -> list[str]:
    """One line for each pair that should have worked and did not, and for whatever else was seen."""
    lines = [
        f"{code} {name}: {why}"
        for code, found in results.failures.items()
        for name, why in found.items()
        if not why.startswith("–")
    ]
    return lines + results.notes


def _why_not(results: Results, code: str, name: str) -> str:
    why = results.failures.get(code, {}).get(name)
    if why is None or why.startswith("–"):
        return "–"
    return f"> {why.removeprefix(TOO_LONG)}" if why.startswith(TOO_LONG) else "fails"
