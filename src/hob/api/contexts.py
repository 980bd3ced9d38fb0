"""/hob/v1/contexts: conversations the service keeps. An app sends only what is new; history and KV outlive it.

    POST   /hob/v1/contexts                 create      {name?, messages?, kv_bits?}
    GET    /hob/v1/contexts                 list        GET /hob/v1/contexts/{id}: one
    POST   /hob/v1/contexts/{id}/generate   append {messages} or {prompt}, generate; options and stream as in chat
    POST   /hob/v1/contexts/{id}/fork       copy        {name?}
    DELETE /hob/v1/contexts/{id}            delete

A turn is durable before the client is told that it ended; a turn that was not finished leaves no trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from starlette.responses import Response
from starlette.routing import Router

from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.chat import plain_messages
from hob.api.context_turns import CHAT, TurnRequest, begin, deltas_of, store_of
from hob.api.params import check_neutral, num_samples, wants_stream_usage
from hob.api.receipt import receipt
from hob.api.replies import json_reply
from hob.api.routes import CallOf, add_routes
from hob.api.schema import Body, Message
from hob.api.stream import EventStream
from hob.api.wire import FINISH, Stamp, to_json, usage_object
from hob.errors import InvalidRequest
from hob.kvcache.contexts import MAX_NAME_CHARS, ContextRecord, Facts
from hob.messages import ContextKv, ModelInfo

PATH = "/hob/v1/contexts"


class CreateRequest(Body, kw_only=True):
    """Body of POST /hob/v1/contexts. `messages` open the first turn: a system prompt, say."""

    model: str = ""
    name: str = ""
    messages: list[Message] | None = None
    kv_bits: Literal[16, 8, 4, 3] = 16
    """Of a value on disk. Fewer than 16 take less room; what comes back is then not the same bits any more."""


class ForkRequest(Body, kw_only=True):
    """Body of POST /hob/v1/contexts/{id}/fork."""

    model: str = ""
    name: str | None = None


def register(router: Router, call_of: CallOf) -> None:
    """Add the routes."""
    add_routes(
        router,
        call_of,
        ("POST", PATH, create),
        ("GET", PATH, list_contexts),
        ("GET", PATH + "/{context_id}", get),
        ("DELETE", PATH + "/{context_id}", delete),
        ("POST", PATH + "/{context_id}/generate", take_turn),
        ("POST", PATH + "/{context_id}/fork", fork),
    )


# ---- the calls ----


async def create(call: Call, raw: bytes) -> Response:
    """A new, empty context."""
    body = parse_body(raw, CreateRequest)
    model = await call.use_model(body.model)
    opening = plain_messages(body.messages) if body.messages else []
    if opening:
        call.services.chat.encode(opening)  # refuse now what the template would refuse later
    facts = Facts(_checked_name(body.name), CHAT if opening else "", opening, body.kv_bits)
    record = await asyncio.to_thread(store_of(call).create, call.app, model.name, facts)
    return json_reply(_object(record), 201)


async def list_contexts(call: Call) -> Response:
    """The app's contexts, the last used first."""
    records = await asyncio.to_thread(store_of(call).records, call.app)
    kept = await call.services.backend.context_kv(call.app, [record.context_id for record in records])
    return json_reply({"object": "list", "data": [_object(record, kept.get(record.context_id)) for record in records]})


async def get(call: Call, context_id: str) -> Response:
    """One context."""
    record = await asyncio.to_thread(store_of(call).get, call.app, context_id)
    kept = await call.services.backend.context_kv(call.app, [context_id])
    return json_reply(_object(record, kept.get(context_id)))


async def fork(call: Call, context_id: str, raw: bytes) -> Response:
    """A copy as of the last finished turn; it shares the KV."""
    body = parse_body(raw, ForkRequest)
    name = None if body.name is None else _checked_name(body.name)
    record = await asyncio.to_thread(store_of(call).fork, call.app, context_id, name)
    call.services.backend.fork_context(call.app, context_id, record.context_id)
    return json_reply(_object(record), 201)


async def delete(call: Call, context_id: str) -> Response:
    """Forget it: the history at once, its bytes on disk unless another context refers to them."""
    store = store_of(call)
    with store.claim(call.app, context_id):
        await asyncio.to_thread(store.delete, call.app, context_id)
    call.services.backend.drop_context(call.app, context_id)
    return json_reply({"id": context_id, "object": "context", "deleted": True})


async def take_turn(call: Call, context_id: str, raw: bytes) -> Response:
    """Append and generate."""
    body = parse_body(raw, TurnRequest)
    check_neutral(body)
    if num_samples(body) != 1:
        raise InvalidRequest(f"field 'n' is {body.n}. Expected 1: fork the context to go several ways.", param="n")
    if (body.messages is None) == (body.prompt is None):
        raise InvalidRequest("expected exactly one of the fields 'messages' and 'prompt'", param="messages")
    record = await asyncio.to_thread(store_of(call).get, call.app, context_id)
    is_named = body.model not in ("", "default")
    call.take_limits(body)
    model = await call.use_model(body.model if is_named else record.model, body.service_class)
    with_usage = wants_stream_usage(body)
    if body.stream:
        return EventStream(_events(call, context_id, body, model, with_usage=with_usage))
    return json_reply(await call.while_connected(_whole(call, context_id, body, model)))


# ---- a turn's reply ----


async def _whole(call: Call, context_id: str, body: TurnRequest, model: ModelInfo) -> dict[str, Any]:
    with store_of(call).claim(call.app, context_id):
        turn = await begin(call, context_id, body, model)
        async with aclosing(deltas_of(call, turn)) as deltas:
            async for _ in deltas:
                pass
    assert turn.finish is not None
    return {
        **Stamp("ctxturn-", model).fields("chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": turn.text, "refusal": None},
                "logprobs": None,
                "finish_reason": FINISH[turn.finish],
            }
        ],
        "usage": usage_object(call.record.totals),
        "context": _object(turn.record),
        "hob": receipt(call),
    }


async def _events(
    call: Call, context_id: str, body: TurnRequest, model: ModelInfo, *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Chunks as in chat; the last one carries the context as it is then."""
    head = Stamp("ctxturn-", model).event_head("chat.completion.chunk")

    def event(delta: dict[str, str], finish: str | None, more: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return head + b"," + to_json({"choices": [choice], **more})[1:] + b"\n\n"

    with store_of(call).claim(call.app, context_id):
        turn = await begin(call, context_id, body, model)
        is_begun = False
        async with aclosing(deltas_of(call, turn)) as deltas:
            async for delta in deltas:
                content = {} if is_begun else {"role": "assistant"}
                is_begun = True
                if delta.text or content:
                    yield event({**content, "content": delta.text}, None, {})
                if delta.finish_reason is not None:
                    last = {} if with_usage else {"hob": receipt(call)}
                    yield event({}, FINISH[delta.finish_reason], {"context": _object(turn.record), **last})
    if with_usage:
        usage = {"choices": [], "usage": usage_object(call.record.totals), "hob": receipt(call)}
        yield head + b"," + to_json(usage)[1:] + b"\n\n"


# ---- shapes ----


def _checked_name(name: str) -> str:
    if len(name) > MAX_NAME_CHARS:
        raise InvalidRequest(
            f"field 'name' has {len(name)} characters. Expected at most {MAX_NAME_CHARS}.", param="name"
        )
    return name


def _object(record: ContextRecord, kept: ContextKv | None = None) -> dict[str, Any]:
    """A context; `kept` where it was asked for what is on disk."""
    bits = record.facts.kv_bits
    return {
        "id": record.context_id,
        "object": "context",
        "name": record.facts.name,
        "kind": record.facts.kind or None,
        "model": record.model,
        "parent": record.parent_id,
        "num_tokens": record.num_tokens,
        "num_turns": record.num_turns,
        "created": int(record.created),
        "updated": int(record.updated),
        "opening": msgspec.to_builtins(record.facts.opening),
        "kv": {
            "bits": bits,
            "is_exact": bits == 16,
            "num_bytes": kept.num_bytes if kept else None,
            "num_blocks": {str(level): count for level, count in kept.num_blocks.items()} if kept else None,
        },
    }
