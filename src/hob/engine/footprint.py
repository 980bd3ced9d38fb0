"""What a step's workspace takes, known before the model is loaded: the sizes of csrc/workspace.h, rounded up.

An upper bound: the engine's own figure (`Engine.scratch_bytes`) is held against it when the model is there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from hob import native
from hob.config import EngineConfig
from hob.engine.adapters import find_adapters, loaded_bytes, read_adapter
from hob.engine.base import BLOCK_SIZE
from hob.engine.local import choose_isa, choose_kv_type, num_usable_cores
from hob.errors import ModelFileError
from hob.models.network import Network
from hob.models.packed_file import open_packed

BLOCK_ROWS = 96
"""Rows a thread takes through a layer at once."""
HEAD_ROWS = 48
""".. and through the head, and most of a step whose outputs threads split."""
TOPS = 128
STACKED_RANKS = 768
"""Most ranks of the adapters of a fused layer, side by side."""
PARTIALS = 2048
HEAD_PIECE = 512
SLACK = 1.1


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What a model takes in the compute core."""

    weight_bytes: int
    scratch_bytes: int
    block_bytes: int
    page_bytes: int
    """The pool's memory is taken by this much."""


def sizes_of(name: str, packed_path: str, config: EngineConfig, max_rows: int, max_logits: int) -> EngineSizes:
    """From the packed file's header, and what the model's adapters hold. Raises ModelFileError."""
    packed = open_packed(Path(packed_path))
    num_threads = config.threads or num_usable_cores()
    kv_type, _ = choose_kv_type(config.kv_type, choose_isa(config.isa)[0], packed.network)
    return EngineSizes(
        weight_bytes=packed.total_bytes - packed.data_offset + _adapter_bytes(name, packed.network, config),
        scratch_bytes=scratch_bytes(packed.network, max_rows, max_logits, num_threads),
        block_bytes=packed.network.kv_bytes_per_token(kv_type) * BLOCK_SIZE,
        page_bytes=native.KvPool.page_bytes,
    )


def _adapter_bytes(name: str, network: Network, config: EngineConfig) -> int:
    """Those that cannot be used take nothing: the engine says which and why."""
    paths = find_adapters(Path(config.adapters) / name).values() if config.adapters else ()
    return sum(_loaded_bytes(path, network) for path in paths)


_KNOWN: dict[Path, tuple[list[object], int]] = {}
"""What adapters take, with what they were like when that was found out."""


def _loaded_bytes(path: Path, network: Network) -> int:
    """Read once, and not whenever a load is considered: that is between two steps."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stamp = [network, *((file.stat().st_mtime_ns, file.stat().st_size) for file in files)]
    if path not in _KNOWN or _KNOWN[path][0] != stamp:
        num_bytes = 0
        with contextlib.suppress(ModelFileError):
            num_bytes = loaded_bytes(read_adapter(path, network))
        _KNOWN[path] = stamp, num_bytes
    return _KNOWN[path][1]


def scratch_bytes(network: Network, max_rows: int, max_logits: int, num_threads: int) -> int:
    """Most bytes beside weights and KV, `max_logits` rows of logits included.

    SmolLM2-135M, 512 rows, 64 of them with logits, two threads: 80 MB, of which states of all layers are 37.
    """
    heads = network.num_heads * network.head_dim
    kv = network.num_kv_heads * network.head_dim
    ffn = network.expert_ffn_size or network.ffn_size
    widest, vocab = max(network.hidden_size, heads), network.vocab_size + 32
    states = (network.num_layers + 1) * network.hidden_size  # of all layers, where an app asks for them
    per_row = states + network.hidden_size + 2 * heads + network.head_dim + 2 * network.num_heads + 2 * TOPS + 256
    per_row += network.hidden_size * network.post_norms + network.num_active_experts * (network.hidden_size + 36)
    shared = _acts(ffn, HEAD_ROWS) + PARTIALS * (network.head_dim + 8) + HEAD_ROWS * vocab
    own = (
        _acts(widest, BLOCK_ROWS)
        + _acts(ffn, BLOCK_ROWS)
        + _acts(ffn, HEAD_ROWS)
        + widest
        + BLOCK_ROWS * (max(heads, kv) + STACKED_RANKS + 96)
        + HEAD_ROWS * HEAD_PIECE
        + 64 * network.head_dim
        + 5 * vocab
    )
    floats = max_rows * per_row + shared + num_threads * own + max_logits * vocab
    return int(4 * floats * SLACK) + (2 << 20)


def _acts(size: int, rows: int) -> int:
    """Floats of a linear layer's input: as float32 and, quantised, some ten bytes more in eight."""
    return rows * (size + 32) * 3 // 2
