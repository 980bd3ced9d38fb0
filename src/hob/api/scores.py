"""/hob/v1/score: exact log-probabilities of given texts after a prompt, or of the prompt itself.

prompt or messages, and continuations    each continuation on its own, the prompt computed once
prompt alone                             each of its tokens after the first
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from hob.api import score
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.chat import plain_messages
from hob.api.inputs import token_lists
from hob.api.params import MAX_TOPS, fit_context
from hob.api.receipt import receipt
from hob.api.replies import json_reply
from hob.api.schema import ScoreRequest
from hob.api.together import aside
from hob.api.wire import token_name, usage_object
from hob.errors import InvalidRequest
from hob.messages import ModelInfo
from hob.request import Kind

MAX_CONTINUATIONS = 256


async def score_texts(call: Call, raw: bytes) -> Response:
    """Score what is asked for."""
    body = parse_body(raw, ScoreRequest)
    model = await call.use_model(body.model, body.service_class)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("expected exactly one of the fields 'prompt' and 'messages'", param="prompt")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOPS:
        raise InvalidRequest(
            f"field 'top_logprobs' is {body.top_logprobs}. Expected 0 to {MAX_TOPS}.", param="top_logprobs"
        )
    prompt, continuations = await aside(len(raw), lambda: _tokens(call, body, model))
    longest = max(map(len, continuations), default=0)
    fit_context(len(prompt) + longest, 0, model.context_length, prompt_param="prompt", least=0)
    tops = None if continuations else body.top_logprobs or 0
    request = call.request(prompt, Kind.SCORE, body.service_class, continuations=continuations, prompt_logprobs=tops)
    results = await call.while_connected(score.run(call, request))
    shown = continuations or [prompt[1:]]
    scores = [_object(call, ids, result) for ids, result in zip(shown, results, strict=True)]
    reply: dict[str, Any] = {"object": "list", "model": model.name, "scores": scores}
    return json_reply({**reply, "usage": usage_object(call.record.totals), "hob": receipt(call)})


def _tokens(call: Call, body: ScoreRequest, model: ModelInfo) -> tuple[list[int], list[list[int]]]:
    """Of the prompt and of each continuation."""
    tokenizer = call.services.tokenizer
    if body.messages is not None:
        prompt = call.services.chat.encode(plain_messages(body.messages))
    else:
        prompts = token_lists(
            body.prompt or "",
            lambda text: tokenizer.encode(text, parse_special=True),
            vocab_size=model.vocab_size,
            param="prompt",
        )
        if len(prompts) != 1:
            raise InvalidRequest(f"field 'prompt' has {len(prompts)} texts. Expected one.", param="prompt")
        prompt = prompts[0]
    if body.continuations is None:
        if len(prompt) < 2:
            raise InvalidRequest("the prompt has 1 token, which has no probability. Expected 2.", param="prompt")
        return prompt, []
    if not 1 <= len(body.continuations) <= MAX_CONTINUATIONS:
        raise InvalidRequest(
            f"field 'continuations' has {len(body.continuations)} texts. Expected 1 to {MAX_CONTINUATIONS}.",
            param="continuations",
        )
    if body.top_logprobs is not None:
        raise InvalidRequest("field 'top_logprobs' goes with a prompt alone", param="top_logprobs")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    return prompt, token_lists(body.continuations, encode, vocab_size=model.vocab_size, param="continuations")


def _object(call: Call, token_ids: list[int], result: score.Scored) -> dict[str, Any]:
    tokenizer = call.services.tokenizer
    found: dict[str, Any] = {
        "logprob": sum(result.logprobs),
        "num_tokens": len(token_ids),
        "tokens": [token_name(tokenizer, token_id) for token_id in token_ids],
        "token_logprobs": result.logprobs,
    }
    if result.tops:
        found["top_logprobs"] = [
            {token_name(tokenizer, token_id): logprob for token_id, logprob in tops} for tops in result.tops
        ]
    return found
