"""``cloud config``: the settings, and the file that holds them."""

from __future__ import annotations

import argparse
import io
import os

from cloud import current
from cloud.cli.arguments import Commands
from cloud.cli.output import OK, Output, UsageError
from cloud.configuration import FILE_NAME, home_path

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    group = commands.add("config", None, "show and write the settings").add_commands("ACTION")
    group.add("show", _show, "print every setting, its value and where that comes from")
    parser = group.add("write", _write, "write the settings as an annotated cloudconf.py")
    parser.add_argument(
        "path", metavar="PATH", nargs="?", help="file to write; default: what 'cloud config path' prints"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    group.add("path", _path, "print where cloudconf.py is looked for")


def _show(options: argparse.Namespace, output: Output) -> int:
    config = current.process.config
    text = io.StringIO()
    config.show(text)
    output.show(config.describe(), text.getvalue().rstrip("\n"))
    return OK


def _write(options: argparse.Namespace, output: Output) -> int:
    path = options.path or home_path(FILE_NAME)
    if os.path.lexists(path) and not options.force:
        raise UsageError(f"{path} exists: --force replaces it, and with it expressions and remarks of yours")
    written = current.process.config.write(options.path)
    output.show({"path": written}, written)
    return OK


def _path(options: argparse.Namespace, output: Output) -> int:
    path = home_path(FILE_NAME)
    output.show({"path": path, "exists": os.path.exists(path)}, path)
    return OK
