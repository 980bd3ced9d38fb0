"""Ollama's API, asked by its own Python client, unchanged."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from hob.api.app import create_app
from hob.api.services import ServedModel, Services
from hob.api.shelf import Installed, Library, ModelShelf
from hob.config import Config
from hob.errors import Overloaded
from hob.messages import MemoryStats, ModelInfo, ModelSpec, ModelStats, Need, Stats
from tests.api.conftest import Server
from tests.api.scripted import MODEL, ByteTokenizer, PlainChat, ScriptedBackend, tokens_of
from tests.daemons import running
from tests.needs import needs

needs("ollama")
import ollama  # noqa: E402

ASK = [{"role": "user", "content": "Hi"}]
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture
def client(server: Server, backend: ScriptedBackend) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url, timeout=10) as made:
        yield made


def test_chat(client: ollama.Client, backend: ScriptedBackend) -> None:
    backend.num_cached = 3
    reply = client.chat(model="scripted", messages=ASK)
    assert reply.message.content == "Hello world"
    assert (reply.done, reply.done_reason, reply.model) == (True, "stop", MODEL.name)
    assert (reply.prompt_eval_count, reply.eval_count) == (len("user: Hi\nassistant:"), 2)
    assert reply.total_duration > 0
    params = backend.requests[0].sampling
    assert (params.temperature, params.top_k, params.top_p) == (0.8, 40, 0.9)


def test_chat_streamed(client: ollama.Client) -> None:
    parts = list(client.chat(model="scripted:latest", messages=ASK, stream=True))
    assert [part.message.content for part in parts] == ["Hello", " world", ""]
    assert [part.done for part in parts] == [False, False, True]
    assert parts[-1].eval_count == 2


def test_generate(client: ollama.Client, backend: ScriptedBackend) -> None:
    options = {"temperature": 0, "seed": 7, "num_predict": 9, "stop": ["."], "num_ctx": 256, "repeat_penalty": 1.1}
    reply = client.generate(model="scripted", prompt="Hi", system="Be brief.", options=options, keep_alive="5m")
    assert reply.response == "Hello world"
    request = backend.requests[0]
    assert bytes(request.token_ids).decode() == "system: Be brief.\nuser: Hi\nassistant:"
    params = request.sampling
    assert (params.temperature, params.seed, params.max_tokens, params.repetition_penalty) == (0, 7, 9, 1.1)
    client.generate(model="scripted", prompt="Hi", raw=True, options={"num_predict": -1})
    assert bytes(backend.requests[1].token_ids) == b"Hi"


def test_generate_streamed(client: ollama.Client) -> None:
    parts = list(client.generate(model="scripted", prompt="Hi", stream=True))
    assert "".join(part.response for part in parts) == "Hello world"
    assert parts[-1].done


def test_format(client: ollama.Client, backend: ScriptedBackend) -> None:
    client.chat(model="scripted", messages=ASK, format="json")
    client.chat(model="scripted", messages=ASK, format={"type": "object", "properties": {"a": {"type": "null"}}})
    grammars = [request.grammar.lark for request in backend.requests if request.grammar is not None]
    assert len(grammars) == 2
    assert '"properties":{"a":{"type":"null"}}' in grammars[1]


def test_tools(client: ollama.Client, backend: ScriptedBackend) -> None:
    text = 'So <tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>'
    backend.script = lambda request, index: tokens_of(text)
    reply = client.chat(model="scripted", messages=ASK, tools=[ADD])
    assert reply.message.content == "So "
    assert [(c.function.name, c.function.arguments) for c in reply.message.tool_calls] == [("add", {"a": 1})]
    parts = list(client.chat(model="scripted", messages=ASK, tools=[ADD], stream=True))
    assert [c.function.name for part in parts for c in part.message.tool_calls or []] == ["add"]
    messages = [*ASK, reply.message, {"role": "tool", "tool_name": "add", "content": "1"}]
    assert client.chat(model="scripted", messages=messages).done


def test_embed(client: ollama.Client) -> None:
    reply = client.embed(model="scripted", input=["a", "bc"])
    assert [[round(v, 6) for v in vector] for vector in reply.embeddings] == [[0.6, 0.8, 0.0]] * 2
    assert reply.prompt_eval_count == 3
    assert len(client.embeddings(model="scripted", prompt="a").embedding) == 3


def test_a_long_input_is_cut_only_where_that_is_allowed(client: ollama.Client) -> None:
    assert client.embed(model="scripted", input="x" * 600, truncate=True).prompt_eval_count == 512
    with pytest.raises(ollama.ResponseError, match="600 tokens"):
        client.embed(model="scripted", input="x" * 600)


class TwoModels(ScriptedBackend):
    """The scripted model, and another that is loaded when it is asked for."""

    async def load(self, spec: ModelSpec, need: Need) -> ModelInfo:
        """See Backend."""
        return msgspec.structs.replace(MODEL, name=spec.name, architecture="other", num_parameters=2_500_000)

    @property
    def stats(self) -> Stats:
        """The other one has been idle for 100 of its 300 seconds."""
        models = [
            ModelStats("scripted", "ready", 1000),
            ModelStats("other", "ready", 5000, idle_s=100, keep_alive_s=300),
        ]
        return Stats(memory=MemoryStats(models=models))


def test_models_that_are_in_memory_are_told_from_those_that_are_not(tmp_path: Path) -> None:
    backend, default = TwoModels(), ServedModel("scripted", 0)
    library = Library(
        lambda: [Installed("other", 4000, 0), Installed("third", 70, 0)],
        lambda name: name,
        lambda name: ModelSpec(name, ""),
        lambda name: (ByteTokenizer(), PlainChat()),
    )
    shelf = ModelShelf(backend, library, default)
    services = Services(backend, ByteTokenizer(), PlainChat(), Config(), time.time(), [default], shelf=shelf)
    with Server(create_app(services), tmp_path / "s") as server, ollama.Client(host=server.url, timeout=10) as client:
        assert [model.model for model in client.ps().models] == ["scripted"]
        client.generate(model="other", prompt="Hi")
        first, other = client.ps().models
        assert (first.size, first.expires_at.year) == (1000, 9999)
        assert (other.size, other.details.family, other.details.parameter_size) == (5000, "other", "2.5M")
        assert 190 < (other.expires_at - datetime.datetime.now(datetime.UTC)).total_seconds() <= 200
        listed = {model.model: model for model in client.list().models}
        assert [listed[name].size for name in ("other", "third")] == [4000, 70]
        assert (listed["other"].details.family, listed["third"].details.family) == ("other", "")


def test_models(client: ollama.Client) -> None:
    (entry,) = client.list().models
    assert (entry.model, entry.details.quantization_level, entry.details.format) == ("scripted", "Q4_1", "gguf")
    assert client.ps().models[0].model == "scripted"
    shown = client.show("scripted")
    assert shown.modelinfo["fake.context_length"] == 512
    assert "tools" in shown.capabilities


def test_version_and_loading(http: httpx.Client, backend: ScriptedBackend) -> None:
    assert http.get("/api/version").json()["version"]
    reply = http.post("/api/generate", json={"model": "scripted"}).json()
    assert (reply["done"], reply["done_reason"]) == (True, "load")
    assert http.post("/api/chat", json={"model": "scripted", "messages": [], "keep_alive": 0}).status_code == 403


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"options": {"num_gpu": 4}}, "options.num_gpu"),
        ({"options": {"num_ctx": 100_000}}, "num_ctx"),
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"options": {"temprature": 1}}, "temprature"),
        ({"options": {"temperature": 9}}, "temperature"),
        ({"format": "xml"}, "format"),
        ({"think": True}, "think"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"model": "other"}, "not served"),
        ({"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, "images"),
        ({"frmat": "json"}, "frmat"),
    ],
)
def test_errors_are_texts(http: httpx.Client, backend: ScriptedBackend, fields: dict[str, object], words: str) -> None:
    reply = http.post("/api/chat", json={"model": "scripted", "messages": ASK, **fields})
    assert 400 <= reply.status_code < 500
    assert words in reply.json()["error"]


def test_the_client_gets_the_status(client: ollama.Client, backend: ScriptedBackend) -> None:
    backend.refuse = Overloaded("full", retry_after_s=1)
    with pytest.raises(ollama.ResponseError, match="full") as caught:
        client.chat(model="scripted", messages=ASK)
    assert caught.value.status_code == 503


def test_an_error_in_a_stream_is_its_last_line(client: ollama.Client, backend: ScriptedBackend) -> None:
    backend.fail_after = 1
    with pytest.raises(ollama.ResponseError, match="died"):
        list(client.chat(model="scripted", messages=ASK, stream=True))


def test_pull_knows_names_only(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="is an address"):
        client.pull("https://127.0.0.1/x.gguf")
    with pytest.raises(ollama.ResponseError, match="no model"):
        client.pull("no-such-model")
    with pytest.raises(ollama.ResponseError, match="no model"):
        list(client.pull("no-such-model", stream=True))


def test_ollama_host_points_at_a_daemon() -> None:
    """As docs say: the environment variable, nothing else."""
    with running(model="fake") as daemon:
        os.environ["OLLAMA_HOST"] = f"127.0.0.1:{daemon.state.port}"
        try:
            with ollama.Client() as client:
                assert client.list().models[0].model == "fake"
        finally:
            del os.environ["OLLAMA_HOST"]


def test_lines_end_in_line_ends_and_carry_the_receipt(http: httpx.Client, backend: ScriptedBackend) -> None:
    reply = http.post("/api/generate", json={"model": "scripted", "prompt": "Hi"})
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert ["hob" in line for line in lines] == [False, False, True]
    assert lines[-1]["hob"]["tokens"]["generated"] == 2


def test_a_body_without_a_type_is_taken_from_programs_and_not_from_browsers(
    http: httpx.Client, backend: ScriptedBackend
) -> None:
    body = json.dumps({"model": "scripted", "prompt": "Hi", "stream": False}).encode()
    assert http.post("/api/generate", content=body).status_code == 200
    for name in ("Origin", "Referer", "Sec-Fetch-Site", "Cookie"):
        value = str(http.base_url).rstrip("/") if name == "Origin" else "x"
        assert 400 <= http.post("/api/generate", content=body, headers={name: value}).status_code < 404
    assert http.post("/api/generate", content=body, headers={"Content-Type": "text/plain"}).status_code == 400
    assert http.post("/v1/completions", content=body).status_code == 400
