"""/v1/completions: text after a raw prompt, OpenAI's legacy format, with the exact log-likelihood of the prompt.

`echo` with `logprobs` first scores the prompt (once, whatever `n`), then generates from it; with max_tokens 0 it only
scores. The prompt's blocks stay in the prefix cache between the two, so the second hardly computes it again.
"""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from starlette.responses import Response

from hob.api import score
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.generate import Delta, Generation, TokenScore
from hob.api.grammars import grammar_of
from hob.api.inputs import token_lists
from hob.api.params import (
    check_neutral,
    completion_logprobs,
    fit_context,
    num_samples,
    sampling_params,
    stop_strings,
    wants_stream_usage,
)
from hob.api.receipt import receipt
from hob.api.replies import json_reply
from hob.api.schema import CompletionRequest
from hob.api.services import TextCodec
from hob.api.stream import EventStream, Shortcut
from hob.api.together import all_of, aside, interleave
from hob.api.wire import FINISH, Stamp, to_json, token_name, usage_object
from hob.errors import InvalidRequest
from hob.request import Kind, Request, SamplingParams, SequenceOutput

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

Logprobs = dict[str, Any]
"""OpenAI's legacy form: parallel lists."""


@dataclass(slots=True)
class Prompt:
    """One of a call's prompts and what is wanted of it."""

    request: Request
    first_index: int
    """Index of its first choice among all choices of the reply."""
    generation: Generation | None
    """None: nothing is to be generated."""
    echo: bool
    text: str = ""
    """The prompt as text, where it is echoed."""
    offsets: list[int] = field(default_factory=list)
    """Characters of `text` before each prompt token."""


async def completions(call: Call, raw: bytes) -> Response:
    """Continue each prompt."""
    body = parse_body(raw, CompletionRequest)
    check_neutral(body)
    call.take_limits(body)
    model = await call.use_model(body.model, body.service_class)
    with_usage = wants_stream_usage(body)
    prompts = await aside(len(raw), lambda: prompts_of(call, body))
    stamp = Stamp("cmpl-", model)
    if body.stream:
        chunks = _Chunks(call, prompts, stamp, with_usage=with_usage)
        lone = prompts[0].generation if len(prompts) == 1 and not prompts[0].echo else None
        outputs = None if lone is None else lone.outputs
        return EventStream(_events(call, prompts, chunks), _shortcut(prompts, chunks), outputs=outputs)
    choices = await call.while_connected(all_of([_whole(call, prompt) for prompt in prompts]))
    fields = stamp.fields("text_completion")
    return json_reply(
        {
            **fields,
            "choices": list(chain.from_iterable(choices)),
            "usage": usage_object(call.record.totals),
            "hob": receipt(call),
        }
    )


def prompts_of(call: Call, body: CompletionRequest) -> list[Prompt]:
    """What is wanted of each prompt of a body."""
    model, tokenizer = call.services.backend.model, call.services.tokenizer
    samples, stops, echo = num_samples(body), stop_strings(body), bool(body.echo)
    grammar = grammar_of(body)
    if body.best_of is not None and body.best_of != samples:
        raise InvalidRequest(f"field 'best_of' is {body.best_of}. Expected n, which is {samples}.", param="best_of")
    if body.max_tokens == 0 and not echo:
        raise InvalidRequest("field 'max_tokens' is 0 and 'echo' is not true: nothing is asked for", param="max_tokens")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, parse_special=True)

    prompts: list[Prompt] = []
    for token_ids in token_lists(body.prompt, encode, vocab_size=model.vocab_size, param="prompt"):
        params = sampling_params(body, vocab_size=model.vocab_size, stop_token_ids=list(tokenizer.stop_token_ids))
        params.logprobs = completion_logprobs(body)
        if body.allow_cut and (num_cut := len(token_ids) + (body.max_tokens or 1) - model.context_length) > 0:
            num_cut = min(num_cut, len(token_ids) - 1)
            call.record.totals.num_cut_tokens += num_cut
            del token_ids[:num_cut]
        params.max_tokens = _max_tokens(body.max_tokens, len(token_ids), model.context_length)
        request = call.request(
            token_ids, Kind.GENERATE, body.service_class, sampling=params, num_samples=samples, grammar=grammar
        )
        generation = None
        if params.max_tokens:
            is_scored = echo and params.logprobs is not None
            totals, backend = call.record.totals, call.services.backend
            generation = Generation(backend, tokenizer, request, stops, totals, counts_prompt=not is_scored)
        prompt = Prompt(request, len(prompts) * samples, generation, echo)
        if echo:
            prompt.text, prompt.offsets = _text_and_offsets(tokenizer, token_ids)
        prompts.append(prompt)
    return prompts


def _max_tokens(asked: int | None, num_prompt: int, context_length: int) -> int:
    if asked == 0:
        return fit_context(num_prompt, 0, context_length, prompt_param="prompt", least=0)
    rest = fit_context(num_prompt, asked, context_length, prompt_param="prompt")
    return min(rest, DEFAULT_MAX_TOKENS) if asked is None else rest


def _text_and_offsets(tokenizer: TextCodec, token_ids: list[int]) -> tuple[str, list[int]]:
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    text, offsets = "", []
    for token_id in token_ids:
        offsets.append(len(text))
        text += decode(tokenizer.token_bytes(token_id))
    return text + decode(b"", True), offsets


async def _deltas(call: Call, prompt: Prompt) -> AsyncGenerator[tuple[Prompt, Delta, Logprobs | None], None]:
    """The choices' deltas with their log-probabilities; an echoed prompt is each choice's first."""
    request = prompt.request
    is_scored = prompt.echo and request.sampling.logprobs is not None
    if prompt.echo:
        echoed = await _score_prompt(call, prompt) if is_scored else None
        call.record.note_output()
        for i in range(request.num_samples):
            yield prompt, Delta(i, prompt.text, []), echoed
    if prompt.generation is None:
        if not is_scored:
            call.record.totals.num_prompt_tokens += len(request.token_ids)
        return
    async with aclosing(prompt.generation.deltas()) as deltas:
        async for delta in deltas:
            call.record.note_output()
            yield prompt, delta, _delta_logprobs(call.services.tokenizer, prompt, delta)


async def _score_prompt(call: Call, prompt: Prompt) -> Logprobs:
    """OpenAI's legacy form over the prompt; the first token has no probability."""
    token_ids, num_tops = prompt.request.token_ids, prompt.request.sampling.logprobs
    scored = score.Scored()
    if len(token_ids) > 1:
        request = Request(
            prompt.request.request_id + "-echo",
            prompt.request.app,
            token_ids,
            Kind.SCORE,
            sampling=SamplingParams(max_tokens=0),
            prompt_logprobs=num_tops,
            service_class=prompt.request.service_class,
        )
        (scored,) = await score.run(call, request)
    else:
        call.record.totals.num_prompt_tokens += 1
    tokenizer = call.services.tokenizer
    tops = scored.tops or [[] for _ in scored.logprobs]
    later = [
        TokenScore(token_id, logprob, top, offset)
        for token_id, logprob, top, offset in zip(token_ids[1:], scored.logprobs, tops, prompt.offsets[1:], strict=True)
    ]
    form = _logprobs(tokenizer, later, 0)
    form["tokens"].insert(0, token_name(tokenizer, token_ids[0]))
    form["token_logprobs"].insert(0, None)
    form["top_logprobs"].insert(0, None)
    form["text_offset"].insert(0, 0)
    return form


def _delta_logprobs(tokenizer: TextCodec, prompt: Prompt, delta: Delta) -> Logprobs | None:
    """A stop token is the last of them: who asks for one token after an echo counts on one entry after the echo's."""
    if prompt.request.sampling.logprobs is None:
        return None
    ended = [] if delta.end is None else [delta.end]
    return _logprobs(tokenizer, delta.scores + ended, len(prompt.text))


def _logprobs(tokenizer: TextCodec, scores: list[TokenScore], shift: int) -> Logprobs:
    """OpenAI's legacy form. The token itself is among its tops, also where it is not one of the most likely."""
    tops = []
    for entry in scores:
        top = {token_name(tokenizer, token_id): logprob for token_id, logprob in entry.tops}
        top.setdefault(token_name(tokenizer, entry.token_id), entry.logprob)
        tops.append(top)
    return {
        "tokens": [token_name(tokenizer, entry.token_id) for entry in scores],
        "token_logprobs": [entry.logprob for entry in scores],
        "top_logprobs": tops,
        "text_offset": [entry.offset + shift for entry in scores],
    }


async def _whole(call: Call, prompt: Prompt) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = [
        {"index": prompt.first_index + i, "text": "", "logprobs": None, "finish_reason": "length"}
        for i in range(prompt.request.num_samples)
    ]
    async with aclosing(_deltas(call, prompt)) as deltas:
        async for _, delta, logprobs in deltas:
            choice = choices[delta.index]
            choice["text"] += delta.text
            if delta.finish_reason is not None:
                choice["finish_reason"] = FINISH[delta.finish_reason]
            if logprobs is None:
                continue
            if choice["logprobs"] is None:
                choice["logprobs"] = {name: [] for name in logprobs}
            for name, values in logprobs.items():
                choice["logprobs"][name] += values
    return choices


class _Chunks:
    """The events of one reply. The last one carries the receipt."""

    def __init__(self, call: Call, prompts: list[Prompt], stamp: Stamp, *, with_usage: bool) -> None:
        self.with_usage = with_usage
        self._call = call
        self._num_left = sum(prompt.request.num_samples for prompt in prompts)
        self._tokenizer, self._totals = call.services.tokenizer, call.record.totals
        self._head = stamp.event_head("text_completion")
        self._tail = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"

    def of(self, prompt: Prompt, delta: Delta, logprobs: Logprobs | None) -> bytes:
        """The event of a delta."""
        finish = "length" if prompt.generation is None else FINISH.get(delta.finish_reason)
        tail = self._tail
        if finish is not None:
            self._num_left -= 1
            if self._num_left == 0 and not self.with_usage:
                tail = b'}],"hob":' + to_json(receipt(self._call)) + b"}\n\n"
        return b'%b,"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            prompt.first_index + delta.index,
            to_json(delta.text),
            b"null" if logprobs is None else to_json(logprobs),
            b"null" if finish is None else to_json(finish),
            tail,
        )

    def of_output(self, prompt: Prompt, generation: Generation, output: SequenceOutput) -> bytes:
        """The same from what the engine sent. Empty while there is nothing to show."""
        delta = generation.push(output)
        return b"" if delta is None else self.of(prompt, delta, _delta_logprobs(self._tokenizer, prompt, delta))

    def usage(self) -> bytes:
        """The event after all choices."""
        usage = {"choices": [], "usage": usage_object(self._totals), "hob": receipt(self._call)}
        return self._head + b"," + to_json(usage)[1:] + b"\n\n"


def _shortcut(prompts: list[Prompt], chunks: _Chunks) -> Shortcut | None:
    """For a lone prompt: several ones' deltas meet in a queue, which must not be overtaken."""
    prompt = prompts[0]
    generation = prompt.generation
    if len(prompts) > 1 or generation is None or not generation.ends_with_engine:
        return None
    return Shortcut(generation.outputs, partial(chunks.of_output, prompt, generation))


async def _events(call: Call, prompts: list[Prompt], chunks: _Chunks) -> AsyncGenerator[bytes, None]:
    async with aclosing(interleave([_deltas(call, prompt) for prompt in prompts])) as deltas:
        async for prompt, delta, logprobs in deltas:
            yield chunks.of(prompt, delta, logprobs)
    if chunks.with_usage:
        yield chunks.usage()
