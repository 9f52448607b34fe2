"""One measurement in a process of its own: ``python -m benchmarks.child WORKLOAD SYSTEM short|full FILE``.

Writes JSON to FILE: ``{"figures": {...}}``, ``{"not_offered": why}`` or ``{"failed": why}``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.aims import Workload
from benchmarks.pace import FULL, SHORT, Effort
from benchmarks.systems import SYSTEMS, VARIANTS, NotOffered, System


def measure(workload: Workload, system: System, effort: Effort) -> dict[str, Any]:
    """Open the system and run the workload with it; the system stays open."""
    try:
        if workload.opens:
            system.open()
        return {"figures": workload.measure(system, effort)}
    except NotOffered as exc:
        return {"not_offered": str(exc)}
    except Exception as exc:
        traceback.print_exc()
        lines = str(exc).strip().splitlines()
        return {"failed": f"{type(exc).__name__}: {lines[0] if lines else ''}"}


def main(code: str, name: str, effort: str, file: str) -> None:
    from benchmarks.workloads import WORKLOADS

    workload, system = WORKLOADS[code], {**SYSTEMS, **VARIANTS}[name]()
    found = measure(workload, system, FULL if effort == "full" else SHORT)
    Path(file).write_text(json.dumps(found), encoding="utf-8")
    if "figures" not in found:
        # It may hang if it is asked to close now; the runner ends what is left.
        os._exit(0)
    if workload.opens:
        system.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
