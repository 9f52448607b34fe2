"""What every executor promises, through a real engine; a new one is one more line in ``EXECUTORS``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cloud.client.arguments import pack_items, pickle_call
from cloud.client.results import decode
from cloud.engine.clock import Clock, RealClock, VirtualClock
from cloud.engine.engine import Engine
from cloud.engine.executor.base import Executor
from cloud.engine.executor.processes import ProcessExecutor
from cloud.engine.executor.simulated import SimulatedExecutor
from cloud.engine.overview import describe
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.engine.worker.surroundings import snapshot
from cloud.errors import BackendClosed, JobFailed, JobKilled, UnsupportedOperation
from cloud.jobs import (
    DEFAULT_OPTIONS,
    DONE,
    ERROR,
    ERROR_TEXT,
    KILLED,
    PROCESSING,
    QUEUED,
    STDERR,
    STDOUT,
    Jids,
    JobOptions,
    Outcome,
)
from cloud.serialization import pickling
from cloud.serialization.functions import Function, FunctionCache
from tests.contract.executor_jobs import (
    Buffer,
    add,
    end_process,
    fail,
    fail_until,
    finally_note,
    ignore_kill,
    note_and_sleep,
    plus_one,
    print_and_hold,
    show,
    when,
)
from tests.contract.jobs import Gate, eventually, note, notes

SOON_S: Final = 20.0


def _processes(n_slots: int) -> tuple[Executor, Clock]:
    return ProcessExecutor(n_slots, grace_s=0.3), RealClock()


def _simulated(n_slots: int) -> tuple[Executor, Clock]:
    clock = VirtualClock()
    return SimulatedExecutor(n_slots, clock), clock


EXECUTORS: Final[dict[str, Callable[[int], tuple[Executor, Clock]]]] = {
    "processes": _processes,
    "simulated": _simulated,
}
OWN_PROCESS: Final = ("processes",)
"""Those whose jobs may end the process they run in, and ignore being killed."""


class House:
    """A real engine over an executor, and shorthands."""

    def __init__(self, executor: Executor, clock: Clock) -> None:
        self.executor = executor
        self.clock = clock
        self.engine = Engine(MemoryStore(JidSource()), executor, clock)
        self._functions = FunctionCache()
        self._context = (1, pickling.dumps_plain(snapshot()))

    def function(self, function: Callable[..., Any]) -> Function:
        return self._functions.get(function, None)

    def call(self, function: Callable[..., Any], *args: Any, **values: Any) -> int:
        options = JobOptions.from_dict(values) if values else DEFAULT_OPTIONS
        arguments = pickle_call(args, {}, None, plain=False, limit=0)
        return self.engine.submit(self.function(function), self._context, arguments, options)

    def map(self, function: Callable[..., Any], *blocks: list[Any], tuples: bool = False, **values: Any) -> range:
        options = JobOptions.from_dict(values) if values else DEFAULT_OPTIONS
        batch = self.engine.open_map(self.function(function), self._context, options)
        for block in blocks:
            for chunk in pack_items(block, None, tuples=tuples):
                self.engine.extend(batch, *chunk)
        return self.engine.seal(batch)

    def results(self, jids: Jids) -> list[Any]:
        """Values in order; the exception of a failed job in its place."""
        assert self.engine.wait(jids, SOON_S) == []
        return decode(jids, self.engine.outcomes(jids), None)[0]

    def result(self, jid: int) -> Any:
        return self.results((jid,))[0]

    def outcome(self, jid: int) -> Outcome:
        assert self.engine.wait((jid,), SOON_S) == []
        return Outcome(self.engine.outcomes((jid,))[0][3])

    def status(self, jid: int) -> int:
        return self.engine.statuses((jid,))[0]

    def kill(self, jids: Jids | None) -> None:
        assert self.engine.wait(self.engine.cancel(jids), SOON_S) == []


@pytest.fixture(params=EXECUTORS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each executor's name in turn."""
    return str(request.param)


@pytest.fixture
def open_house(kind: str, home: Path) -> Iterator[Callable[[int], House]]:
    """Make a house with so many slots; closed at the end."""
    houses: list[House] = []

    def make(n_slots: int) -> House:
        houses.append(House(*EXECUTORS[kind](n_slots)))
        return houses[-1]

    yield make
    for house in houses:
        house.engine.close()


@pytest.fixture
def one(open_house: Callable[[int], House]) -> House:
    """One slot."""
    return open_house(1)


@pytest.fixture
def two(open_house: Callable[[int], House]) -> House:
    """Two slots."""
    return open_house(2)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Opens at the end of the test, so that nothing waits for a test that has failed."""
    gate = Gate(tmp_path)
    yield gate
    gate.open()


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_call_gives_its_value(two: House) -> None:
    jid = two.call(plus_one, 41)
    assert two.result(jid) == 42
    assert two.status(jid) == DONE


@pytest.mark.parametrize("n", [1, 7, 500])
def test_a_map_gives_its_values_in_order(two: House, n: int) -> None:
    assert two.results(two.map(plus_one, list(range(n)))) == list(range(1, n + 1))


def test_a_map_of_several_chunks_of_every_kind(two: House) -> None:
    jids = two.map(add, [(1, 2), (3, 4)], [(5, 6)], tuples=True)
    assert two.results(jids) == [3, 7, 11]
    jids = two.map(len, [[1], [1, 2]], [[], "abc"], ["de"])
    assert two.results(jids) == [1, 2, 0, 3, 2]


def test_items_of_an_open_map_run(two: House) -> None:
    batch = two.engine.open_map(two.function(plus_one), (1, pickling.dumps_plain(snapshot())), DEFAULT_OPTIONS)
    for chunk in pack_items([1, 2, 3], None, tuples=False):
        two.engine.extend(batch, *chunk)
    assert two.engine.wait_until(lambda: batch.n_final == 3, SOON_S)
    assert two.results(two.engine.seal(batch)) == [2, 3, 4]


def test_many_calls(two: House) -> None:
    jids = [two.call(plus_one, x) for x in range(300)]
    assert two.results(jids) == list(range(1, 301))


@pytest.mark.parametrize("env_vars", [None, {"NAME": "value"}], ids=["no variables", "variables"])
@pytest.mark.parametrize("n_argument", [1, 1 << 20], ids=["small argument", "large argument"])
@pytest.mark.parametrize("n_function", [1, 1 << 15, 1 << 17, 200_000])
def test_a_function_for_one_call_arrives_beside_everything_else(
    two: House, n_function: int, n_argument: int, env_vars: dict[str, str] | None
) -> None:
    held = [b"f" * n_function]

    def function(given: Any) -> tuple[bytes, int, str | None]:
        return held[0], len(given.data), os.environ.get("NAME")

    values: dict[str, Any] = {} if env_vars is None else {"env_vars": env_vars}
    jids = []
    for n in range(3):
        held[0] = held[0][:-1] + str(n).encode()
        jids.append(two.call(function, Buffer(b"a" * n_argument), **values))
    jids += two.map(function, [Buffer(b"a")], **values)
    contents = [b"f" * (n_function - 1) + number for number in (b"0", b"1", b"2", b"2")]
    name = env_vars and "value"
    assert two.results(jids) == [
        (content, n, name) for content, n in zip(contents, [n_argument] * 3 + [1], strict=True)
    ]


def test_many_functions(two: House) -> None:
    def make(n: int) -> Callable[[int], int]:
        return lambda x: x + n

    functions = [make(n) for n in range(600)]
    for _ in range(2):
        assert two.results([two.call(function, 1) for function in functions]) == list(range(1, 601))
    assert two.results([two.call(functions[n % 2], 1) for n in range(6)]) == [1, 2] * 3
    assert [two.results(two.map(functions[0], [1, 2])), two.result(two.call(functions[0], 3))] == [[1, 2], 3]


def test_submitting_from_several_threads(two: House) -> None:
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = [two.result(two.call(plus_one, number * 100 + x)) for x in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
    assert found == {number: [number * 100 + x + 1 for x in range(20)] for number in range(4)}


def test_an_exception_is_an_error_of_its_job_alone(two: House) -> None:
    bad, good = two.call(fail, "no"), two.call(plus_one, 1)
    error, value = two.results([bad, good])
    assert value == 2
    assert isinstance(error, JobFailed)
    assert repr(error.__cause__) == "ValueError('no')"
    assert "ValueError: no" in (two.outcome(bad).text(ERROR_TEXT) or "")
    assert two.status(bad) == ERROR


def test_what_a_job_prints_is_its_own(two: House) -> None:
    for text, jid in [(text, two.call(show, text)) for text in ("a", "b", "c")]:
        outcome = two.outcome(jid)
        assert outcome.text(STDOUT) == f"{text}\n"
        assert outcome.text(STDERR) == f"{text.upper()}\n"


def test_an_outcome_tells_when_and_how_long(one: House) -> None:
    before = one.clock.now()
    outcome = one.outcome(one.call(when, 0.05))
    assert outcome.pid > 0
    assert before - 0.1 <= outcome.started <= one.clock.now()
    assert 0.05 <= outcome.runtime_s < SOON_S


# --- slots ------------------------------------------------------------------------------------------------------------


def most_at_once(spans: list[tuple[float, float]]) -> int:
    return max(sum(began <= moment < ended for began, ended in spans) for moment, _ in spans)


@pytest.mark.parametrize("n_slots", [1, 3])
def test_no_more_run_at_once_than_there_are_slots(open_house: Callable[[int], House], n_slots: int) -> None:
    house = open_house(n_slots)
    assert house.executor.n_slots == n_slots
    spans = house.results(house.map(when, [0.1] * (2 * n_slots + 1)))
    assert most_at_once(spans) == n_slots


def test_a_job_takes_the_slots_it_asks_for(two: House) -> None:
    jids = [two.call(when, 0.05, cores=cores) for cores in (2, 1, 2, 1)]
    assert most_at_once([two.result(jids[0]), two.result(jids[2])]) == 1
    assert most_at_once([two.result(jid) for jid in jids]) <= 2
    with pytest.raises(UnsupportedOperation):
        two.call(when, 0.0, cores=3)


def test_lower_priority_numbers_begin_first(one: House, gate: Gate) -> None:
    one.call(gate.hold)
    gate.await_begun()
    jids = {priority: one.call(when, 0.001, priority=priority) for priority in (5, -2, 9, 0)}
    gate.open()
    begun = {priority: one.result(jid)[0] for priority, jid in jids.items()}
    assert sorted(begun, key=lambda priority: begun[priority]) == [-2, 0, 5, 9]


def test_dependants_begin_after_their_dependencies(two: House) -> None:
    first = two.call(when, 0.05)
    second = two.call(when, 0.0, depends_on=[first])
    assert two.result(first)[1] <= two.result(second)[0]


# --- what runs now ----------------------------------------------------------------------------------------------------


def test_what_runs_is_told(one: House, gate: Gate) -> None:
    assert not one.executor.busy
    assert one.executor.running() == one.executor.held() == []
    jid, queued = one.call(gate.hold), one.call(plus_one, 1)
    gate.await_begun()
    where = one.engine.store.locate(jid)
    with one.engine.lock:
        assert one.executor.busy
        assert one.executor.running() == [(*where, where[1] + 1)]
        assert where in one.executor.held()
    assert [one.status(jid), one.status(queued)] == [PROCESSING, QUEUED]
    gate.open()
    assert one.results([jid, queued]) == [None, 2]
    with one.engine.lock:
        assert one.executor.running() == one.executor.held() == []
        assert not one.executor.busy


def test_a_running_job_is_described_as_it_runs(one: House, gate: Gate) -> None:
    jid = one.call(print_and_hold, gate, "so far")
    gate.await_begun()
    live = describe(one.engine, jid)["live"]
    assert live["pid"] > 0
    assert abs(live["started"] - one.clock.now()) < SOON_S
    assert eventually(lambda: describe(one.engine, jid)["live"]["stdout"]) == b"so far\n"
    assert live["stderr"] == b""


def test_what_does_not_run_is_not_alive(one: House) -> None:
    jid = one.call(plus_one, 1)
    one.result(jid)
    with one.engine.lock:
        assert one.executor.live(*one.engine.store.locate(jid)) == {}
        assert not one.executor.kill(*one.engine.store.locate(jid))


# --- kill -------------------------------------------------------------------------------------------------------------


def test_a_killed_job_runs_its_finally_blocks(two: House, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    jid = two.call(finally_note, path)
    eventually(lambda: notes(path))
    two.kill((jid,))
    assert two.status(jid) == KILLED
    assert isinstance(two.result(jid), JobKilled)
    assert notes(path) == ["begun", "finally"]


def test_others_go_on_when_one_is_killed(two: House, gate: Gate, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    other = two.call(gate.hold, "kept")
    victim = two.call(finally_note, path)
    gate.await_begun()
    eventually(lambda: notes(path))
    two.kill((victim,))
    assert two.status(other) == PROCESSING
    assert two.result(two.call(plus_one, 1)) == 2, "the slot is free again"
    gate.open()
    assert two.result(other) == "kept"


def test_what_is_killed_before_it_begins_never_runs(one: House, gate: Gate, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    # Short jobs are sent ahead once their length is known.
    one.results([one.call(note, os.devnull, str(n)) for n in range(20)])
    first = one.call(gate.hold)
    gate.await_begun()
    calls = [one.call(note, path, str(n)) for n in range(20)]
    jids = one.map(note, [(path, str(n)) for n in range(20, 40)], tuples=True)
    assert one.engine.cancel([*calls[::2], *jids[::2]]) == []
    gate.open()
    one.result(first)
    assert one.engine.wait([*calls, *jids], SOON_S) == []
    assert notes(path) == [str(n) for n in range(1, 40, 2)]


def test_killing_all_ends_all(two: House, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    jids = two.map(note_and_sleep, [(path, 3600.0)] * 6, tuples=True)
    eventually(lambda: len(notes(path)) == 2)
    two.kill(None)
    assert set(two.engine.statuses(jids)) == {KILLED}
    assert notes(path) == ["begun", "begun"]
    assert two.result(two.call(plus_one, 1)) == 2


@pytest.mark.parametrize("kind", OWN_PROCESS, indirect=True)
def test_a_job_that_ignores_being_killed_ends_all_the_same(two: House, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    jid = two.call(ignore_kill, path)
    eventually(lambda: notes(path))
    began = time.monotonic()
    two.kill((jid,))
    assert time.monotonic() - began < 2.0
    assert two.status(jid) == KILLED
    assert two.result(two.call(plus_one, 1)) == 2


def test_a_job_that_runs_too_long_is_killed(two: House, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    late = two.call(finally_note, path, max_runtime_s=0.5)
    in_time = two.call(when, 0.05, max_runtime_s=30.0)
    assert "_max_runtime" in (two.outcome(late).text(ERROR_TEXT) or "")
    assert two.status(late) == KILLED
    assert isinstance(two.result(in_time), tuple)


def test_the_time_limit_is_for_each_run(one: House, tmp_path: Path) -> None:
    """Neither waiting for a slot nor an earlier job's limit counts."""
    jids = [one.call(when, 0.3, max_runtime_s=1.0) for _ in range(4)]
    assert all(isinstance(value, tuple) for value in one.results(jids))


def test_the_time_limit_of_a_job_that_was_given_back_begins_anew(one: House) -> None:
    """Claimed, given back because another is killed, and overtaken: nothing of that counts as its own time."""
    jid = one.call(when, 0.5, max_runtime_s=1.0)
    first = one.call(when, 0.8, priority=0)
    one.kill((one.call(plus_one, 1),))
    assert isinstance(one.result(jid), tuple)
    assert isinstance(one.result(first), tuple)


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_failed_job_is_retried(two: House, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    jid = two.call(fail_until, path, 3, retries=2, retry_delay_s=0.01)
    assert two.result(jid) == 3
    assert describe(two.engine, jid)["attempt"] == 3
    path = str(tmp_path / "more")
    assert isinstance(two.result(two.call(fail_until, path, 3, retries=1, retry_delay_s=0.0)), JobFailed)
    assert len(notes(path)) == 2


@pytest.mark.parametrize("kind", OWN_PROCESS, indirect=True)
@pytest.mark.parametrize(("restartable", "retries"), [(True, 0), (False, 0), (False, 2)])
def test_a_job_whose_worker_is_killed_runs_again_if_it_may(
    two: House, tmp_path: Path, restartable: bool, retries: int
) -> None:
    path = str(tmp_path / "notes")
    jid = two.call(end_process, path, restartable=restartable, retries=retries, retry_delay_s=0.0)
    other = two.call(when, 0.2)
    value = two.result(jid)
    assert value == 2 if restartable else isinstance(value, JobFailed)
    assert len(notes(path)) == (2 if restartable else 1)
    assert isinstance(two.result(other), tuple)


# --- waiting and ending -----------------------------------------------------------------------------------------------


def test_a_wait_ends_in_time_and_leaves_the_job(one: House, gate: Gate) -> None:
    jid = one.call(gate.hold)
    gate.await_begun()
    began = one.clock.monotonic()
    assert one.engine.wait((jid,), 0) == [jid]
    assert one.engine.wait((jid,), 0.1) == [jid]
    assert 0.1 <= one.clock.monotonic() - began < SOON_S
    assert one.status(jid) == PROCESSING


def test_a_kill_from_elsewhere_ends_a_wait(one: House, gate: Gate) -> None:
    """For a job that no worker has: nothing else would wake who waits."""
    one.call(gate.hold)
    gate.await_begun()
    queued = one.call(plus_one, 1)
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.append(one.engine.wait((queued,), SOON_S)))
    waiter.start()
    eventually(one.engine.waiting._lead_lock.locked)
    began = time.monotonic()
    one.kill((queued,))
    waiter.join(SOON_S)
    assert found == [[]]
    assert time.monotonic() - began < 2.0


def test_an_interrupted_poll_returns(one: House) -> None:
    polled = threading.Event()

    def poll() -> None:
        one.executor.poll(None, may_jump=False)
        polled.set()

    thread = threading.Thread(target=poll)
    thread.start()
    deadline = time.monotonic() + SOON_S
    while not polled.wait(0.01) and time.monotonic() < deadline:
        one.executor.interrupt()
    thread.join(SOON_S)
    assert polled.is_set()


def test_a_poll_without_time_does_not_block(one: House, gate: Gate) -> None:
    began = time.monotonic()
    one.executor.poll(0.0, may_jump=False)
    assert time.monotonic() - began < 1.0


def test_close_ends_what_runs(two: House, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    two.map(note_and_sleep, [(path, 3600.0)] * 4, tuples=True)
    eventually(lambda: len(notes(path)) == 2)
    began = time.monotonic()
    two.engine.close()
    two.engine.close()
    assert time.monotonic() - began < 5.0
    with pytest.raises(BackendClosed):
        two.call(plus_one, 1)
    assert notes(path) == ["begun", "begun"]


def test_close_ends_the_waits_of_other_threads(one: House, gate: Gate) -> None:
    jid = one.call(gate.hold)
    gate.await_begun()
    found: list[BaseException] = []

    def wait() -> None:
        try:
            one.engine.wait((jid,), None)
        except BaseException as exc:
            found.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(one.engine.waiting._lead_lock.locked)
    one.engine.close()
    thread.join(SOON_S)
    assert [type(exc) for exc in found] == [BackendClosed]


def test_close_of_what_was_never_used(one: House) -> None:
    one.engine.close()


@pytest.mark.parametrize("kind", OWN_PROCESS, indirect=True)
def test_a_forked_child_lets_go_of_the_workers(two: House, gate: Gate) -> None:
    jid = two.call(gate.hold, "unharmed")
    gate.await_begun()
    pid = os.fork()
    if not pid:
        two.engine.abandon_all()
        two.engine.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert two.status(jid) == PROCESSING
    gate.open()
    assert two.result(jid) == "unharmed"
    assert two.result(two.call(plus_one, 1)) == 2
