"""`cloud`, in a process that cannot unpickle: a try raises, and is noted in the file ``UNPICKLED``."""

from __future__ import annotations

import _pickle
import marshal
import os
import pickle
import sys
import traceback
from typing import Any, NoReturn

MINE = os.getpid()


def note() -> None:
    with open(os.environ["UNPICKLED"], "a") as file:
        file.write("".join(traceback.format_stack()) + "\n")


def refuse(*args: Any, **options: Any) -> NoReturn:
    note()
    raise RuntimeError("the server unpickles")


class Refused:
    def __init__(self, *args: Any, **options: Any) -> None:
        refuse()


def load_code(data: Any, real: Any = marshal.loads) -> Any:
    # Imports read their compiled modules with it.
    if os.getpid() == MINE and not sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):
        refuse()
    return real(data)


def watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and os.getpid() == MINE:
        refuse()


def main() -> int:
    import cloudpickle

    for module in (pickle, _pickle, cloudpickle, cloudpickle.cloudpickle):
        for name in ("loads", "load", "_loads", "_load"):
            if hasattr(module, name):
                setattr(module, name, refuse)
        for name in ("Unpickler", "_Unpickler"):
            if hasattr(module, name):
                setattr(module, name, Refused)
    marshal.loads = load_code
    sys.addaudithook(watch)
    from cloud.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
