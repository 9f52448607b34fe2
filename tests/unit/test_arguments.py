"""Whether a function takes the arguments of a call: told as calling it would, and quickly for most."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.client.arguments import check_call, fits
from cloud.client.callbacks import _takes_argument

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
