"""Random programs run on worker processes and in the simulator in lock-step: they end alike."""

from __future__ import annotations

import time
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import cloud
from cloud import current

SETTINGS = settings(
    max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)

#: What a job does, by name; importable, so that both backends pickle it by reference.
KINDS = ("value", "print", "raise", "exit", "nest", "unpicklable")


def work(kind: str, n: int) -> Any:
    """One job of a random program."""
    if kind == "print":
        print(f"out {n}")
        return [n]
    if kind == "raise":
        raise KeyError(n)
    if kind == "exit":
        raise SystemExit(n)
    if kind == "nest":
        return sum(cloud.result(cloud.map(abs, range(n % 4))))
    if kind == "unpicklable":
        return (each for each in range(n))
    return {"n": n, "twice": (n, n)}


def sleep_long() -> None:
    """Runs until it is killed."""
    time.sleep(3600)


class Programs(RuleBasedStateMachine):
    """Each rule does the same to both; ``Bundle`` holds pairs of jids."""

    jobs = Bundle("jobs")

    @initialize()
    def begin(self) -> None:
        current.process.cloud.close()
        current.process.mp.close()
        cloud.start_simulator(force_restart=True, num_procs=2)
        self.both = (current.process.mp, current.process.cloud)
        self.deleted: set[Any] = set()

    def _each(self, function: Any) -> tuple[Any, ...]:
        return tuple(function(each, index) for index, each in enumerate(self.both))

    @rule(target=jobs, kind=st.sampled_from(KINDS), n=st.integers(0, 9), priority=st.integers(3, 7))
    def call(self, kind: str, n: int, priority: int) -> tuple[int, int]:
        return self._each(lambda api, _: api.call(work, kind, n, _priority=priority))  # type: ignore[return-value]

    @rule(target=jobs, kind=st.sampled_from(KINDS), n=st.integers(1, 9))
    def retried(self, kind: str, n: int) -> tuple[int, int]:
        return self._each(lambda api, _: api.call(work, kind, n, _retries=1, _retry_delay=0))  # type: ignore[return-value]

    @rule(target=jobs, before=jobs, n=st.integers(0, 9), ignore=st.booleans())
    def dependent(self, before: tuple[int, int], n: int, ignore: bool) -> tuple[int, int]:
        if before in self.deleted:
            return before
        options = {"_depends_on_errors": "ignore"} if ignore else {}
        return self._each(lambda api, index: api.call(work, "value", n, _depends_on=before[index], **options))  # type: ignore[return-value]

    @rule(target=jobs, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    def mapped(self, kinds: list[str]) -> tuple[Any, Any]:
        return self._each(lambda api, _: api.map(work, kinds, range(len(kinds)))[-1])  # type: ignore[return-value]

    @rule(target=jobs)
    def killed(self) -> tuple[int, int]:
        pair = self._each(lambda api, _: api.call(sleep_long))
        self._each(lambda api, index: api.kill(pair[index]))
        return pair  # type: ignore[return-value]

    @rule(pair=jobs)
    def compare(self, pair: tuple[int, int]) -> None:
        if pair in self.deleted:
            return
        self._each(lambda api, index: api.join(pair[index], ignore_errors=True, timeout=60))
        ends = self._each(lambda api, index: _end_of(api, pair[index]))
        assert ends[0] == ends[1]

    @rule(pair=jobs)
    def delete(self, pair: tuple[int, int]) -> None:
        if pair in self.deleted:
            return
        self._each(lambda api, index: api.join(pair[index], ignore_errors=True, timeout=60))
        self._each(lambda api, index: api.delete(pair[index]))
        self.deleted.add(pair)
        for api, jid in zip(self.both, pair, strict=True):
            try:
                api.status(jid)
            except cloud.errors.JobNotFound:
                continue
            raise AssertionError(f"{jid} is still known")

    def teardown(self) -> None:
        current.process.cloud.close()
        current.process.mp.close()


def _end_of(api: Any, jid: int) -> tuple[Any, ...]:
    (value,) = api.result([jid], ignore_errors=True)
    info = api.info(jid, ["stdout", "stderr", "attempt"])[jid]
    if isinstance(value, cloud.errors.JobKilled):
        value = type(value), value.status  # whether it had begun is a matter of moments
    elif isinstance(value, cloud.CloudException):
        cause = value.__cause__
        last_line = str(value.parameter).splitlines()[-1].partition(" at 0x")[0]
        value = (
            type(value),
            value.status,
            last_line,
            type(cause),
            repr(getattr(cause, "args", None)).partition(" at ")[0],
        )
    return api.status(jid), value, info


def test_random_programs_end_alike_on_worker_processes_and_in_the_simulator() -> None:
    run_state_machine_as_test(Programs, settings=SETTINGS)
