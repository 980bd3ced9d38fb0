"""What goes to disk and what comes back, and when: between the prefix cache in memory and the block store.

    a turn ends      its context's full blocks that are not on disk yet are copied between two steps, a few at a time,
                     and written by a thread of their own: ahead of time, so that memory can be taken at no cost later
    a sequence is    if computing its blocks again would take longer than writing and reading them, they are copied at
    preempted        once, before the step that overwrites them, and written by the same thread
    a sequence       after the match in memory, the next keys on disk are read by threads into its blocks; it starts
    starts           when they are there, and other sequences run meanwhile. Unless computing them is measured faster.

Everything here can be lost without harm: a block that is not on disk is computed again. The scheduler sees only
`second_level.SecondLevel`; the loop drives `begin` and `pump`. With `is_threaded` off
all happens inside these calls (tests).
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from hob.errors import HobError
from hob.kvcache.compression import EXACT
from hob.kvcache.pool import BLOCK_SIZE
from hob.kvcache.second_level import BlockMemory, Find, Key, Leave, Load, TurnEnd
from hob.kvcache.store import BlockStore, Piece

log = logging.getLogger("hob.swap")

PIECE_BLOCKS = 8
"""Blocks read at a time: 3 MB of SmolLM2's. A virtual disk gave 1.54 GB/s in such pieces and 1.30 in ones of 6 MB."""
NUM_READERS = 2
"""One decrypts while the disk reads for the other; more readers got no more from a disk."""
MAX_QUEUED_BYTES = 64 << 20
"""Copies that wait for the writer; beyond that, blocks stay in memory until there is room."""
PUMP_S = 0.002
"""Time that copying may take between two steps while others run."""


@dataclass(slots=True)
class _Turn:
    """A finished turn whose blocks are being gathered."""

    app: str
    context_id: str
    keys: list[Key]
    tail: Key | None
    dirty: list[Key]
    bits: int = EXACT
    levels: dict[Key, int] = field(default_factory=dict)
    """Bits of the blocks that are to have fewer than 16. What is written now is exact or has these."""
    blocks: dict[Key, bytes] = field(default_factory=dict)


class Swap:
    """One engine's second level."""

    def __init__(
        self,
        store: BlockStore,
        recompute_s: Callable[[int, int], float] | None = None,
        *,
        is_threaded: bool = True,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        """recompute_s(start, n): seconds to compute rows [start, start + n); None: reading is always better."""
        self.store = store
        self.num_read = self.num_written = self.num_lost = self.num_write_errors = 0
        self.recompute_s = recompute_s
        self._max_queued_bytes = max_queued_bytes
        self._bytes_per_s = self._write_bytes_per_s = 500e6  # a plain SSD, until measured
        self._turns: list[_Turn] = []
        self._queued_bytes = 0
        self._bytes_lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Load] = queue.SimpleQueue()  # once for each piece
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._readers = ThreadPoolExecutor(NUM_READERS, "hob-read") if is_threaded else None
        self._writer = threading.Thread(target=self._write_jobs, name="hob-write", daemon=True) if is_threaded else None
        if self._writer is not None:
            self._writer.start()

    def fileno(self) -> int:
        """Readable when `pump` has something new to do."""
        return self._wake

    @property
    def has_copies(self) -> bool:
        """Whether finished turns wait to be copied and there is room to do it: do not sleep."""
        return bool(self._turns) and self._queued_bytes < self._max_queued_bytes

    @property
    def has_turns(self) -> bool:
        """Whether finished turns wait to be copied out of memory."""
        return bool(self._turns)

    # ---- the scheduler's side ----

    def count(self, app: str, keys: Sequence[Key], start: int) -> int:
        """See SecondLevel. All that is there or nothing: reading is tens of times faster or the disk is very slow."""
        num_found = self.store.count(app, keys)
        if not num_found or self.recompute_s is None:
            return num_found
        read_s = num_found * self.store.slot_bytes / self._bytes_per_s
        compute_s = self.recompute_s(start * BLOCK_SIZE, num_found * BLOCK_SIZE)
        is_worth = read_s < compute_s
        log.debug(
            "%d blocks on disk: reading %.1f ms, computing %.1f ms: %s",
            num_found, 1e3 * read_s, 1e3 * compute_s, "read" if is_worth else "compute",
        )  # fmt: skip
        return num_found if is_worth else 0

    def has(self, app: str, key: Key) -> bool:
        """See SecondLevel. One block is read in a millisecond; up to 15 rows take more."""
        return self.store.count(app, [key]) == 1

    def turn_ended(self, end: TurnEnd) -> None:
        """See SecondLevel. A block that gets less attention than before is written anew, with fewer bits."""
        every = end.keys if end.tail is None else [*end.keys, end.tail]
        bits, codec = end.kv_bits, self.store.codec
        levels: dict[Key, int] = {}
        if bits != EXACT and codec is not None:
            levels = dict(zip(end.keys, codec.levels(bits, end.density, len(end.keys)), strict=True))
        dirty = self.store.missing(end.app, every, levels)
        self._turns.append(_Turn(end.app, end.context_id, every, end.tail, dirty, bits, levels))

    def reserve(self, num_tokens: int) -> bool:
        """See SecondLevel. What does not fit the writer's queue is computed again, not waited for."""
        num_blocks = num_tokens // BLOCK_SIZE
        num_bytes, queued_bytes = num_blocks * self.store.slot_bytes, num_blocks * self.store.block_bytes
        swap_s = num_bytes / self._write_bytes_per_s + num_bytes / self._bytes_per_s
        if self.recompute_s is not None and swap_s >= self.recompute_s(0, num_tokens):
            return False
        if self._queued_bytes + queued_bytes > self._max_queued_bytes:
            return False
        self._count_queued(queued_bytes)
        return True

    def forget(self, app: str, holder_id: str) -> None:
        """See SecondLevel."""
        self._submit(lambda: self.store.drop(app, [holder_id]))

    # ---- the loop's side ----

    def leave(self, memory: BlockMemory, leave: Leave) -> None:
        """Copy a preempted sequence's blocks, those that are not on disk already, and hand them to the writer.

        What was reserved for the others is free again.
        """
        missing = set(self.store.missing(leave.app, leave.keys))
        blocks = {
            key: memory.read_block(block_id)
            for key, block_id in zip(leave.keys, leave.block_ids, strict=True)
            if key in missing
        }
        self._count_queued((len(blocks) - len(leave.keys)) * self.store.block_bytes)
        turn = _Turn(leave.app, leave.holder_id, leave.keys, None, [])
        self._submit(lambda: self._write(turn, blocks))

    def begin(self, memory: BlockMemory, load: Load) -> None:
        """Start reading a load's blocks into their places."""
        load.begun_s = time.perf_counter()
        load.is_written = [False] * len(load.keys)
        at = 0
        pieces = self.store.pieces(load.app, load.keys, PIECE_BLOCKS)
        load.num_pending = max(len(pieces), 1)
        if not pieces:  # evicted since it was counted
            self._finish_piece(load)
        for piece in pieces:
            if self._readers is not None:
                self._readers.submit(self._read, memory, load, at, piece)
            else:
                self._read(memory, load, at, piece)
            at += len(piece.keys)

    def pump(self, memory: BlockMemory, find: Find, is_idle: bool) -> list[Load]:
        """Copy some blocks of finished turns out of memory. Returns loads that are done.

        While others run (not is_idle) copying takes PUMP_S at most.
        """
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        finished = self._take_read()
        deadline = time.perf_counter() + PUMP_S
        while self.has_copies and (is_idle or time.perf_counter() < deadline):
            self._copy_one(memory, find)
        return finished

    def run(self, job: Callable[[], None]) -> None:
        """Change the store in the writing thread, after all turns that were copied before."""
        self._submit(job)

    def drop(self, app: str, context_id: str) -> None:
        """A context is deleted: forget what waits to be copied of it, then free its blocks."""
        turns, self._turns = self._turns, []
        for turn in turns:
            if (turn.app, turn.context_id) == (app, context_id):
                self._count_queued(-len(turn.blocks) * self.store.block_bytes)
            else:
                self._turns.append(turn)
        self._submit(lambda: self.store.drop(app, [context_id]))

    def drain(self, memory: BlockMemory, find: Find) -> None:
        """Copy and write all that is left (shutdown, tests, measurements)."""
        while self._turns:
            self.pump(memory, find, is_idle=True)
            if self._turns:
                time.sleep(0.001)
        done = threading.Event()
        self._submit(done.set)
        done.wait()

    def close(self) -> None:
        """Finish what is queued, end the threads, close the store."""
        if self._readers is not None:
            self._readers.shutdown()
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join()
        self.store.close()
        os.close(self._wake)

    # ---- reading ----

    def _read(self, memory: BlockMemory, load: Load, at: int, piece: Piece) -> None:
        """In a reader's thread."""
        try:
            if not load.is_cancelled:
                block = memoryview(bytearray(self.store.block_bytes))
                for i, is_there in enumerate(self.store.read(piece, block), at):
                    if is_there:
                        load.put(memory, i, block)
        except Exception:
            log.exception("reading KV blocks failed; they are computed again")
        self._finish_piece(load)

    def _finish_piece(self, load: Load) -> None:
        self._done.put(load)
        os.eventfd_write(self._wake, 1)

    def _take_read(self) -> list[Load]:
        finished = []
        while not self._done.empty():
            load = self._done.get()
            load.num_pending -= 1
            if load.num_pending == 0 and not load.is_cancelled:
                self._note(load)
                finished.append(load)
        return finished

    def _note(self, load: Load) -> None:
        elapsed_s = max(time.perf_counter() - load.begun_s, 1e-6)
        self.num_read += load.num_loaded
        if load.num_loaded:
            speed = load.num_loaded * self.store.slot_bytes / elapsed_s
            self._bytes_per_s += 0.3 * (speed - self._bytes_per_s)
        log.info(
            "read %d of %d KV blocks of '%s' in %.1f ms", load.num_loaded, len(load.keys), load.app, 1e3 * elapsed_s
        )

    # ---- writing ----

    def _copy_one(self, memory: BlockMemory, find: Find) -> None:
        """Copy one block of the oldest turn; hand the turn to the writer when it is complete or the queue is full."""
        turn = self._turns[0]
        if turn.dirty:
            key = turn.dirty.pop()  # the last first: they are evicted first
            block_id = find(turn.app, key)
            if block_id is None:
                # An unfinished block may have been taken over by the next turn; others may be there with more bits.
                self.num_lost += key != turn.tail and bool(self.store.missing(turn.app, [key]))
            else:
                turn.blocks[key] = memory.read_block(block_id)
                self._count_queued(self.store.block_bytes)
        if turn.dirty and self._queued_bytes < self._max_queued_bytes:
            return
        blocks, turn.blocks = turn.blocks, {}
        if not turn.dirty:
            self._turns.pop(0)
        self._submit(lambda: self._write(turn, blocks))

    def _write(self, turn: _Turn, blocks: dict[Key, bytes]) -> None:
        """In the writer's thread."""
        start = time.perf_counter()
        try:
            num_written = self.store.write(turn.app, turn.context_id, turn.keys, blocks, turn.levels, turn.bits)
            self.num_written += num_written
            if num_written:
                speed = num_written * self.store.slot_bytes / max(time.perf_counter() - start, 1e-6)
                self._write_bytes_per_s += 0.3 * (speed - self._write_bytes_per_s)
        finally:
            self._count_queued(-len(blocks) * self.store.block_bytes)
            os.eventfd_write(self._wake, 1)

    def _count_queued(self, num_bytes: int) -> None:
        with self._bytes_lock:
            self._queued_bytes += num_bytes

    def _submit(self, job: Callable[[], None]) -> None:
        if self._writer is not None:
            self._jobs.put(job)
        else:
            self._guard(job)

    def _write_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._guard(job)

    def _guard(self, job: Callable[[], None]) -> None:
        """A disk that fails costs the acceleration, not the service."""
        try:
            job()
        except HobError as error:
            self.num_write_errors += 1
            log.error("%s", error)
        except Exception:
            self.num_write_errors += 1
            log.exception("the KV store's writer made a mistake")
