"""How a worker of a server shuts itself in, before it has seen anything of a user's.

It leaves the server's user, environment and folders for those it was given, and takes its limits. Nothing of this can
be undone by a job.
"""

from __future__ import annotations

import os
import signal
import sys

from cloud.engine.worker.limits import Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_UMASK: Final = 0o077


def confine(how: dict[str, Any]) -> None:
    """Shut this process in.

    Args:
        how: ``home``, ``temporary`` and ``code`` (folders; "" for no code), ``environ``, ``limits``, ``cgroup`` (folder
            or ""), ``user`` ((uid, gid) or None).

    Raises:
        OSError: The system refuses something: then nothing may run here.
    """
    parent = os.getppid()
    if how["cgroup"]:
        with open(os.path.join(how["cgroup"], "cgroup.procs"), "w") as file:
            file.write("0")
    os.umask(_UMASK)
    if how["user"] is not None:
        uid, gid = how["user"]
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        for needed in (os.__file__, __file__):
            if not os.access(needed, os.R_OK):
                raise PermissionError(
                    f"the user of jobs (uid {uid}) cannot read {needed}: install Python and this package where "
                    "everybody may read them, or run jobs as the server's own user"
                )
    _seal(parent, demanded=how["user"] is not None)
    os.chdir(how["home"])
    os.environ.clear()
    os.environ.update(how["environ"], HOME=how["home"], TMPDIR=how["temporary"])
    if how["code"]:
        sys.path.insert(0, how["code"])
    # Last: what is imported above may need more than a job gets.
    Limits(*how["limits"]).apply(memory=not how["cgroup"])


def _seal(parent: int, *, demanded: bool) -> None:
    if sys.platform != "linux":
        return
    try:
        import ctypes

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, OSError, AttributeError) as exc:
        if demanded:
            raise OSError(f"a worker cannot give up privileges for good: this Python has no ctypes ({exc})") from exc
        return
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) and demanded:
        raise OSError(ctypes.get_errno(), "a worker cannot give up privileges for good")
    # A change of user clears it.
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # the template was killed meanwhile
