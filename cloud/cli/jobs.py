"""``cloud status|result|info|kill``: asking for jobs by their jids."""

from __future__ import annotations

import argparse
from typing import Any

from cloud import current
from cloud.cli.arguments import Commands, parse_jids
from cloud.cli.output import OK, Output, UsageError
from cloud.client.cloud import Cloud
from cloud.client.info import DEFAULT_KEYS, KEYS

__all__ = ["add_to"]

_JIDS = "numbers and ranges of jobs, such as 1-4,7"


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = commands.add("status", _status, "tell where jobs stand")
    parser.add_argument("jids", metavar="JIDS", help=_JIDS)

    parser = commands.add("result", _result, "wait for jobs and print what they returned")
    parser.add_argument("jids", metavar="JIDS", help=_JIDS)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="wait no longer than this")

    parser = commands.add("info", _info, "print what is known of jobs")
    parser.add_argument("jids", metavar="JIDS", help=_JIDS)
    parser.add_argument("keys", metavar="KEY", nargs="*", help=f"all, or some of {', '.join(KEYS)}")

    parser = commands.add("kill", _kill, "end jobs")
    parser.add_argument("jids", metavar="JIDS", help=_JIDS)


def _status(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jids)
    return _show_status(_cloud(options), jids, output)


def _show_status(cloud: Cloud, jids: range | list[range], output: Output) -> int:
    found = list(zip(_each(jids), cloud.status(jids), strict=True))
    output.show(
        [{"jid": jid, "status": status} for jid, status in found], "\n".join(f"{jid} {status}" for jid, status in found)
    )
    return OK


def _result(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jids)
    values = _cloud(options).result(jids, options.timeout)
    found = list(zip(_each(jids), values, strict=True))
    text = repr(values[0]) if len(found) == 1 else "\n".join(f"{jid} {value!r}" for jid, value in found)
    output.show([{"jid": jid, "result": value} for jid, value in found], text)
    return OK


def _info(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jids)
    unknown = [key for key in options.keys if key not in KEYS and key != "all"]
    if unknown:
        raise UsageError(f"no key is called {unknown[0]!r}: there are all, {', '.join(KEYS)}")
    found = _cloud(options).info(jids, options.keys or DEFAULT_KEYS)
    text = "\n".join(f"job {jid}\n{_lines_of(facts)}" for jid, facts in found.items())
    output.show([{"jid": jid, **facts} for jid, facts in found.items()], text)
    return OK


def _kill(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jids)
    cloud = _cloud(options)
    cloud.kill(jids)
    return _show_status(cloud, jids, output)


def _cloud(options: argparse.Namespace) -> Cloud:
    """The Cloud that has the jobs.

    Raises:
        UsageError: No job can be here.
        CloudException: What opening it raises.
    """
    cloud = current.cloud()
    if current.process.credentials() is None and not (cloud.opened or current.mp().opened):
        raise UsageError(
            "there are no jobs here: without a server, jobs live in the program that made them and end with it; "
            f"ask inside that program, with cloud.{options.verb}(jids) or cloud.cli.main()"
        )
    return cloud


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
