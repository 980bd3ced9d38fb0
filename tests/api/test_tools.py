"""Tools, asked by the real openai client: calls the model writes, calls a grammar makes, both streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.scripted import ScriptedBackend, tokens_of
from tests.daemons import running
from tests.needs import needs

needs("llguidance")

ASK = [{"role": "user", "content": "2 + 3?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}
SAY = {
    "type": "function",
    "function": {
        "name": "say",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["yes", "no"]}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>[{"name": "add", "arguments": {"a": 2, "b": 3}}, {"name": "say", "arguments": {}}]</tool_call>'


@pytest.fixture(scope="module")
def fake() -> Iterator[openai.OpenAI]:
    """Over a daemon with the fake engine."""
    with running(model="fake") as daemon:
        url = f"http://127.0.0.1:{daemon.state.port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client


def streamed(stream: Any) -> tuple[str, list[dict[str, str]], str]:
    """Text, calls and finish reason of a stream."""
    text, finish = "", ""
    calls: list[dict[str, str]] = []
    for chunk in stream:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for piece in choice.delta.tool_calls or []:
            if piece.id:
                assert piece.index == len(calls)
                assert piece.type == "function"
                calls.append({"name": piece.function.name, "arguments": ""})
            calls[piece.index]["arguments"] += piece.function.arguments
        finish = choice.finish_reason or finish
    return text, calls, finish


def test_what_the_model_writes_is_parsed(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: tokens_of("Let me see. " + CALL)
    options: dict[str, Any] = {"model": "scripted", "messages": ASK, "tools": [ADD, SAY]}
    reply = client.chat.completions.create(**options).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content == "Let me see. "
    calls = [(call.function.name, call.function.arguments) for call in reply.message.tool_calls]
    assert calls == [("add", '{"a": 2, "b": 3}'), ("say", "{}")]
    assert len({call.id for call in reply.message.tool_calls}) == 2
    text, pieces, finish = streamed(client.chat.completions.create(**options, stream=True))
    assert (text, finish) == ("Let me see. ", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in pieces] == calls


def test_none_means_text(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: tokens_of(CALL)
    reply = client.chat.completions.create(model="scripted", messages=ASK, tools=[ADD], tool_choice="none").choices[0]
    assert (reply.message.content, reply.finish_reason) == (CALL, "stop")
    assert reply.message.tool_calls is None


def test_a_conversation_with_calls_and_results(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]
    reply = client.chat.completions.create(model="scripted", messages=messages, tools=[ADD])
    assert reply.choices[0].message.content == "Hello world"
    assert "5" in bytes(t for t in backend.requests[0].token_ids if t < 256).decode()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_what_must_be_called_fits(fake: openai.OpenAI, choice: Any) -> None:
    options: dict[str, Any] = {"model": "fake", "messages": ASK, "tools": [ADD, SAY], "tool_choice": choice}
    options |= {"parallel_tool_calls": False, "max_tokens": 300}
    for seed in range(5):
        reply = fake.chat.completions.create(**options, seed=seed).choices[0]
        assert reply.finish_reason == "tool_calls"
        (call,) = reply.message.tool_calls
        arguments = json.loads(call.function.arguments)
        if call.function.name == "add" or choice != "required":
            assert call.function.name == "add"
            assert set(arguments) == {"a", "b"}
            assert all(0 <= value <= 9 for value in arguments.values())
        else:
            assert arguments["word"] in ("yes", "no")
        _, pieces, finish = streamed(fake.chat.completions.create(**options, seed=seed, stream=True))
        assert (pieces, finish) == ([call.function.model_dump()], "tool_calls")


def test_several_at_once(fake: openai.OpenAI) -> None:
    counts = set()
    for seed in range(8):
        reply = fake.chat.completions.create(
            model="fake", messages=ASK, tools=[ADD, SAY], tool_choice="required", seed=seed, max_tokens=1500
        )
        counts.add(len(reply.choices[0].message.tool_calls))
    assert max(counts) > 1
    assert max(counts) <= 8


def test_strict_functions_hold_the_reply_to_calls_that_fit_or_text(fake: openai.OpenAI) -> None:
    strict = {**ADD, "function": {**ADD["function"], "strict": True}}  # type: ignore[dict-item]
    reply = fake.chat.completions.create(model="fake", messages=ASK, tools=[strict], max_tokens=40)
    assert reply.choices[0].finish_reason in ("length", "stop", "tool_calls")
    assert reply.model_extra["hob"]["grammar"] is True


def test_a_function_that_cannot_be_enforced_is_refused(fake: openai.OpenAI) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
        fake.chat.completions.create(model="fake", messages=ASK, tools=[bad], tool_choice="required")
