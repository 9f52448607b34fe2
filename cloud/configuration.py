"""Where settings come from: the home folder, ``cloudconf.py``, the environment, and `CloudConfig` (``cloud.config``).

::

    default < cloudconf.py < environment CLOUD_<SETTING> < cloud.config, committed < argument
    └──────────── load_settings() ─────────────┘           CloudConfig.commit()     Settings.replace()

Nothing is read before the first use of a setting and nothing is written unless asked. What settings exist is the
business of `cloud.settings`. The first ``cloud.call`` of every program loads this module: it imports `os` and `sys`
alone, and everything that only errors, ``show`` and ``write`` need is imported there.
"""

from __future__ import annotations

import os
import sys

from cloud.settings import SETTINGS, Setting, Settings, SettingsTable, unknown_setting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, NoReturn, TextIO

__all__ = ["CloudConfig", "Settings", "ensure_home", "home_folder", "home_path", "load_settings", "usable_cores"]

FILE_NAME = "cloudconf.py"
ENVIRONMENT_PREFIX = "CLOUD_"

_INTRODUCTION = '''"""Configuration of the cloud package.

Keep this file as ~/.cloud/cloudconf.py, or in the folder that the environment variable CLOUD_HOME names. It is
Python: values may be expressions. Names of your own begin with an underscore. A setting that is not here has its
default. An environment variable CLOUD_<SETTING>, such as CLOUD_NUM_PROCS, takes precedence over this file, and what
a program commits with cloud.config.commit() or passes as an argument over both.
"""
'''


def home_folder() -> str:
    """Give the absolute path of the folder for configuration and data: ``CLOUD_HOME`` or ``~/.cloud``.

    It may not exist: nothing is created.

    Raises:
        ConfigurationError: This user has no home directory and ``CLOUD_HOME`` is not set.
    """
    home = os.path.expanduser(os.environ.get("CLOUD_HOME") or os.path.join("~", ".cloud"))
    if home.startswith("~"):
        _fail([f"There is no home directory for {home!r}: set CLOUD_HOME to a folder."])
    return os.path.abspath(home)


def ensure_home() -> str:
    """Give `home_folder`, created if needed, then readable by its owner alone.

    Raises:
        ConfigurationError: It cannot be created.
    """
    home = home_folder()
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
    except OSError as exc:
        _fail([f"The folder {home!r} cannot be created ({exc.strerror}): set CLOUD_HOME to one that can."], exc)
    return home


def home_path(path: str) -> str:
    """Give the absolute path a setting such as ``log_filename`` means: relative ones start at the home folder."""
    return os.path.join(home_folder(), os.path.expanduser(path))


def usable_cores() -> int:
    """Count the cores this process may run on, at least 1: what ``num_procs = 0`` stands for.

    Follows the CPU affinity where the system has one (``taskset``, most batch systems, cpusets of containers).
    """
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def load_settings() -> Settings:
    """Read the defaults, ``cloudconf.py`` in the home folder, and the environment, in this order.

    Raises:
        ConfigurationError: The file or a variable is not acceptable; lists every problem of both.
    """
    problems: list[str] = []
    settings = _read_environment(_read_file(Settings(), problems), problems)
    if problems:
        _fail(problems)
    return settings


def _fail(problems: list[str], cause: BaseException | None = None) -> NoReturn:
    from cloud.errors import ConfigurationError

    raise ConfigurationError(problems) from cause


def _read_environment(settings: Settings, problems: list[str]) -> Settings:
    found = {}
    for name, entry in SETTINGS.items():
        value = os.environ.get(ENVIRONMENT_PREFIX + name.upper())
        # An empty variable is a value for text; for the others it can only mean "not set".
        if value or (value is not None and entry.kind.startswith("str")):
            found[name] = value
    if not found:
        return settings

    def origin(name: str) -> str:
        return f"environment {ENVIRONMENT_PREFIX}{name.upper()}"

    return settings.overlay(found, origin, problems, lambda name: f"{origin(name)}: ")


def _read_file(settings: Settings, problems: list[str]) -> Settings:
    if not os.environ.get("CLOUD_HOME") and os.path.expanduser("~") == "~":
        # Users without a home directory exist (bare containers); they have no file and need none.
        return settings
    path = home_path(FILE_NAME)
    try:
        with open(path, "rb") as file:
            source = file.read()
    except FileNotFoundError:
        return settings
    except OSError as exc:
        problems.append(f"{path}: cannot be read ({exc.strerror}); correct its permissions, or set CLOUD_HOME.")
        return settings

    namespace: dict[str, Any] = {"__name__": "cloudconf", "__file__": path}
    try:
        # From bytes, so that coding cookies and byte order marks are honoured.
        exec(compile(source, path, "exec", dont_inherit=True), namespace)  # noqa: S102 - the user's own file
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - whatever the file raises is its problem to report
        problems.append(f"{path}{_line_of_error(exc, path)}: {_text_of_error(exc)}")
        return settings

    def place(name: str) -> str:
        return f"{path}{_line_of_name(name, source)}: "

    found = _assigned(namespace)
    for name in [name for name in found if name not in SETTINGS]:
        del found[name]
        problems.append(place(name) + unknown_setting(name, "Names of your own begin with an underscore."))
    return settings.overlay(found, lambda name: f"{FILE_NAME} ({path})", problems, place)


def _assigned(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what the file means as settings: modules, functions and classes under other names are its tools."""
    return {
        name: value
        for name, value in namespace.items()
        if name in SETTINGS or not (name.startswith("_") or callable(value) or isinstance(value, type(sys)))
    }


def _line_of_error(exc: BaseException, path: str) -> str:
    line = exc.lineno if isinstance(exc, SyntaxError) and exc.filename == path else None
    traceback = exc.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line}" if line else ""


def _text_of_error(exc: BaseException) -> str:
    # str() of a SyntaxError would repeat file and line.
    return f"{type(exc).__name__}: {exc.msg if isinstance(exc, SyntaxError) else exc}"


def _line_of_name(name: str, source: bytes) -> str:
    import ast

    lines = [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
    ]
    return f", line {max(lines)}" if lines else ""


class CloudConfig(SettingsTable):
    """The configuration of this program: read and assign settings as attributes, then `commit`.

    An assignment makes a draft; nothing changes before `commit`. ``help(cloud.config)`` describes every setting.
    Threads may share it; a commit is one step.

    Args:
        on_commit: Called with the new settings by each successful `commit`, in the committing thread.

    Example:
        >>> config = CloudConfig(on_commit=lambda settings: None)
        >>> config.num_procs = "4"
        >>> config.commit()
        >>> config.settings.num_procs, config.settings.origin("num_procs")
        (4, 'commit')

    Source: PiCloud ``cloud.config``.
    """

    def __init__(self, on_commit: Callable[[Settings], None]) -> None:
        self._on_commit = on_commit
        self._draft: dict[str, Any] = {}

    @property
    def settings(self) -> Settings:
        """The settings in force; loads them when first read.

        Raises:
            ConfigurationError: See `load_settings`. The next use tries again.
        """
        loaded: Settings | None = self.__dict__.get("_settings")
        if loaded is None:
            # No lock, so none that a fork could leave held in the child. Threads that race here
            # may each load; setdefault is atomic and keeps one result for all of them.
            loaded = self.__dict__.setdefault("_settings", load_settings())
        return loaded

    def _read(self, entry: Setting) -> Any:
        try:
            return self._draft[entry.name]
        except KeyError:
            return getattr(self.settings, entry.name)

    def _assign(self, entry: Setting, value: Any) -> None:
        try:
            self._draft[entry.name] = entry.convert(value)
        except ValueError as exc:
            from cloud.errors import ConfigurationError

            error = ConfigurationError(str(exc))
            error.add_note(f"The value was {entry.shown(value)!r}.")
            raise error from None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(unknown_setting(name) if not name.startswith("_") else name, name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        # A misspelt setting must not become an attribute that nothing reads.
        if name not in SETTINGS and not name.startswith("_"):
            raise AttributeError(unknown_setting(name), name=name, obj=self)
        super().__setattr__(name, value)

    def commit(self) -> None:
        """Put the draft into force for this program, and restart the active clouds; ``cloudconf.py`` stays as it is.

        Raises:
            ConfigurationError: A value is not acceptable; lists every problem, and nothing was changed.
        """
        changes = dict(self._draft)
        settings = self._checked(changes)
        self._settings = settings
        for name, value in changes.items():
            # What another thread assigned meanwhile stays a draft.
            if self._draft.get(name) is value:
                self._draft.pop(name, None)
        self._on_commit(settings)

    def _checked(self, changes: Mapping[str, Any]) -> Settings:
        problems: list[str] = []
        settings = self.settings.overlay(changes, lambda name: "commit", problems)
        if problems:
            _fail(problems)
        return settings

    def describe(self) -> list[dict[str, Any]]:
        """List all settings, N dicts in the order of the table, with what reading the attribute would give.

        Returns:
            Dicts with ``name``, ``section``, ``value`` (secrets as asterisks), ``default``, ``doc``, and ``origin``:
            that of `Settings.origin`, or ``'draft'`` for a value that was assigned and not yet committed.
        """
        return [
            {
                "name": name,
                "section": entry.section,
                "value": entry.shown(self._read(entry)),
                "default": entry.default,
                "origin": "draft" if name in self._draft else self.settings.origin(name),
                "doc": entry.doc,
            }
            for name, entry in SETTINGS.items()
        ]

    def show(self, file: TextIO | None = None) -> None:
        """Print every setting with its value and origin, secrets masked, to ``file`` or ``sys.stdout``."""
        rows = [(row["section"], row["name"], repr(row["value"]), row["origin"]) for row in self.describe()]
        widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
        lines: list[str] = []
        heading = ""
        for section, name, value, origin in rows:
            if section != heading:
                lines += [""] * bool(lines) + [section]
                heading = section
            lines.append(f"    {name:{widths[0]}}  {value:{widths[1]}}  {origin}")
        (file or sys.stdout).write("\n".join(lines) + "\n")

    def write(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the current values, draft included, as an annotated ``cloudconf.py``, and give its path.

        The file is replaced in one step and readable by its owner alone, since it holds ``api_secretkey``. Expressions
        and remarks of an older file are lost. Blocks for the disk.

        Args:
            path: File to write; by default ``cloudconf.py`` in the home folder, which is created if needed.

        Raises:
            ConfigurationError: A value is not acceptable, or the home folder cannot be created; nothing was written.
            OSError: The file cannot be written; an older one is intact.
        """
        text = "\n".join(_annotated(self._checked(dict(self._draft))))
        # Resolved first: replacing must not turn a link into a file of its own.
        target = os.path.realpath(os.path.join(ensure_home(), FILE_NAME) if path is None else path)
        _replace_file(target, text.encode())
        return target


def _annotated(settings: Settings) -> Iterator[str]:
    from textwrap import wrap

    yield _INTRODUCTION
    heading = ""
    for name, entry in SETTINGS.items():
        if entry.section != heading:
            heading = entry.section
            yield f'"""{heading}"""\n'
        yield from wrap(entry.doc, 118, initial_indent="# ", subsequent_indent="# ")
        yield f"{name} = {_literal(getattr(settings, name))}\n"


def _literal(value: object) -> str:
    text = repr(value)
    # Double quotes, as formatters want them; repr takes single ones only when nothing inside needs care.
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text


def _replace_file(path: str, content: bytes) -> None:
    from tempfile import mkstemp

    descriptor, temporary = mkstemp(prefix=f".{FILE_NAME}.", dir=os.path.dirname(path))
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
