"""How an engine process measures and opens models: files, compute core, disk tier, scheduler. The real `Opener`."""

from __future__ import annotations

import gc
import logging

import msgspec

from hob.config import EngineConfig, SchedulerConfig
from hob.engine.base import BLOCK_SIZE, Engine
from hob.kvcache.slab import slot_bytes_for
from hob.kvcache.swap import MAX_QUEUED_BYTES, NUM_READERS, PIECE_BLOCKS
from hob.messages import Lease, ModelSpec
from hob.scheduler.scheduler import Scheduler
from hob.service.disk import DiskSpec, open_disk
from hob.service.resident import Footprint, Opened

log = logging.getLogger("hob.engine")


class EngineSpec(msgspec.Struct):
    """What an engine process is to run."""

    model_name: str
    packed_path: str
    """Packed file of the default model; empty for the fake engine."""
    engine: EngineConfig
    scheduler: SchedulerConfig
    kv_tokens: int
    fake_step_s: float = 0.0
    """Fake engine: seconds of a step beside its rows."""
    fake_vocab_size: int = 1000
    disk: DiskSpec | None = None
    """Where KV of persistent contexts is kept. None: nowhere."""
    text_bytes: int = 0
    """What the default model's tokenizer takes in the API process."""
    others: list[ModelSpec] = []
    """Models that were loaded before: requests may name them."""
    budget_bytes: int = 1 << 40
    keep_alive_s: float = 300.0
    max_keep_alive_s: float = 3600.0
    max_pinned_share: float = 0.5
    leases: dict[str, dict[str, Lease]] = {}
    """By model and app: what a process before this one had granted."""

    @property
    def default(self) -> ModelSpec:
        """The model that is loaded at the start."""
        return ModelSpec(self.model_name, self.packed_path, self.text_bytes)


def settle() -> None:
    """What loading made stays: no pass over all of it between two steps.

    Not for ever: a model that is gone left cycles, which nobody would find among what is frozen. 65 kB each.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class ModelOpener:
    """See `residents.Opener`."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._max_queued_bytes = min(MAX_QUEUED_BYTES, spec.budget_bytes // 32)

    def footprint(self, spec: ModelSpec) -> Footprint:
        """From the packed file's header. Raises ModelFileError."""
        if not spec.packed_path:
            return self._with_buffers(Footprint(0, 0, 8 * BLOCK_SIZE, 32 * BLOCK_SIZE))
        from hob.engine.footprint import sizes_of

        limits = self._spec.scheduler
        sizes = sizes_of(spec.name, spec.packed_path, self._spec.engine, limits.max_step_tokens, limits.max_running)
        return self._with_buffers(
            Footprint(sizes.weight_bytes, sizes.scratch_bytes, sizes.block_bytes, sizes.page_bytes)
        )

    def open(self, spec: ModelSpec, num_blocks: int) -> Opened:
        """Engine first, because loading weights takes longest."""
        engine = self._open_engine(spec)
        engine.open_pool(num_blocks)
        info = engine.info
        log.info("%s: isa %s (%s), %d threads", info.name, info.isa, info.isa_reason, info.num_threads)
        disk = None
        if self._spec.disk is not None:
            disk = open_disk(self._spec.disk, engine, spec.packed_path, self._max_queued_bytes)
        swap, salt_of = (disk.swap, disk.salt_of) if disk is not None else (None, None)
        scheduler = Scheduler(self._spec.scheduler, num_blocks, info.context_length, info.vocab_size, swap, salt_of)
        if swap is not None:
            swap.recompute_s = scheduler.cost.prompt_s
        settle()
        return Opened(engine, scheduler, swap)

    def _open_engine(self, spec: ModelSpec) -> Engine:
        limits = self._spec.scheduler
        if spec.packed_path:
            from hob.engine.local import LocalEngine

            return LocalEngine(
                spec.name, spec.packed_path, self._spec.engine, limits.max_step_tokens, limits.max_running
            )
        from hob.engine.fake import CostModel, FakeEngine

        cost = CostModel(step=self._spec.fake_step_s) if self._spec.fake_step_s else None
        return FakeEngine(vocab_size=self._spec.fake_vocab_size, cost=cost)

    def _with_buffers(self, footprint: Footprint) -> Footprint:
        """What reading and writing contexts takes at most: pieces on their way in, copies on their way out."""
        disk = self._spec.disk
        if disk is None or not disk.max_bytes:
            return footprint
        in_bytes = NUM_READERS * (PIECE_BLOCKS + 1) * slot_bytes_for(footprint.block_bytes)
        num_bytes = in_bytes + self._max_queued_bytes
        return Footprint(
            footprint.weight_bytes, footprint.scratch_bytes, footprint.block_bytes, footprint.page_bytes, num_bytes
        )
