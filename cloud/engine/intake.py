"""Calls that were taken and are not yet jobs of a batch: those made one after the other become one batch together.

A batch costs more than a small job does. While every worker has work, nobody needs the next call at once: it waits
here, and whoever next looks at the store or the queue makes batches of all that wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from cloud.engine.channel import ANEW_CHUNK, SEPARATE_CHUNK, join_separate
from cloud.engine.store.base import Batch, Chunk
from cloud.jobs import DEFAULT_OPTIONS, JobOptions
from cloud.serialization.functions import Function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeAlias

_MAX_TOGETHER: Final = 64
_MAX_BYTES: Final = 1 << 10
"""Of the arguments of a call that may share a chunk: a worker that gets some of a chunk gets all of its bytes."""

_TOGETHER_S: Final = 0.001
"""The jobs of a batch have one time of creation."""

Call: TypeAlias = "tuple[Function, tuple[int, bytes], JobOptions, int, float, bytes]"
"""function, context, options, depth, created, arguments."""
Taken: TypeAlias = "tuple[int, Call]"
"""jid, and the call."""


class Intake(deque[Taken]):
    """Calls in the order of their jids. One that a signal handler makes amid another may come before it.

    Each is one entry, put in one step: whatever interrupts the caller finds it whole, or not at all.
    """

    @staticmethod
    def takes(arguments: bytes, options: JobOptions) -> bool:
        """Whether a call may wait here.

        One that is more urgent than most may have to pass by what workers were sent ahead, which they are asked for as
        it is queued.
        """
        if options is not DEFAULT_OPTIONS and (options.alone or options.priority < DEFAULT_OPTIONS.priority):
            return False
        return type(arguments) is bytes

    def batches(self, tokens: Iterator[int]) -> Iterator[Batch]:
        """What has been taken, as batches with jids.

        Args:
            tokens: For their chunks.
        """
        while self:
            jid, (function, context, options, depth, created, arguments) = self.popleft()
            together = [arguments]
            may_share = function.reusable or type(function.payload) is bytes
            n_most = _MAX_TOGETHER if may_share and len(arguments) <= _MAX_BYTES else 1
            last = jid
            latest = created + _TOGETHER_S
            while self and len(together) < n_most:
                its_jid, (its_function, its_context, its_options, its_depth, its_created, its_arguments) = self[0]
                if (
                    its_jid != last + 1
                    or (its_function is not function and not _are_alike(its_function, function))
                    or its_options is not options
                    or its_context[0] != context[0]
                    or its_depth != depth
                    or its_created > latest
                    or len(its_arguments) > _MAX_BYTES
                ):
                    break
                self.popleft()
                together.append(its_arguments)
                last = its_jid
            n = len(together)
            if n == 1:
                yield Batch(jid, function, context, options, depth, created, arguments)
                continue
            # One that is not reusable holds what a job may change: none finds it as another left it.
            kind = SEPARATE_CHUNK if function.reusable else ANEW_CHUNK
            batch = Batch(jid, function, context, options, depth, created, None)
            batch.chunks.append(Chunk(next(tokens), 0, n, kind, join_separate(together)))
            batch.n = n
            batch.states = bytearray(b"\x01") * n
            batch.put_free(0, n)
            batch.sealed = True
            yield batch


def _are_alike(one: Function, other: Function) -> bool:
    """Whether two functions that were pickled anew, each for its call, were the same then."""
    return (
        not (one.reusable or other.reusable)
        and one.name == other.name
        and type(one.payload) is bytes
        and one.payload == other.payload
    )
