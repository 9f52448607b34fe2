"""Maps: one submission of N jobs that share a function."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cloud.errors import CloudException, JobFailed, SerializationError
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import CHILDREN_ONLY
from tests.contract.jobs import CountsLoads, FailsToDump, Gate, NotesDumps, Point, eventually, notes


def test_it_returns_the_jids_as_a_range(api: ModuleType) -> None:
    jids = api.map(sample.square, [3, 1, 2])
    assert type(jids) is range
    assert len(jids) == 3
    assert api.result(jids) == [9, 1, 4]
    assert api.result(jids[::-1]) == [4, 1, 9]
    assert [api.result(jid) for jid in jids] == [9, 1, 4]


@pytest.mark.parametrize(
    ("iterables", "expected"),
    [
        (([1, 3, 5], [2, 4, 6]), [(1, 2), (3, 4), (5, 6)]),
        (([1, 2, 3], [1]), [(1, 1), (2, None), (3, None)]),
        (([], "ab"), [(None, "a"), (None, "b")]),
        (("ab", range(2)), [("a", 0), ("b", 1)]),
        (({"k": 1}, [None]), [("k", None)]),
        (([[1], {2}], "xy"), [([1], "x"), ({2}, "y")]),
        (([], []), []),
    ],
    ids=repr,
)
def test_several_iterables_are_taken_in_parallel_and_padded_with_none(
    api: ModuleType, iterables: Any, expected: list[Any]
) -> None:
    assert api.result(api.map(jobs.two, *(iter(each) for each in iterables))) == expected


def test_of_one_iterable_items_arrive_as_they_are(api: ModuleType) -> None:
    items = [(1, 2), [3], None, "xy", {"a": 1}, (), Point(1), 1.5, b"", {1, 2}, lambda: 7]
    results = api.result(api.map(sample.identity, items))
    assert results[:-1] == items[:-1]
    assert results[-1]() == 7


def test_starmap_spreads_each_item(api: ModuleType) -> None:
    items = [(2, 5), [3, 2], iter((10,)), "ab"]
    assert api.result(api.starmap(sample.add, items)) == [7, 5, 11, "ab"]
    assert api.result(api.starmap(pow, ((x, 2) for x in range(4)))) == [0, 1, 4, 9]
    assert api.result(api.starmap(sample.nothing, [(), []])) == [None, None]
    assert list(api.starmap(sample.add, [])) == []


def test_what_is_no_iterable_is_refused_before_any_is_consumed(api: ModuleType) -> None:
    untouched = iter("ab")
    for refused, text in (
        (partial(api.map, sample.square, 5), "map argument 1 (5) is not an iterable"),
        (partial(api.map, jobs.two, untouched, None), "map argument 2 (None) is not an iterable"),
        (partial(api.starmap, jobs.two, 7), "starmap argument 1 (7) is not an iterable"),
    ):
        with pytest.raises(TypeError) as caught:
            refused()
        assert str(caught.value) == text
    assert list(untouched) == ["a", "b"]
    assert api.find() == []


def test_it_needs_an_iterable(api: ModuleType) -> None:
    with pytest.raises(ValueError, match=rf"^{api.__name__}\.map needs at least 2 arguments"):
        api.map(sample.nothing)


def test_keyword_arguments_are_refused(api: ModuleType) -> None:
    untouched = iter("ab")
    for verb in ("map", "starmap"):
        with pytest.raises(ValueError, match=rf"^Cannot pass keyword arguments into {api.__name__}\.{verb}.*_mine, b"):
            getattr(api, verb)(sample.add, untouched, b=2, _mine=1)
    assert list(untouched) == ["a", "b"]
    assert api.find() == []


def test_a_generator_is_consumed_while_its_first_items_run(api: ModuleType, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def items() -> Iterator[int]:
        yield 0
        eventually(lambda: notes(log) == ["0"])
        yield from range(1, 2000)
        eventually(lambda: len(notes(log)) > 1000)

    assert api.result(api.map(lambda i: jobs.note(log, str(i)), items())) == [None] * 2000
    assert sorted(map(int, notes(log))) == list(range(2000))


def test_an_endless_iterable_that_raises_leaves_nothing(api: ModuleType, tmp_path: Path, gate: Gate) -> None:
    log = str(tmp_path / "log")
    before = api.call(sample.square, 3)

    def items() -> Iterator[int]:
        for i in itertools.count():
            if gate.n_begun:
                raise LookupError("no more")
            yield i

    def hold(i: int) -> None:
        gate.hold_then_note(log)

    for verb in (api.map, lambda function, them: api.starmap(function, ((i,) for i in them))):
        with pytest.raises(LookupError, match="no more"):
            verb(hold, items())
        assert api.find() == [before]
    assert "let go" not in eventually(lambda: notes(log))
    assert api.result([before, *api.map(sample.square, range(3))]) == [9, 0, 1, 4]


def test_an_iterable_that_raises_at_once_leaves_nothing(api: ModuleType) -> None:
    def items() -> Iterator[int]:
        raise LookupError
        yield

    with pytest.raises(LookupError):
        api.map(sample.square, items())
    assert api.find() == []


@pytest.mark.parametrize("at", [0, 1, 150, 5000])
def test_an_item_that_cannot_be_pickled_is_named_and_leaves_nothing(api: ModuleType, at: int) -> None:
    items = itertools.chain(range(at), [FailsToDump()], range(at))
    with pytest.raises(SerializationError, match=r"argument 1.*FailsToDump"):
        api.map(sample.identity, items)
    with pytest.raises(SerializationError, match=r"argument 2.*FailsToDump"):
        api.map(jobs.two, range(2 * at + 1), itertools.chain(range(at), [FailsToDump()], range(at)))
    assert api.find() == []


def test_a_map_has_no_limit(api: ModuleType, backend_name: str) -> None:
    # The simulator passes a turn from thread to thread for each item.
    n = 10_000 if backend_name == "simulator" else 100_000
    jids = api.map(sample.square, iter(range(n)))
    assert len(jids) == n
    assert api.result(jids) == [i * i for i in range(n)]
    assert set(api.status(jids)) == {"done"}
    assert api.result(jids[n // 2]) == (n // 2) ** 2
    assert api.info(jids[-1], "status") == {jids[-1]: {"status": "done"}}
    api.delete(jids)
    assert api.find() == []


def test_large_items_and_results(api: ModuleType) -> None:
    items = [bytes([i]) * (1 << 20) for i in range(12)]
    assert api.result(api.map(sample.identity, items)) == items
    assert api.result(api.map(sample.size, (item for item in items))) == [1 << 20] * 12


def test_jobs_share_one_copy_of_the_function(api: ModuleType, two_slots: None, tmp_path: Path) -> None:
    counted = CountsLoads(str(tmp_path / "loads"))

    def uses_it(i: int) -> int:
        return i + len(type(counted).__name__)

    assert api.result(api.map(uses_it, range(500))) == [i + 11 for i in range(500)]
    assert 1 <= len(notes(counted.path)) <= 2


def test_jobs_share_no_item(api: ModuleType, one_slot: None) -> None:
    item: list[int] = []
    assert api.result(api.map(jobs.append, [item] * 300, range(300))) == [[i] for i in range(300)]


def test_jobs_that_change_their_items_are_given_them_anew(api: ModuleType, one_slot: None, tmp_path: Path) -> None:
    records = [{"log": str(tmp_path / str(number)), "seen": []} for number in range(40)]
    jids = api.map(jobs.change_and_fail_first, records, _retries=1, _retry_delay=0)
    assert api.result(jids) == [["here"]] * 40
    assert [len(notes(record["log"])) for record in records] == [2] * 40
    rows = [[number] for number in range(1000)]
    assert api.result(api.map(jobs.append, rows, ({"a": number} for number in range(1000)))) == [
        [number, {"a": number}] for number in range(1000)
    ]
    assert rows[3] == [3]


@CHILDREN_ONLY
def test_what_jobs_put_into_their_items_is_let_go(api: ModuleType, one_slot: None) -> None:
    found = api.result(api.map(jobs.n_living, [{"number": number} for number in range(100)]))
    assert max(found) <= 2


def test_one_failure_costs_only_its_own_job(api: ModuleType) -> None:
    def fails_at_three(i: int) -> int:
        if i % 10 == 3:
            raise ValueError(f"item {i}")
        return i

    jids = api.map(fails_at_three, range(100))
    found = api.result(jids, ignore_errors=True)
    for i, (jid, value) in enumerate(zip(jids, found, strict=True)):
        if i % 10 == 3:
            assert type(value) is JobFailed
            assert (value.jid, value.status, str(value.__cause__)) == (jid, "error", f"item {i}")
        else:
            assert value == i
    assert api.find(status="error") == [jids[i] for i in range(3, 100, 10)]
    with pytest.raises(CloudException) as caught:
        api.result(jids)
    assert caught.value.jid == jids[3]


def test_values_that_travel_in_different_ways(api: ModuleType) -> None:
    n = 130
    jids = api.map(jobs.of_any_kind, range(n))
    found = api.result(jids, ignore_errors=True)
    for i, value in enumerate(found):
        kind = i % 13
        if kind in (9, 10):
            assert type(value) is (SerializationError if kind == 9 else JobFailed)
            assert value.jid == jids[i]
        elif kind == 12:
            assert repr(value.__cause__) == f"ValueError('job {i}')"
        else:
            assert type(value) is type(jobs.of_any_kind(i))
            assert str(value) == str(jobs.of_any_kind(i))
    assert [status == "done" for status in api.status(jids)] == [i % 13 not in (10, 12) for i in range(n)]
    printed = {jid: facts["stdout"] for jid, facts in api.info(jids, ["stdout"]).items() if facts["stdout"]}
    assert printed == {jids[i]: f"job {i}\n" for i in range(n) if i % 13 == 11}
    one_by_one = [api.result(jid, ignore_errors=True) for jid in jids]
    assert [str(value) for value in one_by_one] == [str(value) for value in found]


def test_a_result_that_cannot_be_pickled_is_told_of_alike(api: ModuleType) -> None:
    jids = [api.call(sample.unpicklable_result), *api.map(lambda _: sample.unpicklable_result(), range(2))]
    errors = api.result(jids, ignore_errors=True)
    texts = {re.sub("0x[0-9a-f]+", "", str(error).partition(":")[2]) for error in errors}
    assert len(texts) == 1
    (text,) = texts
    assert "cannot be pickled" in text
    assert "engine/worker" not in text


def test_a_value_is_as_it_was_when_its_job_ended(api: ModuleType, one_slot: None) -> None:
    seen: list[int] = []

    def noting(i: int) -> Any:
        seen.append(i)
        return None if i % 7 == 3 else seen

    for i, value in enumerate(api.result(api.map(noting, range(300)))):
        assert value is None if i % 7 == 3 else (value[-1] == i and value == sorted(value))


def test_each_look_at_a_result_gives_a_value_of_its_own(api: ModuleType) -> None:
    jids = api.map(jobs.two, range(50), range(50))
    lists = api.map(jobs.append, [[]] * 50, range(50))
    first = api.result(lists)
    first[7].append("changed")
    assert api.result(lists[7]) == [7]
    assert api.result(lists[7]) is not api.result(lists[7])
    assert api.result(jids[::-1]) == [(i, i) for i in range(50)][::-1]


def test_what_is_printed_while_a_result_is_pickled_is_its_jobs_own(api: ModuleType) -> None:
    jids = api.map(jobs.PrintsWhenPickled, [f"value {i}" for i in range(40)])
    api.join(jids)
    for i, facts in enumerate(api.info(jids, ["stdout"]).values()):
        assert f"value {i}\n" in facts["stdout"]
        assert facts["stdout"].count(f"value {i}\n") == facts["stdout"].count("\n")


def test_a_result_that_cannot_be_pickled_is_not_asked_again_and_again(
    api: ModuleType, one_slot: None, tmp_path: Path
) -> None:
    asked = [str(tmp_path / name) for name in ("alone", "among others")]
    alone = api.call(NotesDumps, asked[0], fails=True)
    among = api.map(lambda i: NotesDumps(asked[1], fails=True) if i == 1 else [i], range(3))
    for failed in (alone, among[1]):
        with pytest.raises(JobFailed, match="cannot be dumped"):
            api.result(failed)
    assert api.result([among[0], among[2]]) == [[0], [2]]
    assert len(notes(asked[0])) == len(notes(asked[1]))


@pytest.mark.parametrize("place", [0, 1, 700, 1999])
def test_an_item_that_takes_long_delays_no_other(api: ModuleType, two_slots: None, gate: Gate, place: int) -> None:
    api.join(api.map(sample.identity, range(500)))
    jids = api.map(partial(jobs.hold_at, gate, place), range(2000))
    others = [jid for jid in jids if jid != jids[place]]
    assert api.result(others, timeout=20) == [i for i in range(2000) if i != place]
    gate.await_begun()
    assert api.status(jids[place]) == "processing"
    gate.open()
    assert api.result(jids) == list(range(2000))


def test_it_returns_before_its_jobs_end(api: ModuleType, gate: Gate) -> None:
    jids = api.map(lambda i: gate.hold(i), range(3))
    assert "done" not in api.status(jids)
    gate.open()
    assert api.result(jids) == [0, 1, 2]


def test_part_of_a_map_can_be_killed_and_deleted(api: ModuleType, one_slot: None, gate: Gate) -> None:
    jids = api.map(partial(jobs.hold_at, gate, 0), range(10))
    gate.await_begun()
    api.kill(jids[3:6])
    api.kill([jids[8], jids[0]])
    gate.open()
    assert api.result([jids[i] for i in (1, 2, 6, 7, 9)]) == [1, 2, 6, 7, 9]
    assert api.status(jids) == ["killed", "done", "done", *["killed"] * 3, "done", "done", "killed", "done"]
    api.delete([jids[1], jids[3]])
    assert api.find() == [jid for jid in jids if jid not in (jids[1], jids[3])]
    assert api.find(status="killed") == [jids[i] for i in (0, 4, 5, 8)]
