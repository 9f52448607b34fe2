"""The server's log: every event is one line that can be read back, whatever others put into it."""

from __future__ import annotations

import io
import json
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloud
from cloud.server.log import ServerLog
from tests.server.running import RunningServer

EVIL = 'a\r\n2026-01-01T00:00:00.000Z request id=forged\x1b[2J\x00\u2028\x85\ud800 "quoted" key=1'


def line_of(facts: dict[str, Any], *, as_json: bool) -> str:
    stream = io.StringIO()
    ServerLog(stream, as_json=as_json)(facts)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert text.isascii()
    return text.rstrip("\n")


@given(st.text())
def test_json_lines_are_read_back(text: str) -> None:
    found = json.loads(line_of({"event": "request", "path": text, "jid": 3}, as_json=True))
    assert found.pop("time").endswith("Z")
    assert found == {"event": "request", "path": text, "jid": 3}


@given(st.text())
def test_text_lines_are_read_back(text: str) -> None:
    line = line_of({"event": "request", "path": text, "jid": 3, "key": None}, as_json=False)
    match = re.fullmatch(r"\S+Z request path=(\S+|\".*\") jid=3", line)
    assert match
    shown = match[1]
    assert (json.loads(shown) if shown.startswith('"') else shown) == text


@pytest.mark.parametrize("as_json", [True, False])
def test_evil_text_stays_one_line(as_json: bool) -> None:
    line = line_of({"event": "request", "path": EVIL, "address": EVIL}, as_json=as_json)
    assert line.isprintable()


def test_an_exception_is_one_line_with_its_traceback() -> None:
    try:
        raise ValueError(EVIL)
    except ValueError as exc:
        found = json.loads(line_of({"event": "failed", "id": "7", "exception": exc}, as_json=True))
    assert "Traceback" in found["exception"]
    assert "ValueError" in found["exception"]


def test_probes_that_are_well_say_nothing() -> None:
    stream = io.StringIO()
    log = ServerLog(stream, as_json=True)
    log({"event": "request", "path": "/healthz", "status": 200})
    log({"event": "request", "path": "/readyz", "status": 503})
    assert [json.loads(line)["status"] for line in stream.getvalue().splitlines()] == [503]


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_fails_raises_nothing() -> None:
    ServerLog(Broken(), as_json=True)({"event": "request"})
    closed = io.StringIO()
    closed.close()
    ServerLog(closed, as_json=False)({"event": "request"})


@pytest.fixture
def root_handlers() -> Iterator[None]:
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers = before


@pytest.mark.usefixtures("root_handlers")
def test_messages_of_libraries_become_events() -> None:
    stream = io.StringIO()
    log = ServerLog(stream, as_json=True)
    log.take_messages()
    log.take_messages()
    try:
        raise RuntimeError("inside")
    except RuntimeError:
        logging.getLogger("aiohttp.server").exception("bad request from %s", EVIL)
    logging.getLogger("some").info("not of interest")
    (found,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (found["event"], found["level"], found["logger"]) == ("message", "error", "aiohttp.server")
    assert found["text"].startswith("bad request from a\r\n")
    assert "inside" in found["exception"]


@pytest.mark.usefixtures("closed_after")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_server_logs_requests_with_id_workgroup_and_jids(tmp_path: Path, as_json: bool) -> None:
    with RunningServer(tmp_path / "data", *(["--json-logs"] if as_json else [])) as server:
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        jid = cloud.call(abs, -1, _label=EVIL.encode("ascii", "ignore").decode())
        assert cloud.result(jid) == 1
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/no%0d%0asuch%1b%5b2Jpage", timeout=10)
        name = refused.value.headers["X-Request-Id"]
        refused.value.close()
        cloud.close()
    lines = server.log.read_text().splitlines()
    assert all(line.isprintable() and line.isascii() for line in lines)
    if not as_json:
        assert any(f"jid={jid} " in line and " workgroup=1 " in line for line in lines)
        assert any(f"id={name}" in line and "status=404" in line for line in lines)
        return
    found = [json.loads(line) for line in lines]
    assert {each["event"] for each in found} >= {"started", "request", "stopped"}
    submitted = [each for each in found if each.get("path") == "/v1/jobs"]
    assert [(each["jid"], each["workgroup"], each["key"], each["status"]) for each in submitted] == [(jid, 1, 1, 200)]
    (missing,) = [each for each in found if each.get("id") == name]
    assert (missing["status"], missing["workgroup"]) == (404, None)
    assert missing["path"] == "/no\r\nsuch\x1b[2Jpage"
    assert server.api_secretkey not in server.log.read_text()
