"""How a failed job is told: text, fields, and its own exception as cause, with all that hangs on it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from cloud.errors import CloudException, JobFailed, JobNotFound, WorkerLost
from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import PROCESSES_ONLY
from tests.contract.jobs import SilentError, note, notes


def failure_of(api: ModuleType, function: Callable[..., Any], *args: Any, **kwargs: Any) -> JobFailed:
    with pytest.raises(CloudException) as caught:
        api.result(api.call(function, *args, **kwargs), timeout=30)
    assert type(caught.value) is JobFailed
    return caught.value


def cause_of(api: ModuleType, function: Callable[..., Any], *args: Any) -> BaseException:
    cause = failure_of(api, function, *args).__cause__
    assert cause is not None
    return cause


def test_fields_and_text(api: ModuleType) -> None:
    error = failure_of(api, sample.boom, "what happened")
    assert (error.jid, error.status) == (1, "error")
    text = error.parameter
    assert str(error) == f"Job 1: {text}"
    assert text.startswith("Traceback (most recent call last):\n")
    assert text.endswith("ValueError: what happened")
    assert text.count("File ") == 1
    assert 'sample_functions.py", line' in text
    assert api.info(1, "exception") == {1: {"exception": text}}


def test_the_traceback_shows_the_user_s_frames_alone(api: ModuleType) -> None:
    def outer() -> None:
        sample.boom()

    for error in (failure_of(api, outer), failure_of(api, lambda: outer()), failure_of(api, int, "x")):
        assert "/engine/" not in error.parameter
        assert "run_call" not in error.parameter
    jid = api.map(lambda x: outer(), [1, 2])[1]
    with pytest.raises(JobFailed, match=r"in outer\n(.|\n)*in boom\n") as caught:
        api.result(jid)
    assert "/engine/" not in caught.value.parameter


ERRORS = [
    ValueError(),
    ValueError("one", 2, None),
    KeyError("k"),
    OSError(2, "No such file", "name"),
    FileNotFoundError(2, "gone"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"),
    SyntaxError("bad", ("file", 1, 2, "text")),
    ImportError("no", name="n", path="p"),
    StopIteration(5),
    StopAsyncIteration(),
    MemoryError(),
    RecursionError("deep"),
    asyncio.CancelledError(),
    CloudException("of the user", jid=77),
    JobNotFound("of the user", jid=78),
]


def test_the_cause_is_the_exception_that_was_raised(api: ModuleType) -> None:
    for error, jid in [
        *((error, api.call(jobs.raise_this, error)) for error in ERRORS),
        *zip(ERRORS, api.map(jobs.raise_this, ERRORS), strict=True),
    ]:
        for get in (
            lambda jid=jid: api.result(jid),
            lambda jid=jid: api.join([jid]),
            lambda jid=jid: next(api.iresult(jid)),
            lambda jid=jid: asyncio.run(api.aresult(jid)),
        ):
            with pytest.raises(JobFailed) as caught:
                get()
            cause = caught.value.__cause__
            assert type(cause) is type(error)
            assert cause.args == error.args
            assert str(cause) == str(error)
            assert vars(cause) == vars(error)
            assert caught.value.jid == jid


def test_classes_of_the_user_s_own(api: ModuleType) -> None:
    class Mine(Exception):
        def __init__(self, code: int, *, detail: str) -> None:
            super().__init__(f"code {code}")
            self.code, self.detail = code, detail

        def __reduce__(self) -> tuple[Any, ...]:
            return made, (self.code, self.detail)

    def made(code: int, detail: str) -> Mine:
        return Mine(code, detail=detail)

    def fail() -> None:
        raise Mine(3, detail="d")

    cause = cause_of(api, fail)
    assert isinstance(cause, Mine)
    assert (cause.code, cause.detail) == (3, "d")


def test_causes_contexts_and_notes(api: ModuleType) -> None:
    def fail() -> None:
        try:
            try:
                raise KeyError("first")
            except KeyError as exc:
                exc.add_note("noted on the first")
                raise ValueError("second")  # noqa: B904 - an implicit context is what this is about
        except ValueError as exc:
            error = RuntimeError("third")
            error.add_note("one")
            error.add_note("two")
            raise error from exc

    third = cause_of(api, fail)
    assert (type(third), third.__notes__) == (RuntimeError, ["one", "two"])
    second = third.__cause__
    assert (type(second), str(second)) == (ValueError, "second")
    first = second.__context__
    assert (type(first), first.args, first.__notes__) == (KeyError, ("first",), ["noted on the first"])
    assert second.__cause__ is None
    assert (third.__suppress_context__, second.__suppress_context__) == (True, False)
    text = api.info(1, "exception")[1]["exception"]
    for part in ("first", "second", "third", "one", "two", "noted on the first", "direct cause", "During handling"):
        assert part in text


def test_a_suppressed_context_stays_suppressed(api: ModuleType) -> None:
    def fail() -> None:
        try:
            raise KeyError("hidden")
        except KeyError:
            raise ValueError("shown") from None

    error = failure_of(api, fail)
    assert error.__cause__.__suppress_context__ is True
    assert error.__cause__.__cause__ is None
    assert "hidden" not in error.parameter


def test_groups_keep_their_members_and_what_hangs_on_them(api: ModuleType) -> None:
    def fail() -> None:
        inner = ValueError("inner")
        inner.add_note("noted")
        inner.__cause__ = KeyError("reason")
        raise ExceptionGroup("outer", [inner, ExceptionGroup("nested", [TypeError("deep")])]) from OSError("why")

    group = cause_of(api, fail)
    assert isinstance(group, ExceptionGroup)
    assert group.message == "outer"
    assert repr(group.exceptions) == "(ValueError('inner'), ExceptionGroup('nested', [TypeError('deep')]))"
    assert group.exceptions[0].__notes__ == ["noted"]
    assert repr(group.exceptions[0].__cause__) == "KeyError('reason')"
    assert repr(group.__cause__) == "OSError('why')"
    assert [type(each) for each in group.split(TypeError)] == [ExceptionGroup] * 2


def test_an_exception_that_goes_round_in_a_circle(api: ModuleType) -> None:
    def fail() -> None:
        first, second = ValueError("first"), KeyError("second")
        first.__cause__, second.__cause__ = second, first
        raise first

    cause = cause_of(api, fail)
    assert repr(cause) == "ValueError('first')"
    assert repr(cause.__cause__) == "KeyError('second')"


def test_one_that_cannot_be_rebuilt_costs_only_its_own_place(api: ModuleType) -> None:
    def fail() -> None:
        try:
            sample.raise_unrebuildable()
        except Exception as exc:
            raise ValueError("outer") from exc

    error = failure_of(api, fail)
    assert repr(error.__cause__) == "ValueError('outer')"
    assert error.__cause__.__cause__ is None
    assert "CannotRebuild: cannot be rebuilt" in error.parameter


def test_a_group_with_a_member_that_cannot_be_rebuilt_is_told_as_text(api: ModuleType) -> None:
    def fail() -> None:
        raise ExceptionGroup("several", [ValueError("fine"), sample.CannotRebuild("cannot be rebuilt", 7)])

    error = failure_of(api, fail)
    assert error.__cause__ is None
    assert "ValueError: fine" in error.parameter
    assert "CannotRebuild: cannot be rebuilt" in error.parameter


def test_an_exception_whose_text_cannot_be_had(api: ModuleType) -> None:
    error = failure_of(api, jobs.raise_this, SilentError())
    assert "SilentError" in error.parameter
    assert isinstance(error.__cause__, SilentError)


def test_each_look_gives_a_new_cause(api: ModuleType) -> None:
    jid = api.call(sample.chained)
    first, second = api.result([jid, jid], ignore_errors=True)
    first.__cause__.add_note("of the first")
    assert second.__cause__.__notes__ == ["a note"]


def test_what_runs_out_is_an_error_of_its_job(api: ModuleType) -> None:
    def endless(n: int) -> int:
        return endless(n + 1) + 1

    def nested_deeply() -> list[Any]:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        return value

    assert isinstance(cause_of(api, endless, 0), RecursionError)
    assert "RecursionError" in failure_of(api, nested_deeply).parameter
    assert api.result(api.call(sample.square, 3)) == 9


def test_returning_an_exception_is_no_failure(api: ModuleType) -> None:
    def returned() -> list[Exception]:
        return [ValueError("a value"), CloudException("a value", jid=1, status="error")]

    jid = api.call(returned)
    assert repr(api.result(jid)[0]) == "ValueError('a value')"
    single = api.call(lambda: CloudException("a value", jid=2, status="error"))
    for found in (
        api.result(single),
        api.result([single])[0],
        next(api.iresult(single)),
        asyncio.run(api.aresult(single)),
    ):
        assert str(found) == "Job 2: a value"
    assert api.status([jid, single]) == ["done", "done"]


# In the simulator the coroutine that nobody awaits is this process's.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_generator_or_coroutine_is_no_result(api: ModuleType) -> None:
    def generator() -> Any:
        yield 1

    async def coroutine() -> int:
        return 1

    for function in (generator, coroutine):
        error = failure_of(api, function)
        assert "the job's result cannot be pickled" in error.parameter
        assert function.__name__ in error.parameter
    gc.collect()


@PROCESSES_ONLY
@pytest.mark.parametrize(("signal_name", "attempts"), [("SIGSEGV", 1), ("SIGABRT", 1), ("SIGKILL", 3), ("SIGTERM", 3)])
def test_a_worker_that_is_lost_is_told(api: ModuleType, tmp_path: Any, signal_name: str, attempts: int) -> None:
    import signal

    log = str(tmp_path / "log")

    def die(number: int) -> None:
        note(log)
        print("so far", flush=True)
        sample.die_by(number)

    number = int(getattr(signal, signal_name))
    restartable, once = api.call(die, number), api.call(die, number, _restartable=False)
    for jid in (restartable, once):
        with pytest.raises(WorkerLost, match=rf"was killed by {signal_name}") as caught:
            api.join(jid, timeout=10)
        assert (caught.value.exitcode, caught.value.status, caught.value.jid) == (-number, "error", jid)
        assert caught.value.__cause__ is None
        assert api.info(jid, "stdout")[jid]["stdout"] == "so far\n"
    assert api.info([restartable, once], "attempt") == {restartable: {"attempt": attempts}, once: {"attempt": 1}}
    assert len(notes(log)) == attempts + 1


@PROCESSES_ONLY
def test_a_restartable_job_survives_a_lost_worker(api: ModuleType, tmp_path: Any) -> None:
    log = str(tmp_path / "log")

    def die_once(value: int) -> int:
        note(log, str(value))
        if notes(log).count(str(value)) == 1:
            sample.die_by()
        return value

    assert api.result(api.call(die_once, 1)) == 1
    assert api.result(api.map(die_once, range(2, 8))) == list(range(2, 8))
    assert all(notes(log).count(each) >= 2 for each in "1234567")
