"""What the wait status of a worker says, in words."""

from __future__ import annotations

import os

from cloud.engine.signals import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_OWN_FAULT_SIGNALS: Final = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGABRT,
        signal.SIGTRAP,
        signal.SIGSYS,
        signal.SIGPIPE,
        signal.SIGALRM,
        signal.SIGXCPU,
        signal.SIGXFSZ,
    }
)


def describe_death(status: int, pid: int, *, cut_off: bool = False) -> tuple[str, int | None, bool]:
    """(what happened in words, exit code or minus signal, whether the job itself did it) of a wait status."""
    who = f"The job's worker process (pid {pid})"
    if cut_off:
        return f"{who} was ended: the job closed its connection, a file descriptor.", None, True
    if status <= -1000:
        return f"The job's worker process could not be started: {os.strerror(-1000 - status)}.", None, False
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = _name_of_signal(number)
        own = number in _OWN_FAULT_SIGNALS
        why = (
            "it crashed"
            if own
            else "another process ended it, or the kernel did because memory ran out"
            if number == signal.SIGKILL
            else "another process ended it"
        )
        return f"{who} was killed by {name}: {why}.", -number, own
    code = os.waitstatus_to_exitcode(status)
    return (
        f"{who} exited with code {code} in the middle of the job: os._exit, an exit in C code, or its connection "
        "was closed.",
        code,
        True,
    )


def _name_of_signal(number: int) -> str:
    # Not signal.Signals: see ``engine.signals``; and a program without descriptors could not load it now.
    # Of several names for one number the first is the usual one: SIGABRT, not SIGIOT.
    names = (name for name in sorted(vars(signal)) if name.startswith("SIG") and not name.startswith("SIG_"))
    return next((name for name in names if getattr(signal, name) == number), f"signal {number}")
