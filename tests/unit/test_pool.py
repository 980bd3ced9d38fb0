"""Block pool and prefix cache against a naive model of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hob.errors import InternalError
from hob.kvcache.pool import BLOCK_SIZE, BlockPool, num_blocks_for
from hob.kvcache.prefix import PUBLIC, PrefixCache


def test_num_blocks_for() -> None:
    assert [num_blocks_for(n) for n in (0, 1, 16, 17, 33)] == [0, 1, 1, 2, 3]


def test_allocate_free_share() -> None:
    pool = BlockPool(3)
    a, b = pool.allocate(2)
    pool.share([a])
    pool.free([a, b])
    assert pool.num_free == 2
    pool.free([a])
    assert pool.num_free == 3
    pool.check()


def test_misuse_is_an_error() -> None:
    pool = BlockPool(2)
    with pytest.raises(InternalError, match="3 blocks asked for, 2 of 2"):
        pool.allocate(3)
    with pytest.raises(InternalError, match="has no holder"):
        pool.free([0])
    with pytest.raises(InternalError, match="is free and cannot be shared"):
        pool.share([0])


def test_check_cries_when_a_block_is_lost() -> None:
    pool = BlockPool(3)
    pool._free.pop()
    with pytest.raises(InternalError, match=r"free\(2\) \+ held\(0\) \+ cached\(0\) \+ bare\(0\) = 2, expected 3"):
        pool.check()


def test_least_recently_used_prefix_is_evicted_first_tail_before_head() -> None:
    cache = PrefixCache(3)
    tokens = list(range(48))
    keys: list[bytes] = []
    cache.extend_keys("app", tokens, keys, 48)
    blocks = cache.pool.allocate(3)
    for key, block in zip(keys, blocks, strict=True):
        cache.insert("app", key, block)
    cache.pool.free(blocks)
    assert cache.match("app", tokens, list(keys), 48) == blocks
    cache.pool.allocate(1)
    assert cache.match("app", tokens, list(keys), 48) == blocks[:2]


class PrefixMachine(RuleBasedStateMachine):
    """Sequences come, extend, and go; the naive model is a dict of what each block was said to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(8)
        self.live: list[tuple[str, list[int], list[bytes], list[int]]] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(app=st.sampled_from("ab"), head=st.integers(0, 2), tail=st.integers(0, 3), num_blocks=st.integers(1, 4))
    def start(self, app: str, head: int, tail: int, num_blocks: int) -> None:
        tokens = [head] * BLOCK_SIZE + [tail] * BLOCK_SIZE * (num_blocks - 1)
        keys: list[bytes] = []
        found = self.cache.match(app, tokens, keys, len(tokens))
        for i, block in enumerate(found):
            assert self.content[block] == (app, tuple(tokens[: (i + 1) * BLOCK_SIZE]))
        self.cache.pool.share(found)
        missing = num_blocks - len(found)
        if not self.cache.pool.can_allocate(missing):
            self.cache.pool.free(found)
            return
        blocks = found + self.cache.pool.allocate(missing)
        for i in range(len(found), num_blocks):
            self.content[blocks[i]] = (app, tuple(tokens[: (i + 1) * BLOCK_SIZE]))
            self.cache.insert(app, keys[i], blocks[i])
        self.live.append((app, tokens, keys, blocks))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def end(self, which: int) -> None:
        _, _, _, blocks = self.live.pop(which % len(self.live))
        self.cache.pool.free(blocks)

    @invariant()
    def whole(self) -> None:
        self.cache.pool.check()
        for app, tokens, _, blocks in self.live:
            for i, block in enumerate(blocks):
                assert self.content[block] == (app, tuple(tokens[: (i + 1) * BLOCK_SIZE]))


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_adapters_have_different_keys_and_no_public_ones() -> None:
    """KV that an adapter computed is of no use to another, nor is a published prompt's of the base."""
    cache, tokens = PrefixCache(4), list(range(40))
    cache.publish([tokens])
    keys: dict[str, list[bytes]] = {adapter: [] for adapter in ("", "poems@1", "poems@2")}
    for adapter, found in keys.items():
        cache.extend_keys("a", tokens, found, 40, adapter)
        found.append(cache.tail_key("a", tokens, found, 32, 8, adapter))
        found.append(cache.tail_key("a", tokens, [], 0, 8, adapter))
    assert len({key for found in keys.values() for key in found}) == 12
    assert [cache.owner("a", key) for key in keys[""]] == [PUBLIC, PUBLIC, "a", "a"]
    assert [cache.owner("a", key) for key in keys["poems@1"]] == ["a"] * 4


@given(st.lists(st.integers(0, 999), min_size=16, max_size=64))
@settings(max_examples=50, deadline=None)
def test_apps_have_different_keys(tokens: list[int]) -> None:
    cache = PrefixCache(4)
    a: list[bytes] = []
    b: list[bytes] = []
    cache.extend_keys("a", tokens, a, len(tokens))
    cache.extend_keys("b", tokens, b, len(tokens))
    assert len(a) == len(tokens) // BLOCK_SIZE
    assert not set(a) & set(b)
