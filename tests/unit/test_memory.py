"""Large buffers in memory files: private to whoever takes them, few descriptors, nothing that stays."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.client.arguments import pickle_call
from cloud.serialization import memory, pickling
from cloud.serialization.memory import HIGH_FD, MemoryFile, max_files, max_mappings
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import SHARE_BYTES, Segment, SharedBytes, inline

N = SHARE_BYTES + 1000


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = MemoryFile.n_open[0], memory._Mapping.n_open[0]
    yield
    assert (MemoryFile.n_open[0], memory._Mapping.n_open[0]) == before


def result_of(number: int, n: int = N) -> SharedBytes:
    made = pickling.dumps_result(np.full(n, number, np.uint8), Namespace({}), share=True)
    assert isinstance(made, SharedBytes)
    return made


def file_of(payload: SharedBytes) -> MemoryFile:
    assert payload.segment.file is not None
    return payload.segment.file


def is_full_of(array: Any, number: int, n: int = N) -> bool:
    return bool(array.flags.writeable and array.shape == (n,) and (array == number).all())


# --- results that lie in one file -------------------------------------------------------------------------------------


def test_results_that_wait_together_lie_in_one_file_until_it_is_full() -> None:
    payloads = [result_of(number) for number in range(20)]
    assert len({file_of(each) for each in payloads}) == 3
    assert file_of(payloads[0]).fd >= HIGH_FD
    for _ in range(2):
        values = [pickling.loads(each) for each in payloads]
        assert all(is_full_of(value, number) for number, value in enumerate(values))


def test_a_result_after_the_others_have_gone_begins_a_file() -> None:
    payload = result_of(1)
    fd = file_of(payload).fd
    del payload
    with pytest.raises(OSError):
        os.fstat(fd)
    again = result_of(2)
    assert again.segment.offset == 0


def test_large_results_have_files_of_their_own() -> None:
    payloads = [result_of(number, 9 << 20) for number in range(2)]
    assert len({file_of(each) for each in payloads}) == 2


def test_what_is_changed_in_one_is_seen_in_no_other() -> None:
    payloads = [result_of(number) for number in range(4)]
    first = [pickling.loads(each) for each in payloads]
    for value in first[::2]:
        value[:] = 99
    again = [pickling.loads(each) for each in payloads]
    assert all(is_full_of(value, 99 if number % 2 == 0 else number) for number, value in enumerate(first))
    assert all(is_full_of(value, number) for number, value in enumerate(again))


def test_each_of_many_threads_gets_its_own() -> None:
    payload = result_of(0)

    def change(number: int) -> Any:
        value = pickling.loads(payload)
        value += number
        return value

    with ThreadPoolExecutor(8) as threads:
        values = list(threads.map(change, range(100)))
    assert all(is_full_of(value, number) for number, value in enumerate(values))


def test_values_outlive_their_payloads_and_then_nothing_is_open() -> None:
    payloads = [result_of(number) for number in range(3)]
    values = [pickling.loads(each) for each in payloads]
    del payloads
    assert all(is_full_of(value, number) for number, value in enumerate(values))
    assert memory._Mapping.n_open[0] >= 1


def test_a_part_is_found_that_was_written_after_the_file_was_mapped() -> None:
    first = result_of(1)
    kept = pickling.loads(first)
    second = result_of(2)
    assert file_of(first) is file_of(second)
    assert is_full_of(pickling.loads(second), 2)
    assert is_full_of(kept, 1)


def test_a_forked_copy_of_the_process_does_not_write_over_it() -> None:
    first = result_of(1)
    pid = os.fork()
    if not pid:
        result_of(7)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    second = result_of(2)
    assert is_full_of(pickling.loads(first), 1)
    assert is_full_of(pickling.loads(second), 2)


def test_a_file_under_a_number_that_a_job_closed_is_not_written_to(tmp_path: Path) -> None:
    first = result_of(1)
    fd = file_of(first).fd
    theirs = os.open(tmp_path / "theirs", os.O_RDWR | os.O_CREAT)
    os.dup2(theirs, fd)
    second = result_of(2)
    assert file_of(second) is not file_of(first)
    assert os.fstat(theirs).st_size == 0
    assert is_full_of(pickling.loads(second), 2)
    os.close(theirs)


def test_a_file_that_is_sent_twice_is_open_once() -> None:
    payload = result_of(1)
    fd = file_of(payload).fd
    copies = [os.dup(fd), os.dup(fd)]
    files = [MemoryFile.received(copy) for copy in copies]
    assert files[0] is files[1]
    with pytest.raises(OSError):
        os.fstat(copies[1])


# --- when there are too many ------------------------------------------------------------------------------------------


def test_limits_follow_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, expected in ((1024, (256, 256)), (100, (25, 25)), (1 << 20, (4096, 256)), (-1, (4096, 256))):
        monkeypatch.setattr(resource, "getrlimit", lambda which, soft=soft: (soft, soft))
        assert (max_files(), max_mappings()) == expected


def test_without_a_mapping_left_values_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = [result_of(number) for number in range(3)]
    monkeypatch.setattr(memory, "max_mappings", lambda: 0)
    values = [pickling.loads(each) for each in payloads]
    assert all(is_full_of(value, number) for number, value in enumerate(values))
    values[0][:] = 9
    assert is_full_of(pickling.loads(payloads[0]), 0)
    assert memory._Mapping.n_open[0] == 0


def test_without_a_file_left_buffers_go_into_the_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "max_files", lambda: 0)
    made = pickling.dumps_result(np.full(N, 5, np.uint8), Namespace({}), share=True)
    assert type(made) is bytes
    assert is_full_of(pickling.loads(made), 5)


def test_a_segment_that_settles_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = [result_of(number) for number in range(3)]
    monkeypatch.setattr("cloud.serialization.shared.max_files", lambda: 0)
    fd = file_of(payloads[0]).fd
    for each in payloads:
        os.fstat(fd)
        each.segment.settle()
    with pytest.raises(OSError):
        os.fstat(fd)
    for _ in range(2):
        values = [pickling.loads(each) for each in payloads]
        assert all(is_full_of(value, number) for number, value in enumerate(values))
        values[1][:] = 9


def test_what_cannot_be_written_to_a_file_goes_into_the_pickle() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (N // 2, hard))
    try:
        made = pickling.dumps_result(np.full(N, 5, np.uint8), Namespace({}), share=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert type(made) is bytes
    assert is_full_of(pickling.loads(made), 5)


# --- large pickles ----------------------------------------------------------------------------------------------------

LARGE = b"abc" * N


@pytest.mark.parametrize(
    "value",
    [
        LARGE,
        "\u00e4" * N,
        bytearray(LARGE),
        [LARGE, {"one": LARGE[1:], "two": [1, "x" * N]}],
        [str(number) * 10 for number in range(50_000)],
        (LARGE, np.arange(N), 3),
    ],
    ids=["bytes", "str", "bytearray", "nested", "many", "beside an array"],
)
def test_large_pickles_travel_beside(value: Any) -> None:
    arguments = pickle_call((value,), {}, None, plain=False, limit=0)
    result = pickling.dumps_result(((value,), {}), Namespace({}), share=True)
    for made in (arguments, result):
        assert isinstance(made, SharedBytes)
        assert len(made) < 1000
        for payload in (made, inline(made), made):
            args, kwargs = pickling.loads(payload)
            assert pickle.dumps((args, kwargs)) == pickle.dumps(((value,), {}))


def test_a_bytearray_is_taken_as_it_was() -> None:
    value = bytearray(LARGE)
    made = pickle_call((value,), {}, None, plain=False, limit=0)
    value[:] = b""
    assert pickling.loads(made) == ((bytearray(LARGE),), {})


def test_nothing_goes_beside_to_another_machine() -> None:
    assert type(pickle_call((LARGE,), {}, Namespace({}), plain=False, limit=0)) is bytes


def test_a_segment_ends_where_its_last_buffer_does() -> None:
    segment = Segment.write([[b"a" * 10], [b"b" * 5, b"c" * 2]])
    assert segment is not None
    assert segment.n_bytes == 4096 + 7
    assert [bytes(view) for view in segment.views([10, 7])] == [b"a" * 10, b"bbbbbcc"]
