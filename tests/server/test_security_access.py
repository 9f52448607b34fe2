"""Who may ask what: keys and scopes on every route, and workgroups that do not exist for each other."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.resources.accounts import AccountStore
from cloud.resources.keys import SCOPES
from cloud.server.app import Application
from cloud.server.audit import AuditLog, records
from cloud.server.auth import Authenticator
from cloud.server.config import ServerConfig
from cloud.server.groups import Groups
from cloud.wire import API
from tests.server.raw import HASH, TABLE, ask, bearer, example, of_server, request, sent
from tests.server.running import RunningServer

pytestmark = pytest.mark.usefixtures("closed_after")

OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")}
EVERY = sorted(TABLE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("access") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def guessed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One at which somebody guesses, which all from that address have to wait for."""
    with RunningServer(tmp_path_factory.mktemp("guessed") / "data") as server:
        yield server


def key_with(server: RunningServer, *scopes: str) -> str:
    store = AccountStore(str(server.data))
    try:
        key = store.create_key("admin", "", scopes)
    finally:
        store.close()
    assert key.api_secretkey is not None
    return bearer(key.api_key, key.api_secretkey)


@pytest.fixture(scope="module")
def keys(server: RunningServer) -> dict[str, tuple[str, str]]:
    """By scope: a key that has it alone, and one that has all others."""
    return {each: (key_with(server, each), key_with(server, *(set(SCOPES) - {each}))) for each in SCOPES}


# --- S1: keys and scopes ----------------------------------------------------------------------------------------------


def test_every_route_is_in_the_table_or_open(tmp_path: Path) -> None:
    accounts = AccountStore(str(tmp_path))
    config = ServerConfig(data=str(tmp_path))
    application = Application(
        config, Groups(config, accounts, -1), Authenticator(accounts), AuditLog(str(tmp_path / "audit")), lambda _: None
    )
    routes = {(route.method, route.resource.canonical) for route in application.web.router.routes() if route.resource}
    accounts.close()
    known = {(operation.method, API + operation.path) for operation in TABLE.values()}
    heads = {("HEAD", path) for _, path in routes if ("GET", path) in routes}
    assert known <= routes
    assert routes - known - heads - OPEN == {("GET", "/openapi.json")}


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer",
        "Bearer 1",
        f"Bearer 1:cld_{'A' * 43}",
        "Bearer 0:x",
        "Bearer 99999999999999999999:x",
        "Token abc",
        "Basic !!!!",
    ],
)
def test_without_a_key_nothing_is_answered(guessed: RunningServer, authorization: str | None) -> None:
    for op in EVERY:
        reply = ask(guessed, op, *example(TABLE[op]), authorization=authorization)
        # 429: from this address have come many of these by now.
        assert reply.status in ((401, 429) if authorization else (401,)), op
        assert reply.content["error"] == "AccountError"
        if reply.status == 401:
            assert "bearer" in reply.headers["WWW-Authenticate"].lower()


def test_the_document_needs_a_key(server: RunningServer) -> None:
    assert request(server, "GET", "/openapi.json").status == 401
    reply = request(server, "GET", "/openapi.json", headers={"Authorization": of_server(server)})
    assert (reply.status, reply.content["openapi"]) == (200, "3.1.0")


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_is_needed_and_enough(server: RunningServer, keys: dict[str, tuple[str, str]], scope: str) -> None:
    alone, others = keys[scope]
    for op in EVERY:
        if TABLE[op].scope == scope:
            refused = ask(server, op, *example(TABLE[op]), authorization=others)
            assert refused.status == 403, op
            assert scope in refused.content["text"]
            taken = ask(server, op, *example(TABLE[op]), authorization=alone)
            assert taken.status not in (401, 403), (op, taken.content)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "POST"])
def test_no_other_method_does_anything(server: RunningServer, method: str) -> None:
    for operation in TABLE.values():
        if operation.method != method:
            reply = request(server, method, API + operation.path, headers={"Authorization": of_server(server)})
            assert reply.status == 405
            assert "Access-Control-Allow-Origin" not in reply.headers


def test_passwords_are_for_accounts_only(server: RunningServer) -> None:
    store = AccountStore(str(server.data))
    store.create_user("ada", "a long password", "main")
    store.close()
    basic = "Basic " + base64.b64encode(b"ada:a long password").decode()
    assert ask(server, "account.sign_in", authorization=basic).content["user"] == "ada"
    for op in EVERY:
        if not op.startswith("account."):
            reply = ask(server, op, *example(TABLE[op]), authorization=basic)
            assert reply.status == 401
            assert "create_api_key" in reply.content["hint"]


def test_guesses_are_stopped_and_right_keys_are_not(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        wrong = [ask(server, "account.sign_in", authorization=bearer(1, f"cld_{n:043}")) for n in range(14)]
        assert [each.status for each in wrong] == [401] * 10 + [429] * 4
        assert wrong[-1].content["error"] == "AccountError"
        assert 1 <= int(wrong[-1].headers["Retry-After"]) <= 60
        assert ask(server, "connection_info").status == 200


def test_a_revoked_key_is_refused_within_a_second(server: RunningServer) -> None:
    store = AccountStore(str(server.data))
    key = store.create_key("admin")
    assert key.api_secretkey is not None
    authorization = bearer(key.api_key, key.api_secretkey)
    assert ask(server, "connection_info", authorization=authorization).status == 200
    store.revoke_key("admin", key.api_key)
    store.close()
    until = time.monotonic() + 1.5
    while ask(server, "connection_info", authorization=authorization).status == 200:
        assert time.monotonic() < until
    assert ask(server, "connection_info", authorization=authorization).status == 401


# --- S10 --------------------------------------------------------------------------------------------------------------


def test_no_page_of_another_origin_reads_a_reply(server: RunningServer) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null", "Authorization": of_server(server)}):
        reply = request(server, "GET", f"{API}/server", headers=headers)
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        assert reply.headers["Cache-Control"] == "no-store"


# --- S3, S4: workgroups -----------------------------------------------------------------------------------------------


class Neighbours:
    """Two workgroups; the first has jobs, files, crons, an upload and modules, the second nothing."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.a = bearer(*server.new_group())
        self.b = bearer(*server.new_group())
        submission = {"function": "f", "reusable": False, "options": {"label": "mine"}}
        self.jids = [
            ask(server, "submit", submission, [b"junk", b"", b""], authorization=self.a).content["jid"]
            for _ in range(20)
        ]
        chunk = {**submission, "chunks": [[1, 3]], "sealed": False}
        opened = ask(server, "open_map", chunk, [b"junk", b"", b"junk"], authorization=self.a)
        assert opened.status == 200, opened.content
        self.map = opened.content["map"]
        self.digest = hashlib.sha256(b"contents of a").hexdigest()
        put = {"name": "file of a", "sha256": self.digest}
        assert ask(server, "files.put", put, [b"contents of a"], authorization=self.a).status == 200
        self.upload = ask(server, "files.begin", authorization=self.a).content["upload"]
        cron, blobs = example(TABLE["cron.register"])
        assert ask(server, "cron.register", {**cron, "label": "cron of a"}, blobs, authorization=self.a).status == 200
        self.code = [["m.py", self.digest, 13]]
        made = {"files": self.code, "contents": [self.digest]}
        assert ask(server, "publish_code", made, [b"contents of a"], authorization=self.a).status == 200

    def told(self, op: str, content: dict[str, Any], blobs: list[bytes], names: dict[str, str]) -> tuple[int, str]:
        """What B is told, without the number of the request, and with ``names`` in place of what was asked for."""
        reply = ask(self.server, op, content, blobs, authorization=self.b)
        text = re.sub(r'"id": "[0-9a-f]{16}"', "", reply.body.decode("latin-1"))
        for name, value in names.items():
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", name, text)
        return reply.status, text


@pytest.fixture(scope="module")
def neighbours(server: RunningServer) -> Neighbours:
    return Neighbours(server)


def pairs_of(neighbours: Neighbours) -> list[tuple[str, dict[str, Any], dict[str, Any], list[bytes]]]:
    """Requests about what A has, and the same about what nobody ever had."""
    jid, never = neighbours.jids[-1], 7_000_000
    run, none = {"jids": [[jid, jid + 1]]}, {"jids": [[never, never + 1]]}
    wait, poll = {"timeout_s": 0, "stop_on_error": False}, {"timeout_s": 0, "poll": "p"}
    found = [
        ("wait", {**run, **wait}, {**none, **wait}, []),
        ("finals", {**run, **poll}, {**none, **poll}, []),
        ("outcomes", run, none, []),
        ("statuses", run, none, []),
        ("describe", run, none, []),
        ("cancel", {**run, "begun": True}, {**none, "begun": True}, []),
        ("delete", run, none, []),
        ("abandon", {"map": neighbours.map}, {"map": never}, []),
        (
            "extend",
            {"map": neighbours.map, "chunks": [], "sealed": True},
            {"map": never, "chunks": [], "sealed": True},
            [],
        ),
    ]
    for label in ({"label": "mine"}, {"label": None}):
        rest = {"status": None, "function": None}
        found.append(("select", {**label, **rest}, {"label": "nobody's", **rest}, []))
    options = {"depends_on": [jid]}, {"depends_on": [never]}
    submission = {"function": "f", "reusable": False}
    found.append(
        ("submit", {**submission, "options": options[0]}, {**submission, "options": options[1]}, [b"", b"", b""])
    )
    mine, nobodys = {"name": "file of a"}, {"name": "file of x"}
    for op in ("files.exists", "files.info", "files.delete"):
        found.append((op, mine, nobodys, []))
    start = {"start": 0, "n": 100}
    found += [
        ("files.open", {**mine, **start}, {**nobodys, **start}, []),
        ("files.read", {"sha256": neighbours.digest, **mine, **start}, {"sha256": HASH, **nobodys, **start}, []),
        ("files.abort", {"upload": neighbours.upload}, {"upload": "0" * 32}, []),
        ("files.append", {"upload": neighbours.upload, "offset": 0}, {"upload": "0" * 32, "offset": 0}, [b"x"]),
        ("cron.info", {"label": "cron of a"}, {"label": "cron of x"}, []),
        ("cron.deregister", {"label": "cron of a"}, {"label": "cron of x"}, []),
        ("cron.manual_run", {"label": "cron of a"}, {"label": "cron of x"}, []),
        ("missing_code", {"files": neighbours.code}, {"files": [["m.py", HASH, 13]]}, []),
        (
            "publish_code",
            {"files": neighbours.code, "contents": []},
            {"files": [["m.py", HASH, 13]], "contents": []},
            [],
        ),
    ]
    commit = {"upload": neighbours.upload, "name": "n", "sha256": HASH}
    found.append(("files.commit", commit, {**commit, "upload": "0" * 32}, []))
    return found


def test_what_another_workgroup_has_is_what_nobody_ever_had(neighbours: Neighbours) -> None:
    jid = str(neighbours.jids[-1])
    mine = {
        "JIDS": f"[[{jid}, {int(jid) + 1}]]",
        "JID": jid,
        "MAP": str(neighbours.map),
        "UPLOAD": neighbours.upload,
        "HASH": neighbours.digest,
        "FILE": "file of a",
        "CRON": "cron of a",
    }
    nobodys = {
        "JIDS": "[[7000000, 7000001]]",
        "JID": "7000000",
        "MAP": "7000000",
        "UPLOAD": "0" * 32,
        "HASH": HASH,
        "FILE": "file of x",
        "CRON": "cron of x",
    }
    for op, asked, never, blobs in pairs_of(neighbours):
        one = neighbours.told(op, asked, blobs, mine)
        other = neighbours.told(op, never, blobs, nobodys)
        one, other = ((status, text.replace("MAP", "JID")) for status, text in (one, other))
        assert one == other, op


def test_lists_of_another_workgroup_are_empty(neighbours: Neighbours) -> None:
    everything = {"label": None, "status": None, "function": None}
    for op, content, empty in (
        ("select", everything, {"jids": []}),
        ("files.list", {"prefix": "", "after": ""}, {"names": [], "more": False}),
        ("cron.list", {}, {"labels": []}),
    ):
        assert ask(neighbours.server, op, content, authorization=neighbours.b).content == empty
        assert ask(neighbours.server, op, content, authorization=neighbours.a).content != empty


def test_killing_all_kills_none_of_another_workgroup(neighbours: Neighbours) -> None:
    server = neighbours.server
    jid, everything = neighbours.jids[0], {"jids": None, "begun": True}
    assert ask(server, "cancel", everything, authorization=neighbours.b).content == {"pending": []}
    info = ask(server, "describe", {"jids": [[jid, jid + 1]]}, authorization=neighbours.a).content["facts"]
    assert "killed" not in json.dumps(info)


def test_a_key_that_another_used_answers_nothing_of_theirs(neighbours: Neighbours) -> None:
    server = neighbours.server
    made = ask(server, "account.create_key", authorization=neighbours.a, key="same")
    again = ask(server, "account.create_key", authorization=neighbours.a, key="same")
    other = ask(server, "account.create_key", authorization=neighbours.b, key="same")
    assert made.content == again.content
    assert made.content["api_secretkey"] != other.content["api_secretkey"]
    submission = {"function": "f", "reusable": False, "options": {}}
    first = ask(server, "submit", submission, [b"", b"", b""], authorization=neighbours.a, key="one").content
    assert ask(server, "submit", submission, [b"", b"", b""], authorization=neighbours.a, key="one").content == first
    assert ask(server, "submit", submission, [b"", b"", b""], authorization=neighbours.b, key="one").content != first


def test_users_and_keys_of_another_workgroup_do_not_exist(neighbours: Neighbours) -> None:
    server = neighbours.server
    user = ask(server, "account.sign_in", authorization=neighbours.a).content["user"]
    number = int(neighbours.a.split(" ")[1].split(":")[0])
    for op in EVERY:
        if op.startswith("account.") and "user" in TABLE[op].request and op != "account.create_user":
            content, _ = example(TABLE[op])
            about = {**content, "user": user, **({"api_key": number} if "api_key" in content else {})}
            nobody = {**about, "user": "never", **({"api_key": 10**6} if "api_key" in content else {})}
            mine = neighbours.told(op, about, [], {"USER": user})
            assert mine == neighbours.told(op, nobody, [], {"USER": "never"}), op
            assert mine[0] == 404


@settings(max_examples=60, suppress_health_check=[*HealthCheck], derandomize=True)
@given(data=st.data())
def test_whatever_b_does_a_keeps_what_it_has(neighbours: Neighbours, data: st.DataObject) -> None:
    op, asked, never, blobs = data.draw(st.sampled_from(pairs_of(neighbours)))
    content = {**asked, **data.draw(st.sampled_from([asked, never]))}
    assert ask(neighbours.server, op, content, blobs, authorization=neighbours.b).status in (200, 400, 404, 409, 507)
    run = {"jids": [[neighbours.jids[0], neighbours.jids[-1] + 1]]}
    assert len(ask(neighbours.server, "statuses", run, authorization=neighbours.a).blobs[0]) == len(neighbours.jids)
    contents = {"name": "file of a", "start": 0, "n": 100}
    assert ask(neighbours.server, "files.open", contents, authorization=neighbours.a).blobs == [b"contents of a"]
    assert ask(neighbours.server, "cron.list", authorization=neighbours.a).content == {"labels": ["cron of a"]}


# --- S5: secrets ------------------------------------------------------------------------------------------------------

SPY = """
import os, glob
found = []
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    try:
        with open(path, "rb") as file:
            if SECRET in file.read():
                found.append(path)
    except OSError:
        pass
"""


def test_secrets_are_nowhere(tmp_path: Path) -> None:
    import cloud

    with RunningServer(tmp_path / "data", "--json-logs") as server:
        secret = server.api_secretkey
        cloud.setkey(server.api_key, secret, server.url)
        try:
            part = secret[4:30].encode()

            def spy(source: str, n: int) -> list[str]:
                scope: dict[str, Any] = {"SECRET": bytes(byte ^ n for byte in hidden)}
                exec(source, scope)
                return list(scope["found"])

            # Not as it is: the job itself must not be where it is found.
            hidden = bytes(byte ^ 1 for byte in part)
            assert cloud.result(cloud.call(spy, SPY, 1)) == []
        finally:
            cloud.close()
        # Where a wrong client may put it.
        request(server, "GET", f"/v1/server?api_secretkey={secret}")
        request(server, "GET", "/v1/server", headers={"Authorization": f"Token {secret}"})
        sent(server, f"GET /v1/server HTTP/1.1\nAuthorization: Bearer 1:{secret}\n\n".encode())
        sent(server, f"GET /v1/server HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer 1:{secret}\r\n\r\n".encode())
        made = ask(server, "account.create_key", key="again").content["api_secretkey"]
    for path in (path for path in tmp_path.rglob("*") if path.is_file() and path.name != "pepper"):
        data = path.read_bytes()
        assert part not in data, path
        assert made[4:30].encode() not in data, path


# --- S21: the audit log -----------------------------------------------------------------------------------------------


def test_what_changes_something_is_recorded(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        done = []
        user = {"user": "eve@main"}
        password = {"user": "eve", "password": "a long password", "role": "member"}
        number = {"api_key": 2, "user": "admin"}
        known: dict[str, dict[str, Any]] = {
            "account.create_user": password,
            "account.set_user_role": {**user, "role": "read_only"},
            "account.set_user_active": {**user, "active": False},
            "account.set_password": {**user, "password": "another password"},
            "account.create_key": {},
            **{f"account.{verb}_key": number for verb in ("deactivate", "activate", "revoke")},
            "account.note_key": {**number, "note": "mine"},
        }
        for op, content in known.items():
            reply = ask(server, op, content)
            assert reply.status == 200, (op, reply.content)
            done.append(op)
        empty = hashlib.sha256(b"x").hexdigest()
        for op, content, blobs in (
            ("files.put", {"name": "n", "sha256": empty}, [b"x"]),
            ("files.begin", {}, []),
            ("submit", example(TABLE["submit"])[0], [b"", b"", b""]),
            ("open_map", {**example(TABLE["open_map"])[0], "sealed": False}, [b"", b""]),
            ("abandon", {"map": 2}, []),
            ("cancel", {"jids": None, "begun": True}, []),
            ("publish_code", {"files": [], "contents": []}, []),
            ("cron.register", *example(TABLE["cron.register"])),
            ("cron.manual_run", {"label": "nobody"}, []),
            ("cron.deregister", {"label": "nobody"}, []),
            ("files.delete", {"name": "n"}, []),
        ):
            reply = ask(server, op, content, blobs)
            if op == "open_map" and reply.status == 200:
                known["abandon"] = {"map": reply.content["map"]}
            if op == "abandon" and reply.status != 200:
                reply = ask(server, op, known["abandon"])
            assert reply.status == 200, (op, reply.content)
            done.append(op)
        # What was refused changed nothing.
        assert ask(server, "cron.deregister", {"label": "nobody"}).status == 404
    lines = list(records(str(server.data / "audit.log")))
    assert [line["action"] for line in lines] == done
    assert {(line["who"], line["key"], line["address"]) for line in lines} == {("admin", 1, "127.0.0.1")}
    assert "password" not in (server.data / "audit.log").read_text().replace("set_password", "")
    verified = subprocess.run(
        [sys.executable, "-m", "cloud", "admin", "audit", "verify", "--data", str(server.data)],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
