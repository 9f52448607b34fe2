"""Jobs on the cores of this machine, whatever ``cloud`` itself is set to. The same verbs as ``cloud``.

::

    import cloud.mp

    jid = cloud.mp.call(lambda: 3 * 3)
    cloud.mp.result(jid)              # 9
"""

from __future__ import annotations

from cloud import current
from cloud.errors import CloudException, CloudTimeoutError
from cloud.jobs import FINISHED_LABELS as finished_statuses  # noqa: N811 - the public name is PiCloud's

_cloud = current.process.mp

aresult = _cloud.aresult
call = _cloud.call
close = _cloud.close
connection_info = _cloud.connection_info
delete = _cloud.delete
find = _cloud.find
info = _cloud.info
iresult = _cloud.iresult
iresult_unordered = _cloud.iresult_unordered
join = _cloud.join
kill = _cloud.kill
map = _cloud.map
progress = _cloud.progress
result = _cloud.result
starmap = _cloud.starmap
status = _cloud.status

__all__ = [
    "CloudException",
    "CloudTimeoutError",
    "aresult",
    "call",
    "close",
    "connection_info",
    "delete",
    "find",
    "finished_statuses",
    "info",
    "iresult",
    "iresult_unordered",
    "join",
    "kill",
    "map",
    "progress",
    "result",
    "starmap",
    "status",
]
