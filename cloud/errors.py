"""Every exception this package raises on purpose, and nothing else.

::

    CloudException                       root; .jid .status .parameter .hint
    ├── CloudTimeoutError (TimeoutError) a wait ran out of time; the jobs go on
    ├── JobFailed                        status 'error'; __cause__ is the job's own exception
    │   ├── WorkerLost                   its worker process ended abruptly; .exitcode
    │   └── InitializerFailed            its worker's initializer raised; __cause__ is what
    ├── JobKilled                        status 'killed'
    ├── JobStalled                       status 'stalled'; a dependency failed
    ├── JobNotFound (LookupError)        unknown or deleted jid
    ├── SerializationError (PicklingError)  cannot become bytes, or come back from them
    │   └── PayloadTooLarge              .size_bytes .limit_bytes
    ├── ConfigurationError (ValueError)  settings are invalid; .problems lists all of them
    ├── BackendError                     the machinery failed, no job is to blame
    │   ├── BackendClosed
    │   └── UnsupportedOperation         this backend cannot do that
    ├── StoredFileError                  about one stored file; .name
    │   ├── StoredFileNotFound (LookupError)
    │   └── StoredFileCorrupt            its checksum does not match
    ├── CronError                        about one cron entry
    │   ├── CronNotFound (LookupError)
    │   └── InvalidSchedule (ValueError)
    └── AccountError                     credentials refused, unknown key, key limit reached

    KilledException (BaseException)      raised *inside* a job that is being killed
"""

from __future__ import annotations

import sys
from _pickle import PicklingError
from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "AccountError",
    "BackendClosed",
    "BackendError",
    "CloudException",
    "CloudTimeoutError",
    "ConfigurationError",
    "CronError",
    "CronNotFound",
    "InitializerFailed",
    "InvalidSchedule",
    "JobFailed",
    "JobKilled",
    "JobNotFound",
    "JobStalled",
    "KilledException",
    "PayloadTooLarge",
    "SerializationError",
    "StoredFileCorrupt",
    "StoredFileError",
    "StoredFileNotFound",
    "UnsupportedOperation",
    "WorkerLost",
]


def _rebuild(cls: type[CloudException], args: tuple[Any, ...], state: dict[str, Any]) -> CloudException:
    # Subclasses differ in their constructors; pickling by state survives that.
    exc = cls.__new__(cls, *args)
    exc.args = args
    exc.__dict__.update(state)
    return exc


class CloudException(Exception):
    """Root of all errors of this package.

    Args:
        value: What happened; for a failed job the remote traceback as text.
        jid: The job it is about, or a list of jids for a wait that timed out.
        status: The job's final status ('error', 'killed', 'stalled'), or a number for a server error.
        retry: True when the same request may succeed later.
        hint: What the user can do about it; shown after ``TIP:``.

    Attributes:
        jid, status, retry, hint: As given.
        parameter: ``value`` as given (PiCloud's name for it).

    Source: PiCloud client 2.1.1-2.8.5, ``cloud.CloudException``.
    """

    def __init__(
        self,
        value: Any = "",
        jid: int | Sequence[int] | None = None,
        status: str | int | None = None,
        retry: bool = False,
        hint: str | None = None,
    ) -> None:
        super().__init__(value)
        self.parameter = value
        self.jid = jid
        self.status = status
        self.retry = retry
        self.hint = hint
        if jid is not None:
            _log_job_error(self)

    def __str__(self) -> str:
        if self.jid is not None:
            text = f"Job {self.jid}: {self.parameter}"
        elif self.status is not None:
            text = f"Status {self.status}: {self.parameter}"
        else:
            text = str(self.parameter)
        return f"{text}\nTIP: {self.hint}" if self.hint else text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.parameter!r}, jid={self.jid!r}, status={self.status!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _log_job_error(exc: CloudException) -> None:
    # A program that never imported logging has configured none: nobody would see the line,
    # and importing it here would cost every program 20 ms.
    logging = sys.modules.get("logging")
    if logging is not None:
        logging.getLogger("Cloud").info("%s", exc)


class CloudTimeoutError(CloudException, TimeoutError):
    """A wait ran out of time. The jobs themselves are not affected; ``jid`` lists the unfinished ones."""

    def __init__(
        self,
        value: Any = "Timed out",
        jid: int | Sequence[int] | None = None,
        status: str | int | None = None,
        retry: bool = True,
        hint: str | None = None,
    ) -> None:
        super().__init__(value, jid, status, retry, hint)

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} {self.jid}" if self.jid is not None else text


class JobFailed(CloudException):
    """The job's function raised. ``__cause__`` is its exception where it could be rebuilt."""


class WorkerLost(JobFailed):
    """The job's worker process ended abruptly: it crashed, exited or was killed from outside.

    Attributes:
        exitcode: Exit code of the process, or minus the signal number; None when unknown.
    """

    exitcode: int | None = None


class InitializerFailed(JobFailed):
    """The initializer of the job's worker raised ``__cause__``; no job runs there."""


class JobKilled(CloudException):
    """The job was killed by ``cloud.kill`` or by its ``_max_runtime``."""


class JobStalled(CloudException):
    """The job could not start because a job it depends on failed."""


class JobNotFound(CloudException, LookupError):
    """The jid is unknown here: never issued, or deleted."""


class SerializationError(CloudException, PicklingError):
    """An object cannot be turned into bytes, or bytes not back into an object."""


class PayloadTooLarge(SerializationError):
    """A function, argument or result is larger than ``max_transmit_data`` allows.

    Attributes:
        size_bytes: The size met.
        limit_bytes: The setting's value.
    """

    size_bytes: int = 0
    limit_bytes: int = 0


class ConfigurationError(CloudException, ValueError):
    """Settings are invalid; nothing was changed.

    Attributes:
        problems: One sentence per invalid setting, each naming the value and the remedy.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class BackendError(CloudException):
    """The machinery failed; no job is to blame."""


class BackendClosed(BackendError):
    """The backend was closed before or during the operation."""


class UnsupportedOperation(BackendError):
    """The current backend, or this platform, cannot do what was asked."""


class StoredFileError(CloudException):
    """About one stored file.

    Attributes:
        name: The file's name in the store.
    """

    def __init__(self, value: str, name: str) -> None:
        super().__init__(value)
        self.name = name


class StoredFileNotFound(StoredFileError, LookupError):
    """No stored file has this name."""


class StoredFileCorrupt(StoredFileError):
    """The stored bytes do not match their checksum; nothing of them was trusted."""


class CronError(CloudException):
    """About one cron entry."""


class CronNotFound(CronError, LookupError):
    """No cron entry has this label."""


class InvalidSchedule(CronError, ValueError):
    """The schedule is not five valid cron fields."""


class AccountError(CloudException):
    """Credentials are missing or refused, a key is unknown, or a limit is reached."""


class KilledException(BaseException):
    """Raised inside a job that is being killed, so that its ``finally`` blocks run.

    Not an ``Exception``: a job's ``except Exception`` must not swallow it.
    """
