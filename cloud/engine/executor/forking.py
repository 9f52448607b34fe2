"""A template that is a copy of the program: its workers inherit what no pickle can hand on.

::

    program ──fork──► template ──fork──► workers         the same messages as with a template that starts from nothing

The program itself is forked once, when the pool opens; every worker, also one that replaces another, is a copy of the
program as it was then. The copy has one thread and serves no code of the user's, so forking from it is safe at any
time. What is not safe is the one fork of the program, if other threads of it hold locks then: as with multiprocessing.
"""

from __future__ import annotations

import _socket as socket
import gc
import os
import sys
import warnings

from cloud.engine.descriptors import off_stdio
from cloud.engine.executor.template import TemplateProcess
from cloud.engine.signals import signal
from cloud.engine.worker.pooled import Inherited
from cloud.engine.worker.template import Template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


class ForkedTemplate(TemplateProcess):
    """A template forked from this program, now.

    Args:
        inherited: The initializer of its workers.
    """

    def __init__(self, inherited: Inherited) -> None:
        ours, theirs = (off_stdio(each.detach()) for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        try:
            self._pid = _fork()
        except BaseException:
            os.close(ours)
            os.close(theirs)
            raise
        if self._pid == 0:
            _become_template(ours, theirs, inherited)
        os.close(theirs)
        self._socket = socket.socket(fileno=ours)
        self._socket.setblocking(False)
        self.fd = ours


def _fork() -> int:
    with warnings.catch_warnings():
        # From Python 3.12 on: that other threads exist. Whoever asks for inheritance knows.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become_template(ours: int, theirs: int, inherited: Inherited) -> NoReturn:
    try:
        os.setpgid(0, 0)
        os.close(ours)
        _forget_handlers()
        _keep_streams.extend((sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__))
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for the life of the process
        os.dup2(sys.stdin.fileno(), 0)
        gc.freeze()
        Template(socket.socket(fileno=theirs), (), inherited).run()
    except BaseException:  # noqa: BLE001 - not a frame of the program's may see it
        sys.__excepthook__(*sys.exc_info())
    finally:
        os._exit(0)


_keep_streams: list[object] = []
"""The program's own streams: closed, they would write again what the program has not flushed yet."""


def _forget_handlers() -> None:
    """Signals mean the program; this process and its workers have the defaults, or ignore what is ignored there."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
