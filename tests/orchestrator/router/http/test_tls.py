"""TLS of the HTTP API as clients meet it: openssl, curl, the openai package, certificates that change, clients with certificates."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from orchestrator.config.router_spec import TlsConfig
from orchestrator.router.http import tls
from orchestrator.router.http.connections import Connections
from tests.support.scripted_router import ServedDoor
from workers.protocol.errors import ConfigError

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def openssl(*arguments: str, send: str | None = None) -> str:
    ran = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=20, input=send or "", check=False)
    return ran.stdout + ran.stderr


def certificate(folder: Path, name: str, *, issuer: str = "") -> Path:
    """NAME.pem and NAME.key for localhost, by itself or by the certificate ISSUER."""
    folder.mkdir(exist_ok=True)
    signed = ["-CA", f"{folder}/{issuer}.pem", "-CAkey", f"{folder}/{issuer}.key"] if issuer else []
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={name}",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem", *signed,
    )  # fmt: skip
    return folder / f"{name}.pem"


def config(folder: Path, name: str, client_ca: str = "") -> TlsConfig:
    return TlsConfig(cert=f"{folder}/{name}.pem", key=f"{folder}/{name}.key", client_ca=client_ca and f"{folder}/{client_ca}.pem")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificates")
    for name in ("server", "other", "ca"):
        certificate(path, name)
    certificate(path, "client", issuer="ca")
    return path


@pytest.fixture(scope="module")
def door(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("tokenizer"), tls=config(folder, "server")) as served:
        yield served


@pytest.mark.parametrize(("version", "spoken"), [("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2"), ("-tls1_1", "")])
def test_openssl_speaks_1_2_and_later(door: ServedDoor, folder: Path, version: str, spoken: str) -> None:
    old = ["-cipher", "DEFAULT@SECLEVEL=0"] if not spoken else []
    shown = openssl(
        "s_client", "-connect", f"127.0.0.1:{door.port}", "-CAfile", f"{folder}/server.pem", "-alpn", "h2,http/1.1", version, *old,
        "-ign_eof", send="GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    )  # fmt: skip
    assert ("HTTP/1.1 200 OK" in shown) == bool(spoken)
    if spoken:
        assert f"Protocol  : {spoken}" in shown or f"New, {spoken}" in shown
        assert "Verify return code: 0" in shown and "ALPN protocol: http/1.1" in shown


@pytest.mark.parametrize("flags", [(), ("--http2",), ("--http1.0",), ("--tls-max", "1.2")])
def test_curl(door: ServedDoor, folder: Path, flags: tuple[str, ...]) -> None:
    command = ["curl", "-sS", "--cacert", f"{folder}/server.pem", "-H", "content-type: application/json", "-d", json.dumps(BODY), *flags]
    ran = subprocess.run([*command, f"https://localhost:{door.port}{CHAT}"], capture_output=True, text=True, timeout=20, check=True)
    assert json.loads(ran.stdout)["choices"][0]["message"]["content"] == "Hello, world"


def test_the_openai_package_streams(door: ServedDoor, folder: Path) -> None:
    context = ssl.create_default_context(cafile=f"{folder}/server.pem")
    with httpx.Client(verify=context) as http:
        client = openai.OpenAI(base_url=f"https://localhost:{door.port}/v1", api_key="x", http_client=http)
        stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello, world"


def test_new_files_serve_new_connections_and_broken_ones_change_nothing(folder: Path, tmp_path: Path) -> None:
    for end in ("pem", "key"):
        shutil.copy(folder / f"server.{end}", tmp_path / f"used.{end}")
    used = config(tmp_path, "used")
    with ServedDoor(tmp_path, tls=used) as door:

        def served(name: str) -> bool:
            return f"CN={name}" in openssl("s_client", "-connect", f"127.0.0.1:{door.port}").replace(" = ", "=")

        assert door.tls is not None and served("server")
        kept = httpx.Client(base_url=f"https://localhost:{door.port}", verify=ssl.create_default_context(cafile=f"{folder}/server.pem"))
        with kept:
            assert kept.get("/health").status_code == 200
            (tmp_path / "used.pem").write_text("no certificate")
            door.tls.refresh()
            assert served("server")
            for end in ("pem", "key"):
                shutil.copy(folder / f"other.{end}", tmp_path / f"used.{end}")
            door.tls.refresh()
            assert served("other")
            assert kept.get("/health").status_code == 200, "connections that are open stay so"


def test_clients_without_a_certificate_of_the_issuer_are_out(folder: Path, tmp_path: Path) -> None:
    with ServedDoor(tmp_path, tls=config(folder, "server", client_ca="ca")) as door:

        def ask(name: str) -> int:
            context = ssl.create_default_context(cafile=f"{folder}/server.pem")
            if name:
                context.load_cert_chain(f"{folder}/{name}.pem", f"{folder}/{name}.key")
            with httpx.Client(verify=context) as http:
                return http.get(f"https://localhost:{door.port}/health").status_code

        assert ask("client") == 200
        for name in ("", "other"):
            with pytest.raises(httpx.TransportError):
                ask(name)
        assert ask("client") == 200


def test_a_slow_or_wrong_handshake_delays_nobody_and_ends(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_S", 0.5)
    monkeypatch.setattr(Connections, "of_this_process", classmethod(lambda cls, trusted: cls(40, 20, trusted)))
    with ServedDoor(tmp_path, tls=config(folder, "server")) as door, httpx.Client(verify=False) as http:
        idle = [socket.create_connection(("127.0.0.1", door.port), timeout=10) for _ in range(19)]
        idle[0].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle[0].recv(1024)[:1] in (b"", b"\x15"), "closed, or a TLS alert"
        assert http.get(f"{door.url}/health").status_code == 200
        over = [socket.create_connection(("127.0.0.1", door.port), timeout=10) for _ in range(3)]
        assert b"" in [connection.recv(1) for connection in over[-1:]], "connections without a handshake count too"
        for connection in idle[1:]:
            assert connection.recv(1) == b"", "given up"
            connection.close()
        for connection in over:
            connection.close()
        until = time.monotonic() + 5
        while time.monotonic() < until and http.get(f"{door.url}/health").status_code != 200:
            time.sleep(0.05)
        assert http.get(f"{door.url}/health").status_code == 200
        idle[0].close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: (path / "a.pem").unlink(), "no such file"),
        (lambda path: (path / "a.pem").write_text("x"), "certificate or its key"),
        (lambda path: shutil.copy(path / "b.pem", path / "a.pem"), "mismatch"),
        (lambda path: (path / "a.key").chmod(0o644), "readable by others"),
        (lambda path: (path / "a.key").unlink(), "cannot read"),
        (lambda path: (path / "b.pem").write_text(""), "client_ca"),
    ],
)
def test_files_that_cannot_be_used_are_named(folder: Path, tmp_path: Path, change: object, said: str) -> None:
    for name, copy in (("server", "a"), ("other", "b")):
        for end in ("pem", "key"):
            shutil.copy(folder / f"{name}.{end}", tmp_path / f"{copy}.{end}")
    tls.make_context(config(tmp_path, "a", client_ca="b"))
    change(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        tls.make_context(config(tmp_path, "a", client_ca="b"))
    assert said in f"{caught.value.what} {caught.value.why}".lower()
