"""hob.Client against the real application, over both kinds of socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hob.client import Client
from hob.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, ModelNotFound, Overloaded
from tests.api.conftest import Server, wait_for
from tests.api.scripted import ScriptedBackend, tokens_of


@pytest.fixture(params=["tcp", "unix"])
def hob_client(request: pytest.FixtureRequest, server: Server, backend: ScriptedBackend) -> Iterator[Client]:
    kwargs = {"base_url": server.url} if request.param == "tcp" else {"socket": server.socket_path}
    with Client(**kwargs, app="tests") as client:
        yield client


def test_every_method(hob_client: Client, backend: ScriptedBackend) -> None:
    assert hob_client.health()["status"] == "ok"
    assert [model["id"] for model in hob_client.models()] == ["scripted"]
    assert hob_client.stats()["stats"]["num_blocks"] == 64
    assert hob_client.chat("Hi")["choices"][0]["message"]["content"] == "Hello world"
    assert hob_client.complete("Hi", max_tokens=1)["choices"][0]["text"] == "Hello"
    assert hob_client.classify("I like it", ["good", "bad"])["label"] == "bad"
    assert hob_client.classify(None, ["a", "b"], prompt="x")["labels"][0]["label"] == "a"
    assert hob_client.embed(["a", "b"])[1] == pytest.approx([0.6, 0.8, 0.0])
    assert hob_client.tokenize("ab")["tokens"] == [97, 98]
    assert hob_client.tokenize(tokens=[97, 98])["text"] == "ab"
    assert {request.app.split("/")[1] for request in backend.requests} == {"tests"}


def test_streams(hob_client: Client, backend: ScriptedBackend) -> None:
    chunks = list(hob_client.chat([{"role": "user", "content": "Hi"}], stream=True, temperature=0))
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "Hello world"
    assert backend.requests[0].sampling.temperature == 0
    assert "".join(c["choices"][0]["text"] for c in hob_client.complete("Hi", stream=True)) == "Hello world"


def test_leaving_a_stream_cancels(hob_client: Client, backend: ScriptedBackend) -> None:
    backend.delay_s = 0.02
    backend.script = lambda request, index: tokens_of(" more" * 200)
    stream = hob_client.chat("Hi", stream=True)
    next(stream)
    stream.close()
    wait_for(lambda: backend.num_cancelled == 1, timeout_s=0.5)


def test_errors(hob_client: Client, backend: ScriptedBackend) -> None:
    with pytest.raises(ModelNotFound):
        hob_client.chat("Hi", model="gpt-4")
    with pytest.raises(InvalidRequest, match="temprature") as caught:
        hob_client.chat("Hi", temprature=1)
    assert caught.value.param == "temprature"
    with pytest.raises(ContextLengthExceeded):
        next(hob_client.chat("x" * 1000, stream=True))
    backend.refuse = Overloaded("full", retry_after_s=3)
    with pytest.raises(Overloaded) as refused:
        hob_client.chat("Hi")
    assert refused.value.retry_after_s == 3
    backend.refuse, backend.fail_after = None, 1
    stream = hob_client.chat("Hi", stream=True)
    assert [next(stream)["choices"][0]["delta"].get("content") for _ in range(2)] == ["", "Hello"]
    with pytest.raises(EngineUnavailable, match="died"):
        next(stream)
