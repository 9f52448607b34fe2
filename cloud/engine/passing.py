"""Messages over a socket with descriptors beside them.

Of ``socket`` only the half in C is used, here and wherever workers are started or spoken to: the half in Python would
take 3 ms of the time to the first result, twice.
"""

from __future__ import annotations

import _socket as socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

NO_SIGNAL: Final = int(getattr(socket, "MSG_NOSIGNAL", 0))
"""Programs that restore the default of SIGPIPE must not die of a worker's death."""


def send_with(connection: socket.socket, data: bytes | memoryview, descriptors: list[int]) -> int:
    """Send bytes and descriptors beside them; the number of bytes sent. As ``socket.send_fds``, which drops flags."""
    numbers = struct.pack(f"{len(descriptors)}i", *descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if descriptors else []
    return connection.sendmsg([data], ancillary, NO_SIGNAL)


def receive_with(connection: socket.socket, n_bytes: int, n_descriptors: int) -> tuple[bytes, list[int]]:
    """A message and the descriptors beside it. As ``socket.recv_fds``."""
    data, ancillary, _, _ = connection.recvmsg(n_bytes, socket.CMSG_LEN(4 * n_descriptors))
    return data, [fd for sent in ancillary for fd in descriptors_of(*sent)]


def descriptors_of(level: int, kind: int, content: bytes) -> tuple[int, ...]:
    """The descriptors in one piece of what came beside a message."""
    if level != socket.SOL_SOCKET or kind != socket.SCM_RIGHTS:
        return ()
    n = len(content) // 4
    return struct.unpack(f"{n}i", content[: 4 * n])
