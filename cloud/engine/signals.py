"""The module ``signal`` without its half in Python: the numbers are ints, and no enums are made.

Making those takes a millisecond or two of the time to the first result, here and in the workers' parent.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

signal: Any = sys.modules["_signal"]
