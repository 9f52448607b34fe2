"""Every example of the documentation runs: each page's blocks in order, as one program in a fresh interpreter.

How a block is run is told by its fence:

- ``python``: a part of the program; so is a console session (``>>>``), whose output is compared.
- ``sh``, when it starts with ``$ cloud ``: its commands are run, and the output shown, if any, is compared;
  ``sh exit=1`` when the command is meant to fail. ``...`` in expected output stands for anything.
- ``no-run: reason`` after the language keeps a block from being run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import program
from tests.scripts import REPO, ScriptRunner

PAGES = sorted([*(REPO / "docs").rglob("*.md"), *REPO.glob("README.md")])
TIMEOUT_S = 100


def relative(path: Path) -> str:
    return str(path.relative_to(REPO))


def run_page(page: Path, run_script: ScriptRunner) -> None:
    """Run a page's blocks; fail with the line of the page where one fails."""
    source = program(page.read_text(encoding="utf-8"))
    if source is None:
        return
    name = re.sub(r"\W", "_", page.stem)
    result = run_script(source, name=name, check=False, timeout=TIMEOUT_S)
    if result.returncode != 0:
        lines = re.findall(rf'File ".*?\b{name}\.py", line (\d+)', result.stderr)
        pytest.fail(
            f"{page}:{lines[-1] if lines else '?'}: exited with {result.returncode}\n{result.stdout}{result.stderr}",
            pytrace=False,
        )


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_page(page: Path, run_script: ScriptRunner) -> None:
    run_page(page, run_script)
