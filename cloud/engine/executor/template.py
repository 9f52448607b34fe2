"""The engine's side of the template process: starts it, and talks to it. Of ``socket``: see ``engine.passing``."""

from __future__ import annotations

import _socket as socket
import os
import select
import sys
import time

from cloud.engine.descriptors import full, off_stdio
from cloud.engine.passing import send_with
from cloud.engine.signals import signal
from cloud.engine.worker.protocol import MESSAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONTROL_FD = 3
KEPT_FD = 4
_CODE = (
    "import gc, sys; gc.disable(); sys.path.insert(0, {root!r}); import cloud; del sys.path[0]; sys.path += {path!r}; "
    "from cloud.engine.worker.template import main; main({fd}, {preload!r})"
)
_END_S = 5.0


class TemplateProcess:
    """A running template.

    Attributes:
        fd: Descriptor of our end of the control socket.
    """

    def __init__(self, preload: tuple[str, ...]) -> None:
        if not sys.executable:
            raise OSError("sys.executable is not set: worker processes need a Python interpreter to run")
        # cloudpickle may come from a folder that only the program's own path knows.
        path = [each for each in sys.path if each]
        code = _CODE.format(root=package_root(), path=path, fd=CONTROL_FD, preload=preload)
        self._start([sys.executable, *_interpreter_flags(), "-c", code], dict(os.environ), {})

    def _start(
        self, arguments: list[str], environ: dict[str, str], files: dict[int, int], *, own_session: bool = False
    ) -> None:
        """Start the process, with copies of our descriptors ``files`` as its own, by the number they have there.

        Without ``own_session`` it has a process group of its own in the program's session: a session of its own would
        drop the user's nice level where the kernel groups processes by session for scheduling.
        """
        ours, theirs = (each.detach() for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        null = -1
        try:
            ours = off_stdio(ours)
            # posix_spawn would overwrite what it is to copy, if that had one of the numbers it copies to.
            theirs = off_stdio(theirs, KEPT_FD + 1)
            null = off_stdio(os.open(os.devnull, os.O_RDWR), KEPT_FD + 1)
            self._pid = _spawn(arguments, environ, {0: null, CONTROL_FD: theirs, **files}, own_session=own_session)
            self._socket = socket.socket(fileno=ours)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
            if null >= 0:
                os.close(null)
        self._socket.setblocking(False)
        self.fd = ours

    def fork(self, number: int, descriptors: list[int]) -> None:
        """Ask for a worker with these descriptors: socket, page, stdout, stderr.

        Raises:
            OSError: The template does not answer.
        """
        if not self._send(MESSAGE.pack(b"F", number, 0), descriptors):
            raise OSError("the template process, which starts the workers, does not answer")

    def signal(self, number: int, signum: int) -> None:
        """Ask for a signal to a worker; it never meets another process."""
        self._send(MESSAGE.pack(b"K", number, signum), [])

    def _send(self, message: bytes, descriptors: list[int]) -> bool:
        until = time.monotonic() + _END_S
        while True:
            try:
                send_with(self._socket, message, descriptors)
                return True
            except OSError as exc:
                if not full(exc):
                    return True  # dead; the next read tells
            if time.monotonic() > until:
                return False  # it is stopped
            time.sleep(0.001)

    def read(self) -> tuple[list[tuple[bytes, int, int]], bool]:
        """Messages that have arrived, as (what, worker number, argument); and False when the template is gone."""
        messages: list[tuple[bytes, int, int]] = []
        while True:
            try:
                message = self._socket.recv(MESSAGE.size)
            except BlockingIOError:
                return messages, True
            except OSError:
                return messages, False
            if not message:
                return messages, False
            messages.append(MESSAGE.unpack(message))

    def end(self) -> None:
        """Let it end everything it started, and wait for that. Bounded, and idempotent."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        try:
            if not self._ended_within(_END_S):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
        except ChildProcessError:
            pass  # somebody else in the program waited for it

    def _ended_within(self, seconds: float) -> bool:
        if hasattr(os, "pidfd_open"):
            try:
                fd = os.pidfd_open(self._pid)
            except OSError:
                pass  # refused by a sandbox, or no descriptor is left
            else:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(int(1000 * seconds))
                os.close(fd)
                seconds = 0.0
        until = time.monotonic() + seconds
        pause = 0.0005
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return True

    def close(self) -> int:
        """After it died: bury it; its wait status."""
        self._socket.close()
        try:
            return os.waitpid(self._pid, 0)[1]
        except ChildProcessError:
            return int(signal.SIGKILL)  # somebody else in the program waited for it

    def abandon(self) -> None:
        """In a forked child of the program: it is not ours."""
        self._socket.close()


def kill_orphan(pid: int) -> None:
    """End a worker, and its process group, whose template is dead; 0 for one that nobody knows the number of."""
    if pid:
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass


def package_root() -> str:
    """The folder that holds this package."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


def _spawn(arguments: list[str], environ: dict[str, str], files: dict[int, int], *, own_session: bool) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in files.items()]
    # A process group of its own: Ctrl-C in the terminal is the program's business.
    # The thread that starts it may block signals; the template needs them.
    apart: dict[str, Any] = {"setsid": True} if own_session else {"setpgroup": 0}
    return os.posix_spawn(arguments[0], arguments, environ, file_actions=actions, setsigmask=(), **apart)


def _interpreter_flags() -> list[str]:
    """The program's interpreter options that its jobs should see too."""
    flags = ["-P"]
    if sys.flags.optimize:
        flags.append("-" + "O" * sys.flags.optimize)
    for name, letter in (("isolated", "I"), ("ignore_environment", "E"), ("no_user_site", "s"), ("no_site", "S")):
        if getattr(sys.flags, name):
            flags.append(f"-{letter}")
    if sys.dont_write_bytecode:
        flags.append("-B")
    if sys.flags.bytes_warning:
        flags.append("-" + "b" * sys.flags.bytes_warning)
    flags += [f"-W{option}" for option in sys.warnoptions]
    for name, value in sys._xoptions.items():
        flags += ["-X", name if value is True else f"{name}={value}"]
    return flags
