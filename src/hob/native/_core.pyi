from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

def cpu_features() -> list[str]:
    """What the CPU and the system support, of the things we know to use."""

def available_isas() -> list[str]:
    """Of 'portable', 'avx2', 'avx512', slowest first: what was built and runs here."""

def uniform(seed: int, sample_index: int, position: int) -> float:
    """The random number of a draw, in [0, 1)."""

def pack_tensor(data: Buffer, ggml_type: int, n: int, k: int) -> tuple[int, bytes]:
    """GGML data of `n` rows of `k` values -> (kind, packed bytes). Raises ValueError for a wrong type or size."""

class Model:
    """A packed model in memory, with its kernels and threads."""

    def __init__(
        self,
        path: str,
        data_offset: int,
        network: dict[str, Any],
        tensors: Sequence[tuple[str, int, int, int, int, int]],
        isa: str,
        num_threads: int,
        memory: str,
    ) -> None:
        """`network`: fields of models/network.py. `tensors`: (name, kind, N, K, offset, nbytes), offsets from
        `data_offset`, multiples of 64. `num_threads` counts the caller. `memory`: 'copy', 'map'. Raises ValueError."""
    def add_adapter(self, adapter: int, pairs: Sequence[tuple[int, str, Floats, Floats]]) -> int:
        """Keep a LoRA adapter under an id from 1 on, or replace it; between steps only. pairs: (layer, matrix as
        'attn_q', A (rank, K), B (N, rank) with the scale in it). -> the bytes it takes. Raises ValueError."""
    def remove_adapter(self, adapter: int) -> None:
        """Give its memory back; between steps only."""
    @property
    def weight_bytes(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def num_repeated(self) -> int:
        """Pieces of work that a thread computed again so far, because the core of the one at it was taken away."""
    @property
    def isa(self) -> str: ...

class KvPool:
    """`num_blocks` blocks of 16 tokens; pages are resident once written. kv_type: 'f16', 'q8'. Raises MemoryError."""

    def __init__(self, model: Model, num_blocks: int, kv_type: str) -> None: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    def read(self, block: int) -> bytes: ...
    def write(self, block: int, data: Buffer) -> None: ...
    def copy(self, source: int, destination: int, num_tokens: int) -> None: ...
    page_bytes: int
    """The system takes and gives memory by this much."""
    def discard(self, offset: int, num_bytes: int) -> None:
        """Give the memory of whole pages back. Raises ValueError for a part of one."""

class Workspace:
    """All memory of a step of up to `max_rows` rows, and the results of the last one."""

    def __init__(self, model: Model, max_rows: int) -> None: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def num_bytes(self) -> int:
        """Of address space; logits, (max_rows, vocab), are touched as far as they are used."""

def forward(
    model: Model,
    pool: KvPool,
    workspace: Workspace,
    token: Ints,
    position: Ints,
    index: Ints,
    out: NDArray[np.uint8],
    target: Ints,
    row_start: Ints,
    table_start: Ints,
    blocks: Ints,
    adapter: Ints,
    num_tops: int,
    layers: Ints,
    depth: int,
    measured: int = -1,
) -> tuple[bool, dict[str, int]]:
    """One step over the rows of an engine.base.Batch. -> (False if stopped between layers, nanoseconds by phase)."""

def density(pool: KvPool, workspace: Workspace, blocks: Ints) -> Floats:
    """(len(blocks),) attention that the last step's measured row pays to each block of its table; sums up to 1."""

def sample(
    workspace: Workspace,
    temperature: Floats,
    top_k: Ints,
    top_p: Floats,
    min_p: Floats,
    repetition: Floats,
    presence: Floats,
    frequency: Floats,
    seed: NDArray[np.uint64],
    sample_index: Ints,
    position: Ints,
    num_logprobs: Ints,
    history: Ints,
    history_start: Ints,
    num_generated: Ints,
    bias_ids: Ints,
    bias_values: Floats,
    bias_start: Ints,
    mask: Buffer | NDArray[Any] | None = None,
) -> tuple[Ints, Floats, Ints, Ints, Floats]:
    """A token for each of the n LOGITS rows of the last step: (ids, logprobs, tops_start, top_ids, top_logprobs).

    history: prompt and output ids of row i at history_start[i]:history_start[i + 1], the last num_generated[i] output.
    bias: the same way. mask: (n, at least ceil(vocab / 8)) bytes, bit id % 8 of byte id // 8 allows a token. Row i's
    num_logprobs[i] likeliest tokens are at tops_start[i]:tops_start[i + 1].
    """

def logits(workspace: Workspace) -> Floats:
    """(n, vocab_size): LOGITS rows of the last step."""

def scores(workspace: Workspace) -> tuple[Floats, Ints, Floats]:
    """SCORE rows of the last step: logprob (n,), top ids (n, k), top logprobs (n, k)."""

def hidden(workspace: Workspace) -> Floats:
    """(n, L * hidden_size): HIDDEN rows of the last step, after each of its L layers."""

def request_stop(workspace: Workspace) -> None:
    """Abandon the running step between two layers. The only call allowed from another thread."""

def kernel_linear(isa: str, kind: int, data: Buffer, n: int, k: int, x: Floats) -> Floats:
    """x (R, K) times a packed matrix (N, K) -> (R, N). These are single kernels, for tests and measurements."""

def kernel_rms_norm(isa: str, x: Floats, weight: Floats, eps: float) -> Floats:
    """(R, H), weight (H,)"""

def kernel_gate_mul(isa: str, activation: str, gate: Floats, up: Floats) -> Floats:
    """(R, 32): activation(gate) * up; 'silu' or 'gelu_tanh'"""

def kernel_rope(isa: str, x: Floats, cos: Floats, sin: Floats) -> Floats:
    """(R, D): pairs (i, i + half) turned by cos and sin (R, half)"""

def kernel_attention(
    isa: str,
    query: Floats,
    keys: Floats,
    values: Floats,
    lengths: Ints,
    is_split: bool,
    window: int = 0,
    kv_type: str = "f16",
) -> Floats:
    """query (R, A, D), keys and values (T, B, D): row r sees lengths[r] keys, or the `window` latest of them.
    is_split: chunk by chunk, then merged."""

def pool_trial(num_threads: int, num_jobs: int, num_pieces: int, num_late: int) -> tuple[list[int], int]:
    """A chain of jobs that depend on all values before, in which `num_late` times a thread sleeps for 20 ms in the
    middle of a piece. -> the values, and how many pieces were computed again."""

def pool_calls(num_threads: int, num_chains: int) -> int:
    """How often the caller was called over to another core, in chains at which it stays away for some milliseconds."""

def pool_attendance(num_threads: int, num_chains: int) -> int:
    """How many threads are still there after chains of short jobs with pauses, in which threads fall asleep and come
    late."""
