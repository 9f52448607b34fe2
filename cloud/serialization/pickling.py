"""Values and by-value functions <-> bytes, and the shared globals of a program's ``__main__``.

What can be imported travels by reference. What lives in ``__main__`` travels as a *name* plus a table of the
definitions behind the names, so that in a worker all functions of one program share one set of globals:

::

    payload = pickle                                  nothing of __main__ in it
            | b"M" + pickle((pickle, [(name, digest, pickle, …), …]))
                       │         └ applied to the worker's namespace first, each only if its digest is news there
                       └ refers to names, and builds functions over that namespace
            | b"V" + …                                a variant of a function, see ``variants``

Everything else that plain pickle refuses (classes made at run time, functions over other globals, …) is
cloudpickle's work; it is imported when first needed, since that takes 30 ms.
"""

from __future__ import annotations

import _pickle as pickle  # its half in Python adds little, and 3 ms to the time to the first result, twice
import io
import marshal
from _thread import _local
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType

from cloud.errors import SerializationError
from cloud.serialization import definitions, unchanged
from cloud.serialization.facts import cell_content, code_bytes, global_names, globals_of, importable, imports_as
from cloud.serialization.flat import ATOMS, PICKLE, PROTOCOL, REFERENCE, Written, as_written, pickle_flat
from cloud.serialization.kept import definitions_of
from cloud.serialization.large import LargeGlobal
from cloud.serialization.namespace import Namespace, Row, program_main
from cloud.serialization.shared import SHARE_BYTES, Sent, SharedBytes, is_shared, pack_shared, unpack_shared
from cloud.serialization.variants import unpack_variant, varied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from cloud.serialization.shared import FindSegment

_BUNDLE: Final = b"M"
_MAX_BASES: Final = 64
_MAX_BASE_BYTES: Final = 1 << 16

_OWN_NAMES: Final = frozenset(
    {"__name__", "__builtins__", "__spec__", "__loader__", "__package__", "__cached__", "__annotations__", "__doc__"}
)
_PLAIN_ERRORS: Final = (pickle.PicklingError, TypeError, AttributeError, NotImplementedError, ValueError)


class _Active(_local):
    # What _main_attribute and friends resolve against while a payload is loaded in this thread.
    namespace: Namespace | None = None
    fresh: tuple[type, ...] = ()


_active = _Active()


# --- what payloads refer to; renaming these breaks stored payloads ----------------------------------------------------


def _main_variables() -> dict[str, Any]:
    return program_main() if _active.namespace is None else _active.namespace.variables


def _main_attribute(path: str) -> Any:
    first, *rest = path.split(".")
    try:
        value = program_main()[first] if _active.namespace is None else _active.namespace.get(first)
    except KeyError:
        raise SerializationError(f"__main__ has no {first!r} here") from None
    for name in rest:
        value = getattr(value, name)
    return value


def _make_function(code: bytes, name: str, n_cells: int) -> FunctionType:
    closure = tuple(CellType() for _ in range(n_cells))
    function = FunctionType(marshal.loads(code), _main_variables(), name, None, closure)
    if _active.namespace is not None:
        _active.namespace.show(name, function)
    return function


def _fill_function(function: FunctionType, state: tuple[Any, ...]) -> None:
    (
        function.__qualname__,
        function.__module__,
        function.__doc__,
        function.__defaults__,
        function.__kwdefaults__,
        annotations,
        attributes,
        cells,
    ) = state
    if annotations:
        function.__annotations__ = annotations
    function.__dict__.update(attributes)
    for cell, content in zip(function.__closure__ or (), cells, strict=True):
        if content is not None:
            cell.cell_contents = content[0]


_import_module, _make_cached = definitions.import_module, definitions.make_cached  # payloads may have these names


def _make_class(maker: str, arguments: tuple[Any, ...]) -> type:
    """A class made at run time, or the one already made from the same definition in this namespace."""
    from cloudpickle import cloudpickle

    *head, tracker, extra = arguments
    # Each namespace has its own copy of a program's class, even when all live in one process.
    key = _active.namespace.key if _active.namespace is not None else ""
    original = tracker.rsplit("|", 1)[-1]
    tracker = f"{key}|{original}" if key else original
    known = tracker in cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID
    cls: type = getattr(cloudpickle, maker)(*head, tracker, extra)
    if _active.namespace is not None:
        _active.namespace.show(cls.__name__, cls)
    if not known:
        _active.fresh += (cls,)
    return cls


def _fill_class(cls: type, state: Any) -> None:
    from cloudpickle import cloudpickle

    # A result brings the program's own class back: its definition here is the original, and stays.
    if _active.namespace is None and cls not in _active.fresh:
        return
    if cls not in _active.fresh and _active.namespace is not None and _active.namespace.is_taking:
        definitions.drop_attributes(cls, state[0])
    cloudpickle._class_setstate(cls, state)


def _fill_enum(cls: type, state: tuple[Any, dict[str, dict[str, Any]]]) -> None:
    _fill_class(cls, state[0])
    if _active.namespace is not None or cls in _active.fresh:
        definitions.fill_members(cls, state[1])


# --- to bytes ---------------------------------------------------------------------------------------------------------


class _NeedsCloudpickle(Exception):
    """Plain pickle cannot, or would get it wrong."""


class _Main:
    """What a pickler knows of ``__main__``: which names it has met, and how each kind of object travels."""

    # The attributes of the pickler this is mixed into.
    names: dict[str, None]
    variables: dict[str, Any]
    known: dict[str, bytes] | None
    root: Any
    uses_main: bool

    def refer(self, path: str) -> Any:
        """How a global of ``__main__`` is asked for, or what it has inside."""
        if self.known is None:
            self.names[path.partition(".")[0]] = None
        self.uses_main = True
        return _main_attribute, (path,)

    def main_path(self, obj: Any) -> str | None:
        """Dotted name under which ``__main__`` holds exactly this object, if it does and the reader will know it."""
        path = getattr(obj, "__qualname__", None)
        if not isinstance(path, str) or "<" in path or obj is self.root:
            return None
        first = path.partition(".")[0]
        if self.known is not None and first not in self.known:
            return None
        found: Any = self.variables.get(first)
        for name in path.split(".")[1:]:
            found = getattr(found, name, None)
        if found is not obj or (found is not self.root and self.variables.get(first) is self.root):
            return None
        return path

    def is_global(self, name: str, obj: Any) -> bool:
        """Whether ``__main__`` holds this object under that name, and the reader will know it."""
        return self.variables.get(name) is obj and obj is not self.root and (self.known is None or name in self.known)

    def reduce(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is FunctionType:
            return self.reduce_function(obj)
        if kind is type or issubclass(kind, type):
            return self.reduce_class(obj)
        return self.reduce_other(obj)

    def reduce_function(self, function: FunctionType) -> Any:
        if function.__globals__ is not self.variables:
            if function is _main_attribute or imports_as(function, function.__module__, function.__qualname__):
                return NotImplemented
            if (made := definitions.reduce_dispatching(function)) is not None:
                return made if (path := self.main_path(function)) is None else self.refer(path)
            raise _NeedsCloudpickle
        path = self.main_path(function)
        if path is not None:
            return self.refer(path)
        self.uses_main = True
        code = function.__code__
        for name in global_names(code, self.variables):
            if name in self.variables and name not in _OWN_NAMES:
                self.refer(name)
        cells = [cell_content(cell) for cell in function.__closure__ or ()]
        state = (
            function.__qualname__,
            function.__module__,
            function.__doc__,
            function.__defaults__,
            function.__kwdefaults__,
            function.__annotations__,
            function.__dict__,
            cells,
        )
        return _make_function, (code_bytes(code), function.__name__, len(cells)), state, None, None, _fill_function

    def reduce_class(self, cls: type) -> Any:
        if cls.__module__ == "__main__":
            path = self.main_path(cls)
            if path is not None:
                return self.refer(path)
            raise _NeedsCloudpickle
        if cls.__module__ == "builtins" or imports_as(cls, cls.__module__, cls.__qualname__):
            return NotImplemented
        raise _NeedsCloudpickle

    def reduce_other(self, obj: Any) -> Any:
        kind = type(obj)
        if issubclass(kind, ModuleType):
            if not importable(obj.__name__):
                raise _NeedsCloudpickle
            return definitions.import_module, (obj.__name__,)
        if kind.__name__ == "_lru_cache_wrapper":
            module, path = getattr(obj, "__module__", None), None
            if module == "__main__":
                path = self.main_path(obj)
            elif imports_as(obj, module, getattr(obj, "__qualname__", "<lambda>")):
                return NotImplemented
            if path is not None:
                return self.refer(path)
            return definitions.make_cached, (obj.__wrapped__, obj.cache_parameters())
        if kind.__name__ == "cached_property" and kind.__module__ == "functools":
            return definitions.reduce_property(obj)
        if kind.__module__ in ("__main__", "typing") and (found := definitions.name_in_main(obj, kind)) is not None:
            name, made = found
            return self.refer(name) if name and self.is_global(name, obj) else made
        return definitions.reduce_handed_over(obj, kind)


class _PlainPickler(_Main, pickle.Pickler):
    def __init__(
        self, file: Any, variables: Any, known: Any, root: Any, callback: Callable[[pickle.PickleBuffer], Any] | None
    ) -> None:
        pickle.Pickler.__init__(self, file, PROTOCOL, buffer_callback=callback)
        self.names, self.variables, self.known, self.root, self.uses_main = {}, variables, known, root, False

    reducer_override = _Main.reduce


def _cloudpickler_class() -> Any:
    import cloudpickle

    found = _lazy.get("cloudpickler")
    if found is not None:
        return found

    class _CloudPickler(_Main, cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self, file: Any, variables: Any, known: Any, root: Any, callback: Any) -> None:
            cloudpickle.Pickler.__init__(self, file, PROTOCOL, buffer_callback=callback)
            self.names, self.variables, self.known, self.root, self.uses_main = {}, variables, known, root, False

        def reducer_override(self, obj: Any) -> Any:
            try:
                reduced = self.reduce(obj)
                if reduced is not NotImplemented:
                    return reduced
            except _NeedsCloudpickle:
                pass
            reduced = cloudpickle.Pickler.reducer_override(self, obj)
            maker = reduced[0].__name__ if isinstance(reduced, tuple) else ""
            if maker == "_make_skeleton_class":
                self.uses_main = True
                arguments, state = definitions.with_slots(obj, reduced[1], reduced[2])
                return _make_class, (maker, arguments), state, *reduced[3:5], _fill_class
            if maker == "_make_skeleton_enum":
                self.uses_main = True
                state = reduced[2], definitions.members_of(obj)
                return _make_class, (maker, reduced[1]), state, *reduced[3:5], _fill_enum
            return reduced

    _lazy["cloudpickler"] = _CloudPickler
    return _CloudPickler


_lazy: dict[str, Any] = {}


def _pickle(
    obj: Any,
    variables: dict[str, Any],
    known: dict[str, bytes] | None,
    root: Any = None,
    buffers: list[memoryview] | None = None,
) -> tuple[list[Any], Any]:
    """(pickle, which names it refers to). Large buffers are left out and put into ``buffers``, if that is given."""

    def leave_out(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True  # not contiguous: it goes into the pickle
        if raw.nbytes < SHARE_BYTES or buffers is None:
            return True
        buffers.append(raw)
        return False

    callback = None if buffers is None else leave_out
    pieces: list[Any] = []
    pickler: Any = _PlainPickler(Written(pieces), variables, known, root, callback)
    try:
        pickler.dump(obj)
    except (_NeedsCloudpickle, RecursionError, *_PLAIN_ERRORS):
        if buffers:
            buffers.clear()
        pieces.clear()
        pickler = _cloudpickler_class()(Written(pieces), variables, known, root, callback)
        pickler.dump(obj)
    return as_written(pieces), pickler


def _packed(
    pieces: list[Any],
    buffers: list[memoryview] | None,
    sent: Sent | None = None,
    proven: int = 0,
    *,
    together: bool = False,
    in_place: FindSegment | None = None,
) -> bytes | None:
    """A payload; None if its buffers must go into the pickle, as there can be no segment."""
    if len(pieces) == 1 and not buffers:
        return bytes(pieces[0])  # what is large is in several
    if not buffers and (buffers is None or sent is not None or sum(map(len, pieces)) < SHARE_BYTES):
        return b"".join(pieces)
    shared = pack_shared(pieces, buffers, sent, proven, together=together, in_place=in_place)
    return b"".join(pieces) if shared is None and not buffers else shared


def dumps(obj: Any, namespace: Namespace | None = None, *, share: bool = False, sent: Sent | None = None) -> bytes:
    """Pickle what goes *to* a job: definitions of ``__main__`` that it refers to travel along.

    Args:
        obj: A function, arguments, anything.
        namespace: Where ``__main__`` lives if not in this process's own module (jobs that submit jobs).
        share: Large buffers may travel beside the bytes, as SharedBytes: to processes of this machine only.
        sent: What this returned before for the same object, if it had large buffers; returned again if it is unchanged.

    Raises:
        Exception: Whatever the object's own pickling raises; ``explain`` turns it into words.
    """
    if type(obj) in ATOMS:
        return pickle.dumps(obj, PROTOCOL)
    buffers: list[memoryview] | None = [] if share else None
    if (flat := pickle_flat(obj)) is not None:
        return flat if isinstance(flat, bytes) else _packed(flat, buffers, sent) or b"".join(flat)
    variables = program_main() if namespace is None else namespace.variables
    pieces, pickler = _pickle(obj, variables, None, buffers=buffers)
    large: list[LargeGlobal] = []
    n_own = 0 if buffers is None else len(buffers)
    if pickler.uses_main:
        bundle = _with_definitions(b"".join(pieces), pickler, variables, namespace, buffers, large)
        pieces = [bundle]
    payload = _packed(pieces, buffers, sent, 0 if buffers is None else len(buffers) - n_own)
    if payload is None:
        return dumps(obj, namespace)
    if buffers and isinstance(payload, SharedBytes):
        for each in large:
            each.keep(variables, payload, buffers)
    return payload


def _with_definitions(
    content: bytes,
    pickler: Any,
    variables: dict[str, Any],
    namespace: Namespace | None,
    buffers: list[memoryview] | None,
    large: list[LargeGlobal],
) -> bytes:
    # What hashlib.blake2b is; importing hashlib loads OpenSSL too.
    from _blake2 import blake2b

    names: dict[str, None] = dict(pickler.names)
    table: list[Row] = []
    references: dict[str, list[str]] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        value = variables[name]
        if namespace is not None and namespace.known_there(name):
            # It need not be sent, but what it uses may be news there.
            references[name] = globals_of(value, variables)
        elif (definition := unchanged.known(name, variables)) is not None:
            references[name] = definition.references
            table.append((name, definition.digest, definition.content, 0, 0))
        else:
            beside: list[memoryview] | None = None if buffers is None else []
            parts = unchanged.parts_of(value, variables)
            try:
                pieces, inner = _pickle(value, variables, None, value, beside)
            except Exception as exc:
                exc.add_note(f"while pickling the global {name!r} of __main__, which the job uses")
                raise
            entry = b"".join(pieces)
            references[name] = list(inner.names)
            start = 0 if buffers is None else len(buffers)
            if beside and buffers is not None:
                made = LargeGlobal(name, entry, start, len(beside))
                digest = made.digest_of(variables, beside)
                large.append(made)
                buffers += beside
            else:
                digest = blake2b(entry, digest_size=16).digest()
                unchanged.keep(name, variables, parts, entry, digest, references[name])
            table.append((name, digest, entry, start, len(beside or ())))
        for each in references[name]:
            if each not in names:
                names[each] = None
                pending.append(each)
    # An instance of a class that was defined anew has the bytes it had before, and is another object all the same.
    defined = {row[0]: row[1] for row in table if isinstance(variables[row[0]], unchanged.KINDS)}
    for at, (name, digest, entry, start, n) in enumerate(table):
        behind = [defined[each] for each in references[name] if each in defined and each != name]
        if behind:
            table[at] = name, blake2b(b"".join((digest, *behind)), digest_size=16).digest(), entry, start, n
    # Values may need classes and functions of the table while they are rebuilt.
    table.sort(key=lambda row: not isinstance(variables[row[0]], unchanged.KINDS))
    return _BUNDLE + pickle.dumps((content, table), PROTOCOL)


def dumps_without_functions(obj: Any, namespace: Namespace | None = None) -> bytes:
    """As ``dumps``, refusing what plain pickle refuses (`_fast_serialization=2`): lambdas, classes made at run time.

    Raises:
        Exception: As plain pickle does.
    """
    variables = program_main() if namespace is None else namespace.variables
    try:
        _PlainPickler(io.BytesIO(), variables, None, None, None).dump(obj)
    except _NeedsCloudpickle:
        pickle.dumps(obj, PROTOCOL)
        raise pickle.PicklingError("plain pickle cannot take this: use _fast_serialization=0") from None
    return dumps(obj, namespace)


def dumps_result(
    obj: Any,
    namespace: Namespace,
    *,
    share: bool = False,
    in_place: FindSegment | None = None,
) -> bytes:
    """Pickle what comes *back* from a job: the reader has the program's definitions, so names suffice.

    Args:
        obj: The job's result.
        namespace: Where ``__main__`` lives.
        share: As for ``dumps``.
        in_place: As for ``pack_shared``.
    """
    buffers: list[memoryview] | None = [] if share else None
    if (flat := pickle_flat(obj)) is not None:
        if isinstance(flat, bytes):
            return flat
        return _packed(flat, buffers, together=True, in_place=in_place) or b"".join(flat)
    pieces, pickler = _pickle(obj, namespace.variables, namespace.received, buffers=buffers)
    if pickler.uses_main:
        pieces = [_BUNDLE + pickle.dumps((b"".join(pieces), []), PROTOCOL)]
    return _packed(pieces, buffers, together=True, in_place=in_place) or dumps_result(obj, namespace)


def dumps_plain(obj: Any) -> bytes:
    """Pickle with plain pickle only (`_fast_serialization=2`): lambdas and ``__main__`` classes are refused."""
    return pickle.dumps(obj, PROTOCOL)


def loads(payload: Any, namespace: Namespace | None = None) -> Any:
    """Rebuild an object; ``__main__`` means ``namespace``, or this process's own if None.

    Args:
        payload: bytes or memoryview of ``dumps`` and ``dumps_result``, or their SharedBytes.
    """
    if type(payload) is bytes and payload[0] == PICKLE and REFERENCE not in payload:
        return pickle.loads(payload)  # it names nothing, so no namespace matters
    buffers: list[memoryview] = []
    if is_shared(payload):
        payload, buffers = unpack_shared(payload)
    table: list[Any] = []
    if payload[0] == 77:  # b"M"
        payload, table = pickle.loads(memoryview(payload)[1:])
    elif payload[0] == 86:  # b"V"
        return _load_variant(payload, namespace)
    elif namespace is _active.namespace:
        return pickle.loads(payload, buffers=buffers)
    before = _active.namespace, _active.fresh
    _active.namespace, _active.fresh = namespace, ()
    try:
        if table and namespace is not None:
            namespace.apply(table, buffers)
        return pickle.loads(payload, buffers=buffers)
    finally:
        _active.namespace, _active.fresh = before


def _load_variant(payload: bytes, namespace: Namespace | None) -> FunctionType:
    base, defaults, cells = unpack_variant(payload)
    if namespace is None:
        function = loads(base)
        return varied(function, function.__globals__, defaults, cells)
    function, brought = namespace.bases.get(base, (None, []))
    if function is None or not namespace.has(brought):
        function = loads(base, namespace)
        if len(base) <= _MAX_BASE_BYTES:
            if len(namespace.bases) >= _MAX_BASES:
                namespace.bases.clear()
            namespace.bases[base] = function, definitions_of(base)
    variables = function.__globals__
    # Globals that came along from a module are each function's own: jobs may assign to them.
    own = variables if variables is namespace.variables else variables.copy()
    return varied(function, own, defaults, cells)


def dumps_list(items: list[Any]) -> bytes:
    """One pickle of a list whose items are all of ATOMS."""
    return pickle.dumps(items, PROTOCOL)


def loads_list(payload: bytes | memoryview) -> list[Any]:
    """The list of ``dumps_list``."""
    return pickle.loads(payload)  # type: ignore[no-any-return]
