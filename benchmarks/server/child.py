"""One measurement in a process of its own: ``python -m benchmarks.server.child WORKLOAD SYSTEM short|full FILE``.

Writes what `benchmarks.child` writes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.child import measure
from benchmarks.pace import Effort
from benchmarks.server.systems import SERVERS
from benchmarks.server.workloads import WORKLOADS

SHORT = Effort(seconds=1.0, patience_s=10.0, full=False)
FULL = Effort(seconds=4.0, patience_s=30.0, full=True)


def main(code: str, name: str, effort: str, file: str) -> None:
    system = SERVERS[name]()
    found = measure(WORKLOADS[code], system, FULL if effort == "full" else SHORT)
    Path(file).write_text(json.dumps(found), encoding="utf-8")
    if "figures" in found:
        system.close()
    else:
        # It may hang if it is asked to close now; the runner ends what is left.
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
