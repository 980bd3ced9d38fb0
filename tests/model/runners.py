"""The implementations of the forward pass under one face: the NumPy reference, and our engine per instruction set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hob import native
from hob.config import EngineConfig
from hob.engine.base import BLOCK_SIZE, Batch, Out
from hob.engine.local import LocalEngine
from hob.models.packed_file import open_packed
from hob.native import reference

NUM_BLOCKS = 24
IMPLEMENTATIONS = ["reference", *native.available_isas()]


def batch_of(
    token_ids: list[int], start: int = 0, out: Out = Out.LOGITS, blocks: list[int] | None = None, num_tops: int = 0
) -> Batch:
    """One sequence's rows from `start` on, each owing `out`; blocks are handed out last first."""
    index = np.arange(start, start + len(token_ids), dtype=np.int32)
    table = list(range(NUM_BLOCKS))[::-1] if blocks is None else blocks
    return Batch(
        token=np.array(token_ids, np.int32),
        position=index,
        index=index,
        out=np.full(len(token_ids), int(out), np.uint8),
        target=np.array([*token_ids[1:], 0], np.int32),
        row_start=np.array([0, len(token_ids)], np.int32),
        table_start=np.array([0, len(table)], np.int32),
        blocks=np.array(table, np.int32),
        adapter=np.zeros(1, np.int32),
        num_tops=num_tops,
    )


class Runner(Protocol):
    """A loaded model with a pool of NUM_BLOCKS."""

    def run(self, batch: Batch) -> reference.Result:
        """One step."""
        ...


class ReferenceRunner:
    """`native/reference.py`."""

    def __init__(self, packed_path: Path, kv_dtype: type[np.floating[Any]] = np.float16) -> None:
        packed = open_packed(packed_path)
        self.model = reference.Model(packed)
        self.pool = reference.KvPool(packed.network, NUM_BLOCKS, kv_dtype)

    def run(self, batch: Batch) -> reference.Result:
        return self.model.forward(self.pool, batch)


class EngineRunner:
    """`engine/local.py`."""

    def __init__(self, packed_path: Path, isa: str) -> None:
        config = EngineConfig(isa=isa, threads=2, kv_type="f16")
        self.engine = LocalEngine("parity", packed_path, config, max_rows=NUM_BLOCKS * BLOCK_SIZE)
        self.engine.open_pool(NUM_BLOCKS)

    def run(self, batch: Batch) -> reference.Result:
        assert self.engine.forward(batch).is_done
        scores = self.engine.scores()
        return reference.Result(
            self.engine.logits(), scores.logprob, scores.top_ids, scores.top_logprobs, self.engine.hidden()
        )


def open_runner(name: str, packed_path: Path) -> Runner:
    """An implementation by name."""
    return ReferenceRunner(packed_path) if name == "reference" else EngineRunner(packed_path, name)


def worst_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference of two arrays of one shape, relative to the scale (largest magnitude) of `expected`."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
