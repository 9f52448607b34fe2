"""``import cloud`` costs nothing: no other package, no thread, no process, no file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.modules import PACKAGE, REPO
from tests.scripts import ScriptRunner

# Loaded only when something needs them.
HEAVY = ("asyncio", "concurrent", "ctypes", "multiprocessing", "socket", "sqlite3", "ssl")

# Runs with -I and -S: without site-packages, importing anything of a third party fails.
PROBE = """
import _thread, json, os, sys

repo, statement = sys.argv[1:]
sys.path.insert(0, repo)
before = set(sys.modules)
watched = ("os.", "subprocess.", "socket.", "sqlite3.", "_thread.", "shutil.", "tempfile.", "ctypes.", "signal.")
harmless = ("os.listdir", "os.scandir")
seen = []

def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        seen.append(["open", os.fsdecode(args[0]), args[2]])
    elif event.startswith(watched) and event not in harmless:
        seen.append([event, repr(args), 0])

def watched_start(name):
    start = getattr(_thread, name)
    def started(*args, **kwargs):
        seen.append([name, repr(args), 0])
        return start(*args, **kwargs)
    setattr(_thread, name, started)

# Python 3.11 audits no thread.
for name in ("start_new_thread", "start_joinable_thread"):
    if hasattr(_thread, name):
        watched_start(name)
sys.addaudithook(watch)
exec(statement)
report = {"events": list(seen), "modules": sorted(set(sys.modules) - before), "threads": None}
if os.path.isdir("/proc/self/task"):
    report["threads"] = len(os.listdir("/proc/self/task"))
print(json.dumps(report))
"""


def probe(statement: str, folder: Path) -> dict[str, Any]:
    """Run ``statement`` in a fresh interpreter; the modules it loaded and the events it caused."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", PROBE, str(REPO), statement],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(folder), "CLOUD_HOME": str(folder / ".cloud")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def disturbances(report: dict[str, Any]) -> list[list[Any]]:
    """Every event but the reading of modules."""
    sources = (str(PACKAGE), str(Path(os.__file__).parent))
    return [
        [event, what]
        for event, what, flags in report["events"]
        if not (event == "open" and what.startswith(sources) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("import")
    found = probe("import cloud", folder)
    found["left"] = sorted(path.name for path in folder.iterdir())
    return found


def test_it_loads_only_the_standard_library_and_itself(report: dict[str, Any]) -> None:
    tops = {name.partition(".")[0] for name in report["modules"]}
    assert tops - sys.stdlib_module_names - {"cloud"} == set()


def test_it_loads_nothing_heavy(report: dict[str, Any]) -> None:
    assert [name for name in report["modules"] if name.partition(".")[0].lstrip("_") in HEAVY] == []


def test_it_loads_no_backend_engine_or_server(report: dict[str, Any]) -> None:
    rooms = ("cloud.engine", "cloud.server", "cloud.cli", "cloud.backends.local", "cloud.backends.http")
    assert [name for name in report["modules"] if name.startswith(rooms)] == []


def test_it_starts_nothing_and_touches_no_file(report: dict[str, Any]) -> None:
    assert disturbances(report) == []
    assert report["threads"] in (None, 1)
    assert report["left"] == []


@pytest.mark.parametrize(
    "statement",
    [
        "open('x', 'w').close()",
        "import os; os.mkdir('x')",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork() or os._exit(0)",
        "import socket; socket.socket().close()",
        "open('/proc/self/status').close()",
    ],
)
def test_the_probe_sees_what_an_import_must_not_do(statement: str, tmp_path: Path) -> None:
    assert disturbances(probe(statement, tmp_path)) != []


SLOW = ("asyncio", "inspect", "json", "logging", "pickle", "re", "selectors", "socket", "typing")
"""No first result needs one of these, neither here nor in a worker; all take milliseconds of the time to it."""

LATE = ("_pickle", "cloud.errors", "cloud.jobs", "cloud.serialization", "collections", "contextlib", "functools")
LATE += ("os", "threading", "weakref")
"""Loaded while workers start, which takes longer: before that each of these would delay the first result."""

FIRST_CALLS = ("import cloud; cloud.call(abs, -1)", "from cloud.pool import Pool; Pool(1).terminate()")

FIRST_CALL = f"""
import os, sys

for name in {LATE[:-3]!r}:
    assert name not in sys.modules, name

def spawn(*args, spawn=os.posix_spawn, **kwargs):
    print(sorted(set({LATE!r}) & set(sys.modules)))
    return spawn(*args, **kwargs)

os.posix_spawn = spawn
"""


@pytest.mark.parametrize("call", FIRST_CALLS)
def test_workers_start_before_much_is_loaded(run_script: ScriptRunner, call: str) -> None:
    assert run_script(FIRST_CALL + call).stdout == "['os']\n"


FIRST_RESULT = f"""
import sys
import cloud

def loaded(_):
    return sorted(set({SLOW!r}) & set(sys.modules))

print(cloud.result(cloud.call(loaded, 0)), loaded(0))
"""


def test_a_first_result_loads_nothing_slow(run_script: ScriptRunner) -> None:
    assert run_script(FIRST_RESULT).stdout.strip() == "[] []"
