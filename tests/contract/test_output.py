"""What jobs print: each job's own, from whatever level, also while it runs, and the last part of it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from tests import sample_functions as sample
from tests.contract import jobs
from tests.contract.conftest import CHILDREN_ONLY, PROCESSES_ONLY
from tests.contract.jobs import Gate, eventually


def output_of(api: ModuleType, jid: int) -> tuple[str, str]:
    api.join(jid, ignore_errors=True)
    found = api.info(jid, ["stdout", "stderr"])[jid]
    return found["stdout"], found["stderr"]


def test_every_way_of_printing(api: ModuleType) -> None:
    def job() -> None:
        print("a", "b", sep="-", end="|")
        print("ünïcode \u2603", file=sys.stdout)
        sys.stdout.write("no newline")
        sys.stderr.writelines(["x\n", "y"])
        print("flushed", file=sys.stderr, flush=True)

    expected = ("a-b|ünïcode \u2603\nno newline", "x\nyflushed\n")
    for jid in (api.call(job), api.map(lambda i: job(), range(3))[1]):
        assert output_of(api, jid) == expected


def test_nothing_goes_to_the_program_s_own_output(api: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    output_of(api, api.call(sample.print_both, "of a job", "of a job"))
    print("of the program")
    assert capfd.readouterr() == ("of the program\n", "")


def test_output_ends_with_its_job(api: ModuleType, one_slot: None) -> None:
    jids = [api.call(jobs.show, str(i)) if i % 2 else api.call(sample.nothing) for i in range(6)]
    assert [output_of(api, jid)[0] for jid in jids] == ["", "1\n", "", "3\n", "", "5\n"]
    mapped = api.map(lambda i: print(i, end="") if i % 3 else None, range(12))
    assert [output_of(api, jid)[0] for jid in mapped] == [str(i) if i % 3 else "" for i in range(12)]


def test_a_failed_and_a_killed_job_keep_theirs(api: ModuleType, gate: Gate) -> None:
    def fail() -> None:
        print("before", file=sys.stderr)
        raise ValueError

    def hold() -> None:
        print("begun")
        try:
            gate.hold()
        finally:
            print("cleaned up")

    failed, killed = api.call(fail), api.call(hold)
    gate.await_begun()
    api.kill(killed)
    assert output_of(api, failed) == ("", "before\n")
    assert output_of(api, killed) == ("begun\ncleaned up\n", "")


def test_it_grows_while_the_job_runs(api: ModuleType, gate: Gate) -> None:
    def job() -> None:
        print("first")
        gate.hold()
        print("second")

    jid = api.call(job)
    gate.await_begun()
    assert api.info(jid, "stdout") == {jid: {"stdout": "first\n"}}
    gate.open()
    assert output_of(api, jid) == ("first\nsecond\n", "")


@pytest.mark.parametrize("limit", [None, 10, 4096])
def test_the_last_part_is_kept(api: ModuleType, configure: Callable[..., None], gate: Gate, limit: int | None) -> None:
    if limit is not None:
        configure(output_limit_bytes=limit)
    n = limit or 64_000

    def job() -> None:
        sys.stderr.write("e" * (n - 2) + "\n")
        jobs.show_many(30_000)
        gate.hold()

    jid = api.call(job)
    gate.await_begun()
    expected = "".join(f"{i:07d}\n" for i in range(30_000))[-n:], "e" * (n - 2) + "\n"
    found = api.info(jid, ["stdout", "stderr"])[jid]
    assert (found["stdout"], found["stderr"]) == expected
    gate.open()
    assert output_of(api, jid) == expected


def test_a_limit_in_the_middle_of_a_character_does_no_harm(api: ModuleType, configure: Callable[..., None]) -> None:
    configure(output_limit_bytes=4)
    assert output_of(api, api.call(print, "☃☃", end=""))[0].endswith("☃")


def test_output_of_nested_jobs_is_their_own(api: ModuleType) -> None:
    def parent() -> int:
        import cloud

        print("parent before")
        child = cloud.call(jobs.show, "child")
        cloud.join(child)
        print("parent after")
        return child

    jid = api.call(parent)
    child = api.result(jid)
    assert output_of(api, jid) == ("parent before\nparent after\n", "")
    assert output_of(api, child) == ("child\n", "")


def test_a_job_may_put_another_stream_in_place(api: ModuleType, one_slot: None) -> None:
    def job() -> str:
        import contextlib
        import io

        print("captured")
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            print("kept by the job")
        sys.stdout = io.StringIO()
        return stream.getvalue()

    jid = api.call(job)
    assert api.result(jid) == "kept by the job\n"
    assert output_of(api, jid) == ("captured\n", "")
    assert output_of(api, api.call(print, "after")) == ("after\n", "")


def test_another_stream_stays_in_no_place_for_the_next_item(api: ModuleType, one_slot: None) -> None:
    def job(i: int) -> list[int]:
        import io

        if i % 10 == 3:
            sys.stdout = io.StringIO()
        elif i % 10 == 4:
            print(i)
        return [i]

    api.join(api.map(job, range(20)))  # now a worker is there, and items come fast
    jids = api.map(job, range(100))
    assert api.result(jids) == [[i] for i in range(100)]
    printed = [facts["stdout"] for facts in api.info(jids, ["stdout"]).values()]
    assert printed == [f"{i}\n" if i % 10 == 4 else "" for i in range(100)]


@PROCESSES_ONLY
def test_what_is_written_below_python_is_captured(api: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    def child_program() -> None:
        print("before")
        subprocess.run(["/bin/sh", "-c", "echo of a child; echo trouble >&2"], check=True)
        print("after")

    written = api.call(sample.write_descriptors, b"out\xff\n", b"err\n")
    assert output_of(api, written) == ("out\ufffd\n", "err\n")
    assert output_of(api, api.call(child_program)) == ("before\nof a child\nafter\n", "trouble\n")
    assert capfd.readouterr() == ("", "")


@CHILDREN_ONLY
def test_output_may_go_to_the_terminal(
    api: ModuleType, configure: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    configure(redirect_job_output=False)
    assert output_of(api, api.call(sample.print_both, "seen", "seen too")) == ("", "")
    assert capfd.readouterr() == ("seen\n", "seen too\n")


@PROCESSES_ONLY
def test_logging_goes_to_stderr_at_the_program_s_level(api: ModuleType) -> None:
    def job() -> None:
        logging.getLogger("mine").debug("debug")
        logging.info("info")
        logging.getLogger("mine.deep").warning("warning %s", 1)

    root = logging.getLogger()
    before = root.level
    try:
        for level, expected in (
            (logging.INFO, "INFO:root:info\nWARNING:mine.deep:warning 1\n"),
            (logging.DEBUG, "DEBUG:mine:debug\nINFO:root:info\nWARNING:mine.deep:warning 1\n"),
            (logging.ERROR, ""),
            (logging.WARNING, "WARNING:mine.deep:warning 1\n"),
        ):
            root.setLevel(level)
            assert output_of(api, api.call(job)) == ("", expected)
    finally:
        root.setLevel(before)


@PROCESSES_ONLY
def test_a_daemon_s_late_line_stays_out_of_finished_jobs(api: ModuleType, one_slot: None, gate: Gate) -> None:
    def leave_a_thread() -> None:
        import threading

        threading.Thread(target=lambda: (gate.hold(), print("late", flush=True)), daemon=True).start()
        print("mine")

    first = api.call(leave_a_thread)
    gate.await_begun()
    assert output_of(api, first) == ("mine\n", "")
    gate.open()
    later = api.call(sample.sleep_then, 0.05)
    assert eventually(lambda: output_of(api, later)) in (("late\n", ""), ("", ""))
    assert output_of(api, first) == ("mine\n", "")
