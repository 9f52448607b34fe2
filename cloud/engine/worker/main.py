"""The worker's loop: takes frames from the engine, runs what they hold, sends outcomes back.

One thread, the process's main thread, runs all jobs: signals raise there. Outcomes are sent when nothing more is
waiting to be run. Before that they are handed over every few milliseconds, in the ring if the engine looks into it; a
signal from the engine (``POKE``) sends what is held back while an item turns out to be long.
"""

from __future__ import annotations

import os
import sys
import time
from _thread import get_ident
from collections import deque
from collections.abc import Callable
from types import FrameType

from cloud.engine import channel as ch
from cloud.engine.ring import RING_BYTES
from cloud.engine.signals import signal
from cloud.engine.worker.capture import Capture
from cloud.engine.worker.items import ItemRecord
from cloud.engine.worker.link import Link, LinkClosed
from cloud.engine.worker.many import SMALL_S, Many
from cloud.engine.worker.outbox import Outbox
from cloud.engine.worker.pooled import Inherited, Initialization, become_process, leave, use_tracker
from cloud.engine.worker.received import Received, each_once
from cloud.engine.worker.run import Call, run_call
from cloud.engine.worker.surroundings import Surroundings
from cloud.errors import KilledException
from cloud.serialization import pickling
from cloud.serialization.namespace import CopiedNamespace, Namespace
from cloud.serialization.shared import SharedBytes, payload_from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, NoReturn

    from cloud.engine.worker.limits import Limited

INTERRUPT: Final = signal.SIGINT
POKE: Final = signal.SIGURG
"""Ignored by default, so a poke that meets a job's own handlers does no harm."""

_BROKEN_EXIT: Final = 70
_LINGER_S: Final = 0.01
"""Who is last to close a file gives its memory back, 7 ms for 100 MB: not the engine, which somebody may wait for."""

_PREPARED_S: Final = 1.0
"""Memory that the next job may need is held so long for it."""


class Worker:
    """One worker process's state.

    Args:
        link: The socket to the engine.
        page: The shared page.
        settings: ``spin_s``, ``output_limit_bytes``, ``max_transmit_bytes``, ``thread_defaults``, ``capture``; in a
            server's worker ``confinement``, which ``confine`` has acted on.
        inherited: What it has from the program, if it was forked from that.
    """

    def __init__(self, link: Link, page: ch.Page, settings: dict[str, Any], inherited: Inherited | None = None) -> None:
        self.link = link
        self.slots = page.slots
        self._raw = page.raw
        self._outbox = Outbox(link, page)
        self.settings = settings
        self.pid = os.getpid()
        self._main_thread = get_ident()
        self.depth = 0
        self._jid_offset = 0
        self._dirty = [False]
        self._inherited = inherited
        self._initialization = Initialization()
        self.namespace = _fresh_main() if inherited is None else CopiedNamespace.of_copy()
        confined = settings.get("confinement")
        self._limited: Limited | None = None
        if confined is not None:
            from cloud.engine.worker.limits import Limited, Limits, put_in_force

            self._limited = Limited(Limits(*confined["limits"]), confined["cgroup"], self._dirty)
            put_in_force(self._limited)
        self._surroundings = Surroundings(
            self._dirty, settings["thread_defaults"], own=confined is not None, forked=inherited is not None
        )
        self._capture = Capture(self._dirty, settings["output_limit_bytes"], captured=settings["capture"])
        self._context = 0
        self._received = Received(self.namespace)
        self._many = Many(
            page,
            self._outbox,
            self._capture,
            self._surroundings,
            self._dirty,
            self.namespace,
            ItemRecord(self.pid, self._end_of_output),
            self._tidy,
        )
        link.before_request = self._flush_before_request
        signal.signal(INTERRUPT, self._on_interrupt)
        signal.signal(POKE, self._on_poke)
        self._surroundings._handlers.clear()

    @property
    def jid(self) -> int:
        """The job that runs."""
        return self._jid_offset + int(self.slots[ch.CURRENT])

    # --- the loop -----------------------------------------------------------------------------------------------------

    def loop(self) -> None:
        """Serve until the engine closes the socket."""
        handlers: dict[int, Callable[[Any], None]] = {
            ch.CONTEXT: self._received.on_context,
            ch.FUNCTION: self._received.on_function,
            ch.CHUNK: self._received.on_chunk,
            ch.RUN: self._on_run,
            ch.RANGE: self._on_range,
            ch.FORGET: self._received.on_forget,
            ch.RESUME: self._on_resume,
            ch.INITIALIZE: self._on_initialize,
            ch.IDENTITY: self._on_identity,
            ch.LEAVE: self._on_leave,
            ch.TRACKER: self._on_tracker,
        }
        frames, slots, spin_s = self.link.frames, self.slots, self.settings["spin_s"]
        kind, body = 0, None
        while True:
            while frames:
                kind, body = frames.popleft()
                handlers[kind](body)
            if kind == ch.RANGE or self._outbox.has_left:
                # More items may have come meanwhile: what is held goes with theirs, and nobody is woken for it.
                self._leave_if_copy()
                if self.link.look():
                    continue
            self._outbox.finish()
            body = None
            if self._received.has_large or self._received.is_prepared:
                self._idle_with_large()
            self.link.receive(spin_s if slots[ch.SPIN] else 0.0)

    def _idle_with_large(self) -> None:
        """Nothing is to be done: hold large arguments a moment longer, and memory that the next job may need."""
        received, link = self._received, self.link
        if received.has_large:
            # Not where memory is limited, as what is got for later jobs would be taken from this one's.
            if link.reads_alone and self._limited is None:
                received.prepare(lambda: not link.linger(0.0))
            link.linger(_LINGER_S)
            received.let_go()
        if received.is_prepared and not link.linger(_PREPARED_S):
            received.give_back()

    def _on_resume(self, body: Any) -> None:
        # Frames come in order: what was taken back lay before this one and met the limit; what follows is new.
        self.slots[ch.LIMIT] = ch.NO_LIMIT
        self._outbox.flush()
        self.link.send(ch.frame(ch.STOPPED, body))

    # --- a pool's worker ----------------------------------------------------------------------------------------------

    def _on_initialize(self, body: Any) -> None:
        context = ch.ID.unpack_from(body)[0]
        payload = payload_from(body, ch.ID.size)

        def load() -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
            self._surroundings.apply(self._received.contexts[context])
            self._context = context
            if self._inherited is not None:
                return self._inherited.initializer, self._inherited.initargs
            function, args = pickling.loads(payload, self.namespace)
            return function, args

        self._initialization.run(load)
        self._surroundings.keep()
        self._capture.keep()

    def _on_identity(self, body: Any) -> None:
        number, program_pid = ch.IDENTITY_HEAD.unpack_from(body)
        become_process(number, program_pid, bytes(body[ch.IDENTITY_HEAD.size :]))

    def _on_tracker(self, body: Any) -> None:
        use_tracker(os.dup(body.segment.fd))

    def _on_leave(self, body: Any) -> None:
        leave()
        self._end_of_output()
        os._exit(0)

    # --- one call -----------------------------------------------------------------------------------------------------

    def _on_run(self, body: Any) -> None:
        position, jid, token, context, _, depth, flags = ch.RUN_HEAD.unpack_from(body)
        slots = self.slots
        if position >= slots[ch.LIMIT]:
            return  # not announced: should we die before the engine hears that we stopped, it never began
        slots[ch.CURRENT] = position
        if position >= slots[ch.LIMIT]:
            return
        offset = ch.RUN_HEAD.size
        extras: dict[str, str] = {}
        if flags & ch.EXTRAS:
            packed, offset = ch.cut(body, offset)
            extras = pickling.loads(packed)
        if token == ch.INSIDE:
            self._received.payloads[token], offset = ch.cut(body, offset)
        self._jid_offset, self.depth = jid - position, depth

        def load() -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
            function = self._function(token, context, extras, keep=bool(flags & ch.KEEP_FUNCTION))
            args, kwargs = self._received.arguments(token, payload_from(body, offset))
            if slots[ch.KILL] == position:
                raise _killed()
            return function, args, kwargs

        self._run(load, position, flags)

    def _run(self, load: Callable[[], Any], position: int, flags: int) -> None:
        began = time.monotonic()
        call = Call(
            load,
            self.namespace,
            profile=bool(flags & ch.PROFILE_FLAG),
            fast_pickle=bool(flags & ch.FAST_PICKLE),
            in_place=self._received.in_place,
        )
        outcome = run_call(call, self.pid, self._end_of_output, self.settings["max_transmit_bytes"])
        self._received.end_job()
        self._outbox.hold(position, 1, outcome)
        self._tidy()
        prompt = flags & ch.PROMPT and time.monotonic() - began > SMALL_S
        if flags & ch.DELIVER or prompt or self._outbox.is_due():
            self._outbox.flush()
        self._received.give_back()

    def _function(self, token: int, context: int, extras: dict[str, str], *, keep: bool) -> Callable[..., Any]:
        self._initialization.check()
        if context != self._context or extras:
            # Not kept if it raises: the next job then tries, and reports, again.
            self._context = 0
            self._surroundings.apply(self._received.contexts[context], extras)
            if not extras:
                self._context = context
        return self._received.function(token, keep=keep)

    # --- a run of map items -------------------------------------------------------------------------------------------

    def _on_range(self, body: Any) -> None:
        position, jid, token, context, _, depth, flags, chunk, first, n = ch.RANGE_HEAD.unpack_from(body)
        extras: dict[str, str] = pickling.loads(body[ch.RANGE_HEAD.size + 4 :]) if flags & ch.EXTRAS else {}
        kind, items = self._received.chunk(chunk)
        if position >= self.slots[ch.LIMIT]:
            return
        self.depth = depth
        self._jid_offset = jid - position
        is_large = n == 1 and type(items) is list and type(items[first]) is SharedBytes
        if is_large or flags & (ch.PROFILE_FLAG | ch.FAST_PICKLE) or self.settings["max_transmit_bytes"]:
            self._one_by_one(position, jid, token, context, extras, flags, kind, items, first, n)
            return
        try:
            function = self._function(token, context, extras, keep=kind != ch.ANEW_CHUNK)
            part = items[first : first + n]
            part = each_once(part) if kind in ch.UNSHARED else part
        except BaseException:  # noqa: BLE001 - each item reports it as its own
            self._one_by_one(position, jid, token, context, extras, flags, kind, items, first, n)
            return
        if kind == ch.ANEW_CHUNK:

            def load() -> Callable[..., Any]:
                return self._received.function(token, keep=False)

            function = load
        self._many.run_items(function, kind, part, position, flags)
        self._received.give_back()

    def _one_by_one(
        self,
        position: int,
        jid: int,
        token: int,
        context: int,
        extras: dict[str, str],
        flags: int,
        kind: int,
        items: Any,
        first: int,
        n: int,
    ) -> None:
        slots = self.slots
        for index in range(n):

            def load(index: int = first + index) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
                function = self._function(token, context, extras, keep=kind != ch.ANEW_CHUNK)
                if slots[ch.KILL] == slots[ch.CURRENT]:
                    raise _killed()
                [item] = items[index : index + 1]
                if kind in ch.SEPARATE:
                    args, kwargs = self._received.arguments(token, item)
                    return function, args, kwargs
                return function, item if kind in ch.SPREAD else (item,), {}

            slots[ch.CURRENT] = position + index
            if position + index >= slots[ch.LIMIT]:
                return
            self._run(load, position + index, flags)

    # --- between jobs -------------------------------------------------------------------------------------------------

    def _end_of_output(self) -> tuple[bytes, bytes]:
        out, err = self._capture.take()
        if out or err:
            if self._limited is not None:
                # The limit for files counts from their beginning: what earlier jobs printed must not fill them.
                self._capture.rewind()
            self.slots[ch.OUT], self.slots[ch.ERR] = self._capture.starts
        return out, err

    def _tidy(self) -> None:
        if self._dirty[0] or sys.path != self._surroundings.path:
            self._leave_if_copy()
            if self._limited is not None and self._limited.met:
                # It may have left no memory or no descriptors for the next job, which another worker is given.
                self._outbox.flush()
                os._exit(0)
            self._surroundings.restore()
            self._capture.restore_input()
            self._dirty[0] = False

    def _leave_if_copy(self) -> None:
        if os.getpid() != self.pid:
            os._exit(0)  # a child that the job forked and that returned into our loop

    def _flush_before_request(self) -> None:
        # What the job asks about may be an outcome that is still held here.
        if get_ident() == self._main_thread:
            self._send_held()

    def _send_held(self) -> None:
        self._many.pack_amid()
        self._outbox.flush(wake=True)
        self._outbox.note_beginning()  # of what is about to end
        self._outbox.called_in = True

    # --- signals ------------------------------------------------------------------------------------------------------

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.slots[ch.KILL] == self.slots[ch.CURRENT]:
            if self.link.interruptible or _inside_job(frame):
                raise _killed()
        elif self.slots[ch.KILL] > ch.NO_LIMIT and _inside_job(frame):
            # From outside. After a kill that came too late for its own job this worker is at its end anyway.
            raise KeyboardInterrupt

    def _on_poke(self, number: int, frame: FrameType | None) -> None:
        if self.link.interruptible or _inside_job(frame):
            self._send_held()


def _killed() -> KilledException:
    return KilledException("Job terminated by user")


def _inside_job(frame: FrameType | None) -> bool:
    """True when the interrupted code is the user's, or ours at a place that calls it, and none of ours below.

    The frame that calls a C function of the user's is our own. Outside the call itself a poke is harmless there, and a
    kill ends the worker, which is what follows a kill anyway.
    """
    while frame is not None:
        if frame.f_code.co_filename in _OWN_FILES:
            return frame.f_code.co_name in _CALLERS
        frame = frame.f_back
    return False


# Of the user's functions; and pickle_value, as a __reduce__ of the user's may run for long, too.
_CALLERS: Final = frozenset(
    {"run_call", "run_items", "call_spread", "call_loaded", "call_and_look", "pickle_value", "_profiled", "load"}
)
_OWN_FILES: Final = frozenset(
    {
        __file__,
        run_call.__code__.co_filename,
        Capture.__init__.__code__.co_filename,
        ItemRecord.__init__.__code__.co_filename,
        Many.__init__.__code__.co_filename,
        Link.__init__.__code__.co_filename,
        Outbox.__init__.__code__.co_filename,
        Surroundings.__init__.__code__.co_filename,
    }
)


def _fresh_main() -> Namespace:
    """A ``__main__`` of the program's own for its functions, in the place where ``import __main__`` looks."""
    from types import ModuleType

    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    return Namespace(module.__dict__)


def serve(socket_fd: int, page_fd: int, inherited: Inherited | None = None) -> NoReturn:
    """Be a worker until the engine goes away."""
    link = Link(socket_fd)
    try:
        page = ch.Page(page_fd, RING_BYTES)
        os.close(page_fd)
        settings = link.receive_settings()
        if "confinement" in settings:
            from cloud.engine.worker.confinement import confine

            confine(settings["confinement"])
        worker = Worker(link, page, settings, inherited)
        _CURRENT.append(worker)
        worker.loop()
    except LinkClosed:
        pass
    except BaseException as exc:  # noqa: BLE001 - whoever reads what the job printed sees why its worker ended
        sys.__excepthook__(type(exc), exc, exc.__traceback__)
        os._exit(_BROKEN_EXIT)
    finally:
        # Not sys.exit: atexit handlers of the template's or the user's must not run here.
        os._exit(0)


_CURRENT: deque[Worker] = deque(maxlen=1)


def current_worker() -> Worker | None:
    """The worker this process is, or None in any other process."""
    if _CURRENT and _CURRENT[0].pid == os.getpid():
        return _CURRENT[0]
    return None
