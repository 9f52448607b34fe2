"""A program's cold start, measured from outside: from its first instruction to its end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from textwrap import dedent, indent

_PROGRAM = """\
import time
began = time.monotonic_ns()
times = []


def noop(x):
    return x


def imported():
    times.append(time.monotonic_ns())


def done(value):
    times.append(time.monotonic_ns())
    assert value == 7


if __name__ == "__main__":
{body}
    with open("times", "w", encoding="ascii") as file:
        print(began, *times, file=file)
"""


def cold_start(body: str, repeats: int, most_s: float) -> dict[str, float]:
    """Run the program some times; medians in milliseconds.

    Args:
        body: Imports a package, calls ``imported()``, runs a job, gives its value to ``done``, and closes everything.
        repeats: How often; once more comes before, unmeasured, so that all bytecode is there.
        most_s: No further repeat begins after so many seconds.
    """
    times: list[tuple[float, float, float]] = []
    deadline = time.monotonic() + most_s
    with tempfile.TemporaryDirectory(prefix="b-") as folder:
        program = Path(folder, "program.py")
        program.write_text(_PROGRAM.format(body=indent(dedent(body).strip(), "    ")), encoding="ascii")
        _run(program)
        while len(times) < repeats and (not times or time.monotonic() < deadline):
            times.append(_run(program))
    imports, firsts, exits = zip(*times, strict=True)
    return {"import": median(imports), "first": median(firsts), "exit": median(exits), "n": len(times)}


def _run(program: Path) -> tuple[float, float, float]:
    started = time.monotonic_ns()
    subprocess.run(
        [sys.executable, str(program)], cwd=program.parent, env=dict(os.environ), check=True, stdout=subprocess.DEVNULL
    )
    ended = time.monotonic_ns()
    began, imported, first = map(int, (program.parent / "times").read_text().split())
    return (imported - began) / 1e6, (first - started) / 1e6, (ended - first) / 1e6
