"""The directions of the arrows: who may import whom."""

from __future__ import annotations

import graphlib
from collections.abc import Sequence

import pytest

from tests.architecture.modules import PACKAGE, Module, is_below, own_imports, own_modules

# From the ground up. A room may import its own floor and the floors below, never one above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cloud.errors",),
    (
        "cloud.jobs",
        "cloud.environment",
        "cloud.serialization",
        "cloud.settings",
        "cloud.configuration",
        "cloud.logs",
        "cloud.datalogs",
    ),
    ("cloud.engine", "cloud.resources"),
    ("cloud.wire",),
    ("cloud.backends",),
    ("cloud.client", "cloud.current"),
    ("cloud",),  # the faces: everything that is not named elsewhere
    ("cloud.server", "cloud.cli", "cloud.__main__"),
)

WORDS = (*FLOORS[0], *FLOORS[1])

CHANNEL = (
    "cloud.engine.channel",
    "cloud.engine.stream",
    "cloud.engine.ring",
    "cloud.engine.descriptors",
    "cloud.engine.passing",
    "cloud.engine.signals",
)

# Within a floor: what a room may import besides itself and the words.
ALSO: dict[str, tuple[str, ...]] = {
    "cloud.resources": (),
    "cloud.engine.clock": (),
    "cloud.engine.channel": (),
    "cloud.engine.descriptors": (),
    "cloud.engine.passing": (),
    "cloud.engine.signals": (),
    "cloud.engine.stream": ("cloud.engine.channel", "cloud.engine.descriptors", "cloud.engine.passing"),
    "cloud.engine.ring": ("cloud.engine.channel",),
    "cloud.engine.store": ("cloud.engine.clock",),
    "cloud.engine.worker": CHANNEL,
    # The store's records, not its stores: an attempt is a part of a batch.
    "cloud.engine.executor": (
        *CHANNEL,
        "cloud.engine.clock",
        "cloud.engine.store.base",
        "cloud.engine.worker",
    ),
}

# Between the client and the worker a job is opaque bytes: of the room that pickles only what reads none of them.
# The client over HTTP, `cloud.backends.http`, is one of the two ends.
READS_NOTHING = tuple(f"cloud.serialization.{name}" for name in ("functions", "manifest", "memory", "plain", "shared"))
NEVER_UNPICKLE = (
    "cloud.engine.engine",
    "cloud.engine.store",
    "cloud.resources",
    "cloud.wire",
    "cloud.backends.requests",
    "cloud.server",
)

# The registries: they import what imports them, at the moment it is chosen.
REGISTRIES = ("cloud", "cloud.current", "cloud.backends")


def floor(name: str) -> int:
    """The number of the floor a module is on; the most exact room decides."""
    rooms = [(len(room), number) for number, rooms in enumerate(FLOORS) for room in rooms if is_below(name, room)]
    return max(rooms)[1]


def upward(modules: Sequence[Module]) -> list[str]:
    known = frozenset(module.name for module in modules)
    return [
        f"{module.at(item.line)} imports {target}, which stands above it"
        for module in modules
        for item, target in own_imports(module, known)
        if floor(target) > floor(module.name)
    ]


def across(modules: Sequence[Module]) -> list[str]:
    known = frozenset(module.name for module in modules)
    return [
        f"{module.at(item.line)} imports {target}; besides the words, {room} may import only {(room, *also)}"
        for module in modules
        for room, also in ALSO.items()
        if module.is_in(room)
        for item, target in own_imports(module, known)
        if not any(is_below(target, allowed) for allowed in (room, *also, *WORDS))
    ]


def cycle(modules: Sequence[Module]) -> list[str]:
    """The modules of one import cycle, or nothing.

    An import inside a function loads its module when it is needed; only in a registry may it also close a cycle.
    What is imported for its types closes none.
    """
    known = frozenset(module.name for module in modules)
    graph = {
        module.name: {
            target
            for item, target in own_imports(module, known)
            if target != module.name and not item.typing_only and not (item.in_function and module.name in REGISTRIES)
        }
        for module in modules
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as exc:
        return list(exc.args[1])
    return []


def test_no_arrow_points_up() -> None:
    assert upward(own_modules()) == []


def test_rooms_of_one_floor_stay_apart() -> None:
    assert across(own_modules()) == []


def test_no_import_cycle() -> None:
    assert cycle(own_modules()) == []


def test_what_lies_between_the_two_ends_never_unpickles() -> None:
    known = frozenset(module.name for module in own_modules())
    assert [
        f"{module.at(item.line)} imports {target}"
        for module in own_modules()
        if module.is_in(*NEVER_UNPICKLE)
        for item, target in own_imports(module, known)
        if is_below(target, "cloud.serialization") and target not in READS_NOTHING
    ] == []


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder.relative_to(PACKAGE)) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("check", "name", "source"),
    [
        (upward, "cloud.jobs", "from cloud import client"),
        (upward, "cloud.jobs", "from ..cloud.client import Cloud"),
        (upward, "cloud.jobs", "def f():\n    import cloud.client"),
        (upward, "cloud.client", "from cloud import call"),
        (upward, "cloud.client", "if TYPE_CHECKING:\n    from cloud.cli import main"),
        (across, "cloud.engine.store.memory", "from cloud.engine.executor import Executor"),
        (across, "cloud.engine.worker.main", "from .. import engine"),
        (cycle, "cloud.jobs", "def f():\n    from cloud.serialization import loads"),
        (cycle, "cloud.jobs", "from cloud.serialization import loads"),
    ],
)
def test_the_checks_can_fail(check: object, name: str, source: str) -> None:
    package = [
        Module.parse("cloud", "", is_package=True),
        *(Module.parse(f"cloud.{room}", "") for room in ("client", "cli", "engine.engine", "engine.executor")),
        Module.parse("cloud.engine", "", is_package=True),
        Module.parse("cloud.serialization", "import cloud.jobs"),
        Module.parse("cloud.jobs", ""),
    ]
    good = [module for module in package if module.name != name]
    assert check([*good, Module.parse(name, "")]) == []
    assert check([*good, Module.parse(name, source)]) != []
