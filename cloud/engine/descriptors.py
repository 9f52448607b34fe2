"""Where file descriptors live: out of the way of what programs and jobs do with the low numbers."""

from __future__ import annotations

import errno
import fcntl
import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_N_OTHERS: Final = 16


def off_stdio(fd: int, least: int = 3) -> int:
    """The same open file under a number of at least ``least``, in place of ``fd``.

    A program that runs with its stdin, stdout or stderr closed has their numbers free: what it, or C code in it,
    prints to 1 or 2 must not end up in a channel.
    """
    if fd >= least:
        return fd
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(fd)
    return copy


def full(exc: OSError) -> bool:
    """True for a socket that takes no more now, or that holds as many descriptors as a process may have open."""
    return exc.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS, errno.ETOOMANYREFS)


def out_of_reach(fd: int) -> int:
    """A copy under a high number: code that closes every low descriptor, or that files are opened by, misses it."""
    from cloud.serialization.memory import HIGH_FD

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
    except OSError:
        return os.dup(fd)  # RLIMIT_NOFILE allows no such number


def n_spare() -> int:
    """How many descriptors workers may take together: large buffers and the program itself need some too."""
    from cloud.serialization.memory import max_files

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return 1 << 30
    return soft - max_files() - _N_OTHERS
