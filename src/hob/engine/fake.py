"""An engine without a model: exact, scripted and timed. It ships, because users' tests and studies want it too.

Its "KV" is real enough to catch any mistake of pool, scheduler or loop: each slot holds a digest of all tokens up to
it, computed from the slot before it *as found in the pool*. A wrong block, a stale copy or a skipped row changes every
token that follows, so `interleaved == solo` is a sharp test without weights. The likeliest next token is the digest's
value in the vocabulary, and the others follow it: the one i places on (around the end) has 1 / (1 + i)^2 of its
probability. Draws, scores and logits all tell of this one distribution; `script` overrides which token is drawn.

Time: a step takes `CostModel.step_s`, slept for real or added to a `FakeClock`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hob.engine.base import BLOCK_SIZE, Batch, Draw, Out, Sampled, Scores, StepInfo
from hob.errors import InternalError
from hob.kvcache.formats import KvShape
from hob.messages import ModelInfo

NUM_LAYERS = 10
"""Pieces of a step's time, between which it can be stopped."""
_MASK = (1 << 64) - 1
TWIN = {"twin@0": 1}
"""An adapter: another model, as far as one can see."""


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step: a fixed part, a part per row, one per row and token of its context, one per key read in.

    The defaults are near SmolLM2-135M on two cores: 1 row 6 ms; 512 rows of a new prompt 0.26 s.
    """

    step: float = 0.005
    row: float = 0.00045
    row_context: float = 0.0000001
    key: float = 0.0

    def step_s(self, batch: Batch) -> float:
        """Of a batch."""
        context, num_keys = float(batch.index.sum()), float((batch.index[batch.row_start[1:] - 1] + 1).sum())
        return self.step + self.row * batch.num_rows + self.row_context * context + self.key * num_keys


def _mix(value: int, token: int) -> int:
    """One round of splitmix64 over the digest so far and the next token."""
    value = (value + 0x9E3779B97F4A7C15 * (token + 1)) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class FakeEngine:
    """`script(token_ids, sample_index) -> token id` decides what is "sampled"; None: the digest does."""

    def __init__(
        self,
        vocab_size: int = 1000,
        context_length: int = 8192,
        hidden_size: int = 8,
        max_rows: int = 4096,
        cost: CostModel | None = None,
        sleep: Callable[[float], None] | None = None,
        script: Callable[[list[int], int], int] | None = None,
        name: str = "fake",
        adapters: Mapping[str, int] = TWIN,
    ) -> None:
        self.adapters = adapters
        self.info = ModelInfo(
            name=name,
            architecture="fake",
            num_parameters=0,
            context_length=context_length,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=1,
            kv_bytes_per_token=8,
            weight_bytes=0,
            quantisation="none",
            isa="none",
            isa_reason="fake engine",
            num_threads=1,
            adapters=list(adapters),
        )
        self.max_rows = max_rows
        self.block_bytes = BLOCK_SIZE * 8
        self.kv_shape = KvShape(1, 1, 2)
        self.page_bytes = 4 * self.block_bytes
        self.scratch_bytes = 0
        self.num_steps = 0
        self.fail_at_step: int | None = None
        """Raise in this step (counted from 1): a fault on purpose."""
        self._cost = cost
        self._sleep = sleep or time.sleep
        self._script = script
        fall = -2.0 * np.log1p(np.arange(vocab_size))
        self._logprobs = (fall - np.log(np.exp(fall).sum())).astype(np.float32)
        """(V,) of the token i places after the likeliest."""
        self._slots = np.zeros(0, np.uint64)
        self._logits: list[int] = []
        self._scores: list[tuple[int, int]] = []
        self._hidden: list[int] = []
        self._layers: list[int] = []
        self._num_tops = 0
        self._stop = threading.Event()

    def open_pool(self, num_blocks: int) -> None:
        """As the contract says. Slots start as rubbish, so that reading an unwritten one shows."""
        self._slots = np.random.default_rng(0).integers(1, 1 << 63, num_blocks * BLOCK_SIZE).astype(np.uint64)

    def forward(self, batch: Batch) -> StepInfo:
        """Chain the digests of all rows through the pool."""
        self.num_steps += 1
        if self.num_steps == self.fail_at_step:
            raise InternalError(f"fake engine: step {self.num_steps} fails on purpose")
        if batch.num_rows > self.max_rows:
            raise InternalError(f"batch has {batch.num_rows} rows, the workspace {self.max_rows}")
        self._logits, self._scores, self._hidden, self._num_tops = [], [], [], batch.num_tops
        self._layers = batch.layers.tolist() or [self.info.num_layers]
        for s in range(len(batch.row_start) - 1):
            table = batch.blocks[batch.table_start[s] : batch.table_start[s + 1]].tolist()
            for r in range(int(batch.row_start[s]), int(batch.row_start[s + 1])):
                self._row(table, batch, r, int(batch.adapter[s]))
        self._stop.clear()
        layer_s = self._cost.step_s(batch) / NUM_LAYERS if self._cost else 0.0
        elapsed_s = 0.0
        for _ in range(NUM_LAYERS if layer_s else 0):
            if self._stop.is_set():
                break
            self._sleep(layer_s)
            elapsed_s += layer_s
        return StepInfo(is_done=not self._stop.is_set(), elapsed_s=elapsed_s)

    def _row(self, table: list[int], batch: Batch, r: int, adapter: int) -> None:
        index, token = int(batch.index[r]), int(batch.token[r])
        if not 0 <= token < self.info.vocab_size:
            raise InternalError(f"row {r}: token {token} is outside the vocabulary of {self.info.vocab_size}")
        before = int(self._slots[self._slot(table, index - 1)]) if index else 0
        digest = _mix(before, token + self.info.vocab_size * adapter)
        self._slots[self._slot(table, index)] = digest
        out = int(batch.out[r])
        if out == Out.LOGITS:
            self._logits.append(digest)
        elif out == Out.SCORE:
            self._scores.append((digest, int(batch.target[r])))
        elif out == Out.HIDDEN:
            self._hidden.append(digest)

    @staticmethod
    def _slot(table: list[int], index: int) -> int:
        return table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE

    def sample(self, draws: Sequence[Draw], masks: NDArray[np.uint8] | None = None) -> list[Sampled]:
        """The digest's token, or the script's; where the mask forbids it, the next one that is allowed."""
        if len(draws) != len(self._logits):
            raise InternalError(f"{len(draws)} draws for {len(self._logits)} logits rows")
        sampled = []
        for row, (draw, digest) in enumerate(zip(draws, self._logits, strict=True)):
            if self._script is not None:
                token_id = self._script(draw.token_ids, draw.sample_index)
            else:
                seed = draw.params.seed + draw.sample_index if draw.params.temperature else 0
                token_id = (digest + seed) % self.info.vocab_size
            if masks is not None:
                allowed = np.unpackbits(masks[row], count=self.info.vocab_size, bitorder="little").nonzero()[0]
                if not len(allowed):
                    raise RuntimeError(f"draw {row}: no token can be chosen: all are masked")
                token_id = int(allowed[np.searchsorted(allowed, token_id) % len(allowed)])
            if draw.params.logprobs is None:
                sampled.append(Sampled(token_id))
                continue
            tops = [(token, self._logprob(digest, token)) for token in self._tops(digest, draw.params.logprobs)]
            sampled.append(Sampled(token_id, self._logprob(digest, token_id), tops))
        return sampled

    def _logprob(self, digest: int, token: int) -> float:
        return float(self._logprobs[(token - digest) % self.info.vocab_size])

    def _tops(self, digest: int, count: int) -> list[int]:
        return [(digest + i) % self.info.vocab_size for i in range(count)]

    def logits(self) -> NDArray[np.float32]:
        """The log-probabilities themselves."""
        rows = [np.roll(self._logprobs, digest % self.info.vocab_size) for digest in self._logits]
        return np.array(rows, np.float32).reshape(len(rows), self.info.vocab_size)

    def scores(self) -> Scores:
        """Of each row's target, and the likeliest ones."""
        logprob = np.array([self._logprob(d, t) for d, t in self._scores], np.float32)
        shape = (len(self._scores), self._num_tops)
        ids = np.array([self._tops(d, self._num_tops) for d, _ in self._scores], np.int32).reshape(shape)
        return Scores(logprob, ids, np.broadcast_to(self._logprobs[: self._num_tops], shape))

    def density(self, block_ids: Sequence[int]) -> list[float]:
        """Some numbers that depend on the blocks' contents."""
        lasts = [int(self._slots[block_id * BLOCK_SIZE]) % 1000 + 1 for block_id in block_ids]
        return [last / sum(lasts) for last in lasts]

    def hidden(self) -> NDArray[np.float32]:
        """Digests as small numbers, other ones after each layer."""
        columns, last = range(self.info.hidden_size), self.info.num_layers
        digests = [[d if layer == last else _mix(d, layer) for layer in self._layers] for d in self._hidden]
        values = [[[(d >> (8 * (c % 8))) & 0xFF for c in columns] for d in row] for row in digests]
        return np.array(values, np.float32).reshape(len(values), len(self._layers), self.info.hidden_size)

    def copy_block(self, source: int, destination: int, num_tokens: int) -> None:
        """Copy slots."""
        a, b = source * BLOCK_SIZE, destination * BLOCK_SIZE
        self._slots[b : b + num_tokens] = self._slots[a : a + num_tokens]

    def read_block(self, block_id: int) -> bytes:
        """128 bytes."""
        return self._slots[block_id * BLOCK_SIZE : (block_id + 1) * BLOCK_SIZE].tobytes()

    def write_block(self, block_id: int, data: bytes | memoryview) -> None:
        """128 bytes."""
        if len(data) != self.block_bytes:
            raise InternalError(f"block data has {len(data)} bytes, expected {self.block_bytes}")
        self._slots[block_id * BLOCK_SIZE : (block_id + 1) * BLOCK_SIZE] = np.frombuffer(data, np.uint64)

    def discard(self, offset: int, num_bytes: int) -> None:
        """Slots become rubbish again, so that reading a discarded one shows."""
        if offset % self.page_bytes or num_bytes % self.page_bytes:
            raise InternalError(f"discard({offset}, {num_bytes}): not whole pages of {self.page_bytes} bytes")
        start, count = offset // 8, num_bytes // 8
        count = min(count, len(self._slots) - start)
        self._slots[start : start + count] = np.random.default_rng(start).integers(1, 1 << 63, count).astype(np.uint64)

    def stop(self) -> None:
        """The running step reports that it was abandoned."""
        self._stop.set()

    def close(self) -> None:
        """Nothing to give back."""
