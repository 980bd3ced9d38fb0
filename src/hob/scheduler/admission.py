"""May this request enter? Answers at once: yes, or an error that names the limit, the value and when to come back."""

from __future__ import annotations

from collections.abc import Callable, Container

from hob.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from hob.request import Kind, Place, Request, Sequence

MAX_SEQUENCES = 1024
"""Most samples or continuations of one request."""
MOST_OF_FREE = 8
"""An app may have so many places in the queue for each that is free (dynamic thresholds, Choudhury and Hahne 1998): one
alone 910 of 1,024, two 482 each, and there is always room for one that has none."""


def check_request(
    request: Request,
    known: Container[str],
    *,
    vocab_size: int,
    context_length: int,
    num_waiting: int,
    num_own: int,
    max_waiting: int,
    retry_after_s: Callable[[int], float],
) -> None:
    """Raise InvalidRequest, ContextLengthExceeded or Overloaded unless the request can be served.

    num_waiting, num_own: sequences that wait, of all apps and of its own.
    """
    if request.request_id in known:
        raise InvalidRequest(f"request id '{request.request_id}' is in use. Expected a new one.")
    if not request.token_ids:
        raise InvalidRequest("the prompt has 0 tokens. Expected at least 1.", param="prompt")
    for name in ("weight", "ttft_deadline_s", "tpot_limit_s"):
        if (value := getattr(request, name)) is not None and not value > 0:
            raise InvalidRequest(f"{name} is {value}. Expected more than 0.", param=name)
    if request.continuations and (request.kind is not Kind.SCORE or request.prompt_logprobs is not None):
        raise InvalidRequest("continuations go with kind 'score' and without prompt_logprobs", param="continuations")
    if request.kind is Kind.EMBED:
        _check_pools(request)
    num_sequences = max(request.num_samples, len(request.continuations))
    if not 1 <= num_sequences <= MAX_SEQUENCES or request.num_samples < 1:
        raise InvalidRequest(f"{num_sequences} sequences are asked for. Expected 1 to {MAX_SEQUENCES}.", param="n")
    for token_ids in (request.token_ids, *request.continuations):
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise InvalidRequest(
                f"token ids span {min(token_ids, default=None)} to {max(token_ids, default=None)}. "
                f"Expected 0 to {vocab_size - 1}, at least one.",
                param="prompt",
            )
    _check_length(request, context_length)
    if num_waiting + num_sequences > max_waiting:
        raise Overloaded(
            f"the queue is full: {num_waiting} sequences wait, {num_sequences} more exceed the limit of {max_waiting}",
            retry_after_s=retry_after_s(num_waiting + num_sequences - max_waiting),
        )
    if num_own > MOST_OF_FREE * (max_waiting - num_waiting):
        raise Overloaded(
            f"{num_own} sequences of this app wait; the {max_waiting - num_waiting} places left of {max_waiting} are "
            "for others",
            retry_after_s=retry_after_s(1),
        )


def check_limits(request: Request, place: Place, stream_s: float, waited_s: float) -> None:
    """Raise Overloaded if the request's deadline or limit cannot be met now.

    stream_s: what a step would take with all streams that must have a row in it, this one included. waited_s: since
    the request arrived, e.g. for its model.
    """
    deadline_s, limit_s = request.ttft_deadline_s, request.tpot_limit_s
    expected_s = waited_s + place.first_token_s
    if deadline_s is not None and expected_s > deadline_s:
        raise Overloaded(
            f"the first token is wanted within {deadline_s:.3f} s, but is expected after {expected_s:.3f} s: "
            f"{place.num_ahead} wait before it and its prompt has {len(request.token_ids):,} tokens. "
            "Ask for a later deadline, or none.",
            param="ttft_deadline_s",
            retry_after_s=max(expected_s - deadline_s, 1.0),
        )
    if limit_s is not None and stream_s > limit_s:
        raise Overloaded(
            f"a token is wanted every {1e3 * limit_s:.1f} ms, but with the streams that run now a step takes "
            f"{1e3 * stream_s:.1f} ms. Ask for a higher limit, or none.",
            param="tpot_limit_s",
            retry_after_s=1.0,
        )


def _check_pools(request: Request) -> None:
    num_tokens = len(request.token_ids)
    for pool in request.pools:
        start, end = pool.rows(num_tokens)
        if pool.how not in ("mean", "max", "last") or not 0 <= start < end <= num_tokens:
            raise InvalidRequest(
                f"pool '{pool.how}' over tokens {pool.start} to {end}. Expected 'mean', 'max' or 'last' over at least "
                f"one of the {num_tokens} tokens.",
                param="pools",
            )
    if not request.pools or request.layers != sorted(set(request.layers)) or min(request.layers, default=0) < 0:
        raise InvalidRequest(
            f"{len(request.pools)} pools of layers {request.layers}. Expected a pool, layers ascending.", param="layers"
        )


def _check_length(request: Request, context_length: int) -> None:
    num_prompt = len(request.token_ids)
    if request.kind is Kind.GENERATE:
        num_more, what = request.sampling.max_tokens, "max_tokens"
    else:
        num_more, what = max((len(c) for c in request.continuations), default=0), "the longest continuation"
    if num_prompt + num_more > context_length:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt:,} tokens and {what} is {num_more:,}: "
            f"{num_prompt + num_more:,} in all, but the context is {context_length:,}",
            param="prompt",
        )
    if request.kind is Kind.GENERATE and num_more < 1:
        raise InvalidRequest(f"max_tokens is {num_more}. Expected at least 1.", param="max_tokens")


def sequences_of(request: Request, now: float) -> list[Sequence]:
    """One sequence per sample or continuation. All but the first wait until the first has computed the prompt."""
    if request.continuations:
        sequences = [Sequence(request, i, request.token_ids + c, now) for i, c in enumerate(request.continuations)]
        for sequence in sequences:
            sequence.score_from = len(request.token_ids)
    else:
        sequences = [Sequence(request, i, list(request.token_ids), now) for i in range(request.num_samples)]
        if request.prompt_logprobs is not None:
            for sequence in sequences:
                sequence.score_from = 1
    if request.prompt_logprobs is None:
        for sequence in sequences[1:]:
            sequence.leader = sequences[0]
    return sequences
