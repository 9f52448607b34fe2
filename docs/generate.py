"""Write the reference pages that are made from docstrings: api, options, info-fields and errors.

    python docs/generate.py            write them
    python docs/generate.py --check    exit with 1 if one is out of date, and write nothing

`tests/docs/test_reference.py` does the same check.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent / "reference"

LINES = ",\n"
_NOTE = "<!-- Made from docstrings by docs/generate.py: change those, then run it. -->\n"
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "Source", "Example")
_HEAD = re.compile(rf"^({'|'.join(_SECTIONS)}):[ ]?(.*)$")
# A name, perhaps with others, and what is said of it: "jids, timeout: As for `join`."
_ITEM = re.compile(r"^(\*{0,2}\w+(?:[ ]?[,/][ ]?\*{0,2}\w+)*)(?: \([^)]*\))?: (.*)$", re.DOTALL)
# A row of a table made of spaces: "``name``     what it is".
_ROW = re.compile(r"^(\S+) {2,}(.+)$")
_OPTION = re.compile(r"((?:``_\w+``(?:, | and )?)+)\s+\(([^()]*)\)")


# --- docstrings into Markdown -----------------------------------------------------------------------------------------


def markdown(docstring: str) -> str:
    """A docstring with Google's sections as Markdown."""
    parts: list[str] = []
    for head, lines in _sections(inspect.cleandoc(docstring)):
        text = dedent("\n".join(lines)).strip("\n")
        if not head:
            parts.append(_prose(text))
        elif head == "Source":
            parts.append(f"*Source: {_ticks(_joined(text))}*")
        else:
            parts.append(f"**{head}**\n\n{_items(text)}")
    return "\n\n".join(part for part in parts if part)


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    head, lines = "", []
    for line in text.split("\n"):
        match = _HEAD.match(line)
        if match:
            yield head, lines
            head, lines = match[1], [match[2]] if match[2] else []
        elif head and line and not line.startswith(" ") and head != "Source":
            # Prose goes on after a section.
            yield head, lines
            head, lines = "", [line]
        else:
            lines.append(line)
    yield head, lines


def _prose(text: str) -> str:
    """Paragraphs; what is indented after ``::`` is shown as it stands."""
    shown: list[str] = []
    # A blank line inside an indented block does not end it.
    for block in re.split(r"\n\n+(?! )|(?<=::)\n\n+", text.strip()):
        if block == "::":
            continue
        if block.startswith(" "):
            language = "python no-run: an excerpt" if "cloud." in block else "text"
            shown.append(f"```{language}\n{dedent(block)}\n```")
        elif all(_ROW.match(line) for line in block.split("\n")):
            shown.append("\n".join(_ticks(_ROW.sub(r"- \1: \2", line)) for line in block.split("\n")))
        else:
            paragraph = _ticks(_joined(block))
            shown.append(paragraph[:-1] if paragraph.endswith("::") else paragraph)
    return "\n\n".join(shown)


def _items(text: str) -> str:
    """``name: what is said of it`` line by line as a list; anything else as a paragraph."""
    entries: list[str] = []
    for line in text.split("\n"):
        begins = not line.startswith(" ") and (_ITEM.match(line) or not entries or _ITEM.match(entries[-1]))
        if line and begins:
            entries.append(line)
        elif line:
            entries[-1] += f" {line.strip()}"
    if len(entries) == 1 and not _ITEM.match(entries[0]):
        return _ticks(entries[0])
    return "\n".join(_item(entry) for entry in entries)


def _item(entry: str) -> str:
    match = _ITEM.match(entry)
    if match is None:
        return f"- {_ticks(entry)}"
    names = ", ".join(f"`{name.strip()}`" for name in re.split("[,/]", match[1]))
    return f"- {names}: {_ticks(match[2])}"


def _joined(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _ticks(text: str) -> str:
    text = text.replace("``", "`")
    return text.replace("`cloud.client.info.KEYS`", "[the keys](info-fields.md)")


def _cell(text: str) -> str:
    return _ticks(_joined(text)).replace("|", "\\|")


def first_line(docstring: str | None) -> str:
    """What a thing does, in a sentence or two: the first paragraph of its docstring."""
    return _ticks(_joined(inspect.cleandoc(docstring or "").split("\n\n")[0]))


# --- the pages --------------------------------------------------------------------------------------------------------


def faces() -> dict[str, ModuleType]:
    """The modules that users import: `cloud`, and those it offers but the errors, which have a page of their own."""
    import cloud

    offered = {f"cloud.{name}": getattr(cloud, name) for name in cloud.__all__ if name != "errors"}
    return {"cloud": cloud, **{name: value for name, value in offered.items() if inspect.ismodule(value)}}


def names_of(face: ModuleType) -> dict[str, Any]:
    """What a face offers."""
    return {name: getattr(face, name) for name in face.__all__ if name != "__version__"}


def api() -> str:
    """Every function of every face."""
    page = [
        "# The functions",
        "Whatever takes jids takes a jid, a `range` that `map` returned, or any iterable that mixes the two.",
        "Pages of their own: [the options of a job](options.md), [what `cloud.info` tells](info-fields.md), "
        "[the errors](errors.md).",
    ]
    described: dict[str, dict[str, Any]] = {}
    for face, module in faces().items():
        page += [f"## {face}", markdown(module.__doc__ or "")]
        names = names_of(module)
        twin = twin_of(face, names, described)
        if twin is None:
            page += [_entry(face, name, value) for name, value in names.items()]
            described[face] = names
        else:
            links = ", ".join(f"[`{name}`](#{_anchor(f'{twin}.{name}')})" for name in names)
            page.append(f"Its names mean what they mean in `{twin}`: {links}.")
    return "\n\n".join(page)


def twin_of(face: str, names: dict[str, Any], described: dict[str, dict[str, Any]]) -> str | None:
    """The face that offers the same under another name, if one does."""
    if face == "cloud.mp":
        return "cloud"
    return next((other for other, theirs in described.items() if theirs == names), None)


def _anchor(title: str) -> str:
    return title.lower().replace(".", "")


def _entry(face: str, name: str, value: Any) -> str:
    title = f"### {face}.{name}"
    said = first_line(value.__doc__)
    if inspect.ismodule(value):
        where = "errors.md" if name == "errors" else f"#{_anchor(value.__name__)}"
        return f"{title}\n\n{said} See [{value.__name__}]({where})."
    if inspect.isclass(value) and value.__module__ == "cloud.errors":
        return f"{title}\n\n{said} See [the errors](errors.md#{_anchor(name)})."
    if inspect.isclass(value):
        return f"{title}\n\n{markdown(value.__doc__ or '')}\n\n{_members(value)}".rstrip()
    if inspect.isroutine(value):
        signature = f"```python no-run: a signature\n{_signature(name, value)}\n```"
        return f"{title}\n\n{signature}\n\n{markdown(value.__doc__ or '')}"
    if isinstance(value, list):
        return f"{title}\n\nThe statuses that a job does not leave: `{value!r}`."
    return f"{title}\n\n{first_line(type(value).__doc__)} See [Configuration](configuration.md)."


def _members(cls: type) -> str:
    """The fields of a named tuple, or the methods of any other class, in a line each."""
    if hasattr(cls, "_fields"):
        return f"Its fields: {', '.join(f'`{name}`' for name in cls._fields)}."
    rows = []
    for name, value in vars(cls).items():
        if name.startswith("_") or not (value.__doc__ or "").strip() or not _is_for_users(cls, name):
            continue
        if inspect.isfunction(value):
            shown = _signature(name, value).replace("self, ", "", 1).replace("(self)", "()")
            rows.append(f"- `{shown}`: {first_line(value.__doc__)}")
        elif isinstance(value, property):
            rows.append(f"- `{name}`: {first_line(value.__doc__)}")
    return "**Methods**\n\n" + "\n".join(rows) if rows else ""


def _is_for_users(cls: type, name: str) -> bool:
    """False for what a class that stands in for one of the standard library has for the rest of its package only."""
    said = cls.__doc__ or ""
    original = re.search(r"Source: ``((?:\w+\.)+)(\w+)``", said)
    if original is None:
        return True
    stands_in_for = getattr(importlib.import_module(original[1].rstrip(".")), original[2], None)
    return stands_in_for is None or hasattr(stands_in_for, name) or f"``{name}``" in said


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    parts: list[str] = []
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    seen_star = False
    parameters = list(signature.parameters.values())
    for index, each in enumerate(parameters):
        if each.kind is each.KEYWORD_ONLY and not seen_star:
            parts.append("*")
        seen_star = seen_star or each.kind in (each.VAR_POSITIONAL, each.KEYWORD_ONLY)
        text = marks.get(each.kind, "") + each.name
        if each.default is not each.empty:
            text += f"={each.default!r}"
        parts.append(text)
        after = parameters[index + 1].kind if index + 1 < len(parameters) else None
        if each.kind is each.POSITIONAL_ONLY and after is not each.POSITIONAL_ONLY:
            parts.append("/")
    start = "await " if inspect.iscoroutinefunction(value) else ""
    line = f"{start}{name}({', '.join(parts)})"
    if len(line) > 100:
        line = f"{start}{name}(\n{indent(LINES.join(parts), '    ')},\n)"
    return line


def options() -> str:
    """The reserved names of ``call``, ``map`` and ``cron.register``."""
    from cloud import cron
    from cloud.client.cloud import Cloud
    from cloud.jobs import CALL_OPTIONS

    said: dict[str, str] = {}
    for names, text in _OPTION.findall(_joined(inspect.cleandoc(Cloud.call.__doc__ or ""))):
        said.update((name, text) for name in re.findall(r"``(\w+)``", names))
    missing = CALL_OPTIONS - said.keys()
    if missing:
        raise LookupError(f"the docstring of Cloud.call says nothing of {', '.join(sorted(missing))}")
    rows = "\n".join(
        f"| `{name}` | {_cell(_default(name))} | {'yes' if name in cron._RESERVED else 'no'} | {_cell(said[name])} |"
        for name in sorted(CALL_OPTIONS)
    )
    return (
        "# The options of a job\n\n"
        "Keyword arguments of `cloud.call`, `cloud.map`, `cloud.starmap` and `cloud.cron.register`. Their names begin "
        "with an underscore and are reserved: the function never gets them, even if it has parameters of these names."
        "\n\n"
        "A value of a wrong type raises `TypeError`, a wrong value `ValueError`; both name the option and the value. "
        "Nothing is submitted then.\n\n"
        f"| Option | Default | With `cron` | Meaning |\n|---|---|---|---|\n{rows}"
    )


def _default(name: str) -> str:
    from cloud.jobs import DEFAULT_OPTIONS

    aliases = {"_depends_on_errors": "ignore_dependency_errors", "_os_env_vars": "env_vars"}
    wanted = aliases.get(name, name[1:])
    for attribute in (wanted, f"{wanted}_s"):
        if hasattr(DEFAULT_OPTIONS, attribute):
            value = getattr(DEFAULT_OPTIONS, attribute)
            return "`'abort'`" if name == "_depends_on_errors" else f"`{value!r}`"
    return "none"


def info_fields() -> str:
    """The keys of ``cloud.info``."""
    from cloud.client.info import DEFAULT_KEYS, KEYS

    rows = "\n".join(f"| `{key}` | {'yes' if key in DEFAULT_KEYS else ''} | {_cell(KEYS[key])} |" for key in KEYS)
    return (
        "# What `cloud.info` tells\n\n"
        "`cloud.info(jids, key)`, `cloud.info(jids, [key, ...])`, or `cloud.info(jids, 'all')`. "
        "The result is a dict of dicts, by jid. Without keys you get those marked as default.\n\n"
        f"| Key | Default | Value |\n|---|---|---|\n{rows}"
    )


def errors() -> str:
    """The tree of exceptions, and what each means."""
    from cloud import errors as module

    tree = (module.__doc__ or "").split("::\n\n", 1)[1].rstrip()
    page = [
        "# The errors",
        "Every exception that this package raises on purpose. They are names of `cloud.errors`; `CloudException` and "
        "`CloudTimeoutError` are names of `cloud` itself too.",
        f"```text\n{dedent(tree)}\n```",
    ]
    for name in module.__all__:
        cls = getattr(module, name)
        bases = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
        page.append(f"## {name}\n\nDerived from {bases}.\n\n{markdown(cls.__doc__ or '')}")
    return "\n\n".join(page)


PAGES = {"api.md": api, "errors.md": errors, "info-fields.md": info_fields, "options.md": options}


def pages() -> dict[Path, str]:
    """Each generated page and what must stand in it."""
    return {FOLDER / name: f"{_NOTE}\n{make().rstrip()}\n" for name, make in PAGES.items()}


def outdated() -> list[Path]:
    """The pages that are not as the docstrings would have them."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    old = outdated()
    if not arguments:
        for path in old:
            path.write_text(pages()[path], encoding="utf-8")
    for path in old:
        print(f"{path.relative_to(FOLDER.parent.parent)}: {'out of date' if arguments else 'written'}")
    return 1 if old and arguments else 0


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent.parent))
    sys.exit(main(sys.argv[1:]))
