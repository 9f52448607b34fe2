"""Inside a job ``cloud`` and ``cloud.mp`` mean the engine that runs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cloud
import cloud.mp
from cloud.errors import CloudException, CloudTimeoutError, JobFailed, JobNotFound
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import PROCESSES_ONLY, beginning
from tests.contract.jobs import Gate, eventually, note, notes
from tests.scripts import ScriptRunner


def test_a_job_calls_and_waits_on_one_slot(api: ModuleType, one_slot: None) -> None:
    def parent(n: int) -> list[Any]:
        children = cloud.map(sample.square, range(n))
        return [cloud.result(cloud.call(sample.add, 1, b=2)), cloud.result(children), list(cloud.iresult(children))]

    assert api.result(api.call(parent, 3)) == [3, [0, 1, 4], [0, 1, 4]]
    assert api.result(api.map(parent, range(3))) == [
        [3, [i * i for i in range(n)], [i * i for i in range(n)]] for n in range(3)
    ]


def test_a_job_s_jobs_are_the_program_s_too(api: ModuleType, backend_name: str) -> None:
    def parent() -> list[Any]:
        first = cloud.call(sample.square, 3)
        return [first, cloud.result(first), cloud.find(), cloud.is_simulated()]

    jid = api.call(parent)
    assert api.result(jid) == [jid + 1, 9, [jid, jid + 1], backend_name != "http"]
    assert api.result(jid + 1) == 9
    assert api.info([jid, jid + 1], "depth") == {jid: {"depth": 0}, jid + 1: {"depth": 1}}


@PROCESSES_ONLY
def test_both_namespaces_are_the_engine_around_the_job(api: ModuleType) -> None:
    def parent() -> list[Any]:
        first, second = cloud.call(sample.square, 3), cloud.mp.call(sample.square, 4)
        return [first, second, cloud.mp.result(first), cloud.result(second), cloud.find() == cloud.mp.find()]

    assert api.result(api.call(parent)) == [2, 3, 9, 16, True]
    assert api.result([2, 3]) == [9, 16]


def test_recursion(api: ModuleType, two_slots: None) -> None:
    assert api.result(api.call(jobs.fibonacci, 6)) == 8


def test_a_hundred_deep_and_not_one_more(api: ModuleType, two_slots: None) -> None:
    depth, text = api.result(api.call(jobs.descend), timeout=100)
    assert depth == 100
    assert text.startswith("jobs submit jobs 101 levels deep; more than cloud.config.max_nesting = 100")
    assert [each["depth"] for each in api.info(api.find(), "depth").values()] == list(range(101))


@pytest.mark.parametrize("limit", [0, 3])
def test_the_depth_can_be_configured(api: ModuleType, configure: Callable[..., None], limit: int) -> None:
    configure(max_nesting=limit)
    assert api.result(api.call(sample.nested, limit)) == limit
    with pytest.raises(JobFailed, match=f"more than cloud.config.max_nesting = {limit}"):
        api.result(api.call(sample.nested, limit + 1))
    assert len(api.find()) == 2 * (limit + 1)


def test_a_failure_far_down_is_told_once(api: ModuleType, configure: Callable[..., None]) -> None:
    def fail_at(depth: int) -> None:
        if depth == 0:
            raise ValueError("far down")
        cloud.result(cloud.call(fail_at, depth - 1))

    with pytest.raises(JobFailed) as caught:
        api.result(api.call(fail_at, 12))
    text = caught.value.parameter
    assert text.endswith("ValueError: far down")
    assert text.count("far down") == 2  # the line that raises it, and what was raised
    assert len(text) < 20_000
    error: BaseException | None = caught.value
    for _ in range(13):
        assert isinstance(error, JobFailed)
        error = error.__cause__
    assert repr(error) == "ValueError('far down')"


def test_a_child_s_failure_is_the_parent_s_with_its_whole_chain(api: ModuleType) -> None:
    def parent() -> None:
        cloud.result(cloud.call(sample.chained))

    jid = api.call(parent)
    with pytest.raises(JobFailed) as caught:
        api.result(jid)
    assert caught.value.jid == jid
    child = caught.value.__cause__
    assert isinstance(child, JobFailed)
    assert (child.jid, child.status) == (jid + 1, "error")
    assert repr(child.__cause__) == "RuntimeError('outer')"
    assert repr(child.__cause__.__cause__) == "KeyError('missing')"


def test_a_parent_may_handle_its_child_s_failure(api: ModuleType) -> None:
    def parent() -> list[Any]:
        found: list[Any] = []
        for wait in (cloud.result, cloud.join, lambda jid: next(cloud.iresult(jid))):
            try:
                wait(cloud.call(sample.boom, "of the child"))
            except CloudException as exc:
                found.append((type(exc).__name__, repr(exc.__cause__)))
        jid = cloud.call(sample.boom)
        found.append(cloud.result([jid], ignore_errors=True)[0].status)
        return found

    assert api.result(api.call(parent)) == [("JobFailed", "ValueError('of the child')")] * 3 + ["error"]


def test_every_verb_works(api: ModuleType, two_slots: None, gate: Gate) -> None:
    def parent() -> None:
        done, failed = cloud.call(sample.square, 3, _label="done"), cloud.call(sample.boom)
        assert sorted(cloud.iresult_unordered([done, failed])) == [(done, 9)]
        assert cloud.join([done, failed], ignore_errors=True) is None
        assert cloud.status([done, failed]) == ["done", "error"]
        assert cloud.status(done) == "done"
        assert cloud.find(label="done", status="done", function="square") == [done]
        assert asyncio.run(cloud.aresult(done)) == 9
        printed = cloud.call(jobs.show, "text")
        cloud.join(printed)
        info = cloud.info(printed, "all")[printed]
        assert (info["stdout"], info["status"], info["depth"]) == ("text\n", "done", 1)
        assert cloud.info(failed, "exception")[failed]["exception"].endswith("ValueError: boom")
        assert list(cloud.starmap(sample.add, [(1, 2)])) == [printed + 1]
        assert cloud.result(printed + 1) == 3
        held = cloud.call(gate.hold)
        after = cloud.call(sample.nothing, _depends_on=held)
        eventually(lambda: cloud.status(held) == "processing")
        assert cloud.info(held, "pid")[held]["pid"] > 0
        for wait in (cloud.join, cloud.result, cloud.aresult):
            try:
                found = wait(held, timeout=0.02)
                if asyncio.iscoroutine(found):
                    asyncio.run(found)
            except CloudTimeoutError as exc:
                assert exc.jid == [held]
            else:
                raise AssertionError(wait)
        cloud.kill(held)
        assert cloud.status([held, after]) == ["killed", "stalled"]
        cloud.kill([])
        cloud.delete([held, after])
        for ask in (cloud.status, cloud.result, cloud.info, cloud.delete, cloud.kill, cloud.join):
            try:
                ask([done, held])
            except JobNotFound as exc:
                assert str(exc) == f"Job {held}: Does not exist or was purged from cache"
            else:
                raise AssertionError(ask)
        assert cloud.connection_info()["num_procs"] == 2
        assert cloud.connection_info()["opened"] is True
        assert cloud.running_on_cloud() is not cloud.is_simulated()

    api.result(api.call(parent), timeout=30)


def test_options_work(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def parent() -> list[Any]:
        retried = cloud.call(jobs.fail_first, log, 2, "at last", _retries=2, _retry_delay=0)
        after = cloud.map(sample.square, range(3), _depends_on=retried, _priority=1, _label="after")
        stalled = cloud.call(sample.nothing, _depends_on=cloud.call(sample.boom))
        cloud.join(stalled, ignore_errors=True)
        refused = []
        for given in ({"_label": 5}, {"_cores": 10**6}, {"_depends_on": 10**9}):
            try:
                cloud.call(sample.nothing, **given)
            except (TypeError, CloudException) as exc:
                refused.append(type(exc).__name__)
        return [cloud.result(retried), cloud.result(after), cloud.find(label="after"), cloud.status(stalled), refused]

    found = api.result(api.call(parent))
    assert found[0:2] == ["at last", [0, 1, 4]]
    assert found[3:] == ["stalled", ["TypeError", "UnsupportedOperation", "JobNotFound"]]
    assert api.find(label="after") == found[2]


def test_callbacks_run_in_the_parent(api: ModuleType) -> None:
    def parent() -> tuple[list[int], list[int]]:
        done: list[int] = []
        failed: list[int] = []
        given: dict[str, Any] = {"_callback": done.append, "_callback_on_error": failed.append}
        jids = [
            cloud.call(sample.nothing, **given),
            cloud.call(sample.boom, **given),
            *cloud.map(sample.square, [1, 2], **given),
        ]
        cloud.join(jids, ignore_errors=True)
        eventually(lambda: len(done) + len(failed) == 4)
        return [jid - jids[0] for jid in sorted(done)], [jid - jids[0] for jid in failed]

    assert api.result(api.call(parent)) == ([0, 2, 3], [1])


def test_a_child_may_outlive_its_parent(api: ModuleType, gate: Gate) -> None:
    def parent() -> int:
        return cloud.call(gate.hold, "of the child")

    child = api.result(api.call(parent))
    gate.await_begun()
    assert api.status(child) == "processing"
    gate.open()
    assert api.result(child) == "of the child"


def test_killing_a_parent_that_waits_leaves_its_child(
    api: ModuleType, one_slot: None, gate: Gate, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")

    def parent() -> None:
        try:
            cloud.result(cloud.call(gate.hold, "of the child"))
        finally:
            note(log, "cleaned up")

    jid = api.call(parent)
    gate.await_begun()
    began = time.monotonic()
    api.kill(jid)
    assert time.monotonic() - began < 5
    assert notes(log) == ["cleaned up"]
    assert api.status([jid, jid + 1]) == ["killed", "processing"]
    gate.open()
    assert api.result(jid + 1) == "of the child"
    assert api.result(api.map(sample.square, range(5))) == [0, 1, 4, 9, 16]


def test_a_waiting_job_s_slot_is_used(api: ModuleType, one_slot: None, gate: Gate) -> None:
    def parent() -> int:
        child = cloud.call(gate.hold)
        return sum(cloud.result([child, cloud.call(sample.square, 3)], ignore_errors=True)[1:])

    parents = [api.call(parent) for _ in range(3)]
    gate.await_begun(1)
    gate.open()
    assert api.result(parents, timeout=20) == [9, 9, 9]


@PROCESSES_ONLY
def test_threads_of_a_job_use_the_verbs(api: ModuleType, two_slots: None) -> None:
    def parent() -> list[int]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda i: cloud.result(cloud.call(sample.square, i)), range(12)))

    assert api.result(api.call(parent)) == [i * i for i in range(12)]


def test_what_a_job_submits_is_taken_by_value(api: ModuleType, one_slot: None) -> None:
    def parent() -> list[Any]:
        captured, argument = [1], [10]
        child = cloud.call(lambda given: (list(captured), given), argument)
        captured.append(2)
        argument.append(20)
        return [cloud.result(child), cloud.result(cloud.call(lambda: captured))]

    assert api.result(api.call(parent)) == [([1], [10]), [1, 2]]


def test_functions_of_main_submit_functions_of_main(run_script: ScriptRunner, backend_name: str) -> None:
    program = beginning(backend_name) + "\n".join(
        (
            "offset = 1",
            "class Box:",
            "    def __init__(self, n): self.n = n",
            "def child(box): return Box(box.n + offset)",
            "def parent(n):",
            "    import cloud",
            "    boxes = cloud.result(cloud.map(child, [Box(i) for i in range(n)]))",
            "    return boxes, isinstance(boxes[0], Box), cloud.result(cloud.call(lambda: offset * 100))",
            "boxes, same, hundred = api.result(api.call(parent, 3))",
            "print([type(box) is Box and box.n for box in boxes], same, hundred)",
        )
    )
    assert run_script(program).stdout == "[1, 2, 3] True 100\n"
