"""/hob/v1/classify: which label fits, with probabilities that are computed rather than sampled.

Each label is scored as what the model would say next, exactly, over one shared prefix:

    text        user turn "{instruction}\\n\\nText: {text}\\nLabel:", then the assistant says the label
    messages    the given conversation, then the assistant says the label
    prompt      the given raw text, then " " + label, or the given `continuations`, one for each label

`text` and `prompt` may be lists: then the reply has `data`, an answer for each, and they share the engine's steps.
The default instruction names the labels and does not depend on the text, so it is computed once and cached.
A label's probability is the softmax over labels of the sum of its tokens' log-probabilities; `normalise: "mean"`
divides each sum by its number of tokens first, which does not punish long labels.

`calibrate` takes out what the model prefers whatever the text: each label's probability is divided by its mean over
texts that say nothing (`content_free`; "N/A", "[MASK]" and none by themselves), then all are normalised again (Zhao et
al. 2021, arXiv:2102.09690). With `abstain_below` the answer is no label where the best one is less likely than that.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

from hob.api import score
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.chat import plain_messages
from hob.api.inputs import MAX_INPUTS
from hob.api.params import fit_context
from hob.api.receipt import receipt
from hob.api.replies import json_reply
from hob.api.schema import ClassifyRequest
from hob.api.together import all_of, aside
from hob.api.wire import usage_object
from hob.errors import InvalidRequest
from hob.request import Kind

MAX_LABELS = 128
MAX_CONTENT_FREE = 8
CONTENT_FREE = ["N/A", "[MASK]", ""]
INSTRUCTION = "Classify the text. Answer with one of these labels only: {labels}."


async def classify(call: Call, raw: bytes) -> Response:
    """Score the labels."""
    body = parse_body(raw, ClassifyRequest)
    model = await call.use_model(body.model, body.service_class)
    labels, texts = _labels(body)
    _check_threshold(body)
    asked, is_list = _asked(body)
    prefixes, free = await aside(len(raw), lambda: (_prefixes(call, asked, labels), _content_free(call, body, labels)))
    tokenizer = call.services.tokenizer
    continuations = [tokenizer.encode(text, add_bos=False) for text in texts]
    longest = max(map(len, continuations))
    requests = []
    for token_ids in (*prefixes, *free):
        fit_context(len(token_ids) + longest, 0, model.context_length, prompt_param=_source(body), least=0)
        requests.append(call.request(token_ids, Kind.SCORE, body.service_class, continuations=continuations))
    found = await call.while_connected(all_of([score.run(call, request) for request in requests]))
    baselines = [_probabilities(results, body.normalise) for results in found[len(prefixes) :]]
    answers = [_answer(body, labels, results, baselines) for results in found[: len(prefixes)]]
    reply: dict[str, Any] = {
        "object": "classification",
        "model": model.name,
        **({"data": answers} if is_list else answers[0]),
        "usage": usage_object(call.record.totals),
        "hob": receipt(call),
    }
    return json_reply(reply)


def _answer(
    body: ClassifyRequest, labels: list[str], results: list[score.Scored], baselines: list[list[float]]
) -> dict[str, Any]:
    """The label of one text, and of each label what it is worth."""
    probabilities = _probabilities(results, body.normalise)
    if baselines:
        probabilities = calibrated(probabilities, baselines)
    scored = [
        {"label": label, "probability": p, "logprob": sum(result.logprobs), "num_tokens": len(result.logprobs)}
        for label, p, result in zip(labels, probabilities, results, strict=True)
    ]
    best = max(scored, key=lambda entry: entry["probability"])
    abstains = body.abstain_below is not None and max(probabilities) < body.abstain_below
    return {"label": None if abstains else best["label"], "labels": scored}


def _probabilities(results: list[score.Scored], normalise: str) -> list[float]:
    sums = [sum(result.logprobs) for result in results]
    counts = [len(result.logprobs) for result in results]
    return softmax([s / n for s, n in zip(sums, counts, strict=True)] if normalise == "mean" else sums)


def calibrated(probabilities: list[float], baselines: list[list[float]]) -> list[float]:
    """Probabilities over those of texts that say nothing, normalised."""
    means = [sum(column) / len(baselines) for column in zip(*baselines, strict=True)]
    return softmax([_log(p) - _log(mean) for p, mean in zip(probabilities, means, strict=True)])


def _log(probability: float) -> float:
    return math.log(max(probability, 1e-300))


def _check_threshold(body: ClassifyRequest) -> None:
    threshold = body.abstain_below
    if threshold is not None and not 0 <= threshold <= 1:
        raise InvalidRequest(f"field 'abstain_below' is {threshold:g}. Expected 0 to 1.", param="abstain_below")


def _content_free(call: Call, body: ClassifyRequest, labels: list[str]) -> list[list[int]]:
    """Prefixes of the same task whose text says nothing. None without `calibrate`."""
    source = _source(body)
    if not body.calibrate:
        if body.content_free is not None:
            raise InvalidRequest("field 'content_free' is given, but 'calibrate' is not true", param="content_free")
        return []
    texts = CONTENT_FREE if body.content_free is None and source == "text" else body.content_free
    if source == "messages" or not texts:
        raise InvalidRequest(
            f"calibrating needs 'text', or 'prompt' with prompts that say nothing in 'content_free'; found '{source}'",
            param="content_free",
        )
    if len(texts) > MAX_CONTENT_FREE:
        raise InvalidRequest(
            f"field 'content_free' has {len(texts)} texts. Expected at most {MAX_CONTENT_FREE}.", param="content_free"
        )
    return _prefixes(call, [msgspec.structs.replace(body, **{source: text}) for text in texts], labels)


def softmax(values: list[float]) -> list[float]:
    """Probabilities from log-probabilities, safe for very small ones."""
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]


def _source(body: ClassifyRequest) -> str:
    """Which of the three sources is given. Raises InvalidRequest unless it is exactly one."""
    given = [name for name in ("text", "messages", "prompt") if getattr(body, name) is not None]
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise InvalidRequest(f"expected exactly one of text, messages and prompt, found {found}", param="text")
    return given[0]


def _asked(body: ClassifyRequest) -> tuple[list[ClassifyRequest], bool]:
    """A body for each text or prompt, and whether they came as a list."""
    source = _source(body)
    given = getattr(body, source)
    if source == "messages" or isinstance(given, str):
        return [body], False
    if not 1 <= len(given) <= MAX_INPUTS:
        raise InvalidRequest(f"field '{source}' has {len(given):,} texts. Expected 1 to {MAX_INPUTS}.", param=source)
    return [msgspec.structs.replace(body, **{source: text}) for text in given], True


def _labels(body: ClassifyRequest) -> tuple[list[str], list[str]]:
    """Labels as reported and the texts that are scored for them."""
    source = _source(body)
    if body.continuations is not None and source != "prompt":
        raise InvalidRequest(f"field 'continuations' goes with 'prompt', not with '{source}'", param="continuations")
    if body.instruction is not None and source != "text":
        raise InvalidRequest(f"field 'instruction' goes with 'text', not with '{source}'", param="instruction")
    labels = body.labels if body.labels is not None else body.continuations
    if labels is None or not 2 <= len(labels) <= MAX_LABELS:
        count = "missing" if labels is None else f"{len(labels)} labels"
        raise InvalidRequest(f"field 'labels': {count}. Expected 2 to {MAX_LABELS}.", param="labels")
    if len(set(labels)) != len(labels):
        raise InvalidRequest("field 'labels' names a label twice", param="labels")
    texts = body.continuations or [(" " if source == "prompt" else "") + label for label in labels]
    if len(texts) != len(labels):
        raise InvalidRequest(
            f"field 'continuations' has {len(texts)} texts for {len(labels)} labels. Expected one for each.",
            param="continuations",
        )
    for text in (*labels, *texts):
        if not text:
            raise InvalidRequest("a label is an empty text. Expected at least one token.", param="labels")
    return labels, texts


def _prefixes(call: Call, bodies: list[ClassifyRequest], labels: list[str]) -> list[list[int]]:
    """Token ids of what comes before the labels."""
    return [_prefix(call, body, labels) for body in bodies]


def _prefix(call: Call, body: ClassifyRequest, labels: list[str]) -> list[int]:
    if body.prompt is not None:
        assert isinstance(body.prompt, str)  # see _asked
        token_ids = call.services.tokenizer.encode(body.prompt, parse_special=True)
        if not token_ids:
            raise InvalidRequest("field 'prompt' is an empty text. Expected at least one token.", param="prompt")
        return token_ids
    if body.messages is not None:
        return call.services.chat.encode(plain_messages(body.messages))
    instruction = body.instruction or INSTRUCTION.format(labels=", ".join(labels))
    content = f"{instruction}\n\nText: {body.text}\nLabel:"
    return call.services.chat.encode([{"role": "user", "content": content}])
