"""What is measured, each workload defined once, with its aims.

Systems are open and idle when a workload begins. Each warms up as its meaning asks for: A is the thousandth call of a
program, not its first; G is nothing but a program's first.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import functions as f
from benchmarks.aims import HIGHER, LOWER, Catalogue, Metric, Must
from benchmarks.cold import cold_start
from benchmarks.pace import Effort, as_many_as_fit, expect, percentile, timed
from benchmarks.processes import cpu_seconds, family, peak_memory_mb
from benchmarks.systems import N_WORKERS, NotOffered, System

_catalogue = Catalogue()
WORKLOADS = _catalogue.workloads
workload = _catalogue.add


# --- one call ---------------------------------------------------------------------------------------------------------


def _latency(call, jobs, effort: Effort) -> dict[str, float]:
    """Time ``call(function, x)`` for each ``(function, x, value)``; the first tenth is warm-up."""
    times = []
    deadline = time.perf_counter() + effort.seconds
    for function, x, value in jobs:
        seconds, got = timed(partial(call, function, x))
        expect(got == value)
        times.append(seconds)
        if time.perf_counter() > deadline and len(times) >= 20:
            break
    times = times[len(times) // 10 :]
    return {
        "": 1e6 * statistics.fmean(times),
        "p50": 1e6 * percentile(times, 50),
        "p99": 1e6 * percentile(times, 99),
        "n": len(times),
    }


@workload(
    "A",
    "one warm no-op call and its result, one after the other",
    Metric("", "us", LOWER, Must(0.5, "best"), 30),
    Metric("p50", "us", LOWER),
    Metric("p99", "us", LOWER, Must(1, "mpire"), 150),
)
def one_call(system: System, effort: Effort):
    return _latency(system.call, ((f.noop, n, n) for n in range(effort.n(5000))), effort)


def _adder(number):
    return lambda x: x + number


@workload(
    "H",
    "as A, each time a new lambda closed over a variable",
    Metric("", "us", LOWER, Must(0.3, "best"), 45),
    Metric("p99", "us", LOWER),
)
def one_closure(system: System, effort: Effort):
    if not system.closures:
        raise NotOffered("does not take closures")
    return _latency(system.call, ((_adder(n), 1, n + 1) for n in range(effort.n(5000))), effort)


# --- many calls -------------------------------------------------------------------------------------------------------


def _burst(system: System, effort: Effort, n: int, function, argument=lambda number: number, right=None, results=None):
    """Submit so many calls, then take all results; jobs a second."""
    results = results or system.results

    def run(count):
        arguments = [argument(number) for number in range(count)]
        seconds, values = timed(lambda: results([system.submit(function, each) for each in arguments]))
        expect(values == (right or list)(range(count)))
        return seconds

    seconds, count = as_many_as_fit(run, n, effort)
    return {"": 1 / seconds, "n": count}


@workload("B", "10,000 calls, then all results", Metric("", "/s", HIGHER, Must(4, "best"), 200_000))
def burst(system: System, effort: Effort):
    return _burst(system, effort, 10_000, f.noop)


@workload("BS", "10,000 calls, then each result by itself", Metric("", "/s", HIGHER))
def burst_singly(system: System, effort: Effort):
    return _burst(system, effort, 10_000, f.noop, results=lambda handles: [system.result(handle) for handle in handles])


def _sized(system: System, effort: Effort, n: int, size: int):
    """Arguments of so many bytes, each with a content of its own."""
    filling = os.urandom(size - 8)
    return _burst(
        system,
        effort,
        n,
        f.length,
        argument=lambda number: number.to_bytes(8, "big") + filling,
        right=lambda numbers: [size] * len(numbers),
    )


@workload("B1k", "calls with an argument of 1 KB, then all results", Metric("", "/s", HIGHER))
def kilobyte(system: System, effort: Effort):
    return _sized(system, effort, 5000, 1_000)


@workload("B30k", "calls with an argument of 30 KB, then all results", Metric("", "/s", HIGHER))
def kilobytes(system: System, effort: Effort):
    return _sized(system, effort, 2000, 30_000)


@workload("B1M", "calls with an argument of 1 MB, then all results", Metric("", "/s", HIGHER))
def megabyte(system: System, effort: Effort):
    return _sized(system, effort, 200, 1_000_000)


@workload("BN", "calls with an array of 100 KB, returned doubled", Metric("", "/s", HIGHER))
def arrays(system: System, effort: Effort):
    import numpy as np

    def run(count):
        given = [np.full(12_500, number, dtype=np.float64) for number in range(count)]
        seconds, found = timed(lambda: system.results([system.submit(f.double, each) for each in given]))
        expect(all(np.array_equal(each, np.full(12_500, 2.0 * number)) for number, each in enumerate(found)))
        return seconds

    seconds, count = as_many_as_fit(run, 1000, effort)
    return {"": 1 / seconds, "n": count}


@workload("BM", "5,000 calls of a method, then all results", Metric("", "/s", HIGHER))
def methods(system: System, effort: Effort):
    return _burst(system, effort, 5000, f.Table().look_up)


@workload("BP", "calls that print a line, then all results", Metric("", "/s", HIGHER))
def printing(system: System, effort: Effort):
    figures = _burst(system, effort, 5000, f.say)
    last = system.submit(f.say, 77)
    system.result(last)
    printed = system.printed(last)
    expect(printed in ("", "this is job 77\n"), f"the job printed something else: {printed!r}")
    return figures


@workload("BR", "calls that raise, then all exceptions", Metric("", "/s", HIGHER))
def raising(system: System, effort: Effort):
    def run(count):
        seconds, errors = timed(lambda: system.outcomes([system.submit(f.fail, n) for n in range(count)]))
        for number, error in enumerate(errors):
            text = f"{error}\n{getattr(error, '__cause__', None)}"
            expect(isinstance(error, Exception) and f"job {number} fails" in text, f"not its exception: {error!r}")
        return seconds

    seconds, count = as_many_as_fit(run, 5000, effort)
    return {"": 1 / seconds, "n": count}


@workload("T", "eight threads that call, each one after the other", Metric("", "/s", HIGHER), limit_s=30)
def threads(system: System, effort: Effort):
    if not system.threads:
        raise NotOffered("is not for several threads at once")
    n_threads = 8
    system.call(f.noop, 0)

    def run(count):
        wrong: list[object] = []
        each = max(1, count // n_threads)
        start = threading.Barrier(n_threads + 1)

        def caller(first):
            start.wait()
            try:
                wrong.extend(n for n in range(first, first + each) if system.call(f.noop, n) != n)
            except Exception as exc:
                wrong.append(exc)

        callers = [threading.Thread(target=caller, args=(k * each,), daemon=True) for k in range(n_threads)]
        for thread in callers:
            thread.start()
        start.wait()
        deadline = time.monotonic() + effort.patience_s + effort.seconds
        seconds, _ = timed(lambda: [thread.join(max(0, deadline - time.monotonic())) for thread in callers])
        if any(thread.is_alive() for thread in callers):
            raise RuntimeError("hangs")
        expect(not wrong, f"wrong: {wrong[:1]}")
        return seconds * count / (each * n_threads)

    seconds, count = as_many_as_fit(run, 8000, effort)
    return {"": 1 / seconds, "n": count}


# --- maps -------------------------------------------------------------------------------------------------------------


def _map_rate(map_items, n: int, effort: Effort) -> dict[str, float]:
    peaks_mb: dict[int, float] = {}

    def run(count):
        seconds, values = timed(lambda: map_items(f.noop, range(count)))
        # Of the first of so many: who keeps results, as cloud does, holds more with each map.
        peaks_mb.setdefault(count, peak_memory_mb())
        # One by one: a list to compare with would take as much memory as what is measured.
        expect(len(values) == count and all(value == number for number, value in enumerate(values)))
        return seconds

    seconds, count = as_many_as_fit(run, n, effort)
    return {"": 1 / seconds, "peak": peaks_mb[count], "n": count}


@workload(
    "C",
    "map of a no-op over 100,000 items",
    Metric("", "/s", HIGHER, Must(0.8, "best"), 8_000_000),
)
def map_100_000(system: System, effort: Effort):
    return _map_rate(system.map, 100_000, effort)


@workload(
    "CM",
    "map of a no-op over 1,000,000 items; peak memory",
    Metric("", "/s", HIGHER, Must(0.8, "best"), 10_000_000),
    Metric("peak", "MB", LOWER, Must(1.3, "multiprocessing"), 60),
)
def map_1_000_000(system: System, effort: Effort):
    figures = _map_rate(system.map, 1_000_000, replace(effort, seconds=max(effort.seconds, 1.0)))
    if figures["n"] < 1_000_000:
        # Memory for fewer items is no figure to compare with.
        del figures["peak"]
    return figures


@workload("CD", "map of 20,000 dicts, each returned in a tuple", Metric("", "/s", HIGHER))
def map_dicts(system: System, effort: Effort):
    def run(count):
        records = [{"number": number, "name": f"record {number}"} for number in range(count)]
        seconds, found = timed(lambda: system.map(f.paired, records))
        expect(found == [(record["number"], record) for record in records])
        return seconds

    seconds, count = as_many_as_fit(run, 20_000, effort)
    return {"": 1 / seconds, "n": count}


@workload("CN", "map of 10,000 arrays of 1 KB, each returned doubled", Metric("", "/s", HIGHER))
def map_arrays(system: System, effort: Effort):
    import numpy as np

    def run(count):
        given = [np.full(128, number, dtype=np.float64) for number in range(count)]
        seconds, found = timed(lambda: system.map(f.double, given))
        expect(all(np.array_equal(each, np.full(128, 2.0 * number)) for number, each in enumerate(found)))
        return seconds

    seconds, count = as_many_as_fit(run, 10_000, effort)
    return {"": 1 / seconds, "n": count}


@workload("C1", "as C, each item a message of its own", Metric("", "/s", HIGHER, Must(3, "best"), 300_000))
def map_singly(system: System, effort: Effort):
    return _map_rate(system.map_singly, 100_000, effort)


def _of_ideal(system: System, items: list[float]) -> dict[str, float]:
    """How near a map comes to the time that its work takes when the workers share it evenly."""
    system.map(f.noop, range(100))
    seconds, values = timed(lambda: system.map(f.spin, items))
    expect(values == items)
    return {"": 100 * sum(items) / N_WORKERS / seconds, "n": len(items)}


@workload("D", "map over 5,000 items of 1 ms of work", Metric("", "%", HIGHER, Must(97.5), 98.5), limit_s=120)
def even_work(system: System, effort: Effort):
    return _of_ideal(system, [0.001] * effort.n(5000))


@workload("E", "map over 800 items of 1 ms, then 8 of 100 ms", Metric("", "%", HIGHER, Must(95), 97))
def long_ones_last(system: System, effort: Effort):
    return _of_ideal(system, [0.001] * effort.half(800) + [0.1] * effort.half(8))


@workload("E0", "map over 8 items of 100 ms, then 800 of 1 ms", Metric("", "%", HIGHER, Must(95), 97))
def long_ones_first(system: System, effort: Effort):
    return _of_ideal(system, [0.1] * effort.half(8) + [0.001] * effort.half(800))


# --- arrays -----------------------------------------------------------------------------------------------------------


@workload(
    "F",
    "an array of 100 MB there and back, writable on both sides",
    Metric("", "s", LOWER, Must(0.6, "best"), 0.10),
    Metric("first", "s", LOWER),
    needs=("numpy",),
)
def large_array(system: System, effort: Effort):
    import numpy as np

    system.call(f.length, np.ones(10))
    times = []
    for repeat in range(4 if effort.full else 2):
        array = np.arange(12_500_000, dtype=np.float64)
        began = time.perf_counter()
        doubled = system.call(f.double, array)
        if not doubled.flags.writeable:
            doubled = doubled.copy()
        doubled[0] = repeat
        times.append(time.perf_counter() - began)
        expect(np.array_equal(doubled[1:], 2 * array[1:]), "the array is not doubled")
        expect(array[1] == 1, "the caller's own array has changed")
        del array, doubled
    return {"": statistics.median(times[1:]), "first": times[0]}


def _constant(system: System, *, read_only: bool):
    """A function with an array of 50 MB in it, by closure or, where that cannot travel, by `partial`."""
    import numpy as np

    array = np.arange(6_250_000, dtype=np.float64)
    array.flags.writeable = not read_only
    return (lambda index: float(array[index])) if system.closures else partial(f.pick, array)


def _calls_with_constant(system: System, effort: Effort, *, read_only: bool):
    system.call(f.noop, 0)
    function = _constant(system, read_only=read_only)

    def run(count):
        seconds, values = timed(lambda: [system.call(function, number) for number in range(count)])
        expect(values == [float(number) for number in range(count)])
        return seconds

    seconds, count = as_many_as_fit(run, 1000, effort)
    return {"": 1e3 * seconds, "n": count}


@workload(
    "FS",
    "1,000 calls of a function that holds an array of 50 MB",
    Metric("", "ms", LOWER, Must(12)),
    needs=("numpy",),
)
def constant(system: System, effort: Effort):
    return _calls_with_constant(system, effort, read_only=False)


@workload(
    "FSr",
    "as FS, the array being read-only",
    Metric("", "ms", LOWER, Must(0.25, "ray"), 0.1),
    needs=("numpy",),
)
def read_only_constant(system: System, effort: Effort):
    return _calls_with_constant(system, effort, read_only=True)


@workload(
    "FM",
    "a map of such a function over 1,000 items, sent before",
    Metric("", "ms", LOWER, Must(1, "best"), 10),
    Metric("first", "ms", LOWER),
    needs=("numpy",),
)
def map_with_constant(system: System, effort: Effort):
    system.map(f.noop, range(100))
    function = _constant(system, read_only=False)

    def run(count):
        seconds, values = timed(lambda: system.map(function, range(count)))
        expect(values == [float(number) for number in range(count)])
        return 1e3 * seconds

    if not system.ours:
        # Who sends the array with each item would take minutes: that is told from how the time grows with the items.
        few = run(8)
        each = (run(24) - few) / 16
        if 1000 * each > 30_000:
            # Or it was still starting.
            each = (run(24) - few) / 16
        if 1000 * each > 30_000:
            return {"": 1000 * each, "first": 1000 * each, "n": 24}
        function = _constant(system, read_only=False)
    first = run(1000)
    return {"": statistics.median(run(1000) for _ in range(3)), "first": first}


@workload(
    "FR",
    "map with 500 results of 1 MB",
    Metric("", "GB/s", HIGHER, Must(1.8, "best"), 2),
    needs=("numpy",),
)
def large_results(system: System, effort: Effort):
    n_bytes = 8 * 131_072

    def run(count):
        seconds, values = timed(lambda: system.map(f.block, range(count)))
        expect(len(values) == count)
        expect(all(value.nbytes == n_bytes and value[0] == value[-1] == n for n, value in enumerate(values)))
        return seconds

    seconds, count = as_many_as_fit(run, 500, effort)
    return {"": n_bytes / seconds / 1e9, "n": count}


# --- the program's life -----------------------------------------------------------------------------------------------


@workload(
    "G",
    "a program: its import, first result, end after that",
    # The verbs are imported with their first use.
    Metric("import", "ms", LOWER, Must(1.1, "best"), 10, for_faces=False),
    Metric("first", "ms", LOWER, Must(1.1, "best"), 50),
    Metric("exit", "ms", LOWER, Must(1.1, "best"), 15),
    opens=False,
)
def cold(system: System, effort: Effort):
    return cold_start(system.cold, repeats=5 if effort.full else 3, most_s=effort.seconds * 5)


# --- jobs that depend on jobs -----------------------------------------------------------------------------------------


@workload("I", "a chain of 1,000 jobs, each after the one before", Metric("", "/s", HIGHER, Must(10, "best"), 20_000))
def chain(system: System, effort: Effort):
    def run(count):
        def chained():
            handles = [system.submit(f.moment)]
            for _ in range(count - 1):
                handles.append(system.submit_after(f.moment, [handles[-1]]))
            return system.results(handles)

        seconds, moments = timed(chained)
        expect(len(moments) == count and moments == sorted(moments), "a job ran before the one it depends on")
        return seconds

    seconds, count = as_many_as_fit(run, 1000, effort)
    return {"": 1 / seconds, "n": count}


@workload("ID", "one job, 500 after it, one after all of those", Metric("", "/s", HIGHER, Must(4, "best"), 60_000))
def diamond(system: System, effort: Effort):
    def run(count):
        def fanned():
            root = system.submit(f.moment)
            middle = [system.submit_after(f.moment, [root]) for _ in range(count)]
            return system.results([root, *middle, system.submit_after(f.moment, middle)])

        seconds, (first, *moments, last) = timed(fanned)
        expect(first <= min(moments) and max(moments) <= last, "a job ran before one that it depends on")
        return seconds

    seconds, count = as_many_as_fit(run, 500, effort)
    return {"": 1 / seconds, "n": count}


# --- faults and size --------------------------------------------------------------------------------------------------


def _within(seconds: float, what: str, action):
    """Do it on a thread, and give up on it after so long: some systems wait for ever."""
    outcome: list[object] = []

    def act():
        try:
            outcome.append(action())
        except Exception as exc:
            outcome.append(exc)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise RuntimeError(what)
    return outcome[0]


@workload(
    "J",
    "a worker killed in its job: until all jobs have ended",
    Metric("", "s", LOWER, Must(0.5), 0.1),
)
def killed_worker(system: System, effort: Effort):
    patience_s = effort.patience_s
    expect(system.results([system.submit(f.noop, n) for n in range(4)]) == list(range(4)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pid")
        unlucky = system.submit(f.victim, str(path))
        _within(patience_s, "the job did not start", lambda: _appears(path))
        others = [system.submit(f.noop, n) for n in range(20)]
        began = time.perf_counter()
        os.kill(int(path.read_text()), signal.SIGKILL)
        end = _within(patience_s, "hangs: the killed job never ends", lambda: system.result(unlucky))
        values = _within(patience_s, "hangs: jobs beside the killed one never end", lambda: system.results(others))
        seconds = time.perf_counter() - began
    expect(end == "retried" or isinstance(end, Exception), f"the killed job gave {end!r}")
    if values != list(range(20)):
        raise RuntimeError(f"jobs beside the killed one are lost: {type(values).__name__}")
    if _within(patience_s, "hangs: no job runs after that", lambda: system.call(f.noop, 5)) != 5:
        raise RuntimeError("no job runs after that")
    return {"": seconds, "retried": float(end == "retried")}


def _appears(path: Path):
    while not path.exists():
        time.sleep(0.001)
    return True


def _growth(system: System, effort: Effort, drained, most: int) -> dict[str, float]:
    """Cost of a job when few and when many are outstanding: the workers are held until all are submitted."""
    costs: dict[int, float] = {}
    n = 1000
    while n <= most:
        # The cheapest of the few: their cost is what others on the machine disturb most.
        repeats = 3 if n < 100_000 else 1
        costs[n] = min(drained(n) for _ in range(repeats)) / n
        n *= 10
    *few, many = costs.values()
    return {"": many / min(few), **{f"us at {n}": 1e6 * cost for n, cost in costs.items()}}


def _held(system: System, submit, finish, n: int) -> float:
    """Seconds to submit n jobs, and from the moment the workers are let go to the last result."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "go")
        gates = [system.submit(f.wait_for_file, path) for _ in range(N_WORKERS)]
        time.sleep(0.05)
        submitting_s, handles = timed(lambda: submit(range(n)))

        def let_go():
            Path(path).touch()
            system.results(gates)
            return finish(handles)

        # From here on: the first jobs have ended before anybody hears that the workers are free.
        finishing_s, values = timed(let_go)
    expect(len(values) == n and all(value == number for number, value in enumerate(values)))
    return submitting_s + finishing_s


@workload(
    "N",
    "cost of a map's item, 1,000,000 outstanding beside few",
    Metric("", "x", LOWER, Must(1.3)),
    ours_only=True,
    limit_s=120,
)
def growth_of_map(system: System, effort: Effort):
    if system.name in ("cloud.pool", "cloud.Executor"):
        raise NotOffered("as the verbs")
    most = 1_000_000 if effort.full else 100_000
    return _growth(
        system, effort, lambda n: _held(system, lambda r: system.cloud.map(f.noop, r), system.results, n), most
    )


@workload(
    "NC",
    "cost of a call, 1,000,000 outstanding beside few",
    Metric("", "x", LOWER, Must(1.3)),
    ours_only=True,
    limit_s=300,
)
def growth_of_calls(system: System, effort: Effort):
    most = 1_000_000 if effort.full else 100_000
    return _growth(
        system,
        effort,
        lambda n: _held(system, lambda r: [system.submit(f.noop, x) for x in r], system.results, n),
        most,
    )


@workload("NI", "processor time of an open pool with nothing to do", Metric("", "%", LOWER, Must(0.2)))
def idle(system: System, effort: Effort):
    for number in range(20):
        system.call(f.noop, number)
    time.sleep(0.5)
    pids = family()
    seconds = 1.0 + effort.seconds
    before = cpu_seconds(pids)
    time.sleep(seconds)
    return {"": 100 * (cpu_seconds(pids) - before) / seconds}
