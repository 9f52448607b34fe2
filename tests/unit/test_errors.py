"""What the exceptions say, carry and are."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.errors import (
    AccountError,
    BackendClosed,
    BackendError,
    CloudException,
    CloudTimeoutError,
    ConfigurationError,
    CronError,
    CronNotFound,
    InvalidSchedule,
    JobFailed,
    JobKilled,
    JobNotFound,
    JobStalled,
    KilledException,
    PayloadTooLarge,
    SerializationError,
    StoredFileCorrupt,
    StoredFileError,
    StoredFileNotFound,
    UnsupportedOperation,
    WorkerLost,
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (CloudException("what happened"), "what happened"),
        (CloudException("what happened", jid=7), "Job 7: what happened"),
        (CloudException("what happened", jid=0), "Job 0: what happened"),
        (CloudException("what happened", status=500), "Status 500: what happened"),
        (CloudException("what happened", 7, "error"), "Job 7: what happened"),
        (CloudException("what happened", hint="Do this."), "what happened\nTIP: Do this."),
        (CloudException("what happened", 7, hint="Do this."), "Job 7: what happened\nTIP: Do this."),
        (CloudException(), ""),
        (CloudException(["a", 1]), "['a', 1]"),
        (CloudTimeoutError(), "Timed out"),
        (CloudTimeoutError("cloud.join timed out", [11]), "Job [11]: cloud.join timed out [11]"),
        (
            JobNotFound("Does not exist or was purged from cache", 9999),
            "Job 9999: Does not exist or was purged from cache",
        ),
        (
            JobStalled("Could not start due to dependency erroring", 3, "stalled"),
            "Job 3: Could not start due to dependency erroring",
        ),
        (JobKilled("Killed", 3, "killed"), "Job 3: Killed"),
        (ConfigurationError("one problem"), "one problem"),
        (ConfigurationError(["one", "two"]), "one\ntwo"),
        (StoredFileNotFound("no file 'a' is stored", "a"), "no file 'a' is stored"),
    ],
)
def test_text(error: CloudException, text: str) -> None:
    assert str(error) == text


def test_a_traceback_shows_the_class_and_the_text() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from cloud.errors import JobFailed; raise JobFailed('the remote traceback', 7, 'error')",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "cloud.errors.JobFailed: Job 7: the remote traceback"


def test_fields_are_given_in_picloud_s_order() -> None:
    error = CloudException("what happened", 7, "error", True, "Do this.")
    assert (error.parameter, error.jid, error.status, error.retry, error.hint) == (
        "what happened",
        7,
        "error",
        True,
        "Do this.",
    )
    assert error.args == ("what happened",)


def test_fields_have_defaults() -> None:
    error = CloudException("what happened")
    assert (error.jid, error.status, error.retry, error.hint) == (None, None, False, None)
    assert CloudTimeoutError().retry is True
    assert WorkerLost("gone").exitcode is None


def test_repr_shows_what_tells_errors_apart() -> None:
    assert repr(JobFailed("text", 7, "error")) == "JobFailed('text', jid=7, status='error')"


@pytest.mark.parametrize(
    ("cls", "caught_as"),
    [
        (CloudTimeoutError, (CloudException, TimeoutError)),
        (JobFailed, (CloudException,)),
        (WorkerLost, (JobFailed,)),
        (JobKilled, (CloudException,)),
        (JobStalled, (CloudException,)),
        (JobNotFound, (CloudException, LookupError)),
        (SerializationError, (CloudException, pickle.PicklingError)),
        (PayloadTooLarge, (SerializationError,)),
        (ConfigurationError, (CloudException, ValueError)),
        (BackendClosed, (BackendError,)),
        (UnsupportedOperation, (BackendError,)),
        (StoredFileNotFound, (StoredFileError, LookupError)),
        (StoredFileCorrupt, (StoredFileError,)),
        (CronNotFound, (CronError, LookupError)),
        (InvalidSchedule, (CronError, ValueError)),
        (AccountError, (CloudException,)),
        (KilledException, (BaseException,)),
    ],
)
def test_an_error_is_caught_as(cls: type[BaseException], caught_as: tuple[type[BaseException], ...]) -> None:
    for base in caught_as:
        assert issubclass(cls, base)


def test_a_kill_is_no_exception_of_the_job_s_own() -> None:
    assert not issubclass(KilledException, Exception)


def test_a_timeout_is_no_failure_of_a_job() -> None:
    assert not issubclass(CloudTimeoutError, JobFailed)


def test_a_configuration_error_keeps_its_problems() -> None:
    assert ConfigurationError("one").problems == ["one"]
    assert ConfigurationError(("one", "two")).problems == ["one", "two"]


jids = st.none() | st.integers(0, 2**63) | st.lists(st.integers(0, 2**63))
statuses = st.none() | st.sampled_from(["error", "killed", "stalled"]) | st.integers(100, 599)


@given(
    st.text(),
    jids,
    statuses,
    st.booleans(),
    st.none() | st.text(),
    st.sampled_from([CloudException, CloudTimeoutError, JobFailed]),
)
def test_pickling_and_copying_change_nothing(
    value: str, jid: Any, status: Any, retry: bool, hint: str | None, cls: type[CloudException]
) -> None:
    error = cls(value, jid, status, retry, hint)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is cls
        assert vars(other) == vars(error)
        assert other.args == error.args
        assert str(other) == str(error)


class Mine(CloudException):
    """A user's subclass whose constructor is its own."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}", jid=5)
        self.code = code


def test_a_subclass_with_another_constructor_travels() -> None:
    other = pickle.loads(pickle.dumps(Mine(42)))
    assert type(other) is Mine
    assert (other.code, other.jid, str(other)) == (42, 5, "Job 5: code 42")


def test_an_error_about_a_job_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="Cloud"):
        JobFailed("the remote traceback", 7, "error")
        CloudException("about no job")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("Cloud", "Job 7: the remote traceback")
    ]


def test_a_raised_error_keeps_its_cause_for_the_reader() -> None:
    with pytest.raises(JobFailed) as caught:
        raise JobFailed("the remote traceback", 7, "error") from ValueError("boom")
    assert isinstance(caught.value.__cause__, ValueError)
