"""The workers' parent, which starts before the program has imported what it takes to use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cloud.engine.worker import template
from tests.scripts import ScriptRunner

# Not by way of tests.integration.support: that imports the engine.
CHILDREN = """
        import psutil

        def children():
            found = sorted(psutil.Process().children(), key=psutil.Process.create_time)
            return [child.pid for child in found if child.status() != psutil.STATUS_ZOMBIE]
"""


def test_the_first_job_runs_under_the_one_that_was_started_ahead(run_script: ScriptRunner) -> None:
    out = run_script(
        CHILDREN
        + """
        import os
        import cloud.mp as cloud
        assert children() == []
        cloud.connection_info()
        ahead = children()
        assert cloud.result(cloud.call(abs, -1)) == 1
        assert cloud.result(cloud.call(os.getppid)) == ahead[0]
        print(len(ahead), children() == ahead)
        """
    ).stdout
    assert out == "1 True\n"


def test_a_backend_that_cannot_be_opened_leaves_none(run_script: ScriptRunner) -> None:
    out = run_script(
        CHILDREN
        + """
        import cloud.mp as cloud
        from cloud.backends.ahead import TemplateAhead
        try:
            with TemplateAhead() as template:
                assert len(children()) == 1
                raise ArithmeticError
        except ArithmeticError:
            print(children())
        """
    ).stdout
    assert out == "[]\n"


def test_a_handler_that_raises_meanwhile_raises_afterwards(run_script: ScriptRunner) -> None:
    out = run_script(
        CHILDREN
        + """
        import os, signal
        import cloud.mp as cloud
        import cloud.backends.ahead as ahead

        class Late(TimeoutError): pass  # which is an OSError

        def late(number, frame):
            raise Late

        def start(preload, make=ahead.TemplateProcess):
            ahead.TemplateProcess = make
            os.kill(os.getpid(), signal.SIGALRM)
            return make(preload)

        signal.signal(signal.SIGALRM, late)
        ahead.TemplateProcess = start
        try:
            cloud.call(abs, -1)
        except Late:
            print(children())
        print(cloud.result(cloud.call(abs, -1)))
        """
    ).stdout
    assert out == "[]\n1\n"


def test_where_it_cannot_be_started_yet_the_first_job_starts_it(run_script: ScriptRunner) -> None:
    out = run_script(
        CHILDREN
        + """
        import cloud.mp as cloud
        import cloud.backends.ahead as ahead

        def refuse(preload):
            raise OSError("not now")

        ahead.TemplateProcess = refuse
        cloud.connection_info()
        print(children(), cloud.result(cloud.call(abs, -1)), len(children()))
        """
    ).stdout
    assert out == "[] 1 1\n"


def test_it_dies_before_the_first_job(run_script: ScriptRunner) -> None:
    out = run_script(
        CHILDREN
        + """
        import os, signal
        import cloud.mp as cloud
        cloud.connection_info()
        os.kill(children()[0], signal.SIGKILL)
        print(cloud.result(cloud.map(abs, range(-25, 0)), timeout=40) == list(range(25, 0, -1)))
        """,
        env={"CLOUD_NUM_PROCS": "25"},
    ).stdout
    assert out == "True\n"


@pytest.mark.parametrize(
    ("running", "quiet"), [(1, True), (2, False), (40, False), (None, True)], ids=["idle", "one", "many", "untold"]
)
def test_it_loads_what_is_not_needed_yet_when_nothing_else_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, running: int | None, *, quiet: bool
) -> None:
    file = tmp_path / "loadavg"
    if running is not None:
        file.write_text(f"0.52 0.30 0.11 {running}/359 21563\n")
    opener: Callable[..., object] = open
    monkeypatch.setattr(template, "open", lambda path, mode: opener(file, mode), raising=False)
    monkeypatch.setattr(template.os, "cpu_count", lambda: 2)
    assert template._is_quiet() is quiet
