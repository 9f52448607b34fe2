"""What other programs have run on our pools. Light to import: each worker does."""

from __future__ import annotations

import math
from typing import Any


def rosenbrock(x: Any) -> float:
    return float(sum(100.0 * (x[1:] - x[:-1] ** 2.0) ** 2.0 + (1 - x[:-1]) ** 2.0))


def bell(x: float) -> float:
    return math.exp(-x * x)


def log_probability(x: Any) -> float:
    return float(-0.5 * (x**2).sum())
