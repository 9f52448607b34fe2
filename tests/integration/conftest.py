"""Fixtures of the fault tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.client.cloud import Cloud
from tests.integration.support import open_cloud

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
