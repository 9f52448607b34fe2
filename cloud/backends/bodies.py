"""What a request sends after its head: bytes, many bytes, or a file, again for each try.

Nothing large is copied or joined, and a file is read in pieces as it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cloud.errors import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Protocol

    class Readable(Protocol):
        """What a binary file has, at least; one that can also `seek` and `tell` can be sent again."""

        def read(self, n_bytes: int, /) -> bytes: ...


__all__ = ["Body"]

_PIECE_BYTES: Final = 1024 * 1024


class Body:
    """The body of one request.

    Args:
        content: Bytes, pieces of bytes in order, None for no body, or a binary file, sent from where it stands.
        n_bytes: How much of a file to send. None for all of it, for files that can seek.

    Attributes:
        n_bytes: The length; None for no body.

    Raises:
        ValueError: The length of a file is neither given nor to be found out.
    """

    __slots__ = ("_begun", "_file", "_pieces", "_start", "n_bytes")

    def __init__(self, content: bytes | Sequence[bytes] | Readable | None, n_bytes: int | None = None) -> None:
        self._pieces: Sequence[bytes | memoryview] = ()
        self._file: Readable | None = None
        self._start: int | None = None
        self._begun = False
        self.n_bytes = n_bytes
        if content is None:
            self.n_bytes = None
        elif isinstance(content, (bytes, bytearray, memoryview)):
            self._pieces = [_flat(content)]
            self.n_bytes = len(self._pieces[0])
        elif hasattr(content, "read"):
            self._file = content
            self._measure(content)
        else:
            self._pieces = [_flat(piece) for piece in content]
            self.n_bytes = sum(map(len, self._pieces))

    @property
    def can_be_sent(self) -> bool:
        """It was not begun yet, or can be begun again."""
        return self._file is None or not self._begun or self._start is not None

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield it from its beginning.

        Raises:
            BackendError: The file cannot be read, or ends before the length that was announced.
        """
        yield from self._pieces
        file = self._file
        if file is None:
            return
        assert self.n_bytes is not None
        left = self.n_bytes
        try:
            if self._begun and self._start is not None:
                file.seek(self._start)  # type: ignore[attr-defined]
            self._begun = True
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    break
                left -= len(piece)
                yield piece
        except OSError as exc:
            raise BackendError(f"What was to be sent cannot be read: {exc.strerror or exc}.") from exc
        if left:
            raise BackendError(
                f"What was to be sent ended {left} bytes before its length of {self.n_bytes}.",
                hint="Do not change a file while it is sent.",
            )

    def _measure(self, file: Readable) -> None:
        try:
            self._start = file.tell()  # type: ignore[attr-defined]
            if self.n_bytes is None:
                self.n_bytes = file.seek(0, 2) - self._start  # type: ignore[attr-defined]
            file.seek(self._start)  # type: ignore[attr-defined]
        except (AttributeError, OSError):
            self._start = None  # a pipe: it can be sent once
        if self.n_bytes is None:
            raise ValueError("the length of this file cannot be found out: give it as n_bytes")


def _flat(content: bytes | memoryview) -> bytes | memoryview:
    """Counted in bytes, whatever its items are."""
    return content if isinstance(content, bytes) else memoryview(content).cast("B")
