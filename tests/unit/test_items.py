"""The record that items of a map share: what it counts, and what it leaves out."""

from __future__ import annotations

import time

import pytest

from cloud.engine.worker.items import ItemRecord
from cloud.jobs import PACKED, PICKLED, VALUE, Outcome, unpack_value
from cloud.serialization import pickling


@pytest.fixture
def record() -> ItemRecord:
    return ItemRecord(1, lambda: (b"", b""))


def packed(record: ItemRecord, ended: float) -> tuple[int, object, float]:
    """Tag and content of the record's outcome, and its runtime."""
    found = record.pack(ended)
    assert found is not None
    section = unpack_value(found[2])
    assert section is not None
    tag, content = section
    value = pickling.loads(content) if tag == VALUE else pickling.loads_list(content)
    return tag, value, Outcome(found[2]).runtime_s


def test_values_before_the_first_that_is_pickled_are_pickled_too(record: ItemRecord) -> None:
    began = record.begin(0)
    record.values += [1, "two"]
    assert packed(record, began)[:2] == (PACKED, [1, "two"])

    record.begin(2)
    record.values += [1, "two"]
    ended = record.add_pickle(pickling.dumps_plain([3]), time.perf_counter())
    tag, pickles, _ = packed(record, ended)
    assert isinstance(pickles, list)
    assert (tag, [pickling.loads(each) for each in pickles]) == (PICKLED, [1, "two", [3]])

    record.begin(5)
    ended = record.add_pickle(pickling.dumps_plain([3]), time.perf_counter())
    assert packed(record, ended)[:2] == (VALUE, [3])


def test_pickles_are_counted_for_their_own_record_only(record: ItemRecord) -> None:
    record.begin(0)
    ended = record.add_pickle(b"12345", time.perf_counter())
    assert (record.n_bytes, record.is_pickled) == (5, True)
    record.pack(ended)
    assert record.n_bytes == 0
    record.begin(1)
    record.add_pickle(b"12345", time.perf_counter())
    record.begin(1)
    assert (record.n_bytes, record.is_pickled) == (0, False)


def test_its_runtime_is_without_pickling(record: ItemRecord) -> None:
    began = record.begin(0)
    time.sleep(0.002)
    pickling_began = time.perf_counter()
    time.sleep(0.02)
    ended = record.add_pickle(pickling.dumps_plain([1]), pickling_began)
    assert packed(record, ended)[2] == pytest.approx(pickling_began - began, abs=1e-6)


def test_nor_has_the_next_one_what_pickling_took_that_began_before_it(record: ItemRecord) -> None:
    began = record.begin(0)
    record.values.append(1)
    record.pack(began)
    time.sleep(0.005)
    middle = time.perf_counter()
    record.go_on(1, middle)
    ended = record.add_pickle(pickling.dumps_plain([1]), began)
    time.sleep(0.002)
    last = time.perf_counter()
    record.add_pickle(pickling.dumps_plain([2]), last)
    assert record.position == 1
    assert packed(record, last)[2] <= last - ended
