"""The reference is made from the docstrings: it is up to date, and nothing public is missing from it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import REPO


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", REPO / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.mark.parametrize("name", generator.PAGES)
def test_a_page_is_up_to_date(name: str) -> None:
    path = generator.FOLDER / name
    assert path.exists(), "run: python docs/generate.py"
    assert path.read_text(encoding="utf-8") == generator.pages()[path], "run: python docs/generate.py"


def test_every_public_name_is_described() -> None:
    page = (generator.FOLDER / "api.md").read_text(encoding="utf-8")
    described = {}
    for entry in re.split(r"^(?=##)", page, flags=re.MULTILINE):
        heading, _, text = entry.partition("\n")
        described[heading.lstrip("# ")] = re.sub(r"```.*?```", "", text, flags=re.DOTALL).strip()
    missing = []
    for face, module in generator.faces().items():
        names = generator.names_of(module)
        if "mean what they mean in" in described[face]:
            missing += [f"{face}.{name}" for name in names if f"[`{name}`](" not in described[face]]
        else:
            missing += [f"{face}.{name}" for name in names if not described.get(f"{face}.{name}")]
    assert missing == []


def test_every_error_is_described() -> None:
    from cloud import errors

    page = (generator.FOLDER / "errors.md").read_text(encoding="utf-8")
    assert [name for name in errors.__all__ if f"\n## {name}\n" not in page] == []


def test_a_stale_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs" / "reference"
    folder.mkdir(parents=True)
    monkeypatch.setattr(generator, "FOLDER", folder)
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    stale = folder / "errors.md"
    stale.write_text(stale.read_text(encoding="utf-8").replace("AccountError", "Account"), encoding="utf-8")
    capsys.readouterr()
    assert generator.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/reference/errors.md: out of date\n"


@pytest.mark.parametrize(
    ("docstring", "shown"),
    [
        ("Do ``x``.", "Do `x`."),
        (
            "Do.\n\n::\n\n    import cloud\n\n    cloud.call(f)",
            "Do.\n\n```python no-run: an excerpt\nimport cloud\n\ncloud.call(f)\n```",
        ),
        (
            "Do.\n\nArgs:\n    a: One,\n        long.\n    b, c: Two.",
            "Do.\n\n**Args**\n\n- `a`: One, long.\n- `b`, `c`: Two.",
        ),
        ("Do.\n\n``a``     one\nothers    two", "Do.\n\n- `a`: one\n- others: two"),
        ("Do.\n\nReturns:\n    A value: or\n    none.", "Do.\n\n**Returns**\n\nA value: or none."),
        ("Do.\n\nSource: A book,\nchapter 2.", "Do.\n\n*Source: A book, chapter 2.*"),
        ("Do.\n\nRaises:\n    ValueError: Bad.\n\nMore.", "Do.\n\n**Raises**\n\n- `ValueError`: Bad.\n\nMore."),
    ],
)
def test_docstrings_become_markdown(docstring: str, shown: str) -> None:
    assert generator.markdown(docstring) == shown


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*(REPO / "docs").rglob("*.md"), *REPO.glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            other = (page.parent / path) if path else page
            if not other.exists() or (anchor and anchor not in anchors(other)):
                broken.append(f"{page.relative_to(REPO)}: {target}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on the usual sites for Markdown."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
