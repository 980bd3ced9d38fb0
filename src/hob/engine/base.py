"""The engine contract: a forward pass over named rows that writes only the KV slots it names.

That makes a step idempotent: an abandoned step, a retry, a rejected draft and a preempted prefill are all just the
scheduler not advancing `num_computed_tokens`. And **the same row gives the same bits** whatever else is in the batch,
however it was chunked, on any number of threads (within one instruction set).

    batch --forward--> engine keeps: logits rows | scores | hidden rows --sample / scores / hidden--> values

Implementations: `local.py` (ours), `fake.py` (scripted and timed, for tests and studies). `tests/conformance` runs
over all of them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hob.kvcache.formats import KvShape
from hob.kvcache.pool import BLOCK_SIZE as BLOCK_SIZE
from hob.messages import ModelInfo
from hob.request import Sampled as Sampled
from hob.request import SamplingParams


class Out(enum.IntEnum):
    """What is wanted of a row beside its KV."""

    NONE = 0
    LOGITS = 1
    """The distribution after this row, for `sample`."""
    SCORE = 2
    """log p of `target` after this row, and the `num_tops` most likely tokens."""
    HIDDEN = 3
    """The states after the batch's `layers`, (layers, hidden_size)."""


@dataclass(slots=True)
class Batch:
    """Rows of one step, grouped by sequence: R rows of S sequences.

    A row reads the KV of all slots of its sequence up to and including its own `index`, and writes its own. Within
    a sequence rows ascend by index; they need not be its tail. Sequence s has rows row_start[s] up to, but without,
    row_start[s + 1].
    """

    token: NDArray[np.int32]
    """(R,) token ids."""
    position: NDArray[np.int32]
    """(R,) RoPE positions."""
    index: NDArray[np.int32]
    """(R,) places in the sequence's cache: slot index % 16 of block blocks[table_start[s] + index // 16]."""
    out: NDArray[np.uint8]
    """(R,) values of `Out`."""
    target: NDArray[np.int32]
    """(R,) token whose log-probability is wanted where out is SCORE; ignored elsewhere."""
    row_start: NDArray[np.int32]
    """(S + 1,) first row of each sequence."""
    table_start: NDArray[np.int32]
    """(S + 1,) first entry of each sequence's block table in `blocks`."""
    blocks: NDArray[np.int32]
    """Block tables, one after the other."""
    adapter: NDArray[np.int32]
    """(S,) adapter id of each sequence; 0 is none."""
    num_tops: int = 0
    """Most likely tokens wanted beside each SCORE row."""
    layers: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """(L,) after which layers the states of HIDDEN rows are kept, ascending: 0 is the embedding, `num_layers` the final
    norm, the others the residual stream as it is. Empty: the last alone."""
    depth: int = 0
    """How many layers to compute. 0: all. Else the rows owe states up to there and nothing else, and the KV they write
    is good for such rows only."""
    measured: int = -1
    """A LOGITS row whose attention `density` is to tell of. -1: none."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.token)


@dataclass(slots=True)
class Draw:
    """How to sample one LOGITS row. Draws are given in the order of the LOGITS rows of the batch."""

    params: SamplingParams
    sample_index: int
    """Which sample of the request: part of the random number's key."""
    position: int
    """Position of the token to be drawn: part of the random number's key."""
    token_ids: list[int]
    """Prompt and output so far, for the penalties."""
    num_generated: int
    """How many at the end of `token_ids` are output."""


@dataclass(slots=True)
class Scores:
    """Of the SCORE rows of a step, in order: n rows, k tops."""

    logprob: NDArray[np.float32]
    """(n,)"""
    top_ids: NDArray[np.int32]
    """(n, k), most likely first"""
    top_logprobs: NDArray[np.float32]
    """(n, k)"""


@dataclass(slots=True)
class StepInfo:
    """What a step took."""

    is_done: bool
    """False: it was abandoned between layers and nothing it wrote may be counted on."""
    elapsed_s: float
    phase_ns: dict[str, int] = field(default_factory=dict)
    """Wall time by phase: embed, norm, qkv, attention, out, ffn, head, ..."""


class Engine(Protocol):
    """One loaded model with its KV pool. Not thread-safe: the loop owns it."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def max_rows(self) -> int:
        """Most rows in one step."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of KV, over all layers."""
        ...

    @property
    def kv_shape(self) -> KvShape:
        """What a block consists of."""
        ...

    @property
    def page_bytes(self) -> int:
        """The pool's memory is taken and given back by this much."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Most memory it takes beside weights and pool."""
        ...

    @property
    def adapters(self) -> Mapping[str, int]:
        """Id in a batch of each LoRA adapter that is loaded, by its name with its digest."""
        ...

    def open_pool(self, num_blocks: int) -> None:
        """Reserve the KV pool. Raises Overloaded when the memory cannot be had."""
        ...

    def forward(self, batch: Batch) -> StepInfo:
        """Compute the batch's rows. Raises InternalError naming the layer if a value is not finite."""
        ...

    def sample(self, draws: Sequence[Draw], masks: NDArray[np.uint8] | None = None) -> list[Sampled]:
        """Draw a token from each LOGITS row of the last step. Pure: the same draw gives the same token.

        masks: (n, at least ceil(vocab_size / 8)); bit id % 8 of byte id // 8 allows a token. Each row allows one.
        """
        ...

    def logits(self) -> NDArray[np.float32]:
        """(n, vocab_size): LOGITS rows of the last step. For tests and scorers; the loop never needs it."""
        ...

    def scores(self) -> Scores:
        """Of the SCORE rows of the last step."""
        ...

    def density(self, block_ids: Sequence[int]) -> list[float]:
        """Attention that the last step's measured row paid to each block of its table, mean over layers and heads."""
        ...

    def hidden(self) -> NDArray[np.float32]:
        """(n, L, hidden_size): HIDDEN rows of the last step."""
        ...

    def copy_block(self, source: int, destination: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` slots of a block (a fork of an unfinished tail)."""
        ...

    def read_block(self, block_id: int) -> bytes:
        """The bytes of a block, as they lie: what goes to disk."""
        ...

    def write_block(self, block_id: int, data: bytes | memoryview) -> None:
        """Put back what `read_block` gave. Raises InternalError if the length is not `block_bytes`."""
        ...

    def discard(self, offset: int, num_bytes: int) -> None:
        """Give the memory of whole pages of the pool back. Their blocks must be written before they are read."""
        ...

    def stop(self) -> None:
        """Abandon the running step between two layers. The only call allowed from another thread."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...
