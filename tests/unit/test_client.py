"""The client: where it looks, what it says when nobody answers, whom it refuses to talk to."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import hob
from hob import unix_transport as module
from hob.client import Client
from hob.errors import DaemonUnreachable, HobError, InternalError, InvalidRequest, Overloaded, PermissionDenied

RETRY = "retry-after: 2\r\n"


class Canned:
    """Answers every connection on a Unix socket with the same bytes and keeps what it was sent."""

    def __init__(self, path: Path, reply: bytes) -> None:
        self.received = b""
        self.num_connections = 0
        self._reply = reply
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            with connection, connection.makefile("rb") as request:
                head = b"\n".join(iter(lambda: request.readline().strip(), b""))  # ends at an empty line or the end
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                self.received += head + request.read(int(length[1]) if length else 0)
                if head:
                    connection.sendall(self._reply)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hob.sock"


@pytest.fixture
def canned(path: Path, request: pytest.FixtureRequest) -> Iterator[Canned]:
    server = Canned(path, request.param)
    yield server
    server.close()


def reply(status: str, body: bytes, headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def test_is_loaded_lazily() -> None:
    code = "import sys, hob; assert 'httpx' not in sys.modules; hob.Client; assert 'httpx' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert hob.Client is Client
    assert hob.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = hob.nothing


def test_finds_the_socket_as_the_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOB_CONFIG", "")
    monkeypatch.delenv("HOB_SOCKET", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Client() as client:
        assert client.address == str(tmp_path / "hob" / "hob.sock")
    monkeypatch.setenv("HOB_SOCKET", str(tmp_path / "other.sock"))
    with Client() as client:
        assert client.address == str(tmp_path / "other.sock")


def test_nobody_answers(path: Path) -> None:
    with Client(path) as client, pytest.raises(DaemonUnreachable, match=r"hob\.sock.*hob serve"):
        client.health()
    path.touch()
    with Client(path) as client, pytest.raises(DaemonUnreachable, match="hob serve"):
        list(client.chat("Hi", stream=True))
    with Client(base_url="http://127.0.0.1:1") as client, pytest.raises(DaemonUnreachable, match="127.0.0.1:1"):
        client.models()


@pytest.mark.parametrize("canned", [reply("200 OK", b"{}")], indirect=True)
def test_a_server_of_another_user_is_sent_nothing(canned: Canned, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: os.stat(path).st_uid + 1)
    monkeypatch.setattr(module, "peer_uid", lambda sock: os.stat(path).st_uid + 2)
    with Client(path) as client, pytest.raises(PermissionDenied, match="Nothing was sent"):
        client.chat("a secret")
    for unknown in (None, 65534):
        monkeypatch.setattr(module, "peer_uid", lambda sock, uid=unknown: uid)
        with Client(path) as client, pytest.raises(PermissionDenied, match="Nothing was sent"):
            client.chat("a secret")
    monkeypatch.setattr(module, "peer_uid", lambda sock: 0)
    with Client(path) as client:
        client.chat("no secret")
    assert canned.num_connections == 4
    assert b"no secret" in canned.received
    assert b"a secret" not in canned.received


@pytest.mark.parametrize(
    ("canned", "expected", "param", "retry_after_s"),
    [
        (
            reply("400 x", b'{"error":{"message":"m","type":"t","param":"n","code":"invalid_request"}}'),
            InvalidRequest,
            "n",
            None,
        ),
        (
            reply(
                "503 x", b'{"error":{"message":"m","type":"t","param":null,"code":"overloaded"}}', "retry-after: 2\r\n"
            ),
            Overloaded,
            None,
            2.0,
        ),
        (reply("418 x", b'{"error":{"message":"m","type":"t","param":null,"code":"new"}}'), HobError, None, None),
    ],
    indirect=["canned"],
)
def test_errors_are_rebuilt(
    canned: Canned, path: Path, expected: type[HobError], param: str | None, retry_after_s: float | None
) -> None:
    with Client(path) as client, pytest.raises(expected, match="^m$") as caught:
        client.complete("a")
    assert (caught.value.param, caught.value.retry_after_s) == (param, retry_after_s)
    assert caught.value.status in (400, 503, 418)


@pytest.mark.parametrize("canned", [reply("200 OK", b"<html>")], indirect=True)
def test_a_reply_that_is_no_json(canned: Canned, path: Path) -> None:
    with Client(path) as client, pytest.raises(InternalError, match="no JSON"):
        client.stats()


@pytest.mark.parametrize("canned", [reply("200 OK", b'data: {"choices":[]}\n\n')], indirect=True)
def test_a_stream_that_breaks_off(canned: Canned, path: Path) -> None:
    with Client(path) as client:
        stream = client.chat("Hi", stream=True)
        assert next(stream) == {"choices": []}
        with pytest.raises(DaemonUnreachable, match="went away"):
            next(stream)


@pytest.mark.parametrize("canned", [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"], indirect=True)
def test_a_daemon_that_dies_within_its_reply(canned: Canned, path: Path) -> None:
    with Client(path) as client, pytest.raises(DaemonUnreachable, match="closed the connection"):
        client.chat("Hi")


@pytest.mark.parametrize("canned", [reply("200 OK", b'{"data":[]}')], indirect=True)
def test_proxies_of_the_environment_are_ignored(canned: Canned, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with Client(path, app="notes", service_class="background") as client:
        assert client.models() == []
    assert b"X-Hob-App: notes" in canned.received
    assert b"X-Hob-Class: background" in canned.received
