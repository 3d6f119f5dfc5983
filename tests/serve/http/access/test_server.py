"""A server for others, as it really runs: in Ray Serve's proxy, with TLS, a file of keys, and limits on connections."""

from __future__ import annotations

import datetime
import ipaddress
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer import Typer
from typer.testing import CliRunner

from calumma.jobs.commands.chat import chat
from calumma.platform.cluster.head import Service
from calumma.serve.http.access.key_file import add_key, revoke_key
from calumma.serve.http.access.tls import require_certificate, session_for
from calumma.serve.http.app import create_app
from calumma.serve.settings import ServeSettings

from ...conftest import StubBackend, free_port, listening
from ..conftest import stub_settings

PATIENCE = 300.0  # seconds
Files = tuple[Path, Path]  # a certificate and its key


def certificate(folder: Path, name: str = "localhost") -> Files:
    """Signed by nobody but itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))] if name == "localhost" else []
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names or [x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return certificate(tmp_path)


@pytest.fixture
def settings(ray_cluster: None, files: Files, tmp_path: Path) -> Iterator[ServeSettings]:
    """Of a server that runs, without an engine behind it."""
    from ray import serve

    from calumma.serve.deploy.applications import build_ingress
    from calumma.serve.deploy.endpoint import start_http

    add_key(tmp_path / "keys", "alice")
    settings = stub_settings(
        host="0.0.0.0",
        port=free_port(),
        keys_file=str(tmp_path / "keys"),
        tls_certificate=str(files[0]),
        tls_key=str(files[1]),
        allowed_hosts=("api.example.org",),
        limits={"header_seconds": 1.0, "body_seconds": 1.0},
    )
    serve.shutdown()  # the endpoint of tests before this one, where none of them has ended it
    start_http(settings)
    serve.run(build_ingress(settings, {}), name="calumma-exposed", route_prefix="/")
    yield settings
    serve.shutdown()


@pytest.mark.cluster
def test_a_server_for_others_speaks_tls_to_those_with_keys_and_waits_for_nobody(
    settings: ServeSettings, files: Files
) -> None:
    url, path = settings.url, Path(settings.keys_file or "")
    assert url == f"https://127.0.0.1:{settings.port}"
    secret = add_key(path, "bob")

    def status(**headers: str) -> int:
        return requests.get(f"{url}/v1/models", headers=headers, verify=str(files[0]), timeout=PATIENCE).status_code

    mine = {"Authorization": f"Bearer {secret}"}
    assert status(**mine) == 200
    assert status() == 401
    assert status(**mine, Host="api.example.org") == 200
    assert status(**mine, Host="evil.example") == 421
    assert session_for(str(files[0])).get(f"{url}/v1/models", headers=mine, timeout=PATIENCE).ok
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(url, timeout=PATIENCE)
    with pytest.raises(requests.ConnectionError):
        requests.get(url.replace("https", "http"), timeout=PATIENCE)
    if curl := shutil.which("curl"):
        words = [curl, "--silent", "--cacert", str(files[0]), "-H", f"Authorization: Bearer {secret}"]
        answer = subprocess.run([*words, f"{url}/v1/models"], capture_output=True, check=True)
        assert json.loads(answer.stdout)["data"][0]["id"] == "tiny"
    revoke_key(path, "bob")
    assert status(**mine) == 401

    context = ssl.create_default_context(cafile=str(files[0]))
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    for half in (b"GET / HT", post, post + b"Authorization: Bearer x\r\nContent-Length: 9\r\n\r\n{"):
        with (
            socket.create_connection(("127.0.0.1", settings.port), timeout=PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as client,
        ):
            client.sendall(half)
            received = b""
            while data := client.recv(65536):
                received += data
        assert received.startswith(b"HTTP/1.1 401 " if b"Length" in half else b"HTTP/1.1 408 ")


def test_the_commands_know_the_server_of_this_machine_by_its_certificate(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever name it is for; another server in its place is not taken for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own, key = certificate(tmp_path, "gpu.example.org")
    command = Typer()
    command.command()(chat)
    with listening(create_app(StubBackend(), stub_settings()), ssl_certfile=own, ssl_keyfile=key) as address:
        url = address.replace("http:", "https:")
        for recorded, expected in ((own, 0), (files[0], 1), (None, 1)):
            Service(url, "m", "tiny", 0.0, "", certificate=str(recorded) if recorded else None).write()
            answer = CliRunner().invoke(command, ["--once", "hi"])
            assert answer.exit_code == expected
            assert ("seven" if recorded is own else "$REQUESTS_CA_BUNDLE") in answer.output


def test_files_that_are_no_certificate_are_told(files: Files, tmp_path: Path) -> None:
    own, key = files
    require_certificate(str(own), str(key))
    _, other = certificate(tmp_path, "other")
    (tmp_path / "text").write_text("hello")
    for pair in ((own, other), (key, own), (tmp_path / "text", key)):
        with pytest.raises(ValueError, match="are no certificate and its key in PEM files"):
            require_certificate(*map(str, pair))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        require_certificate(str(own), str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="both tls_certificate and tls_key"):
        stub_settings(tls_key=str(key))
