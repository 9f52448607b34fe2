"""The machinery that runs the documentation: what it runs, what it skips, and that it notices."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from tests.docs.pages import UnexplainedSkip, blocks, commands, program
from tests.docs.test_examples import run_page
from tests.scripts import ScriptRunner


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a-page.md"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def test_blocks_share_one_program(tmp_path: Path, run_script: ScriptRunner) -> None:
    text = """\
        # Title

        ```python
        def double(x):
            return 2 * x
        ```

        1. In a list:

           ```python
           value = double(4)
           ```

        ```pycon
        >>> value
        8
        >>> def triple(x):
        ...     return 3 * x
        >>> 1 / 0
        Traceback (most recent call last):
            ...
        ZeroDivisionError: division by zero
        ```

        ~~~python
        assert triple(value) == 24
        assert triple.__globals__ is globals()
        open("ran", "w").close()
        ~~~

        ```text
        1 / 0
        ```

        ```sh
        $ pip install something
        ```
        """
    run_page(page(tmp_path, text), run_script)
    assert (run_script.folder / "ran").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# Title\n\n```python\nx = 1\n1 / 0\n```\n", 5),
        ("# Title\n\n```python\nx = 1\nx +\n```\n", 5),
        ("# Title\n\n```python\n>>> 1 + 1\n2\n>>> 1 + 1\n3\n```\n", 6),
        ("# Title\n\n- item\n\n  ```python\n  raise SystemError\n  ```\n", 6),
    ],
)
def test_a_failing_page_shows_its_line(tmp_path: Path, run_script: ScriptRunner, text: str, line: int) -> None:
    path = page(tmp_path, text)
    with pytest.raises(pytest.fail.Exception) as failure:
        run_page(path, run_script)
    assert str(failure.value).startswith(f"{path}:{line}: ")


@pytest.fixture
def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `cloud` command that repeats its words and fails when told to, in the place of the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "cloud").write_text('#!/bin/sh\necho "$@"\n[ "$1" != fail ]\n')
    (folder / "cloud").chmod(0o755)
    (folder / "sitecustomize.py").write_text(
        f"import pathlib, tests.docs.steps as s\ns.command_folder = lambda: pathlib.Path({str(folder)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.usefixtures("fake_command")
@pytest.mark.parametrize(
    "text",
    [
        "```sh\n$ cloud status 1\nstatus 1\n```\n",
        "```sh\n$ cloud status 1\nst...1\n$ cloud any\n```\n",
        "```sh exit=1\n$ cloud fail\n```\n",
        "```sh\n$ cloud one \\\n    two\none two\n```\n",
    ],
)
def test_commands_are_run_and_their_output_compared(tmp_path: Path, run_script: ScriptRunner, text: str) -> None:
    run_page(page(tmp_path, text), run_script)


@pytest.mark.usefixtures("fake_command")
@pytest.mark.parametrize(
    "text", ["```sh\n$ cloud a\nb\n```\n", "```sh\n$ cloud fail\n```\n", "```sh exit=1\n$ cloud a\n```\n"]
)
def test_a_failing_command_fails_its_page(tmp_path: Path, run_script: ScriptRunner, text: str) -> None:
    path = page(tmp_path, text)
    with pytest.raises(pytest.fail.Exception) as failure:
        run_page(path, run_script)
    assert str(failure.value).startswith(f"{path}:2: ")


def test_a_skip_needs_its_reason() -> None:
    assert program("```python no-run: needs a server\n1 / 0\n```\n") is None
    with pytest.raises(UnexplainedSkip, match="line 3: write `no-run: reason`"):
        program("\n\n```python no-run\n1 / 0\n```\n")
    with pytest.raises(UnexplainedSkip):
        program("```python no-run:\n1 / 0\n```\n")


def test_a_page_without_blocks_is_no_program() -> None:
    assert program("# Title\n\nWords, and `code`.\n") is None


def test_blocks_are_found_as_they_stand() -> None:
    found = list(blocks("````md\n```python\nx\n```\n````\n\n```\nplain\n```\n\n```Python title\nlast"))
    assert [(block.line, block.language, block.text) for block in found] == [
        (2, "md", "```python\nx\n```"),
        (8, "", "plain"),
        (12, "python", "last"),
    ]


def test_commands_are_told_from_their_output() -> None:
    assert list(commands("$ cloud a\nout\n\n$ cloud b \\\n  c\n$ cloud d")) == [
        (0, "cloud a", "out"),
        (3, "cloud b \\\n  c", ""),
        (5, "cloud d", ""),
    ]
