"""What scheduler, loop and swap say to each other about the disk tier: questions, loads, and the memory they fill.

No policy and no bytes of its own: `swap.py` answers, `scheduler.placement` asks, `service.step` carries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hob.kvcache.pool import BLOCK_SIZE

Key = bytes
"""Of a block: see prefix.py."""
Find = Callable[[str, Key], int | None]
"""The block that holds an app's key in memory now: `PrefixCache.find`."""


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """A finished turn of a context, as far as its blocks go."""

    app: str
    context_id: str
    keys: list[Key]
    """Of its computed full blocks."""
    tail: Key | None
    """Of the unfinished one, if any."""
    kv_bits: int = 16
    """What the context asks for: see compression.py."""
    density: Sequence[float] = ()
    """Attention that each of the blocks got, as far as it was measured."""


class SecondLevel(Protocol):
    """What the scheduler may ask and tell. Pure: no clock, no engine."""

    def count(self, app: str, keys: Sequence[Key], start: int) -> int:
        """How many leading keys are worth reading from disk, the first of which is the sequence's block `start`."""
        ...

    def has(self, app: str, key: Key) -> bool:
        """Whether one block, a context's unfinished one, is there."""
        ...

    def turn_ended(self, end: TurnEnd) -> None:
        """A sequence of a context ended: what is computed of it may go to disk."""
        ...

    def reserve(self, num_tokens: int) -> bool:
        """Take room for copies of so many tokens of a preempted sequence: its `Leave` follows.

        False: there is none, or writing them and reading them back takes longer than computing them again.
        """
        ...

    def forget(self, app: str, holder_id: str) -> None:
        """What was kept of a preempted sequence is wanted no more."""
        ...


class BlockMemory(Protocol):
    """The engine's pool, as far as swapping goes: read by the loop's thread, written by those that read the disk."""

    def read_block(self, block_id: int) -> bytes: ...
    def write_block(self, block_id: int, data: bytes | memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class Leave:
    """Blocks of a preempted sequence that are to be kept on disk. Their bytes are there until the next step."""

    app: str
    holder_id: str
    keys: list[Key]
    block_ids: list[int]


@dataclass(eq=False, slots=True)
class Load:
    """Blocks of a sequence on their way from disk. Whoever takes the blocks back calls `cancel` before."""

    app: str
    keys: list[Key]
    block_ids: list[int]
    num_tail_tokens: int = 0
    """If the last of the blocks is an unfinished one: its tokens. 0: it is full."""
    is_cancelled: bool = False
    num_pending: int = 0
    is_written: list[bool] = field(default_factory=list)
    begun_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """The blocks are somebody else's from now on: nothing is written into them any more."""
        with self._lock:
            self.is_cancelled = True

    def put(self, memory: BlockMemory, i: int, data: memoryview) -> None:
        """Write its block `i`, in a reader's thread."""
        with self._lock:
            if not self.is_cancelled:
                memory.write_block(self.block_ids[i], data)
                self.is_written[i] = True

    @property
    def num_loaded(self) -> int:
        """Leading blocks that are there."""
        return self.is_written.index(False) if False in self.is_written else len(self.is_written)

    @property
    def num_loaded_tokens(self) -> int:
        """Tokens of the leading blocks that are there."""
        missing = BLOCK_SIZE - self.num_tail_tokens if self.num_tail_tokens and all(self.is_written) else 0
        return self.num_loaded * BLOCK_SIZE - missing
