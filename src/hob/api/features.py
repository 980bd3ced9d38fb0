"""/hob/v1/features: hidden states after named layers, pooled over spans of a text, one forward pass per text.

A text comes in parts, each with the names of the spans it belongs to; a pool is a way ("mean", "max", "last") and a
span, or the whole text. The reply has one base64 array of little-endian float32 per text: pools x layers x hidden size.
The pass ends at the last layer named, and no logits are computed.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from hob.api import score
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.inputs import MAX_INPUTS
from hob.api.replies import json_reply
from hob.api.schema import Body
from hob.api.services import TextCodec
from hob.api.together import all_of, aside
from hob.api.wire import usage_object
from hob.errors import InvalidRequest
from hob.messages import ModelInfo
from hob.request import Kind, Pool, Request

MAX_POOLS = 16


class PartBody(Body, kw_only=True):
    """A stretch of a text."""

    text: str
    spans: list[str] = msgspec.field(default_factory=list)


class PoolBody(Body, kw_only=True):
    """How the states of a span become one; without a span, those of the whole text."""

    how: Literal["mean", "max", "last"] = "mean"
    span: str | None = None


class FeaturesRequest(Body, kw_only=True):
    """Body of /hob/v1/features."""

    model: str = ""
    input: list[str | list[PartBody]]
    pools: list[PoolBody] = msgspec.field(default_factory=lambda: [PoolBody()])
    layers: list[int] = msgspec.field(default_factory=list)
    """0 is the embedding, the model's number of layers the final norm. Empty: the last."""
    max_tokens: int | None = None
    """Longer texts lose the middle of their longest part. Unset: the model's context."""
    service_class: str | None = None


async def features(call: Call, raw: bytes) -> Response:
    """Pooled states of each text."""
    body = parse_body(raw, FeaturesRequest)
    model = await call.use_model(body.model, body.service_class)
    states = await pooled_states(call, model, body, len(raw))
    reply: dict[str, Any] = {
        "object": "features",
        "model": model.name,
        "quantisation": model.quantisation,
        "shape": [len(body.pools), max(len(body.layers), 1), model.hidden_size],
        "data": [base64.b64encode(state).decode() for state in states],
        "usage": usage_object(call.record.totals),
    }
    return json_reply(reply)


async def pooled_states(call: Call, model: ModelInfo, body: FeaturesRequest, num_bytes: int) -> list[bytes]:
    """Of each input, (pools, layers, hidden_size) float32."""
    _check(body, model)
    limit = min(body.max_tokens or model.context_length, model.context_length)
    inputs = await aside(num_bytes, lambda: _tokenised(body, call.services.tokenizer, limit))
    requests = [
        call.request(token_ids, Kind.EMBED, body.service_class, pools=pools, layers=body.layers)
        for token_ids, pools in inputs
    ]
    return await call.while_connected(all_of([_one(call, request) for request in requests]))


async def _one(call: Call, request: Request) -> bytes:
    (result,) = await score.run(call, request)
    return result.embedding


def _check(body: FeaturesRequest, model: ModelInfo) -> None:
    if not 1 <= len(body.input) <= MAX_INPUTS:
        raise InvalidRequest(f"field 'input' has {len(body.input):,} texts. Expected 1 to {MAX_INPUTS}.", param="input")
    if not 1 <= len(body.pools) <= MAX_POOLS:
        raise InvalidRequest(f"field 'pools' has {len(body.pools)} pools. Expected 1 to {MAX_POOLS}.", param="pools")
    if body.layers != sorted(set(body.layers)) or not all(0 <= layer <= model.num_layers for layer in body.layers):
        raise InvalidRequest(
            f"field 'layers' is {body.layers}. Expected ascending numbers of 0 to {model.num_layers}.", param="layers"
        )
    if body.max_tokens is not None and body.max_tokens < 2:
        raise InvalidRequest(f"field 'max_tokens' is {body.max_tokens}. Expected at least 2.", param="max_tokens")


def _tokenised(body: FeaturesRequest, codec: TextCodec, limit: int) -> list[tuple[list[int], list[Pool]]]:
    """Token ids and pools of each input."""
    found = []
    for i, text in enumerate(body.input):
        parts = [PartBody(text=text)] if isinstance(text, str) else text
        lists = [codec.encode(part.text, add_bos=j == 0) for j, part in enumerate(parts)]
        _shorten(lists, limit)
        token_ids = [token_id for ids in lists for token_id in ids]
        if not token_ids:
            raise InvalidRequest(f"field 'input[{i}]' is an empty text. Expected at least one token.", param="input")
        found.append((token_ids, [_pool(pool, parts, lists, i) for pool in body.pools]))
    return found


def _shorten(lists: list[list[int]], limit: int) -> None:
    """Cut the middle out of the longest part, so that all together have at most `limit` tokens."""
    excess = sum(map(len, lists)) - limit
    if excess <= 0:
        return
    longest = max(lists, key=len)
    kept = len(longest) - excess
    if kept < 2:
        raise InvalidRequest(f"a text in {len(lists)} parts cannot be cut to {limit} tokens", param="input")
    longest[kept - kept // 4 : len(longest) - kept // 4] = []


def _pool(pool: PoolBody, parts: list[PartBody], lists: list[list[int]], i: int) -> Pool:
    """A pool over the tokens from a span's first part to its last."""
    if pool.span is None:
        return Pool(pool.how)
    ends, total = [], 0
    for ids in lists:
        ends.append((total, total + len(ids)))
        total += len(ids)
    inside = [span for part, span in zip(parts, ends, strict=True) if pool.span in part.spans]
    if not inside or inside[0][0] == inside[-1][1]:
        raise InvalidRequest(f"field 'input[{i}]' has no token in the span '{pool.span}'", param=f"input[{i}]")
    return Pool(pool.how, inside[0][0], inside[-1][1])
