"""``cloud admin``: the operator's commands, beside a server that runs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloud.cli import main
from cloud.errors import AccountError
from cloud.resources import accounts, backup
from cloud.resources.accounts import AccountStore, Quotas, Role
from cloud.resources.backup import back_up
from cloud.server.audit import AuditLog, records, verify
from tests.unit.test_cli import at_a_terminal

Admin = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_PASSWORD_COST", (2, 1, 1))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data: Path) -> Iterator[AccountStore]:
    """The accounts as the server has them open."""
    store = AccountStore(str(data))
    assert store.bootstrap()
    yield store
    store.close()


@pytest.fixture
def admin(store: AccountStore, data: Path, capsys: pytest.CaptureFixture[str]) -> Admin:
    def admin(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["admin", "--data", str(data), *words])
        out, err = capsys.readouterr()
        return code, out, err

    return admin


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def actions(data: Path) -> list[tuple[str, Any]]:
    return [(each["action"], each["target"]) for each in records(str(data / "audit.log"))]


def store_file(folder: Path, name: str, content: bytes) -> None:
    """Keep contents as the stores do: the immutable file first, then the row that names it."""
    digest = hashlib.sha256(content).hexdigest()
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / digest).write_bytes(content)
    with closing(sqlite3.connect(folder / "names.sqlite3", isolation_level=None)) as db:
        db.execute("CREATE TABLE IF NOT EXISTS file (name TEXT, digest TEXT)")
        db.execute("INSERT INTO file VALUES (?, ?)", (name, digest))


def stored_files(folder: Path) -> dict[str, bytes]:
    with closing(sqlite3.connect(folder / "names.sqlite3")) as db:
        found = db.execute("SELECT name, digest FROM file").fetchall()
    return {name: (folder / "blobs" / digest).read_bytes() for name, digest in found}


class TestWorkgroups:
    def test_from_beginning_to_end(self, admin: Admin, store: AccountStore, data: Path) -> None:
        assert admin("workgroup", "add", "lab") == (0, "", "")
        assert admin("workgroup", "quota", "lab", "max_slots=4", "max_file_bytes=1000")[0] == 0
        assert store.list_workgroups()[1].quotas == Quotas(max_slots=4, max_file_bytes=1000)
        assert admin("workgroup", "quota", "lab", "max_slots=none")[1].splitlines()[0] == "max_slots=none"
        code, out, _err = admin("workgroup", "quota", "lab", "--json")
        assert json.loads(out)["quotas"]["max_file_bytes"] == 1000
        assert admin("workgroup", "suspend", "lab")[0] == 0
        code, out, _err = admin("workgroup", "list")
        assert code == 0
        assert [line.split() for line in out.splitlines()] == [
            ["id", "workgroup", "suspended", "quotas"],
            ["1", "main", "no", "none"],
            ["2", "lab", "yes", "max_file_bytes=1000"],
        ]
        assert admin("workgroup", "suspend", "lab", "--undo")[0] == 0
        assert [each["suspended"] for each in json.loads(admin("workgroup", "list", "--json")[1])] == [False, False]
        assert actions(data) == [
            ("admin.workgroup.add", "lab"),
            ("admin.workgroup.quota", "lab"),
            ("admin.workgroup.quota", "lab"),
            ("admin.workgroup.suspend", "lab"),
            ("admin.workgroup.suspend", "lab"),
        ]

    def test_what_goes_wrong(self, admin: Admin, data: Path) -> None:
        assert "there is a workgroup 'main' already" in admin("workgroup", "add", "main")[2]
        assert admin("workgroup", "suspend", "nowhere")[0] == 1
        assert admin("workgroup", "quota", "nowhere") == (1, "", "cloud: there is no workgroup 'nowhere'\n")
        for bad in ("max_slots", "max_slots=", "max_slots=-1", "max_slots=4.5", "max_slots=" + "9" * 19):
            code, out, err = admin("workgroup", "quota", "main", bad)
            assert (code, out) == (2, "")
            assert "is no quota: write QUOTA=NUMBER" in err
        assert "there is no quota 'slots'" in admin("workgroup", "quota", "main", "slots=4")[2]
        assert not (data / "audit.log").exists()


class TestUsers:
    def test_from_beginning_to_end(
        self, admin: Admin, store: AccountStore, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        type_in(monkeypatch, "correct horse\n")
        assert admin("user", "add", "ada", "--workgroup", "main", "--role", "read_only") == (0, "", "")
        found = store.verify_password("ada", "correct horse")
        assert found is not None
        assert found.role is Role.READ_ONLY
        assert admin("user", "role", "ada", "member")[0] == 0
        type_in(monkeypatch, " other \r\n")
        assert admin("user", "password", "ada") == (0, "", "")
        assert store.verify_password("ada", " other ")
        assert admin("user", "deactivate", "ada")[0] == 0
        assert store.verify_password("ada", " other ") is None
        code, out, _err = admin("user", "list", "--workgroup", "main")
        assert [line.split()[:4] for line in out.splitlines()[1:]] == [
            ["admin", "main", "admin", "yes"],
            ["ada", "main", "member", "no"],
        ]
        assert admin("user", "deactivate", "ada", "--undo")[0] == 0
        users = json.loads(admin("user", "list", "--json")[1])
        assert [(user["name"], user["role"], user["active"]) for user in users] == [
            ("admin", "admin", True),
            ("ada", "member", True),
        ]
        assert admin("user", "list", "--workgroup", "x") == (0, "", "")
        text = (data / "audit.log").read_text()
        assert "horse" not in text
        assert "other" not in text

    def test_what_goes_wrong(self, admin: Admin, store: AccountStore, monkeypatch: pytest.MonkeyPatch) -> None:
        for words, text in (
            (("add", "ada", "--workgroup", "nowhere"), "there is no workgroup 'nowhere'"),
            (("add", "admin", "--workgroup", "main"), "there is a user 'admin' already"),
            (("password", "nobody"), "there is no user 'nobody'"),
            (("role", "nobody", "admin"), "there is no user 'nobody'"),
            (("deactivate", "nobody"), "there is no user 'nobody'"),
        ):
            type_in(monkeypatch, "p\n")
            code, out, err = admin("user", *words)
            assert (code, out) == (1, "")
            assert text in err
        type_in(monkeypatch, "")
        assert "a password must have 1 to 1024 characters" in admin("user", "add", "ada", "--workgroup", "main")[2]
        assert admin("user", "add", "ada", "--workgroup", "main", "--role", "king")[0] == 2
        assert admin("user", "add", "ada")[0] == 2
        assert admin("user", "role", "admin", "king")[0] == 2
        assert [user.name for user in store.list_users()] == ["admin"]

    @pytest.mark.parametrize(("typed", "code"), [("horse\nhorse\n", 0), ("horse\nhouse\n", 1)])
    def test_a_password_is_asked_for_twice_and_not_shown(
        self, store: AccountStore, data: Path, typed: str, code: int
    ) -> None:
        found, shown = at_a_terminal(["admin", "--data", str(data), "user", "password", "admin"], typed)
        assert found == code, shown
        assert "horse" not in shown
        assert (store.verify_password("admin", "horse") is not None) == (code == 0)


class TestKeys:
    def test_from_beginning_to_end(self, admin: Admin, store: AccountStore, data: Path) -> None:
        code, out, _err = admin("key", "create", "admin", "--scopes", "read, kill", "--expires", "30d", "--note", "ci")
        assert code == 0
        number, secret = (line.split(" = ")[1] for line in out.splitlines())
        found = store.verify_key(int(number), secret)
        assert found is not None
        assert found.scopes == {"read", "kill"}
        key = store.list_keys("admin")[1]
        assert key.expires is not None
        assert abs(key.expires - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)
        made = json.loads(admin("key", "create", "admin", "--expires", "2099-12-31", "--json")[1])
        assert (made["expires"], made["user"]) == ("2099-12-31T00:00:00+00:00", "admin")
        assert store.verify_key(made["api_key"], made["api_secretkey"])
        assert admin("key", "revoke", number) == (0, "", "")
        assert store.verify_key(int(number), secret) is None
        lines = [line.split() for line in admin("key", "list")[1].splitlines()]
        assert [line[:4] for line in lines[1:]] == [
            ["1", "admin", "active", "submit,read,kill,files,cron,admin"],
            ["2", "admin", "revoked", "read,kill"],
            ["3", "admin", "active", "submit,read,kill,files,cron,admin"],
        ]
        listed = json.loads(admin("key", "list", "admin", "--json")[1])
        assert [each["revoked"] for each in listed] == [False, True, False]
        assert not any("api_secretkey" in each for each in listed)
        text = (data / "audit.log").read_text()
        assert "cld_" not in text
        assert [action for action, _target in actions(data)] == [
            "admin.key.create",
            "admin.key.create",
            "admin.key.revoke",
        ]

    def test_what_goes_wrong(self, admin: Admin, store: AccountStore) -> None:
        for words, code, text in (
            (("create", "nobody"), 1, "there is no user 'nobody'"),
            (("create", "admin", "--scopes", "root"), 2, "there is no scope 'root'"),
            (("create", "admin", "--expires", "soon"), 2, "'soon' is no time: write such as 12h"),
            (("create", "admin", "--expires", "2001-01-01"), 2, "in the future"),
            (("revoke", "99"), 1, "there is no API key 99"),
            (("revoke", "x"), 2, "invalid int value"),
            (("list", "nobody"), 1, "there is no user 'nobody'"),
        ):
            found, out, err = admin("key", *words)
            assert (found, out) == (code, "")
            assert text in err
        assert len(store.list_keys("admin")) == 1

    def test_notes_do_not_speak_to_the_terminal(self, admin: Admin, store: AccountStore) -> None:
        store.set_key_note("admin", 1, "\x1b]0;owned\x07\n\u202e")
        out = admin("key", "list")[1]
        assert "\x1b" not in out
        assert "\\x1b]0;owned\\x07\\n\\u202e" in out


class TestAudit:
    def test_show_and_verify(self, admin: Admin, data: Path) -> None:
        code, out, err = admin("audit", "show")
        assert (code, out) == (2, "")
        assert "there is no audit log yet" in err
        log = AuditLog(str(data / "audit.log"))
        log.record("ada", 7, "192.0.2.7", "kill", [1, 2], label="\x1b[2J")
        log.close()
        admin("workgroup", "add", "lab")
        code, out, _err = admin("audit", "show")
        first, second = out.splitlines()
        assert "192.0.2.7  ada key 7  kill  [1, 2] label=\\x1b[2J" in first
        assert "operator " in second
        assert admin("audit", "show", "--last", "1")[1] == f"{second}\n"
        assert len(json.loads(admin("audit", "show", "--json")[1])) == 2
        assert admin("audit", "show", "--last", "0")[0] == 2
        code, out, _err = admin("audit", "verify")
        assert (code, out) == (0, f"2 lines are sound; head {verify(str(data / 'audit.log')).head}\n")

    def test_a_changed_line(self, admin: Admin, data: Path) -> None:
        admin("workgroup", "add", "lab")
        admin("workgroup", "add", "lob")
        path = data / "audit.log"
        path.write_bytes(path.read_bytes().replace(b'"lob"', b'"lub"') + b"\x1b garbage\n")
        code, out, _err = admin("audit", "verify")
        assert (code, out) == (1, "line 2 is bad: it was changed: its hash is another\n")
        assert json.loads(admin("audit", "verify", "--json")[1])["bad_line"] == 2
        assert admin("audit", "show")[1].splitlines()[2] == "(line 3 cannot be read)"


class TestData:
    def test_a_folder_is_needed_and_not_made(
        self, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["admin", "user", "list"]) == 2
        assert f"{home / 'server'} is not the data folder of a server" in capsys.readouterr().err
        missing = tmp_path / "typo"
        for words in (["user", "list"], ["workgroup", "add", "x"], ["backup", str(tmp_path / "copy")]):
            assert main(["admin", *words, "--data", str(missing)]) == 2
            assert f"{missing} is not the data folder of a server" in capsys.readouterr().err
        assert list(tmp_path.glob("*")) == [tmp_path / "home"]

    def test_it_may_follow_the_command(self, store: AccountStore, data: Path) -> None:
        assert main(["admin", "workgroup", "add", "lab", "--data", str(data)]) == 0
        assert len(store.list_workgroups()) == 2


class TestBackup:
    def test_it_can_be_started_from(self, admin: Admin, store: AccountStore, data: Path, tmp_path: Path) -> None:
        code, out, _err = admin("key", "create", "admin", "--json")
        key = json.loads(out)
        group = data / "groups" / "1"
        store_file(group / "files", "results", b"x" * 3_000_000)
        (group / "files" / "incoming").mkdir()
        # The modules of users may be called anything.
        (group / "code" / "abc" / "lock").mkdir(parents=True)
        for name in ("incoming", ".hidden", "x.sqlite3", "x.tmp", "lock/scratch"):
            (group / "code" / "abc" / name).write_bytes(b"module")
            (group / "code" / "abc" / name).chmod(0o444)
        (group / "code" / "abc").chmod(0o755)
        (group / "code" / ".part-x").mkdir()
        (group / "scratch").mkdir()
        for folder in (data, group / "scratch", group / "code" / ".part-x", group / "files" / "incoming"):
            (folder / "lock").touch()
        code, out, _err = admin("backup", str(tmp_path / "copy"), "--json")
        assert code == 0
        copy = tmp_path / "copy"
        assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()) == sorted(
            str(path.relative_to(data)) for path in data.rglob("*") if path.is_file() and path.name != "lock"
        )
        for path in copy.rglob("*"):
            expected = stat.S_IMODE((data / path.relative_to(copy)).stat().st_mode)
            is_database = path.name.endswith(".sqlite3") and "code" not in path.parts
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if is_database else expected)
        assert stat.S_IMODE(copy.stat().st_mode) == 0o700
        assert json.loads(out)["size_bytes"] > 3_000_000
        restored = AccountStore(str(copy))
        assert restored.verify_key(key["api_key"], key["api_secretkey"])
        restored.close()
        assert stored_files(copy / "groups" / "1" / "files") == {"results": b"x" * 3_000_000}
        assert actions(data)[-1] == ("admin.backup", str(copy))

    @pytest.mark.parametrize("mode", ["WAL", "DELETE"])
    def test_databases_are_copied_whole_while_they_are_written(self, tmp_path: Path, mode: str) -> None:
        folder = tmp_path / "source"
        folder.mkdir()
        with closing(sqlite3.connect(folder / "jobs.sqlite3", isolation_level=None)) as db:
            db.execute(f"PRAGMA journal_mode = {mode}")
            db.execute("CREATE TABLE pair (a INTEGER, b INTEGER, filler BLOB)")
            db.execute("INSERT INTO pair VALUES (0, 0, randomblob(2000000))")
        stop, begun = threading.Event(), threading.Event()

        def write() -> None:
            with closing(sqlite3.connect(folder / "jobs.sqlite3", isolation_level=None, timeout=30)) as db:
                n = 0
                while not stop.is_set():
                    n += 1
                    db.execute("BEGIN IMMEDIATE")
                    db.execute("INSERT INTO pair VALUES (?, 0, randomblob(3000))", (n,))
                    db.execute("UPDATE pair SET b = a WHERE a = ?", (n,))
                    db.execute("COMMIT")
                    if n == 20:
                        begun.set()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert begun.wait(30)
            for number in range(3):
                back_up(str(folder), str(tmp_path / f"copy {number}"))
        finally:
            stop.set()
            writer.join()
        n_rows = []
        for number in range(3):
            copy = tmp_path / f"copy {number}"
            assert [path.name for path in copy.iterdir()] == ["jobs.sqlite3"]
            with closing(sqlite3.connect(copy / "jobs.sqlite3")) as db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert db.execute("SELECT count(*) FROM pair WHERE a != b").fetchone() == (0,)
                assert db.execute("SELECT count(*) - 1 - max(a) FROM pair").fetchone() == (0,)
                n_rows.append(db.execute("SELECT count(*) FROM pair").fetchone()[0])
        assert n_rows[0] > 20
        assert n_rows == sorted(n_rows)

    def test_files_that_come_during_the_copy_are_in_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tmp_path / "source"
        store_file(source, "early", b"1")
        copy_database = backup._copy_database

        def slow(path: Path, target: Path) -> None:
            store_file(source, "late", b"2")
            copy_database(path, target)

        monkeypatch.setattr(backup, "_copy_database", slow)
        back_up(str(source), str(tmp_path / "copy"))
        assert stored_files(tmp_path / "copy") == {"early": b"1", "late": b"2"}

    def test_a_set_of_modules_removed_meanwhile_is_not_there_in_part(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = tmp_path / "source" / "groups" / "1" / "code"
        for name in ("kept", "removed"):
            (code / name).mkdir(parents=True)
            (code / name / "module.py").write_text("x = 1")
        copy_files = backup._copy_files

        def remove_then_copy(*args: Any) -> None:
            copy_files(*args)
            if (code / "removed").exists():
                (code / "removed").rename(code / ".part-1")

        monkeypatch.setattr(backup, "_copy_files", remove_then_copy)
        back_up(str(tmp_path / "source"), str(tmp_path / "copy"))
        assert [path.name for path in (tmp_path / "copy" / "groups" / "1" / "code").iterdir()] == ["kept"]

    def test_only_regular_files_are_copied(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        (source / "files" / "incoming").mkdir(parents=True)
        for name in ("kept", ".part-half", ".private-x", "x.sqlite3-wal", "x.sqlite3-journal", "files/incoming/half"):
            (source / name).write_bytes(b"x")
        os.mkfifo(source / "pipe")
        (source / "link").symlink_to("/etc/passwd")
        assert back_up(str(source), str(tmp_path / "copy")) == (1, 1)
        assert [path.name for path in (tmp_path / "copy").iterdir()] == ["kept"]

    def test_where_it_must_not_go(self, admin: Admin, data: Path, tmp_path: Path) -> None:
        for inside in (data, data / "copy", data / "groups" / "x"):
            assert "lies within" in admin("backup", str(inside))[2]
        (tmp_path / "there").mkdir()
        code, out, err = admin("backup", str(tmp_path / "there"))
        assert (code, out) == (1, "")
        assert "there exists: choose a folder that does not" in err

    def test_a_copy_that_fails_never_looks_complete(self, store: AccountStore, data: Path, tmp_path: Path) -> None:
        (data / "broken.sqlite3").write_bytes(b"not a database at all, sorry" * 500)
        with pytest.raises(AccountError.__mro__[1], match=r"broken\.sqlite3 cannot be copied"):
            back_up(str(data), str(tmp_path / "copy"))
        assert not (tmp_path / "copy").exists()
        (data / "broken.sqlite3").unlink()
        assert back_up(str(data), str(tmp_path / "copy"))[0] == 2
        assert not (tmp_path / "copy.partial").exists()
