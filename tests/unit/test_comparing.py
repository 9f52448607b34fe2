"""Buffers are alike if all their bytes are, whatever may be written to and whether there is a ``memcmp``."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.serialization import comparing
from cloud.serialization.comparing import alike


@pytest.fixture(params=["memcmp", "copies"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "copies":
        monkeypatch.setattr(comparing, "_memcmp", lambda: None)
    else:
        assert comparing._memcmp() is not None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("n_bytes", [1, 7, comparing._COPIED_BYTES + 1, comparing._PART_BYTES + 3])
def test_one_byte_makes_the_difference(n_bytes: int) -> None:
    one, other = bytearray(n_bytes), bytearray(n_bytes)
    assert alike(memoryview(one), memoryview(other))
    for at in {0, n_bytes // 2, n_bytes - 1}:
        other[at] = 1
        assert not alike(memoryview(one), memoryview(other))
        assert not alike(memoryview(one), memoryview(bytes(other)))
        other[at] = 0
    assert alike(memoryview(bytes(one)), memoryview(other))
    assert alike(memoryview(one)[n_bytes:], memoryview(other)[n_bytes:])


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 20), st.booleans())
def test_it_says_what_python_says(one: bytes, other: bytes, start: int, same: bool) -> None:
    first, second = bytearray(one), bytearray(one if same else other)
    n = min(len(first), len(second))
    views = memoryview(first)[start:n], memoryview(second)[start:n]
    assert alike(*views) == (first[start:n] == second[start:n])


def test_nothing_stays_held() -> None:
    mapping = mmap.mmap(-1, 4096)
    view = memoryview(mapping)
    assert alike(view, memoryview(bytearray(4096)))
    view.release()
    mapping.close()
