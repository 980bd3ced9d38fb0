"""The application on real sockets: uvicorn on loopback TCP and on a Unix socket at once, over a scripted backend."""

from __future__ import annotations

import importlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from hob.api.app import create_app
from hob.api.protocol import HobProtocol
from hob.api.services import Services
from hob.config import Config, ServerConfig
from tests.api.scripted import ByteTokenizer, PlainChat, ScriptedBackend


class Server:
    """A running application and how to reach it."""

    backend: ScriptedBackend

    def __init__(self, app: Any, socket_path: Path) -> None:
        self.socket_path = socket_path
        config = uvicorn.Config(app, http=HobProtocol, lifespan="off", log_config=None)
        self._uvicorn = uvicorn.Server(config)
        tcp = socket.create_server(("127.0.0.1", 0))
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(socket_path))
        self.port = tcp.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [tcp, unix]}, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        wait_for(lambda: self._uvicorn.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until `condition` holds; fail if it does not in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not so within {timeout_s} s"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    backend = ScriptedBackend()
    config = Config(server=ServerConfig(max_body_bytes=1 << 20))
    app = create_app(Services(backend, ByteTokenizer(), PlainChat(), config, time.time()))
    with Server(app, tmp_path_factory.mktemp("api") / "hob.sock") as running:
        running.backend = backend
        yield running


@pytest.fixture
def backend(server: Server) -> ScriptedBackend:
    """The server's backend, as if new."""
    server.backend.reset()
    return server.backend


@pytest.fixture
def http(server: Server, backend: ScriptedBackend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(params=["tcp", "unix"])
def client(request: pytest.FixtureRequest, server: Server, backend: ScriptedBackend) -> Iterator[openai.OpenAI]:
    """The real openai client, over both kinds of socket."""
    kwargs: dict[str, Any] = {"base_url": server.url + "/v1", "api_key": "none", "max_retries": 0, "timeout": 10}
    if request.param == "unix":
        # openai brings its own httpx, under a name that depends on its version
        its_httpx = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
        transport = its_httpx.HTTPTransport(uds=str(server.socket_path))
        kwargs["http_client"] = openai.DefaultHttpxClient(transport=transport)
    with openai.OpenAI(**kwargs) as made:
        yield made
