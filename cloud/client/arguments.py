"""Arguments of calls and maps: checked against the function, pickled, and cut into chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, repeat, zip_longest
from sys import getsizeof
from types import FunctionType, MethodType

from cloud.engine import channel as ch
from cloud.errors import PayloadTooLarge
from cloud.serialization import pickling
from cloud.serialization.flat import ATOMS, are_of, pickle_each, pickle_together
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import SHARE_BYTES, SharedBytes, attach, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_MAX_ITEMS: Final = 4096
_MAX_SEPARATE: Final = 1024
_SEPARATE_BYTES: Final = 1 << 16
_MAX_UNSHARED_BYTES: Final = 1 << 18
_AT_ONCE: Final = 256
_MAX_RANGE: Final = 1 << 20
_QUICK_S: Final = 0.002
_TUPLE: Final[frozenset[type]] = frozenset({tuple})
_MAX_ATOM_BYTES: Final = 1 << 12
_NO_KEYWORDS: Final[dict[str, Any]] = {}
_VARARGS: Final = 4
_VARKEYWORDS: Final = 8


def check_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """See that a Python function, also as a method or a partial, takes these arguments, as calling it would.

    Raises:
        TypeError: It does not.
    """
    if type(function) is FunctionType:
        if not fits(function, len(args), kwargs):
            _refuse(function, args, kwargs)
    elif type(function) is MethodType:
        check_call(function.__func__, (function.__self__, *args), kwargs)
    elif type(function) is partial:
        check_call(function.func, (*function.args, *args), {**function.keywords, **kwargs})


def _refuse(function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    import inspect

    try:
        inspect.Signature.from_callable(function, follow_wrapped=False).bind(*args, **kwargs)
    except TypeError as exc:
        raise TypeError(f"{function.__name__}() {exc}") from None


def fits(function: FunctionType, n_args: int, kwargs: dict[str, Any]) -> bool:
    """Whether a function takes so many arguments by position, and these by name."""
    code = function.__code__
    n_positional = code.co_argcount
    if n_args == n_positional and not (kwargs or code.co_kwonlyargcount):
        return True
    defaults, flags = function.__defaults__, code.co_flags
    n_required = n_positional - len(defaults) if defaults else n_positional
    if n_args > n_positional and not flags & _VARARGS:
        return False
    if not (kwargs or code.co_kwonlyargcount):
        return n_args >= n_required
    n_unnamed = code.co_posonlyargcount
    names = code.co_varnames[: n_positional + code.co_kwonlyargcount]
    n_given = min(n_args, n_positional)
    free, given = names[max(n_given, n_unnamed) :], names[n_unnamed:n_given]
    own, any_name = function.__kwdefaults__ or {}, flags & _VARKEYWORDS
    return (
        n_given >= min(n_required, n_unnamed)
        and all(name in free or (any_name and name not in given) for name in kwargs)
        and all(name in kwargs for name in names[n_given:n_required])
        and all(name in kwargs or name in own for name in names[n_positional:])
    )


def pickle_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], namespace: Namespace | None, *, plain: bool, limit: int
) -> bytes:
    """The arguments of one call as bytes.

    Raises:
        SerializationError: One cannot be pickled; the message names it.
        PayloadTooLarge: One is larger than ``limit`` bytes (0: no limit).
    """
    try:
        if _are_small_atoms(args) and (not kwargs or _are_small_atoms((*kwargs, *kwargs.values()))):
            content = pickling.dumps_plain((args, kwargs))
        elif plain:
            content = pickling.dumps_without_functions((args, kwargs), namespace)
        else:
            content = pickling.dumps((args, kwargs), namespace, share=namespace is None or namespace.shares)
    except Exception as exc:
        raise _refusal(args, kwargs, exc, plain=plain) from exc
    if limit and size_of(content) > limit:
        raise too_large(size_of(content), limit, args, kwargs)
    return content


def _are_small_atoms(values: Iterable[Any]) -> bool:
    for value in values:  # most often one: a loop takes less than builtins that are to be called
        kind = type(value)
        if kind not in ATOMS or ((kind is str or kind is bytes) and len(value) >= SHARE_BYTES):
            return False
    return True


def _refusal(args: tuple[Any, ...], kwargs: dict[str, Any], cause: Exception, *, plain: bool) -> Exception:
    from cloud.serialization.explain import cannot_pickle

    dumps = pickling.dumps_without_functions if plain else pickling.dumps
    for name, value in _named(args, kwargs):
        try:
            dumps(value)
        except Exception as exc:  # noqa: BLE001 - pickling runs the user's code
            return cannot_pickle(name, value, exc)
    return cannot_pickle("the arguments", (args, kwargs), cause)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for index, value in enumerate(args):
        yield f"argument {index + 1}", value
    for key, value in kwargs.items():
        yield f"argument {key!r}", value


def too_large(size: int, limit: int, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Exception:
    """The error for a function or argument over ``max_transmit_data``, with the largest parts named."""
    parts = sorted(((len(pickling.dumps(value)), name) for name, value in _named(args, kwargs or {})), reverse=True)
    largest = "; ".join(f"{name}: {n} bytes" for n, name in parts[:3])
    error = PayloadTooLarge(
        f"Excessive data ({size} bytes) transmitted; max_transmit_data allows {limit} bytes."
        + (f" Largest: {largest}." if largest else ""),
        hint="Put large data into cloud.files, or raise cloud.config.max_transmit_data and commit().",
    )
    error.size_bytes, error.limit_bytes = size, limit
    return error


def items_of(verb: str, iterables: tuple[Any, ...]) -> Iterable[Any]:
    """Items of a map: of one iterable as they are, of several as tuples, shorter ones padded with None.

    A single range stays one: it is sent as such. Anything else becomes an iterator.

    Raises:
        TypeError: One is not iterable; nothing was consumed.
    """
    if len(iterables) == 1 and type(iterables[0]) is range:
        return iterables[0]
    iterators = []
    for index, iterable in enumerate(iterables):
        try:
            iterators.append(iter(iterable))
        except TypeError:
            raise TypeError(f"{verb} argument {index + 1} ({iterable!r}) is not an iterable") from None
    return iterators[0] if len(iterators) == 1 else zip_longest(*iterators)


def chunks_of(
    items: Iterable[Any],
    namespace: Namespace | None,
    *,
    tuples: bool,
    plain: bool = False,
    limit: int = 0,
    max_items: int = _MAX_ITEMS,
) -> Iterator[tuple[int, int, bytes]]:
    """(kind, n, payload) of consecutive items, as they become available.

    Items that are immutable, or share nothing that could be changed, are pickled together; others one by one, so that
    jobs share no such thing either.
    A slow iterable gives small chunks, so that its first items need not wait for its last.
    """
    if type(items) is range and not tuples:
        for start in range(0, len(items), _MAX_RANGE):
            yield from pack_items(items[start : start + _MAX_RANGE], namespace, tuples=False)
        return
    items = iter(items)
    n = 1
    while True:
        began = time.perf_counter()
        block = list(islice(items, n))
        took_s = time.perf_counter() - began
        if not block:
            return
        yield from pack_items(block, namespace, tuples=tuples, plain=plain, limit=limit)
        if took_s < _QUICK_S:
            n = min(4 * n, max_items)
        elif took_s > 5 * _QUICK_S:
            n = max(1, n // 4)


def pack_items(
    block: list[Any] | range,
    namespace: Namespace | None,
    *,
    tuples: bool,
    plain: bool = False,
    limit: int = 0,
) -> Iterator[tuple[int, int, bytes]]:
    """(kind, n, payload) of these items, which are one chunk if they can be."""
    if type(block) is range and not tuples:
        yield ch.ATOMS_CHUNK, len(block), pickling.dumps_plain(block)
        return
    items: Any = block
    flat: Iterable[Any] = chain.from_iterable(items) if tuples else items
    if limit:
        yield from _separate(block, namespace, tuples=tuples, plain=plain, limit=limit)
    elif are_of(ATOMS, flat):
        yield ch.TUPLES_CHUNK if tuples else ch.ATOMS_CHUNK, len(block), pickling.dumps_list(items)
    elif not tuples and _are_flat_tuples(items):
        yield ch.ATOMS_CHUNK, len(block), pickling.dumps_list(items)
    else:
        yield from _together(block, namespace, tuples=tuples, plain=plain)


def _together(
    block: Sequence[Any], namespace: Namespace | None, *, tuples: bool, plain: bool
) -> Iterator[tuple[int, int, bytes]]:
    """Chunks of these items: of many while they are flat and small, and nothing that could be changed is in two."""
    kind = ch.UNSHARED_TUPLES_CHUNK if tuples else ch.UNSHARED_CHUNK
    at, n_bytes = 0, sum(map(len, pickle_each(block[:1])))  # of an item like those before
    while n_bytes and at < len(block):
        n = max(1, min(_MAX_SEPARATE, _SEPARATE_BYTES // n_bytes))
        content = pickle_together(block[at : at + n], _MAX_UNSHARED_BYTES)
        if content is None:
            break
        n = min(n, len(block) - at)
        yield kind, n, content
        at += n
        n_bytes = len(content) // n
    yield from _separate(block[at:], namespace, tuples=tuples, plain=plain, limit=0)


def _are_flat_tuples(items: list[Any]) -> bool:
    """Whether these are tuples of atoms, none of them large."""
    return (
        are_of(_TUPLE, items)
        and are_of(ATOMS, chain.from_iterable(items))
        and max(map(getsizeof, chain.from_iterable(items)), default=0) <= _MAX_ATOM_BYTES
    )


def _separate(
    block: Sequence[Any], namespace: Namespace | None, *, tuples: bool, plain: bool, limit: int
) -> Iterator[tuple[int, int, bytes]]:
    pickles: list[bytes] = []
    size = 0
    for content in _pickles_of(block, namespace, tuples=tuples, plain=plain, limit=limit):
        if type(content) is SharedBytes:
            # What travels beside an item travels beside its chunk: it gets one of its own.
            if pickles:
                yield ch.SEPARATE_CHUNK, len(pickles), ch.join_separate(pickles)
                pickles, size = [], 0
            yield ch.SEPARATE_CHUNK, 1, attach(ch.join_separate([content]), content.segment)
            continue
        if pickles and (size + len(content) > _SEPARATE_BYTES or len(pickles) == _MAX_SEPARATE):
            yield ch.SEPARATE_CHUNK, len(pickles), ch.join_separate(pickles)
            pickles, size = [], 0
        pickles.append(content)
        size += len(content)
    if pickles:
        yield ch.SEPARATE_CHUNK, len(pickles), ch.join_separate(pickles)


def _pickles_of(
    block: Sequence[Any], namespace: Namespace | None, *, tuples: bool, plain: bool, limit: int
) -> Iterator[bytes]:
    """The arguments of each item as bytes."""
    at, none = 0, repeat(_NO_KEYWORDS)
    # One pickler for many takes a fifth of the time, as long as it meets nothing that another is needed for.
    while at < len(block) and not limit:
        together = block[at : at + _AT_ONCE]
        pickles = pickle_each(zip(together if tuples else zip(together), none))  # noqa: B905 - it has no end
        yield from pickles
        at += len(pickles)
        if not pickles:
            break
        if len(pickles) < len(together):
            yield pickle_call(block[at] if tuples else (block[at],), {}, namespace, plain=plain, limit=limit)
            at += 1
    for item in block[at:]:
        yield pickle_call(item if tuples else (item,), {}, namespace, plain=plain, limit=limit)
