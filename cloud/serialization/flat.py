"""Pickles of builtin values in builtin containers: nothing in them can refer to the program, or to a module."""

from __future__ import annotations

import _pickle as pickle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, NoReturn

PROTOCOL: Final = 5

CONTAINERS: Final = frozenset({tuple, list, dict, set, frozenset})
"""Exact types that ``pickle_flat`` may take."""

_MAX_REUSED_BYTES: Final = 1 << 14


class Pieces(list["Any"]):
    """A pickle as it was written. Large bytes are pieces by themselves, and not copied."""

    __slots__ = ()

    def write(self, piece: Any) -> None:
        # A buffer that goes into the pickle comes as it is; it has no length, and may lie in Fortran's order.
        self.append(piece.raw() if type(piece) is pickle.PickleBuffer else piece)


class _NotFlat(Exception):
    """There is something else in it."""


class FlatPickler(pickle.Pickler):
    """Refuses what is more than a builtin value, before anything of that is asked how it is pickled.

    Attributes:
        names, uses_main: As other picklers have them, of every pickle made so: nothing in it refers to ``__main__``.
    """

    names: Final[dict[str, None]] = {}
    uses_main: Final = False

    def __init__(self) -> None:
        self.pieces = Pieces()
        pickle.Pickler.__init__(self, self.pieces, PROTOCOL)

    def reducer_override(self, obj: Any) -> NoReturn:
        raise _NotFlat


_idle: Final[list[FlatPickler]] = []
"""Making one takes longer than a small value does. Whoever uses one takes it out: finalizers may pickle meanwhile."""


def pickle_flat(obj: Any) -> Pieces | None:
    """The pickle of a container; None if there is something else than builtin values in it."""
    try:
        pickler = _idle.pop()
    except IndexError:
        pickler = FlatPickler()
    try:
        pickler.dump(obj)
    except (_NotFlat, RecursionError):
        return None
    pieces = Pieces(pickler.pieces)
    if len(pieces) == 1 and len(pieces[0]) < _MAX_REUSED_BYTES:  # clearing takes as long as the most it ever noted
        pickler.clear_memo()
        pickler.pieces.clear()
        _idle.append(pickler)
    return pieces
