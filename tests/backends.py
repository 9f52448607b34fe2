"""The backends that the conformance suite runs on, as data: a new one is one more line here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Final


def _mp() -> ModuleType:
    import cloud.mp

    return cloud.mp


def _simulator() -> ModuleType:
    import cloud

    cloud.start_simulator(force_restart=True)
    return cloud


OPENERS: Final[dict[str, Callable[[], ModuleType]]] = {"mp": _mp, "simulator": _simulator}
"""By name, what makes the backend current and returns the namespace whose verbs use it."""

BACKENDS: Final = tuple(OPENERS)


def close_all() -> None:
    """Close whatever `cloud` and `cloud.mp` run on, and choose nothing: as in a program that has just begun."""
    current = sys.modules.get("cloud.current")
    if hasattr(current, "process"):
        current.process._committed(None)


def forget_settings() -> None:
    """Make the next use read the environment and the configuration file again."""
    current = sys.modules.get("cloud.current")
    if hasattr(current, "process"):
        current.process.config._draft.clear()
        vars(current.process.config).pop("_settings", None)
