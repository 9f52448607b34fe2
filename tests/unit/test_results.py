"""Outcomes made values: of jobs that share a record, and are asked for together or one by one."""

from __future__ import annotations

from typing import Any

import pytest

from cloud.client import results
from cloud.jobs import ERROR_TEXT, KILLED, PACKED, PICKLED, pack_outcome, pack_value
from cloud.serialization import pickling

VALUES = [number * 1.5 for number in range(100)]
RECORD = pack_value(PACKED, pickling.dumps_list(VALUES), 1, 0.0, 0.0, 0.0, 0.0, 0)

LISTS: list[Any] = [[number, {"number": number}] for number in range(100)]
PICKLES = [pickling.dumps(value) for value in LISTS]
RECORD_OF_LISTS = pack_value(PICKLED, pickling.dumps_list(PICKLES), 1, 0.0, 0.0, 0.0, 0.0, 0)


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was rebuilt. Nothing is left of what other tests read."""
    results._last_read.clear()
    found: list[bytes] = []
    loads_list = pickling.loads_list

    def noting(content: bytes) -> list[Any]:
        found.append(content)
        return loads_list(content)

    monkeypatch.setattr(pickling, "loads_list", noting)
    return found


def test_all_of_a_record(rebuilt: list[bytes]) -> None:
    assert results.decode(range(1, 101), [(0, 100, 100, RECORD)], None) == (VALUES, [])
    assert len(rebuilt) == 1
    assert not results._last_read


def test_who_asks_one_by_one_has_a_record_rebuilt_once(rebuilt: list[bytes]) -> None:
    for number, value in enumerate(VALUES):
        assert results.decode([number + 1], [(number, 1, 100, RECORD)], None) == ([value], [])
    assert len(rebuilt) == 1
    assert not results._last_read, "nothing is kept of a record that was read to its end"


def test_records_are_told_apart(rebuilt: list[bytes]) -> None:
    other = pack_value(PACKED, pickling.dumps_list(VALUES[::-1]), 1, 0.0, 0.0, 0.0, 0.0, 0)
    for number in range(100):
        segments = [(number, 1, 100, RECORD), (number, 1, 100, other)]
        assert results.decode([1, 2], segments, None) == ([VALUES[number], VALUES[99 - number]], [])


def test_values_that_can_be_changed_are_never_shared(rebuilt: list[bytes]) -> None:
    assert results.decode(range(1, 101), [(0, 100, 100, RECORD_OF_LISTS)], None) == (LISTS, [])
    twice = [results.decode([4], [(3, 1, 100, RECORD_OF_LISTS)], None)[0][0] for _ in range(2)]
    assert twice == [LISTS[3]] * 2
    assert twice[0] is not twice[1]
    assert len(rebuilt) == 2
    assert results.shared_values((0, 100, 100, RECORD_OF_LISTS)) is None


def test_one_that_cannot_be_rebuilt_is_told_and_the_others_are_there() -> None:
    pickles = [PICKLES[0], b"\x80\x05cmissing_module\nname\n.", PICKLES[2]]
    record = pack_value(PICKLED, pickling.dumps_list(pickles), 1, 0.0, 0.0, 0.0, 0.0, 0)
    values, failures = results.decode([7, 8, 9], [(0, 3, 3, record)], None)
    assert (values[0], values[2]) == (LISTS[0], LISTS[2])
    assert values[1] is failures[0]
    assert len(failures) == 1
    assert failures[0].jid == 8


def read_ahead(records: dict[int, bytes]) -> results.Ahead:
    ahead = results.Ahead()
    for at, record in records.items():
        ahead.read(at, record)
    return ahead


def test_what_was_read_ahead_is_not_rebuilt_again(rebuilt: list[bytes]) -> None:
    segments = [(0, 100, 100, RECORD), (0, 100, 100, RECORD_OF_LISTS), (0, 100, 100, RECORD)]
    for records in ({200: RECORD, 0: RECORD}, {100: RECORD_OF_LISTS, 200: RECORD}, {0: RECORD, 100: RECORD_OF_LISTS}):
        rebuilt.clear()
        assert results.decode(range(1, 301), segments, None, read_ahead(records)) == (VALUES + LISTS + VALUES, [])
        assert len(rebuilt) == 3


MISSING = b"\x80\x05\x8c\x0emissing_module\x8c\x04name\x93."


class Noted:
    """Notes each time that one is rebuilt."""

    n_rebuilt = 0

    def __init__(self) -> None:
        self.state = "it is not rebuilt without one"

    def __setstate__(self, state: object) -> None:
        Noted.n_rebuilt += 1


def test_no_code_of_the_users_runs_ahead() -> None:
    pickles = [PICKLES[0], pickling.dumps(Noted()), MISSING, PICKLES[47]]
    pickles.append(pickling.dumps([147]))  # in which there is the byte of a reference
    record = pack_value(PICKLED, pickling.dumps_list(pickles), 1, 0.0, 0.0, 0.0, 0.0, 0)
    broken = pack_value(PACKED, b"no pickle", 1, 0.0, 0.0, 0.0, 0.0, 0)
    killed = pack_outcome(KILLED, [(ERROR_TEXT, b"killed")])
    ahead = read_ahead({0: record, 5: broken, 6: killed})
    assert (len(ahead.values), Noted.n_rebuilt) == (5, 0)
    segments = [(0, 5, 5, record), (0, 1, 1, killed)]
    values, failures = results.decode(range(4, 10), segments, None, ahead)
    assert Noted.n_rebuilt == 1
    assert (values[0], type(values[1]), values[3:]) == (LISTS[0], Noted, [LISTS[47], [147], failures[1]])
    assert values[2] is failures[0]
    assert [each.jid for each in failures] == [6, 9]
