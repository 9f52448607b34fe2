"""``cloud status|jobs|result|info|kill``: asking for jobs, and ending them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from cloud import current
from cloud.cli.arguments import Commands, parse_jids
from cloud.cli.output import OK, Output, UsageError, safe, table
from cloud.client.cloud import Cloud
from cloud.client.info import DEFAULT_KEYS, KEYS
from cloud.jobs import STATUS_LABELS

__all__ = ["add_to", "counts_text", "open_cloud", "rows_of", "where"]

_JIDS: Final = "numbers and ranges of jobs, such as 1-4,7"
_PAGE: Final = 200
_QUESTIONS: Final = ("status", "jobs", "info", "top")
_PATIENCE_S: Final = 5.0
_IN_PROGRAMS: Final = {verb: f"cloud.{verb}(jids) or " for verb in ("status", "result", "info", "kill")}
_NAMES: Final = ", ".join(STATUS_LABELS)


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = commands.add("status", _status, "tell where jobs stand, or how many there are")
    parser.add_argument("jids", metavar="JIDS", nargs="?", help=f"{_JIDS}; without them: counts by status")

    parser = commands.add("jobs", _jobs, "list jobs, newest first")
    parser.add_argument("--label", metavar="LABEL", help="only those with this _label")
    parser.add_argument(
        "--status", metavar="STATUS", help=f"only those with one of these, such as error,killed; of {_NAMES}"
    )
    parser.add_argument("--function", metavar="NAME", help="only those of this function: its name, or module and name")
    parser.add_argument("--limit", type=int, metavar="N", default=25, help="how many at most (25)")

    parser = commands.add("result", _result, "wait for jobs and print what they returned")
    parser.add_argument("jids", metavar="JIDS", help=_JIDS)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="wait no longer than this")

    parser = commands.add("info", _info, "print what is known of jobs")
    parser.add_argument("jids", metavar="JIDS", help=_JIDS)
    parser.add_argument("keys", metavar="KEY", nargs="*", help=f"all, or some of {', '.join(KEYS)}")

    parser = commands.add("kill", _kill, "end jobs")
    parser.add_argument("jids", metavar="JIDS", help=_JIDS)


def _status(options: argparse.Namespace, output: Output) -> int:
    if options.jids is None:
        return _show_counts(options, output)
    jids = parse_jids(options.jids)
    return _show_status(open_cloud(options), jids, output)


def _show_counts(options: argparse.Namespace, output: Output) -> int:
    cloud = open_cloud(options)
    facts, info = cloud.backend.overview(), cloud.connection_info()
    counts = dict(zip(STATUS_LABELS, facts["counts"], strict=True))
    rows = [
        ("jobs run", where(info)),
        ("jobs", counts_text(counts)),
        ("slots", f"{facts['n_used']} of {facts['n_slots']} in use"),
    ]
    document = {"where": where(info), "connection": info, "jobs": counts, **_slots(facts)}
    output.show(document, table(rows))
    return OK


def _slots(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("n_slots", "n_used", "n_workers")}


def where(info: dict[str, Any]) -> str:
    """Where jobs run, for people."""
    if info["connection_type"] != "server":
        return f"in this program ({info['connection_type']})"
    key, _, url = current.process.credentials() or (None, None, None)
    return f"at {url or current.process.settings.server_url} (cloud {info.get('version', '?')}), with key {key}"


def counts_text(counts: dict[str, int]) -> str:
    """Counts by status as a phrase."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n) or "none"


def _jobs(options: argparse.Namespace, output: Output) -> int:
    if options.limit < 1:
        raise UsageError(f"--limit {options.limit} is no number of jobs: write 1 or more")
    names = None if options.status is None else [name.strip() for name in options.status.split(",")]
    for name in names or ():
        if name not in STATUS_LABELS:
            raise UsageError(f"no status is called {name!r}: there are {_NAMES}")
    codes = None if names is None else [STATUS_LABELS.index(name) for name in names]
    found = []
    for job in _listed(open_cloud(options), options, codes):
        found.append(job)
        if len(found) == options.limit:
            break
    header = ("jid", "status", "label", "function", "created", "runtime")
    text = table([header, *rows_of(found, header)]) if found else ""
    if not found and not output.as_json:
        output.warn("there are no such jobs")
    output.show([_document(job) for job in found], text)
    return OK


def _listed(cloud: Cloud, options: argparse.Namespace, codes: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    before = None
    while True:
        jobs, before = cloud.backend.listing(
            label=options.label,
            status=codes,
            function=options.function,
            before=before,
            limit=min(options.limit, _PAGE),
        )
        yield from jobs
        if before is None:
            return


def rows_of(jobs: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[list[object]]:
    """Cells of jobs as ``Backend.listing`` tells of them, under the names of these columns."""
    return [[_cell(job, column) for column in columns] for job in jobs]


def _cell(job: dict[str, Any], column: str) -> object:
    if column == "status":
        return STATUS_LABELS[job["status"]]
    if column == "created":
        return datetime.fromtimestamp(job["created"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if column == "runtime":
        return None if job["runtime_s"] is None else _duration(job["runtime_s"])
    value = job[column]
    return safe(value) if isinstance(value, str) else value


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms" if seconds >= 0.001 else "<1 ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _document(job: dict[str, Any]) -> dict[str, Any]:
    moments = {
        name: None if job[name] is None else datetime.fromtimestamp(job[name], UTC) for name in ("created", "started")
    }
    kept = {name: job[name] for name in ("jid", "label", "function", "attempt")}
    return {**kept, "status": STATUS_LABELS[job["status"]], **moments, "runtime": job["runtime_s"]}


def _show_status(cloud: Cloud, jids: range | list[range], output: Output) -> int:
    found = list(zip(_each(jids), cloud.status(jids), strict=True))
    output.show(
        [{"jid": jid, "status": status} for jid, status in found], "\n".join(f"{jid} {status}" for jid, status in found)
    )
    return OK


def _result(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jids)
    values = open_cloud(options).result(jids, options.timeout)
    found = list(zip(_each(jids), values, strict=True))
    text = repr(values[0]) if len(found) == 1 else "\n".join(f"{jid} {value!r}" for jid, value in found)
    output.show([{"jid": jid, "result": value} for jid, value in found], text)
    return OK


def _info(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jids)
    unknown = [key for key in options.keys if key not in KEYS and key != "all"]
    if unknown:
        raise UsageError(f"no key is called {unknown[0]!r}: there are all, {', '.join(KEYS)}")
    found = open_cloud(options).info(jids, options.keys or DEFAULT_KEYS)
    text = "\n".join(f"job {jid}\n{_lines_of(facts)}" for jid, facts in found.items())
    output.show([{"jid": jid, **facts} for jid, facts in found.items()], text)
    return OK


def _kill(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jids)
    cloud = open_cloud(options)
    cloud.kill(jids)
    return _show_status(cloud, jids, output)


def open_cloud(options: argparse.Namespace) -> Cloud:
    """The Cloud that has the jobs.

    Raises:
        UsageError: No job can be here.
        CloudException: What opening it raises.
    """
    cloud = current.cloud()
    if options.in_shell and options.verb in _QUESTIONS:
        _ask_briefly()
    if current.process.credentials() is None and not (cloud.opened or current.mp().opened):
        raise UsageError(
            "there are no jobs here: without a server, jobs live in the program that made them and end with it; "
            f"ask inside that program, with {_IN_PROGRAMS.get(options.verb, '')}cloud.cli.main()"
        )
    return cloud


def _ask_briefly() -> None:
    """Who looks at a screen is to be told soon that a server does not answer, unless the settings say for how long."""
    config = current.process.config
    if config.settings.origin("server_patience_s") == "default":
        config.server_patience_s = _PATIENCE_S
        config.commit()


def _each(jids: range | list[range]) -> list[int]:
    pieces = [jids] if isinstance(jids, range) else jids
    return [jid for piece in pieces for jid in piece]


def _lines_of(facts: dict[str, Any]) -> str:
    lines = []
    for key, value in facts.items():
        text = value.rstrip("\n") if isinstance(value, str) else str(value)
        separator = "\n    " if "\n" in text else " "
        lines.append(f"  {key}:{separator if text else ''}" + text.replace("\n", "\n    "))
    return "\n".join(lines)
