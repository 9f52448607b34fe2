"""`cloud.wait_for`: until a job has a status, until it listens on a port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cloud
from cloud import CloudException, CloudTimeoutError, wait_for
from cloud.errors import JobNotFound
from tests import sample_functions as sf

FINAL = ("done", "error", "killed", "stalled")


def listen(kind: int, host: str, number: int, seconds: float) -> None:
    """Listen for a while."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as here:
        here.bind((host, number))
        if kind == socket.SOCK_STREAM:
            here.listen()
        time.sleep(seconds)


def let_a_child_listen(number: int, seconds: float) -> None:
    """Have another process listen for a while."""
    source = "import sys; from tests.unit.test_wait_for import listen; listen(1, '0.0.0.0', *map(int, sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", source, str(number), str(int(seconds))], check=True)


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with closing(socket.socket(socket.AF_INET, kind)) as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def wait_until_blocked(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def mp(closed_after: None) -> Iterator[ModuleType]:
    yield cloud


class TestStatus:
    @pytest.mark.parametrize(
        ("function", "args", "final"), [(sf.square, (3,), "done"), (sf.boom, (), "error"), (sf.exit_hard, (), "error")]
    )
    def test_final(self, api: ModuleType, backend_name: str, function: Any, args: Any, final: str) -> None:
        if backend_name == "simulator" and function is sf.exit_hard:
            pytest.skip("a job that exits its process ends the simulation")
        jid = api.call(function, *args)
        assert wait_for.status(jid, final) is None  # type: ignore[func-returns-value]
        assert api.status(jid) == final

    def test_one_of_several(self, api: ModuleType) -> None:
        jid = api.call(sf.boom)
        wait_for.status(jid, FINAL)
        wait_for.status(jid, iter(["done", "error"]))

    def test_processing(self, api: ModuleType) -> None:
        jid = api.call(sf.sleep_then, 0.5)
        wait_for.status(jid, "processing", timeout=10)
        assert api.status(jid) == "processing"

    def test_waiting_and_queued(self, api: ModuleType) -> None:
        first = api.call(sf.sleep_then, 0.3)
        second = api.call(sf.nothing, _depends_on=first)
        wait_for.status(second, "waiting", timeout=0)
        wait_for.status(second, "done", timeout=10)

    def test_killed(self, mp: ModuleType, tmp_path: Path) -> None:
        jid = mp.call(sf.touch_and_sleep, str(tmp_path / "begun"), 100)
        wait_until_blocked(tmp_path / "begun")
        killer = threading.Timer(0.05, mp.kill, (jid,))
        killer.start()
        wait_for.status(jid, "killed", timeout=10)
        killer.join()

    def test_stalled(self, api: ModuleType) -> None:
        first = api.call(sf.boom)
        wait_for.status(api.call(sf.nothing, _depends_on=first), "stalled", timeout=10)

    @pytest.mark.parametrize("wanted", ["processing", "queued", "waiting", "error", "killed", "stalled"])
    def test_out_of_reach_at_the_end(self, api: ModuleType, wanted: str) -> None:
        jid = api.call(sf.square, 3)
        api.join(jid)
        with pytest.raises(CloudException, match=rf"Job {jid}: is 'done' and can no longer become '{wanted}'") as error:
            wait_for.status(jid, wanted)
        assert (error.value.jid, error.value.status) == (jid, "done")
        assert not isinstance(error.value, CloudTimeoutError)

    def test_out_of_reach_before_the_end(self, mp: ModuleType) -> None:
        jid = mp.call(sf.sleep_then, 100)
        wait_for.status(jid, "processing", timeout=10)
        for wanted in ("stalled", "waiting"):
            with pytest.raises(CloudException, match="is 'processing' and can no longer become"):
                wait_for.status(jid, wanted, timeout=60)

    def test_a_failure_while_waiting_for_success(self, mp: ModuleType) -> None:
        jid = mp.call(sf.sleep_then, 100)
        wait_for.status(jid, "processing", timeout=10)
        pid = mp.info(jid, "pid")[jid]["pid"]
        threading.Timer(0.05, os.kill, (pid, signal.SIGSEGV)).start()
        with pytest.raises(CloudException, match="can no longer become 'done'"):
            wait_for.status(jid, "done", timeout=60)

    def test_the_back_off_of_a_retry_is_waiting_again(self, mp: ModuleType, tmp_path: Path) -> None:
        jid = mp.call(sf.boom, _retries=1, _retry_delay=0.4)
        wait_for.status(jid, "waiting", timeout=10)
        wait_for.status(jid, "error", timeout=10)

    def test_timeout(self, api: ModuleType) -> None:
        jid = api.call(sf.sleep_then, 1)
        with pytest.raises(CloudTimeoutError) as error:
            wait_for.status(jid, "done", timeout=0.1)
        assert error.value.jid == [jid]
        with pytest.raises(CloudTimeoutError):
            wait_for.status(jid, "done", timeout=0)
        assert api.status(jid) != "done"

    def test_the_virtual_clock_counts(self, closed_after: None) -> None:
        cloud.start_simulator(force_restart=True)
        began = time.monotonic()
        jid = cloud.call(sf.sleep_then, 1000)
        with pytest.raises(CloudTimeoutError):
            wait_for.status(jid, "done", timeout=500)
        wait_for.status(jid, ["done", "waiting"], timeout=501)
        assert time.monotonic() - began < 30

    @pytest.mark.parametrize("wrong", ["finished", "", "Done", ["done", "x"], []])
    def test_what_is_no_status(self, mp: ModuleType, wrong: Any) -> None:
        with pytest.raises(ValueError, match="there are waiting, queued, processing, done"):
            wait_for.status(mp.call(sf.nothing), wrong)

    def test_wrong_arguments(self, mp: ModuleType) -> None:
        jid = mp.call(sf.nothing)
        with pytest.raises(JobNotFound):
            wait_for.status(99, "done")
        with pytest.raises(TypeError, match="takes one jid"):
            wait_for.status([jid], "done")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="numeric jid"):
            wait_for.status("1", "done")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="test_status must be"):
            wait_for.status(jid, 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="timeout must be"):
            wait_for.status(jid, "done", timeout="1")  # type: ignore[arg-type]
        for timeout in (-1, float("nan")):
            with pytest.raises(ValueError, match="timeout must be"):
                wait_for.status(jid, "done", timeout=timeout)


class TestPort:
    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
    def test_tcp(self, mp: ModuleType, host: str) -> None:
        number = free_port()
        jid = mp.call(listen, socket.SOCK_STREAM, host, number, 100)
        where = wait_for.port(jid, number, timeout=10)
        assert where == {"address": "::1" if ":" in host else "127.0.0.1", "port": number}
        with socket.create_connection((str(where["address"]), number), timeout=5):
            pass

    def test_udp(self, mp: ModuleType) -> None:
        number = free_port(socket.SOCK_DGRAM)
        jid = mp.call(listen, socket.SOCK_DGRAM, "127.0.0.1", number, 100)
        assert wait_for.port(jid, number, "udp", timeout=10) == {"address": "127.0.0.1", "port": number}
        with pytest.raises(CloudTimeoutError):
            wait_for.port(jid, number, "tcp", timeout=0.05)

    def test_a_process_of_the_job_counts(self, mp: ModuleType) -> None:
        number = free_port()
        jid = mp.call(let_a_child_listen, number, 100)
        assert wait_for.port(jid, number, timeout=20)["address"] == "127.0.0.1"

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not tell who listens")
    def test_another_program_on_the_port_does_not_count(self, mp: ModuleType) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as other:
            jid = mp.call(sf.sleep_then, 100)
            wait_for.status(jid, "processing", timeout=10)
            with pytest.raises(CloudTimeoutError, match=r"cloud.wait_for.port timed out"):
                wait_for.port(jid, other.getsockname()[1], timeout=0.1)

    def test_without_proc_any_listener_counts(self, mp: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os.path, "isdir", lambda path: False)
        number = free_port()
        jid = mp.call(sf.sleep_then, 100)
        wait_for.status(jid, "processing", timeout=10)
        with pytest.raises(CloudTimeoutError):
            wait_for.port(jid, number, timeout=0.05)
        with closing(socket.create_server(("127.0.0.1", number))):
            assert wait_for.port(jid, number, timeout=10) == {"address": "127.0.0.1", "port": number}

    def test_a_job_that_has_yet_to_begin(self, mp: ModuleType) -> None:
        number = free_port()
        first = mp.call(sf.sleep_then, 0.1)
        jid = mp.call(listen, socket.SOCK_STREAM, "127.0.0.1", number, 100, _depends_on=first)
        assert wait_for.port(jid, number, timeout=10)["port"] == number

    def test_in_the_simulator(self, closed_after: None) -> None:
        cloud.start_simulator(force_restart=True)
        number = free_port()
        jid = cloud.call(listen, socket.SOCK_STREAM, "127.0.0.1", number, 5)
        assert wait_for.port(jid, number, timeout=10)["port"] == number
        cloud.join(jid)

    @pytest.mark.parametrize(("function", "ended"), [(sf.nothing, "done"), (sf.boom, "error")])
    def test_a_job_that_ends_first(self, api: ModuleType, function: Any, ended: str) -> None:
        jid = api.call(function)
        with pytest.raises(CloudException, match=rf"ended \({ended}\) without listening on tcp port 1234") as error:
            wait_for.port(jid, 1234, timeout=10)
        assert (error.value.jid, error.value.status) == (jid, ended)

    @pytest.mark.parametrize("number", [0, -1, 65536])
    def test_what_is_no_port(self, mp: ModuleType, number: int) -> None:
        with pytest.raises(ValueError, match=f"1 to 65535, not {number}"):
            wait_for.port(1, number)

    def test_wrong_arguments(self, mp: ModuleType) -> None:
        for wrong in ("80", True, 1.5):
            with pytest.raises(TypeError, match="port must be an int"):
                wait_for.port(1, wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'tcp' or 'udp', not 'icmp'"):
            wait_for.port(1, 80, "icmp")
        with pytest.raises(JobNotFound):
            wait_for.port(99, 80)
