"""Why bytes could not be made or used, in words: which part refused to be pickled, which module is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
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


def explain_missing_module(
    exc: ImportError, client_packages: Mapping[str, str] | None = None, not_sent: Mapping[str, str] | None = None
) -> str:
    """Say which module a server lacks, which distribution has it, and what to do; "" if no module is missing.

    Args:
        exc: What loading the job's function or arguments raised there.
        client_packages: What the client has installed, module -> 'distribution==version'; None when not known.
        not_sent: Modules of the user that stayed behind, dotted name -> reason; None when not known.
    """
    name = exc.name
    if not isinstance(exc, ModuleNotFoundError) or not name:
        return ""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if type(exc).__name__ == "PackageNotFoundError":
        return (
            f"The server's {python} has no distribution {name!r}, whose metadata the job asked for. Install it there."
        )
    lacks = f"The server's {python} has no module {name!r}"
    top = name.partition(".")[0]
    reason = next((not_sent[each] for each in (name, top) if each in not_sent), None) if not_sent else None
    if reason is not None:
        return f"{lacks}. It is yours, and it was not sent: {reason}. Let it travel, or install it on the server."
    requirement = client_packages.get(top) if client_packages else None
    if requirement is not None:
        return f"{lacks}; here it comes from {requirement}. Install that on the server: pip install {requirement!r}"
    if top in sys.stdlib_module_names:
        return f"{lacks}, which is part of the standard library elsewhere. Use it in a way that this version has."
    return (
        f"{lacks}. If it comes from an index, install its distribution on the server: pip install <distribution of "
        f"{top}>. If it is yours, it was not sent: automatic_dependency_transfer is off, dependency_whitelist does not "
        "name it, or it is a compiled extension module, which has to be installed on the server too."
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
        for name in global_names(obj.__code__, obj.__globals__):
            if name in obj.__globals__:
                yield f" -> global {name!r}", obj.__globals__[name]
        yield from ((f" -> default {value!r:.60}", value) for value in obj.__defaults__ or ())
    else:
        attributes = getattr(obj, "__dict__", None)
        if isinstance(attributes, dict):
            yield from ((f".{name}", value) for name, value in list(attributes.items())[:_MAX_PARTS])
