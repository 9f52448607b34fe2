"""What the clauses share: the settings of a test, the contract behind the verbs, and a gate that holds jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cloud.backends.base import Backend
from tests.backends import forget_settings, new_credentials
from tests.contract.jobs import Gate

PROCESSES_ONLY = pytest.mark.parametrize("backend_name", ["mp", "http"], indirect=True)
"""For clauses about worker processes, which a simulation has none of."""

EMBEDDED_ONLY = pytest.mark.parametrize("backend_name", ["mp", "simulator"], indirect=True)
"""For clauses about what does not travel to a server: the surroundings of the program."""

CHILDREN_ONLY = pytest.mark.parametrize("backend_name", ["mp"], indirect=True)
"""For clauses about worker processes of this very process."""


def beginning(backend_name: str) -> str:
    """How a user's program gets its verbs."""
    if backend_name == "mp":
        return "import cloud.mp as api\n"
    if backend_name == "simulator":
        return "import cloud as api\napi.start_simulator()\n"
    key, secret, url = new_credentials()
    return f"import cloud as api\napi.setkey({key}, {secret!r}, {url!r})\n"


@pytest.fixture
def configure(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set settings by keyword, before the first use of ``api``."""

    def set_settings(**settings: Any) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"CLOUD_{name.upper()}", str(value))
        forget_settings()

    return set_settings


@pytest.fixture
def one_slot(configure: Callable[..., None]) -> None:
    """One job at a time."""
    configure(num_procs=1)


@pytest.fixture
def two_slots(configure: Callable[..., None]) -> None:
    """Two jobs at a time, however many cores there are."""
    configure(num_procs=2)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Opens at the end of the test, so that nothing waits for a test that has failed."""
    folder = tmp_path / "gate"
    folder.mkdir()
    gate = Gate(folder)
    yield gate
    gate.open()


@pytest.fixture
def backend(api: ModuleType) -> Backend:
    """The contract under the verbs of ``api``."""
    return api.call.__self__.backend  # type: ignore[no-any-return]
