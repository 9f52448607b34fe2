"""Crons of a workgroup: the operations on them, and the thread that fires them.

A slot is claimed in the books of the crons, its job is submitted under a key made of label and slot, and the run is
noted. Killed anywhere between, the next process finds the slot unsettled and does the rest: the key tells whether the
job was submitted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from datetime import datetime, timedelta
from typing import Any, Final

from cloud.backends.remote import raise_remote
from cloud.backends.requests import Request
from cloud.environment import Environment
from cloud.errors import BackendClosed, CloudException, JobNotFound
from cloud.jobs import DONE, JobOptions
from cloud.logs import logger
from cloud.resources.cron_runner import CronRunner, Once
from cloud.resources.crons import CronEntry, CronStore, MissedPolicy, OverlapPolicy, describe
from cloud.resources.schedule import Schedule
from cloud.wire import pack_message, unpack_message

__all__ = ["CronRequests", "Jobs"]

Answer = tuple[dict[str, Any], tuple[bytes, ...]]

_OWNER: Final = "server"
_OF_CLIENTS: Final = ("python", "cloudpickle", "code")
_LOOK_S: Final = 1.0
_ERROR_WAIT_S: Final = 5.0
_TIDY_EVERY_S: Final = 600.0
_SET_BACK: Final = timedelta(seconds=1)
_N_REMEMBERED: Final = 256


class Jobs:
    """Asks for jobs from a thread that may block.

    Args:
        serve: Answers a request on jobs, from any thread.
        closing: Set when there may be no more answers.
    """

    def __init__(self, serve: Callable[[Request], None], closing: threading.Event) -> None:
        self._serve = serve
        self._closing = closing

    def ask(self, op: str, content: dict[str, Any], *blobs: bytes, **more: Any) -> Answer:
        """Make a request, and wait until what it says is on disk.

        Raises:
            BackendClosed: The server is stopping; it may have been carried out.
            CloudException: What the engine raised.
        """
        future: Future[Answer] = Future()

        def reply(content: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> None:
            if not future.done():
                future.set_result((content, blobs))

        self._serve(Request(op, content, list(blobs), reply, **more))
        while True:
            try:
                answer, found = future.result(_LOOK_S)
            except NotYet:
                if self._closing.is_set():
                    raise BackendClosed("the server is stopping", retry=True) from None
                continue
            raise_remote(answer)
            return answer, found

    def is_finished(self, jid: int) -> bool:
        """Whether a job has ended, or is forgotten."""
        try:
            return self.ask("statuses", {"jids": [(jid, jid + 1)]})[1][0][0] >= DONE
        except JobNotFound:
            return True

    def kill(self, jid: int) -> None:
        """End a job."""
        self.ask("cancel", {"jids": [(jid, jid + 1)], "begun": True})


class _Submissions(Once):
    """Submits the calls of entries.

    Args:
        jobs: Takes them.
        environment: See ``CronRequests``.
        recall: See ``CronRequests``.
    """

    def __init__(
        self,
        jobs: Jobs,
        environment: Callable[[dict[str, Any]], Environment],
        recall: Callable[[str], dict[str, Any] | None],
    ) -> None:
        self._jobs = jobs
        self._environment = environment
        self._recall = recall

    def submit(self, entry: CronEntry, slot: datetime) -> int:
        return self.submit_as(entry, _slot_key(entry, slot))

    def submitted(self, entry: CronEntry, slot: datetime) -> int | None:
        known = self._recall(_slot_key(entry, slot))
        return None if known is None else int(known["jid"])

    def submit_as(self, entry: CronEntry, key: str, depth: int = 0) -> int:
        """Submit an entry's call under an idempotency key, and give its jid."""
        content, blobs = unpack_message(entry.payload)
        call = {
            "function": content["function"],
            "reusable": content["reusable"],
            "options": {**entry.options, "label": entry.label},
        }
        environment = self._environment({name: content[name] for name in _OF_CLIENTS if name in content})
        answer, _ = self._jobs.ask("submit", call, *blobs, environment=environment, key=key, depth=depth)
        jid: int = answer["jid"]
        return jid


def _slot_key(entry: CronEntry, slot: datetime) -> str:
    # Keys of clients are ASCII: none can be taken for this.
    return f"§slot:{slot.isoformat()}:{entry.label}"


class CronRequests:
    """Answers the operations on crons; each handler blocks for the disk. Fires what is due from `start` to `stop`.

    Args:
        folder: The workgroup's.
        jobs: Where calls are submitted.
        environment: What the workers of a client's submission must be, from its content; refuses what cannot run here.
        recall: The reply that was given to a request on jobs, by its idempotency key.
        now: The time by which crons are fired, aware.
        tidy: Called now and then from the thread that fires.

    Attributes:
        handlers: By name of the operation.
    """

    def __init__(
        self,
        folder: str,
        jobs: Jobs,
        environment: Callable[[dict[str, Any]], Environment],
        recall: Callable[[str], dict[str, Any] | None],
        now: Callable[[], datetime],
        tidy: Callable[[], None],
    ) -> None:
        self._environment = environment
        self._now = now
        self._tidy = tidy
        self._store = CronStore(folder, now)
        self._submissions = _Submissions(jobs, environment, recall)
        self._runner = CronRunner(
            self._store,
            lambda entry: self._submissions.submit_as(entry, ""),
            jobs.is_finished,
            now,
            kill=jobs.kill,
            owner=_OWNER,
            once=self._submissions,
        )
        self._deregistering = threading.Lock()
        self._deregistered: deque[str] = deque(maxlen=_N_REMEMBERED)
        self._changed = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="cloud-crons", daemon=True)
        self.handlers: dict[str, Callable[[Request], Answer]] = {
            "cron.register": self._register,
            "cron.deregister": self._deregister,
            "cron.manual_run": self._manual_run,
            "cron.list": self._list,
            "cron.info": self._info,
        }

    # --- operations ---------------------------------------------------------------------------------------------------

    def _register(self, request: Request) -> Answer:
        content = request.content
        names = ("function", "reusable", *_OF_CLIENTS)
        call: dict[str, Any] = {name: content[name] for name in names if name in content}
        if request.environment is not None:  # of the job that asks
            call["python"], call["code"] = request.environment
        self._environment({name: call[name] for name in _OF_CLIENTS if name in call})
        JobOptions.from_dict(content["options"])
        self._store.register(
            content["label"],
            Schedule(content["schedule"], content["tz"]),
            b"".join(pack_message(call, request.blobs)),
            options=content["options"],
            func_name=content["func_name"],
            missed=MissedPolicy(content["missed"]),
            overlap=OverlapPolicy(content["overlap"]),
            creator_host=content["creator_host"],
        )
        self._changed.set()
        return {}, ()

    def _deregister(self, request: Request) -> Answer:
        with self._deregistering:
            if not request.key or request.key not in self._deregistered:
                self._store.deregister(request.content["label"])
                self._deregistered.append(request.key)
        self._changed.set()
        return {}, ()

    def _manual_run(self, request: Request) -> Answer:
        # The key is that of the job's submission, too: asked again, the same job is told.
        key = f"§run:{request.key}" if request.key else ""
        jid = self._runner.run_now(
            request.content["label"], lambda entry: self._submissions.submit_as(entry, key, request.depth)
        )
        return {"jid": jid}, ()

    def _list(self, request: Request) -> Answer:
        return {"labels": [position.label for position in self._store.positions()]}, ()

    def _info(self, request: Request) -> Answer:
        facts = describe(self._store.get(request.content["label"]), self._now())
        del facts["funcname"]
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in facts.items()}, ()

    def codes(self) -> set[str]:
        """Digests of the sets of modules that crons need."""
        return {unpack_message(entry.payload)[0].get("code", "") for entry in self._store.list()} - {""}

    # --- firing -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to fire what is due."""
        self._thread.start()

    def stop(self) -> None:
        """Fire no more. Blocks until what is being submitted is. Idempotent."""
        self._stopped = True
        self._changed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def close(self) -> None:
        """Let go of the books. Idempotent."""
        self._runner.close()
        self._store.close()

    def _run(self) -> None:
        resumed = False
        tidy_at = time.monotonic() + _TIDY_EVERY_S
        while not self._stopped:
            self._changed.clear()
            try:
                if not resumed:
                    self._runner.resume(self._now())
                    resumed = True
                self._runner.fire_due(self._now())
                due = self._runner.next_due(self._now())
            except (CloudException, OSError):
                logger("Cloud.cron").exception("crons cannot be read or claimed; trying again in %g s", _ERROR_WAIT_S)
                self._changed.wait(_ERROR_WAIT_S)
                continue
            if time.monotonic() >= tidy_at:
                self._tidy()
                tidy_at = time.monotonic() + _TIDY_EVERY_S
            self._wait(due, tidy_at)

    def _wait(self, due: datetime | None, tidy_at: float) -> None:
        """Wait until something is to be done. Nobody else registers crons here, so that the disk need not be asked."""
        seen = self._now()
        while not self._stopped and time.monotonic() < tidy_at:
            now = self._now()
            if (due is not None and now >= due) or now < seen - _SET_BACK:
                return
            seen = now
            # In short pieces: the machine may sleep, and its clock be set.
            wait_s = _TIDY_EVERY_S if due is None else min(_LOOK_S, (due - now).total_seconds())
            if self._changed.wait(max(0.0, wait_s)):
                return
