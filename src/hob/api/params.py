"""From the fields of a generation body to SamplingParams: ranges, contradictions, neutral values.

Every check names the field (`param`), its value and what was expected. Nothing is clamped and nothing dropped.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from hob.api.body import show
from hob.api.schema import NEUTRAL, ChatRequest, CompletionRequest, Sampling
from hob.errors import ContextLengthExceeded, InvalidRequest
from hob.request import SamplingParams, ServiceClass

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SAMPLES = 128
MAX_TOPS = 20
MAX_LIMIT_MS = 3_600_000.0
_INT64 = 1 << 63
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""Of the fields that say how to sample, both ends allowed."""


def check_neutral(body: msgspec.Struct, prefix: str = "", allowed: Mapping[str, tuple[Any, ...]] = NEUTRAL) -> None:
    """Refuse fields that Hob does not do unless they ask for nothing."""
    for name in body.__struct_fields__:
        values = allowed.get(name)
        if values is None:
            continue
        value = getattr(body, name)
        if value is not None and not any(value is a or (type(value) is type(a) and value == a) for a in values):
            expected = " or ".join(["null", *(show(a) for a in values)])
            raise InvalidRequest(
                f"field '{prefix}{name}' is {show(value)}, which this service does not support. Expected {expected}.",
                param=f"{prefix}{name}",
            )


def sampling_params(body: Sampling, *, vocab_size: int, stop_token_ids: list[int]) -> SamplingParams:
    """All but `max_tokens` and `logprobs`. A missing field has OpenAI's default; a missing seed is drawn."""
    return SamplingParams(
        temperature=_number(body, "temperature", 1.0),
        top_k=_integer(body, "top_k", 0, 0, vocab_size),
        top_p=_number(body, "top_p", 1.0),
        min_p=_number(body, "min_p", 0.0),
        repetition_penalty=_number(body, "repetition_penalty", 1.0),
        presence_penalty=_number(body, "presence_penalty", 0.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        seed=_seed(body.seed),
        stop_token_ids=stop_token_ids,
    )


def num_samples(body: Sampling) -> int:
    """OpenAI's `n`."""
    return _integer(body, "n", 1, 1, MAX_SAMPLES)


def stop_strings(body: Sampling) -> list[str]:
    """The stop strings, none empty."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"field 'stop' has {len(stops)} strings. Expected at most {MAX_STOPS}.", param="stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"field 'stop' holds a string of {len(stop)} characters. Expected 1 to {MAX_STOP_CHARS}.", param="stop"
            )
    return stops


def chat_max_tokens(body: ChatRequest) -> tuple[int | None, str]:
    """Most tokens to generate and the field that says so. Both names at once must agree."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"field 'max_tokens' is {old} and 'max_completion_tokens' is {new}. Expected one, or both the same.",
            param="max_completion_tokens",
        )
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def chat_logprobs(body: ChatRequest) -> int | None:
    """None: none; k: the chosen token's log-probability and the k most likely."""
    tops = body.top_logprobs
    if tops is not None and not body.logprobs:
        raise InvalidRequest(
            f"field 'top_logprobs' is {tops}, but 'logprobs' is not true. Set logprobs to true.", param="top_logprobs"
        )
    return _integer(body, "top_logprobs", 0, 0, MAX_TOPS) if body.logprobs else None


def completion_logprobs(body: CompletionRequest) -> int | None:
    """None: none; k: as above."""
    return None if body.logprobs is None else _integer(body, "logprobs", 0, 0, MAX_TOPS)


def wants_stream_usage(body: Sampling) -> bool:
    """Whether the stream ends with a usage chunk. Options without a stream contradict."""
    options = body.stream_options
    if options is None:
        return False
    if not body.stream:
        raise InvalidRequest("field 'stream_options' is given, but 'stream' is not true", param="stream_options")
    if options.include_obfuscation:
        raise InvalidRequest(
            "field 'stream_options.include_obfuscation' is true, which this service does not support. Expected false.",
            param="stream_options.include_obfuscation",
        )
    return options.include_usage


def fit_context(
    num_prompt: int,
    max_tokens: int | None,
    context_length: int,
    *,
    prompt_param: str,
    tokens_param: str = "max_tokens",
    least: int = 1,
) -> int:
    """Tokens to generate: as asked, or the rest of the context. Raises ContextLengthExceeded with the numbers."""
    if num_prompt + least > context_length:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt:,} tokens, but the context is {context_length:,} and the reply needs at least "
            f"{least}. Shorten the prompt.",
            param=prompt_param,
        )
    if max_tokens is None:
        return context_length - num_prompt
    if max_tokens < least:
        raise InvalidRequest(
            f"field '{tokens_param}' is {show(max_tokens)}. Expected at least {least}.", param=tokens_param
        )
    if num_prompt + max_tokens > context_length:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt:,} tokens and '{tokens_param}' is {show(max_tokens)}, but the context is "
            f"{context_length:,}. Ask for at most {context_length - num_prompt:,}.",
            param=tokens_param,
        )
    return max_tokens


def service_class(field: str | None, header: str | None) -> ServiceClass:
    """From the body's `service_class` or the X-Hob-Class header; both must agree."""
    if field is not None and header is not None and field != header:
        raise InvalidRequest(
            f"field 'service_class' is '{field}' and header X-Hob-Class is '{header}'. Expected one of them.",
            param="service_class",
        )
    name = field if field is not None else header
    if name is None:
        return ServiceClass.STANDARD
    try:
        return ServiceClass[name.upper()]
    except KeyError:
        known = ", ".join(c.name.lower() for c in ServiceClass)
        raise InvalidRequest(
            f"service class '{name}' is unknown. Expected one of: {known}.", param="service_class"
        ) from None


def limit_s(body: Sampling, name: str) -> float | None:
    """A deadline or limit of the body in seconds."""
    value: float | None = getattr(body, name)
    if value is not None and not 0 < value <= MAX_LIMIT_MS:
        raise InvalidRequest(f"field '{name}' is {value:g}. Expected more than 0, up to {MAX_LIMIT_MS:g}.", param=name)
    return None if value is None else value / 1e3


def _number(body: msgspec.Struct, name: str, default: float) -> float:
    value: float | None = getattr(body, name)
    if value is None:
        return default
    low, high = RANGES[name]
    if not low <= value <= high:
        raise InvalidRequest(f"field '{name}' is {value:g}. Expected {low:g} to {high:g}.", param=name)
    return value


def _integer(body: msgspec.Struct, name: str, default: int, low: int, high: int) -> int:
    value: int | None = getattr(body, name)
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidRequest(f"field '{name}' is {show(value)}. Expected {low} to {high}.", param=name)
    return value


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(63)
    if not -_INT64 <= seed < _INT64:
        raise InvalidRequest(f"field 'seed' is {show(seed)}. Expected a 64-bit integer.", param="seed")
    return seed & (_INT64 - 1)


def _logit_bias(given: dict[str, Any] | None, vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in (given or {}).items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"field 'logit_bias' has key '{key[:20]}'. Expected a token id from 0 to {vocab_size - 1}.",
                param="logit_bias",
            )
        if not -100.0 <= bias <= 100.0:
            raise InvalidRequest(
                f"field 'logit_bias' has {bias:g} for token {key}. Expected -100 to 100.", param="logit_bias"
            )
        biases[token_id] = bias
    return biases
