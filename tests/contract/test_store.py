"""What every store promises; a new one is one more line in ``STORES``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cloud.engine.store.base import Batch, Chunk, Store
from cloud.engine.store.memory import JidSource, MemoryStore
from cloud.engine.store.sqlite import SqliteStore
from cloud.errors import JobNotFound
from cloud.jobs import DEFAULT_OPTIONS, DONE, KILLED, QUEUED
from cloud.serialization.functions import Function


class FolderStore(SqliteStore):
    """In a folder that goes with it."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="store-")
        super().__init__(self._folder)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


STORES: Final[dict[str, Callable[[], Store]]] = {"memory": lambda: MemoryStore(JidSource()), "sqlite": FolderStore}
FUNCTION: Final = Function(b"", "module.work")


@pytest.fixture(params=STORES.values(), ids=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Each store in turn, empty."""
    made: Store = request.param()
    yield made
    made.close()


def new_call() -> Batch:
    return Batch(0, FUNCTION, (1, b""), DEFAULT_OPTIONS, 0, 0.0, b"arguments")


def new_map(*sizes: int) -> Batch:
    batch = Batch(0, FUNCTION, (1, b""), DEFAULT_OPTIONS, 0, 0.0, None)
    for n in sizes:
        batch.chunks.append(Chunk(len(batch.chunks) + 1, batch.n, n, 1, b""))
        batch.put_free(batch.n, batch.n + n)
        batch.n += n
        batch.states += bytes((QUEUED,)) * n
    batch.sealed = True
    return batch


def kept(store: Store, batch: Batch) -> Batch:
    """Keep it under jids of its own."""
    batch.jid0 = store.new_jids(batch.n)
    store.add(batch)
    return batch


# --- jids -------------------------------------------------------------------------------------------------------------


def test_jids_start_at_one_and_are_never_used_twice(store: Store) -> None:
    assert store.new_jids(1) == 1
    assert store.new_jids(5) == 2
    assert store.new_jids(1) == 7
    batch = kept(store, new_call())
    store.delete(batch, 0, 1)
    assert store.new_jids(1) == 9


# --- finding ----------------------------------------------------------------------------------------------------------


def test_jobs_are_located_by_their_jids(store: Store) -> None:
    first, many, last = kept(store, new_call()), kept(store, new_map(2, 1)), kept(store, new_call())
    assert store.locate(1) == (first, 0)
    assert [store.locate(jid) for jid in (2, 3, 4)] == [(many, 0), (many, 1), (many, 2)]
    assert store.locate(5) == (last, 0)


@pytest.mark.parametrize("jid", [-1, 0, 3, 4, 6, 7, 10**12])
def test_an_unknown_jid_is_named(store: Store, jid: int) -> None:
    kept(store, new_call())
    kept(store, new_call())
    store.new_jids(2)  # of a map that came to nothing
    kept(store, new_call())
    for ask in (
        lambda: store.locate(jid),
        lambda: store.runs((jid,)),
        lambda: store.runs([1, jid]),
        lambda: store.runs(range(jid, jid + 1)),
    ):
        with pytest.raises(JobNotFound, match="Does not exist or was purged from cache") as caught:
            ask()
        assert caught.value.jid == jid


def test_runs_of_nothing_are_none(store: Store) -> None:
    assert store.runs([]) == store.runs(()) == store.runs(range(0)) == store.runs(range(5, 5)) == []


def test_runs_join_consecutive_jobs_of_one_batch(store: Store) -> None:
    call, many, other = kept(store, new_call()), kept(store, new_map(4)), kept(store, new_map(2))
    assert store.runs(range(1, 8)) == [(call, 0, 1), (many, 0, 4), (other, 0, 2)]
    assert store.runs(range(3, 7)) == [(many, 1, 4), (other, 0, 1)]
    assert store.runs([3, 4, 1, 5, 4]) == [(many, 1, 3), (call, 0, 1), (many, 3, 4), (many, 2, 3)]
    assert store.runs([1, 1]) == [(call, 0, 1), (call, 0, 1)]
    assert store.runs([2, 2]) == [(many, 0, 1), (many, 0, 1)]


def test_runs_of_a_range_with_steps(store: Store) -> None:
    many = kept(store, new_map(5))
    assert store.runs(range(1, 6, 2)) == [(many, 0, 1), (many, 2, 3), (many, 4, 5)]
    assert store.runs(range(3, 0, -1)) == [(many, 2, 3), (many, 1, 2), (many, 0, 1)]


def test_a_range_over_a_gap_is_refused(store: Store) -> None:
    kept(store, new_call())
    store.new_jids(1)
    kept(store, new_call())
    with pytest.raises(JobNotFound) as caught:
        store.runs(range(1, 4))
    assert caught.value.jid == 2


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_a_deleted_call_is_unknown(store: Store) -> None:
    first, second = kept(store, new_call()), kept(store, new_call())
    store.delete(first, 0, 1)
    with pytest.raises(JobNotFound):
        store.locate(1)
    assert list(store.batches()) == [second]


def test_part_of_a_map_is_forgotten(store: Store) -> None:
    many = kept(store, new_map(4))
    store.delete(many, 1, 3)
    assert store.locate(1) == (many, 0)
    assert store.locate(4) == (many, 3)
    assert [store.forgotten(many, index) for index in range(4)] == [False, True, True, False]
    for ask in (range(1, 5), range(1, 3), [4, 2], [3]):
        with pytest.raises(JobNotFound) as caught:
            store.runs(ask)
        assert caught.value.jid in (2, 3)
    assert store.runs([1, 4]) == [(many, 0, 1), (many, 3, 4)]
    assert list(store.batches()) == [many]


def test_a_map_goes_with_its_last_job(store: Store) -> None:
    many = kept(store, new_map(3))
    for index in (1, 0, 2):
        assert list(store.batches()) == [many]
        store.delete(many, index, index + 1)
    assert list(store.batches()) == []
    with pytest.raises(JobNotFound):
        store.locate(1)


@pytest.mark.parametrize("make", [new_call, lambda: new_map(2)], ids=["call", "map"])
def test_forgetting_twice_forgets_nothing_else(store: Store, make: Callable[[], Batch]) -> None:
    before, batch, after = kept(store, new_map(2)), kept(store, make()), kept(store, new_map(2))
    for _ in range(3):
        store.delete(batch, 0, batch.n)
        assert list(store.batches()) == [before, after]
    store.delete(before, 0, 2)
    store.delete(after, 0, 2)
    store.delete(batch, 0, batch.n)
    assert list(store.batches()) == []


def test_batches_come_oldest_first(store: Store) -> None:
    batches = [kept(store, make()) for make in (new_call, lambda: new_map(2), new_call, lambda: new_map(1), new_call)]
    assert list(store.batches()) == batches


# --- a model ----------------------------------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of operations, against a dict from jid to (batch, index)."""

    @initialize(make=st.sampled_from(list(STORES.values())))
    def begin(self, make: Callable[[], Store]) -> None:
        self.store = make()
        self.model: dict[int, tuple[Batch, int]] = {}
        self.n_jids = 0

    @rule(sizes=st.lists(st.integers(1, 4), max_size=2))
    def submit(self, sizes: list[int]) -> None:
        batch = kept(self.store, new_map(*sizes) if sizes else new_call())
        assert batch.jid0 == self.n_jids + 1
        self.n_jids += batch.n
        self.model.update({batch.jid0 + index: (batch, index) for index in range(batch.n)})

    @rule(n=st.integers(1, 3))
    def leave_a_gap(self, n: int) -> None:
        assert self.store.new_jids(n) == self.n_jids + 1
        self.n_jids += n

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        batch, start = self.model[data.draw(st.sampled_from(sorted(self.model)))]
        stop = data.draw(st.integers(start + 1, batch.n))
        self.store.delete(batch, start, stop)
        for index in range(start, stop):
            self.model.pop(batch.jid0 + index, None)

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        jid = st.integers(0, self.n_jids + 2)
        jids: Any = data.draw(st.lists(jid, max_size=6) | st.builds(range, jid, jid))
        expected = [self.model.get(jid) for jid in jids]
        try:
            runs = self.store.runs(jids)
        except JobNotFound as exc:
            assert exc.jid in jids
            assert exc.jid not in self.model
        else:
            assert [(batch, at) for batch, start, stop in runs for at in range(start, stop)] == expected

    @invariant()
    def every_job_is_where_the_model_has_it(self) -> None:
        if not hasattr(self, "store"):
            return
        found = {
            batch.jid0 + index: (batch, index)
            for batch in self.store.batches()
            for index in range(batch.n)
            if not self.store.forgotten(batch, index)
        }
        assert found == self.model
        assert all(self.store.locate(jid) == where for jid, where in self.model.items())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=25)


# --- the record that stores keep --------------------------------------------------------------------------------------


def test_the_chunk_of_an_item() -> None:
    batch = new_map(2, 1, 3)
    assert [batch.chunk_at(index).start for index in range(6)] == [0, 0, 2, 3, 3, 3]


def test_attempts_are_counted_by_item() -> None:
    batch = new_map(3)
    assert [batch.attempt(index) for index in range(3)] == [1, 1, 1]
    batch.next_attempt(1)
    batch.next_attempt(1)
    assert [batch.attempt(index) for index in range(3)] == [1, 3, 1]


@pytest.mark.parametrize("make", [new_call, lambda: new_map(1)], ids=["call", "map"])
def test_what_was_given_out_can_be_put_back(make: Callable[[], Batch]) -> None:
    batch = make()
    for _ in range(2):
        assert batch.next_free() == (0, 1)
        assert batch.next_free() == (0, 1), "looking takes nothing"
        batch.take_free(1)
        assert batch.next_free() is None
        batch.put_free(0, 1, first=True)
    batch.states[0] = KILLED
    assert batch.next_free() is None


@given(st.data())
def test_each_queued_item_is_given_out_once(data: st.DataObject) -> None:
    """Whatever ends meanwhile, and whatever is put back."""
    batch = new_map(*data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    given_out: set[int] = set()
    n_steps = 0
    while (run := batch.next_free()) is not None:
        start, stop = run
        n_steps += 1
        assert start < stop <= batch.n
        assert set(batch.states[start:stop]) == {QUEUED}
        cut = data.draw(st.integers(start + 1, stop))
        batch.take_free(cut)
        assert not given_out.intersection(range(start, cut))
        given_out.update(range(start, cut))
        if n_steps < 20 and data.draw(st.booleans()):
            back = data.draw(st.sampled_from(sorted(given_out)))
            given_out.discard(back)
            batch.put_free(back, back + 1, first=data.draw(st.booleans()))
        ended = data.draw(st.sets(st.integers(0, batch.n - 1), max_size=2))
        for index in ended - given_out:
            batch.states[index] = DONE
    assert given_out >= {index for index in range(batch.n) if batch.states[index] == QUEUED}


@given(st.data())
def test_segments_are_found_whatever_the_order_they_came_in(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 15))
    batch = new_map(n)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=6))})
    runs = list(pairwise(cuts))
    known = data.draw(st.permutations(runs))[: data.draw(st.integers(1, len(runs)))]
    for low, high in known:
        batch.add_segment(low, high - low, b"%d" % low)
    for low, high in known:
        assert all(batch.segment_at(index) == (low, high - low, b"%d" % low) for index in range(low, high))
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    expected = [(low, high - low, b"%d" % low) for low, high in sorted(known) if low < stop and start < high]
    assert list(batch.segments_in(start, stop)) == expected
