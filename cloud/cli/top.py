"""``cloud top``: what the workers do now, on a screen that is kept up to date."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import Any, Final

from cloud.cli.arguments import Commands
from cloud.cli.jobs import open_cloud, rows_of, where
from cloud.cli.output import OK, Output, UsageError, table
from cloud.client.cloud import Cloud
from cloud.jobs import DONE, PROCESSING, STATUS_LABELS

__all__ = ["add_to"]

_COLUMNS: Final = ("jid", "runtime", "attempt", "label", "function")
_N_RUNNING: Final = 200
_OPEN_SCREEN: Final = "\x1b[?1049h\x1b[?25l"
_CLOSE_SCREEN: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_END_LINE: Final = "\x1b[K"
_END_SCREEN: Final = "\x1b[J"


def add_to(commands: Commands) -> None:
    """Add the command of this module."""
    parser = commands.add("top", _top, "show what the workers do; Ctrl-C ends it")
    parser.add_argument("--once", action="store_true", help="print it once, as when the output is no terminal")
    parser.add_argument("--interval", type=float, metavar="SECONDS", default=1.0, help="between two looks (1)")


def _top(options: argparse.Namespace, output: Output) -> int:
    if not 0.1 <= options.interval <= 3600:
        raise UsageError(f"--interval {options.interval:g} is out of range: write 0.1 to 3600 seconds")
    cloud = open_cloud(options)
    info = cloud.connection_info()
    look = _Look(cloud)
    if options.once or output.as_json or not sys.stdout.isatty():
        text = "\n".join(_lines(look, where(info), None))
        output.show(look.document(), text)
        return OK
    sys.stdout.write(_OPEN_SCREEN)
    try:
        before = None
        while True:
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in _lines(look, where(info), before)[: height - 1]]
            sys.stdout.write(_HOME + "".join(f"{line}{_END_LINE}\n" for line in lines) + _END_SCREEN)
            sys.stdout.flush()
            time.sleep(options.interval)
            before, look = look, _Look(cloud)
    except KeyboardInterrupt:
        return OK
    finally:
        sys.stdout.write(_CLOSE_SCREEN)
        sys.stdout.flush()


class _Look:
    """What was to be seen at one moment."""

    def __init__(self, cloud: Cloud) -> None:
        self.facts: dict[str, Any] = cloud.backend.overview()
        self.running, _ = cloud.backend.listing(status=[PROCESSING], limit=_N_RUNNING)
        self.at = time.monotonic()

    @property
    def n_ended(self) -> int:
        return sum(self.facts["counts"][DONE:])

    def document(self) -> dict[str, Any]:
        running = [
            {"jid": job["jid"], "runtime": job["runtime_s"], **{name: job[name] for name in _COLUMNS[2:]}}
            for job in self.running
        ]
        slots = {name: self.facts[name] for name in ("n_slots", "n_used", "n_workers")}
        return {"jobs": dict(zip(STATUS_LABELS, self.facts["counts"], strict=True)), **slots, "running": running}


def _lines(look: _Look, place: str, before: _Look | None) -> list[str]:
    facts = look.facts
    counts = [f"{n:,} {name}" for name, n in zip(STATUS_LABELS, facts["counts"], strict=True)]
    lines = [
        f"{time.strftime('%H:%M:%S')}  jobs run {place}",
        f"slots   {facts['n_used']} of {facts['n_slots']} in use; worker processes: {facts['n_workers']}",
        f"jobs    {', '.join(counts[:DONE])}",
        f"ended   {', '.join(counts[DONE:])}{_rate(look, before)}",
        "",
    ]
    # Those that run longest are what one looks for.
    running = sorted(look.running, key=lambda job: -(job["runtime_s"] or 0.0))
    if running:
        lines += table([_COLUMNS, *rows_of(running, _COLUMNS)]).splitlines()
    else:
        lines.append("no job runs")
    more = facts["counts"][PROCESSING] - len(running)
    if more > 0 and len(running) >= _N_RUNNING:
        lines.append(f"... and {more:,} more")
    return lines


def _rate(look: _Look, before: _Look | None) -> str:
    if before is None:
        return ""
    # Deleted jobs are counted no more, which is not an end.
    n = max(0, look.n_ended - before.n_ended)
    return f"; {n / max(look.at - before.at, 1e-6):.1f} a second"
