"""What ``cloud.info`` tells of a job: names and units of its keys."""

from __future__ import annotations

import os

from cloud.errors import CloudException
from cloud.jobs import DONE, ERROR_TEXT, PROFILE, STATUS_LABELS, STDERR, STDOUT, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, Final

DEFAULT_KEYS: Final = ("status", "stdout", "stderr", "runtime")

KEYS: Final[dict[str, str]] = {
    "status": "'waiting', 'queued', 'processing', 'done', 'error', 'killed' or 'stalled'",
    "stdout": "the last part of what it printed, str; while it runs: so far",
    "stderr": "likewise",
    "exception": "the traceback as text, None unless it failed",
    "runtime": "seconds it ran, float; grows while it runs; None before",
    "created": "when it was submitted, aware UTC datetime",
    "started": "when it began, aware UTC datetime or None",
    "finished": "when it ended, aware UTC datetime or None",
    "cputime.user": "CPU seconds in user mode, None until it has ended",
    "cputime.system": "CPU seconds in system mode, likewise",
    "memory.max_usage": "peak resident memory of its process in bytes, likewise",
    "pid": "process that runs or ran it, None if none did",
    "worker": "the same as pid, as 'host:pid'",
    "hostname": "machine that runs or ran it",
    "attempt": "1 for the first",
    "function": "module and name of its function",
    "label": "its _label",
    "depth": "0, or how deep in jobs that submit jobs",
    "profile": "cProfile statistics for pstats.Stats, None without _profile=True",
    "shared_by": "how many small jobs its times, and output below sys.stdout, are counted together with; 1 means exact",
}


class Profile:
    """Statistics of cProfile as a job kept them; ``pstats.Stats(profile)`` reads them."""

    def __init__(self, stats: dict[Any, Any]) -> None:
        self.stats = self._kept = stats

    def create_stats(self) -> None:
        """What pstats asks of a profiler, whose ``stats`` it then empties."""
        self.stats = self._kept.copy()


def keys_of(requested: Any) -> list[str]:
    """The keys asked for: None means the default ones, 'all' every one.

    Raises:
        TypeError: Not a str or an iterable of str.
    """
    if requested is None:
        return list(DEFAULT_KEYS)
    names = [requested] if isinstance(requested, str) else requested
    try:
        names = list(names)
    except TypeError:
        raise TypeError(f"info_requested must be a str or an iterable of str, not {requested!r}") from None
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"info_requested must be a str or an iterable of str, not {requested!r}")
    return list(KEYS) if "all" in names else names


def info_of(facts: dict[str, Any], keys: list[str], now: float) -> dict[str, Any]:
    """The values for the keys; unknown keys are left out, as PiCloud did.

    Args:
        facts: ``Backend.describe`` of the job.
        keys: Names of KEYS.
        now: Seconds since the epoch, on the clock of the job.
    """
    outcome: Outcome | None = facts.get("outcome")
    live: dict[str, Any] = facts.get("live", {})
    found: dict[str, Any] = {}
    for key in keys:
        if key in ("status", "function", "label", "attempt", "depth"):
            value = facts[key]
            found[key] = STATUS_LABELS[value] if key == "status" else value
        elif key in KEYS:
            found[key] = _ended(outcome, facts, key) if outcome is not None else _running(live, facts, key, now)
    return found


def _moment(seconds: float) -> datetime | None:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def _ended(outcome: Outcome, facts: dict[str, Any], key: str) -> Any:
    n_shared = facts.get("n_shared", 1)
    own = outcome
    if n_shared > 1:
        own, n_shared = outcome.of_item(facts["index"], n_shared)
    user_s, system_s, rss_bytes = own.usage
    ran = own.started > 0
    values: dict[str, Any] = {
        "stdout": outcome.text(STDOUT) or "",
        "stderr": outcome.text(STDERR) or "",
        "exception": None if outcome.status == DONE else outcome.text(ERROR_TEXT),
        "runtime": own.runtime_s if ran else None,
        "created": _moment(facts["created"]),
        "started": _moment(own.started),
        "finished": _moment(own.started + (own.runtime_s if n_shared == 1 else outcome.runtime_s)) if ran else None,
        "cputime.user": user_s if ran else None,
        "cputime.system": system_s if ran else None,
        "memory.max_usage": rss_bytes if ran else None,
        "pid": outcome.pid or None,
        "worker": f"{_node(facts)}:{outcome.pid}" if outcome.pid else None,
        "hostname": _node(facts),
        "profile": _profile(outcome),
        "shared_by": n_shared,
    }
    return values[key]


def _running(live: dict[str, Any], facts: dict[str, Any], key: str, now: float) -> Any:
    values: dict[str, Any] = {
        "stdout": live.get("stdout", b"").decode("utf-8", "replace"),
        "stderr": live.get("stderr", b"").decode("utf-8", "replace"),
        "runtime": max(0.0, now - live["started"]) if "started" in live else None,
        "created": _moment(facts["created"]),
        "started": _moment(live.get("started", 0.0)),
        "pid": live.get("pid") or None,  # 0: started, and the engine has not been told by whom
        "worker": f"{_node(facts)}:{live['pid']}" if live.get("pid") else None,
        "hostname": _node(facts),
        "shared_by": 1,
    }
    return values.get(key)


def _profile(outcome: Outcome) -> Profile | None:
    content = outcome.section(PROFILE)
    if content is None:
        return None
    import marshal

    try:
        stats = marshal.loads(content)
    except (ValueError, EOFError, TypeError) as exc:
        raise CloudException(f"the job's profile is damaged: {exc}") from exc
    return Profile(stats)


def _node(facts: dict[str, Any]) -> str:
    # A server tells of its own machine.
    return str(facts.get("node") or os.uname().nodename)
