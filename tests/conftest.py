"""Fixtures for every test: a home of its own, guards against leaks, programs to run, backends to run on."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from tests.backends import BACKENDS, OPENERS, close_all, forget_settings, stop_servers
from tests.integration.support import Program
from tests.leaks import MARK, Leaks
from tests.scripts import ScriptRunner

LEAK_GRACE_S = 2.0

# How long an example takes says more about the machine than about us.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # A folder of this run's own, so that another run on the same machine is never taken for a leak of this one.
    # Short, because the path of a Unix socket may have no more than 107 bytes.
    tmp_path_factory.getbasetemp()
    folder = tempfile.mkdtemp(prefix="ct-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv(MARK, uuid.uuid4().hex)
        yield
        stop_servers()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_leaks(_own_temporary_folder: None) -> Iterator[None]:
    """Fail a test that leaves processes, `cloud-*` threads, descriptors or `cloud-*` temporary files behind.

    What ends by itself within two seconds is no leak.
    """
    leaks = Leaks()
    yield
    left = leaks.found_after(LEAK_GRACE_S)
    if left:
        # So that the next test is not blamed, too.
        close_all()
        leaks.end_processes()
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def home(no_leaks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `CLOUD_HOME` of the test's own, not yet made, and no other `CLOUD_*` variable; `HOME` moves too.

    Settings are read anew in every test.
    """
    for name in [name for name in os.environ if name.startswith("CLOUD_")]:
        monkeypatch.delenv(name)
    user = tmp_path / "home"
    user.mkdir()
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("CLOUD_HOME", str(user / ".cloud"))
    forget_settings()
    yield user / ".cloud"
    forget_settings()


@pytest.fixture
def closed_after(home: Path) -> Iterator[None]:
    """Close `cloud` and `cloud.mp` at the end of the test, before leaks are looked for; the next job is number 1."""
    yield
    close_all()


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each backend's name in turn."""
    return str(request.param)


@pytest.fixture
def api(backend_name: str, closed_after: None) -> ModuleType:
    """The namespace with the verbs, on each backend in turn; closed at the end."""
    return OPENERS[backend_name]()


@pytest.fixture
def run_script(home: Path, tmp_path: Path) -> ScriptRunner:
    """Run a user's program in a fresh interpreter; see `ScriptRunner.__call__`."""
    return ScriptRunner(tmp_path / "program")


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """A file that jobs append lines to, to prove what ran."""
    return tmp_path / "witness"


@pytest.fixture
def program(home: Path, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start user programs; those still running at the end of the test are killed."""
    started: list[Program] = []

    def program(source: str, **options: Any) -> Program:
        started.append(Program(tmp_path / f"program{len(started)}", source, **options))
        return started[-1]

    yield program
    for each in started:
        each.__exit__(None, None, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a second interpreter leave out what does not depend on it."""
    parser.addoption(
        "--short-http",
        action="store_true",
        help="of the conformance suite on a server, only the contract itself (test_backend.py)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """See ``--short-http``."""
    if not config.getoption("--short-http"):
        return
    left_out = [item for item in items if _is_on_server(item) and item.path.name != "test_backend.py"]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_on_server(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("backend_name") == "http"
