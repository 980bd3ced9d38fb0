"""Chat completions, asked by the real openai client over TCP and over the Unix socket."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest

from hob.errors import Overloaded
from hob.request import ServiceClass
from tests.api.conftest import Server, wait_for
from tests.api.scripted import STOP_ID, ScriptedBackend, score_of, tokens_of

MODEL = "scripted"
ASK = [{"role": "user", "content": "Hi"}]


def test_whole_reply(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.num_cached = 7
    reply = client.chat.completions.create(model=MODEL, messages=ASK)
    assert reply.object == "chat.completion"
    assert reply.model == MODEL
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == "Hello world"
    assert reply.choices[0].finish_reason == "stop"
    num_prompt = len("user: Hi\nassistant:")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (num_prompt, 2)
    assert reply.usage.total_tokens == num_prompt + 2
    assert reply.usage.prompt_tokens_details.cached_tokens == 7
    assert backend.requests[0].sampling.max_tokens == 512 - num_prompt
    assert backend.requests[0].sampling.temperature == 1.0
    assert backend.num_cancelled == 0


def test_stream_begins_with_role_and_ends_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert [delta.content for delta in deltas[1:]] == ["Hello", " world", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_without_usage_says_nothing_of_it(http: httpx.Client) -> None:
    reply = http.post("/v1/chat/completions", json={"model": MODEL, "messages": ASK, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "usage" not in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=17,
        seed=42,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"65": -100},
        user="me",
        metadata={"a": "b"},
        store=False,
        extra_body={"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "service_class": "interactive"},
    )
    request = backend.requests[0]
    params = request.sampling
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 0.9, 17, 42)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.25, -0.5, {65: -100.0})
    assert (params.top_k, params.min_p, params.repetition_penalty) == (40, 0.05, 1.1)
    assert params.stop_token_ids == [256]
    assert request.service_class is ServiceClass.INTERACTIVE


def test_two_requests_without_seed_draw_differently(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    client.chat.completions.create(model=MODEL, messages=ASK)
    client.chat.completions.create(model=MODEL, messages=ASK)
    assert backend.requests[0].sampling.seed != backend.requests[1].sampling.seed


def test_n_choices_come_whole(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: tokens_of(["Hello", "Hello world", " and"][index])
    reply = client.chat.completions.create(model=MODEL, messages=ASK, n=3)
    assert [choice.message.content for choice in reply.choices] == ["Hello", "Hello world", " and"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.completion_tokens == 4


def test_n_choices_stream_interleaved(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: tokens_of(["Hello world", " and more"][index])
    texts, order = ["", ""], []
    for chunk in client.chat.completions.create(model=MODEL, messages=ASK, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.delta.content:
            order.append(choice.index)
    assert texts == ["Hello world", " and more"]
    assert order == [0, 1, 0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_across_tokens_ends_and_cancels(client: openai.OpenAI, backend: ScriptedBackend, stream: bool) -> None:
    backend.script = lambda request, index: tokens_of("Hello STOP and more and more")
    reply = client.chat.completions.create(model=MODEL, messages=ASK, stop=["never", "STOP"], stream=stream)
    if stream:
        chunks = list(reply)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = reply.choices[0].message.content
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens == 3
    assert text == "Hello "
    wait_for(lambda: backend.num_cancelled == 1)


def test_what_only_looks_like_a_stop_is_shown(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: tokens_of("Hello ST and")
    reply = client.chat.completions.create(model=MODEL, messages=ASK, stop="STOP")
    assert reply.choices[0].message.content == "Hello ST and"


def test_stop_ends_one_choice_only(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: tokens_of(["Hello STOP more more", "Hello and more"][index])
    reply = client.chat.completions.create(model=MODEL, messages=ASK, stop="STOP", n=2)
    assert [choice.message.content for choice in reply.choices] == ["Hello ", "Hello and more"]


def test_characters_come_whole(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: list("a€🙂".encode())
    chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, stream=True))
    assert [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content] == ["a", "€", "🙂"]


def test_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=1)
    assert reply.choices[0].message.content == "Hello"
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        content = [entry for c in reply if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    else:
        content = reply.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["Hello", " world"]
    assert content[0].bytes == list(b"Hello")
    assert content[0].logprob == score_of(257)
    assert [(top.token, top.logprob) for top in content[1].top_logprobs] == [("a", -0.25), ("b", -0.5)]


def test_a_token_that_is_no_text_has_a_name_and_no_bytes(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: [97, STOP_ID, 98]
    reply = client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True)
    assert reply.choices[0].message.content == "ab"
    assert [(e.token, e.bytes) for e in reply.choices[0].logprobs.content] == [
        ("a", [97]),
        ("<stop>", None),
        ("b", [98]),
    ]


def test_logprobs_stop_where_the_text_stops(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: tokens_of("Hello STOP and")
    reply = client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, stop="STOP")
    assert [entry.token for entry in reply.choices[0].logprobs.content] == ["Hello", " ST"]


def test_text_parts_and_roles(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    client.chat.completions.create(model=MODEL, messages=messages)
    assert bytes(backend.requests[0].token_ids).decode() == "system: Be kind.\nuser: a\nb\nassistant:"


def test_refused_by_admission(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.refuse = Overloaded("the queue is full", retry_after_s=2.0)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    assert caught.value.status_code == 503
    assert caught.value.code == "overloaded"
    assert caught.value.response.headers["retry-after"] == "2"


def test_error_after_the_first_token(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.fail_after = 1
    stream = client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    texts = [next(stream).choices[0].delta.content for _ in range(2)]
    assert texts == ["", "Hello"]
    with pytest.raises(openai.APIError, match="the engine process died"):
        next(stream)


def test_error_in_a_whole_reply(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.fail_after = 1
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")


def test_client_that_leaves_a_stream_cancels(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.delay_s = 0.02
    backend.script = lambda request, index: tokens_of(" more" * 200)
    stream = client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    next(iter(stream))
    assert backend.num_open == 1
    stream.close()
    wait_for(lambda: backend.num_open == 0, timeout_s=0.5)
    assert backend.num_cancelled == 1


def test_client_that_leaves_a_whole_reply_cancels(server: Server, backend: ScriptedBackend) -> None:
    backend.delay_s = 0.02
    backend.script = lambda request, index: tokens_of(" more" * 200)
    with httpx.Client(base_url=server.url, timeout=1) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json={"model": MODEL, "messages": ASK})  # the whole reply takes 4 s
    wait_for(lambda: backend.num_open == 0, timeout_s=2)
    assert backend.num_cancelled == 1


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "hob"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_client_that_reads_slowly_gets_all_in_order(server: Server, backend: ScriptedBackend) -> None:
    expected = [f"{index} Hello" + " and more" * 150 for index in range(60)]
    backend.script = lambda request, index: tokens_of(expected[index])
    body = {"model": MODEL, "messages": ASK, "stream": True, "n": 60}
    texts = [""] * 60
    transport = httpx.HTTPTransport(uds=str(server.socket_path))
    with (
        httpx.Client(transport=transport, base_url="http://localhost") as http,
        http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        assert reply.status_code == 200
        time.sleep(0.5)  # 4 MB are waiting by now, more than the sockets hold
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == expected
