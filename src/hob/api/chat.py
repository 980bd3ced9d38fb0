"""/v1/chat/completions: OpenAI's chat format, whole and streamed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response

from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.generate import Delta, Generation, TokenScore
from hob.api.grammars import grammar_of
from hob.api.params import (
    chat_logprobs,
    chat_max_tokens,
    check_neutral,
    fit_context,
    num_samples,
    sampling_params,
    stop_strings,
    wants_stream_usage,
)
from hob.api.receipt import receipt
from hob.api.replies import json_reply
from hob.api.schema import ChatRequest, Message, ToolCall
from hob.api.services import TextCodec
from hob.api.stream import EventStream, Shortcut
from hob.api.together import aside
from hob.api.tool_calls import CallFinder, Part, finder_of, finish_of, parts_of
from hob.api.tools import Tools, tools_of
from hob.api.wire import Stamp, to_json, token_name, usage_object
from hob.errors import InvalidRequest
from hob.messages import ModelInfo
from hob.request import Kind, Request, SequenceOutput

_ROLE = b'{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'


async def chat_completions(call: Call, raw: bytes) -> Response:
    """Answer a conversation."""
    body = parse_body(raw, ChatRequest)
    conversation = await begin(call, body, len(raw))
    stamp = Stamp("chatcmpl-", conversation.model)
    if body.stream:
        chunks = _Chunks(call, conversation, stamp, with_usage=wants_stream_usage(body))
        return _stream(call, conversation.generation, chunks)
    return json_reply(await call.while_connected(_whole(call, conversation, stamp)))


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat request, ready to be generated."""

    model: ModelInfo
    request: Request
    generation: Generation
    tools: Tools


async def begin(call: Call, body: ChatRequest, num_bytes: int) -> Conversation:
    """Check a body and make the request of it. `num_bytes`: of the body; a long one is tokenised aside."""
    check_neutral(body)
    call.take_limits(body)
    model = await call.use_model(body.model, body.service_class)
    wants_stream_usage(body)
    stops = stop_strings(body)
    tokenizer = call.services.tokenizer
    params = sampling_params(body, vocab_size=model.vocab_size, stop_token_ids=list(tokenizer.stop_token_ids))
    params.logprobs = chat_logprobs(body)
    max_tokens, max_tokens_param = chat_max_tokens(body)
    tools, grammar = tools_of(body), grammar_of(body)
    if tools.described and grammar is not None:
        raise InvalidRequest(
            f"field '{grammar.param}' holds the reply to a grammar, so none of 'tools' could be called. Expected one "
            "of the two.",
            param=grammar.param,
        )
    messages = plain_messages(body.messages)
    token_ids = await aside(num_bytes, lambda: _encode(call, messages, tools, body, model))
    params.max_tokens = fit_context(
        len(token_ids), max_tokens, model.context_length, prompt_param="messages", tokens_param=max_tokens_param
    )
    request = call.request(
        token_ids,
        Kind.GENERATE,
        body.service_class,
        sampling=params,
        num_samples=num_samples(body),
        grammar=tools.grammar or grammar,
    )
    generation = Generation(call.services.backend, tokenizer, request, stops, call.record.totals)
    return Conversation(model, request, generation, tools)


def _encode(call: Call, messages: list[dict[str, Any]], tools: Tools, body: ChatRequest, model: ModelInfo) -> list[int]:
    """Ids of the conversation; where that may be cut, without as many of its oldest turns as it takes."""
    encode = call.services.chat.encode
    token_ids = encode(messages, tools.described or None)
    if not body.allow_cut:
        return token_ids
    num_asked = len(token_ids)
    room = model.context_length - (chat_max_tokens(body)[0] or 1)
    first = 1 if messages[0]["role"] == "system" else 0
    while len(token_ids) > room and len(messages) > first + 1:
        messages = messages[:first] + messages[first + 1 :]
        token_ids = encode(messages, tools.described or None)
    call.record.totals.num_cut_tokens += num_asked - len(token_ids)
    return token_ids


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template wants them: role and text. Raises InvalidRequest naming the message."""
    if not messages:
        raise InvalidRequest("field 'messages' is empty. Expected at least one message.", param="messages")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    check_neutral(message, f"{where}.")
    if message.role == "function":
        raise InvalidRequest(
            f"field '{where}.role' is 'function', which tools replaced. Expected 'tool'.", param=f"{where}.role"
        )
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.tool_calls:
        _check_role(message, where, "tool_calls", "assistant")
        plain["tool_calls"] = [_plain_call(made) for made in message.tool_calls]
    plain["content"] = "" if message.content is None and "tool_calls" in plain else _text(message, where)
    if message.tool_call_id is not None:
        _check_role(message, where, "tool_call_id", "tool")
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _check_role(message: Message, where: str, field: str, role: str) -> None:
    if message.role != role:
        raise InvalidRequest(
            f"field '{where}.{field}' is given, but the role is '{message.role}'. Expected {role}.",
            param=f"{where}.{field}",
        )


def _plain_call(made: ToolCall) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves; what is no JSON stays text."""
    arguments: Any = made.function.arguments
    with contextlib.suppress(msgspec.DecodeError):
        arguments = msgspec.json.decode(arguments)
    return {"id": made.id, "type": "function", "function": {"name": made.function.name, "arguments": arguments}}


def _text(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise InvalidRequest(f"field '{where}.content' is null. Expected text.", param=f"{where}.content")
    texts = []
    for i, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f'field \'{where}.content[{i}]\' has type \'{part.type}\'. Expected {{"type": "text", "text": ...}}.',
                param=f"{where}.content[{i}].type",
            )
        texts.append(part.text)
    return "\n".join(texts)


async def _whole(call: Call, conversation: Conversation, stamp: Stamp) -> dict[str, Any]:
    tokenizer, request = call.services.tokenizer, conversation.request
    choices = [_Choice(conversation.tools) for _ in range(request.num_samples)]
    async with aclosing(conversation.generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            choices[delta.index].take(delta)
    with_scores = request.sampling.logprobs is not None
    return {
        **stamp.fields("chat.completion"),
        "choices": [
            {
                "index": i,
                "message": choice.message(),
                "logprobs": _logprobs(tokenizer, choice.scores) if with_scores else None,
                "finish_reason": choice.finish,
            }
            for i, choice in enumerate(choices)
        ],
        "usage": usage_object(call.record.totals),
        "hob": receipt(call),
    }


class _Choice:
    """One choice of a whole reply."""

    def __init__(self, tools: Tools) -> None:
        self.finder = finder_of(tools)
        self.text: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.scores: list[TokenScore] = []
        self.finish: str | None = None

    def take(self, delta: Delta) -> None:
        """Add a delta."""
        self.scores += delta.scores
        for part in parts_of(self.finder, delta):
            if part.call is None:
                self.text.append(part.text)
            elif part.call_id:
                self.calls.append(_call_object(part))
            else:
                self.calls[part.call]["function"]["arguments"] += part.arguments
        if delta.finish_reason is not None:
            self.finish = finish_of(self.finder, delta)

    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        text = "".join(self.text)
        message = {"role": "assistant", "content": text if text or not self.calls else None, "refusal": None}
        return {**message, "tool_calls": self.calls} if self.calls else message


class _Chunks:
    """The events of one reply: a role chunk with a choice's first delta, content, a finish chunk, usage if asked.

    The last one carries the receipt.
    """

    def __init__(self, call: Call, conversation: Conversation, stamp: Stamp, *, with_usage: bool) -> None:
        self.with_usage = with_usage
        self._call = call
        self._tokenizer = call.services.tokenizer
        self._generation = conversation.generation
        request = conversation.request
        self._with_scores = request.sampling.logprobs is not None
        self._head = stamp.event_head("chat.completion.chunk")
        self._tail = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"
        indices = range(request.num_samples)
        self._starts = [self._head + b',"choices":[{"index":%d,"delta":' % i for i in indices]
        self._is_begun = [False for _ in indices]
        self._finders = [finder_of(conversation.tools) for _ in indices]

    def of(self, delta: Delta) -> bytes:
        """The events of a delta."""
        start, tail = self._starts[delta.index], self._tail
        finder = self._finders[delta.index]
        event = b""
        if not self._is_begun[delta.index]:
            self._is_begun[delta.index] = True
            event = start + _ROLE + tail
        if finder is not None:
            event += self._parts(delta, finder)
        elif delta.text or delta.scores:
            event += self._content(delta.index, delta.text, delta.scores)
        if delta.finish_reason is not None:
            finish = finish_of(finder, delta).encode()
            event += b'%b{},"logprobs":null,"finish_reason":"%b"%b' % (start, finish, self._last_tail())
        return event

    def _content(self, index: int, text: str, scores: list[TokenScore]) -> bytes:
        logprobs = to_json(_logprobs(self._tokenizer, scores)) if self._with_scores else b"null"
        return b'%b{"content":%b},"logprobs":%b,"finish_reason":null%b' % (
            self._starts[index],
            to_json(text),
            logprobs,
            self._tail,
        )

    def _parts(self, delta: Delta, finder: CallFinder) -> bytes:
        """Events of text and of pieces of calls; log-probabilities go with the first."""
        event, scores = b"", delta.scores
        for part in parts_of(finder, delta):
            if part.call is None:
                event += self._content(delta.index, part.text, scores)
                scores = []
                continue
            piece: dict[str, Any] = {"index": part.call, "function": {"arguments": part.arguments}}
            if part.call_id:
                piece = {"index": part.call, **_call_object(part)}
            event += b'%b{"tool_calls":[%b]},"logprobs":null,"finish_reason":null%b' % (
                self._starts[delta.index],
                to_json(piece),
                self._tail,
            )
        return event + self._content(delta.index, "", scores) if scores else event

    def _last_tail(self) -> bytes:
        if self.with_usage or not self._generation.is_finished:
            return self._tail
        return b'}],"hob":' + to_json(receipt(self._call)) + b"}\n\n"

    def usage(self) -> bytes:
        """The event after all choices."""
        totals = self._call.record.totals
        usage = {"choices": [], "usage": usage_object(totals), "hob": receipt(self._call)}
        return self._head + b"," + to_json(usage)[1:] + b"\n\n"


def _stream(call: Call, generation: Generation, chunks: _Chunks) -> EventStream:
    def event_of(output: SequenceOutput) -> bytes:
        delta = generation.push(output)
        return b"" if delta is None else chunks.of(delta)

    shortcut = Shortcut(generation.outputs, event_of) if generation.ends_with_engine else None
    return EventStream(_events(call, generation, chunks), shortcut, outputs=generation.outputs)


async def _events(call: Call, generation: Generation, chunks: _Chunks) -> AsyncGenerator[bytes, None]:
    """The role waits for the first output."""
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            if event := chunks.of(delta):
                yield event
    if chunks.with_usage:
        yield chunks.usage()


def _call_object(part: Part) -> dict[str, Any]:
    return {"id": part.call_id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


def _logprobs(tokenizer: TextCodec, scores: list[TokenScore]) -> dict[str, Any]:
    """OpenAI's chat form: each token with its bytes, and the most likely ones in its place."""
    content = []
    for score in scores:
        entry = _entry(tokenizer, score.token_id, score.logprob)
        entry["top_logprobs"] = [_entry(tokenizer, token_id, logprob) for token_id, logprob in score.tops]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(tokenizer: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": token_name(tokenizer, token_id), "logprob": logprob, "bytes": list(raw) or None}
