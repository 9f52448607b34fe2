"""The template of a server's workers: another interpreter perhaps, and nothing of the server's own in it."""

from __future__ import annotations

import fcntl
import os

from cloud.engine.descriptors import off_stdio
from cloud.engine.executor.setup import WorkerSetup
from cloud.engine.executor.template import CONTROL_FD, KEPT_FD, TemplateProcess, package_root
from cloud.serialization.memory import memory_file

_CODE = (
    "import os, sys; os.chdir({folder!r}); "
    "found = '%d.%d' % sys.version_info[:2]; found == {version!r} or sys.exit('it is Python ' + found); "
    "sys.path.insert(0, {root!r}); import cloud; del sys.path[0]; "
    "import cloudpickle; from cloud.engine.worker.template import main; main({fd}, {preload!r}, {kept})"
)
_MAX_OUTPUT_BYTES = 64_000


class ServerTemplate(TemplateProcess):
    """A template of a server, whose workers get nothing of the server's own.

    Args:
        setup: What its workers are.
        version: Of its interpreter ('3.12').
        preload: Modules that it imports when a processor is to spare, for workers forked from then on.

    Raises:
        CloudException: There is no interpreter of that version.
        OSError: It cannot be started.
    """

    def __init__(self, setup: WorkerSetup, version: str, preload: tuple[str, ...] = ()) -> None:
        self._version = version
        self._executable = setup.executable(version)
        code = _CODE.format(
            folder=setup.scratch, version=version, preload=preload, root=package_root(), fd=CONTROL_FD, kept=KEPT_FD
        )
        self._output = off_stdio(memory_file(), KEPT_FD + 1)
        # Without a file to keep it keeps one that nobody waits for.
        kept = fcntl.fcntl(setup.lock_fd if setup.lock_fd >= 0 else self._output, fcntl.F_DUPFD_CLOEXEC, KEPT_FD + 1)
        try:
            files = {1: self._output, 2: self._output, KEPT_FD: kept}
            self._start([self._executable, "-P", "-s", "-c", code], dict(setup.environ), files, own_session=True)
        except BaseException:
            self._close_output()
            raise
        finally:
            os.close(kept)

    def close(self) -> int:
        status = super().close()
        self._why = os.pread(self._output, _MAX_OUTPUT_BYTES, 0).decode(errors="replace").strip()
        self._close_output()
        return status

    def end(self) -> None:
        super().end()
        self._close_output()

    def abandon(self) -> None:
        super().abandon()
        self._close_output()

    def _close_output(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1

    _why = ""

    @property
    def failure(self) -> str:
        """Why it ended, for those whose jobs it should have run; "" as long as it has not, or if it did not tell."""
        if not self._why:
            return ""
        last = self._why.rpartition("\n")[2]
        return (
            f"The interpreter for Python {self._version} on this server, {self._executable}, cannot run jobs: {last}. "
            f"Its operator can install what is missing with: {self._executable} -m pip install cloudpickle"
        )
