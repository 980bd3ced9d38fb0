"""/v1/chat/completions: OpenAI's chat format, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

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
from hob.api.replies import json_reply
from hob.api.schema import ChatRequest, Message
from hob.api.services import TextCodec
from hob.api.stream import EventStream, Shortcut
from hob.api.together import aside
from hob.api.wire import FINISH, Stamp, to_json, token_name, usage_object
from hob.errors import InvalidRequest
from hob.request import Kind, Request, SequenceOutput

_ROLE = b'{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'


async def chat_completions(call: Call, raw: bytes) -> Response:
    """Answer a conversation."""
    body = parse_body(raw, ChatRequest)
    check_neutral(body)
    model = call.services.resolve_model(body.model)
    with_usage = wants_stream_usage(body)
    stops = stop_strings(body)
    tokenizer = call.services.tokenizer
    params = sampling_params(body, vocab_size=model.vocab_size, stop_token_ids=list(tokenizer.stop_token_ids))
    params.logprobs = chat_logprobs(body)
    max_tokens, max_tokens_param = chat_max_tokens(body)
    messages = plain_messages(body.messages)
    token_ids = await aside(len(raw), lambda: call.services.chat.encode(messages))
    params.max_tokens = fit_context(
        len(token_ids), max_tokens, model.context_length, prompt_param="messages", tokens_param=max_tokens_param
    )
    request = call.request(
        token_ids,
        Kind.GENERATE,
        body.service_class,
        sampling=params,
        num_samples=num_samples(body),
        grammar=grammar_of(body),
    )
    stamp = Stamp("chatcmpl-", model)
    generation = Generation(call.services.backend, tokenizer, request, stops, call.record.totals)
    if body.stream:
        return _stream(call, generation, _Chunks(call, request, stamp, with_usage=with_usage))
    return json_reply(await call.while_connected(_whole(call, request, generation, stamp)))


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template wants them: role and text. Raises InvalidRequest naming the message."""
    if not messages:
        raise InvalidRequest("field 'messages' is empty. Expected at least one message.", param="messages")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    check_neutral(message, f"{where}.")
    if message.role in ("tool", "function"):
        raise InvalidRequest(
            f"field '{where}.role' is '{message.role}', but tools are not supported. "
            "Expected system, developer, user or assistant.",
            param=f"{where}.role",
        )
    plain = {"role": "system" if message.role == "developer" else message.role, "content": _text(message, where)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


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


async def _whole(call: Call, request: Request, generation: Generation, stamp: Stamp) -> dict[str, Any]:
    tokenizer, totals = call.services.tokenizer, call.record.totals
    texts: list[list[str]] = [[] for _ in range(request.num_samples)]
    scores: list[list[TokenScore]] = [[] for _ in texts]
    finishes: list[str | None] = [None for _ in texts]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            texts[delta.index].append(delta.text)
            scores[delta.index] += delta.scores
            if delta.finish_reason is not None:
                finishes[delta.index] = FINISH[delta.finish_reason]
    with_scores = request.sampling.logprobs is not None
    return {
        **stamp.fields("chat.completion"),
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(texts[i]), "refusal": None},
                "logprobs": _logprobs(tokenizer, scores[i]) if with_scores else None,
                "finish_reason": finishes[i],
            }
            for i in range(len(texts))
        ],
        "usage": usage_object(totals),
    }


class _Chunks:
    """The events of one reply: a role chunk with a choice's first delta, content, a finish chunk, usage if asked."""

    def __init__(self, call: Call, request: Request, stamp: Stamp, *, with_usage: bool) -> None:
        self.with_usage = with_usage
        self._tokenizer, self._totals = call.services.tokenizer, call.record.totals
        self._with_scores = request.sampling.logprobs is not None
        self._head = stamp.event_head("chat.completion.chunk")
        self._tail = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"
        indices = range(request.num_samples)
        self._starts = [self._head + b',"choices":[{"index":%d,"delta":' % i for i in indices]
        self._is_begun = [False for _ in indices]

    def of(self, delta: Delta) -> bytes:
        """The events of a delta."""
        start, tail = self._starts[delta.index], self._tail
        event = b""
        if not self._is_begun[delta.index]:
            self._is_begun[delta.index] = True
            event = start + _ROLE + tail
        if delta.text or delta.scores:
            logprobs = to_json(_logprobs(self._tokenizer, delta.scores)) if self._with_scores else b"null"
            event += b'%b{"content":%b},"logprobs":%b,"finish_reason":null%b' % (
                start,
                to_json(delta.text),
                logprobs,
                tail,
            )
        if delta.finish_reason is not None:
            event += start + _finish(delta) + tail
        return event

    def usage(self) -> bytes:
        """The event after all choices."""
        return self._head + b',"choices":[],"usage":' + to_json(usage_object(self._totals)) + b"}\n\n"


def _stream(call: Call, generation: Generation, chunks: _Chunks) -> EventStream:
    def event_of(output: SequenceOutput) -> bytes:
        delta = generation.push(output)
        return b"" if delta is None else chunks.of(delta)

    shortcut = Shortcut(generation.outputs, event_of) if generation.ends_with_engine else None
    return EventStream(_events(call, generation, chunks), shortcut)


async def _events(call: Call, generation: Generation, chunks: _Chunks) -> AsyncGenerator[bytes, None]:
    """The role waits for the first output."""
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            yield chunks.of(delta)
    if chunks.with_usage:
        yield chunks.usage()


def _finish(delta: Delta) -> bytes:
    assert delta.finish_reason is not None
    return b'{},"logprobs":null,"finish_reason":"%s"' % FINISH[delta.finish_reason].encode()


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
