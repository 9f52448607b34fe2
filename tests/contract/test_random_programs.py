"""Random programs run on worker processes, in the simulator and on a server in lock-step: they end alike."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import cloud
import cloud.mp
from cloud.backends import open_backend
from cloud.backends.base import Backend
from cloud.client.cloud import Cloud
from cloud.current import process
from cloud.errors import CloudException, JobKilled, JobNotFound
from tests.backends import OPENERS, close_all
from tests.contract.jobs import Gate, eventually, note, notes
from tests.server.running import RunningServer

Jids = tuple[int, ...]
Pair = tuple[Jids, Jids, Jids]
"""The same jobs on worker processes, in the simulator and on a server."""

KINDS = ("value", "print", "raise", "chain", "group", "exit", "interrupt", "nest", "nest and fail", "unpicklable")
N_SLOTS = 2


def work(kind: str, n: int) -> Any:
    """One job of a random program; importable, so that all backends pickle it by reference."""
    match kind:
        case "print":
            print(f"out {n}")
            return [n]
        case "raise":
            raise KeyError(n)
        case "chain":
            try:
                work("raise", n)
            except KeyError as exc:
                raise ValueError("chained") from exc
        case "group":
            raise ExceptionGroup(f"group {n}", [KeyError(n), OSError(n, "text")])
        case "exit":
            raise SystemExit(n)
        case "interrupt":
            raise KeyboardInterrupt(n)
        case "nest":
            return sum(cloud.result(cloud.map(abs, range(n % 4))))
        case "nest and fail":
            return cloud.result(cloud.call(work, "chain", n))
        case "unpicklable":
            return (each for each in range(n))
    return {"n": n, "twice": (n, n)}


def fail_first(log: str, key: str, n_failures: int) -> str:
    """Fail the first attempts at ``key``; the file counts."""
    note(log, key)
    attempt = notes(log).count(key)
    if attempt <= n_failures:
        print(f"fails {attempt}")
        raise ValueError(f"attempt {attempt}")
    return f"attempt {attempt}"


class Programs(RuleBasedStateMachine):
    """Each rule does the same to all three, and what it can see at once must be equal.

    What waits for the job that is held is not compared until that is killed or let go.
    """

    submitted = Bundle("submitted")

    def __init__(self, folder: Path, server: RunningServer) -> None:
        super().__init__()
        self._folder = folder
        self._server = server
        self._alive: set[Pair] = set()
        self._held: Pair | None = None
        self._gates: list[Gate] = []
        self._waiting: set[Pair] = set()
        self._n_lost = 0

    @initialize()
    def begin(self) -> None:
        close_all()
        cloud.start_simulator(force_restart=True, num_procs=N_SLOTS)
        self._remote = remote_cloud(*self._server.new_group(max_slots=N_SLOTS), self._server.url)
        self.all: tuple[Any, ...] = (cloud.mp, cloud, self._remote)

    def _own_folders(self) -> list[str]:
        return [tempfile.mkdtemp(dir=self._folder) for _ in self.all]

    def _submit(self, submit: Any) -> Pair:
        pair = tuple(_jids(submit(api, index)) for index, api in enumerate(self.all))
        assert len({len(jids) for jids in pair}) == 1
        self._alive.add(pair)
        return pair

    def _usable(self, pairs: list[Pair]) -> list[Pair]:
        return [pair for pair in pairs if pair in self._alive]

    def _blocked(self, pairs: list[Pair]) -> bool:
        return any(pair in self._waiting or pair == self._held for pair in pairs)

    # --- submitting ---------------------------------------------------------------------------------------------------

    @rule(target=submitted, kind=st.sampled_from(KINDS), n=st.integers(0, 9), priority=st.integers(3, 7))
    def call(self, kind: str, n: int, priority: int) -> Pair:
        return self._submit(lambda api, _: api.call(work, kind, n, _priority=priority, _label=kind))

    @rule(target=submitted, kinds=st.lists(st.sampled_from(KINDS), max_size=6), priority=st.integers(3, 7))
    def map(self, kinds: list[str], priority: int) -> Any:
        if not kinds:
            assert [list(api.map(work, [], [])) for api in self.all] == [[], [], []]
            return multiple()
        return self._submit(lambda api, _: api.map(work, kinds, range(len(kinds)), _priority=priority))

    @rule(target=submitted, n=st.integers(1, 400))
    def map_of_small_items(self, n: int) -> Pair:
        return self._submit(lambda api, _: api.map(divmod, range(-n, n, 2), [1, 2, 3, 0, 5] * n))

    @rule(target=submitted, n_failures=st.integers(0, 3), retries=st.integers(0, 3), n=st.integers(1, 3))
    def retried(self, n_failures: int, retries: int, n: int) -> Pair:
        logs = [f"{folder}/log" for folder in self._own_folders()]
        keys = [str(key) for key in range(n)]
        return self._submit(
            lambda api, index: api.map(
                fail_first, [logs[index]] * n, keys, [n_failures] * n, _retries=retries, _retry_delay=0
            )
        )

    @rule(
        target=submitted,
        before=st.lists(submitted, min_size=1, max_size=3),
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
        ignore=st.booleans(),
    )
    def dependent(self, before: list[Pair], kinds: list[str], ignore: bool) -> Pair:
        before = self._usable(before)
        options = {"_depends_on_errors": "ignore"} if ignore else {}
        made = self._submit(
            lambda api, index: api.map(
                work, kinds, range(len(kinds)), _depends_on=[jid for pair in before for jid in pair[index]], **options
            )
        )
        if self._blocked(before):
            self._waiting.add(made)
        return made

    # --- ending -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self._held is None)
    @rule(target=submitted)
    def hold(self) -> Pair:
        self._gates = [Gate(Path(folder)) for folder in self._own_folders()]
        self._n_lost = 0
        self._held = self._submit(lambda api, index: api.call(self._gates[index].hold, "let go"))
        for gate in self._gates:
            gate.await_begun()
        return self._held

    @precondition(lambda self: self._held is not None)
    @rule(kill=st.booleans())
    def end_what_is_held(self, kill: bool) -> None:
        assert self._held is not None
        if kill:
            for api, jids in zip(self.all, self._held, strict=True):
                api.kill(jids)
        for gate in self._gates:
            gate.open()
        held, self._held = self._held, None
        self._waiting.clear()
        self._compare(held)

    @rule(pair=submitted)
    def kill_what_waits(self, pair: Pair) -> None:
        # Whether a kill meets a job that may run is a matter of moments; one that waits for what is held cannot.
        if pair in self._waiting and pair in self._alive:
            before = [api.status(jids) for api, jids in zip(self.all, pair, strict=True)]
            assert before[0] == before[1] == before[2]
            for api, jids in zip(self.all, pair, strict=True):
                api.kill(jids)
            self._compare(pair)

    @rule(pair=consumes(submitted))
    def delete(self, pair: Pair) -> None:
        if pair not in self._alive or self._blocked([pair]):
            return
        self._compare(pair)
        self._alive.discard(pair)
        for api, jids in zip(self.all, pair, strict=True):
            api.delete(jids)
            for ask in (api.status, api.join, api.result, api.info, api.kill, api.delete):
                try:
                    ask(jids)
                except JobNotFound as exc:
                    assert exc.jid == jids[0]
                else:
                    raise AssertionError(f"{ask.__name__} knows {jids}")

    # --- looking ------------------------------------------------------------------------------------------------------

    @rule(pair=submitted)
    def join(self, pair: Pair) -> None:
        if pair in self._alive and not self._blocked([pair]):
            self._compare(pair)

    @rule()
    def find(self) -> None:
        for pair in self._alive:
            if not self._blocked([pair]):
                self._compare(pair)
        found = []
        for index, api in enumerate(self.all):
            # Jobs of jobs are none of this program's.
            mine = {jid: place for place, jid in enumerate(sorted(jid for pair in self._alive for jid in pair[index]))}
            asked = [api.find(status=status) for status in ("waiting", "done", "error", "killed", "stalled")]
            asked += [api.find(label=kind) for kind in KINDS]
            found.append([[mine[jid] for jid in jids if jid in mine] for jids in asked])
        assert found[0] == found[1] == found[2]

    # --- faults of the server, which nobody may notice ------------------------------------------------------------------

    def _quiet(self) -> None:
        # What is being retried counts its attempts in a file: an attempt that a fault repeats would be counted, too.
        for pair in self._alive:
            if not self._blocked([pair]):
                self._remote.join(pair[-1], ignore_errors=True, timeout=60)

    @rule()
    def restart_the_server(self) -> None:
        self._quiet()
        self._server.kill()
        self._server.start()

    # A job whose worker is lost three times is not tried again.
    @precondition(lambda self: self._held is None or self._n_lost < 2)
    @rule()
    def kill_its_workers(self) -> None:
        self._quiet()
        self._n_lost += 1
        assert self._server.process is not None
        for template in psutil.Process(self._server.process.pid).children():
            for worker in template.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()

    def _compare(self, pair: Pair) -> None:
        for api, jids in zip(self.all, pair, strict=True):
            api.join(jids, ignore_errors=True, timeout=60)
        ends = [_ends_of(api, jids) for api, jids in zip(self.all, pair, strict=True)]
        assert ends[0] == ends[1]
        assert ends[0] == [_as_if_once(end) for end in ends[2]]

    def teardown(self) -> None:
        for gate in self._gates:
            gate.open()
        self._remote.kill()
        self._remote.close()
        close_all()


def _jids(submitted: int | range) -> Jids:
    return (submitted,) if isinstance(submitted, int) else tuple(submitted)


def remote_cloud(key: int, secret: str, url: str) -> Cloud:
    """A Cloud over a server, beside those of this process."""

    def opener() -> Backend:
        return open_backend("http", process.settings, credentials=(key, secret, url))

    return Cloud("a server", opener, lambda backend: None, lambda: 0)


def _as_if_once(end: tuple[Any, ...]) -> tuple[Any, ...]:
    """How it ended; the attempts that a fault of the server cost are not the job's."""
    status, value, info = end
    return status, value, {**info, "attempt": 1} if info["function"].endswith("hold") else info


def _ends_of(api: Any, jids: Jids) -> list[tuple[Any, ...]]:
    values = api.result(jids, ignore_errors=True)
    infos = api.info(jids, ["stdout", "stderr", "attempt", "label", "depth", "function"])
    return [
        (status, _comparable(value, jid), infos[jid])
        for jid, status, value in zip(jids, api.status(jids), values, strict=True)
    ]


def _comparable(value: Any, jid: int) -> Any:
    if isinstance(value, CloudException):
        # Whether a killed job had begun shows in its text.
        text = "" if isinstance(value, JobKilled) else _without_addresses(value.parameter)
        assert value.jid == jid
        return type(value), value.status, text, _chain(value.__cause__)
    return value


def _without_addresses(text: str) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", " at an address", text)
    # On a server the program's modules are in a folder of its own.
    text = re.sub(r'File "[^"]*/tests/', 'File "tests/', text)
    return re.sub(r"Job \d+:", "Job n:", text)


def _chain(exc: BaseException | None) -> list[tuple[type, str]]:
    if exc is None:
        return []
    return [(type(exc), _without_addresses(repr(exc.args))), *_chain(exc.__cause__ or exc.__context__)]


def test_random_programs_end_alike_everywhere(tmp_path: Path, closed_after: None) -> None:
    with RunningServer(tmp_path / "server", "--workers", str(N_SLOTS)) as server:
        run_state_machine_as_test(
            lambda: Programs(tmp_path, server),
            settings=settings(
                max_examples=6,
                stateful_step_count=20,
                # Shrinking what starts servers would take longer than reading it.
                phases=(Phase.explicit, Phase.reuse, Phase.generate),
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )


@given(
    jobs=st.lists(st.tuples(st.integers(-3, 12), st.integers(1, 4)), min_size=1, max_size=8),
    killed=st.sets(st.integers(0, 7)),
)
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_priorities_decide_the_order_of_random_programs(
    tmp_path_factory: Any, configure: Any, closed_after: None, jobs: list[tuple[int, int]], killed: set[int]
) -> None:
    configure(num_procs=1)
    orders = []
    for name, opener in OPENERS.items():
        folder = tmp_path_factory.mktemp(name)
        api, gate, log = opener(), Gate(folder), str(folder / "log")
        api.call(gate.hold)
        gate.await_begun()
        submitted = [
            api.map(note, [log] * n, [f"{place}.{item}" for item in range(n)], _priority=priority)
            for place, (priority, n) in enumerate(jobs)
        ]
        api.kill([submitted[place] for place in killed if place < len(jobs)])
        gate.open()
        api.join(submitted, ignore_errors=True, timeout=30)
        orders.append(notes(log))
        eventually(lambda api=api: not api.find(status=("queued", "processing")))
        api.close()
    places = sorted((place for place in range(len(jobs)) if place not in killed), key=lambda place: jobs[place][0])
    assert orders[0] == [f"{place}.{item}" for place in places for item in range(jobs[place][1])]
    assert all(order == orders[0] for order in orders)
