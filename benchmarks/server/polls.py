"""Many long polls of one server, held by plain sockets in one thread."""

from __future__ import annotations

import json
import resource
import selectors
import socket
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import functions as f
from benchmarks.pace import expect, timed

_OWN_FILES = 200
_PATIENCE_S = 100.0
_POLL_S = 30.0
_PER_KEY = 1000


def held_polls(system, n: int) -> dict[str, float]:
    """Hold ``n`` long polls for one job, call others meanwhile, end the job, and read all answers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < n + _OWN_FILES:
        raise RuntimeError(f"the system allows {hard} open files, and this takes {n + _OWN_FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    memory = _memory_kb(system.server_pid())
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder, "go")
        jid = system.submit(f.wait_for_file, str(gate))
        keys = system.new_keys(-(-n // _PER_KEY))
        polls = [_open(system.facts["url"], keys[number // _PER_KEY], jid) for number in range(n)]
        try:
            system.call(f.noop, 0)
            beside = statistics.median(timed(lambda: system.call(f.noop, 1))[0] for _ in range(50))
            each_kb = (_memory_kb(system.server_pid()) - memory) / n
            began = time.perf_counter()
            gate.touch()
            _read_all(polls)
            seconds = time.perf_counter() - began
        finally:
            for poll in polls:
                poll.close()
    return {"held": n, "call beside": 1000 * beside, "answered": seconds, "memory each": each_kb}


def _open(server: str, key: str, jid: int) -> socket.socket:
    url = urlsplit(server)
    body = json.dumps({"jids": [[jid, jid + 1]], "timeout_s": _POLL_S, "stop_on_error": False}).encode()
    head = (
        f"POST /v1/jobs/wait HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    assert url.hostname is not None
    assert url.port is not None
    poll = socket.create_connection((url.hostname, url.port), 10.0)
    poll.sendall(head.encode() + body)
    poll.setblocking(False)
    return poll


def _read_all(polls: list[socket.socket]) -> None:
    """Until each has its answer, which must say that nothing is unfinished."""
    until = time.monotonic() + _PATIENCE_S
    with selectors.DefaultSelector() as selector:
        got = dict.fromkeys(polls, b"")
        for poll in polls:
            selector.register(poll, selectors.EVENT_READ)
        left = len(polls)
        while left:
            expect(time.monotonic() < until, f"{left} of {len(polls)} long polls were not answered")
            for key, _ in selector.select(1.0):
                piece = key.fileobj.recv(65536)
                expect(piece, "a long poll was cut off")
                got[key.fileobj] += piece
                head, found, body = got[key.fileobj].partition(b"\r\n\r\n")
                if found and body.endswith(b"}"):
                    expect(head.startswith(b"HTTP/1.1 200"), head[:80].decode("latin-1"))
                    expect(json.loads(body)["unfinished"] == [], "a long poll ended before its job")
                    selector.unregister(key.fileobj)
                    left -= 1


def _memory_kb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return float(status.partition("VmRSS:")[2].split()[0])
