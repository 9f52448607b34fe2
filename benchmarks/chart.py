"""The results as a bar chart: SVG, a panel for each workload, readable on light and on dark pages.

Bars are speeds, in proportion: the longest of a panel is its fastest system, one half as long took twice the time. The
figures beside them are what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

from benchmarks.aims import LOWER, Metric, Workload
from benchmarks.results import VERBS, Results, is_peer
from benchmarks.tables import shown

_COLUMNS = 3
_MARGIN = 28
_GAP = 30
_PANEL_WIDTH = 360
_NAME_WIDTH = 110
_FIGURE_WIDTH = 78
_BAR_WIDTH = _PANEL_WIDTH - _NAME_WIDTH - _FIGURE_WIDTH
_ROW = 17
_BAR = 11
_TITLE = 44
_HEAD = 76

_STYLE = """
  .page { fill: #ffffff; } text { fill: #1f2328; font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
  .title { font-size: 19px; font-weight: 650; } .sub, .what { fill: #59636e; } .what { font-size: 11px; }
  .code { font-weight: 650; } .figure { font-size: 11px; font-variant-numeric: tabular-nums; }
  .peer { fill: #b4bcc6; } .verbs { fill: #1f6feb; } .face { fill: #7fb0f7; } .own { font-weight: 650; }
  .axis { stroke: #d1d9e0; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; } text { fill: #e6edf3; } .sub, .what { fill: #9198a1; }
    .peer { fill: #4a535f; } .verbs { fill: #4493f8; } .face { fill: #2f5f9f; } .axis { stroke: #30363d; }
  }
"""


def svg(results: Results, workloads: Iterable[Workload]) -> str:
    """The whole chart; one panel for the first metric of each workload, and for each metric that has a must."""
    panels = []
    for workload in workloads:
        for at, metric in enumerate(workload.metrics):
            medians = results.medians(workload.code, metric)
            # A bar with nothing to compare it with tells nothing.
            if len(medians) > 1 and (at == 0 or metric.must is not None):
                panels.append((workload, metric, medians))
    parts: list[str] = []
    top = _HEAD
    for first in range(0, len(panels), _COLUMNS):
        line = panels[first : first + _COLUMNS]
        for column, panel in enumerate(line):
            parts += _panel(_MARGIN + column * (_PANEL_WIDTH + _GAP), top, *panel)
        top += _TITLE + _ROW * max(len(medians) for _, _, medians in line) + _GAP
    width = 2 * _MARGIN + _COLUMNS * _PANEL_WIDTH + (_COLUMNS - 1) * _GAP
    about = results.about
    under = (
        f"{about['workers']} workers · {about['cores']} cores, {about['processor']} · {about['system']} · "
        f"{about['python']} · median of {about['repeats']} · {about['date']}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}" '
            'role="img" aria-labelledby="title">',
            f'<title id="title">Speed of {VERBS} beside its peers</title>',
            f"<style>{_STYLE}</style>",
            f'<rect class="page" width="{width}" height="{top}" rx="6"/>',
            _text(_MARGIN, 36, f"Speed of {VERBS} beside its peers: longer is better", "title"),
            _text(_MARGIN, 56, under, "sub"),
            *parts,
            "</svg>",
            "",
        ]
    )


def _panel(left: int, top: int, workload: Workload, metric: Metric, medians: dict[str, float]) -> list[str]:
    """Title, and a bar a system, the fastest first."""
    fastest = metric.best(medians)
    assert fastest is not None
    parts = [
        f'<text x="{left}" y="{top + 12}"><tspan class="code">{escape(workload.title(metric))}</tspan></text>',
        _text(left, top + 27, workload.what, "what"),
        f'<path class="axis" d="M{left + _NAME_WIDTH - 0.5} {top + _TITLE - 8}v{_ROW * len(medians) + 4}"/>',
    ]
    ordered = sorted(medians, key=lambda name: medians[name], reverse=metric.better != LOWER)
    for row, name in enumerate(ordered):
        y = top + _TITLE - 6 + row * _ROW
        share = metric.speed(medians[name], medians[fastest])
        kind = "verbs" if name == VERBS else "peer" if is_peer(name) else "face"
        own = "" if kind == "peer" else " own"
        length = max(1.0, _BAR_WIDTH * share)
        parts += [
            _text(left + _NAME_WIDTH - 8, y + 10, name, f"name{own}", anchor="end"),
            f'<rect class="{kind}" x="{left + _NAME_WIDTH}" y="{y + 1}" width="{length:.1f}" height="{_BAR}" rx="2"/>',
            _text(left + _NAME_WIDTH + length + 6, y + 10, shown(medians[name], metric.unit), f"figure{own}"),
        ]
    return parts


def _text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(content)}</text>'
