"""Reading outcomes of a long map while its workers go on."""

from __future__ import annotations

import pytest

from cloud.engine.reading import _READ_AT_ONCE, reads_ahead
from cloud.engine.store.base import Batch
from cloud.jobs import DEFAULT_OPTIONS
from cloud.serialization.functions import FunctionCache


def map_of(n: int) -> Batch:
    batch = Batch(1, FunctionCache().get(len, None), (1, b""), DEFAULT_OPTIONS, 0, 0.0, None)
    batch.n = n
    return batch


@pytest.mark.parametrize("step", [1, 3, 100])
def test_each_is_read_once_in_whatever_order_they_come(step: int) -> None:
    batch = map_of(100_000)
    found: list[bytes] = []
    read_some = reads_ahead([(batch, 0, 100_000)], found.append)
    assert read_some is not None
    assert not read_some()
    starts = [1000 * (7 * at % 100) for at in range(100)]
    for at in range(0, 100, step):
        for start in starts[at : at + step]:
            batch.add_segment(start, 1000, str(start).encode())
        while read_some():
            pass
        assert sorted(found) == sorted(str(start).encode() for start in starts[: at + step])
    assert not read_some()


def test_few_are_read_at_once() -> None:
    batch = map_of(100_000)
    found: list[bytes] = []
    read_some = reads_ahead([(batch, 0, 100_000)], found.append)
    assert read_some is not None
    for start in range(_READ_AT_ONCE + 1):
        batch.add_segment(1000 * start, 1000, b"")
    assert read_some()
    assert len(found) == _READ_AT_ONCE
    assert not read_some()
    assert len(found) == _READ_AT_ONCE + 1


def test_what_few_items_share_is_left_and_so_are_short_maps_and_several() -> None:
    batch = map_of(100_000)
    found: list[bytes] = []
    read_some = reads_ahead([(batch, 0, 100_000)], found.append)
    assert read_some is not None
    for start in range(10_000):
        batch.add_segment(start, 1, b"")
    assert not read_some()
    assert found == []
    assert reads_ahead([(batch, 0, 100)], found.append) is None
    assert reads_ahead([(batch, 0, 50_000), (batch, 50_000, 100_000)], found.append) is None
    assert reads_ahead([(batch, 0, 100_000)], None) is None
