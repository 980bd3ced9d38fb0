"""Prefix cache: full blocks found again by the tokens that lead up to them.

A block's key is a digest chained over its owner's salt and all tokens up to its end:

    key(0) = H(adapter, salt, tokens[0:16])      key(i) = H(key(i - 1), tokens[16 i : 16 i + 16])

KV depends on the LoRA adapter that computed it, so the adapter's name with its digest is in the key (empty: none), and
so are the bits that it may have come back from disk with (`Request.kv_variant`): others never see such a block.

The salt is random, one per app, and never leaves the service, so one app can neither find nor time another's prompts.
128-bit BLAKE2b: a collision among 2^40 blocks has probability 2^-49. Only blocks whose KV is computed are entered.

Prompts that the owner of the device publishes (system prompts, tool lists) are the exception: their blocks have keys
without a salt, `H(nothing, tokens)`, and serve every app. At the first block that is not public the chain goes on with
the app's salt, so what follows is its own again. A prompt that is public no more is not looked for any more; who is on
its way with such keys goes on with them, and what it adds is salted all the same.

Each block carries a label, owner and key, set when its content became known and taken off when it is lent anew. A match
counts only if the label agrees with what the index says; if it ever does not, the block is computed again and
`num_alarms` is raised.
"""

from __future__ import annotations

import logging
import secrets
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from hob.kvcache.pool import BLOCK_SIZE, BlockPool

log = logging.getLogger("hob.kvcache")

Key = bytes
PUBLIC = ""
"""Owner of blocks that all apps may use."""


@dataclass(frozen=True, slots=True)
class Label:
    """Whose a block is and what it holds."""

    owner: str
    key: Key


class PrefixCache:
    """Which block holds which prefix. Owns the block pool's memory of contents; lends blocks through it."""

    def __init__(self, num_blocks: int, is_enabled: bool = True, salt_of: Callable[[str], bytes] | None = None) -> None:
        """`salt_of` gives an app's salt; without it they are random and die with the process."""
        self.pool = BlockPool(num_blocks, on_evict=self._forget)
        self.is_enabled = is_enabled
        self.is_checking = True
        """Off: labels are not looked at. A test hook, to show that leaks would be seen."""
        self.num_alarms = 0
        self._key_to_block: dict[Key, int] = {}
        self._labels: dict[int, Label] = {}
        self._salts: dict[str, bytes] = {}
        self._salt_of = salt_of or (lambda app: secrets.token_bytes(16))
        self._public: set[Key] = set()
        self._once_public: set[Key] = set()
        """Since the start: their blocks, and sequences that hold their keys, may still be there."""
        self._of_contexts: set[int] = set()

    def publish(self, prompts: Iterable[Sequence[int]]) -> None:
        """From now on share the full blocks of these prompts among all apps, and of no others."""
        self._public = set()
        for token_ids in prompts:
            key = b""
            for i in range(len(token_ids) // BLOCK_SIZE):
                key = _chain(key, token_ids, i)
                self._public.add(key)
        self._once_public |= self._public

    def extend_keys(self, app: str, token_ids: list[int], keys: list[Key], num_tokens: int, adapter: str = "") -> None:
        """Append to `keys` those of all full blocks among the first `num_tokens` tokens."""
        if app not in self._salts:
            self._salts[app] = self._salt_of(app)
        for i in range(len(keys), num_tokens // BLOCK_SIZE):
            before = keys[-1] if keys else adapter.encode()
            key = _chain(before, token_ids, i)
            if key not in self._public:
                is_first_own = not keys or before in self._once_public
                key = _chain(before + self._salts[app] if is_first_own else before, token_ids, i)
            keys.append(key)

    def tail_key(
        self, app: str, token_ids: Sequence[int], keys: Sequence[Key], start: int, count: int, adapter: str = ""
    ) -> Key:
        """Key of an unfinished block: the `count` tokens from `start` on, a multiple of 16, behind the full blocks."""
        before = keys[start // BLOCK_SIZE - 1] if start else adapter.encode()
        if not start or before in self._once_public:
            before += self._salts[app]
        return _digest(before, token_ids[start : start + count])

    def take_tail(
        self, app: str, token_ids: Sequence[int], keys: Sequence[Key], start: int, max_tokens: int, adapter: str = ""
    ) -> tuple[int, int] | None:
        """The longest known unfinished block at `start` that nobody holds, and its tokens: held now, to be written on.

        It cannot be found any more: two sequences would write on in it.
        """
        for count in range(min(max_tokens - start, BLOCK_SIZE - 1), 0, -1):
            block_id = self.find(app, self.tail_key(app, token_ids, keys, start, count, adapter))
            if block_id is not None and self.pool.num_holders(block_id) == 0:
                self.pool.share([block_id])
                self.pool.disown(block_id)
                self._forget(block_id)
                return block_id, count
        return None

    def owner(self, app: str, key: Key) -> str:
        """Whose a block with this key is when `app` computes or uses it."""
        return PUBLIC if key in self._once_public else app

    def match(self, app: str, token_ids: list[int], keys: list[Key], max_tokens: int, adapter: str = "") -> list[int]:
        """Blocks that hold the longest known prefix of at most `max_tokens` tokens, not yet shared.

        Share them (`pool.share`) before anything else is allocated. `keys` is filled on the way.
        """
        if not self.is_enabled:
            return []
        self.extend_keys(app, token_ids, keys, max_tokens, adapter)
        blocks = []
        for key in keys[: max_tokens // BLOCK_SIZE]:
            block_id = self.find(app, key)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def find(self, app: str, key: Key) -> int | None:
        """The block that holds a key now, its label checked."""
        block_id = self._key_to_block.get(key)
        if block_id is None or not self.is_checking:
            return block_id
        wanted, found = Label(self.owner(app, key), key), self._labels.get(block_id)
        if found == wanted:
            return block_id
        self.num_alarms += 1
        log.error("block %d is labelled %s, the index says %s: it is computed again", block_id, found, wanted)
        del self._key_to_block[key]
        return None

    def mark_context(self, block_ids: Sequence[int]) -> None:
        """These blocks are of a persistent context: under pressure they go after those that are only cache."""
        self._of_contexts.update(block_id for block_id in block_ids if block_id in self._labels)

    def is_of_context(self, block_id: int) -> bool:
        """Whether a block is of a persistent context."""
        return block_id in self._of_contexts

    def insert(self, app: str, key: Key, block_id: int) -> None:
        """A held block is full and computed: let it be found. The first block of a key stays the one."""
        if not self.is_enabled or key in self._key_to_block or block_id in self._labels:
            return
        self._key_to_block[key] = block_id
        self._labels[block_id] = Label(self.owner(app, key), key)
        self.pool.keep(block_id)

    def _forget(self, block_id: int) -> None:
        label = self._labels.pop(block_id)
        self._of_contexts.discard(block_id)
        if self._key_to_block.get(label.key) == block_id:
            del self._key_to_block[label.key]


def _chain(before: bytes, token_ids: Sequence[int], i: int) -> Key:
    return _digest(before, token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])


def _digest(before: bytes, token_ids: Sequence[int]) -> Key:
    return blake2b(before + array("i", token_ids).tobytes(), digest_size=16).digest()
