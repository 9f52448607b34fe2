"""The template process of local workers, started before everything that uses it is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cloud.engine.executor.template import TemplateProcess
from cloud.engine.interrupts import Handlers

PRELOAD = ("json", "logging", "cloudpickle", "cloud.backends.worker", "cloud.current")
"""What jobs that submit jobs need."""


def preload_now() -> tuple[str, ...]:
    """The same, and what jobs will need in a program that has loaded it."""
    return PRELOAD if "multiprocessing.process" not in sys.modules else (*PRELOAD, "multiprocessing.process")


@contextmanager
def template_ahead(*, wanted: bool = True) -> Iterator[TemplateProcess | None]:
    """A template that starts while the block imports what it takes; if the block raises, its end.

    None where that is imported already: there is nothing to be done meanwhile.

    Args:
        wanted: False for None.
    """
    template = None
    try:
        if wanted and "cloud.engine.engine" not in sys.modules:
            # A handler that raised in the middle would leave a process behind, or an error that is not the system's.
            with Handlers(), suppress(OSError):  # what is in the way may be gone when the first job starts one
                template = TemplateProcess(preload_now())
        yield template
    except BaseException:
        if template is not None:
            template.end()
        raise
