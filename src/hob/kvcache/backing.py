"""What a pool's blocks cost in memory: which of its pages hold at least one block that may be written.

Blocks lie one after the other; the system gives memory by the page (2 MB where it can). A page is taken when its first
block is backed and can be given back when its last one is bare. SmolLM2's block of 368,640 bytes: 5.7 to a page.
Counts only; the engine gives the memory back (`Engine.discard`).
"""

from __future__ import annotations

from collections.abc import Iterable


class Backing:
    """Pages of one pool."""

    def __init__(self, block_bytes: int, page_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._page_bytes = page_bytes
        self._num_blocks: dict[int, int] = {}  # page -> backed blocks that touch it

    @property
    def num_bytes(self) -> int:
        """Of all pages that are taken."""
        return len(self._num_blocks) * self._page_bytes

    def cost(self, block_ids: Iterable[int]) -> int:
        """Bytes that backing these blocks would take."""
        return len({p for b in block_ids for p in self._pages(b)} - self._num_blocks.keys()) * self._page_bytes

    def back(self, block_ids: Iterable[int]) -> None:
        """These blocks may be written from now on."""
        for block_id in block_ids:
            for page in self._pages(block_id):
                self._num_blocks[page] = self._num_blocks.get(page, 0) + 1

    def bare(self, block_ids: Iterable[int]) -> list[tuple[int, int]]:
        """These blocks will not be touched any more. Returns stretches (offset, bytes) that can be given back."""
        empty = []
        for block_id in block_ids:
            for page in self._pages(block_id):
                self._num_blocks[page] -= 1
                if not self._num_blocks[page]:
                    del self._num_blocks[page]
                    empty.append(page)
        return [(page * self._page_bytes, self._page_bytes) for page in sorted(empty)]

    def _pages(self, block_id: int) -> range:
        start = block_id * self._block_bytes
        return range(start // self._page_bytes, (start + self._block_bytes - 1) // self._page_bytes + 1)
