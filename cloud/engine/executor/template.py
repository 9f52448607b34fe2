"""The engine's side of the template process: starts it, and talks to it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from cloud.engine.worker.protocol import MESSAGE

_CONTROL_FD = 3
_CODE = (
    "import sys; sys.path.insert(0, {root!r}); import cloud; del sys.path[0]; sys.path += {path!r}; "
    "from cloud.engine.worker.template import main; main({fd}, {preload!r})"
)
_END_S = 5.0


class TemplateProcess:
    """A running template.

    Attributes:
        fd: Descriptor of our end of the control socket.
    """

    def __init__(self, preload: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        self.fd = ours.fileno()
        self._owner = os.getpid()
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
        # cloudpickle may come from a folder that only the program's own path knows.
        code = _CODE.format(root=root, path=[each for each in sys.path if each], fd=_CONTROL_FD, preload=preload)
        if not sys.executable:
            raise OSError("sys.executable is not set: worker processes need a Python interpreter to run")
        arguments = [sys.executable, *_interpreter_flags(), "-c", code]
        null = os.open(os.devnull, os.O_RDONLY)
        held: list[socket.socket | _Closing] = []
        try:
            while theirs.fileno() <= _CONTROL_FD or null <= _CONTROL_FD:
                # The low numbers are free in this program; posix_spawn would overwrite what it is to copy.
                if theirs.fileno() <= _CONTROL_FD:
                    held.append(theirs)
                    theirs = theirs.dup()
                if null <= _CONTROL_FD:
                    held.append(_Closing(null))
                    null = os.dup(null)
            self._pid = _spawn(arguments, theirs.fileno(), null)
        finally:
            theirs.close()
            os.close(null)
            for each in held:
                each.close()

    def fork(self, number: int, descriptors: list[int]) -> None:
        """Ask for a worker with these descriptors: socket, page, stdout, stderr."""
        self._send(MESSAGE.pack(b"F", number, 0), descriptors)

    def signal(self, number: int, signum: int) -> None:
        """Ask for a signal to a worker; it never meets another process."""
        self._send(MESSAGE.pack(b"K", number, signum), [])

    def _send(self, message: bytes, descriptors: list[int]) -> None:
        until = time.monotonic() + _END_S
        while True:
            try:
                socket.send_fds(self._socket, [message], descriptors)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    return  # it is stopped; what we wait for from it will be reported when it goes on or dies
                time.sleep(0.001)
            except OSError:
                return  # dead; the next read tells

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
        """Let it end everything it started, and wait for that. Bounded."""
        self._socket.close()
        until = time.monotonic() + _END_S
        pause = 0.0005
        while True:
            try:
                if os.waitpid(self._pid, os.WNOHANG)[0]:
                    return
            except ChildProcessError:
                return  # somebody else in the program waited for it
            if time.monotonic() > until:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def close(self) -> None:
        """After it died by itself: bury it."""
        self._socket.close()
        try:
            os.waitpid(self._pid, 0)
        except ChildProcessError:
            pass

    def abandon(self) -> None:
        """In a forked child of the program: it is not ours."""
        self._socket.close()


class _Closing:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


def _spawn(arguments: list[str], control: int, null: int) -> int:
    actions = [
        (os.POSIX_SPAWN_DUP2, null, 0),
        (os.POSIX_SPAWN_DUP2, control, _CONTROL_FD),
    ]
    environment = dict(os.environ)
    # A process group of its own: Ctrl-C in the terminal is the program's business.
    return os.posix_spawn(arguments[0], arguments, environment, file_actions=actions, setpgroup=0)


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
    flags += [f"-W{option}" for option in sys.warnoptions]
    for name, value in sys._xoptions.items():
        flags += ["-X", name if value is True else f"{name}={value}"]
    return flags
