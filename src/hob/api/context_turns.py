"""One turn on a persistent context: from history and new messages to a request, from its tokens to the longer history.

    read the history -> frame what is new as the template does -> generate -> append, before the last delta is given

What the client is told is what is kept: tokens it did not get, after a stop string, are not part of the history.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from hob.api.call import Call
from hob.api.chat import plain_messages
from hob.api.generate import Delta, Generation
from hob.api.grammars import grammar_of
from hob.api.params import fit_context, sampling_params, stop_strings
from hob.api.schema import Message, Sampling
from hob.api.services import ChatCodec, TextCodec
from hob.errors import InvalidRequest, NotFound
from hob.kvcache.contexts import ContextRecord, ContextStore, Facts
from hob.messages import ModelInfo
from hob.request import FinishReason, Kind, Request

CHAT, TEXT = "chat", "text"


class TurnRequest(Sampling, kw_only=True):
    """Body of POST /hob/v1/contexts/{id}/generate: exactly one of messages and prompt."""

    model: str = ""
    messages: list[Message] | None = None
    prompt: str | None = None


@dataclass(slots=True)
class Turn:
    """One turn on its way: what it began from, what was asked, what came."""

    record: ContextRecord
    history: list[int]
    facts: Facts
    """As they are after the turn."""
    request: Request
    stops: list[str]
    text: str = ""
    finish: FinishReason | None = None


def store_of(call: Call) -> ContextStore:
    store = call.services.contexts
    if store is None:
        raise NotFound("this service keeps no contexts: they could not be opened when it started. See its log.")
    return store


async def begin(call: Call, context_id: str, body: TurnRequest, model: ModelInfo) -> Turn:
    """Read the history and make the request of it."""
    record, history = await asyncio.to_thread(store_of(call).read, call.app, context_id)
    if record.model != model.name:
        raise InvalidRequest(
            f"context '{context_id}' was made with model '{record.model}', served is '{model.name}'. Its tokens mean "
            f"nothing to another model: `hob serve --model {record.model}`.",
            param="model",
        )
    kind = CHAT if body.messages is not None else TEXT
    if record.facts.kind not in ("", kind):
        expected = "messages" if record.facts.kind == CHAT else "prompt"
        raise InvalidRequest(
            f"context '{context_id}' holds a {record.facts.kind}. Expected '{expected}', so that it stays one.",
            param=expected,
        )
    services = call.services
    if body.messages is not None:
        messages = plain_messages(body.messages)
        new = closing_and(services.chat, messages) if history else services.chat.encode(record.facts.opening + messages)
    else:
        new = services.tokenizer.encode(body.prompt or "", add_bos=not history)
    token_ids = history + new
    params = sampling_params(body, vocab_size=model.vocab_size, stop_token_ids=list(services.tokenizer.stop_token_ids))
    params.max_tokens = fit_context(
        len(token_ids), body.max_tokens, model.context_length, prompt_param="messages" if kind == CHAT else "prompt"
    )
    request = call.request(
        token_ids,
        Kind.GENERATE,
        body.service_class,
        sampling=params,
        context_id=context_id,
        kv_bits=record.facts.kv_bits,
        grammar=grammar_of(body),
    )
    facts = Facts(record.facts.name, kind, kv_bits=record.facts.kv_bits)
    return Turn(record, history, facts, request, stop_strings(body))


def closing_and(chat: ChatCodec, messages: list[dict[str, Any]]) -> list[int]:
    """What a template puts after a finished reply: the end of the assistant's turn, new messages, an open turn.

    Rendered behind two stand-in replies: what both conversations end with cannot be part of the reply. So the reply
    itself stays in the history as the model wrote it, token by token, which a text rendered anew would not promise.
    """
    one, two = (
        chat.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}, *messages])
        for reply in ("y", "7")
    )
    shorter = min(len(one), len(two))
    start = next(i for i in range(shorter) if one[i] != two[i])
    length = 0
    while length < shorter - start - 1 and one[-1 - length] == two[-1 - length]:
        length += 1
    return one[len(one) - length :]


async def deltas_of(call: Call, turn: Turn) -> AsyncGenerator[Delta, None]:
    """The turn's deltas. It is kept before the last one is given."""
    tokenizer = call.services.tokenizer
    generation = Generation(call.services.backend, tokenizer, turn.request, turn.stops, call.record.totals)
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            turn.text += delta.text
            if delta.finish_reason is not None:
                turn.finish = delta.finish_reason
                drawn = generation.choices[0].token_ids
                reply = kept_reply(tokenizer, drawn, turn.text)
                new = turn.request.token_ids[len(turn.history) :] + reply
                turn.record = await asyncio.to_thread(store_of(call).append, turn.record, new, turn.facts)
                generation.outputs.num_kept = len(turn.request.token_ids) + num_equal(drawn, reply)
            yield delta


def kept_reply(tokenizer: TextCodec, token_ids: Sequence[int], text: str) -> list[int]:
    """The tokens that make `text`, which may end before them at a stop string, even within a token.

    Bytes that are no character count as in what the client was shown: as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown, whole = "", (0, 0)  # whole: tokens and characters at the last point where no character was unfinished
    for i, token_id in enumerate(token_ids):
        shown += decoder.decode(tokenizer.token_bytes(token_id), i == len(token_ids) - 1)
        if not text.startswith(shown):
            num_tokens, num_chars = whole
            rest = text[num_chars:]
            return [*token_ids[:num_tokens], *(tokenizer.encode(rest, add_bos=False) if rest else [])]
        if not decoder.getstate()[0]:
            whole = i + 1, len(shown)
    return list(token_ids)


def num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
