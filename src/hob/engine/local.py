"""Our engine: a packed model file in the compute core, behind the contract of `base.py`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from hob import native
from hob.config import EngineConfig
from hob.engine.adapters import digest_of, find_adapters, read_adapter
from hob.engine.base import BLOCK_SIZE, Batch, Draw, Sampled, Scores, StepInfo
from hob.errors import InternalError, ModelFileError, Overloaded
from hob.kvcache.formats import KvShape
from hob.messages import ModelInfo
from hob.models.network import Network
from hob.models.pack import Packed, open_packed

log = logging.getLogger("hob.engine")

MAX_Q8_HEAD_DIM = 128
NO_LOGPROB = -1
"""As `num_logprobs` of a draw: not even the token's own, which takes a pass over the row of logits."""


def choose_isa(wanted: str) -> tuple[str, str]:
    """The instruction set to use and why. Raises ModelFileError if the machine lacks the one asked for."""
    available = native.available_isas()
    if wanted == "auto":
        return available[-1], f"auto: the best of {', '.join(available)} on this CPU"
    if wanted not in available:
        raise ModelFileError(f"isa '{wanted}' is asked for, but this CPU has {', '.join(available)}. Use HOB_ISA=auto.")
    return wanted, "asked for"


def choose_kv_type(wanted: str, isa: str, network: Network) -> tuple[str, str]:
    """How keys and values are kept, and why.

    Where attention counts in whole numbers 8 bits are as good to within what can be measured (docs/results.md), faster
    and half as large. A scale is for one head's values: with 256 of them (Gemma) the distance from float32 triples, and
    biases make some channels of the keys large throughout.
    """
    if wanted != "auto":
        return wanted, "asked for"
    if isa not in ("avx512", "amx"):
        return "f16", f"auto: on {isa} 8 bits would be slower"
    if network.qkv_bias:
        return "f16", "auto: this model's keys have biases"
    if network.head_dim > MAX_Q8_HEAD_DIM:
        return "f16", f"auto: heads of {network.head_dim} values are long for one scale"
    return "q8", "auto: half as large as f16, and faster"


def num_usable_cores() -> int:
    """Cores this process may run on: its affinity, not the machine's count."""
    return len(os.sched_getaffinity(0))


class LocalEngine:
    """One model, one pool, one workspace. See `base.Engine` for what each method promises."""

    def __init__(
        self, name: str, packed_path: str | Path, config: EngineConfig, max_rows: int, max_logits: int = 64
    ) -> None:
        """Load the file `pack.ensure_packed` made. Raises ModelFileError.

        max_logits: most rows of a step whose logits are wanted: only they take memory.
        """
        isa, reason = choose_isa(config.isa)
        num_threads = config.threads or num_usable_cores()
        packed = open_packed(Path(packed_path))
        try:
            self._model = native.Model(
                str(packed_path),
                packed.data_offset,
                dataclasses.asdict(packed.network),
                [(t.name, t.kind, t.rows, t.cols, t.offset, t.nbytes) for t in packed.tensors],
                isa,
                num_threads,
                config.weights,
            )
        except ValueError as error:
            raise ModelFileError(f"{packed_path}: {error}") from error
        self._network = packed.network
        self._kv_type, kv_reason = choose_kv_type(config.kv_type, isa, packed.network)
        log.info("%s: KV as %s (%s)", name, self._kv_type, kv_reason)
        self._workspace = native.Workspace(self._model, max_rows)
        self._pool: native.KvPool | None = None
        self.max_rows = max_rows
        self.adapters: dict[str, int] = {}
        self.info = _describe(name, packed, self._model.weight_bytes, isa, reason, num_threads, self._kv_type)
        if config.adapters:
            self._load_adapters(Path(config.adapters) / name)
        self.block_bytes = self.info.kv_bytes_per_token * BLOCK_SIZE
        net = packed.network
        self.kv_shape = KvShape(net.num_layers, net.num_kv_heads, net.head_dim, self._kv_type)
        self.page_bytes = native.KvPool.page_bytes
        unused_rows = max(max_rows - max_logits, 0)
        self.scratch_bytes = self._workspace.num_bytes - 4 * self.info.vocab_size * unused_rows

    def open_pool(self, num_blocks: int) -> None:
        """Reserve the pool; its pages become resident as they are first written."""
        try:
            self._pool = native.KvPool(self._model, num_blocks, self._kv_type)
        except (MemoryError, RuntimeError) as error:
            wanted = num_blocks * self.block_bytes
            raise Overloaded(f"no memory for {num_blocks} KV blocks ({wanted:,} bytes): {error}") from error
        if self._pool.block_bytes != self.block_bytes:
            raise InternalError(f"a KV block has {self._pool.block_bytes} bytes, expected {self.block_bytes}")

    def _load_adapters(self, folder: Path) -> None:
        """All adapters of this model. One that cannot be used is left out and said so: the others still serve."""
        num_bytes = 0
        for name, path in find_adapters(folder).items():
            try:
                num_bytes += self.load_adapter(len(self.adapters) + 1, path)
            except ModelFileError as error:
                log.error("adapter '%s' is not served: %s", name, error)
            else:
                self.adapters[f"{name}@{digest_of(path)}"] = len(self.adapters) + 1
        if self.adapters:
            log.info("%d adapters of '%s', %d bytes", len(self.adapters), self.info.name, num_bytes)
        self.info = msgspec.structs.replace(
            self.info, weight_bytes=self.info.weight_bytes + num_bytes, adapters=list(self.adapters)
        )

    def load_adapter(self, adapter_id: int, path: Path) -> int:
        """Keep a LoRA adapter under an id from 1 on, between steps; the bytes it takes. Raises ModelFileError."""
        pairs = read_adapter(path, self._network)
        try:
            return self._model.add_adapter(adapter_id, [(p.layer, p.target, p.a, p.b) for p in pairs])
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}") from error

    def drop_adapter(self, adapter_id: int) -> None:
        """Give an adapter's memory back, between steps."""
        self._model.remove_adapter(adapter_id)

    def forward(self, batch: Batch) -> StepInfo:
        """One step on all threads, without the GIL."""
        start = time.perf_counter()
        is_done, phase_ns = native.forward(
            self._model,
            self._opened_pool(),
            self._workspace,
            batch.token,
            batch.position,
            batch.index,
            batch.out,
            batch.target,
            batch.row_start,
            batch.table_start,
            batch.blocks,
            batch.adapter,
            batch.num_tops,
            batch.layers,
            batch.depth,
            batch.measured,
        )
        return StepInfo(is_done, time.perf_counter() - start, phase_ns)

    def sample(self, draws: Sequence[Draw], masks: NDArray[np.uint8] | None = None) -> list[Sampled]:
        """One token per draw, in C++: 16 rows of 49k logits in NumPy would take longer than the step."""
        history, history_start = _join([d.token_ids if _needs_history(d) else [] for d in draws])
        bias_ids, bias_start = _join([list(d.params.logit_bias) for d in draws])
        bias_values = np.array([v for d in draws for v in d.params.logit_bias.values()], np.float32)
        ids, logprobs, tops_start, top_ids, top_logprobs = native.sample(
            self._workspace,
            temperature=_floats([d.params.temperature for d in draws]),
            top_k=_ints([d.params.top_k for d in draws]),
            top_p=_floats([d.params.top_p for d in draws]),
            min_p=_floats([d.params.min_p for d in draws]),
            repetition=_floats([d.params.repetition_penalty for d in draws]),
            presence=_floats([d.params.presence_penalty for d in draws]),
            frequency=_floats([d.params.frequency_penalty for d in draws]),
            seed=np.array([d.params.seed & 0xFFFFFFFFFFFFFFFF for d in draws], np.uint64),
            sample_index=_ints([d.sample_index for d in draws]),
            position=_ints([d.position for d in draws]),
            num_logprobs=_ints([NO_LOGPROB if d.params.logprobs is None else d.params.logprobs for d in draws]),
            history=history,
            history_start=history_start,
            num_generated=_ints([d.num_generated if _needs_history(d) else 0 for d in draws]),
            bias_ids=bias_ids,
            bias_values=bias_values,
            bias_start=bias_start,
            mask=masks,
        )
        sampled = [Sampled(i, p) for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True)]
        for row, token in enumerate(sampled if len(top_ids) else []):
            span = slice(tops_start[row], tops_start[row + 1])
            token.tops = list(zip(top_ids[span].tolist(), top_logprobs[span].tolist(), strict=True))
        return sampled

    def logits(self) -> NDArray[np.float32]:
        """(n, vocab_size) of the last step's LOGITS rows."""
        return native.logits(self._workspace)

    def scores(self) -> Scores:
        """Of the last step's SCORE rows."""
        return Scores(*native.scores(self._workspace))

    def density(self, block_ids: Sequence[int]) -> list[float]:
        """Of the last step's measured row; some milliseconds for 2,000 tokens."""
        mass: list[float] = native.density(self._opened_pool(), self._workspace, _ints(list(block_ids))).tolist()
        return mass

    def hidden(self) -> NDArray[np.float32]:
        """(n, L, hidden_size) of the last step's HIDDEN rows."""
        rows = native.hidden(self._workspace)
        return rows.reshape(len(rows), rows.shape[1] // self.info.hidden_size, self.info.hidden_size)

    def copy_block(self, source: int, destination: int, num_tokens: int) -> None:
        """Copy the first slots of a block."""
        self._opened_pool().copy(source, destination, num_tokens)

    def read_block(self, block_id: int) -> bytes:
        """A block's bytes."""
        return self._opened_pool().read(block_id)

    def write_block(self, block_id: int, data: bytes | memoryview) -> None:
        """Put a block's bytes back."""
        if len(data) != self.block_bytes:
            raise InternalError(f"block data has {len(data)} bytes, expected {self.block_bytes}")
        self._opened_pool().write(block_id, data)

    def discard(self, offset: int, num_bytes: int) -> None:
        """Give memory of the pool back to the system."""
        self._opened_pool().discard(offset, num_bytes)

    def stop(self) -> None:
        """Abandon the running step between two layers."""
        native.request_stop(self._workspace)

    def close(self) -> None:
        """Give the memory back; the engine is unusable afterwards."""
        del self._pool, self._workspace, self._model

    def _opened_pool(self) -> native.KvPool:
        if self._pool is None:
            raise InternalError("the KV pool is not open: call open_pool first")
        return self._pool


def _describe(
    name: str, packed: Packed, weight_bytes: int, isa: str, reason: str, num_threads: int, kv_type: str
) -> ModelInfo:
    network = packed.network
    return ModelInfo(
        name=name,
        architecture=network.architecture,
        num_parameters=sum(t.rows * t.cols for t in packed.tensors),
        context_length=network.context_length,
        vocab_size=network.vocab_size,
        hidden_size=network.hidden_size,
        num_layers=network.num_layers,
        kv_bytes_per_token=network.kv_bytes_per_token(kv_type),
        weight_bytes=weight_bytes,
        quantisation=packed.quantisation,
        isa=isa,
        isa_reason=reason,
        num_threads=num_threads,
        kv_type=kv_type,
    )


def _needs_history(draw: Draw) -> bool:
    params = draw.params
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _floats(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def _ints(values: list[int]) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def _join(lists: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lists one after the other, and where each starts: (total,), (n + 1,)."""
    starts = list(accumulate(map(len, lists), initial=0))
    return _ints([value for items in lists for value in items]), _ints(starts)
