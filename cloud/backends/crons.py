"""Crons of a server, from its clients and from inside its jobs."""

from __future__ import annotations

import builtins
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from cloud.backends.files import Ask
from cloud.jobs import JobOptions
from cloud.resources.crons import MissedPolicy, OverlapPolicy, name_of, policy
from cloud.resources.schedule import Schedule
from cloud.serialization.functions import Function

if TYPE_CHECKING:
    from typing import Any, Final

    Submit = Callable[[str, Function, bytes, JobOptions, dict[str, Any]], dict[str, Any]]

__all__ = ["RemoteCrons"]

_MAX_HOST_CHARS: Final = 256
_TIMES: Final = ("created", "last_run", "next_run")


class RemoteCrons:
    """What ``cloud.cron`` can do on a server: see ``cloud.resources.crons.CronService``.

    Args:
        ask: Asks the server.
        submit: Asks it with a call beside: the operation, the function, its pickled arguments, options, and what else
            the operation is asked with.
        pickle_call: A function and reserved ``_names`` to the function's bytes, the pickled arguments, and options.
    """

    def __init__(
        self,
        ask: Ask,
        submit: Submit,
        pickle_call: Callable[[Callable[..., Any], dict[str, Any]], tuple[Function, bytes, JobOptions]],
    ) -> None:
        self._ask = ask
        self._submit = submit
        self._pickle_call = pickle_call

    def register(
        self,
        func: Callable[..., Any],
        label: str,
        schedule: str | Sequence[str | int],
        *,
        reserved: Mapping[str, Any],
        tz: str = "UTC",
        missed: MissedPolicy | str = MissedPolicy.RUN_ONCE,
        overlap: OverlapPolicy | str = OverlapPolicy.SKIP,
    ) -> None:
        """Store a function under a label, replacing what the label stood for. See ``cloud.cron.register``."""
        parsed = Schedule(schedule, tz)
        facts = {
            "label": label,
            "schedule": parsed.text,
            "tz": parsed.tz,
            "missed": policy(MissedPolicy, missed, "missed").value,
            "overlap": policy(OverlapPolicy, overlap, "overlap").value,
            "func_name": name_of(func),
            "creator_host": platform.node()[:_MAX_HOST_CHARS],
        }
        function, arguments, options = self._pickle_call(func, dict(reserved))
        self._submit("cron.register", function, arguments, options, facts)

    def deregister(self, label: str) -> None:
        """Remove an entry. Raises CronNotFound for an unknown label."""
        self._ask("cron.deregister", label=label)

    def manual_run(self, label: str) -> int:
        """Submit an entry's job now and return its jid. Raises CronNotFound for an unknown label."""
        jid: int = self._ask("cron.manual_run", label=label)[0]["jid"]
        return jid

    def list(self) -> builtins.list[str]:
        """Return all labels, sorted."""
        labels: builtins.list[str] = self._ask("cron.list")[0]["labels"]
        return labels

    def info(self, label: str) -> dict[str, Any]:
        """Describe an entry; see ``cloud.cron.info``. Raises CronNotFound for an unknown label."""
        found = self._ask("cron.info", label=label)[0]
        facts = {name: found[name] for name in _FACTS}
        for name in _TIMES:
            if facts[name] is not None:
                facts[name] = datetime.fromisoformat(facts[name])
        return {**facts, "funcname": facts["func_name"]}


_FACTS: Final = (
    "label",
    "schedule",
    "tz",
    "missed",
    "overlap",
    "func_name",
    "created",
    "creator_host",
    "last_run",
    "last_jid",
    "next_run",
)
