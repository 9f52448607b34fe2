"""The audit log: whole after every death, and unchanged or known to be."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.resources import keys
from cloud.server import audit
from cloud.server.audit import AuditLog, records, verify
from tests.scripts import program_environment

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "audit.log"


@pytest.fixture
def log(path: Path) -> Iterator[AuditLog]:
    log = AuditLog(str(path))
    yield log
    log.close()


def fill(log: AuditLog, n: int = 5) -> None:
    for number in range(n):
        log.record("ada", 7, "192.0.2.7", "kill", [number], label="x")


def told(path: Path) -> list[dict[str, Any]]:
    return list(records(str(path)))


class TestRecords:
    def test_a_line_tells_it_all(self, path: Path) -> None:
        log = AuditLog(str(path), now=lambda: 1_900_000_000.25)
        log.record("ada", 7, "192.0.2.7", "submit", [1, 2], label="night run", n=3, hold=False, rate=0.5)
        log.record(None, None, None, "start", None)
        log.close()
        first, second = told(path)
        assert {name: first[name] for name in first if name not in {"prev", "hash"}} == {
            "at": "2030-03-17T17:46:40.250+00:00",
            "who": "ada",
            "key": 7,
            "address": "192.0.2.7",
            "action": "submit",
            "target": [1, 2],
            "details": {"label": "night run", "n": 3, "hold": False, "rate": 0.5},
        }
        assert (first["prev"], second["prev"]) == ("0" * 64, first["hash"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        verdict = verify(str(path))
        assert (verdict.n_lines, verdict.bad_line, verdict.head) == (2, None, second["hash"])

    def test_it_goes_on_after_a_restart(self, path: Path) -> None:
        for _ in range(4):
            log = AuditLog(str(path))
            fill(log, 3)
            log.close()
            log.close()
        assert (verify(str(path)).n_lines, verify(str(path)).bad_line) == (12, None)

    @pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "\x1b[2J", "\0", "\u2028", "\x85", "é", "\udcff", '"}', "\\"])
    def test_no_text_leaves_its_line(self, log: AuditLog, path: Path, text: str) -> None:
        log.record(text, 1, text, text, text, **{text: text, "deep": {text: [text]}})
        fill(log, 1)
        data = path.read_bytes()
        assert data.count(b"\n") == 2
        assert not any(byte < 32 or byte > 126 for byte in data.replace(b"\n", b""))
        found = told(path)[0]
        assert found["target"] == found["who"] == found["details"][text] == text
        assert found["details"]["deep"] == {text: [text]}
        assert verify(str(path)).bad_line is None

    @FEW
    @given(
        target=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
        )
    )
    def test_anything_can_be_a_target(self, log: AuditLog, path: Path, target: Any) -> None:
        log.record("ada", 1, "x", "kill", target)
        assert verify(str(path)).bad_line is None

    def test_long_values_are_cut(self, log: AuditLog, path: Path) -> None:
        log.record(
            "ada", 1, "x", "kill", list(range(1_000_000)), label="x" * 10_000_000, more={n: n for n in range(500)}
        )
        assert path.stat().st_size < 5000
        (found,) = told(path)
        assert found["target"][-1] == "and 999900 more"
        assert found["details"]["label"] == "x" * 1000 + "[cut]"

    def test_no_secret_gets_in(self, log: AuditLog, path: Path) -> None:
        secret = keys.new_secret()
        log.record(
            secret, 1, secret, "x", {secret: [f"my key is {secret}."]}, label="x" * 980 + secret, raw=secret.encode()
        )
        log.record("ada", 1, "x", "x", {"Password": "sesame", "api_secretkey": "sesame"})
        data = path.read_text()
        assert secret not in data
        assert secret[4:20] not in data
        assert "sesame" not in data
        for name in ("password", "api_secretkey", "Authorization", "pepper"):
            with pytest.raises(ValueError, match="must not be recorded"):
                log.record("ada", 1, "x", "x", "y", **{name: "sesame"})
        assert len(told(path)) == 2


class TestTampering:
    @pytest.mark.parametrize(
        ("change", "line"),
        [
            (lambda lines: [lines[0], lines[1].replace(b"ada", b"eve"), *lines[2:]], 2),
            (lambda lines: [*lines[:2], *lines[3:]], 3),
            (lambda lines: lines[1:], 1),
            (lambda lines: [lines[0], lines[0], *lines[1:]], 2),
            (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
            (lambda lines: [*lines[:3], b"\n", *lines[3:]], 4),
            (lambda lines: [*lines[:4], lines[4][:-1]], 5),
            (lambda lines: [*lines[:4], lines[4][:-30] + b"\n"], 5),
            (lambda lines: [*lines[:2], b"[1]\n", *lines[2:]], 3),
            (lambda lines: [lines[0].replace(b'"}\n', b'" }\n'), *lines[1:]], 1),
        ],
    )
    def test_the_first_bad_line_is_told(
        self, log: AuditLog, path: Path, change: Callable[[list[bytes]], list[bytes]], line: int
    ) -> None:
        fill(log)
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
        verdict = verify(str(path))
        assert verdict.bad_line == line
        assert verdict.n_lines == line - 1
        assert verdict.problem

    @FEW
    @given(data=st.data())
    def test_every_changed_byte_is_noticed(self, tmp_path: Path, data: st.DataObject) -> None:
        path = tmp_path / "audit.log"
        path.unlink(missing_ok=True)
        log = AuditLog(str(path))
        fill(log, 3)
        log.close()
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
        line = content[:position].count(b"\n") + 1
        path.write_bytes(content)
        assert verify(str(path)).bad_line == line

    def test_a_new_chain_has_another_head(self, tmp_path: Path) -> None:
        heads = []
        for who in ("ada", "eve"):
            path = tmp_path / who / "audit.log"
            log = AuditLog(str(path), now=lambda: 5.0)
            log.record(who, 1, "x", "kill", 1)
            log.close()
            heads.append(verify(str(path)).head)
        assert heads[0] != heads[1]

    def test_a_file_that_was_damaged_is_still_written(self, path: Path) -> None:
        path.parent.mkdir()
        path.write_bytes(b"garbage\n")
        log = AuditLog(str(path))
        fill(log, 2)
        log.close()
        assert verify(str(path)).bad_line == 1
        assert [each.get("action") for each in told(path)] == [None, "kill", "kill"]
        assert told(path)[0] == {"unreadable_line": 1}


class TestDeath:
    @pytest.mark.parametrize("kept", [1, 20, -2, -1])
    def test_a_torn_line_is_cut_off_and_told(self, path: Path, kept: int) -> None:
        log = AuditLog(str(path))
        fill(log, 3)
        log.close()
        lines = path.read_bytes().splitlines(keepends=True)
        torn = lines[2][:kept]
        path.write_bytes(b"".join(lines[:2]) + torn)
        assert verify(str(path)).bad_line == 3
        log = AuditLog(str(path))
        fill(log, 1)
        log.close()
        verdict = verify(str(path))
        assert (verdict.n_lines, verdict.bad_line) == (4, None)
        repaired = told(path)[2]
        assert (repaired["action"], repaired["details"]) == ("audit.repair", {"removed_bytes": len(torn)})

    @pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"{", b"x" * 200_000])
    def test_a_file_without_one_whole_line(self, path: Path, content: bytes) -> None:
        path.parent.mkdir()
        path.write_bytes(content)
        log = AuditLog(str(path))
        fill(log, 2)
        log.close()
        assert verify(str(path)).bad_line is None
        assert len(told(path)) == 2 + bool(content)

    def test_long_lines_are_found_again(self, path: Path) -> None:
        log = AuditLog(str(path))
        log.record("ada", 1, "x", "kill", ["y" * 1000] * 100)
        log.record("ada", 1, "x", "kill", ["z" * 1000] * 100)
        assert path.stat().st_size > 2 * audit._TAIL_BYTES
        other = AuditLog(str(path))
        fill(other, 1)
        fill(log, 1)
        for each in (log, other):
            each.close()
        assert (verify(str(path)).n_lines, verify(str(path)).bad_line) == (4, None)

    def test_a_killed_writer_loses_nothing_it_was_told(self, path: Path) -> None:
        program = (
            "import sys\nfrom cloud.server.audit import AuditLog\nlog = AuditLog(sys.argv[1])\n"
            "for n in range(10**9):\n    log.record('ada', 1, 'x', 'kill', n)\n    print(n, flush=True)\n"
        )
        n_before = 0
        for _ in range(3):
            writer = subprocess.Popen(
                [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, env=program_environment()
            )
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(300)]
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read()
            writer.wait()
            writer.stdout.close()
            n_told = len(lines) + rest.count("\n")
            n_now = sum(1 for each in told(path) if each.get("action") == "kill")
            assert n_now >= n_before + n_told
            n_before = n_now
        log = AuditLog(str(path))
        fill(log, 1)
        log.close()
        assert verify(str(path)).bad_line is None

    def test_threads_and_processes_make_one_chain(self, path: Path) -> None:
        log = AuditLog(str(path))
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                fill(AuditLog(str(path)), 50)
                os._exit(0)
            pids.append(pid)
        threads = [threading.Thread(target=fill, args=(log, 50)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 3
        log.close()
        verdict = verify(str(path))
        assert (verdict.n_lines, verdict.bad_line) == (300, None)

    @pytest.mark.parametrize("n_written", [None, 10])
    def test_a_full_disk_leaves_the_file_as_it_was(
        self, log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int | None
    ) -> None:
        fill(log, 2)
        before = path.read_bytes()
        write = os.write

        def full(descriptor: int, data: bytes) -> int:
            if n_written is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[:n_written])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match=r"No space left|only 10 of"):
                log.record("ada", 1, "x", "kill", 5)
        assert path.read_bytes() == before
        fill(log, 1)
        assert (verify(str(path)).n_lines, verify(str(path)).bad_line) == (3, None)


class TestDisk:
    def test_it_waits_for_the_disk_once_a_second(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now_s = 50.0
        syncs: list[float] = []
        log = AuditLog(str(path), clock=lambda: now_s)
        log.record("ada", 1, "x", "kill", 0)
        monkeypatch.setattr(os, "fsync", lambda descriptor: syncs.append(now_s))
        for now_s in (50.5, 50.9, 51.0, 51.5, 52.5):
            log.record("ada", 1, "x", "kill", now_s)
        assert syncs == [51.0, 52.5]
        log.sync()
        assert syncs == [51.0, 52.5]
        now_s = 52.6
        log.record("ada", 1, "x", "kill", 0)
        log.sync()
        log.sync()
        assert syncs == [51.0, 52.5, 52.6]
        log.close()
        assert syncs == [51.0, 52.5, 52.6]

    def test_the_lines_are_json(self, log: AuditLog, path: Path) -> None:
        fill(log)
        assert [json.loads(line)["target"] for line in path.read_text().splitlines()] == [[n] for n in range(5)]
