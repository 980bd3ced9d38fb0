"""Our engine under test, in process. Usage: run_ours.py MODEL.gguf"""

import sys
import time
from pathlib import Path

import numpy as np

from hob.config import EngineConfig, load_config
from hob.engine.base import BLOCK_SIZE, Batch, Draw, Out
from hob.engine.local import LocalEngine
from hob.models.pack import ensure_packed
from hob.request import SamplingParams
from protocol import DECODE_STEPS, prompt, serve

MAX_ROWS = 512
"""Rows of a step: longer prompts are prefilled in chunks of this, as the service does."""
MAX_CONTEXT = 2048


def batch_of(rows: list[tuple[list[int], int]]) -> Batch:
    """rows: per sequence its tokens and the index of the first; sequence s owns the s-th stretch of the pool."""
    blocks_each = MAX_CONTEXT // BLOCK_SIZE
    lengths = [len(tokens) for tokens, _ in rows]
    index = np.concatenate([np.arange(start, start + len(tokens), dtype=np.int32) for tokens, start in rows])
    row_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    out = np.zeros(len(index), np.uint8)
    out[row_start[1:] - 1] = Out.LOGITS
    return Batch(
        token=np.array([token for tokens, _ in rows for token in tokens], np.int32),
        position=index,
        index=index,
        out=out,
        target=np.zeros(len(index), np.int32),
        row_start=row_start,
        table_start=np.arange(len(rows) + 1, dtype=np.int32) * blocks_each,
        blocks=np.arange(len(rows) * blocks_each, dtype=np.int32),
        adapter=np.zeros(len(rows), np.int32),
    )


def main(path: str) -> None:
    config, _ = load_config()
    packed = ensure_packed(Path(path))
    engine = LocalEngine("benchmark", packed, config.engine if config else EngineConfig(), MAX_ROWS)
    engine.open_pool(16 * MAX_CONTEXT // BLOCK_SIZE)
    greedy = SamplingParams(temperature=0.0)

    def step(rows: list[tuple[list[int], int]]) -> list[int]:
        engine.forward(batch_of(rows))
        draws = [Draw(greedy, 0, start + len(tokens), [], 0) for tokens, start in rows]
        return [sampled.token_id for sampled in engine.sample(draws)]

    def prefill(tokens: list[int]) -> None:
        for start in range(0, len(tokens), MAX_ROWS):
            step([(tokens[start : start + MAX_ROWS], start)])

    def measure(figure: str, n: int, context: int, seed: int) -> float:
        if figure == "prefill":
            tokens = prompt(n, engine.info.vocab_size, seed)
            start = time.perf_counter()
            prefill(tokens)
            return n / (time.perf_counter() - start)
        length = context - DECODE_STEPS // 2
        prompts = [prompt(length, engine.info.vocab_size, seed + i) for i in range(n)]
        for first in range(0, length, MAX_ROWS // n):
            tokens = step([(ids[first : first + MAX_ROWS // n], first) for ids in prompts])
        start = time.perf_counter()
        for i in range(DECODE_STEPS):
            tokens = step([([token], length + i) for token in tokens])
        return n * DECODE_STEPS / (time.perf_counter() - start)

    serve(measure)


main(sys.argv[1])
