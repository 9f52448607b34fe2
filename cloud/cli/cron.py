"""``cloud cron``: functions that are called by a schedule, and the process that calls them."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud import cron, current
from cloud.cli.arguments import Commands, load_function
from cloud.cli.execute import show_printed
from cloud.cli.output import FAILED, OK, Output, table
from cloud.client.later import submit_pickled
from cloud.jobs import DONE, STATUS_LABELS

if TYPE_CHECKING:
    from cloud.resources.crons import CronEntry, CronRunner

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    group = commands.add("cron", None, "register functions to be called by a schedule, and call them")
    actions = group.add_commands("ACTION")
    actions.add("list", _list, "list what is registered")

    parser = actions.add("info", _info, "describe a cron")
    parser.add_argument("label", metavar="LABEL", help="its name")

    parser = actions.add("register", _register, "call a function by a schedule from now on")
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="takes no arguments")
    parser.add_argument("label", metavar="LABEL", help="name of the cron; one that has it is replaced")
    parser.add_argument("schedule", metavar="SCHEDULE", help="'min hour day mon dow', such as '30 2 * * mon-fri'")
    _add_tz(parser)
    parser.add_argument("--missed", default="run_once", metavar="POLICY", help="skip, run_once (default) or run_all")
    parser.add_argument("--overlap", default="skip", metavar="POLICY", help="allow, skip (default) or kill_previous")

    parser = actions.add("deregister", _deregister, "forget a cron")
    parser.add_argument("label", metavar="LABEL", help="its name")

    parser = actions.add("run-now", _run_now, "call a cron's function once, now, and wait for it")
    parser.add_argument("label", metavar="LABEL", help="its name")

    parser = actions.add("preview", _preview, "print the next times of a schedule, in UTC")
    parser.add_argument("schedule", metavar="SCHEDULE", help="'min hour day mon dow'")
    parser.add_argument("-n", type=int, default=5, metavar="N", help="how many; default: 5")
    _add_tz(parser)

    parser = actions.add("run", _run, "fire what is registered, until SIGINT (Ctrl-C) or SIGTERM ends it")
    parser.add_argument("--once", action="store_true", help="fire what is due now, wait for these jobs, and end")


def _add_tz(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tz", default="UTC", metavar="ZONE", help="zone of the clock it means, such as Europe/Berlin")


def _list(options: argparse.Namespace, output: Output) -> int:
    found = [cron.info(label) for label in cron.list()]
    rows = [("label", "schedule", "zone", "function", "next run")]
    rows += [(row["label"], row["schedule"], row["tz"], row["func_name"], _moment(row["next_run"])) for row in found]
    output.show(found, table(rows) if found else "")
    return OK


def _info(options: argparse.Namespace, output: Output) -> int:
    facts = cron.info(options.label)
    del facts["funcname"]  # func_name, under the name that it had at first
    rows = [(f"{key}:", _moment(value) if isinstance(value, datetime) else value) for key, value in facts.items()]
    output.show(facts, table(rows))
    return OK


def _register(options: argparse.Namespace, output: Output) -> int:
    function = load_function(options.function)
    cron.register(
        function, options.label, options.schedule, tz=options.tz, missed=options.missed, overlap=options.overlap
    )
    output.show(cron.info(options.label), "")
    return OK


def _deregister(options: argparse.Namespace, output: Output) -> int:
    cron.deregister(options.label)
    output.show({"label": options.label}, "")
    return OK


def _run_now(options: argparse.Namespace, output: Output) -> int:
    jid = cron.manual_run(options.label)
    cloud = current.cloud()
    try:
        cloud.join(jid)
    finally:
        facts = cloud.info(jid)[jid]
        show_printed(facts, output)
    output.show({"label": options.label, "jid": jid, **facts}, "")
    return OK


def _preview(options: argparse.Namespace, output: Output) -> int:
    times = cron.preview(options.schedule, options.n, options.tz)
    output.show(times, "\n".join(map(_moment, times)))
    return OK


def _run(options: argparse.Namespace, output: Output) -> int:
    # Opened first: a configuration that cannot run jobs is an error now, not at the first slot.
    current.cloud().connection_info()
    return _fire_once(output) if options.once else _fire(output)


def _fire_once(output: Output) -> int:
    runner = _runner(_submit)
    try:
        fired = runner.fire_due(current.resources().cron_store.clock())
        current.cloud().join([firing.jid for firing in fired], ignore_errors=True)
    finally:
        runner.close()
    ends = [_end_of(firing.label, firing.jid) for firing in fired]
    output.show(
        [{"slot": firing.slot, **end._asdict()} for firing, end in zip(fired, ends, strict=True)],
        "\n".join(map(_line, ends)),
    )
    return OK if all(end.exception is None for end in ends) else FAILED


class _Event(NamedTuple):
    """A job of a cron began or ended."""

    label: str
    jid: int
    what: str
    exception: str | None = None


def _fire(output: Output) -> int:
    """Fire slots as they fall due; the main thread tells what happens, since only there a signal is noticed at once."""
    cloud = current.cloud()
    happened: SimpleQueue[_Event | Exception | None] = SimpleQueue()
    stop = threading.Event()
    running: set[int] = set()

    def submit(entry: CronEntry) -> int:
        jid = _submit(entry)
        happened.put(_Event(entry.label, jid, "started"))
        cloud.backend.on_each_final(
            (jid,), lambda first, n, status: happened.put(_Event(entry.label, jid, STATUS_LABELS[status]))
        )
        return jid

    def serve() -> None:
        try:
            _runner(submit).run(stop)
        except Exception as exc:  # noqa: BLE001 - raised again in the main thread
            happened.put(exc)

    thread = threading.Thread(target=serve, name="cloud-cron", daemon=True)
    with _on_signal(lambda: happened.put(None)):
        thread.start()
        if not output.as_json:
            output.warn(f"firing the crons of {current.resources().home} until Ctrl-C or SIGTERM")
        try:
            while (event := happened.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                _tell(event, running, output)
        finally:
            stop.set()
            thread.join()
            _tell_rest(happened, running, output)
            cloud.kill(sorted(running))
            _tell_rest(happened, running, output)
    return OK


def _tell_rest(happened: SimpleQueue[_Event | Exception | None], running: set[int], output: Output) -> None:
    while not happened.empty():
        event = happened.get()
        if isinstance(event, _Event):
            _tell(event, running, output)


def _tell(event: _Event, running: set[int], output: Output) -> None:
    if event.jid in running:
        event = _end_of(event.label, event.jid)
        running.discard(event.jid)
        # This process may run for years: what is told is forgotten.
        current.cloud().delete(event.jid)
    else:
        running.add(event.jid)
    moment = datetime.now(UTC)
    output.show({"time": moment, **event._asdict()}, f"{moment:%Y-%m-%dT%H:%M:%SZ} {_line(event)}")


def _end_of(label: str, jid: int) -> _Event:
    facts = current.cloud().info(jid, ("status", "exception"))[jid]
    return _Event(label, jid, facts["status"], facts["exception"])


def _line(event: _Event) -> str:
    why = "" if event.exception is None else f": {event.exception.strip().splitlines()[-1]}"
    return f"{event.label}: job {event.jid} {event.what}{why}"


def _submit(entry: CronEntry) -> int:
    return submit_pickled(current.cloud(), entry.payload, entry.options, label=entry.label)


def _runner(submit: Callable[[CronEntry], int]) -> CronRunner:
    from cloud.resources.crons import CronRunner

    cloud = current.cloud()
    store = current.resources().cron_store

    def is_finished(jid: int) -> bool:
        return cloud.backend.statuses((jid,))[0] >= DONE

    return CronRunner(store, submit, is_finished, store.clock, kill=cloud.kill)


@contextmanager
def _on_signal(action: Callable[[], object]) -> Iterator[None]:
    """Have SIGINT and SIGTERM do this instead, where a program may say so: in its main thread."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: action())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _moment(value: datetime | None) -> str:
    return "never" if value is None else f"{value:%Y-%m-%d %H:%M} UTC"
