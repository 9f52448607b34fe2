"""Reading outcomes of a long map while its workers go on."""

from __future__ import annotations

import pytest

from cloud.engine.reading import ReadAhead, reads_ahead
from cloud.engine.store.base import Batch
from cloud.jobs import DEFAULT_OPTIONS
from cloud.serialization.functions import FunctionCache


class Found:
    """What was read."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[int, bytes]] = []

    def __call__(self, at: int, outcome: bytes) -> None:
        self.outcomes.append((at, outcome))


def map_of(n: int) -> Batch:
    batch = Batch(1, FunctionCache().get(len, None), (1, b""), DEFAULT_OPTIONS, 0, 0.0, None)
    batch.n = n
    return batch


def read_all(reader: ReadAhead | None) -> None:
    assert reader is not None
    while reader.has_news:
        reader.read_one()


@pytest.mark.parametrize("step", [1, 3, 100])
def test_each_is_read_once_in_whatever_order_they_come(step: int) -> None:
    batch, found = map_of(100_000), Found()
    reader = reads_ahead([(batch, 0, 100_000)], found)
    assert reader is not None
    assert not reader.has_news
    starts = [1000 * (7 * at % 100) for at in range(100)]
    for at in range(0, 100, step):
        for start in starts[at : at + step]:
            batch.add_segment(start, 1000, str(start).encode())
        read_all(reader)
        assert sorted(found.outcomes) == sorted((start, str(start).encode()) for start in starts[: at + step])


def test_one_is_read_at_a_time() -> None:
    batch, found = map_of(100_000), Found()
    reader = reads_ahead([(batch, 0, 100_000)], found)
    assert reader is not None
    batch.add_segment(0, 1000, b"first")
    batch.add_segment(1000, 1000, b"second")
    for n in (1, 2):
        assert reader.has_news
        reader.read_one()
        assert len(found.outcomes) == n
    reader.read_one()
    assert not reader.has_news
    assert len(found.outcomes) == 2


def test_of_a_part_of_a_map_what_lies_in_it_is_read() -> None:
    batch, found = map_of(100_000), Found()
    for start in range(0, 10_000, 1000):
        batch.add_segment(start, 1000, b"outcome")
    read_all(reads_ahead([(batch, 1500, 6500)], found))
    assert [at for at, _ in found.outcomes] == [500, 1500, 2500, 3500]


def test_outcomes_of_deleted_jobs_are_left() -> None:
    batch, found = map_of(100_000), Found()
    for start in (0, 1000, 2000):
        batch.add_segment(start, 1000, b"outcome")
    batch.drop_outcomes(0, 2000)
    read_all(reads_ahead([(batch, 0, 100_000)], found))
    assert found.outcomes == [(2000, b"outcome")]


def test_what_few_items_share_is_left_and_so_are_short_maps_and_several() -> None:
    batch, found = map_of(100_000), Found()
    for start in range(10_000):
        batch.add_segment(start, 1, b"outcome")
    read_all(reads_ahead([(batch, 0, 100_000)], found))
    assert found.outcomes == []
    assert reads_ahead([(batch, 0, 100)], found) is None
    assert reads_ahead([(batch, 0, 50_000), (batch, 50_000, 100_000)], found) is None
    assert reads_ahead([(batch, 0, 100_000)], None) is None
