"""/hob/v1/public-prompts: prompts whose computed prefix all apps share. For the owner of the service.

GET    /hob/v1/public-prompts          list
PUT    /hob/v1/public-prompts/{name}   {model?, messages?, tools?} or {model?, prompt}; replaces one of that name
DELETE /hob/v1/public-prompts/{name}   private again; who is using it now is not disturbed

What apps may learn by it is whether anybody used that prompt lately, by the time it takes. What follows a public prompt
stays private: see kvcache/prefix.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.routing import Router

from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.chat import plain_messages
from hob.api.overview import check_owner
from hob.api.params import fit_context
from hob.api.replies import json_reply
from hob.api.routes import CallOf, add_routes
from hob.api.schema import Body, Message, Tool
from hob.api.services import ChatCodec
from hob.api.together import aside
from hob.api.tools import described
from hob.errors import InvalidRequest, ServiceError
from hob.kvcache.pool import BLOCK_SIZE
from hob.messages import ModelInfo
from hob.service.public_prompts import PublicPrompt, PublicPrompts

PATH = "/hob/v1/public-prompts"


class PublishRequest(Body, kw_only=True):
    """Body of PUT /hob/v1/public-prompts/{name}: messages, tools or both, or else a text."""

    model: str = ""
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    prompt: str | None = None


def register(router: Router, call_of: CallOf) -> None:
    """Add the routes."""
    add_routes(
        router,
        call_of,
        ("GET", PATH, list_prompts),
        ("PUT", PATH + "/{name}", put),
        ("DELETE", PATH + "/{name}", remove),
    )


async def list_prompts(call: Call) -> Response:
    """All of them, by name."""
    prompts = _prompts(call).by_name
    return json_reply({"object": "list", "data": [_object(name, prompts[name]) for name in sorted(prompts)]})


async def put(call: Call, name: str, raw: bytes) -> Response:
    """Publish a prompt. It holds for requests that come after the reply, and for those after a restart."""
    prompts, body = _prompts(call), parse_body(raw, PublishRequest)
    if (body.prompt is None) == (body.messages is None and body.tools is None):
        raise InvalidRequest(
            "expected either the field 'prompt', or 'messages' and 'tools' or one of these", param="messages"
        )
    model = await call.use_model(body.model)
    if call.adapter:
        raise InvalidRequest(
            f"field 'model' is '{body.model}', which has an adapter. Expected a model: what an adapter computes is not "
            "shared.",
            param="model",
        )
    made = await aside(len(raw), lambda: _made(call, body, model))
    before = prompts.by_name.get(name)
    await asyncio.to_thread(prompts.put, name, made)
    _tell(call, prompts, made.model, *([before.model] if before else []))
    return json_reply(_object(name, made))


async def remove(call: Call, name: str) -> Response:
    """From now on it is like any other prompt."""
    prompts = _prompts(call)
    removed = await asyncio.to_thread(prompts.remove, name)
    _tell(call, prompts, removed.model)
    return json_reply({"name": name, "object": "public_prompt", "deleted": True})


def _tell(call: Call, prompts: PublicPrompts, *models: str) -> None:
    for model in dict.fromkeys(models):
        call.services.backend.publish(model, prompts.token_ids(model))


def _made(call: Call, body: PublishRequest, model: ModelInfo) -> PublicPrompt:
    """The tokens that every request with this prompt begins with."""
    messages, tools = [], []
    if body.prompt is not None:
        token_ids = call.services.tokenizer.encode(body.prompt)
    else:
        messages = plain_messages(body.messages) if body.messages else []
        tools = described(body.tools) if body.tools else []
        token_ids = opening_of(call.services.chat, messages, tools)
    fit_context(len(token_ids), None, model.context_length, prompt_param="messages")
    if len(token_ids) < BLOCK_SIZE:
        raise InvalidRequest(
            f"the prompt has {len(token_ids)} tokens. Expected at least {BLOCK_SIZE}: what is shared is whole blocks "
            "of so many.",
            param="messages" if body.prompt is None else "prompt",
        )
    return PublicPrompt(model.name, token_ids, time.time(), messages, tools, body.prompt)


def opening_of(chat: ChatCodec, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    """What a conversation with these messages and tools begins with, whatever the user says next.

    Rendered before two stand-in messages of the user: what both conversations begin with does not depend on him.
    """
    one, two = (chat.encode([*messages, {"role": "user", "content": text}], tools or None) for text in ("y", "7"))
    length = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return one[:length]


def _prompts(call: Call) -> PublicPrompts:
    check_owner(call)
    if call.services.public_prompts is None:
        raise ServiceError("this service keeps no public prompts")
    return call.services.public_prompts


def _object(name: str, prompt: PublicPrompt) -> dict[str, Any]:
    num_tokens = len(prompt.token_ids)
    return {
        "name": name,
        "object": "public_prompt",
        "model": prompt.model,
        "num_tokens": num_tokens,
        "num_shared_tokens": num_tokens // BLOCK_SIZE * BLOCK_SIZE,
        "created": int(prompt.created),
        "messages": msgspec.to_builtins(prompt.messages),
        "tools": msgspec.to_builtins(prompt.tools),
        "prompt": prompt.prompt,
    }
