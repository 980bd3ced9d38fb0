"""Which sequences hold KV blocks: who starts, grows, forks, and who is preempted to make room.

    waiting --start--> running --release--> gone
       ^                  |
       +----- preempt ----+     blocks given back; computed again later, with the same bits

Running means holding blocks, not having rows in every step: a sequence that is passed over is paused and keeps its KV.
Only memory makes it give them up. Equals do not push each other out; a more urgent class may. Within a step, sequences
that already have their rows (`planned`) are spared. One sequence of each class that has been pushed out before, or
whose class was starved, keeps its blocks to its end (`is_kept`): else it could be pushed out again and again.

A sequence that is preempted has its full blocks in the prefix cache, for as long as nobody needs them. Where there is a
disk tier and writing and reading are measured to take less than computing, they are kept there too (`take_leaves`).

Where there is a disk tier (`second`), a sequence that starts may find more of its prefix there: it then holds blocks
and waits, loading, until `loaded` says how many of them came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hob.kvcache.pool import BLOCK_SIZE, num_blocks_for
from hob.kvcache.prefix import PrefixCache
from hob.kvcache.second_level import Leave, Load, SecondLevel, TurnEnd
from hob.request import Sequence
from hob.scheduler.order import Order


@dataclass(slots=True)
class Copy:
    """Slots to be copied between blocks before the next step (a fork of an unfinished tail)."""

    source: int
    destination: int
    num_tokens: int


class Placement:
    """Waiting and running sequences, their blocks, and the copies that forks still owe."""

    def __init__(
        self,
        num_blocks: int,
        max_running: int,
        has_prefix_cache: bool,
        order: Order,
        second: SecondLevel | None = None,
        salt_of: Callable[[str], bytes] | None = None,
    ) -> None:
        self.prefixes = PrefixCache(num_blocks, has_prefix_cache, salt_of)
        self.pool = self.prefixes.pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_running = max_running
        self._order = order
        self._copies: list[Copy] = []
        self._second = second if has_prefix_cache else None
        self._loads: dict[Load, Sequence] = {}
        self._new_loads: list[Load] = []
        self._leaves: list[Leave] = []

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that the prefix cache has now."""
        max_cached = min(sequence.first_wanted_row, sequence.num_tokens - 1)
        return len(self._match(sequence, max_cached)) * BLOCK_SIZE

    def _match(self, sequence: Sequence, max_tokens: int) -> list[int]:
        request = sequence.request
        return self.prefixes.match(request.app, sequence.token_ids, sequence.block_keys, max_tokens, request.kv_variant)

    def start(self, sequence: Sequence, planned: set[int]) -> bool:
        """Move a waiting sequence to the running ones, with what the prefix cache has of it, if memory allows."""
        if sequence.leader is not None and not sequence.leader.is_finished:
            return False
        request = sequence.request
        is_first_kept = not any(s.is_kept and s.request.service_class is request.service_class for s in self.running)
        is_owed = self._order.is_starved(sequence)
        less_urgent = [s for s in self.running if self._order.may_preempt(sequence, s)]
        if is_owed and not is_first_kept:
            less_urgent = []  # it would be pushed out in its turn; the one that is kept goes on instead
        if len(self.running) >= self._max_running and not less_urgent:
            return False
        max_cached = min(sequence.first_wanted_row, sequence.num_tokens - 1)
        cached = self._match(sequence, max_cached)
        # Shared first, so that making room cannot evict what was just found.
        self.pool.share(cached)
        if not self._make_room(num_blocks_for(sequence.num_needed_tokens) - len(cached), less_urgent, planned):
            self.pool.free(cached)
            return False
        sequence.block_table = cached
        sequence.num_computed_tokens = len(cached) * BLOCK_SIZE
        if sequence.first_step_s is None:
            sequence.usage.num_cached_tokens = sequence.num_computed_tokens
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.is_kept = is_first_kept and (sequence.was_preempted or is_owed)
        if self._second is not None:
            self._start_load(sequence, self._second, max_cached)
        # All of them now: who is half way through its prompt must not find the rest taken by who came later.
        num_missing = num_blocks_for(sequence.num_needed_tokens) - len(sequence.block_table)
        sequence.block_table = sequence.block_table + self.pool.allocate(max(num_missing, 0))
        return True

    def _start_load(self, sequence: Sequence, second: SecondLevel, max_tokens: int) -> None:
        """Have what the disk knows of the sequence's prefix beyond memory read into blocks of its own.

        A context's last, unfinished block is taken over from memory or read as well: computing up to 15 rows again
        would cost more than all the rest of a short turn.
        """
        request, start = sequence.request, len(sequence.block_table)
        keys = sequence.block_keys[start : max_tokens // BLOCK_SIZE]
        keys = keys[: second.count(request.app, keys, start) if keys else 0]
        num_tail = 0
        if request.context_id is not None:
            end = (start + len(keys)) * BLOCK_SIZE
            if not keys and self._take_tail(sequence, max_tokens):
                return
            for count in range(min(max_tokens - end, BLOCK_SIZE - 1), 0, -1):
                key = self._tail_key(sequence, end, count)
                if second.has(request.app, key):
                    keys.append(key)
                    num_tail = count
                    break
        if keys:
            block_ids = self.pool.allocate(len(keys))
            sequence.block_table = sequence.block_table + block_ids
            sequence.is_loading = True
            load = Load(request.app, keys, block_ids, num_tail)
            self._loads[load] = sequence
            self._new_loads.append(load)

    def _take_tail(self, sequence: Sequence, max_tokens: int) -> bool:
        start = sequence.num_computed_tokens
        request = sequence.request
        found = self.prefixes.take_tail(
            request.app, sequence.token_ids, sequence.block_keys, start, max_tokens, request.kv_variant
        )
        if found is None:
            return False
        sequence.block_table = [*sequence.block_table, found[0]]
        sequence.num_computed_tokens += found[1]
        if sequence.first_step_s is None:
            sequence.usage.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _tail_key(self, sequence: Sequence, start: int, count: int) -> bytes:
        request = sequence.request
        return self.prefixes.tail_key(
            request.app, sequence.token_ids, sequence.block_keys, start, count, request.kv_variant
        )

    def loaded(self, load: Load) -> None:
        """A load is done: what it brought counts as computed, what it did not is computed now."""
        sequence = self._loads.pop(load)
        sequence.is_loading = False
        num_restored = load.num_loaded_tokens
        start = sequence.num_computed_tokens
        self.advance(sequence, start, start + num_restored)
        if sequence.first_step_s is None:
            sequence.usage.num_cached_tokens += num_restored
            sequence.usage.num_restored_tokens = num_restored

    def take_loads(self) -> list[Load]:
        """Loads to be begun, in order."""
        loads, self._new_loads = self._new_loads, []
        return [load for load in loads if not load.is_cancelled]

    def take_leaves(self) -> list[Leave]:
        """Blocks to be copied before the next step overwrites them."""
        leaves, self._leaves = self._leaves, []
        return leaves

    def keep_context(self, sequence: Sequence, num_tokens: int) -> None:
        """A turn of a context ends: the blocks of its first tokens go to disk ahead of time, an unfinished one too.

        Only if all these are computed, but for the last token drawn: a sequence that was preempted may lack most of
        what the disk has of the turn before.
        """
        app, context_id = sequence.request.app, sequence.request.context_id
        if self._second is None or context_id is None:
            return
        if sequence.num_computed_tokens < min(num_tokens, sequence.num_tokens - 1):
            return
        num_full, num_tail = divmod(min(num_tokens, sequence.num_computed_tokens), BLOCK_SIZE)
        keys, tail = sequence.block_keys[:num_full], None
        if num_tail:
            tail = self._tail_key(sequence, num_full * BLOCK_SIZE, num_tail)
            self.prefixes.insert(app, tail, sequence.block_table[num_full])
        self.prefixes.mark_context(sequence.block_table[: num_full + 1])
        bits = sequence.request.kv_bits
        self._second.turn_ended(TurnEnd(app, context_id, keys, tail, bits, sequence.density.means()))

    def grow(self, sequence: Sequence, num_rows: int, planned: set[int]) -> bool:
        """Hold blocks for the next `num_rows` tokens, preempting later ones or, at the last, the sequence itself."""
        missing = num_blocks_for(sequence.num_computed_tokens + num_rows) - len(sequence.block_table)
        if missing > 0:
            order = self._order(self.running)
            at = order.index(sequence)
            others = order[:at] + order[at + 1 :] if sequence.is_kept else order[at + 1 :]
            if not self._make_room(missing, [s for s in others if not s.is_kept], planned):
                self.preempt(sequence)
                return False
            sequence.block_table += self.pool.allocate(missing)
        return True

    def stretch(self, sequence: Sequence, end: int) -> int:
        """Hold blocks for tokens up to `end` if that takes nothing from anybody, cached prefixes included.

        Returns the end of what there are blocks for.
        """
        missing = num_blocks_for(end) - len(sequence.block_table)
        sequence.block_table += self.pool.allocate(min(max(missing, 0), self.pool.num_unused))
        return min(end, len(sequence.block_table) * BLOCK_SIZE)

    def trim(self, sequence: Sequence) -> None:
        """Give back blocks beyond the sequence's tokens."""
        num_blocks = num_blocks_for(sequence.num_tokens)
        self.pool.free(sequence.block_table[num_blocks:])
        del sequence.block_table[num_blocks:]

    def advance(self, sequence: Sequence, start: int, end: int) -> None:
        """Tokens [start, end) are computed: let their full blocks be found by others."""
        sequence.num_computed_tokens = end
        if sequence.is_shallow:
            return
        request = sequence.request
        self.prefixes.extend_keys(request.app, sequence.token_ids, sequence.block_keys, end, request.kv_variant)
        for i in range(start // BLOCK_SIZE, end // BLOCK_SIZE):
            self.prefixes.insert(sequence.request.app, sequence.block_keys[i], sequence.block_table[i])

    def fork(self, leader: Sequence, siblings: list[Sequence]) -> None:
        """Give siblings that wait for the leader's prompt its blocks, and a copy of the unfinished one.

        Those for whom there is no room now find the full blocks in the prefix cache later.
        """
        num_shared = leader.num_prompt_tokens - 1
        if len(siblings) == 1 or leader.num_computed_tokens < num_shared:
            return
        num_full, num_tail = divmod(num_shared, BLOCK_SIZE)
        for sibling in siblings:
            if sibling.leader is not leader or sibling.is_finished:
                continue
            if len(self.running) >= self._max_running or not self.pool.can_allocate(1):
                return
            sibling.leader = None
            sibling.block_table = leader.block_table[:num_full]
            self.pool.share(sibling.block_table)
            if num_tail:
                sibling.block_table += self.pool.allocate(1)
                self._copies.append(Copy(leader.block_table[num_full], sibling.block_table[num_full], num_tail))
            sibling.num_computed_tokens = sibling.usage.num_cached_tokens = num_shared
            self.waiting.remove(sibling)
            self.running.append(sibling)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks back; it waits, and what is lost then is read or computed again."""
        if self._second is not None and not sequence.is_loading:
            self._leave(sequence, self._second)
        self._release(sequence)
        self.running.remove(sequence)
        self.waiting.append(sequence)
        sequence.was_preempted = True
        self.num_preemptions += 1

    def _leave(self, sequence: Sequence, second: SecondLevel) -> None:
        num_full = sequence.num_computed_tokens // BLOCK_SIZE
        if num_full and second.reserve(num_full * BLOCK_SIZE):
            sequence.is_left = True
            keys, block_ids = sequence.block_keys[:num_full], sequence.block_table[:num_full]
            self._leaves.append(Leave(sequence.request.app, _holder_id(sequence), keys, block_ids))

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        if self._second is not None and sequence.is_left:
            self._second.forget(sequence.request.app, _holder_id(sequence))
        self._release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def take_copies(self) -> list[Copy]:
        """Copies that must be made before the next step, in order."""
        copies, self._copies = self._copies, []
        return copies

    def check(self) -> None:
        """Raise InternalError or AssertionError unless pool and block tables agree."""
        self.pool.check()
        held = [0] * self.pool.num_blocks
        for sequence in self.running + self.waiting:
            for block_id in sequence.block_table:
                held[block_id] += 1
        for block_id, count in enumerate(held):
            actual = self.pool.num_holders(block_id)
            assert actual == count, f"block {block_id} has {actual} holders, block tables say {count}"

    def _make_room(self, count: int, victims: list[Sequence], planned: set[int]) -> bool:
        """Preempt `victims`, the last in order first, until `count` blocks are free."""
        order = self._order([victim for victim in victims if id(victim) not in planned])
        while not self.pool.can_allocate(count):
            if not order:
                return False
            self.preempt(order.pop())
        return True

    def _release(self, sequence: Sequence) -> None:
        self._copies = [copy for copy in self._copies if copy.destination not in sequence.block_table]
        if sequence.is_loading:
            load = next(load for load, owner in self._loads.items() if owner is sequence)
            load.cancel()
            del self._loads[load]
            sequence.is_loading = False
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0


def _holder_id(sequence: Sequence) -> str:
    """The name under which the disk keeps a preempted sequence's blocks; no context's looks like it."""
    return f"preempted/{sequence.request.request_id}/{sequence.index}"
