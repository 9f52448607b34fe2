"""Which part of an object refused to be pickled, in words."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType

from cloud.errors import SerializationError
from cloud.serialization import pickling
from cloud.serialization.facts import cell_content, global_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_MAX_DEPTH: Final = 6
_MAX_PARTS: Final = 200


def cannot_pickle(what: str, obj: Any, cause: BaseException) -> SerializationError:
    """The error for an object that could not be pickled, naming the part at fault.

    Args:
        what: The object's role, e.g. "argument 1 of cloud.call".
        obj: The object.
        cause: What pickling it raised.
    """
    path, culprit = _find(obj, what, 0)
    notes = "".join(f"; {note}" for note in getattr(cause, "__notes__", ()))
    return SerializationError(
        f"{what} cannot be pickled: {path} is {_describe(culprit)} ({type(cause).__name__}: {cause}{notes})",
        hint="Create such objects inside the job, or pass what is needed to make them.",
    )


def _describe(obj: Any) -> str:
    try:
        text = repr(obj)
    except Exception:  # noqa: BLE001 - a __repr__ of the user's
        text = "<unprintable>"
    return f"{type(obj).__module__}.{type(obj).__qualname__} {text if len(text) <= 80 else text[:77] + '...'}"


def _find(obj: Any, path: str, depth: int) -> tuple[str, Any]:
    if depth < _MAX_DEPTH:
        for name, part in _parts(obj):
            try:
                pickling.dumps(part)
            except Exception:  # noqa: BLE001 - that it raises is what we look for
                return _find(part, f"{path}{name}", depth + 1)
    return path, obj


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, dict):
        items = list(obj.items())[:_MAX_PARTS]
        yield from ((f" -> key {key!r:.60}", key) for key, _ in items)
        yield from ((f"[{key!r:.60}]", value) for key, value in items)
    elif isinstance(obj, list | tuple | set | frozenset):
        yield from ((f"[{index}]", part) for index, part in enumerate(list(obj)[:_MAX_PARTS]))
    elif isinstance(obj, FunctionType):
        names = obj.__code__.co_freevars
        for name, cell in zip(names, obj.__closure__ or (), strict=True):
            content = cell_content(cell)
            if content is not None:
                yield f" -> closure variable {name!r}", content[0]
        for name in global_names(obj.__code__):
            if name in obj.__globals__:
                yield f" -> global {name!r}", obj.__globals__[name]
        yield from ((f" -> default {value!r:.60}", value) for value in obj.__defaults__ or ())
    else:
        attributes = getattr(obj, "__dict__", None)
        if isinstance(attributes, dict):
            yield from ((f".{name}", value) for name, value in list(attributes.items())[:_MAX_PARTS])
