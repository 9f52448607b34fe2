"""The template: a clean, single-threaded process that forks workers on request and buries them.

It imports nothing of the user's. It lives as long as the program: at the end of its control socket it kills every
worker and every process they left behind. As their parent it alone signals and reaps workers, so a signal can never
meet a process that merely reuses a worker's number.
"""

from __future__ import annotations

import _socket as socket
import errno
import gc
import os
import select
import sys

from cloud.engine.passing import receive_with
from cloud.engine.signals import signal
from cloud.engine.worker.main import serve
from cloud.engine.worker.pooled import Inherited
from cloud.engine.worker.protocol import BY_ENGINE, MESSAGE, N_DESCRIPTORS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_IDLE_MS: Final = 30
_MAX_IDLE_MS: Final = 10_000
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


class _Libc:
    """``prctl``, where there is one. Linux only; elsewhere workers that escape their process group are not found."""

    def __init__(self) -> None:
        self._prctl: Any = None
        if sys.platform == "linux":
            try:
                self._prctl = _find_prctl()
            except (ImportError, OSError, AttributeError):
                pass  # a Python without ctypes, or a C library of another kind

    def become_subreaper(self) -> None:
        """Orphaned descendants become children of this process."""
        if self._prctl is not None:
            self._prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def die_with_parent(self) -> None:
        """Be killed when the thread that forked this process ends: the template has one thread only."""
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _find_prctl() -> Any:
    """As ``ctypes.CDLL(None).prctl``. Of ctypes' C half: its half in Python takes 2 ms to load."""
    import _ctypes

    ctypes: Any = _ctypes

    class Int(ctypes._SimpleCData):  # type: ignore[misc]
        _type_ = "i"

    class Function(ctypes.CFuncPtr):  # type: ignore[misc]
        _flags_ = ctypes.FUNCFLAG_CDECL
        _restype_ = Int

    return Function(ctypes.dlsym(ctypes.dlopen(None, 0), "prctl"))


class Template:
    """The template's state.

    Args:
        control: Socket to the engine.
        preload: Modules to import after the first worker, when a processor is to spare, for those forked from then on.
        inherited: What its workers have from the program, if this process was forked from that.
        kept_fd: A descriptor that tells others, by staying open, that there may be workers; -1 for none.
    """

    def __init__(
        self,
        control: socket.socket,
        preload: tuple[str, ...],
        inherited: Inherited | None = None,
        kept_fd: int = -1,
    ) -> None:
        self._kept_fd = kept_fd
        self._preload = preload
        self._inherited = inherited
        self._control = control
        self._pid = os.getpid()
        self._pids: dict[int, int] = {}  # worker id -> pid
        self._ids: dict[int, int] = {}
        self._ended: set[int] = set()
        self._has_forked = False
        self._libc = _Libc()
        self._libc.become_subreaper()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU):
            # Ctrl-C is the program's business; a job that asks the terminal for something gets an error instead of
            # being stopped for ever.
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the engine's end of the control socket closes; then leave no process behind."""
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        loaded, pause_ms = False, _IDLE_MS
        while True:
            # Not before the first worker: the program may be about to ask for it.
            ready = dict(poll.poll(pause_ms if self._has_forked and not loaded else None))
            if not ready:
                pause_ms *= 2
                # A machine that is busy for long may always be.
                if loaded := _is_quiet() or pause_ms > _MAX_IDLE_MS:
                    self._load()
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._serve():
                break
        self._control.close()
        self._end()

    def _load(self) -> None:
        import importlib

        for name in self._preload:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001, S110 - a job that needs it will say why it cannot be imported
                pass
        gc.freeze()

    def _serve(self) -> bool:
        try:
            message, descriptors = receive_with(self._control, MESSAGE.size, N_DESCRIPTORS)
        except OSError:
            return False
        if not message:
            return False
        what, number, argument = MESSAGE.unpack(message)
        if what == b"F":
            self._fork(number, descriptors)
        else:
            if argument == signal.SIGKILL:
                self._reap()  # what is dead already is told as it died
                self._ended.update(self._pids.keys() & {number})
            if number in self._pids:
                self._signal(self._pids[number], argument)
        return True

    def _signal(self, pid: int, number: int) -> None:
        if number == signal.SIGKILL:
            _kill_group(pid)
        try:
            # After its group too: a job may have moved its worker to another one.
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # dead, and about to be reaped

    def _fork(self, number: int, descriptors: list[int]) -> None:
        try:
            if len(descriptors) < N_DESCRIPTORS:
                raise OSError(errno.EMFILE, "descriptors were lost on the way")
            pid = os.fork()
        except OSError as exc:
            self._tell(b"D", number, -(exc.errno or 0) - 1000)
            for fd in descriptors:
                os.close(fd)
            return
        if pid == 0:
            try:
                self._become_worker(descriptors)
            finally:
                os._exit(70)
        try:
            # Both sides set the group, so that it stands before either goes on.
            os.setpgid(pid, pid)
        except OSError:
            pass  # it is dead already
        self._has_forked = True
        self._pids[number] = pid
        self._ids[pid] = number
        for fd in descriptors:
            os.close(fd)
        self._tell(b"B", number, pid)

    def _become_worker(self, descriptors: list[int]) -> None:
        # A process group, not a session: see TemplateProcess._start.
        os.setpgid(0, 0)
        self._libc.die_with_parent()
        if os.getppid() != self._pid:
            os._exit(0)  # the template was killed before it could take us along
        self._libc.become_subreaper()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in (self._control.detach(), self._woken, self._wake, self._kept_fd):
            if fd >= 0:
                os.close(fd)
        link, page, out, err = descriptors
        for fd in (link, page):
            os.set_inheritable(fd, False)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        serve(link, page, self._inherited)

    def _tell(self, what: bytes, number: int, argument: int) -> None:
        try:
            self._control.send(MESSAGE.pack(what, number, argument))
        except OSError:
            pass  # the engine is gone; the next look at the socket ends us

    def _reap(self) -> None:
        # What an orphan forks before it is killed becomes a child of ours as it dies: look until there is none.
        while self._reap_dead():
            self._bury_orphans()

    def _reap_dead(self) -> bool:
        lost_one = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            lost_one = True
            number = self._ids.pop(pid, None)
            if number is None:
                continue
            del self._pids[number]
            if number in self._ended:
                self._ended.discard(number)
                status |= BY_ENGINE
            # Its group first: whoever is left in it must not outlive the worker.
            _kill_group(pid)
            self._tell(b"D", number, status)
        return lost_one

    def _bury_orphans(self) -> None:
        """Kill what dead workers left: as subreapers they and we inherit it, so it is now a child of ours."""
        for pid in _children(os.getpid()):
            if pid not in self._ids:
                _kill_tree(pid)

    def _end(self) -> None:
        for pid in list(self._ids):
            _kill_group(pid)
        while True:
            self._ids.clear()
            self._bury_orphans()
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return
            except InterruptedError:
                continue


def _is_quiet() -> bool:
    """True when work of ours takes no processor from others, as far as the system tells."""
    try:
        with open("/proc/loadavg", "rb") as file:
            n_running = int(file.read().split()[3].partition(b"/")[0])  # this process among them
    except (OSError, ValueError, IndexError):
        return True
    return n_running <= max(1, (os.cpu_count() or 1) // 2)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _kill_tree(pid: int) -> None:
    # Stopped first, so that it cannot fork while its children are looked up.
    try:
        os.kill(pid, signal.SIGSTOP)
        for child in _children(pid):
            _kill_tree(child)
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _children(pid: int) -> list[int]:
    """Process ids of the children of a process; empty where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(each) for each in file.read().split()]
    except OSError:
        pass
    found = []
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(name))
    return found


def main(control_fd: int, preload: tuple[str, ...], kept_fd: int = -1) -> None:
    """Entry point of the template process; it ends with the program."""
    os.closerange(max(control_fd, kept_fd) + 1, 4096)
    for fd in (1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The program runs without: a worker's socket must not get this number.
            os.dup2(0, fd)
    if kept_fd >= 0:
        os.set_inheritable(kept_fd, False)
    template = Template(socket.socket(fileno=control_fd), preload, kept_fd=kept_fd)
    # Whoever started it may have switched the collector off: it took a tenth of the time that all these imports take.
    gc.freeze()
    gc.enable()
    template.run()
    # The program waits for this process to be gone: tearing the interpreter down would only take time.
    os._exit(0)
