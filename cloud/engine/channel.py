"""What travels between the engine's process and a worker: frames over a socket, and one shared page.

The socket carries frames (length, kind, body), many to a message, both ways, in order. Outcomes that need not wake the
engine are left in the ring behind the page (see ``ring``).
The page carries what cannot wait for the other side to read its socket:

::

    CURRENT  worker → engine   position of the item that runs, or ran last
    LIMIT    engine → worker   begin no item at this position or a later one (work taken back)
    KILL     engine → worker   the item at this position is to raise KilledException
    SPIN     engine → worker   there is a core to spare: look again and again for work before sleeping
    OUT, ERR worker → engine   where the running job's output begins in the capture files
    HELD     worker → engine   since when it may hold outcomes (monotonic ns); 0: it holds none
    SEEN     engine → worker   how many outcomes came over the socket, while somebody looks into the ring regularly
    WRITTEN  worker → engine   bytes put into the ring so far
    READ     engine → worker   bytes taken out of it
    HOLD     engine → worker   how long it may hold outcomes (ns)

Each item a worker is given has a *position*: it counts the items given to that worker, and never repeats.
"""

from __future__ import annotations

import os
import struct
import sys

from cloud.jobs import JobOptions
from cloud.serialization.memory import mapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

FRAME: Final = struct.Struct("<QB")

# engine → worker
CONTEXT: Final = 1  #: id, pickled surroundings of a submission
FUNCTION: Final = 2  #: token, pickled function
CHUNK: Final = 3  #: token, arguments of a run of map items
RUN: Final = 4  #: one call
RANGE: Final = 5  #: some items of a chunk
FORGET: Final = 6  #: a function's token
RESUME: Final = 7  #: the limit is lifted: what was taken back lay before this frame
REPLY: Final = 8  #: to a REQUEST
SETTINGS: Final = 9  #: pickled dict, opens the connection
INITIALIZE: Final = 10  #: context id, pickled initializer of a pool (nothing: the one it was forked with)
IDENTITY: Final = 11  #: number, the program's pid, its key for multiprocessing
LEAVE: Final = 12  #: end in good order
TRACKER: Final = 13  #: with a descriptor: of the program's tracker of shared memory

# worker → engine
OUTCOME: Final = 16  #: position, number of items, packed outcome
STOPPED: Final = 17  #: position at which LIMIT was met
REQUEST: Final = 18  #: a verb used inside a job
LEFT: Final = 19  #: nothing more is to be run, and the last outcomes are in the ring

ID: Final = struct.Struct("<Q")
RUN_HEAD: Final = struct.Struct("<QQQQIHB")
"""position, jid, function token, context id, attempt, depth, flags; the pickled arguments follow."""
INSIDE: Final = 0
"""In place of a token in RUN: the pickled function, for this call only, precedes the arguments, after any extras."""
RANGE_HEAD: Final = struct.Struct("<QQQQIHBQII")
"""As RUN_HEAD, then chunk token, index of the first item in the chunk, number of items."""
CHUNK_HEAD: Final = struct.Struct("<QBI")
"""Chunk token, kind, number of items; the payload follows, for SEPARATE the n lengths as u32 and the n pickles."""
OUTCOME_HEAD: Final = struct.Struct("<QBQI")
"""A whole OUTCOME frame's fixed part: length, kind, position, number of items."""
IDENTITY_HEAD: Final = struct.Struct("<II")
MESSAGE_HEAD: Final = struct.Struct("<II")
"""Of REQUEST and REPLY: request id, length of the JSON; blobs of the lengths it names follow."""

# Flags of RUN and RANGE.
PROFILE_FLAG: Final = 1
KEEP_FUNCTION: Final = 2  #: load the function once and keep it
DELIVER: Final = 4  #: send each outcome before beginning the next item
EXTRAS: Final = 8  #: a pickled dict (environment variables) precedes the arguments
FAST_PICKLE: Final = 16  #: results by plain pickle only
PROMPT: Final = 32  #: send the outcome of an item that is not small before beginning the next

# Kinds of chunks.
ATOMS_CHUNK: Final = 1  #: one pickle of a list of single arguments
SEPARATE_CHUNK: Final = 2  #: one pickle an item: its arguments, (args, kwargs)
TUPLES_CHUNK: Final = 3  #: one pickle of a list of tuples of atoms
UNSHARED_CHUNK: Final = 4  #: as ATOMS, but of values that may be changed: no two of them refer to the same such
UNSHARED_TUPLES_CHUNK: Final = 5  #: as TUPLES, likewise

ANEW_CHUNK: Final = 6  #: as SEPARATE, and the function is built anew for each item, too
UNSHARED: Final = (UNSHARED_CHUNK, UNSHARED_TUPLES_CHUNK)
SEPARATE: Final = (SEPARATE_CHUNK, ANEW_CHUNK)
SPREAD: Final = (TUPLES_CHUNK, UNSHARED_TUPLES_CHUNK)

MAX_CHUNKS: Final = 4
"""Chunks a worker keeps; both sides drop the oldest at the same frame."""

# Slots of the page.
CURRENT: Final = 0
LIMIT: Final = 1
KILL: Final = 2
OUT: Final = 3
ERR: Final = 4
SPIN: Final = 5
HELD: Final = 6
SEEN: Final = 7
WRITTEN: Final = 8
READ: Final = 9
HOLD: Final = 10
PAGE_BYTES: Final = 4096
NO_LIMIT: Final = (1 << 62) - 1
LIMIT_TOP: Final = 8 * LIMIT + (7 if sys.byteorder == "little" else 0)
"""The byte of the page that is 0 while a limit is set: reading a byte takes half the time of reading a slot."""

HOLD_NS: Final = 2_000_000
"""How long a worker holds an outcome for those of its next items, unless it is told otherwise."""

CAPTURE_START: Final = 1
"""Where a capture file's output begins: no other file that a job may put in its place has its end there by chance."""


def run_flags(options: JobOptions, *, reusable: bool) -> int:
    """Flags of a RUN or RANGE frame."""
    flags = KEEP_FUNCTION if reusable else 0
    if options.profile:
        flags |= PROFILE_FLAG
    if not options.restartable:
        flags |= PROMPT if options.reports_late else DELIVER
    if options.env_vars:
        flags |= EXTRAS
    if options.fast_serialization == 2:
        flags |= FAST_PICKLE
    return flags


def join_separate(pickles: list[bytes]) -> bytes:
    """The payload of a SEPARATE chunk."""
    return b"".join((struct.pack(f"<{len(pickles)}I", *map(len, pickles)), *pickles))


def frame(kind: int, *parts: bytes) -> bytes:
    """One frame."""
    return b"".join((FRAME.pack(sum(map(len, parts)), kind), *parts))


def sized(part: bytes) -> bytes:
    """A part of a body that something follows."""
    return len(part).to_bytes(4, "little") + part


def cut(body: Any, offset: int) -> tuple[Any, int]:
    """A part that ``sized`` put at this offset, and where it ends."""
    start = offset + 4
    end = start + int.from_bytes(body[offset:start], "little")
    return body[start:end], end


def pack_message(kind: int, number: int, content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> bytes:
    """A REQUEST or REPLY frame: JSON, and raw bytes beside it."""
    import json

    text = json.dumps({**content, "blobs": [len(blob) for blob in blobs]}).encode()
    return frame(kind, MESSAGE_HEAD.pack(number, len(text)), text, *blobs)


def unpack_message(body: bytes | memoryview) -> tuple[int, dict[str, Any], list[bytes]]:
    """(request id, content, blobs) of a REQUEST or REPLY."""
    import json

    number, length = MESSAGE_HEAD.unpack_from(body)
    offset = MESSAGE_HEAD.size + length
    content: dict[str, Any] = json.loads(bytes(body[MESSAGE_HEAD.size : offset]))
    blobs = []
    for size in content.pop("blobs"):
        blobs.append(bytes(body[offset : offset + size]))
        offset += size
    return number, content, blobs


class Page:
    """The shared page, as a view of unsigned 64-bit slots: ``page.slots[CURRENT]``; and what lies behind it."""

    def __init__(self, fd: int, n_behind: int = 0, *, create: bool = False) -> None:
        if create:
            os.ftruncate(fd, PAGE_BYTES + n_behind)
        self.raw = mapped(fd, PAGE_BYTES + n_behind)
        self._all = memoryview(self.raw)
        self.slots = self._all[:PAGE_BYTES].cast("Q")
        self.behind = self._all[PAGE_BYTES:]
        if create:
            self.slots[CURRENT] = self.slots[SEEN] = NO_LIMIT
            self.slots[OUT] = self.slots[ERR] = CAPTURE_START
            self.slots[LIMIT] = self.slots[KILL] = NO_LIMIT + 1
            self.slots[HOLD] = HOLD_NS

    def close(self) -> None:
        """Unmap. Idempotent."""
        for view in (self.slots, self.behind, self._all):
            view.release()
        self.raw.close()
