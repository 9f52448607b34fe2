"""Exceptions <-> bytes, with their causes, contexts, notes and groups.

Plain pickling of an exception drops its chain. Here each exception of the chain is pickled by itself and tried out
where it was raised, so that one which cannot be rebuilt costs only its own place in the chain.
"""

from __future__ import annotations

from types import TracebackType

from cloud.errors import JobFailed
from cloud.serialization import pickling
from cloud.serialization.namespace import Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from traceback import TracebackException
    from typing import Any, Final

_MAX_DEPTH: Final = 50


def dumps_exception(exc: BaseException, namespace: Namespace) -> bytes | None:
    """Bytes of the exception and its chain, or None if the outermost cannot be rebuilt elsewhere."""
    node = _to_node(exc, namespace, set(), 0)
    return None if node is None or node[0] is None else pickling.dumps_plain(node)


def loads_exception(content: bytes, namespace: Namespace | None = None) -> BaseException | None:
    """The exception of ``dumps_exception``, or None if it cannot be rebuilt in this process."""
    try:
        return _from_node(pickling.loads(content), namespace)
    except Exception:  # noqa: BLE001 - rebuilding runs the user's code
        return None


def _to_node(exc: BaseException | None, namespace: Namespace, seen: set[int], depth: int) -> tuple[Any, ...] | None:
    if exc is None or id(exc) in seen or depth > _MAX_DEPTH:
        return None
    seen.add(id(exc))
    content: bytes | None
    try:
        content = pickling.dumps_result(exc, namespace)
        if type(pickling.loads(content, namespace)) is not type(exc):
            content = None
    except Exception:  # noqa: BLE001 - so does trying it out
        content = None
    members = exc.exceptions if isinstance(exc, BaseExceptionGroup) else ()
    return (
        content,
        _to_node(exc.__cause__, namespace, seen, depth + 1),
        _to_node(exc.__context__, namespace, seen, depth + 1),
        exc.__suppress_context__,
        [_to_node(member, namespace, seen, depth + 1) for member in members],
    )


def _from_node(node: tuple[Any, ...], namespace: Namespace | None) -> BaseException | None:
    content = node[0]
    exc = None if content is None else pickling.loads(content, namespace)
    if isinstance(exc, BaseException):
        _restore_chain(exc, node, namespace)
        return exc
    return None


def _restore_chain(exc: BaseException, node: tuple[Any, ...], namespace: Namespace | None) -> None:
    _, cause, context, suppress, members = node
    exc.__cause__ = None if cause is None else _from_node(cause, namespace)
    exc.__context__ = None if context is None else _from_node(context, namespace)
    exc.__suppress_context__ = suppress
    if isinstance(exc, BaseExceptionGroup):
        for member, member_node in zip(exc.exceptions, members, strict=False):
            if member_node is not None:
                _restore_chain(member, member_node, namespace)


def format_exception(exc: BaseException, start: TracebackType | None) -> str:
    """The traceback as text, without the frames above the user's function.

    Args:
        exc: What the job raised.
        start: Where the user's own frames begin; None shows the exception alone.
    """
    import traceback

    try:
        shown = traceback.TracebackException(type(exc), exc, start, compact=True)
        _tell_once(shown, exc)
        lines = list(shown.format())
    except Exception as failure:  # noqa: BLE001 - see below
        # A raising __str__ or __notes__ of the user's exception must not hide that the job failed.
        lines = [f"{type(exc).__name__} (its text cannot be shown: {type(failure).__name__})\n"]
    return "".join(lines).rstrip("\n")


def _tell_once(shown: TracebackException, exc: BaseException) -> None:
    # The text of a failed job's exception holds its causes already. Told again by each of jobs that wait for one
    # another, the text would double with each.
    if isinstance(exc, JobFailed):
        shown.__cause__ = shown.__context__ = None
    members = exc.exceptions if isinstance(exc, BaseExceptionGroup) else ()
    for part, its_exc in (
        (shown.__cause__, exc.__cause__),
        (shown.__context__, exc.__context__),
        *zip(shown.exceptions or (), members, strict=False),
    ):
        if part is not None and its_exc is not None:
            _tell_once(part, its_exc)
