"""The results as tables, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.aims import Metric, Must, Workload
from benchmarks.results import FACE_COST, TOO_LONG, VERBS, Results, Standing, is_peer, standing
from benchmarks.systems import SYSTEMS

_TIME_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NONE = "–"


# --- figures ----------------------------------------------------------------------------------------------------------


def digits(number: float) -> str:
    """Three significant digits, with commas."""
    if number == 0:
        return "0"
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.2g}"


def shown(figure: float | None, unit: str) -> str:
    """A figure with its unit, in a size that suits it: 17.3 µs, 25.8k/s, 98.5 %."""
    if figure is None:
        return _NONE
    if unit in _TIME_S:
        seconds = figure * _TIME_S[unit]
        for name, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
            if seconds >= scale or name == "µs":
                return f"{digits(seconds / scale)} {name}"
    if unit == "/s":
        for name, scale in (("M", 1e6), ("k", 1e3)):
            if figure >= scale:
                return f"{digits(figure / scale)}{name}/s"
        return f"{digits(figure)}/s"
    return f"{digits(figure)} {unit}"


def verdict(met: bool | None) -> str:
    return _NONE if met is None else "met" if met else "MISSED"


def must_shown(must: Must | None, limit: float | None, metric: Metric) -> str:
    """The floor as it was set, and what it comes to here."""
    if must is None:
        return _NONE
    sign = "≤" if metric.better == "lower" else "≥"
    figure = shown(limit, metric.unit)
    return f"{sign} {figure}" if not must.of else f"{sign} {must.limit:g}x {must.of}: {figure}"


# --- tables as rows ---------------------------------------------------------------------------------------------------

Table = list[list[str]]


def every_metric(results: Results, workloads: Iterable[Workload]) -> list[tuple[Workload, Metric]]:
    """The metrics that something was measured for."""
    return [
        (workload, metric)
        for workload in workloads
        for metric in workload.metrics
        if workload.code in results.figures or workload.code in results.failures
    ]


def aims_table(results: Results, workloads: Iterable[Workload]) -> Table:
    """How ``cloud`` stands to the best peer and to the aims."""
    rows = [["", VERBS, "spread", "best peer", "times as good", "must", "", "goal", ""]]
    for workload, metric in every_metric(results, workloads):
        found = standing(results, workload, metric)
        spread = results.spread(workload.code, metric, VERBS)
        rows.append(
            [
                workload.title(metric),
                _own_figure(results, found),
                " – ".join(shown(each, metric.unit) for each in spread) if spread else _NONE,
                f"{found.best_peer} {shown(found.best, metric.unit)}" if found.best_peer else _NONE,
                _NONE if found.speed is None else f"{digits(found.speed)}x",
                must_shown(metric.must, found.limit, metric),
                verdict(found.must_met),
                shown(metric.goal, metric.unit),
                verdict(found.goal_met),
            ]
        )
    return rows


def _own_figure(results: Results, found: Standing) -> str:
    if found.figure is None:
        return "FAILED" if results.given_up(found.workload.code, VERBS) else _NONE
    return shown(found.figure, found.metric.unit)


def faces_table(results: Results, workloads: Iterable[Workload]) -> Table:
    """What the faces cost beside the verbs."""
    faces = [name for name in results.systems() if name in SYSTEMS and not is_peer(name) and name != VERBS]
    if not faces:
        return []
    rows = [["cost beside the verbs", *(title for face in faces for title in (face, ""))]]
    for workload, metric in every_metric(results, workloads):
        medians = results.medians(workload.code, metric)
        if not metric.for_faces or VERBS not in medians or not any(face in medians for face in faces):
            continue
        row = [workload.title(metric)]
        for face in faces:
            if face in medians:
                cost = metric.speed(medians[VERBS], medians[face])
                row += [f"{digits(cost)}x", verdict(cost <= FACE_COST)]
            else:
                row += [_failure(results, workload.code, face), ""]
        rows.append(row)
    return rows


def systems_table(results: Results, workloads: Iterable[Workload]) -> Table:
    """Every figure of every system."""
    names = results.systems()
    rows = [["", *names]]
    for workload, metric in every_metric(results, workloads):
        row = [workload.title(metric)]
        for name in names:
            median = results.median(workload.code, metric, name)
            row.append(_failure(results, workload.code, name) if median is None else shown(median, metric.unit))
        rows.append(row)
    return rows


def _failure(results: Results, code: str, name: str) -> str:
    why = results.failures.get(code, {}).get(name)
    if why is None or why.startswith(_NONE):
        return _NONE
    return f"> {why.removeprefix(TOO_LONG)}" if why.startswith(TOO_LONG) else "fails"


def promises_table(results: Results, workloads: Iterable[Workload]) -> Table:
    """``cloud`` as it is, and with one thing changed: the figure, and how many times the cost."""
    names = results.systems()
    rows = [["", *names]]
    for workload, metric in every_metric(results, workloads):
        medians = results.medians(workload.code, metric)
        row = [workload.title(metric)]
        for name in names:
            text = shown(medians.get(name), metric.unit)
            if name != VERBS and name in medians and VERBS in medians:
                text += f" ({digits(metric.speed(medians[VERBS], medians[name]))}x)"
            row.append(text)
        rows.append(row)
    return rows


def workloads_table(results: Results, workloads: Iterable[Workload]) -> Table:
    """What each row of the other tables means."""
    rows = [["", "what is measured"]]
    done = {workload.code for workload, _ in every_metric(results, workloads)}
    return rows + [[workload.code, workload.what] for workload in workloads if workload.code in done]


def failure_lines(results: Results) -> list[str]:
    """One line for each pair that should have worked and did not, and for whatever else was seen."""
    lines = [
        f"{code} {name}: {why}"
        for code, found in results.failures.items()
        for name, why in found.items()
        if not why.startswith(_NONE)
    ]
    return lines + results.notes


# --- tables as text ---------------------------------------------------------------------------------------------------


def as_text(rows: Table) -> str:
    """Columns of a terminal."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_markdown(rows: Table) -> str:
    """A table of Markdown."""
    if not rows:
        return ""
    head, *body = rows
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])
