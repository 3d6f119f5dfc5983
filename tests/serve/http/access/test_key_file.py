"""Keys that come and go while the server runs."""

from __future__ import annotations

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from calumma.jobs.commands.serve_keys import app as keys_command
from calumma.serve.http.access import key_file
from calumma.serve.http.access.api_keys import hash_key
from calumma.serve.http.access.key_file import KeyFile, add_key, revoke_key
from calumma.serve.http.app import create_app
from calumma.serve.settings import APIKey

from ...conftest import StubBackend
from ..conftest import CHAT, ask, stub_settings

RUNNER = CliRunner()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def status(server: TestClient, secret: str) -> int:
    return server.post(CHAT, json=ask(), headers={"Authorization": f"Bearer {secret}"}).status_code


def test_keys_are_added_and_revoked_while_the_server_runs_and_every_ingress_sees_it(path: Path) -> None:
    fixed = APIKey(name="fixed", sha256=hash_key("sk-fixed"))
    first = add_key(path, "first")
    settings = stub_settings(keys=(fixed,), keys_file=str(path))
    servers = [TestClient(create_app(StubBackend(), settings)) for _ in range(2)]
    second = add_key(path, "second", running=3)
    for server in servers:
        assert [status(server, key) for key in (first, second, "sk-fixed", "sk-other")] == [200, 200, 200, 401]
    revoke_key(path, "first")
    for server in servers:
        assert [status(server, key) for key in (first, second, "sk-fixed")] == [401, 200, 200]
    revoke_key(path, "second")
    for server in servers:  # nobody of the file is left; that opens it to nobody
        assert [status(server, key) for key in (first, second, "sk-fixed", "")] == [401, 401, 200, 401]
        assert server.get("/health").json()["keys"] is True


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sk-calumma-secret alice\n", "entry 1"),
        ("0" * 63, "entry 1"),
        ("", "is empty"),
        (None, "FileNotFoundError"),
        (f"{'1' * 64} a\n{'2' * 64} a\n", "the name a is given more than once"),
        (f"{'1' * 64} fixed\n", "the name fixed is given more than once"),
        (b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_a_file_that_is_no_good_changes_nothing_and_the_log_says_so_once(
    path: Path, text: str | bytes | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = add_key(path, "alice")
    good = path.read_text()
    keys = KeyFile(path, (APIKey(name="fixed", sha256="0" * 64),))
    with caplog.at_level(logging.WARNING, key_file.__name__):
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert [set(keys.keys()) for _ in range(3)] == [{hash_key(secret)}] * 3
        [record] = caplog.records
        assert says in record.message
        assert "sk-calumma-secret" not in record.message
        path.write_text(f"{good}{'3' * 64} bob\n")
        assert set(keys.keys()) == {hash_key(secret), "3" * 64}
        assert caplog.records[-1].message.endswith("added bob")


def test_a_server_does_not_start_with_a_file_that_is_no_good(path: Path) -> None:
    path.write_text("plain key\n")
    with pytest.raises(ValueError, match="entry 1"):
        TestClient(create_app(StubBackend(), stub_settings(keys_file=str(path)))).get("/health")


def test_a_change_that_leaves_size_and_time_as_they_were_is_seen(path: Path) -> None:
    path.write_text("1" * 64)
    keys = KeyFile(path)
    assert set(keys.keys()) == {"1" * 64}
    before = path.stat()
    path.write_text("2" * 64)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert set(keys.keys()) == {"2" * 64}


def test_a_file_that_has_not_changed_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("1" * 64)
    os.utime(path, (1e9, 1e9))
    keys = KeyFile(path)
    keys.keys()
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("read again"))
    assert set(keys.keys()) == {"1" * 64}


def test_edits_keep_what_else_the_file_has_and_its_mode_and_exclude_each_other(path: Path) -> None:
    path.write_text(f"# ours\n{'1' * 64} alice 4\n\n{'2' * 64}\n")
    path.chmod(0o640)
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda k: add_key(path, f"key-{k}"), range(16)))
    revoke_key(path, "2" * 8)
    lines = path.read_text().splitlines()
    assert lines[:3] == ["# ours", f"{'1' * 64} alice 4", ""]
    assert lines[3].startswith("# revoked: 22222222, ")
    assert {line.split()[0] for line in lines[4:]} == {hash_key(secret) for secret in secrets}
    assert path.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in path.parent.iterdir()] == ["keys"]
    with pytest.raises(ValueError, match="the name alice is given more than once"):
        add_key(path, "alice")
    with pytest.raises(ValueError, match="no key of the name 'nobody'; it has alice, key-0"):
        revoke_key(path, "nobody")
    assert path.read_text().splitlines() == lines


def test_the_command_adds_lists_and_revokes(path: Path) -> None:
    options = ["--running", "2", "--priority", "-3"]
    secret = RUNNER.invoke(keys_command, ["add", str(path), "alice", *options]).output.strip()
    assert path.read_text().splitlines()[1] == f"{hash_key(secret)} alice 2 priority=-3"
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in path.read_text()
    listed = RUNNER.invoke(keys_command, ["list", str(path)]).output
    assert re.search(rf"alice +{hash_key(secret)[:12]} +2 +-3\b", listed)
    assert RUNNER.invoke(keys_command, ["revoke", str(path), "alice"]).output == "revoked alice\n"
    again = RUNNER.invoke(keys_command, ["revoke", str(path), "alice"])
    assert (again.exit_code, "it has none" in again.output) == (1, True)
    assert RUNNER.invoke(keys_command, ["add", str(path), "a b"]).exit_code == 1
