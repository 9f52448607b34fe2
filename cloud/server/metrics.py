"""What a server tells Prometheus about itself: counted as requests are answered, the rest looked up when it is asked.

Owns the names and the format. All numbers count from the start of this process, as Prometheus expects.

Source: Prometheus, "Text-based exposition format", version 0.0.4.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, Protocol

from cloud import __version__
from cloud.jobs import DONE, STATUS_LABELS

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Labels = tuple[tuple[str, object], ...]
Sample = tuple[str, Labels, float]


class _Observed(Protocol):
    """A workgroup at work."""

    number: int
    store: Any
    backend: Any


class Metrics:
    """Counts what a server does. Thread-safe.

    Args:
        n_slots: Of the whole server.
    """

    def __init__(self, n_slots: int) -> None:
        self._n_slots = n_slots
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._latencies: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()
        self._refused: Counter[int] = Counter()
        self._began = time.time()

    def answered(self, route: str, method: str, status: int, duration_s: float) -> None:
        """A request was answered.

        Args:
            route: Its pattern, never what a client wrote: each route has its own counters for ever.
            method, status: Of it.
            duration_s: From its head to its reply; for long polls that is mostly waiting.
        """
        with self._lock:
            self._requests[route, method if route else "", status] += 1
            self._seconds[route] += duration_s  # type: ignore[assignment]
            self._latencies.setdefault(route, [0] * (len(_BUCKETS_S) + 1))[bisect_left(_BUCKETS_S, duration_s)] += 1

    def refused(self, status: int) -> None:
        """Credentials were refused, with this status."""
        with self._lock:
            self._refused[status] += 1

    def text(self, groups: Iterable[_Observed], *, n_slots_used: int, n_open: int) -> str:
        """Everything in Prometheus's format.

        Args:
            groups: The workgroups to tell of.
            n_slots_used: Of all workgroups.
            n_open: Requests that are being answered.
        """
        lines: list[str] = []
        _family(lines, "cloud_info", "gauge", "The version of the server.", [("", (("version", __version__),), 1)])
        self._add_groups(lines, list(groups))
        _one(lines, "cloud_slots", "gauge", "Worker slots of all workgroups together.", self._n_slots)
        _one(lines, "cloud_slots_used", "gauge", "Worker slots in use by all workgroups.", n_slots_used)
        _one(lines, "cloud_requests_open", "gauge", "Requests that are being answered, long polls too.", n_open)
        with self._lock:
            self._add_requests(lines)
        self._add_process(lines)
        return "\n".join(lines) + "\n"

    def _add_groups(self, lines: list[str], groups: list[_Observed]) -> None:
        jobs: list[Sample] = []
        ended: list[Sample] = []
        values: dict[str, list[Sample]] = {name: [] for name in ("n_slots", "n_used", "n_workers")}
        commits: list[Sample] = []
        commit_s: list[Sample] = []
        for group in groups:
            facts, figures = group.backend.overview(), group.store.figures()
            own: Labels = (("workgroup", group.number),)
            jobs += [("", (*own, ("state", name)), n) for name, n in zip(STATUS_LABELS, facts["counts"], strict=True)]
            ended += [
                ("", (*own, ("state", STATUS_LABELS[code])), n)
                for code, n in enumerate(figures["ended"])
                if code >= DONE
            ]
            for name, samples in values.items():
                samples.append(("", own, facts[name]))
            commits.append(("", own, figures["n_commits"]))
            commit_s.append(("", own, figures["commit_s"]))
        _family(lines, "cloud_jobs", "gauge", "Jobs that are kept, by state; 'queued' is the queue's length.", jobs)
        _family(lines, "cloud_jobs_ended_total", "counter", "Jobs that reached a final state.", ended)
        _family(lines, "cloud_workgroup_slots", "gauge", "Worker slots a workgroup may have.", values["n_slots"])
        _family(lines, "cloud_workgroup_slots_used", "gauge", "Worker slots it has.", values["n_used"])
        _family(lines, "cloud_workers", "gauge", "Worker processes, idle ones too.", values["n_workers"])
        _family(lines, "cloud_store_commits_total", "counter", "Transactions written to disk.", commits)
        _family(lines, "cloud_store_commit_seconds_total", "counter", "Time that writing them took.", commit_s)

    def _add_requests(self, lines: list[str]) -> None:
        requests: list[Sample] = [
            ("", (("route", route), ("method", method), ("status", status)), n)
            for (route, method, status), n in sorted(self._requests.items())
        ]
        _family(lines, "cloud_requests_total", "counter", "Requests that were answered.", requests)
        latencies: list[Sample] = []
        for route, counts in sorted(self._latencies.items()):
            own, n = (("route", route),), 0
            for limit, more in zip((*_BUCKETS_S, "+Inf"), counts, strict=True):
                n += more
                latencies.append(("_bucket", (*own, ("le", limit)), n))
            latencies.append(("_sum", own, self._seconds[route]))
            latencies.append(("_count", own, n))
        _family(
            lines,
            "cloud_request_seconds",
            "histogram",
            "From the head of a request to its reply; long polls wait on purpose.",
            latencies,
        )
        refused: list[Sample] = [("", (("status", status),), n) for status, n in sorted(self._refused.items())]
        _family(lines, "cloud_sign_ins_refused_total", "counter", "Requests whose credentials were refused.", refused)

    def _add_process(self, lines: list[str]) -> None:
        times = os.times()
        _one(lines, "process_start_time_seconds", "gauge", "Since the epoch.", round(self._began, 3))
        _one(lines, "process_cpu_seconds_total", "counter", "Of the server itself.", times.user + times.system)
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                n_pages = int(file.read().split()[1])
            n_fds = len(os.listdir("/proc/self/fd")) - 1
        except OSError:
            return  # a system without /proc
        n_bytes = n_pages * resource.getpagesize()
        _one(lines, "process_resident_memory_bytes", "gauge", "Of the server itself.", n_bytes)
        _one(lines, "process_open_fds", "gauge", "Descriptors of the server.", n_fds)


def _one(lines: list[str], name: str, kind: str, text: str, value: float) -> None:
    _family(lines, name, kind, text, [("", (), value)])


def _family(lines: list[str], name: str, kind: str, text: str, samples: list[Sample]) -> None:
    lines.append(f"# HELP {name} {text}")
    lines.append(f"# TYPE {name} {kind}")
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(str(each))}"' for key, each in labels)
        lines.append(f"{name}{suffix}{{{inside}}} {value}" if inside else f"{name}{suffix} {value}")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
