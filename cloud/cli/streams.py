"""Output of a job's command, from the job to the terminal, as it is written.

What a job prints is kept to its last part only. A command's whole output goes through two pipes instead, which the job
opens by their paths: a full pipe makes the command wait.
"""

from __future__ import annotations

import os
import selectors
import shutil
import sys
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

__all__ = ["Streams", "terminal"]

_PROC: Final = "/proc/self/fd"
_READ_BYTES: Final = 1 << 16

Sink = Callable[[bytes], object]


class Streams:
    """Two pipes; they are gone when the block ends.

    Attributes:
        paths: Under which another process of this user opens them, for standard output and standard error.
    """

    def __enter__(self) -> Streams:
        self._descriptors: list[int] = []
        self._readers: list[int] = []
        self._folder: str | None = None
        # With /proc a pipe needs no name of its own, and so leaves none behind, however this process ends.
        self.paths = [self._anonymous() if os.path.isdir(_PROC) else self._named(name) for name in ("stdout", "stderr")]
        self._woken, self._wake = os.pipe()
        self._descriptors += [self._woken, self._wake]
        return self

    def _anonymous(self) -> str:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._keep(reader, writer)
        return f"/proc/{os.getpid()}/fd/{writer}"

    def _named(self, name: str) -> str:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="cloud-exec-")
        path = os.path.join(self._folder, name)
        os.mkfifo(path, 0o600)
        self._keep(os.open(path, os.O_RDONLY | os.O_NONBLOCK), os.open(path, os.O_WRONLY))
        return path

    def _keep(self, reader: int, writer: int) -> None:
        # Our own writing end stays open: a pipe that nobody has open for writing would look ended, again and again.
        self._readers.append(reader)
        self._descriptors += [reader, writer]

    def end(self) -> None:
        """Have ``copy`` return once it has copied what is there. Callable from any thread."""
        os.write(self._wake, b".")

    def copy(self, out: Sink, err: Sink) -> None:
        """Hand on what comes through the pipes; blocks until ``end`` was called."""
        with selectors.DefaultSelector() as selector:
            for reader, sink in zip(self._readers, (out, err), strict=True):
                selector.register(reader, selectors.EVENT_READ, sink)
            selector.register(self._woken, selectors.EVENT_READ)
            ended = False
            while not ended:
                for key, _ in selector.select():
                    if key.data is None:
                        ended = True
                    else:
                        key.data(os.read(key.fd, _READ_BYTES))
        for reader, sink in zip(self._readers, (out, err), strict=True):
            _drain(reader, sink)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _drain(reader: int, sink: Sink) -> None:
    # A process that the command left behind may go on writing: only what is there now belongs to the command.
    size = _READ_BYTES
    while size == _READ_BYTES:
        try:
            content = os.read(reader, _READ_BYTES)
        except BlockingIOError:
            return
        sink(content)
        size = len(content)


def terminal(name: str) -> Sink:
    """What writes bytes to ``sys.stdout`` or ``sys.stderr`` and has them seen at once."""

    def write(content: bytes) -> None:
        stream: Any = getattr(sys, name)
        if stream is None:
            return
        binary = getattr(stream, "buffer", None)
        if binary is None:
            stream.write(content.decode("utf-8", "replace"))
        else:
            binary.write(content)
        stream.flush()

    return write
