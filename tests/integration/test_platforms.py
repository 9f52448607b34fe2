"""Systems that lack what Linux has: what works there works, what cannot says so."""

from __future__ import annotations

from typing import Any

WINDOWS = """
import os, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "posix_spawn", "memfd_create", "environb", "setsid", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
import cloud
"""


def test_without_fork_worker_processes_say_what_to_use_instead(run_script: Any) -> None:
    source = WINDOWS + (
        "try:\n    cloud.mp.call(len, [])\nexcept cloud.CloudException as exc:\n    print(type(exc).__name__, exc)\n"
    )
    result = run_script(source)
    assert "UnsupportedOperation" in result.stdout
    assert "start_simulator" in result.stdout


def test_without_fork_the_simulator_works(run_script: Any) -> None:
    source = WINDOWS + "cloud.start_simulator()\nprint(cloud.result(cloud.map(lambda x: 2 * x, range(3))))\n"
    assert run_script(source).stdout == "[0, 2, 4]\n"
