"""What is measured of servers, each workload defined once. Systems are open, and have run a job, when one begins."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from benchmarks import functions as f
from benchmarks.aims import HIGHER, LOWER, Catalogue, Metric
from benchmarks.pace import Effort, as_many_as_fit, expect, percentile, timed
from benchmarks.processes import peak_memory_mb
from benchmarks.server.jobs import content
from benchmarks.server.polls import held_polls
from benchmarks.server.systems import NotOffered, ServerSystem

_catalogue = Catalogue()
WORKLOADS = _catalogue.workloads
workload = _catalogue.add

_N_THREADS = 8
_MEGABYTE = 1_000_000


@workload(
    "R",
    "one warm no-op call and its result, one after the other, by one thread",
    Metric("p50", "ms", LOWER),
    Metric("p99", "ms", LOWER),
)
def round_trip(system: ServerSystem, effort: Effort):
    times = []
    until = time.monotonic() + effort.seconds
    for _ in range(3):
        system.call(f.noop, 0)
    while len(times) < 20 or (time.monotonic() < until and len(times) < 2000):
        seconds, value = timed(lambda: system.call(f.noop, len(times)))
        expect(value == len(times))
        times.append(1000 * seconds)
    return {"p50": percentile(times, 50), "p99": percentile(times, 99), "n": len(times)}


def _by_threads(action, count: int) -> float:
    """Seconds for so many in all."""
    errors: list[BaseException] = []

    def act():
        try:
            for number in range(count // _N_THREADS):
                action(number)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=act) for _ in range(_N_THREADS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if errors:
        raise errors[0]
    return seconds


@workload("R8", "the same by eight threads at once", Metric("", "/s", HIGHER))
def round_trips(system: ServerSystem, effort: Effort):
    def call(number):
        expect(system.call(f.noop, number) == number)

    seconds, count = as_many_as_fit(lambda n: _by_threads(call, max(_N_THREADS, n)), 4000, effort)
    return {"": 1 / seconds, "n": count}


@workload("S", "submissions by one thread, then all results; the submissions", Metric("", "/s", HIGHER))
def submissions(system: ServerSystem, effort: Effort):
    def run(count):
        seconds, handles = timed(lambda: [system.submit(f.noop, number) for number in range(count)])
        expect(system.results(handles) == list(range(count)))
        return seconds

    seconds, count = as_many_as_fit(run, effort.n(5000), effort)
    return {"": 1 / seconds, "n": count}


@workload("S8", "submissions by eight threads at once", Metric("", "/s", HIGHER))
def submissions_of_many(system: ServerSystem, effort: Effort):
    def run(count):
        handles = []
        seconds = _by_threads(lambda number: handles.append(system.submit(f.noop, number)), max(_N_THREADS, count))
        expect(sum(system.results(handles)) == _N_THREADS * sum(range(len(handles) // _N_THREADS)))
        return seconds

    seconds, count = as_many_as_fit(run, effort.n(10_000), effort)
    return {"": 1 / seconds, "n": count}


def _mapped(system: ServerSystem, effort: Effort, n: int) -> dict[str, float]:
    def run(count):
        seconds, values = timed(lambda: system.map(f.noop, range(count)))
        expect(list(values) == list(range(count)))
        return seconds

    seconds, count = as_many_as_fit(run, n, effort)
    # Whoever had time for some of them only has kept some of them only.
    memory = {"memory": peak_memory_mb(), **_server_memory(system)} if count > 0.8 * n else {}
    return {"": 1 / seconds, "n": count, **memory}


def _server_memory(system: ServerSystem) -> dict[str, float]:
    try:
        status = Path(f"/proc/{system.server_pid()}/status").read_text(encoding="ascii")
    except (NotOffered, OSError, IndexError):
        return {}
    return {"server memory": int(status.partition("VmHWM:")[2].split()[0]) / 1000}


@workload("M", "a map of a no-op over 10,000 items, and its results", Metric("", "/s", HIGHER), limit_s=90)
def mapped(system: ServerSystem, effort: Effort):
    found = _mapped(system, effort, 10_000)
    return {"": found[""], "n": found["n"]}


@workload(
    "MM",
    "a map over 1,000,000 items (100,000 in short runs); peak memory of program and server, if all were done",
    Metric("", "/s", HIGHER),
    Metric("memory", "MB", LOWER),
    Metric("server memory", "MB", LOWER),
    limit_s=120,
)
def mapped_million(system: ServerSystem, effort: Effort):
    return _mapped(system, effort, effort.n(1_000_000))


@workload("U", "jobs with an argument of 1 MB, then their results", Metric("", "MB/s", HIGHER))
def upload(system: ServerSystem, effort: Effort):
    argument = bytes(_MEGABYTE)

    def run(count):
        seconds, values = timed(lambda: system.results([system.submit(f.length, argument) for _ in range(count)]))
        expect(list(values) == [_MEGABYTE] * count)
        return seconds

    seconds, count = as_many_as_fit(run, effort.n(500), effort)
    return {"": 1 / seconds, "n": count}


@workload("D", "jobs with a result of 1 MB", Metric("", "MB/s", HIGHER))
def download(system: ServerSystem, effort: Effort):
    def run(count):
        seconds, values = timed(lambda: system.results([system.submit(content, _MEGABYTE) for _ in range(count)]))
        expect([len(value) for value in values] == [_MEGABYTE] * count)
        return seconds

    seconds, count = as_many_as_fit(run, effort.n(500), effort)
    return {"": 1 / seconds, "n": count}


@workload(
    "F",
    "a stored file of 200 MB (50 MB in short runs), to the server and back",
    Metric("up", "MB/s", HIGHER),
    Metric("down", "MB/s", HIGHER),
    ours_only=True,
)
def stored_file(system: ServerSystem, effort: Effort):
    n_mb = 200 if effort.full else 50
    block = bytes(range(256)) * (_MEGABYTE // 256)
    source, copy = Path("source"), Path("copy")
    with source.open("wb") as file:
        for _ in range(n_mb):
            file.write(block)
    files = system.cloud.files
    up_s, _ = timed(lambda: files.put(str(source), "benchmark"))
    down_s, _ = timed(lambda: files.get("benchmark", str(copy)))
    expect(copy.read_bytes() == source.read_bytes())
    n_mb = source.stat().st_size / 1e6
    return {"up": n_mb / up_s, "down": n_mb / down_s}


@workload(
    "L",
    "10,000 long polls for one job (1,000 in short runs): a call beside them, all answered after its end, memory each",
    Metric("held", "", HIGHER),
    Metric("call beside", "ms", LOWER),
    Metric("answered", "s", LOWER),
    Metric("memory each", "KB", LOWER),
    ours_only=True,
    limit_s=180,
)
def long_polls(system: ServerSystem, effort: Effort):
    return held_polls(system, 10_000 if effort.full else 1_000)
