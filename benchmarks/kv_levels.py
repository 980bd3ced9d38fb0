"""What fewer bits in the KV of contexts cost: perplexity of what follows a context that came back with so many.

    python benchmarks/kv_levels.py MODEL.gguf [--windows 16] [--json]

Each window of the text: --context tokens are computed, their blocks encoded and decoded as the disk tier does it, and
the next --scored tokens are scored behind them. Only the context's blocks lose bits, as on the first turn after a
restart. Beside "3", which shares out 8, 4 and 2 bits by attention: the same shares by chance and by age, LLMS's shares,
and all blocks with 2.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import machine
from hob.config import load_config
from hob.engine.base import BLOCK_SIZE, Batch, Out
from hob.engine.local import LocalEngine
from hob.kvcache.compression import EXACT, MIXED, Codec, levels_of
from hob.models.gguf import open_gguf
from hob.models.pack import ensure_packed
from hob.models.tokenizer import Tokenizer

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2_test_raw.txt"
MAX_ROWS = 512
LLMS_SHARES = (0.2, 0.6)
"""A fifth 8, two fifths 4, two fifths 2: 4 bits on average, as there."""

Levels = Callable[[list[float], int], list[int]]


def by_chance(density: list[float], count: int) -> list[int]:
    """The shares of 3, whoever gets them."""
    return random.Random(0).sample(levels_of(MIXED, density, count), count)


def by_age(density: list[float], count: int) -> list[int]:
    """The newest get most."""
    return levels_of(MIXED, list(range(count)), count)


VARIANTS: dict[str, Levels] = {
    "16, as it is": lambda density, count: [EXACT] * count,
    "8": lambda density, count: levels_of(8, density, count),
    "4": lambda density, count: levels_of(4, density, count),
    "8, 4, 2 by attention, LLMS's shares": lambda density, count: levels_of(MIXED, density, count, LLMS_SHARES),
    "3: 8, 4, 2 by attention": lambda density, count: levels_of(MIXED, density, count),
    "the same by age": by_age,
    "the same by chance": by_chance,
    "all 2": lambda density, count: [2] * count,
}


class Scorer:
    """One engine, one context at a time."""

    def __init__(self, packed: Path, num_context: int, num_scored: int) -> None:
        self.engine = LocalEngine("benchmark", packed, load_config()[0].engine, MAX_ROWS)
        self.num_context_blocks = num_context // BLOCK_SIZE
        self.num_blocks = -(-(num_context + num_scored) // BLOCK_SIZE)
        self.engine.open_pool(self.num_blocks)
        self.codec = Codec(self.engine.kv_shape)

    def compute(self, ids: list[int]) -> list[float]:
        """The context's KV; the attention that its last row pays to each block."""
        for start in range(0, len(ids), MAX_ROWS):
            rows = ids[start : start + MAX_ROWS]
            out = np.zeros(len(rows), np.uint8)
            out[-1] = Out.LOGITS
            self._forward(rows, start, out, [0] * len(rows), len(rows) - 1)
        return self.engine.density(range(self.num_context_blocks))

    def score(self, ids: list[int], start: int) -> list[float]:
        """Log-probability of each of ids after the first, behind what the pool holds."""
        out = np.full(len(ids) - 1, int(Out.SCORE), np.uint8)
        self._forward(ids[:-1], start, out, ids[1:], -1)
        found: list[float] = self.engine.scores().logprob.tolist()
        return found

    def squeeze(self, blocks: list[bytes], levels: list[int]) -> int:
        """Put the context's blocks back as they come from disk. Returns the bytes they had there."""
        num_bytes, block = 0, bytearray(self.engine.block_bytes)
        for i, (exact, bits) in enumerate(zip(blocks, levels, strict=True)):
            num_bytes += self.codec.num_bytes(bits)
            if bits == EXACT:
                self.engine.write_block(i, exact)
            else:
                self.codec.decode(self.codec.encode(exact, bits), bits, memoryview(block))
                self.engine.write_block(i, block)
        return num_bytes

    def _forward(self, ids: list[int], start: int, out: np.ndarray, targets: list[int], measured: int) -> None:
        index = np.arange(start, start + len(ids), dtype=np.int32)
        self.engine.forward(
            Batch(
                token=np.array(ids, np.int32),
                position=index,
                index=index,
                out=out,
                target=np.array(targets, np.int32),
                row_start=np.array([0, len(ids)], np.int32),
                table_start=np.array([0, self.num_blocks], np.int32),
                blocks=np.arange(self.num_blocks, dtype=np.int32),
                adapter=np.zeros(1, np.int32),
                measured=measured,
            )
        )


def run(model: Path, text: Path, windows: int, num_context: int, num_scored: int) -> dict[str, object]:
    """Perplexity and bytes of each variant."""
    scorer = Scorer(ensure_packed(model), num_context, num_scored)
    with open_gguf(model) as gguf:
        ids = Tokenizer(gguf.metadata).encode(text.read_text(encoding="utf-8"), add_bos=False)
    length = num_context + num_scored
    logprobs: dict[str, list[float]] = {name: [] for name in VARIANTS}
    num_bytes = dict.fromkeys(VARIANTS, 0)
    density_s = []
    for window in range(windows):
        part = ids[window * length : (window + 1) * length]
        scorer.compute(part[:num_context])
        start = time.perf_counter()
        density = scorer.engine.density(range(scorer.num_context_blocks))
        density_s.append(time.perf_counter() - start)
        exact = [scorer.engine.read_block(i) for i in range(scorer.num_context_blocks)]
        for name, levels in VARIANTS.items():
            num_bytes[name] += scorer.squeeze(exact, levels(density, len(exact)))
            logprobs[name] += scorer.score(part[num_context:], num_context)
    base = num_bytes["16, as it is"]
    return {
        "model": model.name,
        "num_context": num_context,
        "num_scored": len(logprobs["8"]),
        "density_ms": 1e3 * sorted(density_s)[len(density_s) // 2],
        "variants": {
            name: {
                "perplexity": math.exp(-sum(found) / len(found)),
                "bytes_share": num_bytes[name] / base,
            }
            for name, found in logprobs.items()
        },
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT, help=f"text file (default: {TEXT})")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = run(args.model, args.text, args.windows, args.context, args.scored)
    if args.json:
        print(json.dumps({"machine": machine.describe(), **result}))
        return
    table = Table("bits", "perplexity", "beside 16", "bytes")
    variants = result["variants"]
    assert isinstance(variants, dict)
    exact = variants["16, as it is"]["perplexity"]
    for name, found in variants.items():
        table.add_row(
            name,
            f"{found['perplexity']:.3f}",
            f"{100 * (found['perplexity'] / exact - 1):+.2f} %",
            f"{100 * found['bytes_share']:.0f} %",
        )
    console = Console()
    console.print(f"{result['model']}: {result['num_scored']} tokens behind contexts of {result['num_context']}")
    console.print(table)
    console.print(f"measuring the attention of one row: {result['density_ms']:.1f} ms")


if __name__ == "__main__":
    main()
