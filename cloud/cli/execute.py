"""``cloud exec``: a command of the shell, or a Python function, as a job."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from cloud import current
from cloud.cli.arguments import Commands, load_function, parse_json
from cloud.cli.output import OK, Output, UsageError
from cloud.cli.streams import Streams, terminal
from cloud.errors import CloudException

__all__ = ["add_to", "run_command", "show_printed"]

_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126
_BY_SIGNAL: Final = 128
_TERMINATE_S: Final = 0.3


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = commands.add(
        "exec",
        _exec,
        "run a command, or a Python function, as a job and wait for it",
        usage="cloud exec [options] -- COMMAND ARGS...\n"
        "       cloud exec [options] --function MODULE:FUNCTION [JSON]...",
        epilog="A single word, such as 'ls | wc -l', is a line for the shell; several are a program and its "
        "arguments. The command's exit code is that of cloud exec. Ctrl-C kills the job.",
    )
    parser.add_argument("--label", metavar="TEXT", help="label of the job")
    parser.add_argument("--cores", type=int, metavar="N", help="worker slots that it takes")
    parser.add_argument("--max-runtime", type=float, metavar="MINUTES", help="kill it after this time")
    parser.add_argument("--function", metavar="MODULE:FUNCTION", help="call this, with arguments written as JSON")
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)


def _exec(options: argparse.Namespace, output: Output) -> int:
    reserved = {"_label": options.label, "_cores": options.cores, "_max_runtime": options.max_runtime}
    given = {name: value for name, value in reserved.items() if value is not None}
    if options.function is not None:
        arguments = [parse_json(text) for text in options.command]
        return _exec_function(load_function(options.function), arguments, given, output)
    if not options.command:
        raise UsageError("no command was given: write cloud exec -- COMMAND ARGS..., or --function MODULE:FUNCTION")
    return _exec_command(options.command, given, output)


def _exec_function(function: Callable[..., Any], arguments: list[Any], reserved: dict[str, Any], output: Output) -> int:
    cloud = current.cloud()
    jid = cloud.call(function, *arguments, **reserved)
    try:
        value = cloud.result(jid)
    except KeyboardInterrupt:
        cloud.kill(jid)
        raise
    except CloudException:
        show_printed(cloud.info(jid, ("stdout", "stderr"))[jid], output)
        raise
    facts = cloud.info(jid, ("stdout", "stderr", "runtime"))[jid]
    show_printed(facts, output)
    output.show({"jid": jid, "result": value, **facts}, repr(value))
    return OK


def show_printed(facts: dict[str, Any], output: Output) -> None:
    """Print what a job printed, unless a document is to be all that is printed."""
    if not output.as_json:
        terminal("stdout")(facts["stdout"].encode("utf-8", "replace"))
        terminal("stderr")(facts["stderr"].encode("utf-8", "replace"))


def _exec_command(command: list[str], reserved: dict[str, Any], output: Output) -> int:
    cloud = current.cloud()
    kept: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    sinks = [kept[name].extend if output.as_json else terminal(name) for name in kept]
    with Streams() as streams:
        # Not restartable: a command may have done half of its work when its worker is lost.
        jid = cloud.call(run_command, command, *streams.paths, _restartable=False, **reserved)
        call_off = cloud.backend.when_final((jid,), streams.end)
        try:
            streams.copy(*sinks)
        except KeyboardInterrupt:
            cloud.kill(jid)
            streams.copy(*sinks)  # what the command had to say about that
            raise
        except OSError:
            cloud.kill(jid)  # nobody reads our output any more
            raise
        finally:
            call_off()
        code: int = cloud.result(jid)
    texts = {name: content.decode("utf-8", "replace") for name, content in kept.items()}
    runtime_s = cloud.info(jid, "runtime")[jid]["runtime"]
    output.show({"jid": jid, "exit_code": code, **texts, "runtime": runtime_s}, "")
    return code


def run_command(command: list[str], out_path: str, err_path: str) -> int:
    """Run a command and return its exit code as a shell would: 127 not found, 126 not executable, 128 + signal.

    Runs inside the job.

    Args:
        command: One word is a line for the shell; several are a program and its arguments.
        out_path, err_path: Pipes for its output; see ``Streams``.
    """
    with open(out_path, "wb", buffering=0) as out, open(err_path, "wb", buffering=0) as err:
        words = ["/bin/sh", "-c", command[0]] if len(command) == 1 else command
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        except OSError as exc:
            err.write(f"cloud: {words[0]}: {exc.strerror}\n".encode("utf-8", "replace"))
            return _NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_EXECUTABLE
        try:
            code = process.wait()
        finally:
            _end(process)
    return code if code >= 0 else _BY_SIGNAL - code


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_S)
            return
        process.kill()
        process.wait()
