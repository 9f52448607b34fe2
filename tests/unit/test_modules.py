"""Which modules travel, and what is in them: real packages, looked at by a program of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from cloud.errors import CloudException, SerializationError
from cloud.serialization.explain import explain_missing_module
from cloud.serialization.imports import absolute_names, imported_by_code, imported_by_source
from cloud.serialization.manifest import MAX_FILES, MAX_TOTAL_BYTES, CodeRefused
from cloud.serialization.modules import MAX_DATA_BYTES, NO_CODE, CodeFinder, CodeSet
from cloud.serialization.origins import Origins, installed_packages
from tests.architecture.modules import REPO

SHOW = """
import json, sys
from cloud.serialization.modules import CodeFinder
def show(*args):
    finder = CodeFinder(*(args or (True,)))
    code = finder.current()
    print(json.dumps({"digest": code.digest, "files": [e.path for e in code.files], "left_out": dict(code.left_out),
                      "not_sent": finder.not_sent(), "text": {e.path: code.read(e.path).decode() for e in code.files}}))
"""


def write(root: Path, files: Mapping[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


Look = Callable[..., dict[str, Any]]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Run a program that ends with ``show()`` and return what it showed."""

    def look(source: str, *paths: Path | str, name: str = "script.py", arguments: list[str] | None = None) -> Any:
        script = write(tmp_path / "program", {name: SHOW + source}) / name
        environment = {"PYTHONPATH": os.pathsep.join(map(str, [*paths, REPO])), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [sys.executable, *(arguments or [str(script)])],
            env=environment,
            cwd=tmp_path / "program",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return look


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder at the front of ``sys.path``; what is imported from it is forgotten."""
    folder = tmp_path / "importable"
    folder.mkdir()
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in set(sys.modules) - set(before):
        if (getattr(sys.modules[name], "__file__", None) or str(folder)).startswith(str(folder)):
            del sys.modules[name]


def serve(code: CodeSet, folder: Path, source: str) -> str:
    """Run a program where only the set's folder and the interpreter's own modules are found."""
    for entry in code.files:
        path = folder / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code.read(entry.path))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(folder)!r}]\n{source}"],
        cwd=folder.parent,
        env={},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- what travels ---------------------------------------------------------------------------------------------------


def test_a_program_without_modules_of_its_own_sends_nothing(look: Look) -> None:
    shown = look("import json, random, pytest, pluggy, croniter\nshow()")
    assert (shown["files"], shown["digest"]) == ([], "")


def test_modules_next_to_the_script_travel(look: Look, tmp_path: Path) -> None:
    write(tmp_path / "program", {"helper.py": "x = 1", "unused.py": "y = 2"})
    shown = look("import helper\nshow()")
    assert shown["text"] == {"helper.py": "x = 1"}


def test_a_package_travels_whole(look: Look, tmp_path: Path) -> None:
    files = {
        "pkg/__init__.py": "",
        "pkg/used.py": "",
        "pkg/sub/__init__.py": "",
        "pkg/sub/unused.py": "",
        "pkg/data/words.txt": "a b",
        "pkg/.env": "secret",
        "pkg/.git/config": "",
        "pkg/__pycache__/used.cpython-311.pyc": "",
        "pkg/env/pyvenv.cfg": "",
        "pkg/env/lib/x.py": "",
        "pkg/used.py~": "",
    }
    write(tmp_path / "lib", files)
    assert look("import pkg.used\nshow()", tmp_path / "lib")["files"] == [
        "pkg/__init__.py",
        "pkg/data/words.txt",
        "pkg/sub/__init__.py",
        "pkg/sub/unused.py",
        "pkg/used.py",
    ]


def test_modules_that_are_imported_later_travel_too(look: Look, tmp_path: Path) -> None:
    files = {
        "first.py": "def f():\n    import second, random\n    return second.x",
        "second.py": "def g():\n    from third import x\n    return x",
        "third.py": "import importlib\ndef h(): return importlib.import_module('fourth')",
        "fourth.py": '"""Made from fifth, import sixth."""\nfrom nowhere_at_all import x',
        "fifth.py": "",
        "sixth.py": "",
        "of_script.py": "",
    }
    write(tmp_path / "program", files)
    shown = look("import first\ndef job():\n    import of_script\nshow()")
    assert shown["files"] == ["first.py", "fourth.py", "of_script.py", "second.py", "third.py"]


@pytest.mark.parametrize("file", ["", "__file__ = '<stdin>'\n"])
def test_modules_that_functions_of_a_session_import_travel(look: Look, tmp_path: Path, file: str) -> None:
    write(tmp_path / "lib", {"helper.py": "", "other.py": ""})
    source = file + SHOW + "def job():\n    def inner():\n        import helper\n    return inner\nshow()"
    assert look("", tmp_path / "lib", arguments=["-c", source])["files"] == ["helper.py"]


def test_of_a_namespace_package_only_what_is_used_travels(look: Look, tmp_path: Path) -> None:
    one = {"ns/used.py": "from . import sibling\nfrom .deep.down import f", "ns/sibling.py": "", "ns/unused.py": ""}
    two = {"ns/deep/down.py": "f = 1", "ns/deep/huge.py": "", "ns/pkg/__init__.py": "", "ns/pkg/all.py": ""}
    write(tmp_path / "one", one)
    write(tmp_path / "two", two)
    shown = look("import ns.used, ns.pkg\nshow()", tmp_path / "one", tmp_path / "two")
    assert shown["files"] == ["ns/deep/down.py", "ns/pkg/__init__.py", "ns/pkg/all.py", "ns/sibling.py", "ns/used.py"]


def test_a_module_that_shadows_the_standard_library_travels(look: Look, tmp_path: Path) -> None:
    write(tmp_path / "program", {"wave.py": "mine = True"})
    assert look("import wave, colorsys\nshow()")["text"] == {"wave.py": "mine = True"}


def test_a_program_run_as_a_module_sends_its_package(look: Look, tmp_path: Path) -> None:
    write(tmp_path / "program", {"app/__init__.py": "", "app/other.py": ""})
    shown = look("from . import other\nshow()", name="app/main.py", arguments=["-m", "app.main"])
    assert shown["files"] == ["app/__init__.py", "app/main.py", "app/other.py"]


def test_modules_made_at_run_time_stay(look: Look) -> None:
    source = """
import types
class Strange(types.ModuleType):
    def __getattr__(self, name): raise RuntimeError(name)
sys.modules["made"] = types.ModuleType("made")
sys.modules["strange"] = Strange("strange")
sys.modules["no_module"] = 7
sys.modules["nothing"] = None
show()
"""
    assert look(source)["files"] == []


def test_a_lazy_module_is_not_loaded_by_looking(look: Look, tmp_path: Path) -> None:
    write(tmp_path / "program", {"slow.py": "raise RuntimeError('loaded')"})
    source = """
from importlib.util import LazyLoader, find_spec, module_from_spec
spec = find_spec("slow")
spec.loader = LazyLoader(spec.loader)
sys.modules["slow"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["slow"])
show()
"""
    assert look(source)["files"] == ["slow.py"]


# --- distributions ----------------------------------------------------------------------------------------------------


def install(site: Path, name: str, record: list[str], direct_url: object = None, installer: str = "pip") -> None:
    info = f"{name}-1.0.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/INSTALLER": installer + "\n",
        f"{info}/RECORD": "".join(f"{path},sha256=x,1\n" for path in [*record, f"{info}/METADATA"]),
    }
    if direct_url is not None:
        files[f"{info}/direct_url.json"] = json.dumps(direct_url)
    write(site, files)


ON_SITE = 'import site; site.addsitedir("{}")\n'


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages", "target"])
def test_a_distribution_from_an_index_stays(look: Look, tmp_path: Path, folder: str) -> None:
    site = write(tmp_path / folder, {"known/__init__.py": "", "known_too.py": ""})
    install(site, "known", ["known/__init__.py", "known_too.py"])
    assert look("import known, known_too\nshow()", site)["files"] == []


def test_what_lies_loose_among_distributions_stays(look: Look, tmp_path: Path) -> None:
    site = write(tmp_path / "site-packages", {"loose.py": ""})
    assert look("import loose\nshow()", site)["files"] == []


@pytest.mark.parametrize(
    ("direct_url", "installer", "travels"),
    [
        ({"url": "https://example.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "1"}}, "pip", True),
        ({"url": "file:///home/u/project", "dir_info": {}}, "uv", True),
        ({"url": "file:///home/u/mine-1.0-py3-none-any.whl", "archive_info": {}}, "pip", True),
        ({"url": "file:///home/conda/feedstock_root/work", "dir_info": {}}, "conda", False),
    ],
)
def test_a_distribution_from_elsewhere_travels(
    look: Look, tmp_path: Path, direct_url: object, installer: str, travels: bool
) -> None:
    site = write(tmp_path / "site-packages", {"mine/__init__.py": "", "mine/a.py": "", "other/__init__.py": ""})
    install(site, "mine", ["mine/__init__.py", "mine/a.py"], direct_url, installer)
    install(site, "other", ["other/__init__.py"])
    shown = look("import mine, other\nshow()", site)
    assert shown["files"] == (["mine-1.0.dist-info/METADATA", "mine/__init__.py", "mine/a.py"] if travels else [])


def test_an_editable_install_by_path_travels(look: Look, tmp_path: Path) -> None:
    project = write(tmp_path / "project", {"src/mine/__init__.py": "", "src/mine/a.py": ""})
    site = write(tmp_path / "site-packages", {"mine.pth": str(project / "src") + "\n"})
    install(site, "mine", ["mine.pth"], {"url": project.as_uri(), "dir_info": {"editable": True}})
    shown = look(ON_SITE.format(site) + "import mine\nshow()")
    assert shown["files"] == ["mine-1.0.dist-info/METADATA", "mine/__init__.py", "mine/a.py"]


FINDER = """
import sys
from importlib.util import spec_from_file_location
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "mine":
            folder = {!r}
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
def install(): sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize("imported", [True, False])
def test_an_editable_install_by_finder_travels(look: Look, tmp_path: Path, imported: bool) -> None:
    files = {"code/__init__.py": "import importlib.metadata as m\nversion = m.version('mine')", "code/a.py": ""}
    project = write(tmp_path / "project", files)
    site = write(
        tmp_path / "site-packages",
        {
            "__editable___mine_finder.py": FINDER.format(str(project / "code")),
            "__editable__.mine.pth": "import __editable___mine_finder; __editable___mine_finder.install()\n",
        },
    )
    record = ["__editable___mine_finder.py", "__editable__.mine.pth"]
    install(site, "mine", record, {"url": project.as_uri(), "dir_info": {"editable": True}})
    source = "import mine" if imported else "def job():\n    import mine"
    shown = look(f"{ON_SITE.format(site)}{source}\nshow()")
    assert shown["files"] == ["mine-1.0.dist-info/METADATA", "mine/__init__.py", "mine/a.py"]
    served = write(tmp_path / "served", shown["text"])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(served)!r}]; import mine; print(mine.version)"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "1.0\n", done.stderr


def test_a_virtual_environment_of_the_test_itself_is_installed() -> None:
    import pluggy

    assert pluggy.__file__ is not None
    assert not Origins().is_users("pluggy", pluggy.__file__)
    assert json.__file__ is not None
    assert not Origins().is_users("json", json.__file__)
    assert Origins().is_users("tests", str(REPO / "tests" / "__init__.py"))
    assert installed_packages()["pluggy"] == f"pluggy=={pluggy.__version__}"


# --- what stays -------------------------------------------------------------------------------------------------------


def test_compiled_modules_stay_and_it_is_told(look: Look, tmp_path: Path) -> None:
    compiled = EXTENSION_SUFFIXES[0]
    write(
        tmp_path / "lib",
        {"pkg/__init__.py": "", f"pkg/fast{compiled}": "", f"alone{compiled}": "", "mine.py": "def f(): import alone"},
    )
    shown = look("import pkg, mine\nshow()", tmp_path / "lib")
    assert shown["files"] == ["mine.py", "pkg/__init__.py"]
    assert list(shown["left_out"]) == [f"pkg/fast{compiled}"]
    assert sorted(shown["not_sent"]) == ["alone", "pkg.fast"]


def test_modules_in_an_archive_stay_and_it_is_told(look: Look, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("zipped.py", "x = 1")
    shown = look("import zipped\nshow()", tmp_path / "all.zip")
    assert shown["files"] == []
    assert "all.zip" in shown["not_sent"]["zipped"]


def test_large_data_and_strange_names_stay(look: Look, tmp_path: Path) -> None:
    write(tmp_path / "lib", {"pkg/__init__.py": "", "pkg/back\\slash.txt": "", "pkg/small.bin": "x" * MAX_DATA_BYTES})
    (tmp_path / "lib/pkg/large.bin").write_bytes(b"x" * (MAX_DATA_BYTES + 1))
    Path(os.fsdecode(os.fsencode(str(tmp_path / "lib/pkg/")) + b"/\xff.txt")).write_text("")
    os.mkfifo(tmp_path / "lib/pkg/pipe")
    shown = look("import pkg\nshow()", tmp_path / "lib")
    assert shown["files"] == ["pkg/__init__.py", "pkg/small.bin"]
    assert len(shown["left_out"]) == 3
    assert "1,000,000 bytes" in shown["left_out"]["pkg/large.bin"]


def test_links_are_followed_and_loops_end(look: Look, tmp_path: Path) -> None:
    package = write(tmp_path / "lib", {"pkg/__init__.py": "", "pkg/sub/a.py": "", "outside/b.py": ""}) / "pkg"
    (package / "sub" / "up").symlink_to(package)
    (package / "self").symlink_to("self")
    (package / "gone").symlink_to("nowhere")
    (package / "linked").symlink_to(tmp_path / "lib/outside")
    shown = look("import pkg\nshow()", tmp_path / "lib")
    assert shown["files"] == ["pkg/__init__.py", "pkg/linked/b.py", "pkg/sub/a.py"]


def test_the_whitelist_lets_only_its_names_travel(look: Look, tmp_path: Path) -> None:
    write(tmp_path / "program", {"a.py": "import b", "b.py": "", "lazy.py": "", "pkg/__init__.py": ""})
    shown = look("import a, pkg\nshow(True, ['a', 'lazy', 'json'])")
    assert shown["files"] == ["a.py", "lazy.py"]
    assert set(shown["not_sent"]) == {"b", "pkg"}


def test_switched_off_nothing_travels(look: Look, tmp_path: Path) -> None:
    write(tmp_path / "program", {"a.py": ""})
    shown = look("import a\nshow(False, [])")
    assert (shown["files"], shown["digest"]) == ([], "")
    assert "automatic_dependency_transfer" in shown["not_sent"]["a"]


# --- again and again --------------------------------------------------------------------------------------------------


def test_an_edited_file_gives_a_new_digest_and_new_behaviour(importable: Path, tmp_path: Path) -> None:
    write(importable, {"edited_mod.py": "def f(): return 1\n"})
    import edited_mod  # type: ignore[import-not-found]  # noqa: F401

    finder = CodeFinder(True, ["edited_mod"])
    first = finder.current()
    assert serve(first, tmp_path / "a", "import edited_mod; print(edited_mod.f())") == "1"
    write(importable, {"edited_mod.py": "def f(): return 2\n"})
    second = finder.current()
    assert second.digest != first.digest
    assert serve(second, tmp_path / "b", "import edited_mod; print(edited_mod.f())") == "2"
    with pytest.raises(SerializationError, match="edited_mod.py was changed") as caught:
        first.read("edited_mod.py")
    assert caught.value.retry


def test_an_edit_within_one_tick_of_the_clock_is_seen(importable: Path) -> None:
    file = write(importable, {"ticked_mod.py": "x = 1"}) / "ticked_mod.py"
    import ticked_mod  # type: ignore[import-not-found]  # noqa: F401

    finder = CodeFinder(True, ["ticked_mod"])
    digests = []
    for n in range(50):
        # In place and as long as before, as fast as it goes.
        file.write_text(f"x = {n % 10}")
        digests.append(finder.current().digest)
    assert all(before != after for before, after in zip(digests, digests[1:], strict=False))


def settled(finder: CodeFinder) -> CodeSet:
    """Wait until the finder trusts the files' times: what changed a moment ago is read again at every look."""
    deadline = time.monotonic() + 10
    while finder.current() is not (code := finder.current()):
        assert time.monotonic() < deadline
    return code


def test_new_files_and_new_modules_are_seen(importable: Path) -> None:
    write(importable, {"grown_pkg/__init__.py": "", "late_mod.py": ""})
    import grown_pkg  # type: ignore[import-not-found]  # noqa: F401

    finder = CodeFinder(True, ["grown_pkg", "late_mod"])
    write(importable, {"late_mod.py": "x = 1"})
    before = settled(finder)
    write(importable, {"grown_pkg/new.py": ""})
    after = settled(finder)
    assert [e.path for e in after.files] == ["grown_pkg/__init__.py", "grown_pkg/new.py", "late_mod.py"]
    assert before.digest != after.digest
    (importable / "grown_pkg/new.py").unlink()
    assert finder.current().digest == before.digest


def test_what_did_not_change_is_not_read_again(importable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(importable, {f"many_{n}.py": f"x = {n}" for n in range(20)})
    for n in range(20):
        __import__(f"many_{n}")
    finder = CodeFinder(True, [f"many_{n}" for n in range(20)])
    first = settled(finder)
    read: list[str] = []
    content = sys.modules["cloud.serialization.modules"]._read  # type: ignore[attr-defined]
    monkeypatch.setattr("cloud.serialization.modules._read", lambda path: read.append(path) or content(path))
    assert finder.current() is first
    (importable / "many_7.py").write_text("x = 70")
    assert finder.current().digest != first.digest
    assert read == [str(importable / "many_7.py")]


def test_equal_files_elsewhere_have_the_same_digest(look: Look, tmp_path: Path) -> None:
    files = {"same/__init__.py": "x = 1", "same/data.txt": "y"}
    digests = {look("import same\nshow()", write(tmp_path / name, files))["digest"] for name in ("a", "b")}
    assert len(digests) == 1


def test_the_digest_is_that_of_sorted_paths_and_hashes(importable: Path) -> None:
    write(importable, {"digest_mod.py": "x"})
    code = CodeFinder(True, ["digest_mod"]).current()
    sha256 = hashlib.sha256(b"x").hexdigest()
    assert code.digest == hashlib.sha256(f"digest_mod.py\0{sha256}\n".encode()).hexdigest()
    assert code.files == (("digest_mod.py", sha256, 1),)
    assert NO_CODE.digest == ""


# --- errors -----------------------------------------------------------------------------------------------------------


def test_too_many_bytes_name_the_largest_file(importable: Path) -> None:
    write(importable, {"heavy_pkg/__init__.py": "", "heavy_pkg/small.py": "x"})
    with open(importable / "heavy_pkg/large.py", "wb") as file:
        file.truncate(MAX_TOTAL_BYTES + 1)
    with pytest.raises(CodeRefused, match=r"The largest: 'heavy_pkg/large.py' \(50,000,001 bytes\)"):
        CodeFinder(True, ["heavy_pkg"]).current()


def test_too_many_files_name_the_folder(importable: Path) -> None:
    write(importable, {"full_pkg/__init__.py": "", "full_pkg/big.txt": "xyz"})
    write(importable, {f"full_pkg/images/{n}.txt": "" for n in range(MAX_FILES)})
    with pytest.raises(CodeRefused, match=r"'full_pkg/images' \(2,000 files\).*largest file: 'full_pkg/big.txt'"):
        CodeFinder(True, ["full_pkg"]).current()


def test_an_unreadable_file_is_named(importable: Path) -> None:
    write(importable, {"odd_pkg/__init__.py": ""})
    # Its permissions would not keep out a test that runs as root; reading address 0 fails for everyone.
    (importable / "odd_pkg/memory.txt").symlink_to("/proc/self/mem")
    with pytest.raises(SerializationError, match=r"odd_pkg/memory.txt is one of your modules.*cannot be read"):
        CodeFinder(True, ["odd_pkg"]).current()


def test_a_file_that_vanishes_while_we_look_is_no_error(importable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(importable, {"busy_pkg/__init__.py": "", "busy_pkg/4913": "", "busy_pkg/z.py": ""})
    content = sys.modules["cloud.serialization.modules"]._read  # type: ignore[attr-defined]

    def read(path: str) -> bytes:
        # What an editor does to see whether it may write there.
        if path.endswith("4913"):
            os.unlink(path)
        return content(path)  # type: ignore[no-any-return]

    monkeypatch.setattr("cloud.serialization.modules._read", read)
    code = CodeFinder(True, ["busy_pkg"]).current()
    assert [entry.path for entry in code.files] == ["busy_pkg/__init__.py", "busy_pkg/z.py"]


def test_threads_find_the_same(importable: Path) -> None:
    write(importable, {f"threaded_pkg/m{n}.py": f"x = {n}" for n in range(50)} | {"threaded_pkg/__init__.py": ""})
    finder = CodeFinder(True, ["threaded_pkg"])
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda _: finder.current().digest, range(64)))
    assert len(set(digests)) == 1
    assert len(finder.current().files) == 51


def test_errors_are_of_the_package() -> None:
    assert issubclass(CodeRefused, CloudException)
    assert issubclass(CodeRefused, ValueError)


# --- imports in sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a, b.c as d", ["a", "b.c"]),
        ("from a import (x,\n  y)", ["a.x", "a.y"]),
        ("from . import x", ["p.n.x"]),
        ("from ..q import x", ["p.q.x"]),
        ("from ....q import x", []),
        ("if 1: import a; import b", ["a", "b"]),
        ("import \\\n a", ["a"]),
        ("import known, \\\n a", ["known", "a"]),
        ("import importlib\nimportlib.import_module('a.b'); __import__('c')", ["importlib", "a.b", "c"]),
        ("import known, known.sub\nfrom known.x import *", []),
        ("'''\nimport nothing\n'''", []),
        ("import a\n)", []),
        ("import a\x00", []),
        ("import a # é", ["a"]),
    ],
)
def test_imports_are_read_from_source(source: str, names: list[str]) -> None:
    assert absolute_names(imported_by_source(source.encode(), {"known"}), "p.n.m", is_package=False) == names


def test_imports_are_read_from_code() -> None:
    def function() -> object:
        from json import dumps

        def inner() -> None:
            import colorsys  # noqa: F401

        return dumps, inner

    assert imported_by_code(function.__code__) == ["json", "colorsys"]


# --- what a server lacks ----------------------------------------------------------------------------------------------


def missing(name: str) -> ImportError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_package_names_its_distribution() -> None:
    text = explain_missing_module(missing("cv2.aruco"), {"cv2": "opencv-python==4.9"})
    assert "no module 'cv2.aruco'" in text
    assert "pip install 'opencv-python==4.9'" in text


def test_a_module_that_stayed_behind_is_told_with_the_reason() -> None:
    text = explain_missing_module(missing("pkg.fast"), {}, {"pkg.fast": "it is compiled"})
    assert "was not sent: it is compiled" in text
    assert "mine" in explain_missing_module(missing("mine.sub"), None, {"mine": "the list does not name it"})


def test_without_the_clients_facts_all_reasons_are_told() -> None:
    text = explain_missing_module(missing("strange"))
    for word in ("pip install", "automatic_dependency_transfer", "dependency_whitelist", "compiled"):
        assert word in text


def test_other_errors_are_not_explained() -> None:
    assert explain_missing_module(ImportError("cannot import name 'x'", name="json")) == ""
    assert explain_missing_module(ModuleNotFoundError("by hand")) == ""
    assert "standard library" in explain_missing_module(
        missing("distutils.core" if sys.version_info < (3, 12) else "json.x")
    )
    assert "'mine'" in explain_missing_module(PackageNotFoundError("mine"))
