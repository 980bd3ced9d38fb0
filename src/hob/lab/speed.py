"""How fast the engine is on this machine: tokens per second, and where a step's time goes.

One process and no service: what is measured is the compute core with the sampler. `hob bench` prints it;
benchmarks/engine.py runs the same code in turn with other engines. Prompts are random ids with a new seed each time, so
nothing is found in a cache.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hob.config import EngineConfig
from hob.engine.base import BLOCK_SIZE, Batch, Draw, Out
from hob.engine.local import LocalEngine
from hob.models.packed_file import open_packed
from hob.request import SamplingParams

DECODE_STEPS = 32
"""Steps of one decode measurement; the context named is the one at its middle."""
MAX_ROWS = 512
"""Rows of a step: longer prompts are prefilled in chunks of this, as the service does."""
MAX_CONTEXT = 2048
LEAST_S = 0.5
"""A measurement is repeated for this long and its median counts: 128 tokens alone take some 40 ms."""


@dataclass(frozen=True)
class Figure:
    """One number to be measured."""

    key: str
    kind: str
    n: int
    """Tokens of a prefill, sequences of a decode."""
    context: int = 0
    num_busy: int = 0
    """Processes that never sleep beside it; the figure is then a share of the undisturbed speed."""

    @property
    def title(self) -> str:
        """For a table."""
        if self.kind == "prefill":
            return f"prefill of {self.n} tokens, tok/s"
        unit = f" beside {self.num_busy} busy, share of alone" if self.num_busy else ", tok/s"
        return f"decode, {self.n} seq., context {self.context}{unit}"


FIGURES = [
    *(Figure(f"prefill_{n}", "prefill", n) for n in (128, 512, 2048)),
    Figure("decode_1", "decode", 1, 128),
    *(Figure(f"decode_{n}", "decode", n, 80) for n in (4, 8, 16)),
    *(Figure(f"decode_busy_{n}", "decode", 1, 128, n) for n in (1, 2)),
]
PHASE_TENSORS: dict[str, tuple[str, ...]] = {
    "qkv": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "out": ("attn_output.weight",),
    "gate_up": ("ffn_gate.weight", "ffn_up.weight"),
    "down": ("ffn_down.weight",),
}
"""Phase of a step with few rows -> the matrices it reads, each once. Experts are not among them: a step reads some."""
PHASE_TENSORS["layers"] = tuple(part for parts in PHASE_TENSORS.values() for part in parts)
"""With many rows these are one phase."""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that never sleep, each in a session of its own (autogroup would else share its time with ours)."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Phase:
    """What a part of a step took, and what it moved and multiplied meanwhile."""

    name: str
    ns: int
    weight_bytes: int
    """Read by it; 0 where it reads none, or not all of them."""
    macs: int
    """Multiply-adds with weights."""


class SpeedTest:
    """One engine, asked for one figure at a time."""

    def __init__(self, packed: Path, config: EngineConfig) -> None:
        """Load the model. Raises ModelFileError."""
        self._packed = open_packed(packed)
        self._engine = LocalEngine("bench", packed, config, MAX_ROWS)
        self._engine.open_pool(16 * MAX_CONTEXT // BLOCK_SIZE)
        self.info = self._engine.info
        self._seed = 0

    def measure(self, figure: Figure) -> float:
        """Tokens per second, the median over at least half a second."""
        with busy_processes(figure.num_busy):
            samples: list[float] = []
            end = time.perf_counter() + LEAST_S
            while not samples or time.perf_counter() < end:
                self._seed += 1000
                samples.append(self.sample(figure.kind, figure.n, figure.context, self._seed))
        return statistics.median(samples)

    def sample(self, kind: str, n: int, context: int, seed: int) -> float:
        """Tokens per second of one prefill, or of DECODE_STEPS steps around `context`."""
        if kind == "prefill":
            ids = self._prompt(n, seed)
            start = time.perf_counter()
            self._prefill([ids])
            return n / (time.perf_counter() - start)
        length = context - DECODE_STEPS // 2
        tokens = self._prefill([self._prompt(length, seed + i) for i in range(n)])
        start = time.perf_counter()
        for i in range(DECODE_STEPS):
            tokens = self._step([([token], length + i) for token in tokens])
        return n * DECODE_STEPS / (time.perf_counter() - start)

    def phases(self, kind: str, n: int, context: int, repeats: int = 20) -> list[Phase]:
        """The phases of the fastest of some equal steps: a prefill of n rows, or n sequences decoding at `context`."""
        if kind == "prefill":
            rows = [(self._prompt(n, 1), 0)]
        else:
            self._prefill([self._prompt(context, i) for i in range(n)])
            rows = [([token], context) for token in self._prompt(n, 2)]
        steps = [self._engine.forward(batch_of(rows)) for _ in range(repeats)]
        best = min(steps, key=lambda step: step.elapsed_s).phase_ns
        num_rows = sum(len(tokens) for tokens, _ in rows)
        return [self._phase(name, ns, num_rows, len(rows)) for name, ns in best.items() if ns]

    def close(self) -> None:
        """Give the memory back."""
        self._engine.close()

    def _phase(self, name: str, ns: int, num_rows: int, num_sequences: int) -> Phase:
        if name == "head":
            head = "token_embd.weight" if self._packed.network.tied_head else "output.weight"
            found, num_rows = [self._packed.tensor(head)], num_sequences
        else:
            parts = PHASE_TENSORS.get(name, ())
            found = [t for t in self._packed.tensors if t.name.startswith("blk.") and t.name.endswith(parts)]
        return Phase(name, ns, sum(t.nbytes for t in found), sum(t.rows * t.cols for t in found) * num_rows)

    def _prompt(self, num_tokens: int, seed: int) -> list[int]:
        """Random ids, clear of the special tokens at the vocabulary's start where there is room."""
        size = self.info.vocab_size
        return random.Random(seed).choices(range(100, size - 1000) if size > 2000 else range(size), k=num_tokens)

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """All to the same length, in chunks; returns each one's next token."""
        chunk = MAX_ROWS // len(prompts)
        tokens: list[int] = []
        for first in range(0, len(prompts[0]), chunk):
            tokens = self._step([(ids[first : first + chunk], first) for ids in prompts])
        return tokens

    def _step(self, rows: list[tuple[list[int], int]]) -> list[int]:
        self._engine.forward(batch_of(rows))
        greedy = SamplingParams(temperature=0.0)
        draws = [Draw(greedy, 0, start + len(tokens), [], 0) for tokens, start in rows]
        return [sampled.token_id for sampled in self._engine.sample(draws)]


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


def with_base(figures: list[Figure]) -> list[Figure]:
    """The same, with `decode_1` where a busy figure needs it to be a share of."""
    if not any(f.num_busy for f in figures) or any(f.key == "decode_1" for f in figures):
        return figures
    return [*figures, next(f for f in FIGURES if f.key == "decode_1")]


def as_shares(values: dict[str, float], figures: list[Figure]) -> dict[str, float]:
    """Busy figures as shares of `decode_1`, the others as they are."""
    return {f.key: values[f.key] / values["decode_1"] if f.num_busy else values[f.key] for f in figures}


def measure_all(
    test: SpeedTest, figures: list[Figure], rounds: int, on_figure: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Key -> median over rounds; tokens per second, busy figures as shares."""
    samples: dict[str, list[float]] = {figure.key: [] for figure in with_base(figures)}
    for _ in range(rounds):
        for figure in with_base(figures):
            samples[figure.key].append(test.measure(figure))
            on_figure()
    return as_shares({key: statistics.median(values) for key, values in samples.items()}, figures)


def peaks(num_threads: int) -> dict[str, float]:
    """What the machine itself does on that many threads: memory read in GB/s, float32 multiply-adds in 10^9 a second.

    By NumPy: a sum over 512 MB in as many parts as threads, and a product of matrices that fit the caches. Best of 5.
    """
    data = np.ones(1 << 26, np.int64)
    parts = np.array_split(data, num_threads)
    read_s = min(_seconds([part.sum for part in parts]) for _ in range(5))
    a = np.ones((768, 768), np.float32)
    product_s = min(_seconds([lambda: np.matmul(a, a)]) for _ in range(5))
    return {"read_gb_s": data.nbytes / read_s / 1e9, "float32_gmacs": a.shape[0] ** 3 / product_s / 1e9}


def _seconds(works: list[Callable[[], object]]) -> float:
    threads = [threading.Thread(target=work) for work in works]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start
