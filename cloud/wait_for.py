"""Wait for a job to get somewhere: to a status, or to the point where it listens on a port.

::

    jid = cloud.call(serve, 8000)
    cloud.wait_for.status(jid, "processing", timeout=10)
    where = cloud.wait_for.port(jid, 8000, timeout=10)    # {'address': '127.0.0.1', 'port': 8000}

Source: PiCloud client 2.6.7-2.8.5, ``cloud.wait_for``.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

from cloud import current
from cloud.errors import CloudException, CloudTimeoutError
from cloud.jobs import DONE, PROCESSING, STALLED, STATUS_LABELS, WAITING, jid_list

if TYPE_CHECKING:
    from cloud.backends.base import Backend

__all__ = ["port", "status"]

# Neither the beginning of a job nor listen() is an event that anybody tells. The end of the job is one, and ends
# each of these pauses.
_FIRST_PAUSE_S: Final = 0.002
_LAST_PAUSE_S: Final = 0.1

#: Kernel tables of sockets by protocol, and the state in which a socket accepts what comes.
_TABLES: Final = {"tcp": ("tcp", "tcp6"), "udp": ("udp", "udp6")}
_OPEN: Final = {"tcp": "0A", "udp": "07"}

_Found = TypeVar("_Found")


def status(jid: int, test_status: str | Iterable[str], timeout: float | None = None) -> None:
    """Block until a job has a status, or one of several.

    A job may pass through 'queued' and 'processing' faster than anybody can look; to wait for its end, name the final
    statuses.

    Args:
        jid: The job.
        test_status: 'waiting', 'queued', 'processing', 'done', 'error', 'killed' or 'stalled', or an iterable of them.
        timeout: Seconds; None waits for ever, 0 looks once. The job goes on after a timeout.

    Raises:
        CloudException: The job can no longer get there; ``.status`` is the one it has.
        CloudTimeoutError: It did not get there in time.
        JobNotFound: The jid is unknown.
        TypeError, ValueError: ``test_status`` is no status, or ``jid`` not one jid.
    """
    number = _one_jid(jid, "status")
    wanted = _codes(test_status)
    backend = current.cloud().backend

    def look(code: int) -> bool | None:
        if code in wanted:
            return True
        if any(_can_become(backend, number, code, each) for each in wanted):
            return None
        labels = " or ".join(repr(STATUS_LABELS[each]) for each in sorted(wanted))
        raise CloudException(
            f"is {STATUS_LABELS[code]!r} and can no longer become {labels}", jid=number, status=STATUS_LABELS[code]
        )

    # The end of a job is an event: with final statuses alone there is nothing to look at before.
    _wait(backend, number, look, timeout, "cloud.wait_for.status", pause=any(code < DONE for code in wanted))


def port(jid: int, port: int, protocol: str = "tcp", timeout: float | None = None) -> dict[str, str | int]:
    """Block until a job that runs on this machine listens on a port.

    Args:
        jid: The job; it may still have to begin.
        port: Number, 1 to 65535. It is the job, or a process it started, that must listen there; where the system does
            not tell who listens (it does on Linux), any process of this machine counts.
        protocol: 'tcp' or 'udp'.
        timeout: Seconds; None waits for ever, 0 looks once. The job goes on after a timeout.

    Returns:
        ``{'address': ..., 'port': ...}``: where to connect to.

    Raises:
        CloudException: The job ended before; ``.status`` tells how.
        CloudTimeoutError: It did not listen in time.
        JobNotFound: The jid is unknown.
        TypeError, ValueError: ``jid`` is not one jid, ``port`` no port, or ``protocol`` neither of the two.
    """
    number = _one_jid(jid, "port")
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port must be an int, not {port!r}")
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be 1 to 65535, not {port}")
    if protocol not in _TABLES:
        raise ValueError(f"protocol must be 'tcp' or 'udp', not {protocol!r}")
    backend = current.cloud().backend

    def look(code: int) -> str | None:
        if code >= DONE:
            label = STATUS_LABELS[code]
            raise CloudException(f"ended ({label}) without listening on {protocol} port {port}", number, label)
        pid = backend.describe((number,))[0].get("live", {}).get("pid") if code == PROCESSING else None
        return _listening(pid, port, protocol) if pid else None

    return {"address": _wait(backend, number, look, timeout, "cloud.wait_for.port"), "port": port}


def _wait(
    backend: Backend,
    jid: int,
    look: Callable[[int], _Found | None],
    timeout: float | None,
    verb: str,
    *,
    pause: bool = True,
) -> _Found:
    """Call ``look(status code)`` until it finds something or raises; in the pauses, wait for the job's end."""
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout must be at least 0 seconds, not {timeout!r}")
    # By the clock of the jobs, which is virtual in the simulator.
    deadline = None if timeout is None else backend.now() + timeout
    pause_s = _FIRST_PAUSE_S
    while True:
        found = look(backend.statuses((jid,))[0])
        if found is not None:
            return found
        left_s = None if deadline is None else deadline - backend.now()
        if left_s is not None and left_s <= 0:
            raise CloudTimeoutError(f"{verb} timed out", jid=[jid])
        limits = [each for each in (left_s, pause_s if pause else None) if each is not None]
        backend.wait((jid,), min(limits, default=None), stop_on_error=False)
        pause_s = min(1.5 * pause_s, _LAST_PAUSE_S)


def _one_jid(jid: int, verb: str) -> int:
    jids = jid_list(jid, f"cloud.wait_for.{verb}")
    if isinstance(jid, Iterable):
        raise TypeError(f"cloud.wait_for.{verb} takes one jid, not {jid!r}")
    return jids[0]


def _codes(test_status: str | Iterable[str]) -> frozenset[int]:
    labels = [test_status] if isinstance(test_status, str) else test_status
    try:
        names = list(labels)
    except TypeError:
        raise TypeError(f"test_status must be a status or an iterable of them, not {test_status!r}") from None
    wrong = [name for name in names if name not in STATUS_LABELS]
    if wrong or not names:
        what = f"no status is called {wrong[0]!r}" if wrong else "test_status names no status"
        raise ValueError(f"{what}; there are {', '.join(STATUS_LABELS)}")
    return frozenset(STATUS_LABELS.index(name) for name in names)


def _can_become(backend: Backend, jid: int, code: int, wanted: int) -> bool:
    if code >= DONE:
        return False
    if wanted == STALLED:
        return code == WAITING
    if wanted == WAITING:
        # Only the back-off before another attempt leads back there.
        return bool(backend.describe((jid,))[0]["retries"])
    return True


def _listening(pid: int, number: int, protocol: str) -> str | None:
    """The address at which the process, or one that it started, listens on the port."""
    if not os.path.isdir(f"/proc/{pid}/fd"):
        return _answering(number, protocol)
    # Sockets first: one that opens between the two looks is found by the next.
    found = dict(_sockets(number, protocol))
    owned = {inode for each in _family(pid) for inode in _inodes(each)} if found else set()
    addresses = [address for inode, address in found.items() if inode in owned]
    return min(addresses, key=lambda address: ":" in address, default=None)


def _sockets(number: int, protocol: str) -> Iterator[tuple[str, str]]:
    """(inode, address to connect to) of the sockets of this machine that take what comes to the port."""
    for table in _TABLES[protocol]:
        try:
            with open(f"/proc/net/{table}", encoding="ascii") as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except OSError:
            continue  # a kernel without IPv6 has no such table
        for row in rows:
            host, _, hexadecimal = row[1].partition(":")
            if row[3] == _OPEN[protocol] and int(hexadecimal, 16) == number:
                yield row[9], _address(host)


def _address(words: str) -> str:
    # 32-bit words in the byte order of the machine.
    packed = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return str(address)


def _inodes(pid: int) -> Iterator[str]:
    """Inodes of the sockets that a process has open."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return  # it has ended
    for name in names:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[8:-1]


def _family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                children = file.read().split()
        except OSError:
            continue
        for child in children:
            yield from _family(int(child))


def _answering(number: int, protocol: str) -> str | None:
    """Where the port is in use, on systems that do not tell by whom."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            # Connecting would be noticed by the job; an address that is taken is not.
            probe.bind(("127.0.0.1", number))
        except OSError as exc:
            return "127.0.0.1" if exc.errno == errno.EADDRINUSE else None
    return None
