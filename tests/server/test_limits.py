"""What a server gives at most: to slow senders and readers, to one address, key or workgroup, and to who goes away."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloud.engine.executor.slots import Slots
from cloud.resources.accounts import AccountStore
from cloud.resources.principals import Quotas
from cloud.server.config import ServerConfig
from cloud.server.groups import Group
from cloud.wire import API, MAX_WAIT_S, MESSAGE_TYPE
from tests.server.raw import Reply, ask, bearer, held_open, of_server, sent, tuned
from tests.server.running import RunningServer

pytestmark = pytest.mark.usefixtures("closed_after")

HEAD = f"POST {API}/jobs/statuses HTTP/1.1\r\nHost: x\r\n"
SUBMISSION: dict[str, Any] = {"function": "f", "reusable": False, "options": {}}
SOON_S = 15.0


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that waits half a second where others wait ten."""
    with tuned(tmp_path_factory.mktemp("hasty") / "data", header_s=0.5, slow_after_s=0.5) as server:
        yield server


def eventually(what: Callable[[], bool], within_s: float = SOON_S) -> None:
    until = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def n_connections(server: RunningServer) -> int:
    assert server.process is not None
    return sum(
        each.status == psutil.CONN_ESTABLISHED for each in psutil.Process(server.process.pid).net_connections("tcp")
    )


def quick_while(server: RunningServer, n: int = 200) -> float:
    """The second slowest of some requests of a normal client on one connection, in seconds."""
    from http.client import HTTPConnection

    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    times = []
    try:
        for _ in range(n):
            began = time.perf_counter()
            connection.request("GET", f"{API}/server", headers={"Authorization": of_server(server)})
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            times.append(time.perf_counter() - began)
    finally:
        connection.close()
    return sorted(times)[int(n * 0.99) - 1]


# --- S12: slow clients ------------------------------------------------------------------------------------------------


def test_a_thousand_slow_heads_slow_nobody_down(hasty: RunningServer) -> None:
    with held_open(hasty, f"{HEAD}X: ".encode(), 1000):
        assert quick_while(hasty) < 0.1
        eventually(lambda: n_connections(hasty) < 10)


def test_a_head_may_not_drip(hasty: RunningServer) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", hasty.port), 10.0) as connection, contextlib.suppress(OSError):
        for byte in HEAD.encode():
            connection.sendall(bytes((byte,)))
            time.sleep(0.1)
            if time.monotonic() - began > 5:
                break
    assert time.monotonic() - began < 5


def test_an_idle_connection_ends(hasty: RunningServer) -> None:
    assert sent(hasty, b"", 5.0) == (0, b"", True)


@pytest.mark.parametrize("kind", ["application/json", MESSAGE_TYPE])
def test_a_body_may_not_stop(hasty: RunningServer, kind: str) -> None:
    head = f"{HEAD}Authorization: {of_server(hasty)}\r\nContent-Type: {kind}\r\nContent-Length: 100000\r\n\r\n{{"
    status, reply, closed = sent(hasty, head.encode(), 8.0)
    assert (status, closed) == (408, True)
    assert b"slowly" in reply


def test_a_body_may_not_drip(hasty: RunningServer) -> None:
    began = time.monotonic()
    head = f"{HEAD}Authorization: {of_server(hasty)}\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hasty.port), 10.0) as connection, contextlib.suppress(OSError):
        connection.sendall(head.encode())
        while time.monotonic() - began < 10:
            connection.sendall(b" ")
            time.sleep(0.05)
    assert time.monotonic() - began < 8


def test_a_reply_must_be_read(hasty: RunningServer) -> None:
    contents = os.urandom(1 << 20) * 12
    put = {"name": "large", "sha256": hashlib.sha256(contents).hexdigest()}
    assert ask(hasty, "files.put", put, [contents]).status == 200
    body = json.dumps({"name": "large", "start": 0, "n": 1 << 24})
    head = f"POST {API}/files/open HTTP/1.1\r\nHost: x\r\nAuthorization: {of_server(hasty)}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10.0)
        connection.connect(("127.0.0.1", hasty.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        eventually(lambda: n_connections(hasty) == 1)
        eventually(lambda: n_connections(hasty) == 0)
    assert len(ask(hasty, "files.open", {"name": "large", "start": 0, "n": 1 << 24}).blobs[0]) == len(contents)


# --- S11: so much and no more -----------------------------------------------------------------------------------------


def test_connections_of_one_address(tmp_path: Path) -> None:
    with tuned(tmp_path / "data", max_connections_per_address=20) as server:
        with held_open(server, b"", 20):
            eventually(lambda: n_connections(server) == 20)
            status, reply, closed = sent(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (status, closed) == (503, True)
            assert b"too many connections" in reply
        eventually(lambda: n_connections(server) == 0)
        assert ask(server, "connection_info").status == 200
        assert server.log.read_text().count("connection_closed") == 1


def test_bytes_that_are_held(tmp_path: Path) -> None:
    with tuned(tmp_path / "data", "--max-body", "3M", max_held_bytes=4 << 20) as server:
        head = f"{HEAD}Authorization: {of_server(server)}\r\nContent-Type: {MESSAGE_TYPE}\r\n"
        part = f"{head}Content-Length: {3 << 20}\r\n\r\n".encode() + b"\0" * (2 << 20)
        with held_open(server, part, 1):
            time.sleep(0.2)
            status, reply, closed = sent(server, part + b"\0" * (1 << 20))
            assert (status, closed) == (503, True)
            assert b"Retry-After" in reply
        eventually(lambda: sent(server, part + b"\0" * (1 << 20))[0] == 400)


def poll_head(authorization: str, jid: int, timeout_s: float = 25.0) -> bytes:
    body = json.dumps({"jids": [[jid, jid + 1]], "timeout_s": timeout_s, "stop_on_error": False})
    return (
        f"POST {API}/jobs/wait HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


@contextlib.contextmanager
def unfinished(server: RunningServer) -> Iterator[int]:
    """A job that runs until the end."""
    import cloud

    cloud.setkey(server.api_key, server.api_secretkey, server.url)
    try:
        jid = cloud.call(time.sleep, 600)
        cloud.wait_for.status(jid, "processing", timeout=20)
        yield jid
        cloud.kill(jid)
    finally:
        cloud.close()


def test_requests_of_one_key(tmp_path: Path) -> None:
    with tuned(tmp_path / "data", max_requests_per_key=5) as server, unfinished(server) as jid:
        other = bearer(*server.new_group())
        with held_open(server, poll_head(of_server(server), jid), 5):
            eventually(lambda: ask(server, "connection_info").status == 429)
            reply = ask(server, "connection_info")
            assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
            assert ask(server, "connection_info", authorization=other).status == 200
        # Who went away counts no more.
        eventually(lambda: ask(server, "connection_info").status == 200, 3.0)


def test_polls_that_nobody_waits_for_leave_nothing_behind(tmp_path: Path) -> None:
    with tuned(tmp_path / "data") as server, unfinished(server) as jid:
        assert server.process is not None
        process = psutil.Process(server.process.pid)

        def abandon(n: int) -> None:
            with held_open(server, poll_head(of_server(server), jid), n):
                eventually(lambda: n_connections(server) >= n)
                assert ask(server, "connection_info").status == 200
            eventually(lambda: n_connections(server) < 5)

        abandon(250)
        before = process.memory_info().rss, process.num_fds(), process.num_threads()
        for _ in range(4):
            abandon(250)
        # Of threads that look keys up there may be some more by now, each with its database.
        eventually(lambda: process.num_fds() <= before[1] + 30)
        assert process.num_threads() <= before[2] + 8
        assert process.memory_info().rss - before[0] < 8 << 20
        assert process.cpu_percent(0.5) < 50


def test_a_thousand_polls_are_held_and_all_answered(tmp_path: Path) -> None:
    with (
        tuned(tmp_path / "data") as server,
        unfinished(server) as jid,
        held_open(server, poll_head(of_server(server), jid), 1000) as connections,
    ):
        eventually(lambda: n_connections(server) >= 1000)
        assert quick_while(server, 100) < 0.1
        assert ask(server, "cancel", {"jids": [[jid, jid + 1]], "begun": True}).status == 200
        for each in connections:
            each.settimeout(SOON_S)
            assert each.recv(65_536).startswith(b"HTTP/1.1 200 OK")


def test_what_a_poll_leaves_in_the_engine(tmp_path: Path) -> None:
    config = ServerConfig(data=str(tmp_path))
    fd = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    group = Group(str(tmp_path / "group"), 1, config, Slots(1), fd, Quotas())
    group.drain()  # so that nothing begins
    try:

        async def poll() -> None:
            answer, _ = await group.ask("submit", {**SUBMISSION}, [b"", b"", b""])
            run = {"jids": [[answer["jid"], answer["jid"] + 1]]}
            batch, _ = group.store.locate(answer["jid"])
            for op, more in (("wait", {"stop_on_error": False}), ("finals", {"poll": "x"})):
                # Without a limit of its own, it has the server's.
                asked = [asyncio.create_task(group.ask(op, {**run, **more, "timeout_s": None}, [])) for _ in range(50)]
                await asyncio.sleep(0.05)
                assert batch.watches is not None
                assert len(batch.watches._of_one[0]) == 50
                assert group.engine.waiting._timers
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
                assert not batch.watches
                assert not [timer for _, _, timer in group.engine.waiting._timers if timer.action]
            assert not group.requests._polls

        asyncio.run(poll())
    finally:
        group.close()
        os.close(fd)
    assert MAX_WAIT_S <= 60


# --- quotas and suspension: what an operator changes holds at once ------------------------------------------------------


class Workgroup:
    """One that an operator changes while it is at work."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        key, secret = server.new_group()
        self.authorization = bearer(key, secret)
        self.store = AccountStore(str(server.data))
        self.name = self.ask("account.sign_in").content["workgroup"]

    def ask(self, op: str, content: dict[str, Any] | None = None, *blobs: bytes) -> Reply:
        return ask(self.server, op, content, blobs, authorization=self.authorization)

    def submit(self, n: int = 1) -> Reply:
        content = {**SUBMISSION, "chunks": [[1, n]], "sealed": True}
        return self.ask("open_map", content, b"", b"", b"x" * n)


@pytest.fixture
def workgroup(hasty: RunningServer) -> Iterator[Workgroup]:
    found = Workgroup(hasty)
    yield found
    found.store.close()


def test_the_quota_of_jobs_can_be_changed(workgroup: Workgroup) -> None:
    assert workgroup.submit(10).status == 200
    workgroup.store.change_quotas(workgroup.name, {"max_queued_jobs": 0})
    eventually(lambda: workgroup.submit().status == 409, 3.0)
    workgroup.store.change_quotas(workgroup.name, {"max_queued_jobs": 5})
    eventually(lambda: workgroup.submit().status == 200, 3.0)
    reply = workgroup.submit(6)
    assert reply.status == 409
    assert "5" in reply.content["text"]


def test_the_quota_of_files_can_be_changed(workgroup: Workgroup) -> None:
    put = {"name": "n", "sha256": hashlib.sha256(b"x" * 100).hexdigest()}
    assert workgroup.ask("files.put", put, b"x" * 100).status == 200
    workgroup.store.change_quotas(workgroup.name, {"max_file_bytes": 99})
    eventually(lambda: workgroup.ask("files.put", put, b"x" * 100).status == 413, 3.0)


def test_a_suspended_workgroup_begins_nothing(tmp_path: Path) -> None:
    import cloud

    with RunningServer(tmp_path / "data", "--workers", "1") as server:
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        store = AccountStore(str(server.data))
        go, begun = tmp_path / "go", tmp_path / "begun"

        def first() -> str:
            begun.touch()
            while not go.exists():
                time.sleep(0.01)
            return "ended"

        try:
            running = cloud.call(first)
            waiting = cloud.call((tmp_path / "second").touch)
            eventually(begun.exists)
            store.set_workgroup_suspended("main", True)
            eventually(lambda: ask(server, "connection_info").status == 401, 3.0)
            time.sleep(1.5)
            go.touch()
            time.sleep(1.5)
            assert not (tmp_path / "second").exists()
            store.set_workgroup_suspended("main", False)
            eventually(lambda: ask(server, "connection_info").status == 200, 3.0)
            assert cloud.result(running) == "ended"
            cloud.join(waiting)
            assert (tmp_path / "second").exists()
        finally:
            store.close()
            cloud.close()


def test_the_quota_of_slots_can_be_changed(tmp_path: Path) -> None:
    import cloud

    with RunningServer(tmp_path / "data", "--workers", "3") as server:
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        store = AccountStore(str(server.data))
        store.change_quotas("main", {"max_slots": 1})
        folder = tmp_path / "running"
        folder.mkdir()

        def run(number: int) -> None:
            (folder / str(number)).touch()
            while not (tmp_path / "go").exists():
                time.sleep(0.01)

        try:
            jids = [cloud.call(run, number) for number in range(3)]
            eventually(lambda: len(list(folder.iterdir())) == 1)
            time.sleep(1.2)
            assert len(list(folder.iterdir())) == 1
            store.change_quotas("main", {"max_slots": 3})
            eventually(lambda: len(list(folder.iterdir())) == 3, 10.0)
            (tmp_path / "go").touch()
            cloud.join(jids)
        finally:
            (tmp_path / "go").touch()
            store.close()
            cloud.close()
