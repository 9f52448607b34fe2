"""The verbs: ``call, map, join, result, …``, once, over whatever backend is current.

What they need is loaded as a backend is opened, while its workers start: to find ``cloud.call`` loads next to nothing.
"""

from __future__ import annotations

from _collections_abc import Iterable
from _thread import RLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from typing import Any, Final

    from cloud.backends.base import Backend, Segment
    from cloud.client.callbacks import Callbacks
    from cloud.client.rest import (
        CALL_OPTIONS,
        DEFAULT_OPTIONS,
        DONE,
        STATUS_LABELS,
        BackendClosed,
        CloudTimeoutError,
        FunctionCache,
        JobNotFound,
        JobOptions,
        Outcome,
        check_call,
        chunks_of,
        function_name,
        items_of,
        jid_list,
        pickle_call,
        size_of,
        split_options,
        suppress,
        too_large,
    )
    from cloud.client.results import Ahead
    from cloud.jobs import Jids
    from cloud.serialization.functions import Function


def _load_rest() -> None:
    """Give this module the names that its verbs use."""
    from cloud.client import rest

    globals().update({name: getattr(rest, name) for name in rest.__all__})


_KILL_WAIT_S: Final = 10.0
_MAX_READ_AHEAD: Final = 1024
_DESCRIBED_AT_ONCE: Final = 1000


class Cloud:
    """The verbs over one backend, which opens on first use.

    Args:
        name: 'cloud' or 'cloud.mp', for messages.
        opener: Makes the backend.
        on_close: Told of a backend that was closed: another Cloud may share it.
        max_transmit_bytes: Gives the limit for a function or argument in bytes, 0 for none.
        others: Clouds whose jobs ``info`` finds, too: jids are never given out twice in a process.
        reopens: False: once closed it stays closed, and its use raises BackendClosed.
    """

    def __init__(
        self,
        name: str,
        opener: Callable[[], Backend],
        on_close: Callable[[Backend], None],
        max_transmit_bytes: Callable[[], int],
        *,
        others: Callable[[], Iterable[Cloud]] = tuple,
        reopens: bool = True,
    ) -> None:
        self._name = name
        self._others = others
        self._reopens = reopens
        self._over = False
        self._opener = opener
        self._on_close = on_close
        self._max_transmit_bytes = max_transmit_bytes
        self._limit = 0
        self._backend: Backend | None = None
        self._half_open: Backend | None = None
        self._lock = RLock()
        self._functions: FunctionCache
        self._callbacks: Callbacks | None = None

    def _open(self) -> Backend:
        backend = self._backend
        if backend is None:
            with self._lock:
                if self._backend is None:
                    if self._over:
                        _load_rest()
                        raise BackendClosed(f"{self._name} was closed")
                    # Kept, should Ctrl-C come in the middle: the next use goes on with it.
                    self._half_open = self._half_open or self._opener()
                    _load_rest()
                    self._functions = FunctionCache()
                    self._limit = self._max_transmit_bytes()
                    self._backend, self._half_open = self._half_open, None
                backend = self._backend
        return backend

    @property
    def backend(self) -> Backend:
        """The backend, opened if it was not."""
        return self._open()

    @property
    def opened(self) -> bool:
        """True between first use and ``close``."""
        return self._backend is not None

    # --- submitting ---------------------------------------------------------------------------------------------------

    def call(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
        """Run ``func(*args, **kwargs)`` as a job.

        Returns at once. Function and arguments are pickled now: later changes do not reach the job. Names that begin
        with an underscore and are listed here are options of the job, whatever the function's own parameters are.

        Args:
            func: Any callable: lambdas, closures, methods, partials, classes, functions of ``__main__``.
            args: Its arguments.
            kwargs: Its keyword arguments, and: ``_callback``, ``_callback_on_error`` (a callable or a list of them,
                run in this process with the jid once the job has succeeded or failed), ``_depends_on`` (jids that
                must succeed first), ``_depends_on_errors`` ('abort': stall if one fails, or 'ignore'), ``_label``
                (ASCII str), ``_priority`` (int, 5; lower runs first), ``_cores`` (worker slots it takes),
                ``_max_runtime`` (minutes; then it is killed), ``_retries`` (further attempts if it raises) and
                ``_retry_delay`` (seconds before the first, doubled each time), ``_restartable`` (False: never run
                again when its worker is lost), ``_kill_process`` (True: nothing runs in its process afterwards),
                ``_os_env_vars`` (names to take from here, or a dict), ``_profile`` (True: keep cProfile statistics),
                ``_fast_serialization`` (2: plain pickle only for arguments and result), ``_type``, ``_high_cpu``
                (accepted; every job runs on the machine it has).

        Returns:
            The job's jid, a positive int.

        Raises:
            TypeError: ``func`` is not callable or does not take these arguments, or an option has a wrong type.
            SerializationError: Something cannot be pickled; the message names it.
            PayloadTooLarge: More than ``max_transmit_data`` bytes.
            JobNotFound: A dependency is unknown.

        Source: PiCloud client 2.1.1-2.8.5, ``cloud.call``. New: ``_retries``, ``_retry_delay``.
        """
        backend = self._backend or self._open()
        if not callable(func):
            raise TypeError(f"{self._name}.call first argument ({func!r}) is not callable")
        callbacks: dict[str, Any] = {}
        if kwargs:
            options, callbacks = split_options(kwargs, accept=CALL_OPTIONS)
        else:
            options = DEFAULT_OPTIONS
        check_call(func, args, kwargs)
        function = self._pickled(func, backend)
        arguments = pickle_call(
            args, kwargs, backend.namespace, plain=options.fast_serialization == 2, limit=self._limit
        )
        jid = backend.submit(function, arguments, options)
        if backend.datalog is not None:
            backend.datalog.called(backend, jid, function, size_of(arguments), func, args, kwargs)
        if callbacks:
            self._watch(backend, (jid,), callbacks)
        return jid

    def map(self, func: Callable[..., Any], *iterables: Iterable[Any], **kwargs: Any) -> range:
        """Run ``func`` once for each item, as one submission of N jobs.

        With several iterables the jobs take one item of each; shorter ones are padded with None. The iterables are
        consumed lazily, and jobs start before they are exhausted. All jobs share one pickled copy of the function.

        Args:
            func: Any callable.
            iterables: At least one; any length.
            kwargs: The options of ``call``, for every job. Anything else is refused.

        Returns:
            The N consecutive jids in the order of the items, as a ``range``; an empty one for no items.

        Raises:
            TypeError: ``func`` is not callable, or an argument is not iterable.
            ValueError: No iterable, or a keyword argument that is no option.
            Exception: What an iterable raises; the jobs begun are killed.

        Source: PiCloud client 2.1.1-2.8.5, ``cloud.map``.
        """
        if not iterables:
            raise ValueError(f"{self._name}.map needs at least 2 arguments: a function and an iterable")
        self._open()
        items = items_of("map", iterables)
        return self._map("map", func, items, kwargs, tuples=len(iterables) > 1)

    def starmap(self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], **kwargs: Any) -> range:
        """As ``map``, each item being the arguments of one job: ``starmap(pow, [(2, 5), (3, 2)])``."""
        self._open()
        items = (tuple(item) for item in items_of("starmap", (iterable,)))
        return self._map("starmap", func, items, kwargs, tuples=True)

    def _map(
        self, verb: str, func: Callable[..., Any], items: Iterable[Any], kwargs: dict[str, Any], *, tuples: bool
    ) -> range:
        backend = self._backend or self._open()
        if not callable(func):
            raise TypeError(f"{self._name}.{verb} first argument ({func!r}) is not callable")
        options, callbacks = split_options(kwargs, accept=CALL_OPTIONS)
        if kwargs:
            raise ValueError(
                f"Cannot pass keyword arguments into {self._name}.{verb}: {', '.join(sorted(kwargs))}; "
                "bind them with a closure or functools.partial"
            )
        function = self._pickled(func, backend)
        report = None if backend.datalog is None else backend.datalog.mapping(backend, function, func)
        writer = backend.open_map(function, options)
        try:
            chunks = chunks_of(
                items if report is None else report.counting(iter(items), tuples=tuples),
                backend.namespace,
                tuples=tuples,
                plain=options.fast_serialization == 2,
                limit=self._limit,
            )
            for kind, n, payload in chunks:
                writer.extend(kind, n, payload)
                if report is not None:
                    report.size_bytes += size_of(payload)
            jids = writer.seal()
        except BaseException:
            writer.abandon()
            raise
        if report is not None and jids:
            report.submitted(jids)
        if callbacks and jids:
            self._watch(backend, jids, callbacks)
        return jids

    def _ids(self, jids: Any, verb: str) -> Jids:
        if self._backend is None:
            self._open()
        return jid_list(jids, verb)

    def submit(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: JobOptions
    ) -> tuple[Backend, tuple[int]]:
        """As ``call``, for faces that keep options apart: every keyword argument is the function's own.

        Returns:
            Where it went, and its jid.
        """
        backend = self._backend or self._open()
        function = self._pickled(func, backend)
        arguments = pickle_call(args, kwargs, backend.namespace, plain=False, limit=self._limit)
        return backend, (backend.submit(function, arguments, options),)

    def pickled(self, func: Callable[..., Any]) -> tuple[Backend, Function]:
        """A function ready for ``Backend.open_map``, for faces that cut the items of a map into chunks themselves."""
        backend = self._backend or self._open()
        return backend, self._pickled(func, backend)

    def _pickled(self, func: Callable[..., Any], backend: Backend) -> Function:
        try:
            function = self._functions.get(func, backend.namespace)
        except Exception as exc:
            from cloud.serialization.explain import cannot_pickle

            raise cannot_pickle("the function", func, exc) from exc
        if self._limit and size_of(function.payload) > self._limit:
            raise too_large(size_of(function.payload), self._limit)
        return function

    def now(self) -> float:
        """Seconds since the epoch on the clock by which jobs run: virtual in the simulator."""
        return self._open().now()

    def _watch(self, backend: Backend, jids: Jids, callbacks: dict[str, Any]) -> None:
        from cloud.client.callbacks import Callbacks

        with self._lock:
            thread = self._callbacks = self._callbacks or Callbacks()
        notify = thread.notifier(callbacks.get("_callback", []), callbacks.get("_callback_on_error", []))
        backend.on_each_final(jids, notify)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def join(
        self, jids: Any, timeout: float | None = None, ignore_errors: bool = False, progress: bool = False
    ) -> None:
        """Block until all jobs have finished.

        Args:
            jids: A jid, or any iterable of jids and ranges of them.
            timeout: Seconds for the whole; None waits for ever, 0 looks once. The jobs go on after a timeout.
            ignore_errors: Wait for all, and raise for none that failed.
            progress: Show how far they are (tqdm if installed; nothing unless at a terminal or in a notebook).

        Raises:
            CloudException: As soon as a job is found to have failed; others may still run.
            CloudTimeoutError: Not all finished in time; ``.jid`` lists those that had not.
            JobNotFound: A jid is unknown.
            KeyboardInterrupt: Ctrl-C; the jobs go on.

        Source: PiCloud client 2.1.1-2.8.5. ``timeout=0`` follows the seed's text.
        """
        self._join("join", self._ids(jids, "cloud.join"), timeout, ignore_errors, progress)

    def _join(
        self,
        verb: str,
        jids: Jids,
        timeout: float | None,
        ignore_errors: bool,
        progress: bool,
        *,
        outcomes: bool = False,
        ahead: Ahead | None = None,
    ) -> list[Segment] | None:
        """Wait, and raise as ``join``; the outcomes if they are wanted and came with the wait."""
        backend = self._backend or self._open()
        timeout_s = _timeout(timeout)
        segments: list[Segment] | None = None
        if progress:
            from cloud.client.progress import watch

            unfinished = watch(
                backend.statuses,
                lambda limit_s: backend.wait(jids, limit_s, stop_on_error=not ignore_errors),
                jids,
                timeout_s,
                f"{self._name}.{verb}",
            )
        elif outcomes:
            # Whoever looks again and again, with a short timeout, would have the same read each time.
            read = ahead.read if ahead is not None and timeout_s is None else None
            unfinished, segments = backend.wait_outcomes(jids, timeout_s, stop_on_error=not ignore_errors, read=read)
        else:
            unfinished = backend.wait(jids, timeout_s, stop_on_error=not ignore_errors)
        if unfinished:
            raise CloudTimeoutError(f"{self._name}.{verb} timed out", jid=unfinished)
        if unfinished is None:
            self._raise_first_failure(jids)
        return segments

    def _raise_first_failure(self, jids: Jids) -> None:
        from cloud.client.results import failure

        backend = self._open()
        codes = backend.statuses(jids)
        for jid, code in zip(jids, codes, strict=True):
            if code > DONE:
                error = failure(jid, Outcome(backend.outcomes((jid,))[0][3]), backend.namespace)
                backend.explain(error)
                raise error from error.__cause__

    def result(
        self, jids: Any, timeout: float | None = None, ignore_errors: bool = False, progress: bool = False
    ) -> Any:
        """Block until the jobs have finished and return what they returned.

        Args:
            jids, timeout, progress: As for ``join``.
            ignore_errors: Put a failed job's CloudException in its place instead of raising it.

        Returns:
            The value for a single jid; else a list in the order of the jids, duplicates included. Values are rebuilt
            anew by each call.

        Raises:
            As ``join``; SerializationError if a value cannot be rebuilt here.
        """
        from cloud.client.results import Ahead, decode

        ids = self._ids(jids, "cloud.result")
        backend = self._backend or self._open()
        ahead = Ahead() if len(ids) > 1 else None
        segments = self._join("result", ids, timeout, ignore_errors, progress, outcomes=True, ahead=ahead)
        if segments is None:
            segments = backend.outcomes(ids)
        values, failures = decode(ids, segments, backend.namespace, ahead)
        for each in failures:
            backend.explain(each)
        if failures and not ignore_errors:
            raise failures[0] from failures[0].__cause__
        return values[0] if type(jids) is int or not isinstance(jids, Iterable) else values

    async def aresult(self, jids: Any, timeout: float | None = None, ignore_errors: bool = False) -> Any:
        """As ``result``, for ``await``: other tasks of the event loop run meanwhile.

        Raises:
            As ``result``; ``asyncio.CancelledError`` if the task is cancelled (the jobs go on).
        """
        import asyncio

        ids = self._ids(jids, "cloud.aresult")
        timeout_s = _timeout(timeout)
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        call_off = self._open().when_final(ids, lambda: _wake(loop, ready), stop_on_error=not ignore_errors)
        try:
            await asyncio.wait_for(ready.wait(), timeout_s)
        except TimeoutError:
            pass  # the look below raises, naming the unfinished jobs
        finally:
            call_off()
        values = self.result(ids, 0, ignore_errors)
        return values if isinstance(jids, Iterable) else values[0]

    def iresult(
        self,
        jids: Any,
        timeout: float | None = None,
        num_in_parallel: int = 10,
        ignore_errors: bool = False,
        progress: bool = False,
    ) -> Iterator[Any]:
        """Iterate over results in the order of the jids, each as soon as it is there.

        Args:
            jids, progress: As for ``join``.
            timeout: Seconds for each ``next``; after a timeout iteration may go on.
            num_in_parallel: How many results to fetch at once at most; 0 or more than 1024 means 1024.
            ignore_errors: Yield a failed job's CloudException instead of raising it.

        Returns:
            An iterator. One that raises for a failed job goes on with the next one afterwards.

        Raises:
            From ``next``: CloudException of a failed job; CloudTimeoutError.
        """
        from cloud.client.ordered import Results

        ids = self._ids(jids, "cloud.iresult")
        backend = self._open()
        backend.statuses(ids)  # an unknown jid raises here, not in the middle
        ahead = num_in_parallel if 1 <= num_in_parallel <= _MAX_READ_AHEAD else _MAX_READ_AHEAD
        return Results(backend, ids, _timeout(timeout), ahead=ahead, ignore_errors=ignore_errors, progress=progress)

    def iresult_unordered(
        self, jids: Any, timeout: float | None = None, ignore_errors: bool = True, progress: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Iterate over (jid, result) in the order in which jobs finish.

        Args:
            jids, progress: As for ``join``.
            timeout: Seconds for each ``next``.
            ignore_errors: True skips failed jobs, as PiCloud did; False yields their CloudException as result.

        Raises:
            From ``next``: CloudTimeoutError.
        """
        from cloud.client.unordered import ResultsAsFinished

        ids = self._ids(jids, "cloud.iresult_unordered")
        return ResultsAsFinished(self.backend, ids, _timeout(timeout), skip_failed=ignore_errors, progress=progress)

    def progress(self, jids: Any, timeout: float | None = None) -> None:
        """Show how far the jobs are until all have finished; returns at once when there is no terminal to show it on.

        Raises:
            CloudTimeoutError: Not all finished in ``timeout`` seconds.
            JobNotFound: A jid is unknown.
        """
        from cloud.client.progress import Progress

        ids = self._ids(jids, "cloud.progress")
        self._open().statuses(ids)
        if Progress(0, file=None).visible:
            self._join("progress", ids, timeout, True, True)

    # --- asking -------------------------------------------------------------------------------------------------------

    def status(self, jids: Any) -> str | list[str]:
        """Where jobs stand: 'waiting', 'queued', 'processing', 'done', 'error', 'killed' or 'stalled'.

        Returns:
            A str for a single jid, else a list of str in order.

        Raises:
            JobNotFound: A jid is unknown.
        """
        codes = self._open().statuses(self._ids(jids, "cloud.status"))
        labels = [STATUS_LABELS[code] for code in codes]
        return labels if isinstance(jids, Iterable) else labels[0]

    def info(self, jids: Any, info_requested: Any = None) -> dict[int, dict[str, Any]]:
        """What is known of jobs.

        Args:
            jids: A jid, or an iterable of them.
            info_requested: A key or an iterable of keys; 'all' for every one; None for status, stdout, stderr and
                runtime. Keys and units: see ``cloud.client.info.KEYS``.

        Returns:
            A dict of dicts by jid, for a single jid too. Unknown keys are left out.

        Raises:
            JobNotFound: A jid is unknown.
            TypeError: ``info_requested`` is something else.
        """
        from cloud.client.info import keys_of

        keys = keys_of(info_requested)
        wanted = self._ids(jids, "cloud.info")
        if not wanted:
            return {}
        try:
            return _infos(self._open(), wanted, keys)
        except JobNotFound:
            return {jid: self._info(jid, keys) for jid in wanted}

    def _info(self, jid: int, keys: list[str]) -> dict[str, Any]:
        try:
            return _infos(self._open(), (jid,), keys)[jid]
        except JobNotFound:
            for other in self._others():
                if other.opened and other is not self:
                    with suppress(JobNotFound, BackendClosed):
                        return _infos(other.backend, (jid,), keys)[jid]
            raise

    def find(
        self,
        label: str | None = None,
        status: str | Iterable[str] | None = None,
        function: str | Callable[..., Any] | None = None,
    ) -> list[int]:
        """Jids of jobs that match all that is given, in order.

        Args:
            label: Their ``_label``.
            status: One status, or several.
            function: Their function: the callable, its name, or its module and name.

        Raises:
            ValueError: No status is called that.
        """
        backend = self._open()
        codes = None
        if status is not None:
            names = [status] if isinstance(status, str) else list(status)
            wrong = [name for name in names if name not in STATUS_LABELS]
            if wrong:
                raise ValueError(f"no status is called {wrong[0]!r}; there are {', '.join(STATUS_LABELS)}")
            codes = [STATUS_LABELS.index(name) for name in names]
        if callable(function):
            function = function_name(function)
        return backend.select(label=label, status=codes, function=function)

    # --- ending -------------------------------------------------------------------------------------------------------

    def kill(self, jids: Any = None) -> None:
        """End jobs. Blocks until they have ended, at most about a second.

        A job that runs gets ``KilledException`` raised in it, so that its ``finally`` blocks run; after a grace
        (``kill_grace_s``, 0.5 s) its processes are ended for certain. Jobs that have finished are left alone.

        Args:
            jids: None means every unfinished job; an empty list none.

        Raises:
            JobNotFound: A jid is unknown; nothing was killed.
        """
        backend = self._open()
        ids = None if jids is None else self._ids(jids, "cloud.kill")
        if ids is not None and not ids:
            return
        pending = backend.cancel(ids)
        if pending:
            backend.wait(pending, _KILL_WAIT_S, stop_on_error=False)

    def delete(self, jids: Any) -> None:
        """Forget jobs: results, output, everything. Unfinished ones are killed first.

        Raises:
            JobNotFound: A jid is unknown; nothing was deleted.
        """
        ids = self._ids(jids, "cloud.delete")
        backend = self._open()
        if not isinstance(ids, range):
            ids = list(dict.fromkeys(ids))
        codes = backend.statuses(ids)
        if any(code < DONE for code in codes):
            self.kill(ids)
        backend.delete(ids)

    def connection_info(self) -> dict[str, Any]:
        """How jobs are run: ``opened`` (bool), ``connection_type`` (str) and more by type, e.g. ``num_procs``."""
        opened = self.opened
        # Opening a backend starts nothing by itself.
        return {**self._open().connection_info(), "opened": opened}

    def close(self) -> bool:
        """End all jobs and workers. The next use opens again, with none of these jobs.

        Returns:
            False if it was not open.
        """
        with self._lock:
            self._over = not self._reopens
            backend, self._half_open = self._backend or self._half_open, None
        if backend is not None:
            backend.close()
            if backend.datalog is not None:
                backend.datalog.close()
            self.drop(backend)
            self._on_close(backend)
        return backend is not None

    def drop(self, backend: Backend) -> None:
        """Let go of a backend that was closed, if it is ours."""
        with self._lock:
            if self._backend is not backend:
                return
            self._backend = None
            # What they captured may be large.
            self._functions = FunctionCache()
            callbacks, self._callbacks = self._callbacks, None
        if callbacks is not None:
            callbacks.close()

    def abandon(self) -> None:
        """In a forked child: the parent's jobs and workers are not ours."""
        backend, self._backend, self._half_open = self._backend or self._half_open, None, None
        self._lock = RLock()
        self._callbacks = None
        if backend is not None:
            backend.abandon()


def _infos(backend: Backend, jids: Jids, keys: list[str]) -> dict[int, dict[str, Any]]:
    from cloud.client.info import info_of

    found = {}
    # Not all at once: the facts of a job are much more than what is asked for.
    for start in range(0, len(jids), _DESCRIBED_AT_ONCE):
        part = jids[start : start + _DESCRIBED_AT_ONCE]
        now = backend.now()
        for jid, facts in zip(part, backend.describe(part), strict=True):
            found[jid] = info_of(facts, keys, now)
    return found


def _wake(loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(ready.set)
    except RuntimeError:
        pass  # the loop was closed; nobody waits any more


def _timeout(timeout: Any) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if timeout < 0 or timeout != timeout:
        raise ValueError(f"timeout must be at least 0 seconds, not {timeout!r}")
    return None if timeout == float("inf") else float(timeout)


__all__ = ["Cloud"]
