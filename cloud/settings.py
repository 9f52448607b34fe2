"""The settings: one table of what can be configured, and `Settings`, one frozen set of values.

Owns what a setting is, which values it accepts and what they mean. Where values come from (the environment,
``cloudconf.py``, ``cloud.config``) is the business of `cloud.configuration`. Whatever lists settings (attributes,
``help``, ``cloudconf.py``, the reference) derives from `SettingsTable`: a new setting is one entry there.

The first ``cloud.call`` of every program loads this module, so it imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = ["SETTINGS", "Setting", "Settings", "SettingsTable", "unknown_setting"]

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

#: Visible settings of PiCloud that an old cloudconf.py may still assign.
PICLOUD_ONLY = frozenset(
    {
        "cloud_result_cache_size",
        "cloud_status_cache_size",
        "http_close",
        "proxy_server",
        "server_list_url",
        "use_gzip",
    }
)


def _to_bool(value: Any) -> bool:
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "yes", "on", "1"):
            return True
        if word in ("false", "no", "off", "0"):
            return False
    elif isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(value)


def _to_int(value: Any) -> int:
    whole = isinstance(value, str) or hasattr(value, "__index__") or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise ValueError(value)
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__float__")):
        raise ValueError(value)
    return float(value)


def _to_text(value: Any) -> str:
    if hasattr(value, "__fspath__"):
        value = value.__fspath__()
    if isinstance(value, str):
        return value.strip()
    return str(_to_int(value))


def _to_optional_text(value: Any) -> str | None:
    text = "" if value is None else _to_text(value)
    # PiCloud's own cloudconf.py writes None as the string 'None'.
    return None if text in ("", "None") else text


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "bool": _to_bool,
    "int": _to_int,
    "float": _to_float,
    "str": _to_text,
    "str | None": _to_optional_text,
}


def _anything(value: Any) -> Any:
    return value


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _log_level(value: str) -> str:
    if value.upper() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
    return value.upper()


def _server_url(value: str) -> str:
    if not value:
        return value
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and len(value.split()) == 1
        # The key goes into api_key and api_secretkey, where it is not shown.
        usable = usable and parts.username is None and not (parts.query or parts.fragment)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be empty or a plain address such as https://cloud.example.org:8000")
    return value.rstrip("/")


def _at_least(least: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        # Comparing with both ends refuses nan and infinity too.
        if not least <= value < float("inf"):
            raise ValueError(f"must be {least} or more")
        return value

    return check


class Setting:
    """One entry of the table, and the attribute of that name on every view of the table.

    Attributes:
        name: As users write it.
        section: Heading it stands under.
        kind: Its type as text, for instance ``'str | None'``.
        default: Value when nothing sets it.
        secret: True when the value is masked wherever it is shown.
        doc: What it does, its unit, and what special values mean; also its ``__doc__``.
    """

    name = ""
    kind = ""

    def __init__(self, section: str, default: Any, doc: str, check: Callable[[Any], Any], secret: bool) -> None:
        self.section = section
        self.default = default
        self.secret = secret
        self.doc = doc
        self.__doc__ = doc
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.kind = owner.__annotations__[name]

    def __get__(self, view: Any, owner: type) -> Any:
        return self if view is None else view._read(self)

    def __set__(self, view: Any, value: Any) -> None:
        view._assign(self, value)

    def convert(self, value: Any) -> Any:
        """Convert a value to the setting's type; '4' and 4.0 are ints, 'yes' and 0 are bools.

        Raises:
            ValueError: It cannot be one; the text is PiCloud's.
        """
        try:
            return _CONVERSIONS[self.kind](value)
        except (TypeError, ValueError, OverflowError):
            # From None: the cause would quote the value, which may be a secret.
            raise ValueError(f"Configuration option {self.name} must have type {self.kind}.") from None

    def accept(self, value: Any) -> Any:
        """Convert a value and check that it makes sense.

        Raises:
            ValueError: It has the wrong type or is out of range; the text names option, remedy and value.
        """
        given = f"It is {self.shown(value)!r}."
        try:
            converted = self.convert(value)
        except ValueError as exc:
            raise ValueError(f"{exc} {given}") from None
        try:
            return self._check(converted)
        except ValueError as exc:
            raise ValueError(f"Configuration option {self.name} {exc}. {given}") from None

    def shown(self, value: Any) -> Any:
        """Give the value as it may be displayed: a secret becomes asterisks."""
        return "********" if self.secret and value is not None else value


def _setting(
    section: str, default: Any, doc: str, check: Callable[[Any], Any] = _anything, *, secret: bool = False
) -> Any:
    # Typed Any so that the annotation in the table is what type checkers see on a view.
    return Setting(section, default, doc, check, secret)


class SettingsTable:
    """Every setting, once. A view of the table says how to ``_read`` and ``_assign`` one."""

    __slots__ = ()

    api_key: str | None = _setting(
        "Account",
        None,
        "Number of the API key that identifies you to the server. None: no key, jobs run on this machine.",
    )
    api_secretkey: str | None = _setting(
        "Account",
        None,
        "Secret that belongs to api_key. A file that holds it should be readable by you alone.",
        secret=True,
    )
    server_url: str = _setting(
        "Account",
        "",
        "Address of the server that runs the jobs, such as 'https://cloud.example.org:8000'. Empty: no server.",
        _server_url,
    )
    use_simulator: bool = _setting("Account", False, "Start in the simulator, whatever key or server is configured.")
    log_filename: str = _setting(
        "Logging", "cloud.log", "File that save_log writes; relative to the home folder.", _not_empty
    )
    save_log: bool = _setting("Logging", False, "Write the messages of the 'Cloud' logger to log_filename.")
    log_level: str = _setting(
        "Logging",
        "DEBUG",
        "Least severe messages that save_log writes: DEBUG, INFO, WARNING, ERROR or CRITICAL.",
        _log_level,
    )
    print_log_level: str = _setting(
        "Logging",
        "ERROR",
        "Least severe messages printed to stderr: DEBUG, INFO, WARNING, ERROR or CRITICAL.",
        _log_level,
    )
    serialize_logging: bool = _setting(
        "Logging",
        False,
        "Write a report of what was serialized for each job, with its output, under serialize_logging_path.",
    )
    serialize_logging_path: str = _setting(
        "Logging", "datalogs/", "Folder of those reports; relative to the home folder.", _not_empty
    )
    purge_days: int = _setting("Logging", 7, "Days after which those reports are deleted. 0: never.", _at_least(0))
    num_procs: int = _setting(
        "Multiprocessing",
        0,
        "Worker processes, so the number of jobs that run at once on this machine. 0: one per usable core.",
        _at_least(0),
    )
    redirect_job_output: bool = _setting(
        "Multiprocessing",
        True,
        "Capture what jobs write to stdout and stderr, for cloud.info. False: it goes to the terminal.",
    )
    mp_cache_size_limit: int = _setting(
        "Multiprocessing",
        0,
        "Finished jobs that are remembered; the oldest are forgotten first. 0: all of them.",
        _at_least(0),
    )
    output_limit_bytes: int = _setting(
        "Multiprocessing",
        64_000,
        "Bytes kept of each job's stdout, and as many of its stderr; the last ones are kept.",
        _at_least(1),
    )
    kill_grace_s: float = _setting(
        "Multiprocessing",
        0.5,
        "Seconds a killed job has to run its 'finally' blocks before its process is ended.",
        _at_least(0),
    )
    max_nesting: int = _setting(
        "Multiprocessing",
        100,
        "Depth to which jobs may start jobs that start jobs. 0: jobs may start none.",
        _at_least(0),
    )
    force_serialize_logging: bool = _setting("Simulation", True, "Turn serialize_logging on in the simulator.")
    force_redirect_job_output: bool = _setting("Simulation", True, "Turn redirect_job_output on in the simulator.")
    max_transmit_data: int = _setting(
        "Transport", 0, "Bytes one function or argument may have when serialized. 0: no limit.", _at_least(0)
    )
    automatic_dependency_transfer: bool = _setting(
        "Transport",
        True,
        "Send a server those of your own modules that your jobs import. False: it must have them.",
    )
    dependency_whitelist: str = _setting(
        "Transport",
        "",
        "Names of the modules and packages that may be sent, separated by blanks. Empty: all of your own.",
    )
    server_patience_s: float = _setting(
        "Transport",
        600.0,
        "Seconds for which a request to a server that does not answer is tried again.",
        _at_least(0),
    )
    server_ca_file: str = _setting(
        "Transport", "", "File of certificates, PEM, by which the server is known. Empty: those of the system."
    )
    insecure_server: bool = _setting(
        "Transport",
        False,
        "Allow http:// to another machine. Whoever sees the traffic can then read and change everything.",
    )


#: The table by name, in its order.
SETTINGS: dict[str, Setting] = {n: entry for n, entry in vars(SettingsTable).items() if isinstance(entry, Setting)}


def unknown_setting(name: str, remedy: str = "cloud.config.show() lists all settings.") -> str:
    """Say that there is no such setting, and which one may have been meant, or else the remedy."""
    if name in PICLOUD_ONLY:
        return f"{name!r} was a setting of PiCloud and has no use here; delete it."
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), SETTINGS)
    if close:
        remedy = f"Did you mean {' or '.join(close)}?"
    return f"There is no setting {name!r}. {remedy}"


class Settings(SettingsTable):
    """One value for every setting, each with its origin; immutable. ``Settings()`` holds the defaults.

    Args:
        values: Accepted values by name; the others have their default. ``origins`` tells where each came from.
    """

    __slots__ = ("_origins", "_values")

    _origins: dict[str, str]
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any] | None = None, origins: Mapping[str, str] | None = None) -> None:
        defaults = {name: entry.default for name, entry in SETTINGS.items()}
        object.__setattr__(self, "_values", {**defaults, **(values or {})})
        object.__setattr__(self, "_origins", dict(origins or {}))

    def _read(self, entry: Setting) -> Any:
        return self._values[entry.name]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Settings never change; use Settings.replace({name}=...) or cloud.config.{name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("Settings never change")

    def origin(self, name: str) -> str:
        """Tell where a value came from.

        Returns:
            ``'argument'``, ``'commit'``, ``'environment CLOUD_<NAME>'``, ``'cloudconf.py (<path>)'`` or ``'default'``.

        Raises:
            AttributeError: There is no such setting.
        """
        if name not in SETTINGS:
            raise AttributeError(unknown_setting(name))
        return self._origins.get(name, "default")

    def replace(self, **changes: Any) -> Settings:
        """Make a copy with some values replaced; their origin is ``'argument'``.

        Raises:
            ConfigurationError: A name is unknown or a value is not acceptable; lists all of them.
        """
        problems: list[str] = []
        replaced = self.overlay(changes, lambda name: "argument", problems)
        if problems:
            from cloud.errors import ConfigurationError

            raise ConfigurationError(problems)
        return replaced

    def overlay(
        self,
        changes: Mapping[str, Any],
        origin: Callable[[str], str],
        problems: list[str],
        place: Callable[[str], str] = lambda name: "",
    ) -> Settings:
        """Make a copy with some values laid over these; ones that are not acceptable are left out.

        Args:
            changes: New values by name, not yet converted.
            origin: Gives the origin of a name.
            problems: Receives one sentence per name or value that is not acceptable.
            place: Gives what to write before the sentence about a name: where the value stands.
        """
        values, origins = dict(self._values), dict(self._origins)
        for name, value in changes.items():
            if name not in SETTINGS:
                problems.append(place(name) + unknown_setting(name))
                continue
            try:
                values[name] = SETTINGS[name].accept(value)
                origins[name] = origin(name)
            except ValueError as exc:
                problems.append(f"{place(name)}{exc}")
        return Settings(values, origins)

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, Settings) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._values.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, (self._values, self._origins)

    def __repr__(self) -> str:
        changed = (
            f"{name}={entry.shown(self._values[name])!r}"
            for name, entry in SETTINGS.items()
            if self._values[name] != entry.default
        )
        return f"Settings({', '.join(changed)})"
