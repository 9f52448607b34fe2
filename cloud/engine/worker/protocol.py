"""Messages between the engine's process and the template: one datagram each.

::

    engine → template   F id 0          fork a worker; with the descriptors: socket, page, stdout, stderr
                        K id signal     send a signal to the worker (SIGKILL: to its whole process group)
    template → engine   B id pid        the worker was born
                        D id status     the worker is dead: its wait status, plus BY_ENGINE if a SIGKILL was asked for
                                        while it lived; below -1000 the errno of a failed fork
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

MESSAGE: Final = struct.Struct("<cIi")
N_DESCRIPTORS: Final = 4
BY_ENGINE: Final = 1 << 24
