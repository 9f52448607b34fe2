"""Arguments: whether a function takes those of a call, told as calling it would; and how items become chunks."""

from __future__ import annotations

import pickle
import struct
from types import FunctionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.client.arguments import check_call, chunks_of, fits
from cloud.client.callbacks import _takes_argument
from cloud.engine import channel as ch
from cloud.serialization import pickling

NAMES = "abcdef"


@st.composite
def functions(draw: st.DrawFn) -> FunctionType:
    """Functions with all kinds of parameters, with and without defaults."""
    n_unnamed, n_both, n_named = (draw(st.integers(0, 2)) for _ in range(3))
    n_positional = n_unnamed + n_both
    n_defaults = draw(st.integers(0, n_positional))
    parts = [NAMES[at] + ("=0" if at >= n_positional - n_defaults else "") for at in range(n_positional)]
    if n_unnamed:
        parts.insert(n_unnamed, "/")
    if draw(st.booleans()):
        parts.append("*rest")
    elif n_named:
        parts.append("*")
    parts += [NAMES[n_positional + at] + draw(st.sampled_from(["", "=0"])) for at in range(n_named)]
    if draw(st.booleans()):
        parts.append("**more")
    variables: dict[str, Any] = {}
    exec(f"def function({', '.join(parts)}): pass", variables)
    function = variables["function"]
    assert isinstance(function, FunctionType)
    function.__doc__ = ", ".join(parts)
    return function


@given(functions(), st.integers(0, 5), st.sets(st.sampled_from([*NAMES, "rest", "more", "other"]), max_size=3))
def test_it_is_told_as_the_call_itself_would(function: FunctionType, n_args: int, names: set[str]) -> None:
    args, kwargs = (1,) * n_args, dict.fromkeys(names, 1)
    try:
        function(*args, **kwargs)
    except TypeError:
        assert not fits(function, n_args, kwargs)
        with pytest.raises(TypeError, match=r"function\(\) "):
            check_call(function, args, kwargs)
    else:
        assert fits(function, n_args, kwargs)
        check_call(function, args, kwargs)


@given(functions())
def test_a_callback_is_given_the_jid_if_it_takes_it(function: FunctionType) -> None:
    try:
        function(1)
    except TypeError:
        assert not _takes_argument(function)
    else:
        assert _takes_argument(function)


class Other:
    """Not a builtin value."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Other) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]


def arguments_of(kind: int, n: int, payload: bytes) -> list[Any]:
    if kind in ch.SPREAD:
        return list(pickle.loads(payload))
    if kind != ch.SEPARATE_CHUNK:
        return [(item,) for item in pickle.loads(payload)]
    lengths = struct.unpack_from(f"<{n}I", payload)
    ends = [4 * n + sum(lengths[: at + 1]) for at in range(n)]
    return [pickling.loads(payload[end - length : end])[0] for end, length in zip(ends, lengths, strict=True)]


ITEMS = st.one_of(
    st.integers(),
    st.text(),
    st.tuples(st.integers(), st.text()),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(), st.integers(), max_size=3),
    st.builds(Other, st.integers()),
    st.builds(lambda n: bytes(n), st.sampled_from([0, 5000, 20_000, 70_000])),
    st.builds(lambda n: ("text" * n, n), st.sampled_from([1, 5000])),
)


@given(st.lists(ITEMS, max_size=40), st.booleans(), st.booleans())
def test_chunks_hold_the_items_in_order_whatever_they_are(items: list[Any], tuples: bool, plain: bool) -> None:
    given = [(item, 1) for item in items] if tuples else items
    found = [
        each
        for kind, n, payload in chunks_of(given, None, tuples=tuples, plain=plain)
        for each in arguments_of(kind, n, payload)
    ]
    assert found == (given if tuples else [(item,) for item in items])


def test_large_texts_in_tuples_do_not_share_a_chunk() -> None:
    chunks = list(chunks_of([(number, bytes(100_000)) for number in range(50)], None, tuples=False))
    assert max(len(payload) for _, _, payload in chunks) < 300_000


@pytest.mark.parametrize("tuples", [False, True])
def test_records_are_pickled_together_unless_they_are_large(tuples: bool) -> None:
    def kinds_of(items: list[Any]) -> set[int]:
        given = [(item, [1]) for item in items] if tuples else items
        chunks = list(chunks_of(given, None, tuples=tuples))
        assert [each[0] for chunk in chunks for each in arguments_of(*chunk)] == items
        assert max(len(payload) for _, _, payload in chunks) < 400_000
        return {kind for kind, _, _ in chunks}

    together = {ch.UNSHARED_TUPLES_CHUNK if tuples else ch.UNSHARED_CHUNK}
    assert kinds_of([{"number": number, "name": str(number)} for number in range(5000)]) == together
    assert kinds_of([["text" * number] for number in range(1000)]) == together
    # Sixteen of the first are looked at; what follows is larger than they were.
    assert kinds_of([[bytes(1000 if number < 100 else 20_000)] for number in range(200)]) == {
        *together,
        ch.SEPARATE_CHUNK,
    }
    assert ch.SEPARATE_CHUNK in kinds_of([[bytes(200_000)] for number in range(20)])


def test_items_that_have_one_list_in_them_do_not_share_it() -> None:
    one = [1]
    first, second = (
        each for chunk in chunks_of([[one], {"a": one}], None, tuples=False) for each in arguments_of(*chunk)
    )
    first[0][0].append(2)
    assert second == ({"a": [1]},)
