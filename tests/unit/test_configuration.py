"""Every setting from every source, and what `CloudConfig` promises about drafts, commits, files and errors."""

from __future__ import annotations

import ast
import copy
import io
import os
import pickle
import pydoc
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import cloud.configuration
import cloud.settings
from cloud.configuration import CloudConfig, ensure_home, home_folder, home_path, load_settings, usable_cores
from cloud.errors import CloudException, ConfigurationError
from cloud.settings import PICLOUD_ONLY, SETTINGS, Settings

REPOSITORY = Path(__file__).parents[2]
REGENERATE = (
    "CLOUD_HOME=/nowhere python -c 'from cloud.configuration import *; CloudConfig(id).write(\"cloudconf.py\")'"
)

#: Per setting: text for the environment, the value it means, source for cloudconf.py, the value it means,
#: a value of the wrong type, and one that is out of range (None where every value of the type is good).
SAMPLES: dict[str, tuple[str, Any, str, Any, Any, Any]] = {
    "api_key": ("12", "12", "7", "7", ["7"], None),
    "api_secretkey": ("hush", "hush", "'se' + 'cret'", "secret", 1.5, None),
    "server_url": ("http://localhost:8000/", "http://localhost:8000", "'https://a.b'", "https://a.b", None, "a.b:8000"),
    "use_simulator": ("yes", True, "1 == 1", True, "perhaps", None),
    "log_filename": ("/var/log/c.log", "/var/log/c.log", "'other.log'", "other.log", False, ""),
    "save_log": ("on", True, "True", True, 2, None),
    "log_level": ("info", "INFO", "'Warning'", "WARNING", None, "LOUD"),
    "print_log_level": ("critical", "CRITICAL", "'DEBUG'", "DEBUG", (), "QUIET"),
    "serialize_logging": ("TRUE", True, "True", True, None, None),
    "serialize_logging_path": ("logs", "logs", "'reports/'", "reports/", None, ""),
    "purge_days": ("0", 0, "2 * 7", 14, 0.5, -1),
    "num_procs": ("3", 3, "6 // 3", 2, "four", -2),
    "redirect_job_output": ("0", False, "False", False, "maybe", None),
    "mp_cache_size_limit": ("1_000", 1000, "10 ** 4", 10_000, True, -1),
    "output_limit_bytes": ("1000", 1000, "1 << 20", 1 << 20, "64kB", 0),
    "kill_grace_s": ("2", 2.0, "0.25", 0.25, "soon", float("nan")),
    "max_nesting": ("5", 5, "0", 0, [], -1),
    "force_serialize_logging": ("no", False, "False", False, "", None),
    "force_redirect_job_output": ("off", False, "0", False, 0.0, None),
    "max_transmit_data": ("1000000", 1_000_000, "16 * 2**20", 16 * 2**20, 1e999, -1),
    "automatic_dependency_transfer": ("off", False, "False", False, 7, None),
    "dependency_whitelist": ("mine yours", "mine yours", "'mine'", "mine", None, None),
    "server_patience_s": ("30", 30.0, "60 * 2", 120.0, "long", -1),
    "server_ca_file": ("/etc/ca.pem", "/etc/ca.pem", "'ca.pem'", "ca.pem", 1.5, None),
    "insecure_server": ("yes", True, "True", True, "perhaps", None),
}
NAMES = list(SETTINGS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("CLOUD_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("CLOUD_HOME", str(folder))
    return folder


@pytest.fixture
def config() -> CloudConfig:
    return CloudConfig(lambda settings: None)


def write_file(home: Path, text: str) -> Path:
    home.mkdir(exist_ok=True)
    path = home / "cloudconf.py"
    path.write_text(text)
    return path


def problems_of_loading() -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    return caught.value.problems


def test_the_samples_cover_the_table() -> None:
    assert list(SAMPLES) == NAMES


def test_names_sections_and_defaults() -> None:
    assert [(entry.section, name, entry.default) for name, entry in SETTINGS.items()] == [
        ("Account", "api_key", None),
        ("Account", "api_secretkey", None),
        ("Account", "server_url", ""),
        ("Account", "use_simulator", False),
        ("Logging", "log_filename", "cloud.log"),
        ("Logging", "save_log", False),
        ("Logging", "log_level", "DEBUG"),
        ("Logging", "print_log_level", "ERROR"),
        ("Logging", "serialize_logging", False),
        ("Logging", "serialize_logging_path", "datalogs/"),
        ("Logging", "purge_days", 7),
        ("Multiprocessing", "num_procs", 0),
        ("Multiprocessing", "redirect_job_output", True),
        ("Multiprocessing", "mp_cache_size_limit", 0),
        ("Multiprocessing", "output_limit_bytes", 64_000),
        ("Multiprocessing", "kill_grace_s", 0.5),
        ("Multiprocessing", "max_nesting", 100),
        ("Simulation", "force_serialize_logging", True),
        ("Simulation", "force_redirect_job_output", True),
        ("Transport", "max_transmit_data", 0),
        ("Transport", "automatic_dependency_transfer", True),
        ("Transport", "dependency_whitelist", ""),
        ("Transport", "server_patience_s", 600.0),
        ("Transport", "server_ca_file", ""),
        ("Transport", "insecure_server", False),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_default(name: str) -> None:
    settings = load_settings()
    assert getattr(settings, name) == SETTINGS[name].default
    assert settings.origin(name) == "default"
    assert SETTINGS[name].accept(SETTINGS[name].default) == SETTINGS[name].default
    assert SETTINGS[name].doc.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = SAMPLES[name][:2]
    monkeypatch.setenv(f"CLOUD_{name.upper()}", text)
    settings = load_settings()
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert settings.origin(name) == f"environment CLOUD_{name.upper()}"


@pytest.mark.parametrize("name", NAMES)
def test_from_the_file(name: str, home: Path) -> None:
    source, value = SAMPLES[name][2:4]
    path = write_file(home, f"{name} = {source}\n")
    settings = load_settings()
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert settings.origin(name) == f"cloudconf.py ({path})"


@pytest.mark.parametrize("name", NAMES)
def test_by_commit(name: str) -> None:
    value = SAMPLES[name][1]
    committed: list[Settings] = []
    config = CloudConfig(committed.append)
    before = config.settings
    setattr(config, name, value)
    assert getattr(config, name) == value
    assert config.settings is before
    config.commit()
    assert getattr(config.settings, name) == value
    assert config.settings.origin(name) == "commit"
    assert committed == [config.settings]
    assert getattr(before, name) == SETTINGS[name].default


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_wrong_type(name: str, config: CloudConfig) -> None:
    wrong = SAMPLES[name][4]
    with pytest.raises(ValueError) as caught:
        setattr(config, name, wrong)
    assert str(caught.value) == f"Configuration option {name} must have type {SETTINGS[name].kind}."
    assert isinstance(caught.value, ConfigurationError)
    config.commit()
    assert config.settings == Settings()
    with pytest.raises(ConfigurationError, match=f"^Configuration option {name} must have type .* It is "):
        Settings().replace(**{name: wrong})


@pytest.mark.parametrize("name", [name for name in NAMES if SAMPLES[name][5] is not None])
def test_a_value_out_of_range(name: str, config: CloudConfig) -> None:
    setattr(config, name, SAMPLES[name][5])
    with pytest.raises(ConfigurationError, match=f"^Configuration option {name} must (not )?be .*It is "):
        config.commit()
    assert config.settings == Settings()


@pytest.mark.parametrize("name", [name for name in NAMES if not SETTINGS[name].kind.startswith("str")])
def test_a_bad_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CLOUD_{name.upper()}", "many")
    (problem,) = problems_of_loading()
    assert problem == (
        f"environment CLOUD_{name.upper()}: "
        f"Configuration option {name} must have type {SETTINGS[name].kind}. It is 'many'."
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_value_in_the_file_is_placed(name: str, home: Path) -> None:
    path = write_file(home, f"# first line\n{name} = object()\n")
    (problem,) = problems_of_loading()
    assert problem.startswith(f"{path}, line 2: Configuration option {name} must have type {SETTINGS[name].kind}.")


@pytest.mark.parametrize("url", ["http://h", "https://cloud.example.org:8000", "http://[::1]:80", "https://h/path"])
def test_good_addresses(url: str) -> None:
    assert Settings().replace(server_url=url).server_url == url


@pytest.mark.parametrize(
    "url",
    ["h", "ftp://h", "http://", "http://h:port", "http://h:0", "http://u:p@h", "http://h?k=1", "http://a b", "://"],
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(ConfigurationError, match="server_url must be empty or a plain address"):
        Settings().replace(server_url=url)


def test_infinity_is_not_a_number_of_seconds() -> None:
    with pytest.raises(ConfigurationError, match="kill_grace_s must be 0 or more"):
        Settings().replace(kill_grace_s=float("inf"))


@pytest.mark.parametrize("nothing", [None, "None", "", "  "])
def test_no_key_is_none(nothing: object) -> None:
    # PiCloud's own cloudconf.py says 'None'.
    assert Settings().replace(api_key=nothing).api_key is None


def test_paths_and_numbers_are_text_where_text_is_meant(tmp_path: Path) -> None:
    assert Settings().replace(log_filename=tmp_path, api_key=12).log_filename == str(tmp_path)


def test_an_empty_variable_is_a_value_for_text_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(home, "api_key = 7\nserver_url = 'http://h'\nnum_procs = 3\n")
    for name in ("API_KEY", "SERVER_URL", "NUM_PROCS"):
        monkeypatch.setenv(f"CLOUD_{name}", "")
    settings = load_settings()
    assert (settings.api_key, settings.server_url, settings.num_procs) == (None, "", 3)


def test_order_of_precedence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(home, "num_procs = 1\npurge_days = 1\nmax_nesting = 1\nkill_grace_s = 1\n")
    for name in ("PURGE_DAYS", "MAX_NESTING", "KILL_GRACE_S"):
        monkeypatch.setenv(f"CLOUD_{name}", "2")
    config = CloudConfig(lambda settings: None)
    config.max_nesting = config.kill_grace_s = 3
    config.commit()
    settings = config.settings.replace(kill_grace_s=4)
    assert [
        (getattr(settings, name), settings.origin(name).split(" ")[0])
        for name in ("mp_cache_size_limit", "num_procs", "purge_days", "max_nesting", "kill_grace_s")
    ] == [(0, "default"), (1, "cloudconf.py"), (2, "environment"), (3, "commit"), (4, "argument")]


def test_the_file_is_plain_python(home: Path) -> None:
    write_file(
        home,
        '# coding: latin-1\n"""Heading"""\nimport os\nfrom pathlib import Path\n_half = os.cpu_count() * 2\n'
        "def twice(n):\n    return 2 * n\n"
        "if __name__ == 'cloudconf':\n    num_procs = twice(_half)\nlog_filename = Path(__file__).parent / 'a.log'\n",
    )
    settings = load_settings()
    assert settings.num_procs == 4 * (os.cpu_count() or 1)
    assert settings.log_filename == str(home / "a.log")


def test_a_file_with_a_byte_order_mark_and_foreign_line_ends(home: Path) -> None:
    write_file(home, "").write_bytes(b"\xef\xbb\xbfnum_procs = 2\r\npurge_days = 3\r\n")
    assert (load_settings().num_procs, load_settings().purge_days) == (2, 3)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("num_procs = 1\nmax_nesting = = 2\n", ", line 2: SyntaxError: invalid syntax"),
        ("num_procs = 1\n\nmax_nesting = 1 / 0\n", ", line 3: ZeroDivisionError: division by zero"),
        ("def half():\n    raise KeyError('x')\nhalf()\n", ", line 2: KeyError: 'x'"),
        ("import json\njson.loads('{')\n", ", line 2: JSONDecodeError: Expecting property name"),
        ("import sys\nsys.exit('no')\n", ", line 2: SystemExit: no"),
        ("exec('1 +')\n", ", line 1: SyntaxError: invalid syntax"),
        ("num_procs = 1\n\0", "null bytes"),
    ],
)
def test_a_malformed_file_is_one_problem_with_file_and_line(source: str, expected: str, home: Path) -> None:
    path = write_file(home, source)
    (problem,) = problems_of_loading()
    assert problem.startswith(str(path))
    assert expected in problem


def test_a_file_that_cannot_be_read_is_named(home: Path) -> None:
    (home / "cloudconf.py").mkdir(parents=True)
    assert problems_of_loading() == [
        f"{home}/cloudconf.py: cannot be read (Is a directory); correct its permissions, or set CLOUD_HOME."
    ]


def test_all_problems_are_reported_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(
        home,
        "num_proc = 3\npurge_days = -1\nbase = '/data'\nuse_gzip = True\nsave_log = 'x'\nfrom math import pi\n"
        "if True:\n    max_nesting = 1\n    max_nesting = None\n",
    )
    monkeypatch.setenv("CLOUD_KILL_GRACE_S", "-1")
    assert problems_of_loading() == [
        f"{path}, line 1: There is no setting 'num_proc'. Did you mean num_procs?",
        f"{path}, line 3: There is no setting 'base'. Names of your own begin with an underscore.",
        f"{path}, line 4: 'use_gzip' was a setting of PiCloud and has no use here; delete it.",
        f"{path}: There is no setting 'pi'. Names of your own begin with an underscore.",
        f"{path}, line 2: Configuration option purge_days must be 0 or more. It is -1.",
        f"{path}, line 5: Configuration option save_log must have type bool. It is 'x'.",
        f"{path}, line 9: Configuration option max_nesting must have type int. It is None.",
        "environment CLOUD_KILL_GRACE_S: Configuration option kill_grace_s must be 0 or more. It is '-1'.",
    ]


def test_a_malformed_file_does_not_hide_a_bad_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(home, "num_procs =\n")
    monkeypatch.setenv("CLOUD_NUM_PROCS", "all")
    assert ["SyntaxError" in problem for problem in problems_of_loading()] == [True, False]


def test_names_of_picloud_are_not_settings() -> None:
    assert PICLOUD_ONLY.isdisjoint(SETTINGS)


def test_settings_never_change() -> None:
    settings: Any = Settings()
    for change in (
        lambda: setattr(settings, "num_procs", 2),
        lambda: setattr(settings, "other", 2),
        lambda: delattr(settings, "num_procs"),
    ):
        with pytest.raises(AttributeError, match="Settings never change"):
            change()
    assert settings == Settings()


def test_replace_makes_a_copy_and_reports_everything() -> None:
    settings = Settings()
    replaced = settings.replace(num_procs="4", server_url="http://h/")
    assert (settings.num_procs, replaced.num_procs, replaced.server_url) == (0, 4, "http://h")
    assert (replaced.origin("num_procs"), replaced.origin("purge_days")) == ("argument", "default")
    with pytest.raises(ConfigurationError) as caught:
        settings.replace(num_proc=1, purge_days="x", max_nesting=-1)
    assert caught.value.problems == [
        "There is no setting 'num_proc'. Did you mean num_procs?",
        "Configuration option purge_days must have type int. It is 'x'.",
        "Configuration option max_nesting must be 0 or more. It is -1.",
    ]


def test_origin_of_an_unknown_setting() -> None:
    with pytest.raises(AttributeError, match=r"^There is no setting 'num_proc'\. Did you mean num_procs\?$"):
        Settings().origin("num_proc")


def test_settings_are_values() -> None:
    settings = Settings().replace(num_procs=4)
    for twin in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings)), Settings().replace(num_procs=4)):
        assert (twin, hash(twin), twin.origin("num_procs")) == (settings, hash(settings), "argument")
    assert settings != Settings()
    assert settings != 4


def test_a_secret_is_never_shown(config: CloudConfig, home: Path) -> None:
    config.api_secretkey = "hush-hush"
    config.commit()
    out = io.StringIO()
    config.show(out)
    assert repr(config.settings) == "Settings(api_secretkey='********')"
    assert "hush" not in out.getvalue() + repr(config.describe()) + repr(config)
    assert config.settings.api_secretkey == "hush-hush"


def test_a_refused_secret_is_not_in_the_error(config: CloudConfig, home: Path) -> None:
    with pytest.raises(ValueError) as caught:
        config.api_secretkey = ["hush-hush"]  # type: ignore[assignment]
    assert caught.value.__notes__ == ["The value was '********'."]
    assert caught.value.__cause__ is None
    write_file(home, "api_secretkey = ['hush-hush']\n")
    assert "hush-hush" not in "".join(problems_of_loading())


def test_a_failed_commit_lists_all_problems_and_changes_nothing() -> None:
    committed: list[Settings] = []
    config = CloudConfig(committed.append)
    before = config.settings
    config.num_procs, config.purge_days, config.log_level, config.max_nesting = -1, -1, "LOUD", 7
    with pytest.raises(ConfigurationError) as caught:
        config.commit()
    assert [problem.split(" ")[2] for problem in caught.value.problems] == ["num_procs", "purge_days", "log_level"]
    assert config.settings is before
    assert committed == []
    # The draft is kept for correction.
    config.num_procs, config.purge_days, config.log_level = 2, 3, "INFO"
    config.commit()
    assert [config.settings.num_procs, config.settings.max_nesting] == [2, 7]


def test_the_refused_value_is_noted(config: CloudConfig) -> None:
    with pytest.raises(ValueError) as caught:
        config.num_procs = "four"  # type: ignore[assignment]
    assert caught.value.__notes__ == ["The value was 'four'."]


def test_a_second_commit_keeps_the_first(config: CloudConfig) -> None:
    config.num_procs = 2
    config.commit()
    config.purge_days = 2
    config.commit()
    assert (config.settings.num_procs, config.settings.origin("num_procs")) == (2, "commit")


def test_an_assignment_during_a_commit_stays_a_draft() -> None:
    def assign(settings: Settings) -> None:
        config.purge_days = 30

    config = CloudConfig(assign)
    config.num_procs = 2
    config.commit()
    assert (config.purge_days, config.settings.purge_days) == (30, 7)


@pytest.mark.parametrize("name", ["num_proc", "NUM_PROCS", "numprocs"])
def test_an_unknown_name_suggests_a_close_one(config: CloudConfig, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"^There is no setting '{name}'\. Did you mean num_procs\?$"):
        setattr(config, name, 3)
    with pytest.raises(AttributeError, match=r"Did you mean num_procs\?$"):
        getattr(config, name)


def test_a_setting_of_picloud_is_recognised(config: CloudConfig) -> None:
    with pytest.raises(AttributeError, match="'use_gzip' was a setting of PiCloud and has no use here"):
        config.use_gzip = False


def test_help_and_completion_know_every_setting(config: CloudConfig) -> None:
    text = pydoc.plain(pydoc.render_doc(config))
    assert set(NAMES) <= set(dir(config))
    for entry in SETTINGS.values():
        assert f"{entry.name}\n |      {entry.doc}" in text


def test_a_config_survives_the_probes_of_tools(config: CloudConfig) -> None:
    assert not hasattr(config, "_repr_html_")
    assert not hasattr(config, "__wrapped__")


def test_describe(config: CloudConfig, home: Path) -> None:
    path = write_file(home, "num_procs = 2\n")
    config.purge_days = 30
    rows = {row["name"]: row for row in config.describe()}
    assert list(rows) == NAMES
    assert rows["num_procs"] == {
        "name": "num_procs",
        "section": "Multiprocessing",
        "value": 2,
        "default": 0,
        "origin": f"cloudconf.py ({path})",
        "doc": SETTINGS["num_procs"].doc,
    }
    assert (rows["purge_days"]["value"], rows["purge_days"]["origin"]) == (30, "draft")
    config.commit()
    assert {row["name"]: row["origin"] for row in config.describe()}["purge_days"] == "commit"


def test_show(config: CloudConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLOUD_NUM_PROCS", "3")
    config.show()
    shown = capsys.readouterr().out
    out = io.StringIO()
    config.show(out)
    assert out.getvalue() == shown
    lines = shown.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == list(
        dict.fromkeys(entry.section for entry in SETTINGS.values())
    )
    assert [line.split()[0] for line in lines if line.startswith(" ")] == NAMES
    assert ["num_procs", "3", "environment", "CLOUD_NUM_PROCS"] in [line.split() for line in lines]


def test_the_top_level_file_is_what_write_produces(config: CloudConfig, tmp_path: Path) -> None:
    written = config.write(tmp_path / "cloudconf.py")
    assert (REPOSITORY / "cloudconf.py").read_text() == Path(written).read_text(), "run: " + REGENERATE


def test_write_goes_home_and_is_private(config: CloudConfig, home: Path) -> None:
    old = os.umask(0)
    try:
        path = config.write()
    finally:
        os.umask(old)
    assert path == str(home / "cloudconf.py")
    assert (stat.S_IMODE(home.stat().st_mode), stat.S_IMODE(os.stat(path).st_mode)) == (0o700, 0o600)
    assert os.listdir(home) == ["cloudconf.py"]


def test_write_includes_the_draft_and_what_is_written_is_read(config: CloudConfig) -> None:
    config.num_procs = 5
    config.api_secretkey = "quotes ' and \" and \\ \n"
    config.write()
    settings = load_settings()
    assert (settings.num_procs, settings.api_secretkey) == (5, "quotes ' and \" and \\")
    assert config.settings.num_procs == 0


def test_write_refuses_an_invalid_draft_and_keeps_the_old_file(config: CloudConfig, home: Path) -> None:
    path = write_file(home, "num_procs = 2\n")
    config.purge_days = -1
    with pytest.raises(ConfigurationError, match="purge_days"):
        config.write()
    assert path.read_text() == "num_procs = 2\n"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    config: CloudConfig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = write_file(home, "num_procs = 2\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        config.write()
    assert path.read_text() == "num_procs = 2\n"
    assert os.listdir(home) == ["cloudconf.py"]


def test_write_follows_a_link(config: CloudConfig, home: Path, tmp_path: Path) -> None:
    home.mkdir()
    target = tmp_path / "dotfiles.py"
    target.write_text("")
    (home / "cloudconf.py").symlink_to(target)
    assert config.write() == str(target)
    assert (home / "cloudconf.py").is_symlink()
    assert "num_procs = 0" in target.read_text()


def _values(name: str) -> st.SearchStrategy[Any]:
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    special: dict[str, st.SearchStrategy[Any]] = {
        "server_url": st.sampled_from(["", "http://h", "https://h.example:1/p"]),
        "log_level": st.sampled_from(cloud.settings.LOG_LEVELS),
        "print_log_level": st.sampled_from(cloud.settings.LOG_LEVELS),
        "output_limit_bytes": st.integers(1),
    }
    kinds = {
        "bool": st.booleans(),
        "int": st.integers(0),
        "float": st.floats(0, allow_infinity=False),
        "str": text.filter(str.strip),
        "str | None": st.none() | text,
    }
    return special.get(name, kinds[SETTINGS[name].kind])


@examples(max_examples=50)
@given(changes=st.fixed_dictionaries({}, optional={name: _values(name) for name in NAMES}))
def test_the_file_round_trips(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("round")
    config = CloudConfig(lambda settings: None)
    for name, value in changes.items():
        setattr(config, name, value)
    config.commit()
    config.write(home / "cloudconf.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD_HOME", str(home))
        assert load_settings() == config.settings


@given(
    name=st.sampled_from(NAMES), value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
)
def test_any_value_is_accepted_for_good_or_refused_with_its_name(name: str, value: Any) -> None:
    entry = SETTINGS[name]
    try:
        accepted = entry.accept(value)
    except ValueError as exc:
        assert str(exc).startswith(f"Configuration option {name} must ")
    else:
        assert entry.accept(accepted) == accepted
        assert type(accepted).__name__ in entry.kind.replace("None", "NoneType")


def test_nothing_is_created_by_reading(config: CloudConfig, home: Path) -> None:
    config.show(io.StringIO())
    config.num_procs = 2
    config.commit()
    assert home_folder() == str(home)
    assert not home.exists()


def test_home_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.setenv("CLOUD_HOME", "here")
    assert home_folder() == str(tmp_path / "here")
    monkeypatch.setenv("CLOUD_HOME", "~/there")
    assert home_folder() == "/users/me/there"
    monkeypatch.setenv("CLOUD_HOME", "")
    assert home_folder() == "/users/me/.cloud"
    assert home_path("datalogs/") == "/users/me/.cloud/datalogs/"
    assert home_path("/var/log/cloud.log") == "/var/log/cloud.log"
    assert home_path("~/cloud.log") == "/users/me/cloud.log"


def test_a_user_without_home_directory_needs_none_until_something_is_written(
    config: CloudConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What os.path.expanduser does for a user id that the system does not know.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("CLOUD_HOME")
    assert config.settings == Settings()
    with pytest.raises(ConfigurationError, match="set CLOUD_HOME to a folder"):
        config.write()


def test_ensure_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ensure_home() == str(home)
    home.chmod(0o750)
    assert ensure_home() == str(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o750, "an existing folder is the user's own business"
    (home / "file").write_text("")
    monkeypatch.setenv("CLOUD_HOME", str(home / "file"))
    with pytest.raises(CloudException, match=r"file' cannot be created \(File exists\): set CLOUD_HOME"):
        ensure_home()


def test_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 8


def test_loading_is_lazy_and_tries_again_after_a_failure(config: CloudConfig, home: Path) -> None:
    path = write_file(home, "num_procs = \n")
    config.purge_days = 3
    for use in (lambda: config.settings, lambda: config.num_procs, config.commit):
        with pytest.raises(ConfigurationError, match="line 1: SyntaxError"):
            use()
    path.write_text("num_procs = 4\n")
    assert (config.num_procs, config.purge_days) == (4, 3)
    path.write_text("num_procs = 5\n")
    assert config.num_procs == 4


def test_threads_that_race_to_load_get_the_same_settings(config: CloudConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    n_threads = 8
    all_loading = threading.Barrier(n_threads, timeout=10)
    seen: list[Settings] = []

    def load() -> Settings:
        all_loading.wait()
        return Settings()

    monkeypatch.setattr(cloud.configuration, "load_settings", load)
    threads = [threading.Thread(target=lambda: seen.append(config.settings)) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == n_threads
    assert len({id(settings) for settings in seen}) == 1


def test_a_commit_wins_over_a_load_that_began_before_it(config: CloudConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, committed = threading.Event(), threading.Event()
    main, seen = threading.current_thread(), []

    def load() -> Settings:
        if threading.current_thread() is not main:
            loading.set()
            assert committed.wait(10)
        return Settings()

    monkeypatch.setattr(cloud.configuration, "load_settings", load)
    thread = threading.Thread(target=lambda: seen.append(config.settings))
    thread.start()
    assert loading.wait(10)
    config.num_procs = 3
    config.commit()
    committed.set()
    thread.join()
    assert seen == [config.settings]
    assert seen[0].num_procs == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_forked_while_another_thread_loads_can_load(config: CloudConfig, home: Path, tmp_path: Path) -> None:
    fifo, started = tmp_path / "fifo", tmp_path / "started"
    os.mkfifo(fifo)
    os.mkfifo(started)
    write_file(
        home,
        f"open({str(started)!r}, 'w').close()\nwith open({str(fifo)!r}) as _file:\n    num_procs = int(_file.read())\n",
    )
    thread = threading.Thread(target=lambda: config.settings)
    thread.start()
    started.read_text()
    child = os.fork()
    if child == 0:
        os.environ["CLOUD_HOME"] = str(tmp_path / "other")
        os._exit(42 if config.settings.num_procs == 0 else 1)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    fifo.write_text("6")
    thread.join()
    assert os.waitstatus_to_exitcode(ended[1]) == 42
    assert config.settings.num_procs == 6


def test_loading_without_a_file_is_fast() -> None:
    def load_s() -> float:
        start = time.perf_counter()
        load_settings()
        return time.perf_counter() - start

    assert min(load_s() for _ in range(50)) < 0.001


@pytest.mark.parametrize("module", [cloud.configuration, cloud.settings])
def test_the_modules_import_next_to_nothing(module: Any) -> None:
    imported: set[str] = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert imported <= {"__future__", "os", "sys", "cloud.settings"}


def test_the_reference_describes_every_setting() -> None:
    page = (REPOSITORY / "docs" / "reference" / "configuration.md").read_text()
    rows = [line for line in page.partition("## Settings")[2].splitlines() if line.startswith("| `")]
    expected = [
        f"| `{name}` | {entry.kind.replace(' | ', ' or ')} | `{entry.default!r}` | {entry.doc} |"
        for name, entry in SETTINGS.items()
    ]
    assert rows == expected
