"""TLS: spoken by the server itself, demanded for other machines, and checked by the client."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import cloud
from cloud.errors import CloudException, ConfigurationError
from tests.server.raw import sent, tuned
from tests.server.running import ROOT, RunningServer

pytestmark = pytest.mark.usefixtures("closed_after")


def made_certificate(folder: Path, names: str) -> tuple[str, str]:
    """A self-signed certificate for these names, and its key, as paths."""
    folder.mkdir()
    paths = (str(folder / "cert.pem"), str(folder / "key.pem"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=cloud.example.test", "-addext", f"subjectAltName={names}"),
            *("-days", "2", "-out", paths[0], "-keyout", paths[1]),
        ],
        check=True,
        capture_output=True,
    )
    return paths


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return made_certificate(tmp_path_factory.mktemp("tls") / "right", "IP:127.0.0.1,DNS:localhost")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[str, str]) -> Iterator[RunningServer]:
    options = ("--tls-cert", certificate[0], "--tls-key", certificate[1])
    with RunningServer(tmp_path_factory.mktemp("served") / "data", *options) as server:
        yield server


def serve(*options: str) -> str:
    """What `cloud serve` says when it refuses these options."""
    done = subprocess.run(
        [sys.executable, "-m", "cloud", "serve", "--port", "0", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def handshake(server: RunningServer, context: ssl.SSLContext) -> str | None:
    plain = socket.create_connection(("127.0.0.1", server.port), 10)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
        return connection.version()


def test_a_client_works_over_tls(
    server: RunningServer, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.url.startswith("https://")
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    cloud.setkey(server.api_key, server.api_secretkey, server.url)
    try:
        assert cloud.result(cloud.call(lambda: "secret")) == "secret"
    finally:
        cloud.close()


def test_versions(server: RunningServer, certificate: tuple[str, str]) -> None:
    context = ssl.create_default_context(cafile=certificate[0])
    assert handshake(server, context) == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(server, context) == "TLSv1.2"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(server: RunningServer, certificate: tuple[str, str], version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=certificate[0])
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(server, context)


def test_a_client_refuses_a_certificate_that_nobody_it_trusts_has_signed(server: RunningServer) -> None:
    cloud.setkey(server.api_key, server.api_secretkey, server.url)
    try:
        with pytest.raises(CloudException, match="certificate"):
            cloud.call(lambda: 1)
    finally:
        cloud.close()


def test_a_client_refuses_a_certificate_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = made_certificate(tmp_path / "wrong", "DNS:cloud.example.test")
    monkeypatch.setenv("SSL_CERT_FILE", wrong[0])
    with RunningServer(tmp_path / "data", "--tls-cert", wrong[0], "--tls-key", wrong[1]) as server:
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        try:
            with pytest.raises(CloudException, match="certificate"):
                cloud.call(lambda: 1)
        finally:
            cloud.close()


def test_plain_http_gets_no_answer_where_tls_is_spoken(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        found = b""
        try:
            while piece := connection.recv(4096):
                found += piece
        except ConnectionError:
            pass
    assert b"HTTP/" not in found


def test_a_handshake_may_not_stop(tmp_path: Path, certificate: tuple[str, str]) -> None:
    options = ("--tls-cert", certificate[0], "--tls-key", certificate[1])
    with tuned(tmp_path / "data", *options, header_s=0.5) as server:
        for start in (b"", b"\x16\x03\x01"):
            began = time.monotonic()
            assert sent(server, start, 8.0)[2]
            assert time.monotonic() - began < 5


@pytest.mark.parametrize("url", ["http://cloud.example.test:8642", "http://192.0.2.1", "http://[2001:db8::1]:8642"])
def test_a_client_sends_no_key_in_clear_to_another_machine(url: str) -> None:
    cloud.setkey(1, "cld_x", url)
    try:
        with pytest.raises(ConfigurationError, match="https"):
            cloud.call(lambda: 1)
    finally:
        cloud.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "cloud.example.test"])
def test_other_machines_are_not_served_without_tls(tmp_path: Path, host: str) -> None:
    assert "--tls-cert" in serve("--host", host, "--data", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_certificate_without_its_key_is_refused(tmp_path: Path, certificate: tuple[str, str]) -> None:
    assert "belong together" in serve("--tls-cert", certificate[0], "--data", str(tmp_path / "data"))
    other = made_certificate(tmp_path / "other", "DNS:x")
    said = serve("--tls-cert", certificate[0], "--tls-key", other[1], "--data", str(tmp_path / "data"))
    assert "cannot be used" in said


def test_nothing_listens_but_what_was_asked_for(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data") as server:
        cloud.setkey(server.api_key, server.api_secretkey, server.url)
        try:
            assert cloud.result(cloud.map(abs, range(4))) == [0, 1, 2, 3]
            assert server.process is not None
            process = psutil.Process(server.process.pid)
            found = {
                (each.laddr.ip, each.laddr.port)
                for one in (process, *process.children(recursive=True))
                for each in one.net_connections("inet")
                if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM)
            }
        finally:
            cloud.close()
    assert found == {("127.0.0.1", server.port)}
