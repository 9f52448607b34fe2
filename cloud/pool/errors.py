"""What a pool raises: the task's own exception, or errors that programs written for multiprocessing catch too.

Classes that are also multiprocessing's are made when first needed: a pool by itself does not load multiprocessing.
"""

from __future__ import annotations

import sys

from cloud.errors import CloudException, CloudTimeoutError, JobFailed, SerializationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["RemoteTraceback", "original_error", "timeout_error", "unsent_error"]


class RemoteTraceback(Exception):
    """The traceback in the worker process, as text: ``__cause__`` of a task's exception.

    Attributes:
        tb: The text.
    """

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return self.tb


def timeout_error(jids: Any) -> CloudTimeoutError:
    """An error that is a CloudTimeoutError and a ``multiprocessing.TimeoutError``."""
    error: CloudTimeoutError = _timeout_class()("the task has not ended in time", jid=jids)
    return error


def original_error(error: CloudException) -> BaseException:
    """What a pool raises for a failed job: the task's own exception, its traceback over there as ``__cause__``.

    The CloudException itself where there is no such exception here: the task was lost or killed, or its exception
    cannot be rebuilt. Also for those that mean the end of a process: raised here, SystemExit would end this one.
    """
    cause = error.__cause__
    if type(error) is not JobFailed or not isinstance(cause, Exception):
        return error
    if isinstance(cause, SerializationError):
        return _unpicklable_result(cause)
    if not isinstance(cause, CloudException):
        cause.__cause__ = _traceback_class()(f'\n"""\n{error.parameter}\n"""')
    return cause


def unsent_error(error: Exception) -> Exception:
    """What a pool raises for a task that cannot be pickled: what pickling raised, with an explanation as its note."""
    cause = error.__cause__
    if isinstance(error, SerializationError) and isinstance(cause, Exception):
        cause.add_note(str(error))
        return cause
    return error


def _timeout_class() -> Any:
    made = globals().get("PoolTimeoutError")
    if made is None:
        from multiprocessing import TimeoutError as ProcessTimeoutError

        made = type("PoolTimeoutError", (CloudTimeoutError, ProcessTimeoutError), {"__module__": __name__})
        globals()["PoolTimeoutError"] = made
    return made


def _traceback_class() -> Any:
    # Only a program that has loaded multiprocessing.pool can look for its class.
    theirs = sys.modules.get("multiprocessing.pool")
    return RemoteTraceback if theirs is None else theirs.RemoteTraceback


def _unpicklable_result(error: SerializationError) -> BaseException:
    theirs = sys.modules.get("multiprocessing.pool")
    if theirs is None:
        return error
    cls = _encoding_class(theirs)
    made: BaseException = cls.__new__(cls, *error.args)
    vars(made).update(vars(error), exc=repr(error.__cause__), value=str(error.parameter))
    made.__cause__ = error.__cause__
    return made


def _encoding_class(theirs: Any) -> Any:
    made = globals().get("PoolEncodingError")
    if made is None:
        bases = (SerializationError, theirs.MaybeEncodingError)
        attributes = {"__module__": __name__, "__str__": CloudException.__str__, "__repr__": CloudException.__repr__}
        made = globals()["PoolEncodingError"] = type("PoolEncodingError", bases, attributes)
    return made


def __getattr__(name: str) -> Any:
    # Unpickling looks the classes up here.
    if name == "PoolTimeoutError":
        return _timeout_class()
    if name == "PoolEncodingError":
        import multiprocessing.pool as theirs

        return _encoding_class(theirs)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
