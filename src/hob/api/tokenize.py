"""/hob/v1/tokenize: text or messages to token ids, and token ids back to text."""

from __future__ import annotations

import codecs
from typing import Any

from starlette.responses import Response

from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.chat import plain_messages
from hob.api.inputs import token_lists
from hob.api.replies import json_reply
from hob.api.schema import TokenizeRequest
from hob.api.together import aside
from hob.api.wire import token_name
from hob.errors import InvalidRequest
from hob.messages import ModelInfo


async def tokenize(call: Call, raw: bytes) -> Response:
    """Tokens, their texts and the whole text, from whichever was given."""
    body = parse_body(raw, TokenizeRequest)
    model = await call.use_model(body.model)
    given = [name for name in ("text", "messages", "tokens") if getattr(body, name) is not None]
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise InvalidRequest(f"expected exactly one of text, messages and tokens, found {found}", param="text")
    return json_reply(await aside(len(raw), lambda: _tokens(call, body, model)))


def _tokens(call: Call, body: TokenizeRequest, model: ModelInfo) -> dict[str, Any]:
    tokenizer = call.services.tokenizer
    if body.text is not None:
        token_ids = tokenizer.encode(body.text, parse_special=True)
    elif body.messages is not None:
        token_ids = call.services.chat.encode(plain_messages(body.messages))
    else:
        token_ids = body.tokens or []
        if token_ids:
            token_lists(token_ids, tokenizer.encode, vocab_size=model.vocab_size, param="tokens")
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    text = "".join(decode(tokenizer.token_bytes(token_id)) for token_id in token_ids) + decode(b"", True)
    pieces = [token_name(tokenizer, token_id) for token_id in token_ids]
    return {"model": model.name, "tokens": token_ids, "num_tokens": len(token_ids), "pieces": pieces, "text": text}
