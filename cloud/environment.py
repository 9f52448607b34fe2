"""What a worker must be to run a job. Servers have several; elsewhere it is None."""

from __future__ import annotations

from typing import NamedTuple


class Environment(NamedTuple):
    """What a worker must be to run a job; jobs that differ in it never meet in one process.

    Attributes:
        python: 'major.minor' of its interpreter.
        code: Names the set of the user's modules that it imports from; "" for none.
    """

    python: str
    code: str
