"""Which ``__main__`` is meant: the globals that stand for one program's where its functions are pickled or run."""

from __future__ import annotations

import _pickle as pickle
import sys
from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

Row: TypeAlias = "tuple[str, bytes, bytes, int, int]"
"""A definition that travels: name, digest, pickle, and which of the payload's buffers are its: the first, how many."""

Definitions: TypeAlias = "list[tuple[str, bytes]]"
"""Names and digests of those that came with something."""


def program_main() -> dict[str, Any]:
    """The globals of this process's own ``__main__``."""
    return sys.modules["__main__"].__dict__


class Namespace:
    """The globals that stand for one program's ``__main__`` where its jobs run.

    Args:
        variables: The dict; functions of the program are built over it.
        key: Tells several namespaces of one process apart (the simulator's from the program's own).

    Attributes:
        received: Digest of each name as last received. A name is assigned only when its digest differs, so what a job
            keeps in a global stays for the next job.
        bases: What variants of functions were made from here, by its bytes: a function, the definitions it came with.
    """

    #: True when its other side is a process of this machine that takes large buffers beside the bytes.
    shares: bool = False

    def __init__(self, variables: dict[str, Any], key: str = "") -> None:
        self.variables = variables
        self.key = key
        self.received: dict[str, bytes] = {}
        self.bases: dict[bytes, tuple[FunctionType, Definitions]] = {}
        self._coming: dict[str, tuple[Row, list[memoryview]]] = {}
        self._taking = ""

    def known_there(self, name: str) -> bool:
        """True when the other side has this name from elsewhere, so that it need not be sent."""
        return False

    def has(self, definitions: Definitions) -> bool:
        """True while these are what was received last; other jobs may have brought others since."""
        received = self.received
        return all(received.get(name) == digest for name, digest in definitions)

    def apply(self, table: list[Row], buffers: list[memoryview]) -> None:
        """Take over definitions that are news here, each as soon as another asks for it."""
        before, self._coming = self._coming, {}
        for row in table:
            if self.received.get(row[0]) != row[1]:
                self._coming[row[0]] = row, buffers
        try:
            while self._coming:
                self._take(next(iter(self._coming)))
        finally:
            self._coming = before

    def _take(self, name: str) -> None:
        (_, digest, content, start, n), buffers = self._coming.pop(name)
        before, self._taking = self._taking, name
        try:
            self.variables[name] = pickle.loads(content, buffers=buffers[start : start + n])
        finally:
            self._taking = before
        self.received[name] = digest

    @property
    def is_taking(self) -> bool:
        """True while a definition that is news here is rebuilt."""
        return bool(self._taking)

    def get(self, name: str) -> Any:
        """A global; KeyError if there is none."""
        if name in self._coming:
            self._take(name)
        return self.variables[name]

    def show(self, name: str, made: Any) -> None:
        """A function or class was made, and has nothing in it yet: what is in it may ask for it by its name."""
        if name == self._taking:
            self.variables[name] = made


class CopiedNamespace(Namespace):
    """This process's own ``__main__``, for sending to processes that are forked from this one.

    They know the names there were at the fork, except functions and classes that were defined anew since.
    """

    shares = True

    def __init__(self) -> None:
        super().__init__(program_main())
        self._then = {
            name: value if isinstance(value, FunctionType | type) else None for name, value in self.variables.items()
        }

    def known_there(self, name: str) -> bool:
        then = self._then.get(name, self)
        return then is None or then is self.variables.get(name)

    @staticmethod
    def of_copy() -> Namespace:
        """The same on the other side, in the process that was forked."""
        namespace = Namespace(program_main())
        namespace.received = dict.fromkeys(namespace.variables, b"")
        return namespace
