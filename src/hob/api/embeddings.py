"""/v1/embeddings: pooled hidden states of length 1."""

from __future__ import annotations

import base64
import math
import struct
from array import array

from starlette.responses import Response

from hob.api import score
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.inputs import token_lists
from hob.api.params import fit_context
from hob.api.receipt import receipt
from hob.api.replies import json_reply
from hob.api.schema import EmbeddingRequest
from hob.api.together import all_of, aside
from hob.errors import InvalidRequest
from hob.messages import ModelInfo
from hob.request import Kind, Pool, Request


async def embeddings(call: Call, raw: bytes) -> Response:
    """Embed each input."""
    body = parse_body(raw, EmbeddingRequest)
    model = await call.use_model(body.model, body.service_class)
    vectors = await embed_all(call, body, model, len(raw))
    as_base64 = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector) if as_base64 else vector}
        for i, vector in enumerate(vectors)
    ]
    count = call.record.totals.num_prompt_tokens
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_reply({"object": "list", "model": model.name, "data": data, "usage": usage, "hob": receipt(call)})


async def embed_all(call: Call, body: EmbeddingRequest, model: ModelInfo, num_bytes: int) -> list[list[float]]:
    """A vector of length 1 for each input. `num_bytes`: of the body, which is tokenised aside if it is long."""
    if body.dimensions is not None and body.dimensions != model.hidden_size:
        raise InvalidRequest(
            f"field 'dimensions' is {body.dimensions}. Expected {model.hidden_size}, the model's own size.",
            param="dimensions",
        )
    encode = call.services.tokenizer.encode
    inputs = await aside(num_bytes, lambda: token_lists(body.input, encode, vocab_size=model.vocab_size, param="input"))
    requests = []
    for token_ids in inputs:
        if body.allow_cut and (num_cut := len(token_ids) - model.context_length) > 0:
            call.record.totals.num_cut_tokens += num_cut
            del token_ids[model.context_length :]
        fit_context(len(token_ids), 0, model.context_length, prompt_param="input", least=0)
        requests.append(call.request(token_ids, Kind.EMBED, body.service_class, pools=[Pool(body.pooling or "mean")]))
    return await call.while_connected(all_of([_embed(call, request) for request in requests]))


async def _embed(call: Call, request: Request) -> list[float]:
    (result,) = await score.run(call, request)
    values = array("f", result.embedding).tolist()
    norm = math.sqrt(sum(value * value for value in values))
    return [value / norm for value in values] if norm else values


def _base64(vector: list[float]) -> str:
    """float32, little-endian, as OpenAI's clients read it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
