"""Crons: functions that are called again and again, by a schedule.

::

    cloud.cron.register(backup, "nightly-backup", "30 2 * * *", tz="Europe/Berlin")

Registering stores the function; it is called where crons are run: by the server in use, at each slot once, whatever
becomes of programs and server meanwhile; without a server by ``cloud cron run`` on this machine. The program that
registered may be long gone by then. On a server the crons are those of the workgroup, and also jobs may use them.

Source: PiCloud client 2.1.1-2.8.5, ``cloud.cron``. New here: ``tz``, ``missed``, ``overlap``, `preview`, use without
a server, names in lists and ranges.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cloud import current

if TYPE_CHECKING:
    from cloud.backends.crons import RemoteCrons
    from cloud.resources.crons import CronService, MissedPolicy, OverlapPolicy

__all__ = ["deregister", "info", "list", "manual_run", "preview", "register"]

_RESERVED = frozenset(
    (
        "_fast_serialization",
        "_high_cpu",
        "_profile",
        "_restartable",
        "_priority",
        "_type",
        "_cores",
        "_max_runtime",
        "_os_env_vars",
        "_kill_process",
    )
)
# A cron's label is its own, and nothing it could depend on exists when it is registered.
_IGNORED = frozenset(("_label", "_depends_on", "_depends_on_errors"))


def register(
    func: Callable[..., Any],
    label: str,
    schedule: str | Sequence[str | int],
    *,
    tz: str = "UTC",
    missed: MissedPolicy | str = "run_once",
    overlap: OverlapPolicy | str = "skip",
    **kwargs: Any,
) -> None:
    """Store a function to be called by a schedule, replacing what the label stood for.

    Slots from now on count. When the label was already registered with an equal schedule and zone, those not yet
    run still count as well. Nothing is run by this process.

    Args:
        func: Takes no required arguments; wrap others: ``lambda: func(x, y)``. Stored by value, as it is now.
        label: Names the cron in the other functions; not empty, ASCII.
        schedule: ``"min hour day mon dow"`` or a sequence of these five. ``*``, numbers, names (``jan``, ``mon``),
            lists ``1,2``, ranges ``1-5``, steps ``*/2``, ``1-9/2`` and ``N/S`` (from N, every S). Sunday is 0 or 7.
            Minutes are the finest grain; there are no seconds, no years and no words such as ``@daily``.
        tz: Name of the time zone whose clock the schedule means. What happens when that clock is changed, and how
            day of month and day of week combine, stands in the how-to "Schedule with cron".
        missed: What to do with slots that passed while nobody ran crons: ``"skip"`` them, ``"run_once"`` (the
            latest of them), or ``"run_all"`` (at once, even those that then overlap).
        overlap: What to do with a slot while the last run is unfinished: ``"allow"`` both, ``"skip"`` the new one,
            or ``"kill_previous"``.
        **kwargs: Options of the jobs, as for ``cloud.call``: ``_fast_serialization``, ``_high_cpu``, ``_profile``,
            ``_restartable``, ``_priority``, ``_type``, ``_cores``, ``_max_runtime``, ``_os_env_vars``,
            ``_kill_process``. ``_label`` and ``_depends_on`` are ignored.

    Raises:
        TypeError: ``func`` is not callable, ``label`` is not a non-empty ASCII str, or an option is unknown or has
            a wrong type.
        ValueError: ``func`` requires arguments, or a policy is none of those above.
        InvalidSchedule: The schedule or the zone is not valid, or the schedule can never come true.
        SerializationError: ``func`` cannot become bytes.
    """
    if not callable(func):
        raise TypeError(f"cloud.cron.register first argument ({func!r}) is not callable")
    n_required = _count_required(func)
    if n_required:
        name = getattr(func, "__name__", type(func).__name__)
        raise ValueError(
            f"cron functions must have 0 (required) arguments. {name} requires {n_required}; "
            f"wrap it: lambda: {name if name.isidentifier() else 'func'}(...)"
        )
    unknown = sorted(kwargs.keys() - _RESERVED - _IGNORED)
    if unknown:
        raise TypeError(
            f"cloud.cron.register got unexpected keyword arguments: {', '.join(unknown)}; the function is called "
            f"without arguments, and options are {', '.join(sorted(_RESERVED))}"
        )
    reserved = {name: value for name, value in kwargs.items() if name in _RESERVED}
    _crons().register(func, _checked(label), schedule, reserved=reserved, tz=tz, missed=missed, overlap=overlap)


def deregister(label: str) -> None:
    """Forget a cron. Jobs it started go on.

    Raises:
        CronNotFound: Nothing is registered under the label.
        TypeError: The label is not a non-empty ASCII str.
    """
    _crons().deregister(_checked(label))


def manual_run(label: str) -> int:
    """Run a cron's function once, now, and return the jid; its schedule goes on. Errors as `deregister`."""
    return _crons().manual_run(_checked(label))


def list() -> builtins.list[str]:
    """Return the labels of all crons, sorted."""
    return _crons().list()


def info(label: str) -> dict[str, Any]:
    """Describe a cron.

    Returns:
        ``label``, ``schedule`` and ``tz`` as registered; ``missed`` and ``overlap`` as str; ``func_name`` (and the
        same as ``funcname``, its first name); ``created`` and ``creator_host``; ``last_run`` and ``last_jid``, None
        before the first run; ``next_run``. Times are aware UTC datetimes.

    Raises:
        CronNotFound: Nothing is registered under the label.
        TypeError: The label is not a non-empty ASCII str.
    """
    return _crons().info(_checked(label))


def preview(schedule: str | Sequence[str | int], n: int = 5, tz: str = "UTC") -> builtins.list[datetime]:
    """Return the next ``n`` times a schedule would be due, in order, as aware UTC datetimes. Registers nothing.

    Raises:
        InvalidSchedule: As for `register`.
        TypeError, ValueError: ``n`` is not an int ≥ 0.
    """
    from cloud.resources.schedule import preview as slots

    return slots(schedule, n, tz)


def _crons() -> CronService | RemoteCrons:
    return current.resources().crons


def _checked(label: object) -> str:
    if not isinstance(label, str) or not label or not label.isascii():
        raise TypeError(f"a cron's label must be a non-empty ASCII str, not {label!r}")
    return label


def _count_required(func: Callable[..., Any]) -> int:
    import inspect

    try:
        parameters = inspect.signature(func).parameters.values()
    except ValueError:
        # Some built-in functions have no signature; the first run will tell.
        return 0
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(parameter.default is parameter.empty and parameter.kind not in variadic for parameter in parameters)
