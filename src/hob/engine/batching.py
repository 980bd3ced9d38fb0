"""From a plan to a batch and back: which output each row owes, and whose it is.

Stands between scheduler and engine so that neither knows the other: takes anything shaped like the scheduler's chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hob.engine.base import Batch, Draw, Engine, Out, Sampled
from hob.errors import InternalError
from hob.kvcache.compression import MIXED
from hob.kvcache.pool import num_blocks_for
from hob.request import Kind, Sequence, Top

MEASURE_EVERY = 64
"""Tokens after which a context's attention is measured again: it costs as much as a step or two."""


_STREAMING = [int(Out.LOGITS)], [0]
"""`_outputs` of a row after which a token is drawn, by far the most frequent one. Not to be changed."""


class ChunkLike(Protocol):
    """Rows [start, end) of a sequence, the last ones of guessed tokens."""

    sequence: Sequence
    start: int
    num_rows: int
    drafts: list[int]

    @property
    def end(self) -> int: ...


def build_batch(chunks: Many[ChunkLike], num_layers: int, adapters: Mapping[str, int]) -> Batch:
    """Lay out the rows of a step of a model of `num_layers`, `adapters` by name. Takes about 1 us a row."""
    token: list[int] = []
    index: list[int] = []
    row_start, table_start, blocks = [0], [0], list[int]()
    out: list[int] = []
    target: list[int] = []
    num_tops, measured = 0, -1
    for chunk in chunks:
        sequence = chunk.sequence
        token += sequence.token_ids[chunk.start : chunk.end]
        token += chunk.drafts
        index += range(chunk.start, chunk.end)
        row_start.append(len(token))
        blocks += sequence.block_table
        table_start.append(len(blocks))
        kinds, targets = _outputs(chunk)
        out += kinds
        if measured < 0 and wants_density(chunk):
            measured = len(token) - 1
        target += targets
        if sequence.request.prompt_logprobs and Out.SCORE in kinds:
            num_tops = max(num_tops, sequence.request.prompt_logprobs)
    indices = np.array(index, np.int32)
    layers = sorted({layer for chunk in chunks for layer in _layers(chunk, num_layers)})
    is_shallow = all(chunk.sequence.is_shallow for chunk in chunks)
    return Batch(
        token=np.array(token, np.int32),
        position=indices,
        index=indices,
        out=np.array(out, np.uint8),
        target=np.array(target, np.int32),
        row_start=np.array(row_start, np.int32),
        table_start=np.array(table_start, np.int32),
        blocks=np.array(blocks, np.int32),
        adapter=np.array([_adapter_id(chunk, adapters) for chunk in chunks], np.int32),
        num_tops=num_tops,
        layers=np.array(layers, np.int32),
        depth=max(layers[-1], 1) if is_shallow else 0,
        measured=measured,
    )


def _adapter_id(chunk: ChunkLike, adapters: Mapping[str, int]) -> int:
    name = chunk.sequence.request.adapter
    if name and name not in adapters:
        raise InternalError(f"adapter '{name}' is not loaded with the model any more: its files changed. Ask again.")
    return adapters[name] if name else 0


def _outputs(chunk: ChunkLike) -> tuple[list[int], list[int]]:
    """`Out` and target of each row of a chunk."""
    sequence, num_rows = chunk.sequence, chunk.num_rows
    if num_rows == 1 and wants_token(chunk) and sequence.score_from is None:  # a stream's row
        return _STREAMING
    kinds, targets = [int(Out.NONE)] * num_rows, [0] * num_rows
    first = max(sequence.first_wanted_row - chunk.start, 0)
    if sequence.request.kind is Kind.EMBED:
        end = max(pool.rows(sequence.num_tokens)[1] for pool in sequence.request.pools) - chunk.start
        kinds[first:end] = [int(Out.HIDDEN)] * len(kinds[first:end])
        return kinds, targets
    if sequence.score_from is not None:
        for row in range(max(first, sequence.score_from - 1 - chunk.start), num_rows):
            if chunk.start + row + 1 < sequence.num_scorable_tokens:
                kinds[row] = int(Out.SCORE)
                targets[row] = sequence.token_ids[chunk.start + row + 1]
    if wants_token(chunk):
        num_draws = 1 + len(chunk.drafts)
        kinds[-num_draws:] = [int(Out.LOGITS)] * num_draws
    return kinds, targets


def _layers(chunk: ChunkLike, num_layers: int) -> list[int]:
    """The layers whose states a chunk wants."""
    request = chunk.sequence.request
    return (request.layers or [num_layers]) if request.kind is Kind.EMBED else []


def wants_token(chunk: ChunkLike) -> bool:
    """Whether a token is to be drawn after the chunk's last row, and after each one before it that leads to a guess."""
    num_known = chunk.end - len(chunk.drafts)
    return chunk.sequence.request.kind is Kind.GENERATE and num_known == chunk.sequence.num_tokens


def wants_density(chunk: ChunkLike) -> bool:
    """Whether the attention of the chunk's last row is to be measured: now and then in a turn of a context whose blocks
    get bits by it."""
    sequence = chunk.sequence
    if sequence.request.context_id is None or sequence.request.kv_bits != MIXED or not wants_token(chunk):
        return False
    return not sequence.density.num_tokens or chunk.end - sequence.density.num_tokens >= MEASURE_EVERY


def draws_of(chunks: Many[ChunkLike]) -> list[Draw]:
    """How to sample the step's LOGITS rows, in their order: of guessed tokens as if the guesses before were true."""
    return [
        Draw(
            params=chunk.sequence.request.sampling,
            sample_index=chunk.sequence.index,
            position=chunk.sequence.num_tokens + i,
            token_ids=chunk.sequence.token_ids + chunk.drafts[:i] if i else chunk.sequence.token_ids,
            num_generated=chunk.sequence.num_generated + i,
        )
        for chunk in chunks
        if wants_token(chunk)
        for i in range(1 + len(chunk.drafts))
    ]


def true_ones(drafts: list[int], drawn: list[Sampled]) -> list[Sampled]:
    """Of what was drawn, what holds: the first, and each token after a guess that was drawn too."""
    num_true = 0
    while num_true < len(drafts) and drawn[num_true].token_id == drafts[num_true]:
        num_true += 1
    return drawn[: num_true + 1]


class ChunkValues(Protocol):
    """Where `collect` puts a chunk's values: the scheduler's ChunkResult."""

    drawn: list[Sampled]
    scores: list[float]
    score_tops: list[list[Top]]
    states: NDArray[np.float32] | None
    first_state: int
    density: list[float] | None


def collect(
    engine: Engine, chunks: Many[ChunkLike], batch: Batch, sampled: list[Sampled], results: Many[ChunkValues]
) -> None:
    """Hand the step's tokens, scores and hidden states to the chunks that asked for them."""
    drawn = iter(sampled)
    for i, (chunk, result) in enumerate(zip(chunks, results, strict=True)):
        if wants_token(chunk):
            result.drawn = true_ones(chunk.drafts, list(islice(drawn, 1 + len(chunk.drafts))))
        if batch.row_start[i] <= batch.measured < batch.row_start[i + 1]:
            result.density = engine.density(chunk.sequence.block_table[: num_blocks_for(chunk.end)])
    has_scores = bool((batch.out == Out.SCORE).any())
    has_hidden = bool((batch.out == Out.HIDDEN).any())
    if has_scores or has_hidden:
        _collect_values(engine, chunks, batch, results, has_scores=has_scores, has_hidden=has_hidden)


def _collect_values(
    engine: Engine,
    chunks: Many[ChunkLike],
    batch: Batch,
    results: Many[ChunkValues],
    *,
    has_scores: bool,
    has_hidden: bool,
) -> None:
    scores = engine.scores() if has_scores else None
    hidden = _scaled(engine, batch) if has_hidden else None
    score_at = hidden_at = 0
    for i, (chunk, result) in enumerate(zip(chunks, results, strict=True)):
        rows = batch.out[batch.row_start[i] : batch.row_start[i + 1]]
        if scores is not None and (count := int((rows == Out.SCORE).sum())):
            span = slice(score_at, score_at + count)
            score_at += count
            result.scores = scores.logprob[span].tolist()
            if k := chunk.sequence.request.prompt_logprobs:
                ids, logprobs = scores.top_ids[span, :k].tolist(), scores.top_logprobs[span, :k].tolist()
                result.score_tops = [list(zip(a, b, strict=True)) for a, b in zip(ids, logprobs, strict=True)]
        if hidden is not None and (count := int((rows == Out.HIDDEN).sum())):
            columns = np.searchsorted(batch.layers, _layers(chunk, engine.info.num_layers))
            result.states = hidden[hidden_at : hidden_at + count, columns]
            result.first_state = chunk.start + int(np.argmax(rows == Out.HIDDEN))
            hidden_at += count


def _scaled(engine: Engine, batch: Batch) -> NDArray[np.float32]:
    """The step's HIDDEN rows, (n, L, hidden_size), all but the final state scaled to a root mean square of 1."""
    hidden = engine.hidden()
    raw = hidden[:, : np.searchsorted(batch.layers, engine.info.num_layers)]
    raw /= np.sqrt(np.mean(raw * raw, axis=2, keepdims=True) + 1e-6)
    return hidden
