"""Exact log-probabilities of given tokens, and pooled states: the requests that generate nothing."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field

from hob.api.call import Call
from hob.errors import InternalError
from hob.request import Request, Top


@dataclass(slots=True)
class Scored:
    """Of one sequence."""

    logprobs: list[float] = field(default_factory=list)
    tops: list[list[Top]] = field(default_factory=list)
    embedding: bytes = b""
    """(pools, layers, hidden_size) float32."""


async def run(call: Call, request: Request) -> list[Scored]:
    """Results of each sequence of a SCORE or EMBED request. Counts prompt and continuations in the call's totals."""
    totals = call.record.totals
    totals.num_prompt_tokens += len(request.token_ids) + sum(map(len, request.continuations))
    results = [Scored() for _ in range(max(1, len(request.continuations)))]
    num_left = len(results)
    is_noted = False
    async with aclosing(call.services.backend.submit(request)) as outputs:
        async for output in outputs:
            result = results[output.index]
            result.logprobs += output.scores
            result.tops += output.score_tops
            result.embedding += output.embedding
            if output.usage is not None and output.index == 0 and not is_noted:
                is_noted = True
                totals.note(output.usage)
            if output.finish_reason is not None:
                num_left -= 1
                if output.usage is not None:
                    totals.close(output.usage)
    call.record.note_output()
    if num_left:
        raise InternalError(f"{num_left} of {len(results)} sequences never ended")
    return results
