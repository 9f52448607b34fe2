"""What the workers of a server are: interpreters, folders, environment, limits, user."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from cloud.engine.worker.limits import Limits
from cloud.environment import Environment
from cloud.errors import CloudException

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

OWN_VERSION: Final = f"{sys.version_info[0]}.{sys.version_info[1]}"
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def default_environ() -> dict[str, str]:
    """A ``PATH``, and the locale of this process: nothing that could be a secret."""
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "LC_ALL", "TZ")}
    return {"PATH": _PATH, "LANG": "C.UTF-8", **kept}


@dataclass(frozen=True)
class WorkerSetup:
    """What the workers of a server are. Paths are absolute.

    Attributes:
        scratch: Folder in which each worker has one of its own (its current directory and ``HOME``, with ``TMPDIR`` in
            it), which is removed with it. What an earlier server left there is the caller's to remove.
        interpreters: Executables by Python version ('3.12'). The server's own version needs none.
        code_folder: The folder named like an environment's ``code`` in here heads the import path of its workers.
        environ: All environment variables that template and workers have, besides ``HOME`` and ``TMPDIR``.
        limits: Of each worker.
        user: (uid, gid) that workers run as; the server must be root. Folders above ``scratch``, and the code, must be
            open to them. None: as the server.
        cgroups: Folder of a cgroup v2 in which each worker gets one of its own; "" without. See ``cgroups.delegated``.
        lock_fd: A descriptor that templates keep open until no worker is left; -1 without. Under a lock by ``flock``
            that is told by the lock being free: whoever holds it closes the file, and does not unlock it.
    """

    scratch: str
    interpreters: Mapping[str, str] = field(default_factory=dict)
    code_folder: str = ""
    environ: Mapping[str, str] = field(default_factory=default_environ)
    limits: Limits = field(default_factory=Limits)
    user: tuple[int, int] | None = None
    cgroups: str = ""
    lock_fd: int = -1

    def __post_init__(self) -> None:
        self.limits.check()
        if self.user is not None and os.geteuid() != 0:
            raise PermissionError(f"workers can run as user {self.user[0]} only if the server runs as root")

    def executable(self, version: str) -> str:
        """The interpreter of a Python version.

        Raises:
            CloudException: There is none.
        """
        found = self.interpreters.get(version)
        if found is None and version == OWN_VERSION:
            found = sys.executable
        if not found:
            known = ", ".join(sorted({*self.interpreters, OWN_VERSION}))
            raise CloudException(
                f"This server has no Python {version} to run jobs with; it has {known}. Use one of these, or have "
                "the server's operator add an interpreter."
            )
        return found

    def code_path(self, environment: Environment | None) -> str:
        """The folder that heads the import path of an environment's workers; "" for none."""
        return os.path.join(self.code_folder, environment.code) if environment and environment.code else ""
