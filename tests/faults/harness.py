"""Load on a server, with a log of what was promised, a witness of what ran, and a checker that compares the two.

::

    submitters ──► log       'ask token…', then 'told jid token…' or 'refused token…'; 'saw jid digest' of its outcome
    jobs       ──► witness   'start token pid time', 'end token pid time'
    checker    ──► log, witness, the server's answers and its files ──► Verdict

Each job has a token, which is its label, too: the store's own rows tell how often it was submitted.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final, Self

import cloud
from cloud.current import cloud as current_cloud
from cloud.errors import BackendClosed, CloudException, JobNotFound
from cloud.jobs import DONE, ERROR, ERROR_TEXT, KILLED, Outcome
from tests.faults.jobs import expected, line, work
from tests.server.running import RunningServer

STUCK_AFTER_S: Final = 60.0
MAP_ITEMS: Final = 8
REFUSED_PAUSE_S: Final = 0.1


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Wait for another process's doing, of which nothing here is told."""
    until = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < until, what
        pause.wait(0.01)


@dataclass
class Verdict:
    """What the checker found; all the lists are empty when every promise was kept.

    Attributes:
        lost: Jids that were told, and that the server does not know.
        stuck: Jids that are not final in time.
        double_recorded: Jids whose outcome changed after it was seen, or is kept twice.
        double_submitted: Tokens of which the server has more jobs than were asked for.
        double_run: Tokens that began twice and must not.
        wrong: Jids with a result that is not the job's.
        n_told, n_seen: Jobs whose jid was told, and outcomes that were seen while the faults went on.
        n_refused: Submissions that ended with an error.
        n_repeated: Executions beyond the first of jobs that may run again.
    """

    lost: list[int] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)
    double_recorded: list[int] = field(default_factory=list)
    double_submitted: list[int] = field(default_factory=list)
    double_run: list[int] = field(default_factory=list)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    n_told: int = 0
    n_seen: int = 0
    n_refused: int = 0
    n_repeated: int = 0

    @property
    def broken(self) -> dict[str, list[Any]]:
        """The promises that were not kept."""
        return {name: found for name, found in vars(self).items() if isinstance(found, list) and found}


class Witness:
    """What jobs told of themselves."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> Iterator[tuple[str, int, int, float]]:
        """(start or end, token, pid, time) in the order they happened."""
        if self.path.exists():
            for text in self.path.read_text().splitlines():
                what, token, pid, at = text.split()
                yield what, int(token), int(pid), float(at)

    def running(self) -> list[tuple[int, int]]:
        """(token, pid) of what has begun and not told of its end, and whose worker lives."""
        open_ = dict.fromkeys((token, pid) for what, token, pid, _ in self.lines() if what == "start")
        for what, token, pid, _ in self.lines():
            if what == "end":
                open_.pop((token, pid), None)
        return [(token, pid) for token, pid in open_ if _is_worker(pid)]

    def last_begun_by(self, pid: int) -> int:
        """Token of the job that a worker began last."""
        return [token for what, token, its_pid, _ in self.lines() if what == "start" and its_pid == pid][-1]

    def first_end_after(self, moment: float) -> float | None:
        """When the first job after that moment ended."""
        return next((at for what, _, _, at in self.lines() if what == "end" and at > moment), None)


def _is_worker(pid: int) -> bool:
    # A number that was given out again must not be killed.
    try:
        return b"cloud" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class Load:
    """Submitters on threads of this process, until it is stopped; they use the current server.

    Args:
        folder: Where log and witness are.
        n_threads: Submitters: every third submits jobs that must not run twice, every third maps.
        seconds: What a job takes.
        first_token: Of the tokens; another load on the same workgroup begins elsewhere.
    """

    def __init__(self, folder: Path, *, n_threads: int = 6, seconds: float = 0.02, first_token: int = 1) -> None:
        self.log = folder / "log"
        self.witness = Witness(folder / "witness")
        self._seconds = seconds
        self._tokens = count(first_token)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._submit, args=(number,), name=f"submitter-{number}", daemon=True)
            for number in range(n_threads)
        ]

    def start(self) -> Self:
        """Begin."""
        for each in self._threads:
            each.start()
        return self

    def stop(self, timeout_s: float = STUCK_AFTER_S) -> bool:
        """Submit no more, and wait for what was submitted; False if a submitter is stuck."""
        self._stop.set()
        until = time.monotonic() + timeout_s
        for each in self._threads:
            each.join(max(0.0, until - time.monotonic()))
        return not any(each.is_alive() for each in self._threads)

    def n_seen(self) -> int:
        """Outcomes that submitters saw so far."""
        return self.log.read_bytes().count(b"\nsaw ") if self.log.exists() else 0

    def n_refused(self) -> int:
        """Submissions that ended with an error so far."""
        return self.log.read_bytes().count(b"\nrefused ") if self.log.exists() else 0

    def _submit(self, number: int) -> None:
        kind = number % 3
        while not self._stop.is_set():
            tokens = [next(self._tokens) for _ in range(MAP_ITEMS if kind == 2 else 1)]
            once = "once" if kind == 1 else "again"
            line(str(self.log), "ask", once, *tokens)
            try:
                jids = self._ask(kind, tokens)
            except CloudException as exc:
                line(str(self.log), "refused", len(tokens), type(exc).__name__, " ".join(str(exc).split())[:300])
                if isinstance(exc, BackendClosed):
                    return
                self._stop.wait(REFUSED_PAUSE_S)
                continue
            line(str(self.log), "told", jids[0], *tokens)
            self._see(jids)

    def _ask(self, kind: int, tokens: list[int]) -> range:
        witness = str(self.witness.path)
        if kind == 2:
            return cloud.map(
                work, tokens, [witness] * len(tokens), [self._seconds] * len(tokens), _label=f"m{tokens[0]}"
            )
        jid = cloud.call(work, tokens[0], witness, self._seconds, _label=f"t{tokens[0]}", _restartable=kind != 1)
        return range(jid, jid + 1)

    def _see(self, jids: range) -> None:
        try:
            cloud.join(jids, ignore_errors=True)
            for jid in jids:
                line(str(self.log), "saw", jid, digest_of(jid))
        except CloudException as exc:
            line(str(self.log), "failed", jids[0], type(exc).__name__, str(exc).replace("\n", " ")[:300])


def digest_of(jid: int) -> str:
    """Of what the server answers for a final job: all of it, times and pid too."""
    _, _, _, raw = current_cloud().backend.outcomes([jid])[0]
    return sha256(bytes(raw)).hexdigest()


def check(load: Load, store: Path, *, refused_may_run: bool = True) -> Verdict:
    """Compare what was promised with what is there, once the faults are over.

    Args:
        load: Stopped.
        store: The jobs.sqlite3 of the workgroup.
        refused_may_run: A submission that ended with an error may have arrived.
    """
    found = Verdict()
    told: dict[int, int] = {}
    seen: dict[int, str] = {}
    asked: set[int] = set()
    once: set[int] = set()
    for text in load.log.read_text().splitlines():
        what, *words = text.split()
        if what == "ask":
            asked.update(map(int, words[1:]))
            once.update(map(int, words[1:]) if words[0] == "once" else ())
        elif what == "told":
            jid0, *tokens = map(int, words)
            for jid, token in enumerate(tokens, jid0):
                if jid in told:
                    found.double_submitted += [told[jid], token]
                told[jid] = token
        elif what == "saw":
            seen[int(words[0])] = words[1]
        elif what == "refused":
            found.n_refused += int(words[0])
    found.n_told, found.n_seen = len(told), len(seen)
    _check_answers(found, told, once, seen)
    _check_witness(found, load.witness, asked, once)
    _check_store(found, store, asked, set(told.values()), refused_may_run=refused_may_run)
    return found


def _check_answers(found: Verdict, told: dict[int, int], once: set[int], seen: dict[int, str]) -> None:
    backend = current_cloud().backend
    until = time.monotonic() + STUCK_AFTER_S
    for jid, token in told.items():
        try:
            unfinished = backend.wait([jid], max(0.0, until - time.monotonic()), stop_on_error=False)
        except JobNotFound:
            found.lost.append(jid)
            continue
        if unfinished:
            found.stuck.append(jid)
            continue
        if jid in seen and digest_of(jid) != seen[jid]:
            found.double_recorded.append(jid)
        problem = _problem(jid, token, may_be_lost=token in once)
        if problem:
            found.wrong.append((jid, problem))


def _problem(jid: int, token: int, *, may_be_lost: bool) -> str:
    skip, _, _, raw = current_cloud().backend.outcomes([jid])[0]
    outcome = Outcome(bytes(raw))
    if outcome.status == DONE:
        value = cloud.result(jid)
        return "" if value == expected(token) else f"{value} instead of {expected(token)}"
    text = (outcome.section(ERROR_TEXT) or b"").decode(errors="replace")
    lost = "lost" in text or "killed" in text.lower()
    if outcome.status in (ERROR, KILLED) and may_be_lost and lost:
        return ""
    return f"status {outcome.status}: {text}"


def _check_witness(found: Verdict, witness: Witness, asked: set[int], once: set[int]) -> None:
    starts = Counter(token for what, token, _, _ in witness.lines() if what == "start")
    for token, n in starts.items():
        assert token in asked
        if n > 1 and token in once:
            found.double_run.append(token)
        elif n > 1:
            found.n_repeated += n - 1


def _check_store(found: Verdict, store: Path, asked: set[int], told: set[int], *, refused_may_run: bool) -> None:
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        n_by_label = dict(connection.execute("SELECT label, count(*) FROM batch WHERE jid0 > 0 GROUP BY label"))
        segments = connection.execute(
            "SELECT b.jid0, b.n, s.start, s.n FROM segment s JOIN batch b ON b.id = s.batch ORDER BY b.id, s.start"
        ).fetchall()
    connection.close()
    for label, n in n_by_label.items():
        token = int(label[1:])
        if n > 1 or token not in asked or (token not in told and not refused_may_run):
            found.double_submitted.append(token)
    ends: dict[int, int] = {}
    for jid0, n, start, length in segments:
        if start < ends.get(jid0, 0) or start + length > n:
            found.double_recorded.append(jid0 + start)
        ends[jid0] = start + length


class Workgroup:
    """A server for one test, its only workgroup, and the module's verbs on it.

    Args:
        folder: A folder for data, log and witness.
        options: Further words of the command line.
        env: Of the server.
    """

    def __init__(self, folder: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.server = RunningServer(folder / "data", *options, env=env)
        self.random = Random(str(folder.name))

    def __enter__(self) -> Self:
        self.server.start()
        self.use()
        return self

    def use(self, url: str | None = None) -> None:
        """Let the module's verbs go to the server, or by way of a proxy."""
        cloud.setkey(self.server.api_key, self.server.api_secretkey, url or self.server.url)

    def __exit__(self, *_: object) -> None:
        current_cloud().close()
        if self.server.process is not None:
            self.server.kill(group=True)  # it would wait for the jobs that run

    def another_key(self) -> tuple[int, str]:
        """(number, secret) of a further key of the workgroup."""
        from cloud.resources.accounts import AccountStore

        accounts = AccountStore(str(self.server.data))
        try:
            key = accounts.create_key(accounts.list_users()[0].name)
        finally:
            accounts.close()
        assert key.api_secretkey is not None
        return key.api_key, key.api_secretkey

    @property
    def store(self) -> Path:
        """The file of the workgroup's jobs."""
        return next((self.server.data / "groups").glob("*/jobs.sqlite3"))

    @contextmanager
    def opened_store(self) -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
        """What asks the workgroup's file itself."""
        connection = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)
        try:
            yield lambda statement: connection.execute(statement).fetchall()
        finally:
            connection.close()

    def crash(self, *, group: bool = False) -> float:
        """kill -9 and start again on the same port; seconds until it was ready."""
        self.server.kill(group=group)
        began = time.monotonic()
        self.server.start()
        return time.monotonic() - began
