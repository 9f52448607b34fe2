"""Outcomes made values: of jobs that share a record, and are asked for together or one by one."""

from __future__ import annotations

from typing import Any

import pytest

from cloud.client import results
from cloud.jobs import PACKED, pack_value
from cloud.serialization import pickling

VALUES = [number * 1.5 for number in range(100)]
RECORD = pack_value(PACKED, pickling.dumps_list(VALUES), 1, 0.0, 0.0, 0.0, 0.0, 0)


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
