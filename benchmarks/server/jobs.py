"""What the jobs run, beside `benchmarks.functions`."""

from __future__ import annotations


def content(n_bytes):
    """So many bytes as a result."""
    return bytes(n_bytes)
