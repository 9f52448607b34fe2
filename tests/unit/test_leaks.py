"""The guards that every test runs under: each must see its kind of leak."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading

import pytest

from tests.leaks import Leaks
from tests.scripts import ScriptRunner

SLEEPER = "import time; time.sleep(60)"


@pytest.fixture
def leaks() -> Leaks:
    return Leaks()


def test_nothing_is_no_leak(leaks: Leaks) -> None:
    assert leaks.found() == []


def test_a_child_is_found_and_ended(leaks: Leaks) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as child:
        assert [line for line in leaks.found() if str(child.pid) in line]
        leaks.end_processes()
    assert leaks.found() == []


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux shows the environment of processes that are no children"
)
def test_an_orphan_is_found_and_ended(leaks: Leaks, run_script: ScriptRunner) -> None:
    started = run_script(
        f"""
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], start_new_session=True).pid)
        """
    )
    assert [line for line in leaks.found() if started.stdout.strip() in line]
    leaks.end_processes()
    assert leaks.found_after(1.0) == []


def test_a_thread_of_ours_is_found_while_it_lives(leaks: Leaks) -> None:
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, name=name) for name in ("cloud-dispatcher", "a user's")]
    for thread in threads:
        thread.start()
    try:
        assert leaks.found() == ["thread cloud-dispatcher"]
    finally:
        done.set()
    assert leaks.found_after(1.0) == []


def test_a_descriptor_is_found_until_it_is_closed(leaks: Leaks) -> None:
    read, write = os.pipe()
    found = leaks.found()
    os.close(read)
    os.close(write)
    assert len(found) == 2
    assert all(line.startswith("descriptor") for line in found)
    assert leaks.found() == []


def test_a_temporary_file_of_ours_is_found_until_it_is_removed(leaks: Leaks) -> None:
    descriptor, path = tempfile.mkstemp(prefix="cloud-")
    os.close(descriptor)
    found = leaks.found()
    os.unlink(path)
    assert found == [f"temporary file {os.path.basename(path)}"]
    assert leaks.found() == []
