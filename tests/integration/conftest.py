"""Fixtures of the fault tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.client.cloud import Cloud
from tests.integration.support import Program, open_cloud

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]  # they look into /proc


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., Cloud]]:
    """Open Clouds with so many workers and these settings, closed at the end of the test."""
    opened: list[Cloud] = []

    def start(n_workers: int = 2, **settings: Any) -> Cloud:
        opened.append(open_cloud(n_workers, **settings))
        return opened[-1]

    yield start
    for cloud in opened:
        cloud.close()


@pytest.fixture
def mp(start: Callable[..., Cloud]) -> Cloud:
    """A Cloud with two workers."""
    return start(2)


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
