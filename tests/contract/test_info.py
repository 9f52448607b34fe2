"""What ``info`` tells of a job: its keys, their units, and when they are there."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cloud.client.info import KEYS
from cloud.errors import CloudException, JobFailed, JobNotFound
from tests import sample_functions as sample
from tests.contract.conftest import PROCESSES_ONLY
from tests.contract.jobs import Gate, NotesDumps, eventually, show

DEFAULT = {"status", "stdout", "stderr", "runtime"}


def test_it_is_keyed_by_jid_whatever_was_asked(api: ModuleType) -> None:
    jids = api.map(lambda i: show(str(i)), range(3))
    api.join(jids)
    assert api.info(jids[1], "stdout") == {jids[1]: {"stdout": "1\n"}}
    assert api.info(jids[::-1], ["stdout"]) == {jid: {"stdout": f"{i}\n"} for i, jid in enumerate(jids)}
    assert list(api.info([jids[2], jids[0], jids[2]])) == [jids[2], jids[0]]
    assert api.info([]) == {}


def test_keys_are_asked_for_in_several_ways(api: ModuleType) -> None:
    jid = api.call(sample.nothing)
    api.join(jid)
    assert set(api.info(jid)[jid]) == DEFAULT
    assert set(api.info(jid, None)[jid]) == DEFAULT
    assert set(api.info(jid, "all")[jid]) == set(KEYS)
    assert set(api.info(jid, info_requested=("status", "all"))[jid]) == set(KEYS)
    assert list(api.info(jid, iter(["label", "status"]))[jid]) == ["label", "status"]
    assert api.info(jid, []) == {jid: {}}


def test_unknown_keys_are_left_out(api: ModuleType) -> None:
    jid = api.call(sample.nothing)
    api.join(jid)
    assert api.info(jid, "no such key") == {jid: {}}
    assert api.info(jid, ["status", "Status", ""]) == {jid: {"status": "done"}}


@pytest.mark.parametrize("wrong", [5, True, b"status", [5], [b"status"], ["status", None], object()], ids=repr)
def test_keys_are_text(api: ModuleType, wrong: Any) -> None:
    jid = api.call(sample.nothing)
    with pytest.raises(TypeError, match="info_requested must be a str or an iterable of str"):
        api.info(jid, wrong)


def test_a_job_that_ended(api: ModuleType) -> None:
    before = datetime.now(UTC)
    jid = api.call(sample.print_both, "to out", "to err", _label="the label")
    api.join(jid)
    found = api.info(jid, "all")[jid]
    moments = [found[key] for key in ("created", "started", "finished")]
    assert all(each.tzinfo is UTC for each in moments)
    assert moments == sorted(moments)
    assert before - timedelta(seconds=1) <= moments[0] <= moments[2] <= datetime.now(UTC) + timedelta(seconds=1)
    assert type(found["runtime"]) is float
    assert found["runtime"] == pytest.approx((moments[2] - moments[1]).total_seconds(), abs=1e-4)
    assert found["pid"] > 0
    assert found["worker"] == f"{platform.node()}:{found['pid']}"
    for key, value in {
        "status": "done",
        "stdout": "to out\n",
        "stderr": "to err\n",
        "exception": None,
        "hostname": platform.node(),
        "attempt": 1,
        "function": "tests.sample_functions.print_both",
        "label": "the label",
        "depth": 0,
        "profile": None,
        "shared_by": 1,
    }.items():
        assert found[key] == value, key


def test_a_job_that_runs(api: ModuleType, gate: Gate) -> None:
    def job() -> None:
        print("so far")
        gate.hold()

    jid = api.call(job, _label="live")
    [pid] = gate.await_begun()
    found = api.info(jid, "all")[jid]
    assert found["status"] == "processing"
    assert found["stdout"] == "so far\n"
    assert found["stderr"] == ""
    assert found["label"] == "live"
    assert found["attempt"] == 1
    assert found["pid"] == pid
    assert found["created"] <= found["started"] + timedelta(seconds=0.01)
    for key in ("exception", "finished", "profile", "cputime.user", "cputime.system", "memory.max_usage"):
        assert found[key] is None, key
    assert set(found) == set(KEYS)
    with pytest.raises(CloudException, match="timed out"):
        api.join(jid, timeout=0.1)
    later = api.info(jid, "runtime")[jid]["runtime"]
    assert later >= found["runtime"] + 0.09


def test_a_job_that_has_not_begun(api: ModuleType, one_slot: None, gate: Gate) -> None:
    api.call(gate.hold)
    gate.await_begun()
    queued, mapped = api.call(sample.nothing), api.map(sample.square, range(2))
    waiting = api.call(sample.nothing, _depends_on=queued)
    for jid, status in ((queued, "queued"), (mapped[1], "queued"), (waiting, "waiting")):
        found = api.info(jid, "all")[jid]
        assert set(found) == set(KEYS)
        assert (found["status"], found["stdout"], found["stderr"]) == (status, "", "")
        assert found["created"].tzinfo is UTC
        for key in ("runtime", "started", "finished", "pid", "worker", "exception", "cputime.user"):
            assert found[key] is None, key
    api.kill(queued)
    found = api.info([queued, waiting], "all")
    assert found[queued]["exception"] == "Killed"
    assert found[waiting]["exception"] == "Could not start due to dependency erroring"
    assert {found[jid][key] for jid in found for key in ("runtime", "started", "finished", "pid")} == {None}


def test_a_job_that_failed(api: ModuleType) -> None:
    def job() -> None:
        print("before")
        raise ValueError("why")

    jid = api.call(job)
    api.join(jid, ignore_errors=True)
    found = api.info(jid, "all")[jid]
    assert (found["status"], found["stdout"]) == ("error", "before\n")
    assert found["exception"].startswith("Traceback (most recent call last):")
    assert found["exception"].endswith("ValueError: why")
    assert found["finished"] >= found["started"] >= found["created"] - timedelta(seconds=0.01)


@PROCESSES_ONLY
def test_a_job_that_lost_its_worker(api: ModuleType) -> None:
    def job() -> None:
        print("before", flush=True)
        time.sleep(0.05)
        os._exit(4)

    jid = api.call(job)
    with pytest.raises(JobFailed):
        api.join(jid)
    found = api.info(jid, "all")[jid]
    assert (found["status"], found["stdout"]) == ("error", "before\n")
    assert "exited with code 4" in found["exception"]
    assert found["pid"] > 0
    assert 0.05 <= found["runtime"] < 5
    assert found["created"] <= found["started"] <= found["finished"]


def test_cpu_time_and_memory(api: ModuleType) -> None:
    def work() -> int:
        kept = bytearray(40_000_000)
        return sample.cpu(0.2) and len(kept)

    called, mapped = api.call(work), api.map(lambda i: work(), range(2))
    api.join([called, mapped])
    for jid in (called, *mapped):
        found = api.info(jid, ["cputime.user", "cputime.system", "memory.max_usage", "runtime"])[jid]
        assert 0.15 <= found["cputime.user"] + found["cputime.system"] < 5
        assert 40_000_000 < found["memory.max_usage"] < 10**12


def test_sleeping_costs_runtime_and_no_cpu_time(api: ModuleType) -> None:
    jid = api.call(sample.sleep_then, 0.1)
    api.join(jid)
    found = api.info(jid, ["cputime.user", "cputime.system", "runtime"])[jid]
    assert 0.1 <= found["runtime"] < 5
    assert found["cputime.user"] + found["cputime.system"] < 0.09


def test_items_that_are_not_small_have_times_of_their_own(api: ModuleType) -> None:
    jids = api.map(sample.sleep_then, [0.0, 0.0, 0.004, 0.0, 0.008, 0.001, 0.0, 0.002] * 3)
    api.join(jids)
    found = api.info(jids, ["shared_by", "runtime", "started", "finished", "cputime.user"])
    for jid, slept_s in zip(jids, [0.0, 0.0, 0.004, 0.0, 0.008, 0.001, 0.0, 0.002] * 3, strict=True):
        facts = found[jid]
        if slept_s:
            assert (facts["shared_by"], slept_s <= facts["runtime"] < slept_s + 1) == (1, True)
            assert (facts["finished"] - facts["started"]).total_seconds() == pytest.approx(facts["runtime"], abs=1e-4)
        else:
            assert facts["runtime"] < 1


def test_what_pickling_a_result_takes_is_no_runtime(api: ModuleType, one_slot: None, tmp_path: Path) -> None:
    path = str(tmp_path / "asked")

    def job(i: int) -> Any:
        if i == 1:
            time.sleep(0.002)
        return NotesDumps(path, seconds=0.2 if i in (1, 5) else 0.0) if i % 4 == 1 else [i]

    api.join(api.map(job, [0] * 50))
    jids = api.map(job, range(50))
    api.join(jids)
    found = api.info(jids, ["runtime", "shared_by"])
    assert sum(facts["runtime"] for facts in found.values()) < 0.2
    assert all(facts["runtime"] >= 0 for facts in found.values())


def test_items_that_share_a_record_have_processor_times_of_their_own(api: ModuleType) -> None:
    def work(busy: bool) -> None:
        sample.cpu(0.004) if busy else time.sleep(0.004)

    kinds = [True, False, False] * 20
    jids = api.map(work, kinds)
    api.join(jids)
    found = api.info(jids, ["cputime.user", "cputime.system", "shared_by"])
    used_s = [found[jid]["cputime.user"] + found[jid]["cputime.system"] for jid in jids]
    assert {found[jid]["shared_by"] for jid in jids} == {1}
    assert min(each for each, busy in zip(used_s, kinds, strict=True) if busy) > 0.003
    # The median: the first of a worker may import, and the machine may be busy.
    assert sorted(each for each, busy in zip(used_s, kinds, strict=True) if not busy)[20] < 0.002


def test_many_at_once(api: ModuleType) -> None:
    mapped, single = api.map(abs, range(2300)), api.call(sample.print_both, "out", "err")
    api.join([*mapped, single])
    jids = [*mapped[::-1], single, *mapped[:5]]
    found = api.info(jids, ["status", "stdout", "function"])
    assert list(found) == [*mapped[::-1], single]
    assert all(found[jid] == {"status": "done", "stdout": "", "function": "builtins.abs"} for jid in mapped)
    assert found[single] == api.info(single, ["status", "stdout", "function"])[single]
    with pytest.raises(JobNotFound) as caught:
        api.info([*mapped, single + 1000], "status")
    assert caught.value.jid == single + 1000


def test_final_and_running_ones_are_not_mixed_up(api: ModuleType, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    ended = api.call(sample.print_both, "of the one that ended", "its errors")
    mapped = api.map(abs, range(3))
    api.join([ended, *mapped])

    def loud() -> None:
        sample.print_both("so far", "its own")
        gate.hold()

    runs = api.call(loud)
    gate.await_begun()
    try:
        eventually(lambda: api.info(runs, "stderr")[runs]["stderr"])
        order = [ended, runs, mapped[0], runs, ended, mapped[2], mapped[0]]
        together = api.info(order, ["status", "stdout", "stderr", "function"])
        assert together == {jid: api.info(jid, ["status", "stdout", "stderr", "function"])[jid] for jid in order}
        assert (together[ended]["stdout"], together[ended]["stderr"]) == ("of the one that ended\n", "its errors\n")
        assert together[mapped[2]]["status"] == "done"
    finally:
        gate.open()
    api.join(runs)


def test_small_items_of_a_map_share_their_times(api: ModuleType, backend_name: str) -> None:
    jids = api.map(sample.square, range(3000))
    api.join(jids)
    found = api.info(jids, ["shared_by", "runtime", "status"])
    assert all(each["shared_by"] >= 1 and each["runtime"] >= 0 for each in found.values())
    shared = [each["shared_by"] for each in found.values() if each["shared_by"] > 1]
    # Those that took longer, as on a busy machine, have times of their own.
    assert len(shared) > 1500 or backend_name == "simulator"
    # What shares is counted where it shares: k items that share with each other make one.
    n_runs = sum(1 / n for n in shared)
    assert n_runs == pytest.approx(round(n_runs))
    assert n_runs <= len(api.call.__self__.backend.outcomes(jids))


def test_functions_have_their_names(api: ModuleType) -> None:
    def local() -> None:
        pass

    for function, name in (
        (sample.nothing, "tests.sample_functions.nothing"),
        (local, f"{__name__}.test_functions_have_their_names.<locals>.local"),
        (lambda: None, f"{__name__}.test_functions_have_their_names.<locals>.<lambda>"),
        (partial(sample.square, 3), "tests.sample_functions.square"),
        (dict, "builtins.dict"),
    ):
        jid = api.call(function)
        assert api.info(jid, "function") == {jid: {"function": name}}
