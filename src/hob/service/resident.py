"""One resident model: its engine, its scheduler, its disk tier, and what memory its KV has.

Between steps its pool grows as its sequences want blocks and the ledger allows, and gives memory back when told to.
"""

from __future__ import annotations

from dataclasses import dataclass

from hob.engine.base import Engine
from hob.kvcache.backing import Backing
from hob.kvcache.pool import BLOCK_SIZE, BlockPool, num_blocks_for
from hob.kvcache.swap import Swap
from hob.messages import ModelSpec
from hob.request import Sequence, ServiceClass
from hob.scheduler.scheduler import Scheduler
from hob.service.ledger import Ledger
from hob.service.step import pump
from hob.service.turns import Claim

MIN_KV_TOKENS = 512
"""A model is not worth loading with less."""
MIN_STAY_S = 2.0
"""A model does not go sooner after it was loaded, unless it is idle: loading must be worth it."""
PAUSE_S = 30.0
"""A chat's next turn comes within so much: background work leaves its model alone for as long."""
IDLE = 3
"""Less urgent than any class."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes, known before it is loaded."""

    weight_bytes: int
    scratch_bytes: int
    block_bytes: int
    page_bytes: int
    buffer_bytes: int = 0
    """Of the disk tier, all its buffers full."""

    @property
    def num_bytes(self) -> int:
        """What it begins with."""
        return self.weight_bytes + self.scratch_bytes + self.buffer_bytes + self.kv_bytes(MIN_KV_TOKENS)

    @property
    def blocks_per_page(self) -> int:
        """How many blocks fill a page, at least 1."""
        return max(self.page_bytes // self.block_bytes, 1)

    def kv_bytes(self, num_tokens: int) -> int:
        """Whole pages for so many tokens."""
        return -(-num_blocks_for(num_tokens) * self.block_bytes // self.page_bytes) * self.page_bytes


@dataclass(slots=True)
class Opened:
    """What opening a model brings."""

    engine: Engine
    scheduler: Scheduler
    swap: Swap | None = None


class Resident:
    """See the module. Owned by `residents.Residents`."""

    def __init__(self, spec: ModelSpec, opened: Opened, footprint: Footprint, ledger: Ledger, now: float) -> None:
        self.spec = spec
        self.engine, self.scheduler, self.swap = opened.engine, opened.scheduler, opened.swap
        self.footprint = footprint
        self.last_used = self.since = now
        self.last_urgent = -PAUSE_S
        """When it was last known to have interactive work."""
        self.stay_s = MIN_STAY_S
        self.short_since: float | None = None
        """Since when there is no memory for the next of its sequences. None: there is."""
        self.is_draining = self.is_freed = False
        self.drained_for = ""
        """The model that waits for its memory. Empty: it is drained for another reason."""
        self._ledger = ledger
        self._backing = Backing(footprint.block_bytes, footprint.page_bytes)
        self.pool.strip()

    @property
    def name(self) -> str:
        """Of the model."""
        return self.spec.name

    @property
    def pool(self) -> BlockPool:
        """Its KV blocks."""
        return self.scheduler.placement.pool

    @property
    def num_bytes(self) -> int:
        """All that is reserved for it."""
        return sum(self._ledger.held_by(self.name).values())

    @property
    def fixed_bytes(self) -> int:
        """What it takes for as long as it is there: all but its KV, and the least that it has of that."""
        return self.bytes_beside_kv + self.footprint.kv_bytes(MIN_KV_TOKENS)

    @property
    def bytes_beside_kv(self) -> int:
        """All that is reserved for it but its KV."""
        return sum(count for part, count in self._ledger.held_by(self.name).items() if part != "kv")

    def urgency(self, now: float) -> int:
        """The most urgent class of what it has to do; or IDLE.

        Between the turns of a chat STANDARD: background work does not cost the chat its model, but who may have a
        person waiting does not wait for one who reads.
        """
        placement = self.scheduler.placement
        urgency = min((s.request.service_class for s in placement.running + placement.waiting), default=IDLE)
        if urgency == ServiceClass.INTERACTIVE:
            self.last_urgent = now
        elif now - self.last_urgent < PAUSE_S:
            return min(urgency, ServiceClass.STANDARD)
        return urgency

    def claim(self) -> Claim:
        """What it has to do, for `turns.Turns`."""
        placement, clock = self.scheduler.placement, self.scheduler.order.fairness.clock
        requests = [s.request for s in placement.running + placement.waiting]
        urgent = min(request.service_class for request in requests)
        apps = {request.app for request in requests if request.service_class is urgent}
        is_mixed = any(request.service_class is not urgent for request in requests)
        return Claim(self.name, ServiceClass(urgent), min(map(clock, apps)), is_mixed)

    def push_out(self) -> None:
        """Its sequences give up their blocks. What is kept of them on disk is copied before others have the memory."""
        self.scheduler.push_out()
        for leave in self.scheduler.placement.take_leaves():
            if self.swap is not None:
                self.swap.leave(self.engine, leave)

    # ---- memory of its KV ----

    def promised_tokens(self) -> int:
        """What the longest of its requests may come to."""
        scheduler = self.scheduler
        requests = [sequence.request for sequence in scheduler.running + scheduler.waiting]
        longest = (len(r.token_ids) + max(r.sampling.max_tokens, *map(len, r.continuations), 0) for r in requests)
        return min(max(longest, default=0), scheduler.context_length)

    def limit(self, num_bytes: int) -> None:
        """Its KV may take so much at most: longer sequences are refused from now on."""
        pages = max(num_bytes, 0) // self.footprint.page_bytes
        blocks = pages * self.footprint.page_bytes // self.footprint.block_bytes
        self.pool.max_blocks = min(self.pool.num_blocks, blocks)

    def grow(self, count: int) -> bool:
        """Reserve and back `count` more blocks, all or none."""
        count = min(count, self.pool.num_bare)
        ids = self.pool.next_bare(count)
        if not self._ledger.reserve(f"{self.name}/kv", self._backing.cost(ids)):
            return False
        self._backing.back(ids)
        self.pool.grow(count)
        return True

    def missing_bytes(self, count: int) -> int:
        """What `grow(count)` would reserve."""
        return self._backing.cost(self.pool.next_bare(min(count, self.pool.num_bare)))

    def shrink(self, num_bytes: int, *, contexts_too: bool) -> int:
        """Give back about `num_bytes` of unused and cached blocks. Returns how much it was.

        contexts_too: blocks of contexts as well; what is not on disk of them yet is copied out first.
        """
        prefixes = self.scheduler.placement.prefixes
        if contexts_too and self.swap is not None:
            pump(self.engine, self.scheduler, self.swap)
        freed = 0
        while freed < num_bytes:
            count = max((num_bytes - freed) // self.footprint.block_bytes, self.footprint.blocks_per_page)
            taken = self.pool.shrink(count, lambda block_id: contexts_too or not prefixes.is_of_context(block_id))
            stretches = self._backing.bare(taken)
            for offset, length in stretches:
                self.engine.discard(offset, length)
                freed += self._ledger.release(f"{self.name}/kv", length)
            if not taken:
                break
        return freed

    def wanted_blocks(self) -> tuple[int, int]:
        """Blocks that its sequences lack altogether, and that the next one to start or grow does."""
        total = least = 0
        for sequence in self.scheduler.placement.running:
            lack = num_blocks_for(sequence.num_needed_tokens + 1) - len(sequence.block_table)
            if lack > 0:
                total, least = total + lack, max(least, lack)
        for sequence in self.scheduler.placement.waiting:
            if sequence.leader is None or sequence.leader.is_finished:
                lack = num_blocks_for(sequence.num_needed_tokens)
                total, least = total + lack, max(least, lack)
            else:
                total += 2  # a fork: a copied tail and its growth
            if total > self.pool.max_blocks:
                break
        return min(total, self.pool.num_bare + self.pool.num_free), least

    def hopeless(self) -> list[Sequence]:
        """Waiting sequences that can never have their blocks, because the budget shrank since they entered."""
        waiting = self.scheduler.placement.waiting
        return [s for s in waiting if num_blocks_for(s.num_needed_tokens) > self.pool.max_blocks]

    def min_kv_blocks(self) -> int:
        """What it begins with."""
        return min(MIN_KV_TOKENS // BLOCK_SIZE, self.pool.num_blocks)
