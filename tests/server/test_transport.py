"""The client's transport over networks and servers of every kind of bad."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from cloud.backends import connections, transport
from cloud.backends.transport import Transport
from cloud.errors import BackendClosed, BackendError, ConfigurationError
from tests.scripts import REPO
from tests.server.plain_server import Answer, PlainServer, Request, error, wait_until
from tests.server.proxy import Direction, FaultProxy

SECRET = "cld_never_to_be_seen"
MB = 1 << 20

Opener = Callable[..., Transport]


@pytest.fixture
def server() -> Iterator[PlainServer]:
    with PlainServer() as running:
        yield running


@pytest.fixture
def proxy(server: PlainServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as running:
        yield running


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Make transports; closed at the end."""
    made: list[Transport] = []

    def opened(url: str, **options: object) -> Transport:
        made.append(Transport(url, 7, SECRET, **{"patience_s": 10.0, **options}))
        return made[-1]

    yield opened
    for each in made:
        each.close()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back off by milliseconds."""
    monkeypatch.setattr(transport, "_BACK_OFF_S", (0.001, 0.01))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1 and cloud.example.test, and its key, as paths."""
    folder = tmp_path_factory.mktemp("tls")
    paths = (str(folder / "cert.pem"), str(folder / "key.pem"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=cloud.example.test", "-addext", "subjectAltName=IP:127.0.0.1,DNS:cloud.example.test"),
            *("-days", "2", "-out", paths[0], "-keyout", paths[1]),
        ],
        check=True,
        capture_output=True,
    )
    return paths


# --- one request --------------------------------------------------------------------------------------------------------


def test_a_request_and_its_reply(server: PlainServer, opened: Opener) -> None:
    response = opened(server.url).request("POST", "/v1/jobs?x=1", headers={"X-Mine": "2"}, body=b"abc")
    assert response.status == 200
    assert response.body == b'{"method": "POST", "target": "/v1/jobs?x=1", "n_bytes": 3}'
    assert response.headers["content-TYPE"] == "application/json"
    (request,) = server.requests
    assert request.body == b"abc"
    assert request.headers["authorization"] == f"Bearer 7:{SECRET}"
    assert request.headers["x-mine"] == "2"
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert "idempotency-key" not in request.headers


def test_a_base_path_is_kept(server: PlainServer, opened: Opener) -> None:
    opened(f"{server.url}/cloud/").request("GET", "/v1/jobs")
    assert server.requests[0].target == "/cloud/v1/jobs"


def test_connections_are_kept_alive(server: PlainServer, opened: Opener) -> None:
    client = opened(server.url)
    for _ in range(20):
        client.request("GET", "/x")
    for method in ("HEAD", "PUT", "DELETE"):
        assert client.request(method, "/x").status == 200
    assert server.n_connections == 1


def test_no_key_no_authorization(server: PlainServer) -> None:
    client = Transport(server.url, None, None)
    client.request("GET", "/healthz")
    client.close()
    assert "authorization" not in server.requests[0].headers


def test_errors_of_the_server_are_replies(server: PlainServer, opened: Opener) -> None:
    server.answer = lambda request: error(404, "no job 3")
    response = opened(server.url).request("GET", "/x", stream=True)
    assert response.status == 404
    assert b"no job 3" in response.body
    assert response.reader is None


@pytest.mark.parametrize("path", ["x", "", "/a b", "/a\r\nX: 1", "/ä", "/\x00"])
def test_what_cannot_be_a_path(opened: Opener, path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        opened("http://127.0.0.1:1").request("GET", path)


def test_what_cannot_be_a_header(opened: Opener) -> None:
    with pytest.raises(ValueError, match="X-Bad") as caught:
        opened("http://127.0.0.1:1").request("GET", "/", headers={"X-Bad": f"{SECRET}\r\nY: 1"})
    assert SECRET not in str(caught.value)


# --- bodies -------------------------------------------------------------------------------------------------------------


def test_pieces_arrive_in_order(server: PlainServer, opened: Opener) -> None:
    pieces = [b"a", b"", os.urandom(3 * MB + 1), b"b" * 70_000, b"c", memoryview(b"dd")]
    opened(server.url).request("POST", "/x", body=pieces)
    assert server.requests[0].body == b"".join(pieces)


def test_large_pieces_are_not_copied() -> None:
    class Socket:
        sent: list[object] = []

        def settimeout(self, _: float) -> None:
            pass

        def sendall(self, content: object) -> None:
            self.sent.append(content)

    large = bytes(3 * MB)
    connections.Connection(Socket()).send([b"head", b"small", large, b"end"], 1.0)  # type: ignore[arg-type]
    assert Socket.sent[0] == b"headsmall"
    assert [getattr(piece, "obj", None) is large for piece in Socket.sent] == [False, True, True, True, False]


def test_a_file_is_sent_from_where_it_stands(server: PlainServer, opened: Opener, tmp_path: Path) -> None:
    content = os.urandom(2 * MB + 5)
    (tmp_path / "file").write_bytes(content)
    client = opened(server.url)
    with (tmp_path / "file").open("rb") as file:
        file.seek(5)
        client.request("PUT", "/x", body=file)
        file.seek(10)
        client.request("PUT", "/x", body=file, n_bytes=100)
    assert [request.body for request in server.requests] == [content[5:], content[10:110]]


@pytest.mark.usefixtures("fast")
def test_a_cut_upload_is_sent_again_from_its_start(
    server: PlainServer, proxy: FaultProxy, opened: Opener, tmp_path: Path
) -> None:
    content = os.urandom(4 * MB)
    (tmp_path / "file").write_bytes(content)
    proxy.cut_after(2 * MB, Direction.UP, reset=True, next_only=True)
    proxy.cut_after(3 * MB, Direction.UP, next_only=True)
    with (tmp_path / "file").open("rb") as file:
        opened(proxy.url).request("PUT", "/x", body=file, idempotency_key="k")
    assert [request.body for request in server.requests] == [content]
    assert proxy.n_connections == 3


def test_what_can_be_read_once_is_sent_once(server: PlainServer, proxy: FaultProxy, opened: Opener) -> None:
    class Pipe:
        def __init__(self) -> None:
            self._content = io.BytesIO(bytes(2 * MB))

        def read(self, n_bytes: int) -> bytes:
            return self._content.read(n_bytes)

    client = opened(proxy.url)
    with pytest.raises(ValueError, match="n_bytes"):
        client.request("PUT", "/x", body=Pipe(), idempotency_key="k")
    proxy.cut_after(MB, Direction.UP, next_only=True)
    with pytest.raises(BackendError, match="cut"):
        client.request("PUT", "/x", body=Pipe(), n_bytes=2 * MB, idempotency_key="k")
    assert client.request("PUT", "/x", body=Pipe(), n_bytes=2 * MB, idempotency_key="k").status == 200


def test_a_file_that_shrinks_or_fails_is_told(server: PlainServer, opened: Opener) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    client = opened(server.url)
    with pytest.raises(BackendError, match="ended 90 bytes before"):
        client.request("PUT", "/x", body=io.BytesIO(bytes(10)), n_bytes=100, idempotency_key="k")
    with pytest.raises(BackendError, match="Input/output error"):
        client.request("PUT", "/x", body=Broken(bytes(10)), idempotency_key="k")
    assert client.request("GET", "/x").status == 200
    assert len(server.requests) == 1


# --- a hostile network --------------------------------------------------------------------------------------------------

ANSWER = Answer(body=b'{"jid": 12345, "more": "content"}')


def post_through(proxy: FaultProxy, key: str) -> bytes:
    client = Transport(proxy.url, 7, SECRET, patience_s=10)
    try:
        return client.request("POST", "/v1/jobs", body=[b"payload" * 5], idempotency_key=key).body
    finally:
        client.close()


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.name)
def test_cut_at_each_byte(server: PlainServer, proxy: FaultProxy, direction: Direction, *, reset: bool) -> None:
    server.answer = lambda request: ANSWER
    post_through(proxy, "measure")
    length = proxy.n_up if direction is Direction.UP else proxy.n_down
    assert length > 100
    for k in range(length + 1):
        before = proxy.n_connections
        proxy.cut_after(k, direction, reset=reset, next_only=True)
        assert post_through(proxy, f"key {k}") == ANSWER.body
        # When all of a request has passed, its reply may be faster than the cut.
        assert proxy.n_connections - before == 2 or k == length
    keys = [request.headers["idempotency-key"] for request in server.executed]
    assert sorted(keys) == sorted({"measure", *(f"key {k}" for k in range(length + 1))})


@pytest.mark.usefixtures("fast")
def test_cut_on_a_connection_in_use_for_long(server: PlainServer, proxy: FaultProxy, opened: Opener) -> None:
    server.answer = lambda request: ANSWER
    post_through(proxy, "a")
    for direction, length in ((Direction.UP, proxy.n_up), (Direction.DOWN, proxy.n_down)):
        for k in range(length, 2 * length, 3):
            client = opened(proxy.url)
            proxy.cut_after(k, direction, next_only=True)
            for n in range(3):
                response = client.request("POST", "/v1/jobs", body=b"x" * 35, idempotency_key=f"{direction} {k} {n}")
                assert response.body == ANSWER.body
            client.close()
    keys = [request.headers["idempotency-key"] for request in server.executed]
    assert len(keys) == len(set(keys))


@pytest.mark.usefixtures("fast")
def test_doubled_requests_are_carried_out_once(server: PlainServer, proxy: FaultProxy) -> None:
    server.answer = lambda request: ANSWER
    proxy.duplicate()
    for n in range(10):
        assert post_through(proxy, f"key {n}") == ANSWER.body
    wait_until(lambda: proxy.n_duplicated == 10)
    assert len(server.requests) == 20
    assert len(server.executed) == 10


@pytest.mark.usefixtures("fast")
def test_slow_networks_and_silent_ones(server: PlainServer, proxy: FaultProxy, opened: Opener) -> None:
    client = opened(proxy.url)
    proxy.delay(0.05, next_only=True)
    assert client.request("GET", "/x", timeout_s=5).status == 200
    proxy.cut_all()
    proxy.answer_nothing(next_only=True)
    begun = time.monotonic()
    assert client.request("GET", "/x", timeout_s=0.2).status == 200
    assert time.monotonic() - begun >= 0.2
    proxy.cut_all()
    # Slow is not silent: this takes longer than the limit.
    server.answer = lambda request: Answer(body=b"x" * 400_000, headers={"Content-Type": "application/octet-stream"})
    proxy.limit(500_000)
    begun = time.monotonic()
    assert len(client.request("GET", "/x", timeout_s=0.4).body) == 400_000
    assert time.monotonic() - begun > 0.4


def test_silence_is_an_error_that_says_so(proxy: FaultProxy, opened: Opener) -> None:
    proxy.answer_nothing()
    with pytest.raises(BackendError, match=r"no answer within 0\.1 s") as caught:
        opened(proxy.url).request("GET", "/x", timeout_s=0.1, patience_s=0)
    assert proxy.url in str(caught.value)
    assert caught.value.retry
    assert caught.value.hint


def test_a_request_that_may_have_been_carried_out_is_not_repeated(
    server: PlainServer, proxy: FaultProxy, opened: Opener
) -> None:
    client = opened(proxy.url)
    proxy.cut_after(0, Direction.DOWN)
    for method, options in (("POST", {}), ("GET", {"retry": False})):
        server.requests.clear()
        with pytest.raises(BackendError, match="cut"):
            client.request(method, "/x", body=b"x", **options)
        assert len(server.requests) <= 1


def test_what_was_never_sent_is_tried_again(server: PlainServer, proxy: FaultProxy, opened: Opener) -> None:
    proxy.refuse()
    healer = threading.Timer(0.3, proxy.heal)
    healer.start()
    assert opened(proxy.url).request("POST", "/x").status == 200
    healer.join()
    assert len(server.requests) == 1


# --- a server with bad days ---------------------------------------------------------------------------------------------


def test_a_server_that_restarts(opened: Opener, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(transport, "_TELL_EACH_S", 0.2)
    with PlainServer() as first:
        client = opened(first.url)
        client.request("GET", "/x")
    began = threading.Event()
    second: list[PlainServer] = []

    def restart() -> None:
        began.wait()
        time.sleep(1.0)
        second.append(PlainServer(port=first.port).__enter__())

    thread = threading.Thread(target=restart)
    thread.start()
    with caplog.at_level(logging.WARNING, "Cloud"):
        began.set()
        assert client.request("POST", "/x", idempotency_key="k").status == 200
    thread.join()
    second[0].close()
    told = [record.getMessage() for record in caplog.records if record.name == "Cloud"]
    assert "connection refused; trying again" in told[0]
    assert "is back after" in told[-1]
    assert 3 <= len(told) <= 8
    assert all(first.url in each for each in told)
    assert SECRET not in "".join(told)


def test_patience_ends_with_an_error_that_names_everything(opened: Opener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    begun = time.monotonic()
    with pytest.raises(BackendError) as caught:
        opened(url, patience_s=0.5).request("GET", "/x")
    assert time.monotonic() - begun < 2
    text = str(caught.value)
    assert url in text
    assert "connection refused" in text
    assert "TIP: " in text
    assert " times in " in text


def test_retry_after(server: PlainServer, opened: Opener) -> None:
    answers = [error(429, "slow down", Retry_After="1"), error(503, "starting"), Answer(502, b"<html>"), Answer()]
    server.answer = lambda request: answers.pop(0)
    begun = time.monotonic()
    assert opened(server.url).request("POST", "/x", idempotency_key="k").status == 200
    assert time.monotonic() - begun >= 1.0
    assert len(server.requests) == 4
    assert {request.headers["idempotency-key"] for request in server.requests} == {"k"}


def test_retry_after_past_the_patience_is_not_waited_for(server: PlainServer, opened: Opener) -> None:
    server.answer = lambda request: error(429, "too many", Retry_After="60")
    begun = time.monotonic()
    response = opened(server.url).request("GET", "/x")
    assert time.monotonic() - begun < 5
    assert response.status == 429
    assert b"too many" in response.body


def test_unavailable_for_longer_than_the_patience(server: PlainServer, opened: Opener) -> None:
    server.answer = lambda request: error(503, "it is being moved")
    with pytest.raises(BackendError, match="503, it is being moved"):
        opened(server.url).request("GET", "/x", patience_s=0.3)
    assert opened(server.url).request("POST", "/x").status == 503
    server.answer = lambda request: Answer(502, b"<html>", {"Content-Type": "text/html"})
    with pytest.raises(BackendError, match="it answered 502"):
        opened(server.url).request("POST", "/x")


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("3", 3, 3),
        ("", 0, 0),
        ("-1", 0, 0),
        ("soon", 0, 0),
        ("nan", 0, 0),
        ("1e9", 0, 0),
        ("²", 0, 0),
        ("9" * 99, 1e8, 1e9),
        (formatdate(time.time() + 5000, usegmt=True), 4000, 5000),
        (formatdate(1, usegmt=True), 0, 0),
    ],
)
def test_reading_retry_after(text: str, least: float, most: float) -> None:
    assert least <= transport._seconds(text) <= most


# --- connections --------------------------------------------------------------------------------------------------------


def test_closed_while_idle_is_noticed(server: PlainServer, opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    client = opened(server.url)
    for _ in range(5):
        # Without a key: nothing may be sent that the server might have seen.
        assert client.request("POST", "/x").status == 200
        server.close_connections()
    assert len(server.requests) == 5
    assert not caplog.records


def test_closed_in_the_moment_of_use_is_tried_once_more(
    server: PlainServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = opened(server.url)
    client.request("GET", "/x")
    server.close_connections()
    monkeypatch.setattr(connections.Connection, "is_stale", lambda self: False)
    assert client.request("POST", "/x", idempotency_key="k", patience_s=0).status == 200
    server.close_connections()
    with pytest.raises(BackendError, match="cut"):
        client.request("POST", "/x")


def test_bytes_that_nobody_asked_for_are_not_the_next_reply(server: PlainServer, opened: Opener) -> None:
    client = opened(server.url)
    answer = Answer().content("GET")
    server.answer = lambda request: Answer(raw=answer + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    client.request("GET", "/x")
    server.answer = lambda request: Answer(body=b'"the second"')
    assert client.request("GET", "/x").body == b'"the second"'
    assert server.n_connections == 2


def test_old_connections_are_not_used(server: PlainServer, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    client = opened(server.url)
    client.request("GET", "/x")
    monkeypatch.setattr(connections, "_MAX_IDLE_S", -1.0)
    client.request("GET", "/x")
    assert server.n_connections == 2


def test_threads(server: PlainServer, opened: Opener) -> None:
    server.answer = lambda request: Answer(body=b'"' + request.body + b'"')
    client = opened(server.url)
    wrong: list[object] = []

    def ask(number: int) -> None:
        for n in range(100):
            text = f"{number} {n}".encode()
            try:
                found = client.request("POST", "/x", body=text, idempotency_key=text.decode()).body
            except Exception as exc:
                found = repr(exc).encode()
            if found != b'"' + text + b'"':
                wrong.append((text, found))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert server.n_connections <= 8
    assert len(server.executed) == 800


def test_few_idle_connections_are_kept(server: PlainServer, opened: Opener) -> None:
    gate = threading.Barrier(20)

    def answer(request: Request) -> Answer:
        gate.wait(10)
        return Answer()

    server.answer = answer
    client = opened(server.url)
    threads = [threading.Thread(target=client.request, args=("GET", "/x")) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.n_connections == 20
    wait_until(lambda: server.n_open <= 8)


def test_close_ends_requests_under_way(server: PlainServer, opened: Opener) -> None:
    release = threading.Event()
    server.answer = lambda request: (release.wait(10), Answer())[1]
    client = opened(server.url)
    ends: list[BaseException] = []

    def poll() -> None:
        try:
            client.request("GET", "/poll")
        except BaseException as exc:
            ends.append(exc)

    thread = threading.Thread(target=poll)
    thread.start()
    wait_until(lambda: len(server.requests) == 1)
    client.close()
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    release.set()
    assert [type(end) for end in ends] == [BackendClosed]
    with pytest.raises(BackendClosed):
        client.request("GET", "/x")


def test_close_ends_the_pauses_between_tries(opened: Opener, server: PlainServer) -> None:
    server.answer = lambda request: error(503, "wait", Retry_After="60")
    client = opened(server.url, patience_s=600)
    ends: list[BaseException] = []

    def ask() -> None:
        try:
            client.request("GET", "/x")
        except BaseException as exc:
            ends.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: len(server.requests) == 1)
    client.close()
    thread.join(5)
    assert [type(end) for end in ends] == [BackendClosed]


def in_child(function: Callable[[], object]) -> int:
    """Fork, run it in the child, and return the child's pid; it exits with 0 if that was true."""
    pid = os.fork()
    if pid:
        return pid
    code = 9
    try:
        signal.alarm(20)
        code = 0 if function() else 1
    finally:
        os._exit(code)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_forked_child_has_its_own(opened: Opener, certificate: tuple[str, str], *, tls: bool) -> None:
    release = threading.Event()

    def answer(request: Request) -> Answer:
        if request.target == "/poll":
            release.wait(20)
        return Answer(body=f'"{request.target}"'.encode())

    with PlainServer(answer, tls=certificate if tls else None) as server:
        client = opened(server.url, ca_file=certificate[0] if tls else None)
        client.request("GET", "/x")
        replies: list[bytes] = []
        poll = threading.Thread(target=lambda: replies.append(client.request("GET", "/poll").body))
        poll.start()
        wait_until(lambda: len(server.requests) == 2)
        client.request("GET", "/y")
        # One connection is idle and one is in the middle of a request.
        n_before = server.n_connections

        inherited = [each._sock.fileno() for each in client._pool._open]
        assert len(inherited) == 2

        def child() -> bool:
            closed = not any(os.path.exists(f"/proc/self/fd/{descriptor}") for descriptor in inherited)
            return closed and all(client.request("GET", f"/c{n}").body == f'"/c{n}"'.encode() for n in range(50))

        pid = in_child(child)
        for n in range(50):
            assert client.request("GET", f"/parent{n}").body == f'"/parent{n}"'.encode()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert server.n_connections == n_before + 1
        release.set()
        poll.join()
        assert replies == [b'"/poll"']
        assert client.request("GET", "/z").body == b'"/z"'
        assert server.n_connections == n_before + 1


def test_interrupted_in_a_long_poll(server: PlainServer, tmp_path: Path) -> None:
    release = threading.Event()

    def answer(request: Request) -> Answer:
        if request.target == "/poll":
            release.wait(20)
        return Answer(body=f'"{request.target}"'.encode())

    server.answer = answer
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\n"
        "from cloud.backends.transport import Transport\n"
        "client = Transport(sys.argv[1], 7, 'x')\n"
        "client.request('GET', '/before')\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        client.request('GET', '/poll')\n"
        "    except KeyboardInterrupt:\n"
        "        print(client.request('GET', '/after').body.decode(), flush=True)\n"
        "client.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        [sys.executable, str(script), server.url], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        for n in range(3):
            wait_until(lambda: sum(request.target == "/poll" for request in server.requests) == n + 1)
            child.send_signal(signal.SIGINT)
            assert child.stdout is not None
            assert child.stdout.readline() == b'"/after"\n'
        release.set()
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 0
    assert errors == b""


# An interrupt in the middle of the standard library leaves the socket that it was making to be collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(5))
def test_interrupted_anywhere(server: PlainServer, opened: Opener, seed: int) -> None:
    server.answer = lambda request: Answer(body=b'"' + request.body + b'"')
    client = opened(server.url)
    n_interrupted = 0
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        for n in range(150):
            text = str(n).encode()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00001 + (n * 7 + seed) % 40 * 0.00001)
                try:
                    assert client.request("POST", "/x", body=text).body == b'"' + text + b'"'
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                n_interrupted += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert n_interrupted
    assert client.request("POST", "/x", body=b"end").body == b'"end"'


# --- replies ------------------------------------------------------------------------------------------------------------

BYTES = {"Content-Type": "application/octet-stream"}


def test_a_streamed_reply(server: PlainServer, opened: Opener) -> None:
    content = os.urandom(3 * MB + 7)
    server.answer = lambda request: Answer(body=content, headers=BYTES)
    client = opened(server.url, max_reply_bytes=100)
    reader = client.request("GET", "/x", stream=True).reader
    assert reader is not None
    assert reader.n_bytes == len(content)
    assert reader.read(10) + b"".join(reader) == content
    assert reader.read(1) == b""
    with client.request("GET", "/x", stream=True).reader as reader:  # type: ignore[union-attr]
        assert reader.read(5) == content[:5]
    assert server.n_connections == 1


def test_a_streamed_reply_that_is_dropped(server: PlainServer, opened: Opener) -> None:
    server.answer = lambda request: Answer(body=bytes(MB), headers=BYTES)
    client = opened(server.url)
    with client.request("GET", "/x", stream=True).reader as reader:  # type: ignore[union-attr]
        reader.read(10)
    with pytest.raises(BackendError, match="closed"):
        reader.read(10)
    server.answer = lambda request: Answer()
    assert client.request("GET", "/x").status == 200
    assert server.n_connections == 2


def test_a_streamed_reply_that_is_cut(server: PlainServer, proxy: FaultProxy, opened: Opener) -> None:
    server.answer = lambda request: Answer(body=bytes(MB), headers=BYTES)
    proxy.cut_after(500_000, Direction.DOWN)
    reader = opened(proxy.url).request("GET", "/x", stream=True).reader
    assert reader is not None
    with pytest.raises(BackendError, match="ended after [1-9][0-9]* bytes: the connection was cut") as caught:
        for _ in reader:
            pass
    assert caught.value.retry


def test_a_chunked_reply(server: PlainServer, opened: Opener) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = head + b"5\r\n[1, 2\r\n1\r\n]\r\n0\r\n\r\n"
    server.answer = lambda request: Answer(raw=whole)
    client = opened(server.url)
    assert client.request("GET", "/x").body == b"[1, 2]"
    assert b"".join(client.request("GET", "/x", stream=True).reader) == b"[1, 2]"  # type: ignore[arg-type]
    assert server.n_connections == 1
    for k in range(1, len(whole)):
        server.answer = lambda request: Answer(raw=whole[:k], close=True)
        with pytest.raises(BackendError, match="cut"):
            client.request("GET", "/x", retry=False)


@pytest.mark.usefixtures("fast")
def test_wrong_lengths_are_cuts(server: PlainServer, opened: Opener) -> None:
    answers = [Answer(length=99, close=True), Answer(length=13, close=True), Answer()]
    server.answer = lambda request: answers.pop(0)
    assert opened(server.url).request("GET", "/x").body == b'{"ok": true}'
    assert answers == []


@pytest.mark.parametrize("chunked", [False, True])
def test_replies_that_are_too_large(server: PlainServer, opened: Opener, *, chunked: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    large = Answer(raw=head + b"65\r\n" + bytes(101) + b"\r\n" + b"0\r\n\r\n") if chunked else Answer(body=bytes(101))
    server.answer = lambda request: large
    client = opened(server.url, max_reply_bytes=100)
    with pytest.raises(BackendError, match="more than the 100 bytes"):
        client.request("GET", "/x")
    server.answer = lambda request: Answer(body=bytes(100))
    assert len(client.request("GET", "/x").body) == 100


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(404, b"<h1>Not \x1b[31mFound</h1>", {"Content-Type": "text/html"}), r"404, text/html: .*\\x1b\[31m"),
        (Answer(200, b"<h1>Welcome</h1>", {"Content-Type": "text/html; charset=utf-8"}), "200, text/html.*Welcome"),
        (Answer(401, b'{"detail": "who are you"}'), "401, application/json.*who are you"),
        (Answer(500, b"[" * 100_000), "500, application/json"),
        (Answer(200, b"hello", {}), "200, no type.*hello"),
        (Answer(length=-1, close=True), "200, application/json"),
        (Answer(raw=b"SSH-2.0-OpenSSH_9.6\r\n", close=True), "not HTTP.*SSH"),
        (Answer(raw=b"HTTP/9.9 2000 \r\n\r\n", close=True), "not HTTP"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 200 + b"\r\n", close=True), "not HTTP.*headers"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", close=True), "not HTTP"),
        (Answer(raw=b"\xff\xfe\r\n\r\n", close=True), "not HTTP"),
    ],
)
def test_what_is_not_a_cloud_server(server: PlainServer, opened: Opener, answer: Answer, told: str) -> None:
    server.answer = lambda request: answer
    begun = time.monotonic()
    with pytest.raises(BackendError, match=f"(?s)does not answer like a cloud server.*{told}") as caught:
        opened(server.url).request("GET", "/x")
    text = str(caught.value)
    assert server.url in text
    assert len(text) < 700
    assert all(character.isprintable() or character == "\n" for character in text)
    assert time.monotonic() - begun < 3
    assert len(server.requests) == 1


def test_redirects_are_not_followed(server: PlainServer, opened: Opener) -> None:
    server.answer = lambda request: Answer(307, b"", {"Location": "https://elsewhere.test/\x1b"})
    with pytest.raises(BackendError, match=r"sends requests on to 'https://elsewhere\.test/\\x1b'"):
        opened(server.url).request("GET", "/x")
    assert len(server.requests) == 1


def test_a_refusal_before_the_body_was_read(opened: Opener) -> None:
    content = error(413, "too large").content("PUT")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(content)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(100_000):
                    pass

        thread = threading.Thread(target=refuse)
        thread.start()
        client = opened(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert client.request("PUT", "/x", body=bytes(20 * MB)).status == 413
        client.close()
        thread.join()


# --- TLS ----------------------------------------------------------------------------------------------------------------


def test_tls(opened: Opener, certificate: tuple[str, str]) -> None:
    with PlainServer(tls=certificate) as server:
        client = opened(server.url, ca_file=certificate[0])
        large = os.urandom(3 * MB)
        for _ in range(3):
            assert client.request("POST", "/x", body=[b"a", large]).status == 200
        assert server.requests[0].body == b"a" + large
        assert server.n_connections == 1
        server.close_connections()
        assert client.request("POST", "/x").status == 200


def test_a_certificate_is_not_trusted_unasked(opened: Opener, certificate: tuple[str, str]) -> None:
    with PlainServer(tls=certificate) as server:
        for options in ({}, {"insecure": True}):
            begun = time.monotonic()
            with pytest.raises(BackendError, match="not to be trusted: self.signed") as caught:
                opened(server.url, **options).request("GET", "/x")
            assert "ca_file" in str(caught.value)
            assert time.monotonic() - begun < 5
        with pytest.raises(BackendError, match="not to be trusted.*localhost"):
            opened(server.url.replace("127.0.0.1", "localhost"), ca_file=certificate[0]).request("GET", "/x")
        assert server.requests == []


def test_tls_with_a_server_that_speaks_none(server: PlainServer, opened: Opener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(BackendError, match="agree on no secure connection"):
            opened(f"https://127.0.0.1:{listener.getsockname()[1]}").request("GET", "/x")
        thread.join()


def test_old_tls_is_not_spoken(opened: Opener, certificate: tuple[str, str]) -> None:
    client = opened("https://127.0.0.1:1", ca_file=certificate[0])
    assert client._pool._tls is not None
    assert client._pool._tls.minimum_version == ssl.TLSVersion.TLSv1_2
    assert client._pool._tls.verify_mode == ssl.CERT_REQUIRED


def test_ca_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing\n")
    for name, why in (("missing.pem", "No such file"), ("empty.pem", "")):
        with pytest.raises(ConfigurationError, match=f"ca_file .*{name}.*{why}"):
            Transport("https://127.0.0.1", 1, "x", ca_file=str(tmp_path / name))


@pytest.mark.usefixtures("fast")
def test_tls_cut_anywhere(opened: Opener, certificate: tuple[str, str]) -> None:
    with PlainServer(tls=certificate) as server, FaultProxy(server.port) as proxy:
        url = proxy.url.replace("http:", "https:")
        client = opened(url, ca_file=certificate[0])
        client.request("POST", "/x", body=b"body", idempotency_key="a")
        lengths = {Direction.UP: proxy.n_up, Direction.DOWN: proxy.n_down}
        for direction, length in lengths.items():
            for k in range(0, length, 41):
                client.close()
                client = opened(url, ca_file=certificate[0])
                proxy.cut_after(k, direction, next_only=True)
                key = f"{direction.name} {k}"
                assert client.request("POST", "/x", body=b"body", idempotency_key=key).status == 200
        keys = [request.headers["idempotency-key"] for request in server.executed]
        assert len(keys) == len(set(keys)) == 1 + sum(len(range(0, length, 41)) for length in lengths.values())


# --- urls and proxies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "port", "authority", "base"),
    [
        ("https://cloud.example.test", "cloud.example.test", 443, "cloud.example.test", ""),
        ("https://cloud.example.test:8642/", "cloud.example.test", 8642, "cloud.example.test:8642", ""),
        ("https://h.test/a/b//", "h.test", 443, "h.test", "/a/b"),
        ("https://[2001:db8::1]/", "2001:db8::1", 443, "[2001:db8::1]", ""),
        ("http://[::1]:8642/", "::1", 8642, "[::1]:8642", ""),
        ("http://localhost:8642", "localhost", 8642, "localhost:8642", ""),
        ("HTTP://LOCALHOST", "localhost", 80, "localhost", ""),
        ("http://127.9.9.9:1", "127.9.9.9", 1, "127.9.9.9:1", ""),
    ],
)
def test_urls(url: str, host: str, port: int, authority: str, base: str) -> None:
    client = Transport(url, 1, "x")
    address = client._address
    assert (address.host, address.port, address.authority, address.base) == (host, port, authority, base)
    assert not client.url.endswith("/")
    client.close()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "https://host:port"),
        ("cloud.example.test", "https://host:port"),
        ("ftp://cloud.example.test", "https://host:port"),
        ("https://", "https://host:port"),
        ("https://h:0", "https://host:port"),
        ("https://h:99999", "https://host:port"),
        ("https://h:x", "https://host:port"),
        ("https://[::1", "https://host:port"),
        ("https://h\n.test", "characters"),
        ("https://h.test/a b", "characters"),
        ("https://hä.test", "characters"),
        (f"https://7:{SECRET}@h.test", "api_secretkey"),
        (f"https://7:{SECRET}@h.test:x", "https://host:port"),
        (f"https://h.test/?key={SECRET}", "leave out"),
        (f"https://h.test/#{SECRET}", "leave out"),
        ("http://cloud.example.test", "insecure=True"),
        ("http://128.0.0.1", "insecure=True"),
        ("http://localhost.example.test", "insecure=True"),
        ("http://127.0.0.1.example.test", "insecure=True"),
        ("http://[::2]", "https://"),
        ("http://0.0.0.0", "insecure=True"),
    ],
)
def test_urls_that_are_refused(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Transport(url, 7, SECRET)
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("key", "secret"),
    [(0, "x"), (None, "x"), (1, None), (1, ""), (True, "x"), ("1", "x"), (1, f"{SECRET}\n"), (1, "ä")],
)
def test_keys_that_are_none(key: object, secret: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Transport("https://h.test", key, secret)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)


def test_a_name_that_does_not_exist_is_not_waited_for(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(BackendError, match="no host of the name in https://typo.test"):
        opened("https://typo.test").request("GET", "/x")
    with pytest.raises(BackendError, match="names no host"):
        monkeypatch.undo()
        opened(f"https://{'a' * 70}.test").request("GET", "/x")


def test_a_name_that_existed_is_waited_for(server: PlainServer, opened: Opener, monkeypatch) -> None:
    client = opened(server.url)
    client.request("GET", "/x")
    server.close_connections()
    real, n_calls = socket.getaddrinfo, [0]

    def resolve(*args: object, **options: object) -> object:
        n_calls[0] += 1
        if n_calls[0] <= 2:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert client.request("GET", "/x").status == 200


def test_a_proxy_of_the_environment(server: PlainServer, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:p%40ss@127.0.0.1:{server.port}")
    opened("http://cloud.example.test/base", insecure=True).request("GET", "/x")
    (request,) = server.requests
    assert request.target == "http://cloud.example.test/base/x"
    assert request.headers["host"] == "cloud.example.test"
    assert request.headers["proxy-authorization"] == "Basic dXNlcjpwQHNz"
    monkeypatch.setenv("no_proxy", ".example.test")
    assert opened("http://cloud.example.test", insecure=True)._address.proxy is None


def test_this_machine_is_never_behind_a_proxy(server: PlainServer, opened: Opener, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert opened(server.url).request("GET", "/x").status == 200
    for url in ("https://localhost", "https://[::1]", "https://127.0.0.1"):
        assert opened(url)._address.proxy is None


def test_proxies_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://u:hidden@proxy.test:1080")
    with pytest.raises(ConfigurationError) as caught:
        Transport("https://h.test", 1, "x")
    assert "hidden" not in str(caught.value)


def tunnel(listener: socket.socket, port: int, heads: list[bytes]) -> None:
    """A proxy for one CONNECT, whatever the host, to a port of this machine."""
    client, _ = listener.accept()
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    heads.append(head)
    client.sendall(b"HTTP/1.1 200 Connected\r\nX: y\r\n\r\n")
    with client, socket.create_connection(("127.0.0.1", port)) as server:

        def back() -> None:
            while content := server.recv(65536):
                client.sendall(content)

        thread = threading.Thread(target=back)
        thread.start()
        while content := client.recv(65536):
            server.sendall(content)
        server.shutdown(socket.SHUT_WR)
        thread.join()


def test_a_tunnel_through_a_proxy(opened: Opener, certificate: tuple[str, str], monkeypatch) -> None:
    heads: list[bytes] = []
    with PlainServer(tls=certificate) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("https_proxy", f"http://u:p@127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=tunnel, args=(listener, server.port, heads))
        thread.start()
        client = opened("https://cloud.example.test", ca_file=certificate[0])
        for _ in range(2):
            assert client.request("GET", "/x").status == 200
        client.close()
        thread.join()
        assert "proxy-authorization" not in server.requests[0].headers
    assert heads[0].startswith(b"CONNECT cloud.example.test:443 HTTP/1.1\r\nHost: cloud.example.test:443\r\n")
    assert b"Proxy-Authorization: Basic dTpw\r\n" in heads[0]
    assert SECRET.encode() not in heads[0]


def test_a_proxy_that_refuses(server: PlainServer, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"u:hidden@127.0.0.1:{server.port}")
    server.answer = lambda request: Answer(407, b"")
    with pytest.raises(BackendError, match="proxy http://127.*answered 407") as caught:
        opened("https://cloud.example.test").request("GET", "/x")
    assert "hidden" not in str(caught.value)
    server.answer = lambda request: Answer(503, b"")
    with pytest.raises(BackendError, match="through the proxy.*it answered 503"):
        opened("https://cloud.example.test").request("GET", "/x", patience_s=0.2)


# --- secrets and cost ---------------------------------------------------------------------------------------------------


def test_the_secret_is_never_shown(server: PlainServer, proxy: FaultProxy, opened: Opener, caplog) -> None:
    client = opened(proxy.url)
    proxy.cut_after(30, Direction.UP)
    with caplog.at_level(logging.DEBUG), pytest.raises(BackendError) as caught:
        client.request("GET", "/x", patience_s=0.2)
    shown = [repr(client), str(client), repr(client._address), caplog.text]
    exc: BaseException | None = caught.value
    while exc is not None:
        shown += [repr(exc), str(exc), repr(vars(exc))]
        exc = exc.__cause__ or exc.__context__
    assert SECRET not in "".join(shown)
    assert "7" in repr(client)


def test_tls_is_not_loaded_without_need(run_script) -> None:
    run_script(
        """
        import sys
        from cloud.backends.transport import Transport
        client = Transport("http://127.0.0.1:1", 1, "x")
        client.close()
        assert "ipaddress" in sys.modules
        assert not {"urllib.request", "logging", "asyncio", "aiohttp"} & set(sys.modules), sys.modules.keys()
        """
    )
