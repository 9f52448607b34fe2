"""Bytes that are no requests, and requests that are no sense: refused with what is wrong, and nothing else said."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.wire import API, MESSAGE_TYPE, pack_message
from tests.server.raw import TABLE, Answering, ask, example, of_server, request, sent
from tests.server.running import RunningServer

BODY = '{"jids": []}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("bytes") / "data") as server:
        yield server


@pytest.fixture
def head(server: RunningServer) -> str:
    return f"POST {API}/jobs/statuses HTTP/1.1\r\nHost: x\r\nAuthorization: {of_server(server)}\r\n"


def rss_bytes(server: RunningServer) -> int:
    assert server.process is not None
    return int(psutil.Process(server.process.pid).memory_info().rss)


def text_of(server: RunningServer, reply: bytes) -> str:
    text = reply.decode("latin-1")
    assert str(server.data) not in text
    assert "Traceback" not in text
    assert server.api_secretkey not in text
    return text


# --- S13: what is no HTTP ---------------------------------------------------------------------------------------------

LENGTH = f"Content-Length: {len(BODY)}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
IN_CHUNKS = f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"

HOSTILE = {
    "length and chunked": f"{LENGTH}{CHUNKED}\r\n{IN_CHUNKS}",
    "two lengths": f"{LENGTH}Content-Length: 3\r\n\r\n{BODY}",
    "one length twice": f"{LENGTH}{LENGTH}\r\n{BODY}",
    "unknown coding": f"Transfer-Encoding: xchunked\r\n\r\n{IN_CHUNKS}",
    "coding after chunked": f"Transfer-Encoding: chunked, identity\r\n\r\n{IN_CHUNKS}",
    "space before colon": f"Content-Length : {len(BODY)}\r\n\r\n{BODY}",
    "signed length": f"Content-Length: +{len(BODY)}\r\n\r\n{BODY}",
    "negative length": f"Content-Length: -1\r\n\r\n{BODY}",
    "length of 5,000 digits": f"Content-Length: {'9' * 5000}\r\n\r\n{BODY}",
    "NUL in a header": f"X: a\0b\r\n{LENGTH}\r\n{BODY}",
    "folded header": f"X: a\r\n b\r\n{LENGTH}\r\n{BODY}",
    "header of 1 MB": f"X: {'a' * 1_000_000}\r\n{LENGTH}\r\n{BODY}",
    "header of 17 KB": f"X: {'a' * 17_000}\r\n{LENGTH}\r\n{BODY}",
    "20,000 headers": "X: a\r\n" * 20_000 + f"{LENGTH}\r\n{BODY}",
    "101 headers": "X: a\r\n" * 101 + f"{LENGTH}\r\n{BODY}",
    "bad chunk size": f"{CHUNKED}\r\n0x1_0\r\n{BODY}\r\n0\r\n\r\n",
    "two hosts": f"Host: y\r\n{LENGTH}\r\n{BODY}",
    "two keys": f"Authorization: Bearer 2:x\r\n{LENGTH}\r\n{BODY}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_head_is_refused_and_its_connection_closed(server: RunningServer, head: str, name: str) -> None:
    status, reply, closed = sent(server, (head + HOSTILE[name]).encode("latin-1"))
    assert status in (400, 431)
    assert closed
    assert json.loads(text_of(server, reply).partition("\r\n\r\n")[2])["error"] == "BackendError"


def test_bare_line_feeds_are_refused(server: RunningServer, head: str) -> None:
    status, reply, closed = sent(server, f"{head}{LENGTH}\r\n{BODY}".replace("\r\n", "\n").encode())
    assert (status, closed) == (400, True)
    text_of(server, reply)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"hello\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 505),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\0" * 100_000, 400),
    ],
    ids=["TLS", "no HTTP", "HTTP/2", "HTTP/0.9", "no host", "long path", "zeros"],
)
def test_what_is_no_request_is_refused(server: RunningServer, data: bytes, wanted: int) -> None:
    status, reply, closed = sent(server, data)
    assert (status, closed) == (wanted, True)
    text_of(server, reply)


@settings(max_examples=150, suppress_health_check=[*HealthCheck], derandomize=True)
@given(cut=st.integers(0, 200), junk=st.binary(min_size=1, max_size=40))
def test_junk_anywhere_breaks_nothing(server: RunningServer, head: str, cut: int, junk: bytes) -> None:
    data = f"{head}{LENGTH}\r\n{BODY}".encode()
    status, reply, _ = sent(server, data[:cut] + junk + data[cut:], 0.02)
    assert status < 500 or status == 505
    text_of(server, reply)


def test_paths_lead_nowhere_else(server: RunningServer) -> None:
    key = {"Authorization": of_server(server)}
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/%252e%252e",
        "/v1\\jobs",
        "//v1/server",
        "/%ff%zz",
    ):
        assert request(server, "GET", path, headers=key).status == 404
    for target in ("http://evil.example/v1/nothing", "*"):
        status, _, _ = sent(server, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert status in (400, 404)


def test_an_unknown_expectation_is_not_repeated(server: RunningServer, head: str) -> None:
    data = f"{head}Expect: <b>x</b>\r\nConnection: close\r\n{LENGTH}\r\n{BODY}"
    status, reply, _ = sent(server, data.encode())
    assert status == 417
    assert b"<b>" not in reply


# --- S11: what is too much --------------------------------------------------------------------------------------------


def test_a_body_needs_a_length(server: RunningServer, head: str) -> None:
    status, reply, closed = sent(server, f"{head}{CHUNKED}\r\n{IN_CHUNKS}".encode())
    assert (status, closed) == (411, True)
    assert b"Content-Length" in reply


def test_compressed_bodies_are_refused(server: RunningServer) -> None:
    headers = {"Authorization": of_server(server), "Content-Encoding": "gzip"}
    reply = request(server, "POST", f"{API}/jobs/statuses", b"\x1f\x8b" + b"\0" * 100, headers)
    assert reply.status == 415


@pytest.mark.parametrize("lead", [f"Content-Length: {10 << 30}\r\n", CHUNKED], ids=["declared", "streamed"])
def test_ten_gigabytes_cost_no_memory(server: RunningServer, head: str, lead: str) -> None:
    ask(server, "statuses", {"jids": []})
    before, n_sent = rss_bytes(server), 0
    piece = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10.0) as connection:
        connection.sendall(f"{head}Content-Type: {MESSAGE_TYPE}\r\n{lead}\r\n".encode())
        try:
            while n_sent < 10 << 30:
                connection.sendall(piece)
                n_sent += len(piece)
                assert rss_bytes(server) - before < 64 << 20
                if n_sent > 512 << 20:
                    break  # it is taking them to let the reply be read, and keeps none
        except OSError:
            pass
    assert rss_bytes(server) - before < 64 << 20
    assert ask(server, "connection_info").status == 200


def test_json_has_a_limit_of_its_own(server: RunningServer) -> None:
    wanted = {"jids": [[0, 0]] * 200_000}
    reply = ask(server, "statuses", wanted)
    assert reply.status == 413
    assert reply.content["error"] == "PayloadTooLarge"
    packed = b"".join(pack_message(wanted, []))
    headers = {"Authorization": of_server(server), "Content-Type": MESSAGE_TYPE}
    assert request(server, "POST", f"{API}/jobs/statuses", packed, headers).status == 400


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x0c\0\0\0{\"blobs\":[9]}", b"\x0e\0\0\0{\"blobs\":[-1]}", b"", b"\0" * 9,
     b"\x13\0\0\0{\"blobs\":[true,1]}x ", b"\x02\0\0\0[]"],
)  # fmt: skip
def test_a_message_that_is_none(server: RunningServer, data: bytes) -> None:
    headers = {"Authorization": of_server(server), "Content-Type": MESSAGE_TYPE}
    assert request(server, "POST", f"{API}/jobs/statuses", data, headers).status == 400


BAD_JSON = {
    "nothing": "",
    "no object": "[]",
    "not finished": '{"jids": [[1, 2]]',
    "NaN": '{"jids": [[NaN, 2]]}',
    "infinite": '{"jids": [[1, Infinity]]}',
    "1e999": '{"jids": [[1, 1e999]]}',
    "5,000 digits": '{"jids": [[1, ' + "9" * 5000 + "]]}",
    "64 bits": '{"jids": [[1, 9223372036854775808]]}',
    "negative": '{"jids": [[-1, 1]]}',
    "fraction": '{"jids": [[0.5, 1]]}',
    "true": '{"jids": [[true, 2]]}',
    "text": '{"jids": [["1", 2]]}',
    "null": '{"jids": null}',
    "one number": '{"jids": [[1]]}',
    "twice": '{"jids": [[1, 2]], "jids": [[2, 3]]}',
    "more": '{"jids": [[1, 2]], "x": 2}',
    "deep": '{"jids": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"jids":' * 50_000 + "1" + "}" * 50_000,
    "half a surrogate pair": '{"jids": [[1, 2]], "\\ud800": 2}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_none(server: RunningServer, name: str) -> None:
    headers = {"Authorization": of_server(server)}
    reply = request(server, "POST", f"{API}/jobs/describe", BAD_JSON[name].encode(), headers)
    assert reply.status == 400
    assert len(reply.body) < 1000


def test_json_is_utf_8(server: RunningServer) -> None:
    headers = {"Authorization": of_server(server)}
    for coding in ("utf-16", "utf-32", "utf-8-sig"):
        reply = request(server, "POST", f"{API}/jobs/describe", '{"jids": [[1, 2]]}'.encode(coding), headers)
        assert reply.status == 400, coding
    assert request(server, "POST", f"{API}/jobs/describe", b'{"jids": [[1.0, 2.0]]}', headers).status == 404


def test_half_a_surrogate_pair_in_a_label(server: RunningServer) -> None:
    for label in ("\ud800", "x\udfff", "\udfff\ud800"):
        reply = ask(server, "select", {"label": label, "status": None, "function": None})
        assert reply.status == 400
    assert ask(server, "select", {"label": "\U0001f600\0", "status": None, "function": None}).status == 200


@pytest.mark.parametrize(
    ("op", "content", "wanted"),
    [
        ("statuses", {"jids": [[5, 1]]}, 400),
        ("statuses", {"jids": [[0, 2**63 - 1]]}, 413),
        ("finals", {"jids": [[0, 2**63 - 1]], "timeout_s": 0, "poll": "x"}, 413),
        ("statuses", {"jids": [[0, 1_500_000], [0, 1_500_000]]}, 413),
        ("wait", {"jids": [], "timeout_s": -1, "stop_on_error": False}, 400),
        ("wait", {"jids": [], "timeout_s": 1e10, "stop_on_error": False}, 400),
        ("select", {"label": "x" * 4097, "status": None, "function": None}, 400),
        ("release", {"poll": "x" * 5000}, 400),
        ("missing_code", {"files": [["a.py", "0" * 64, 1]] * 10_001}, 400),
        ("missing_code", {"files": [["../a.py", "0" * 64, 1]]}, 400),
        ("missing_code", {"files": [["/etc/a.py", "0" * 64, 1]]}, 400),
        ("missing_code", {"files": [["a\0.py", "0" * 64, 1]]}, 400),
        ("missing_code", {"files": [["a.py", "x", 1]]}, 400),
        ("missing_code", {"files": [["a.py", "0" * 64, -1]]}, 400),
        ("missing_code", {"files": [["a.py", "0" * 64, 10**12]]}, 400),
        ("missing_code", {"files": [[1, 2, 3]]}, 400),
        ("files.list", {"prefix": "x" * 2000, "after": ""}, 400),
        ("account.create_key", {"note": "x" * 2000}, 400),
        ("account.create_key", {"scopes": ["root"]}, 400),
        ("account.create_key", {"expires": "never"}, 403),
    ],
)
def test_content_out_of_bounds(server: RunningServer, op: str, content: dict[str, Any], wanted: int) -> None:
    began = time.monotonic()
    reply = ask(server, op, content)
    assert reply.status == wanted, reply.content
    assert time.monotonic() - began < 5
    text_of(server, reply.body)


def test_many_jids_that_never_were_stop_nobody(server: RunningServer) -> None:
    asked = Answering(server, "finals", {"jids": [[0, 20_000_000]], "timeout_s": 0, "poll": "x"})
    slowest = 0.0
    for _ in range(20):
        began = time.monotonic()
        assert ask(server, "connection_info").status == 200
        slowest = max(slowest, time.monotonic() - began)
    assert asked.result().status == 200
    assert slowest < 1.0


def test_a_map_says_how_many_jobs_it_is(server: RunningServer) -> None:
    before = rss_bytes(server)
    content = {"function": "f", "reusable": False, "options": {}, "chunks": [[1, 2**31]] * 1000, "sealed": True}
    reply = ask(server, "open_map", content, [b""] * 1002)
    assert reply.status == 409
    assert "may have" in reply.content["text"]
    assert rss_bytes(server) - before < 64 << 20


@pytest.mark.parametrize("n", [0, 1, 2, 4, 100])
def test_a_submission_has_three_blobs(server: RunningServer, n: int) -> None:
    assert ask(server, "submit", {"function": "f", "reusable": False, "options": {}}, [b"x"] * n).status == 400


@pytest.mark.parametrize(
    "options",
    [
        {"cores": 0},
        {"cores": 10**9},
        {"priority": 2**70},
        {"max_runtime_s": -1},
        {"retries": -1},
        {"retry_delay_s": 1e300},
        {"unknown": 1},
        {"env_vars": {"A": 1}},
        {"env_vars": []},
        {"label": 5},
        {"depends_on": "all"},
        {"depends_on": [-1]},
        {"fast_serialization": 9},
        {"restartable": "yes"},
    ],
)
def test_options_that_are_none(server: RunningServer, options: dict[str, Any]) -> None:
    content = {"function": "f", "reusable": False, "options": options}
    assert ask(server, "submit", content, [b"", b"", b""]).status == 400


def test_idempotency_keys_are_short_and_plain(server: RunningServer) -> None:
    for key in ("x" * 129, "\xe4", "a\tb"):
        assert ask(server, "delete", {"jids": []}, key=key).status in (400,), key


# --- hypothesis: content of every operation ---------------------------------------------------------------------------

WILD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["../../etc/passwd", "a\0b", "%2e%2e", "CON", "é", "e\u0301", "'; DROP TABLE job; --", "x" * 5000]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[*HealthCheck], derandomize=True)
@given(data=st.data(), op=st.sampled_from(sorted(TABLE)))
def test_no_content_breaks_an_operation(server: RunningServer, data: st.DataObject, op: str) -> None:
    content, blobs = example(TABLE[op])
    names = data.draw(st.lists(st.sampled_from([*TABLE[op].request, "x"]), unique=True, min_size=1, max_size=3))
    content |= {name: data.draw(WILD) for name in names}
    if op in ("wait", "finals"):
        content["timeout_s"] = 0
    reply = ask(server, op, content, blobs)
    assert reply.status not in (500, 502, 503), (content, reply.content)
    text_of(server, reply.body)


# --- S6: names --------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """What is below a folder, but for the server's own."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "data" not in path.relative_to(folder).parts[:1]:
            stat = path.lstat()
            found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found


NAMES = (
    *("../x", "../../../../etc/x", "/etc/x", "a/../../x", "..", ".", "~", "~/x", "a\\..\\x", "con", "NUL", "x.", "x "),
    *(
        "%2e%2e/x",
        "%252e%252e%252fx",
        "a\nb",
        "\x1b[2J",
        "-rf",
        "$(x)",
        "`x`",
        "é",
        "e\u0301",
        "x" * 1024,
        "\u202e",
        "a//b",
    ),
)


def test_names_are_never_paths(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "secret").write_text("secret")
    with RunningServer(tmp_path / "data") as server:
        ask(server, "files.exists", {"name": "x"})
        os.symlink(beside, server.data / "groups" / "1" / "link")
        before = tree(tmp_path)
        for name in NAMES:
            contents = name.encode()
            digest = hashlib.sha256(contents).hexdigest()
            put = ask(server, "files.put", {"name": name, "sha256": digest}, [contents])
            if put.status != 200:
                assert put.status == 400, (name, put.content)
                continue
            assert ask(server, "files.open", {"name": name, "start": 0, "n": 2000}).blobs == [contents], name
        for name in ("../../../beside/secret", "link/secret", str(beside / "secret")):
            assert ask(server, "files.open", {"name": name, "start": 0, "n": 10}).status in (400, 404)
            label = {**example(TABLE["cron.register"])[0], "label": name}
            ask(server, "cron.register", label, example(TABLE["cron.register"])[1])
        names = ask(server, "files.list", {"prefix": "", "after": ""}).content["names"]
        for name in names:
            assert ask(server, "files.delete", {"name": name}).content == {"deleted": True}
        after = tree(tmp_path)
    log = str(tmp_path / "data.log")
    assert {path: facts for path, facts in before.items() if path != log} == {
        path: facts for path, facts in after.items() if path != log
    }


# --- S14: the log -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["", "--json-logs"])
def test_no_input_forges_a_line_of_the_log(tmp_path: Path, option: str) -> None:
    with RunningServer(tmp_path / "data", *([option] if option else [])) as server:
        for path in ("/%0a2030-01-01%20request", "/%0d%0ax", "/%1b%5b2J", "/%e2%80%a8", "/" + "a" * 5000, "/%22%7d"):
            request(server, "GET", path, headers={"User-Agent": "x\ty", "Authorization": of_server(server)})
        ask(server, "cancel", {"jids": None, "begun": True}, key="a b")
        n = 7
    data = server.log.read_bytes()
    assert not any(byte < 32 and byte != 10 for byte in data)
    assert all(byte < 127 for byte in data)
    lines = [line for line in data.decode().splitlines() if not line.startswith("cloud:")]
    if option:
        found = [json.loads(line) for line in lines]
        assert sum(each["event"] == "request" for each in found) == n
    else:
        stamp = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z ")
        assert all(stamp.match(line) for line in lines), lines
        assert sum(stamp.sub("", line).startswith("request ") for line in lines) == n
    assert max(map(len, lines)) < 1000


# --- S24: errors ------------------------------------------------------------------------------------------------------


def test_a_failing_server_tells_a_number_only(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        ask(server, "files.exists", {"name": "x"})
        folder = server.data / "groups" / "1"
        broken = [path for path in folder.rglob("*.sqlite3*") if "jobs" not in path.name]
        for path in broken:
            path.write_bytes(b"no database" * 1000)
        (folder / "code").write_text("not a folder")
        for name in ("files", "blobs"):
            if (folder / name).is_dir():
                os.rename(folder / name, folder / f"{name}.gone")
                (folder / name).write_text("not a folder")
        statuses = set()
        for op in sorted(TABLE):
            if not op.startswith("account."):
                content, blobs = example(TABLE[op])
                if op in ("missing_code", "publish_code"):
                    content["files"] = [["a.py", "f" * 64, 1]]
                if op == "files.put":
                    content["sha256"] = hashlib.sha256(blobs[0]).hexdigest()
                reply = ask(server, op, content, blobs)
                statuses.add(reply.status)
                text = text_of(server, reply.body)
                assert not re.search(r"SELECT|INSERT|sqlite|\.py\b|File \"|/groups/", text), (op, text)
                if reply.status == 500:
                    number = reply.content["id"]
                    assert number in reply.content["text"]
                    assert number in server.log.read_text()
        assert statuses & {500, 507}


# --- replies ----------------------------------------------------------------------------------------------------------


def test_every_reply_has_a_number_and_no_reply_is_a_page(server: RunningServer) -> None:
    for reply in (
        request(server, "GET", "/<script>alert(1)</script>"),
        request(server, "GET", "/healthz"),
        ask(server, "connection_info"),
        ask(server, "connection_info", authorization="Bearer <b>"),
    ):
        assert reply.headers["Content-Type"].startswith("application/json")
        assert re.fullmatch("[0-9a-f]{16}", reply.headers["X-Request-Id"])
        assert b"<" not in reply.body
        assert "aiohttp" not in reply.headers["Server"].lower()
