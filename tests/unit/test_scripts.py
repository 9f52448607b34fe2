"""The runner of users' programs: each way of starting one, and each way it may end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.scripts import MODES, REPO, Mode, ScriptRunner


@pytest.mark.parametrize("mode", MODES)
def test_a_program_runs_in_every_mode(run_script: ScriptRunner, mode: Mode, home: Path) -> None:
    result = run_script(
        """
        import os, sys, cloud.errors
        print(__name__, sys.argv[1:], os.path.dirname(cloud.errors.__file__), os.environ["CLOUD_HOME"])
        print("to stderr", file=sys.stderr)
        """,
        args=["a", "b c"],
        mode=mode,
    )
    assert result.stdout == f"__main__ ['a', 'b c'] {REPO / 'cloud'} {home}\n"
    assert result.stderr == "to stderr\n"
    assert result.returncode == 0


def test_a_failing_program_fails_the_test_unless_that_is_wanted(run_script: ScriptRunner) -> None:
    assert run_script("raise SystemExit(3)", check=False).returncode == 3
    with pytest.raises(AssertionError, match=r"exited with 1(.|\n)*ZeroDivisionError"):
        run_script("1 / 0")


def test_a_program_that_hangs_is_killed_and_shown(run_script: ScriptRunner) -> None:
    with pytest.raises(AssertionError, match=r"did not end within 0\.5 s(.|\n)*begun"):
        run_script("print('begun', flush=True); import time; time.sleep(60)", timeout=0.5)


def test_a_program_sees_added_variables(run_script: ScriptRunner) -> None:
    shown = run_script("import os; print(os.environ['ADDED'], os.getcwd())", env={"ADDED": "x"})
    assert shown.stdout == f"x {os.path.realpath(run_script.folder)}\n"
