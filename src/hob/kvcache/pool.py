"""Blocks of the KV cache: who holds which, and which are free.

A block holds 16 tokens of keys and values for every layer. A sequence sees its blocks through its block table;
sequences with a common prefix share blocks, so each block counts its holders.

    free --allocate--> held (ref_count >= 1) --free--> cached (ref_count 0, content known) --evict--> free
                         ^                               |
                         +------------- share -----------+

A pool may begin with bare blocks, which have no memory yet: `grow` makes them free, `shrink` takes free and cached ones
back. `service.residents` does so between steps, as the ledger allows (`backing.py` says what it costs).

The pool knows ids and counts only; the engine owns the bytes and copies them. So this file runs anywhere and its tests
need no model. Paged KV memory follows Kwon et al. 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable

from hob.errors import InternalError

BLOCK_SIZE = 16
"""Tokens in a block."""


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens. 33 tokens take 3 blocks."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """`num_blocks` blocks, lent and taken back by id."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] = lambda block_id: None) -> None:
        """`on_evict` is told each cached block whose content is about to be overwritten."""
        self.num_blocks = num_blocks
        self.max_blocks = num_blocks
        """Most blocks that there can be memory for: what a sequence may hope for."""
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._bare: list[int] = []  # without memory; a heap, so that low ones come first and share pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._keep: set[int] = set()  # blocks whose content is known and worth keeping after their last holder
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, the cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_unused(self) -> int:
        """Free blocks without content: lending them evicts nothing."""
        return len(self._free)

    @property
    def num_bare(self) -> int:
        """Blocks without memory."""
        return len(self._bare)

    @property
    def num_cached(self) -> int:
        """Blocks without a holder whose content can be found again."""
        return len(self._cached)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed."""
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """Lend `count` blocks, each with one holder. Evicts the least recently used cached ones when free ones run out.

        Raises InternalError if there are fewer: ask `can_allocate` first.
        """
        if not self.can_allocate(count):
            raise InternalError(f"pool: {count} blocks asked for, {self.num_free} of {self.num_blocks} can be had")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in blocks:
            self._ref_counts[block_id] = 1
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a holder to each block, held or cached."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                if block_id not in self._cached:
                    raise InternalError(f"pool: block {block_id} is free and cannot be shared")
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: list[int]) -> None:
        """Take one holder away from each block. The last block is forgotten first, so that prefixes live longest."""
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise InternalError(f"pool: block {block_id} is freed but has no holder")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if block_id in self._keep:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def keep(self, block_id: int) -> None:
        """Mark a held block's content as known: it stays findable after its last holder leaves."""
        self._keep.add(block_id)

    def disown(self, block_id: int) -> None:
        """Forget that a held block's content is known: its holder writes on in it."""
        self._keep.discard(block_id)

    def strip(self) -> None:
        """At the start: no block has memory."""
        if len(self._free) != self.num_blocks:
            raise InternalError(f"pool: {self.num_blocks - len(self._free)} blocks are in use and cannot be stripped")
        self._bare, self._free = list(range(self.num_blocks)), []

    def next_bare(self, count: int) -> list[int]:
        """The blocks that `grow(count)` would take."""
        return heapq.nsmallest(count, self._bare)

    def grow(self, count: int) -> None:
        """Bare blocks have memory now and are free."""
        self._free[:0] = reversed([heapq.heappop(self._bare) for _ in range(count)])

    def shrink(self, count: int, may_evict: Callable[[int], bool] = lambda block_id: True) -> list[int]:
        """Make up to `count` blocks bare: free ones, the last first, then cached ones that may go, the oldest first."""
        self._free.sort(reverse=True)
        taken, self._free = self._free[:count], self._free[count:]
        for block_id in [b for b in self._cached if may_evict(b)][: count - len(taken)]:
            del self._cached[block_id]
            self._keep.discard(block_id)
            self._on_evict(block_id)
            taken.append(block_id)
        for block_id in taken:
            heapq.heappush(self._bare, block_id)
        return taken

    def num_holders(self, block_id: int) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block_id]

    def check(self) -> None:
        """Raise InternalError unless every block is in exactly one state. Cheap enough for every test step."""
        held = sum(count > 0 for count in self._ref_counts)
        total = held + len(self._cached) + len(self._free) + len(self._bare)
        if total != self.num_blocks or min(self._ref_counts, default=0) < 0:
            raise InternalError(
                f"pool: free({len(self._free)}) + held({held}) + cached({len(self._cached)}) + bare({len(self._bare)}) "
                f"= {total}, expected {self.num_blocks} blocks"
            )
        idle = set(self._free) | set(self._cached) | set(self._bare)
        if len(idle) != len(self._free) + len(self._cached) + len(self._bare) or any(self._ref_counts[b] for b in idle):
            raise InternalError("pool: a block is both free and held, or listed twice")

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._keep.discard(block_id)
        self._on_evict(block_id)
        return block_id
