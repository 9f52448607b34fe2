"""The template process of local workers, started before everything that uses it is imported."""

from __future__ import annotations

import sys

from cloud.engine.executor.template import TemplateProcess
from cloud.engine.interrupts import Handlers

PRELOAD = ("json", "logging", "cloudpickle", "cloud.backends.worker", "cloud.current")
"""What jobs that submit jobs need."""


def preload_now() -> tuple[str, ...]:
    """The same, and what jobs will need in a program that has loaded it."""
    return PRELOAD if "multiprocessing.process" not in sys.modules else (*PRELOAD, "multiprocessing.process")


class TemplateAhead:
    """``with`` it, a template starts while the block imports what it takes; if the block raises, it ends.

    None where that is imported already: there is nothing to be done meanwhile.

    Args:
        wanted: False for None.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._template: TemplateProcess | None = None
        self._wanted = wanted and "cloud.engine.engine" not in sys.modules

    def __enter__(self) -> TemplateProcess | None:
        if self._wanted:
            try:
                # A handler that raised in the middle would leave a process behind, or an error that is none of
                # the system's.
                with Handlers():
                    self._start()
            except BaseException:
                self._end()
                raise
        return self._template

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._end()

    def _start(self) -> None:
        try:
            self._template = TemplateProcess(preload_now())
        except OSError:
            pass  # what is in the way may be gone when the first job starts one

    def _end(self) -> None:
        if self._template is not None:
            self._template.end()
