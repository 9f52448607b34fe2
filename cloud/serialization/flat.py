"""Pickles of builtin values in builtin containers, with small arrays and numbers of numpy among them.

Nothing in them can refer to the program, and to no module but numpy. Arrays and numbers are told by what makes them,
not by what numpy says of itself: that takes a third to a half of the time, on both sides.
"""

from __future__ import annotations

import _pickle as pickle
import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from copyreg import dispatch_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

PROTOCOL: Final = 5

PICKLE: Final = 0x80
"""The first byte of a pickle, and of no other payload."""

REFERENCE: Final = b"\x93"
"""Whatever refers to a module or to ``__main__`` has this byte: protocol 5 has no other way, but by copyreg's codes."""

loads_plain: Final = pickle.loads
"""What a pickle without ``REFERENCE`` holds; nothing is looked up for it."""

CONTAINERS: Final = frozenset({tuple, list, dict, set, frozenset})
"""Exact types that ``pickle_flat`` may take; beside them those of numpy's that are here, see ``may_be_flat``."""

ATOMS: Final[frozenset[type]] = frozenset({int, str, float, bool, bytes, complex, type(None)})
"""Exact types that are immutable and refer to nothing: safe to pickle together, safe to keep instead of a copy."""

_CHANGEABLE: Final = frozenset({list, dict, set})
_MAX_DEPTH: Final = 8

_MAX_REUSED_BYTES: Final = 1 << 14
_MAX_ARRAY_BYTES: Final = 1 << 18
"""Larger ones may travel beside the pickle."""

_INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS: Final = ("float16", "float32", "float64")


class _NotFlat(Exception):
    """There is something else in it."""


class _TooLarge(Exception):
    """It is more than was asked for."""


class Written:
    """A file of pieces: large bytes are pieces by themselves, and not copied."""

    __slots__ = ("write",)

    def __init__(self, pieces: list[Any]) -> None:
        self.write = pieces.append


class _Limited:
    """As ``Written``, of no more than so many bytes."""

    __slots__ = ("_left", "_pieces")

    def __init__(self, pieces: list[Any], max_bytes: int) -> None:
        self._pieces, self._left = pieces, max_bytes

    def write(self, piece: Any) -> None:
        self._left -= len(piece) if type(piece) is bytes else piece.raw().nbytes
        if self._left < 0:
            raise _TooLarge
        self._pieces.append(piece)


class FlatPickler(pickle.Pickler):
    """Refuses what is more than a builtin value or numpy's, before anything of that is asked how it is pickled."""

    def __init__(self, max_bytes: int = 0) -> None:
        self.pieces: list[Any] = []
        file = _Limited(self.pieces, max_bytes) if max_bytes else Written(self.pieces)
        pickle.Pickler.__init__(self, file, PROTOCOL)

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        reduce = _reducers.get(kind)
        if reduce is None:
            if not may_be_flat(kind):
                raise _NotFlat
            reduce = _reducers[kind]  # learned just now
        return reduce(obj)


_idle: Final[list[FlatPickler]] = []
"""Making one takes longer than a small value does. Whoever uses one takes it out: finalizers may pickle meanwhile."""


def may_be_flat(kind: type) -> bool:
    """True for types of which ``pickle_flat`` may take an instance."""
    return kind in CONTAINERS or kind in _reducers or (kind.__module__ == "numpy" and _learns(kind))


def pickle_flat(obj: Any) -> bytes | list[Any] | None:
    """The pickle of an object; in pieces if it is large. None if there is something else in it."""
    if type(obj) not in CONTAINERS and not may_be_flat(type(obj)):
        return None
    try:
        pickler = _idle.pop()
    except IndexError:
        pickler = FlatPickler()
    try:
        pickler.dump(obj)
    except _NotFlat:
        if not pickler.pieces and sys.getsizeof(pickler) < _MAX_REUSED_BYTES:  # with what it noted
            pickler.clear_memo()
            _idle.append(pickler)
        return None
    except (RecursionError, MemoryError):
        return None  # whoever pickles it otherwise finds the same, and says so
    pieces = pickler.pieces
    if len(pieces) > 1 or len(pieces[0]) >= _MAX_REUSED_BYTES:
        return as_written(pieces)  # clearing takes as long as the most it ever noted
    content: bytes = pieces.pop()
    pickler.clear_memo()
    _idle.append(pickler)
    return content


def pickle_each(objects: Iterable[Any]) -> list[bytes]:
    """The pickles, each by itself, of the first of these containers: of as many as are flat and small."""
    pickler = FlatPickler()
    dump, clear, pickles = pickler.dump, pickler.clear_memo, pickler.pieces
    n = 0
    try:
        for obj in objects:
            dump(obj)
            n += 1
            if len(pickles) > n or len(pickles[-1]) >= _MAX_REUSED_BYTES:
                n -= 1
                break
            clear()
    except Exception:  # noqa: BLE001, S110 - whoever pickles it otherwise finds the same, and says so
        pass
    return pickles[:n]


def are_of(kinds: frozenset[type], values: Iterable[Any]) -> bool:
    """Whether all are exactly of these types."""
    try:
        return kinds.issuperset(map(type, values))
    except Exception:  # noqa: BLE001 - there are classes that have no hash
        return False


def pickle_together(values: Sequence[Any], max_bytes: int) -> bytes | None:
    """One pickle of a list of values, each as if it was pickled alone, which takes twice as long, and thrice to load.

    None if there is something else in one of them, if two of them refer to the same object that could be changed, or if
    that is more than so many bytes.
    """
    pickler = FlatPickler(max_bytes)
    try:
        if not _share_nothing(values, max_bytes):
            return None
        pickler.dump(values)
    except Exception:  # noqa: BLE001 - whoever pickles them one by one finds the same, and says so
        return None
    return b"".join(as_written(pickler.pieces))


def _share_nothing(values: Sequence[Any], max_objects: int) -> bool:
    """Whether nothing that could be changed is in two of them, or in two places of one.

    False also if there are more objects in them than that, or they are nested deeper than most.
    """
    level, seen, n_objects = values, set[int](), 0
    common: dict[int, Any] = {}
    for _ in range(_MAX_DEPTH):
        level = _but_atoms(level)
        if not level:
            return _are_immutable(tuple(common.values()))
        if not all(map(may_be_flat, set(map(type, level)))):
            return False
        ids = set(map(id, level))
        if len(ids) < len(level) or not ids.isdisjoint(seen):
            fresh: dict[int, Any] = {}
            for each in level:
                (common if id(each) in seen or id(each) in fresh else fresh)[id(each)] = each
            level, ids = list(fresh.values()), set(fresh)
        seen |= ids
        # Whoever has many large ones need not have them all listed.
        n_objects += sum(len(each) for each in level if type(each) in CONTAINERS)
        if n_objects > max_objects:
            return False
        level = gc.get_referents(*level)
    return False


def _are_immutable(values: Sequence[Any]) -> bool:
    """Whether these, of which ``may_be_flat`` is true, and all in them cannot be changed."""
    seen: set[int] = set()
    while left := _but_atoms(values):
        if any(type(each) in _CHANGEABLE or type(each).__name__ == "ndarray" for each in left):
            return False
        fresh = {id(each): each for each in left if id(each) not in seen}
        seen.update(fresh)
        values = gc.get_referents(*fresh.values())
    return True


def _but_atoms(values: Sequence[Any]) -> Sequence[Any]:
    return values if ATOMS.isdisjoint(map(type, values)) else [each for each in values if type(each) not in ATOMS]


def as_written(pieces: list[Any]) -> list[Any]:
    """What a pickler wrote, as bytes: a buffer comes as it is, has no length, and may lie in Fortran's order."""
    return [piece.raw() if type(piece) is pickle.PickleBuffer else piece for piece in pieces]


# --- numpy ------------------------------------------------------------------------------------------------------------


def _reduce_class(cls: type) -> Any:
    if cls in _reducers:  # what makes an array, or a number
        return NotImplemented
    raise _NotFlat


_reducers: Final[dict[type, Callable[[Any], Any]]] = {type: _reduce_class}


def _learns(kind: type) -> bool:
    """Learn how numpy's types travel, now that it is here; whether this is one of them."""
    numpy = sys.modules.get("numpy")
    cls = getattr(numpy, "ndarray", None)
    if numpy is None or cls is None or cls in _reducers or not hasattr(numpy, "float64"):
        return False
    names = {id(numpy.dtype(name)): name for name in ("bool", *_INTEGERS, *_FLOATS)}
    buffer = pickle.PickleBuffer

    def reduce_array(array: Any) -> Any:
        # By identity: another that is equal may have metadata.
        name, flags = names.get(id(array.dtype)), array.flags
        if name is None or array.nbytes >= _MAX_ARRAY_BYTES or cls in dispatch_table:
            raise _NotFlat
        if flags.c_contiguous:
            return cls, (array.shape, name, buffer(array))
        if flags.f_contiguous:
            return cls, (array.shape, name, buffer(array), 0, None, "F")
        raise _NotFlat

    def number(cls: Any, plain: type) -> Callable[[Any], Any]:
        def reduce_number(value: Any) -> Any:
            if cls in dispatch_table:
                raise _NotFlat
            return cls, (plain(value),)

        return reduce_number

    _reducers.update({getattr(numpy, name): number(getattr(numpy, name), int) for name in _INTEGERS})
    _reducers.update({getattr(numpy, name): number(getattr(numpy, name), float) for name in _FLOATS})
    _reducers[numpy.bool_] = number(numpy.bool_, bool)
    _reducers[cls] = reduce_array
    return kind in _reducers
