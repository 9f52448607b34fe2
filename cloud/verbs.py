"""The functions of ``cloud`` that choose where jobs go, and tell where that is."""

from __future__ import annotations

from typing import Any

from cloud.configuration import home_folder
from cloud.current import process

__all__ = ["getconfigpath", "is_simulated", "running_on_cloud", "setkey", "start_simulator"]


def setkey(
    api_key: Any,
    api_secretkey: str | None = None,
    server_url: str | None = None,
    restart: bool = False,
    immutable: bool = False,
) -> None:
    """Send jobs to a server from now on, with this key. Leaves the simulator. Opens no connection yet.

    Args:
        api_key: Number of the key.
        api_secretkey: Its secret.
        server_url: Where the server is; None takes it from the settings.
        restart: Open anew even if nothing changed.
        immutable: Ignore all later ``setkey`` and ``start_simulator`` calls of this process.

    Raises:
        TypeError: ``api_key`` is neither a number nor text.

    Source: PiCloud client 2.1.1-2.8.5.
    """
    if isinstance(api_key, bool) or not isinstance(api_key, int | str):
        raise TypeError(f"api_key must be the number of a key, not {api_key!r}")
    process.setkey(api_key, api_secretkey, server_url, restart=restart, immutable=immutable)


def start_simulator(
    force_restart: bool = False,
    *,
    seed: int | None = None,
    fail: float = 0.0,
    lose_worker: float = 0.0,
    num_procs: int | None = None,
) -> None:
    """Run jobs of ``cloud`` in a simulation from now on: in this process, one at a time, on a virtual clock.

    Args:
        force_restart: Begin a new simulation, without the jobs of the present one.
        seed: Makes injected failures and the order of equal events reproducible.
        fail: Probability that an attempt at a job fails with an injected error.
        lose_worker: Probability that an attempt loses its worker in the middle.
        num_procs: Simulated worker slots; default: the setting ``num_procs``.

    Raises:
        ValueError: A probability is not between 0 and 1.

    Source: PiCloud client 2.1.1; failures and virtual time are new.
    """
    for name, value in (("fail", fail), ("lose_worker", lose_worker)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be a probability between 0 and 1, not {value!r}")
    given = {"seed": seed, "fail": fail, "lose_worker": lose_worker, "num_procs": num_procs}
    options = {name: value for name, value in given.items() if value not in (None, 0.0)}
    process.start_simulator(force_restart=force_restart, options=options)


def is_simulated() -> bool:
    """True when jobs of ``cloud`` run on this machine: by ``cloud.mp``'s workers, or in the simulator."""
    return process.is_simulated()


def running_on_cloud() -> bool:
    """True inside a job that a server runs; False everywhere else, in local and simulated jobs too."""
    return process.is_on_server()


def getconfigpath() -> str:
    """The folder of ``cloudconf.py`` and of local data: ``CLOUD_HOME`` or ``~/.cloud``. It may not exist."""
    return home_folder()
