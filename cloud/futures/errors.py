"""What futures raise: the task's own exception, or errors that programs written for concurrent.futures catch too.

A task that loses its worker raises WorkerLost, which is a ``BrokenProcessPool`` as well; so are the errors of a failed
initializer and of an executor that was ended. These classes are made when first needed, since
``concurrent.futures.process`` loads all of multiprocessing.
"""

from __future__ import annotations

import sys

from cloud.errors import (
    BackendClosed,
    CloudException,
    InitializerFailed,
    JobFailed,
    JobNotFound,
    SerializationError,
    WorkerLost,
)
from cloud.pool.errors import RemoteTraceback, unsent_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

__all__ = ["lost_error", "task_error"]

_BROKEN: Final[dict[type[CloudException], str]] = {
    BackendClosed: "ExecutorClosed",
    InitializerFailed: "ExecutorInitializerFailed",
    WorkerLost: "ExecutorWorkerLost",
}


def task_error(error: CloudException) -> BaseException:
    """What a future raises for a failed job: the task's own exception, its traceback over there as ``__cause__``.

    The CloudException itself where there is no such exception here: the task was lost or killed, or its exception
    cannot be rebuilt.
    """
    cause = error.__cause__
    if type(error) is not JobFailed or cause is None:
        return _broken(error)
    if isinstance(cause, InitializerFailed):
        return _broken(cause)
    if isinstance(cause, SerializationError):
        cause = unsent_error(cause)  # the result could not be pickled
    if not isinstance(cause, CloudException):
        cause.__cause__ = _traceback_class()(f'\n"""\n{error.parameter}\n"""')
    return cause


def lost_error(error: BackendClosed | JobNotFound, jid: int | None) -> CloudException:
    """What a future raises whose job is not there any more."""
    if isinstance(error, JobNotFound):
        return error
    closed = _broken(BackendClosed("the executor was ended before this task", jid=jid))
    closed.__cause__ = error.__cause__
    return closed


def _broken(error: CloudException) -> CloudException:
    name = _BROKEN.get(type(error))
    if name is None:
        return error
    cls = _class(name)
    made: CloudException = cls.__new__(cls, *error.args)
    vars(made).update(vars(error))
    made.__cause__ = error.__cause__
    return made


def _class(name: str) -> Any:
    made = globals().get(name)
    if made is None:
        from concurrent.futures.process import BrokenProcessPool

        base = next(cls for cls, its_name in _BROKEN.items() if its_name == name)
        made = globals()[name] = type(
            name, (base, BrokenProcessPool), {"__module__": __name__, "__doc__": base.__doc__}
        )
    return made


def _traceback_class() -> Any:
    # Only a program that has loaded concurrent.futures.process can look for its class.
    theirs = sys.modules.get("concurrent.futures.process")
    return RemoteTraceback if theirs is None else theirs._RemoteTraceback


def __getattr__(name: str) -> Any:
    # Unpickling looks the classes up here.
    if name in _BROKEN.values():
        return _class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
