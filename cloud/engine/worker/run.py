"""Runs one job: from pickled function and arguments to a packed outcome. The same in a worker and in the simulator."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace, TracebackType

from cloud.engine.worker import surroundings
from cloud.errors import KilledException
from cloud.jobs import (
    DONE,
    ERROR,
    ERROR_CHAIN,
    ERROR_TEXT,
    KILLED,
    PROFILE,
    STDERR,
    STDOUT,
    VALUE,
    pack_outcome,
    pack_value,
)
from cloud.serialization import pickling
from cloud.serialization.flat import ATOMS
from cloud.serialization.namespace import Namespace
from cloud.serialization.shared import SHARE_BYTES, SharedBytes, attach, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.serialization.shared import FindSegment

try:
    import resource
except ImportError:  # Windows, where the simulator runs jobs too
    usage: Callable[[], Any] = partial(SimpleNamespace, ru_utime=0.0, ru_stime=0.0, ru_maxrss=0)
else:
    usage = partial(resource.getrusage, resource.RUSAGE_SELF)

_OWN_FOLDER: Final = os.path.join(os.path.dirname(__file__), "")
# Linux counts kilobytes, macOS bytes.
_RSS_UNIT: Final = 1024 if sys.platform == "darwin" else 1


def max_rss_kb(used: Any) -> int:
    """Peak resident memory in kB, of what ``usage`` gave."""
    return int(used.ru_maxrss // _RSS_UNIT)


class Call:
    """One job's function and arguments, still to be rebuilt where they run.

    Attributes:
        load: Rebuilds them: returns (function, args, kwargs).
        namespace: The program's ``__main__`` here.
        in_place: Gives the segment that buffers of the result lie in already; None without.
    """

    __slots__ = ("fast_pickle", "in_place", "load", "namespace", "profile")

    def __init__(
        self,
        load: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]],
        namespace: Namespace,
        *,
        profile: bool = False,
        fast_pickle: bool = False,
        in_place: FindSegment | None = None,
    ) -> None:
        self.load = load
        self.namespace = namespace
        self.profile = profile
        self.fast_pickle = fast_pickle
        self.in_place = in_place


def run_call(call: Call, pid: int, output: Callable[[], tuple[bytes, bytes]], max_result_bytes: int = 0) -> bytes:
    """Run one job to its end, whatever it does, and pack how it ended.

    Args:
        call: What to run.
        pid: Process id to report.
        output: Gives what the job printed, once it has ended.
        max_result_bytes: Larger results are errors; 0 means no limit.

    Returns:
        A packed outcome: DONE with a value, ERROR, or KILLED.
    """
    before = usage()
    started = time.time()
    clock = time.perf_counter
    began = clock()
    value: Any = None
    error: BaseException | None = None
    sections: list[tuple[int, bytes]] = []
    try:
        function, args, kwargs = call.load()
        if call.profile:
            value = _profiled(function, args, kwargs, sections)
        else:
            value = function(*args, **kwargs)
    except BaseException as exc:  # noqa: BLE001 - whatever the user's code raises is this job's outcome
        error = exc
    runtime_s = clock() - began
    after = usage()
    used = (
        pid,
        started,
        runtime_s,
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        max_rss_kb(after),
    )
    return pack_ended((value, error), call, used, output, max_result_bytes, sections)


def pack_ended(
    ended: tuple[Any, BaseException | None],
    call: Call,
    used: tuple[int, float, float, float, float, int],
    output: Callable[[], tuple[bytes, bytes]],
    max_result_bytes: int = 0,
    sections: list[tuple[int, bytes]] | None = None,
    content: bytes | BaseException | None = None,
) -> bytes:
    """Pack how a job ended.

    Args:
        ended: Its value, and what it raised or None.
        call: What was run.
        used: Process id, start (epoch seconds), runtime, user and system CPU in seconds, peak memory in kB.
        output: Gives what it printed.
        max_result_bytes: As for ``run_call``.
        sections: Further sections of the outcome.
        content: The pickle of its value, or what pickling it raised, if that was tried already.
    """
    value, error = ended
    status = DONE
    sections = [] if sections is None else sections
    if error is None and content is None:
        try:
            content = _pickle_result(value, call, max_result_bytes)
        except BaseException as exc:  # noqa: BLE001 - a __reduce__ of the user's may raise anything
            error = _unpicklable_result(value, exc)
    elif isinstance(content, BaseException):
        error, content = _unpicklable_result(value, content), None
    if content is None:
        content = b""
    if error is not None:
        status = KILLED if isinstance(error, KilledException) else ERROR
        sections += _error_sections(error, call.namespace)
        # The traceback refers to every frame of the job, and those to all its data.
        error.__traceback__ = None
    out, err = output()
    if status == DONE:
        if not (out or err or sections):
            return _with_segment(pack_value(VALUE, content, *used), content)
        sections.append((VALUE, content))
    if out:
        sections.append((STDOUT, out))
    if err:
        sections.append((STDERR, err))
    pid, started, runtime_s, user_s, system_s, rss_kb = used
    packed = pack_outcome(
        status,
        sections,
        pid=pid,
        started=started,
        runtime_s=runtime_s,
        cpu_user_s=user_s,
        cpu_system_s=system_s,
        max_rss_kb=rss_kb,
    )
    return _with_segment(packed, content)


def _with_segment(packed: bytes, content: bytes) -> bytes:
    return attach(packed, content.segment) if isinstance(content, SharedBytes) else packed


def _pickle_result(value: Any, call: Call, max_result_bytes: int) -> bytes:
    if call.fast_pickle or (type(value) in ATOMS and sys.getsizeof(value) < SHARE_BYTES):
        content = pickling.dumps_plain(value)
    else:
        content = pickling.dumps_result(value, call.namespace, share=True, in_place=call.in_place)
    if max_result_bytes and size_of(content) > max_result_bytes:
        from cloud.errors import PayloadTooLarge

        raise PayloadTooLarge(
            f"Excessive data ({size_of(content)} bytes) transmitted: the result is larger than max_transmit_data "
            f"({max_result_bytes} bytes)",
            hint="Return less, store it with cloud.files, or raise cloud.config.max_transmit_data.",
        )
    return content


def _unpicklable_result(value: Any, cause: BaseException) -> BaseException:
    from cloud.errors import PayloadTooLarge
    from cloud.serialization.explain import cannot_pickle

    if isinstance(cause, PayloadTooLarge | KilledException):
        return cause
    cause.__traceback__ = _user_frames(cause.__traceback__)  # the same, whoever pickled it
    try:
        error = cannot_pickle("the job's result", value, cause)
    except Exception as exc:  # noqa: BLE001 - a __repr__ of the user's may raise anything
        return exc
    error.__cause__ = cause if isinstance(cause, Exception) else None
    return error


def _error_sections(error: BaseException, namespace: Namespace) -> list[tuple[int, bytes]]:
    from cloud.engine.worker.limits import explain

    explain(error)  # first: there may be no room left to import what follows
    if isinstance(error, ModuleNotFoundError) and surroundings.are_own():
        from cloud.serialization.explain import explain_missing_module

        if text := explain_missing_module(error):
            error.add_note(text)
    from cloud.serialization.exceptions import dumps_exception, format_exception

    text = format_exception(error, _user_frames(error.__traceback__))
    sections = [(ERROR_TEXT, text.encode("utf-8", "backslashreplace"))]
    try:
        chain = dumps_exception(error, namespace)
    except BaseException:  # noqa: BLE001 - the text above already tells what happened
        chain = None
    if chain is not None:
        sections.append((ERROR_CHAIN, chain))
    return sections


def _user_frames(trace: TracebackType | None) -> TracebackType | None:
    # Functions are called here, and by the worker's loop for items of a map.
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
        trace = trace.tb_next
    return trace


def _profiled(function: Any, args: Any, kwargs: Any, sections: list[tuple[int, bytes]]) -> Any:
    import cProfile
    import marshal

    profile = cProfile.Profile()
    # Not runcall, whose frame would head the job's traceback.
    profile.enable()
    try:
        return function(*args, **kwargs)
    finally:
        profile.create_stats()
        sections.append((PROFILE, marshal.dumps(profile.stats)))
