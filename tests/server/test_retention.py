"""What is too old is forgotten, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.engine.executor.slots import Slots
from cloud.jobs import DONE
from cloud.resources.principals import Quotas
from cloud.serialization import pickling
from cloud.server.config import ServerConfig
from cloud.server.groups import Group

SURROUNDINGS = pickling.dumps_plain((None, "", {}, None))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    config = ServerConfig(data=str(tmp_path / "data"), retention_s=60.0)
    group = Group(str(tmp_path / "data" / "groups" / "1"), 1, config, Slots(1), -1, Quotas())
    yield group
    group.close()


def ask(group: Group, op: str, *blobs: bytes, **content: Any) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    return asyncio.run(group.ask(op, content, list(blobs)))


def submitted(group: Group) -> int:
    blobs = pickling.dumps(abs), SURROUNDINGS, pickling.dumps(((-3,), {}))
    answer, _ = ask(group, "submit", *blobs, function="abs", reusable=True, options={})
    jid: int = answer["jid"]
    ask(group, "wait", jids=[[jid, jid + 1]], timeout_s=30.0, stop_on_error=False)
    return jid


def test_finished_jobs_are_forgotten_after_their_time(group: Group) -> None:
    jid = submitted(group)
    group.tidy(time.time() + 30.0)
    assert ask(group, "statuses", jids=[[jid, jid + 1]])[1] == (bytes((DONE,)),)
    group.tidy(time.time() + 90.0)
    assert ask(group, "statuses", jids=[[jid, jid + 1]])[0]["error"] == "JobNotFound"
    assert submitted(group) == jid + 1  # no number is used twice
