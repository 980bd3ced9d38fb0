"""Ollama's API: its paths, fields, newline-delimited JSON and error shape, over the same calls as OpenAI's.

    /api/chat, /api/generate      streamed unless `stream` is false
    /api/embed, /api/embeddings   /api/tags, /api/show, /api/ps, /api/version
    /api/pull                     the owner's only, and only of models that the catalogue names

Defaults of sampling are Ollama's. `keep_alive` is read and checked; how long a model stays is the owner's setting.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response

from hob.api.body import parse_body, show
from hob.api.call import Call
from hob.api.chat import Conversation, begin
from hob.api.completions import Prompt, prompts_of
from hob.api.embeddings import embed_all
from hob.api.generate import Delta, Generation
from hob.api.ollama_schema import (
    ASKS_NOTHING,
    Base,
    ChatBody,
    EmbedBody,
    GenerateBody,
    OldEmbedBody,
    OllamaMessage,
    Options,
)
from hob.api.params import check_neutral
from hob.api.receipt import receipt
from hob.api.replies import json_reply
from hob.api.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Message, ToolCall
from hob.api.stream import NDJSON, EventStream, Shortcut
from hob.api.tool_calls import CallFinder, finder_of, parts_of
from hob.api.wire import FINISH, to_json
from hob.errors import InvalidRequest, PermissionDenied
from hob.request import SequenceOutput

_DURATION = re.compile(r"-?(\d+(\.\d*)?(ns|us|ms|s|m|h))+")


# ---- calls ----


async def chat(call: Call, raw: bytes) -> Response:
    """/api/chat."""
    body = parse_body(raw, ChatBody)
    await _check(call, body)
    if not body.messages:
        return _loaded(call, body)
    request = ChatRequest(
        messages=[_message(message) for message in body.messages], tools=body.tools, **_sampling(call, body)
    )
    conversation = await begin(call, request, len(raw))
    reply = _ChatReply(call, conversation)
    return await _answer(call, conversation.generation, reply, is_stream=body.stream is not False)


async def generate(call: Call, raw: bytes) -> Response:
    """/api/generate: a prompt as the user's turn, or as it is with `raw`."""
    body = parse_body(raw, GenerateBody)
    await _check(call, body)
    if not body.prompt:
        return _loaded(call, body)
    if body.raw:
        if body.system:
            raise InvalidRequest("field 'system' is given, but 'raw' is true: nothing is put before it", param="system")
        request = CompletionRequest(prompt=body.prompt, **_sampling(call, body))
        (prompt,) = prompts_of(call, request)
        generation = _generation_of(prompt)
    else:
        system = [Message(role="system", content=body.system)] if body.system else []
        turns = [*system, Message(role="user", content=body.prompt)]
        generation = (await begin(call, ChatRequest(messages=turns, **_sampling(call, body)), len(raw))).generation
    return await _answer(call, generation, _GenerateReply(call), is_stream=body.stream is not False)


async def embed(call: Call, raw: bytes) -> Response:
    """/api/embed."""
    body = parse_body(raw, EmbedBody)
    await _check(call, body)
    request = EmbeddingRequest(
        model=_plain_name(body.model), input=body.input, dimensions=body.dimensions, allow_cut=body.truncate
    )
    vectors = await embed_all(call, request, await call.use_model(request.model), len(raw))
    counts = {"total_duration": _elapsed_ns(call), "load_duration": 0}
    count = call.record.totals.num_prompt_tokens
    return json_reply(
        {"model": body.model, "embeddings": vectors, **counts, "prompt_eval_count": count, "hob": receipt(call)}
    )


async def embeddings(call: Call, raw: bytes) -> Response:
    """/api/embeddings."""
    body = parse_body(raw, OldEmbedBody)
    await _check(call, body)
    request = EmbeddingRequest(model=_plain_name(body.model), input=body.prompt)
    (vector,) = await embed_all(call, request, await call.use_model(request.model), len(raw))
    return json_reply({"embedding": vector, "hob": receipt(call)})


# ---- from their fields to ours ----


def _plain_name(name: str) -> str:
    """Clients put ':latest' behind a name that has no tag."""
    return name.removesuffix(":latest")


async def _check(call: Call, body: Base) -> None:
    """What all calls share: the model, keep_alive, and fields that ask for nothing."""
    await call.use_model(_plain_name(body.model))
    check_neutral(body, allowed=ASKS_NOTHING)
    if body.options is not None:
        check_neutral(body.options, "options.", allowed=ASKS_NOTHING)
    value = body.keep_alive
    if isinstance(value, str) and not _DURATION.fullmatch(value) and not value.lstrip("-").isdigit():
        raise InvalidRequest(
            f"field 'keep_alive' is {show(value)}. Expected seconds, or a duration such as \"5m\".", param="keep_alive"
        )


def _sampling(call: Call, body: ChatBody | GenerateBody) -> dict[str, Any]:
    """Fields of our sampling. Ollama's defaults, but for the repetition penalty, which hurts JSON and code."""
    options = body.options or Options()
    context = call.services.backend.model.context_length
    if options.num_ctx is not None and not 1 <= options.num_ctx <= context:
        raise InvalidRequest(
            f"field 'options.num_ctx' is {options.num_ctx}. Expected 1 to {context}: the owner sets the context "
            "(`hob config`, kv_tokens).",
            param="options.num_ctx",
        )
    limit = options.num_predict
    fields = {
        "model": _plain_name(body.model),
        "temperature": 0.8 if options.temperature is None else options.temperature,
        "top_k": 40 if options.top_k is None else options.top_k,
        "top_p": 0.9 if options.top_p is None else options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "stop": options.stop,
        "max_tokens": None if limit is not None and limit < 0 else limit,
        "response_format": _format(body.format),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _format(value: Any) -> dict[str, Any] | None:
    """`format`: "json", or a JSON schema."""
    if value in (None, ""):
        return None
    if value == "json":
        return {"type": "json_object"}
    if not isinstance(value, dict):
        raise InvalidRequest(f"field 'format' is {show(value)}. Expected \"json\" or a JSON schema.", param="format")
    return {"type": "json_schema", "json_schema": {"schema": value}}


def _message(message: OllamaMessage) -> Message:
    check_neutral(message, "messages[].", allowed=ASKS_NOTHING)
    calls = [
        ToolCall.of(call.id or "", call.function.name, msgspec.json.encode(call.function.arguments or {}).decode())
        for call in message.tool_calls or []
    ]
    return Message(
        role=message.role,
        content=message.content or (None if calls else ""),
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id or message.tool_name,
    )


def _generation_of(prompt: Prompt) -> Generation:
    assert prompt.generation is not None
    return prompt.generation


# ---- replies ----


class _Reply:
    """Lines of one reply. Every one has the model and the time; the last has the counts."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._head = b'{"model":%b,"created_at":"' % to_json(call.services.backend.model.name)

    def line(self, delta: Delta) -> bytes:
        """What a delta adds; empty if nothing shows."""
        raise NotImplementedError

    def _line(self, field: bytes, value: Any, delta: Delta) -> bytes:
        head = self._head + _now() + b'","' + field + b'":' + to_json(value)
        if delta.finish_reason is None:
            return head + b',"done":false}\n'
        end = {"done": True, "done_reason": FINISH[delta.finish_reason], **_counts(self._call)}
        return head + b"," + to_json(end)[1:] + b"\n"


class _GenerateReply(_Reply):
    def line(self, delta: Delta) -> bytes:
        if not delta.text and delta.finish_reason is None:
            return b""
        return self._line(b"response", delta.text, delta)


class _ChatReply(_Reply):
    def __init__(self, call: Call, conversation: Conversation) -> None:
        super().__init__(call)
        self._finder = finder_of(conversation.tools)
        self._name = ""
        self._arguments = ""

    def line(self, delta: Delta) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text}
        if self._finder is not None:
            message |= self._split(delta, self._finder)
        if not message["content"] and "tool_calls" not in message and delta.finish_reason is None:
            return b""
        return self._line(b"message", message, delta)

    def _split(self, delta: Delta, finder: CallFinder) -> dict[str, Any]:
        """Text and whole calls: Ollama does not send them in pieces."""
        parts = parts_of(finder, delta)
        calls = []
        for part in parts:
            self._name = part.name or self._name
            self._arguments += part.arguments
            if part.ends_call:
                arguments = msgspec.json.decode(self._arguments)
                calls.append({"function": {"name": self._name, "arguments": arguments}})
                self._arguments = ""
        found: dict[str, Any] = {"content": "".join(part.text for part in parts)}
        return {**found, "tool_calls": calls} if calls else found


async def _answer(call: Call, generation: Generation, reply: _Reply, *, is_stream: bool) -> Response:
    if is_stream:

        def line_of(output: SequenceOutput) -> bytes:
            delta = generation.push(output)
            return b"" if delta is None else reply.line(delta)

        shortcut = Shortcut(generation.outputs, line_of) if generation.ends_with_engine else None
        return EventStream(_lines(call, generation, reply), shortcut, NDJSON)
    return Response(await call.while_connected(_whole(call, generation, reply)), media_type="application/json")


async def _lines(call: Call, generation: Generation, reply: _Reply) -> AsyncGenerator[bytes, None]:
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            if line := reply.line(delta):
                yield line


async def _whole(call: Call, generation: Generation, reply: _Reply) -> bytes:
    whole = Delta(0, "", [])
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            whole.text += delta.text
            whole.finish_reason = delta.finish_reason
    return reply.line(whole)


def _loaded(call: Call, body: ChatBody | GenerateBody) -> Response:
    """Nothing to say: clients ask so to have a model loaded, which it is, or unloaded, which is the owner's to do."""
    if body.keep_alive in (0, "0"):
        raise PermissionDenied(
            "field 'keep_alive' is 0: the model is shared with other apps, so its owner decides how long it stays "
            "(`hob stop`)",
            param="keep_alive",
        )
    empty = {"message": {"role": "assistant", "content": ""}} if isinstance(body, ChatBody) else {"response": ""}
    name = call.services.backend.model.name
    return json_reply({"model": name, "created_at": _now().decode(), **empty, "done": True, "done_reason": "load"})


def _counts(call: Call) -> dict[str, Any]:
    made = receipt(call)
    tokens, seconds = made["tokens"], made["seconds"]
    return {
        "total_duration": _elapsed_ns(call),
        "load_duration": 0,
        "prompt_eval_count": tokens["seen"],
        "prompt_eval_duration": int(seconds["prefill"] * 1e9),
        "eval_count": tokens["generated"],
        "eval_duration": int(seconds["decode"] * 1e9),
        "hob": made,
    }


def _elapsed_ns(call: Call) -> int:
    return int(call.record.elapsed_s * 1e9)


def _now() -> bytes:
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z").encode()
