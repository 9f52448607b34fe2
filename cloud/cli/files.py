"""``cloud files``: the named files that programs and jobs share."""

from __future__ import annotations

import argparse
import os
import sys

from cloud import files
from cloud.cli.arguments import Commands
from cloud.cli.output import FAILED, OK, Output, UsageError
from cloud.cli.streams import terminal

__all__ = ["add_to"]

_CHUNK_BYTES = 1 << 20


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    group = commands.add("files", None, "store, fetch and list files").add_commands("ACTION")

    parser = group.add("put", _put, "store a file")
    parser.add_argument("path", metavar="PATH", help="file to store; - is standard input")
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="name to store it under; default: the last part of PATH"
    )

    parser = group.add("get", _get, "fetch a file")
    parser.add_argument("name", metavar="NAME", help="its name")
    parser.add_argument("path", metavar="PATH", nargs="?", help="where to; default: NAME, here; - is standard output")

    parser = group.add("list", _list, "list names")
    parser.add_argument("prefix", metavar="PREFIX", nargs="?", default="", help="only those that begin so")

    parser = group.add("delete", _delete, "delete files")
    parser.add_argument("names", metavar="NAME", nargs="+", help="their names")

    parser = group.add("exists", _exists, "tell whether there is a file; exits with 1 if not")
    parser.add_argument("name", metavar="NAME", help="its name")

    parser = group.add("md5", _md5, "print a file's MD5")
    parser.add_argument("name", metavar="NAME", help="its name")


def _put(options: argparse.Namespace, output: Output) -> int:
    name = options.name
    if options.path == "-":
        if name is None:
            raise UsageError("what comes from standard input has no name: write cloud files put - NAME")
        # A copy of the descriptor: putf closes what it has read.
        files.putf(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), name)
    else:
        name = os.path.basename(options.path) if name is None else name
        files.put(options.path, name)
    output.show({"name": name, "md5": files.get_md5(name)}, "")
    return OK


def _get(options: argparse.Namespace, output: Output) -> int:
    if options.path == "-":
        if output.as_json:
            raise UsageError("a file on standard output is no JSON: leave --json out, or give a path")
        write = terminal("stdout")
        with files.getf(options.name) as file:
            while content := file.read(_CHUNK_BYTES):
                write(content)
        return OK
    files.get(options.name, options.path)
    output.show({"name": options.name, "path": options.path or os.path.basename(options.name)}, "")
    return OK


def _list(options: argparse.Namespace, output: Output) -> int:
    names = files.list(options.prefix)
    output.show(names, "\n".join(names))
    return OK


def _delete(options: argparse.Namespace, output: Output) -> int:
    missing = [name for name in options.names if not files.delete(name)]
    deleted = [name for name in options.names if name not in missing]
    output.show({"deleted": deleted, "missing": missing}, "")
    if missing and not output.as_json:
        output.warn(f"no stored file is called {', '.join(map(repr, missing))}")
    return FAILED if missing else OK


def _exists(options: argparse.Namespace, output: Output) -> int:
    found = files.exists(options.name)
    output.show({"name": options.name, "exists": found}, "yes" if found else "no")
    return OK if found else FAILED


def _md5(options: argparse.Namespace, output: Output) -> int:
    md5 = files.get_md5(options.name)
    output.show({"name": options.name, "md5": md5}, md5)
    return OK
