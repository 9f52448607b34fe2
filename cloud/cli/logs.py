"""``cloud logs``: what a job printed, and what it goes on to print."""

from __future__ import annotations

import argparse
from typing import Any, Final

from cloud.cli.arguments import Commands, parse_jids
from cloud.cli.jobs import open_cloud
from cloud.cli.output import FAILED, OK, Output, UsageError
from cloud.cli.streams import Sink, terminal
from cloud.jobs import DONE, STATUS_LABELS, STDERR, STDOUT

__all__ = ["Follower", "add_to"]

_LOOK_S: Final = 0.3
_SECTIONS: Final = {"stdout": STDOUT, "stderr": STDERR}


def add_to(commands: Commands) -> None:
    """Add the command of this module."""
    parser = commands.add("logs", _logs, "print what a job printed, each stream to its own")
    parser.add_argument("jid", metavar="JID", help="number of a job")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stdout", action="store_true", help="only what went to standard output")
    which.add_argument("--stderr", action="store_true", help="only what went to standard error")


def _logs(options: argparse.Namespace, output: Output) -> int:
    jids = parse_jids(options.jid)
    if not isinstance(jids, range) or len(jids) != 1:
        raise UsageError(f"{options.jid!r} is more than one job: 'cloud info {options.jid} stdout' prints several")
    jid = jids[0]
    backend = open_cloud(options).backend
    names = [name for name in _SECTIONS if not (options.stdout or options.stderr) or getattr(options, name)]
    if output.as_json and not options.follow:
        (facts,) = backend.describe((jid,))
        texts = {name: _content(facts, name)[0].decode("utf-8", "replace") for name in names}
        output.show({"jid": jid, "status": STATUS_LABELS[facts["status"]], **texts}, "")
        return OK
    sinks = {name: _document_sink(name, output) if output.as_json else terminal(name) for name in names}
    follower = Follower(sinks, output.warn)
    (facts,) = backend.describe((jid,))
    if options.follow and "outcome" not in facts and not facts.get("live"):
        output.warn(f"job {jid} is {STATUS_LABELS[facts['status']]}: waiting for it to begin")
    follower.look(facts)
    while options.follow and "outcome" not in facts:
        backend.wait((jid,), _LOOK_S, stop_on_error=False)
        (facts,) = backend.describe((jid,))
        follower.look(facts)
    if options.follow and facts["status"] != DONE:
        status = STATUS_LABELS[facts["status"]]
        output.warn(f"job {jid} ended with status '{status}'; 'cloud info {jid} exception' tells why")
        return FAILED
    return OK


def _document_sink(name: str, output: Output) -> Sink:
    def show(content: bytes) -> None:
        output.show({"stream": name, "text": content.decode("utf-8", "replace")}, "")

    return show


def _content(facts: dict[str, Any], name: str) -> tuple[bytes, int | None]:
    """What is kept of a stream, and how long it is in all (None: unknown)."""
    if "outcome" in facts:
        return facts["outcome"].section(_SECTIONS[name]) or b"", None
    live = facts.get("live") or {}
    content: bytes = live.get(name, b"")
    return content, live.get(f"n_{name}", len(content))


class Follower:
    """Hands on what is new each time that a job is looked at.

    Only the last part of a stream is kept: what was printed and pushed out between two looks is missing, which is told.

    Args:
        sinks: Where each stream goes.
        warn: Told what is missing, and of new attempts.
    """

    def __init__(self, sinks: dict[str, Sink], warn: Any) -> None:
        self._sinks = sinks
        self._warn = warn
        self._attempt = 0
        self._n_seen = dict.fromkeys(sinks, 0)
        self._seen = dict.fromkeys(sinks, b"")

    def look(self, facts: dict[str, Any]) -> None:
        """Hand on what is new in these facts of ``Backend.describe``."""
        if facts["attempt"] != self._attempt:
            if self._attempt:
                self._warn(f"attempt {facts['attempt']} begins")
            self._attempt = facts["attempt"]
            self._n_seen = dict.fromkeys(self._sinks, 0)
            self._seen = dict.fromkeys(self._sinks, b"")
        for name, sink in self._sinks.items():
            content, n = _content(facts, name)
            if "outcome" not in facts and not facts.get("live"):
                continue  # between two states: nothing is known now
            new = self._new(name, content, n)
            if new:
                sink(new)
            self._n_seen[name] += len(new)
            # As much as may be kept of the end: it tells where that goes on.
            self._seen[name] = (self._seen[name] + new)[-max(len(content), 1) :] if content else self._seen[name]

    def _new(self, name: str, content: bytes, n: int | None) -> bytes:
        seen = self._n_seen[name]
        if not seen:
            return content
        if n is None:
            return content[_overlap(self._seen[name], content) :]
        first = n - len(content)
        if first > seen:
            self._warn(f"{first - seen} bytes of {name} came too fast and are not kept")
            self._n_seen[name] = first
            return content
        return content[seen - first :]


def _overlap(before: bytes, after: bytes) -> int:
    """Length of the longest end of one that the other begins with."""
    before = before[-len(after) :] if after else b""
    # The failure function of Knuth, Morris and Pratt: one pass, however repetitive the output is.
    failure = [0] * len(after)
    k = 0
    for at in range(1, len(after)):
        while k and after[at] != after[k]:
            k = failure[k - 1]
        k += after[at] == after[k]
        failure[at] = k
    k = 0
    for byte in before:
        while k and (k == len(after) or byte != after[k]):
            k = failure[k - 1]
        k += byte == after[k]
    return k
