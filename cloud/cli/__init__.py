"""The command ``cloud``, and ``python -m cloud``: what can be done with this package from a shell.

Each group of commands has a module: it adds its parsers, and says for each which function runs it. What they do goes
through the same faces that programs use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cloud.cli import account, admin, config, cron, execute, files, jobs, logs, serve, top
from cloud.cli.arguments import Parser, split_command
from cloud.cli.output import INTERRUPTED, OK, Output, UsageError

__all__ = ["main"]

_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended

_EPILOG = "exit codes: 0 done; 1 a job failed, or it cannot be done; 2 wrong usage or configuration; 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; raises nothing but what ends the process.

    Called inside a program, it works on that program's jobs: ``cloud.cli.main(["status", "1-4"])``.

    Args:
        argv: The words after ``cloud``; None takes those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words, command = split_command(words)
    output = Output(as_json="--json" in words, debug="--debug" in words)
    try:
        parser = _parser()
        options, unknown = parser.parse_known_args(words)
        if unknown:
            remedy = (
                "write -- before a command with options"
                if getattr(options, "verb", "") == "exec"
                else "see 'cloud --help'"
            )
            raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; {remedy}")
        if "run" not in options:
            raise UsageError("no command was given; see 'cloud --help'")
        if command is not None:
            options.command += command
        options.in_shell = argv is None
        code = int(options.run(options, output))
        output.flush()
        return code
    except SystemExit as exc:  # argparse, after --help and --version
        return exc.code if isinstance(exc.code, int) else OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE
    except Exception as exc:  # noqa: BLE001 - the last resort: one line, and the traceback with --debug
        return output.fail(exc)


def _parser() -> Parser:
    from cloud import __version__

    parser = Parser(
        prog="cloud", description="Run jobs, and look after files, crons, keys and settings.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"cloud {__version__}")
    commands = parser.add_commands("COMMAND")
    for group in (execute, jobs, logs, top, files, cron, config, account, serve, admin):
        group.add_to(commands)
    return parser
