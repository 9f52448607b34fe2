"""Counting and listing jobs: the contract under ``cloud status``, ``cloud jobs`` and ``cloud top``."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest

from cloud.backends.base import Backend
from cloud.jobs import DONE, ERROR, KILLED, PROCESSING, QUEUED, STALLED, STATUS_LABELS, WAITING
from tests import sample_functions as sample
from tests.contract.conftest import PROCESSES_ONLY
from tests.contract.jobs import Gate


def counts(backend: Backend) -> dict[str, int]:
    return {name: n for name, n in zip(STATUS_LABELS, backend.overview()["counts"], strict=True) if n}


def every(backend: Backend, limit: int = 100, **filters: Any) -> list[dict[str, Any]]:
    found, before = backend.listing(limit=limit, **filters)
    while before is not None:
        more, before = backend.listing(limit=limit, before=before, **filters)
        found += more
    return found


def fail() -> None:
    raise ValueError("no")


def test_there_is_nothing_at_first(backend: Backend) -> None:
    assert counts(backend) == {}
    assert backend.listing() == ([], None)


def test_what_ended_is_counted_by_status(api: ModuleType, backend: Backend) -> None:
    jids = api.map(abs, range(20))
    bad = api.call(fail)
    stalled = api.call(abs, 1, _depends_on=bad)
    killed = api.call(abs, 1, _depends_on=api.call(abs, -1), _priority=9)
    api.join([*jids, bad, stalled, killed], ignore_errors=True)
    assert counts(backend) == {"done": 22, "error": 1, "stalled": 1}
    api.delete([*jids[3:7], bad])
    assert counts(backend) == {"done": 18, "stalled": 1}
    api.delete(jids[7:])
    api.delete(jids[:3])
    assert counts(backend) == {"done": 2, "stalled": 1}


@PROCESSES_ONLY
@pytest.mark.usefixtures("one_slot")
def test_what_has_not_ended_is_counted(api: ModuleType, backend: Backend, gate: Gate) -> None:
    first = api.call(gate.hold)
    gate.await_begun()
    rest = api.map(abs, range(5))
    waiting = api.map(abs, range(3), _depends_on=first)
    assert counts(backend) == {"processing": 1, "queued": 5, "waiting": 3}
    facts = backend.overview()
    assert (facts["n_slots"], facts["n_used"]) == (1, 1)
    assert facts["n_workers"] >= 1
    (running,) = every(backend, status=[PROCESSING])
    assert running["jid"] == first
    assert 0 <= running["runtime_s"] < 60
    assert [each["jid"] for each in every(backend, status=[QUEUED])] == list(rest)[::-1]
    assert [each["jid"] for each in every(backend, status=[WAITING])] == list(waiting)[::-1]
    api.kill(waiting)
    assert counts(backend) == {"processing": 1, "queued": 5, "killed": 3}
    gate.open()
    api.join([first, *rest])
    assert counts(backend) == {"done": 6, "killed": 3}


@PROCESSES_ONLY
def test_retries_and_releases_leave_nothing_behind(api: ModuleType, backend: Backend) -> None:
    jid = api.call(fail, _retries=2, _retry_delay=0.01)
    after = api.map(abs, range(4), _depends_on=jid, _depends_on_errors="ignore")
    api.join(after)
    assert counts(backend) == {"error": 1, "done": 4}


def test_a_job_in_short(api: ModuleType, backend: Backend) -> None:
    before = time.time()
    jid = api.call(sample.print_both, "out", "err", _label="the label")
    api.join(jid)
    ((job,), more) = backend.listing()
    assert more is None
    assert job["created"] == pytest.approx(before, abs=60) or backend.name == "simulator"
    assert 0 <= job["runtime_s"] < 60
    assert job["started"] >= job["created"] - 1
    kept = {key: job[key] for key in ("jid", "status", "label", "attempt")}
    assert kept == {"jid": jid, "status": DONE, "label": "the label", "attempt": 1}
    assert job["function"].endswith("print_both")


def test_newest_first_and_page_by_page(api: ModuleType, backend: Backend) -> None:
    one = api.call(abs, 1)
    many = api.map(abs, range(25))
    last = api.call(abs, 2)
    api.join([one, *many, last])
    api.delete(many[4:9])
    expected = [last, *[jid for jid in many if jid not in many[4:9]][::-1], one]
    for limit in (1, 7, 100):
        assert [each["jid"] for each in every(backend, limit)] == expected
    assert [each["jid"] for each in backend.listing(before=many[10], limit=3)[0]] == [many[9], many[3], many[2]]


def test_filters(api: ModuleType, backend: Backend) -> None:
    a = api.call(abs, 1, _label="a")
    b = api.map(fail_for_odd, range(4), _label="b")
    api.join([a, *b], ignore_errors=True)
    assert [each["jid"] for each in every(backend, label="a")] == [a]
    assert [each["jid"] for each in every(backend, status=[ERROR])] == [b[3], b[1]]
    assert [each["jid"] for each in every(backend, status=[DONE], label="b")] == [b[2], b[0]]
    assert [each["jid"] for each in every(backend, function="fail_for_odd", status=[DONE, ERROR])] == list(b)[::-1]
    assert every(backend, function="odd") == []
    assert every(backend, status=[STALLED, KILLED]) == []


def fail_for_odd(i: int) -> None:
    if i % 2:
        raise ValueError(i)
