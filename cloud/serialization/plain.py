"""Payloads and outcomes in one piece, for where only bytes can go: a disk, a network.

What travels between processes of one machine may have its large buffers beside it (``shared``). Here they are put in.
Nothing is unpickled.
"""

from __future__ import annotations

import struct

from cloud.jobs import VALUE, VALUES, Outcome, pack_outcome
from cloud.serialization.shared import SharedBytes, attach, inline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_LENGTH: Final = struct.Struct("<I")


def plain_payload(payload: bytes) -> bytes:
    """A function or the arguments of a call, as bytes alone."""
    return inline(payload)


def plain_chunk(payload: bytes) -> bytes:
    """A chunk's payload, as bytes alone. One with buffers beside it holds a single item, behind its length."""
    if not isinstance(payload, SharedBytes):
        return payload
    item = inline(attach(payload[_LENGTH.size :], payload.segment))
    return _LENGTH.pack(len(item)) + item


def plain_outcome(raw: bytes) -> bytes:
    """A packed outcome, as bytes alone."""
    if not isinstance(raw, SharedBytes):
        return raw
    outcome = Outcome(raw)
    return _with_sections(
        outcome,
        [
            (tag, inline(attach(content, raw.segment)) if tag == VALUE else content)
            for tag, content in outcome.sections()
        ],
    )


def without_value(raw: bytes) -> bytes:
    """All of a packed outcome but the value, or values."""
    outcome = Outcome(raw)
    return _with_sections(outcome, [(tag, content) for tag, content in outcome.sections() if tag not in VALUES])


def _with_sections(outcome: Outcome, sections: list[tuple[int, bytes]]) -> bytes:
    user_s, system_s, rss_bytes = outcome.usage
    return pack_outcome(
        outcome.status,
        sections,
        pid=outcome.pid,
        started=outcome.started,
        runtime_s=outcome.runtime_s,
        cpu_user_s=user_s,
        cpu_system_s=system_s,
        max_rss_kb=rss_bytes // 1024,
    )


__all__ = ["plain_chunk", "plain_outcome", "plain_payload", "without_value"]
