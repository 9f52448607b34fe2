"""Callbacks: run in the submitting process, once a job, in order, whatever they do."""

from __future__ import annotations

import logging
import os
import queue
import threading
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.jobs import Gate, eventually


class Calls:
    """What was called back with, in order."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue()

    def add(self, value: Any = None) -> None:
        self._queue.put(value)

    def take(self, n: int = 1) -> list[Any]:
        return [self._queue.get(timeout=10) for _ in range(n)]

    def none_left(self) -> bool:
        return self._queue.empty()


def test_success_and_failure_have_their_own(api: ModuleType, gate: Gate) -> None:
    done, failed = Calls(), Calls()
    given: dict[str, Any] = {"_callback": done.add, "_callback_on_error": failed.add}
    good, bad = api.call(sample.square, 3, **given), api.call(sample.boom, **given)
    held = api.call(gate.hold, **given)
    stalled = api.call(sample.nothing, _depends_on=bad, **given)
    gate.await_begun()
    api.kill(held)
    assert done.take() == [good]
    assert sorted(failed.take(3)) == [bad, held, stalled]
    last = Calls()
    api.call(sample.nothing, _callback=last.add)
    last.take()
    assert done.none_left()
    assert failed.none_left()


def test_they_run_here_in_one_thread_of_their_own(api: ModuleType) -> None:
    calls = Calls()
    api.call(sample.nothing, _callback=lambda jid: calls.add((os.getpid(), threading.current_thread())))
    api.call(sample.boom, _callback_on_error=lambda jid: calls.add((os.getpid(), threading.current_thread())))
    (first_pid, first), (second_pid, second) = calls.take(2)
    assert first_pid == second_pid == os.getpid()
    assert first is second
    assert first is not threading.current_thread()
    assert first.daemon


def test_a_list_runs_in_order(api: ModuleType) -> None:
    calls = Calls()
    listed = [lambda jid: calls.add(("a", jid)), lambda: calls.add("b"), lambda jid: calls.add(("c", jid))]
    for given in (listed, tuple(listed), iter(listed)):
        jid = api.call(sample.nothing, _callback=given)
        assert calls.take(3) == [("a", jid), "b", ("c", jid)]


def test_any_callable_will_do(api: ModuleType) -> None:
    calls = Calls()

    class Callable:
        def __call__(self, jid: int) -> None:
            calls.add(("object", jid))

    found: list[int] = []
    for callback, expected in (
        (calls.add, lambda jid: jid),
        (lambda: calls.add("nothing"), lambda jid: "nothing"),
        (lambda *jids: calls.add(jids), lambda jid: (jid,)),
        (lambda jid, other=5: calls.add((jid, other)), lambda jid: (jid, 5)),
        (lambda *, key=1: calls.add(key), lambda jid: 1),
        (partial(calls.add, "bound"), lambda jid: "bound"),
        (partial(lambda a, b: calls.add((a, b)), "first"), lambda jid: ("first", jid)),
        (Callable(), lambda jid: ("object", jid)),
    ):
        jid = api.call(sample.nothing, _callback=callback)
        assert calls.take() == [expected(jid)]
    jid = api.call(sample.nothing, _callback=[found.append, calls.add])
    assert calls.take() == [jid]
    assert found == [jid]


def test_one_that_raises_is_logged_and_stops_nothing(api: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    calls = Calls()

    def raising(jid: int) -> None:
        raise ValueError(f"callback of {jid}")

    def exiting() -> None:
        raise SystemExit

    with caplog.at_level(logging.ERROR, logger="Cloud"):
        jid = api.call(sample.nothing, _callback=[raising, exiting, calls.add])
        assert calls.take() == [jid]
        again = api.call(sample.boom, _callback_on_error=[raising, calls.add])
        assert calls.take() == [again]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        f"callback {raising!r} of job {jid} raised",
        f"callback {exiting!r} of job {jid} raised",
        f"callback {raising!r} of job {again} raised",
    ]
    assert f"ValueError: callback of {jid}" in caplog.text


def test_of_a_map_they_run_for_each_job(api: ModuleType) -> None:
    done, failed = Calls(), Calls()
    jids = api.map(sample.boom_if, [0, 1] * 50, _callback=[done.add], _callback_on_error=failed.add)
    assert sorted(done.take(50)) == list(jids[::2])
    assert sorted(failed.take(50)) == list(jids[1::2])
    spread = api.starmap(sample.add, [(1, 2), (3, 4)], _callback=done.add)
    assert sorted(done.take(2)) == list(spread)
    api.map(sample.square, [], _callback=done.add)
    assert done.none_left()


def test_nobody_needs_to_wait(api: ModuleType, tmp_path: Path, gate: Gate) -> None:
    calls = Calls()
    jid = api.call(gate.hold, _callback=calls.add)
    gate.await_begun()
    assert calls.none_left()
    gate.open()
    assert calls.take() == [jid]


def test_they_may_use_the_verbs(api: ModuleType) -> None:
    calls = Calls()

    def go_on(jid: int) -> None:
        value = api.result(jid)
        calls.add((api.status(jid), value))
        if value < 10_000:
            api.call(sample.square, value, _callback=go_on)

    api.call(sample.square, 3, _callback=go_on)
    assert calls.take(4) == [("done", 9), ("done", 81), ("done", 6561), ("done", 43046721)]


def test_a_slow_one_holds_no_job_up(api: ModuleType) -> None:
    calls, going_on = Calls(), threading.Event()
    api.call(sample.nothing, _callback=[lambda: going_on.wait(10), calls.add])
    assert api.result(api.map(sample.square, range(20)), timeout=10) == [i * i for i in range(20)]
    assert calls.none_left()
    going_on.set()
    calls.take()


def test_a_retry_is_no_end(api: ModuleType, tmp_path: Path) -> None:
    done, failed = Calls(), Calls()
    jid = api.call(
        jobs.fail_first,
        str(tmp_path / "log"),
        2,
        _retries=2,
        _retry_delay=0,
        _callback=done.add,
        _callback_on_error=failed.add,
    )
    assert done.take() == [jid]
    assert failed.none_left()
    assert eventually(lambda: api.status(jid) == "done")
