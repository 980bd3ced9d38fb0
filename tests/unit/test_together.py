"""Several requests of one call at once: order, limits, and that the first error ends all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

import pytest

from hob.api.together import MAX_TOGETHER, SMALL_BYTES, all_of, aside, interleave


def test_only_large_work_leaves_the_event_loops_thread() -> None:
    async def where(num_bytes: int) -> threading.Thread:
        return await aside(num_bytes, threading.current_thread)

    assert asyncio.run(where(SMALL_BYTES)) is threading.main_thread()
    assert asyncio.run(where(SMALL_BYTES + 1)) is not threading.main_thread()


def test_all_of_keeps_order_and_limit() -> None:
    running, most = 0, 0

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (number % 3))
        running -= 1
        return number

    assert asyncio.run(all_of([work(i) for i in range(100)])) == list(range(100))
    assert most == MAX_TOGETHER


def test_all_of_ends_all_at_the_first_error() -> None:
    ended = []

    async def work(number: int) -> None:
        try:
            await asyncio.sleep(0 if number == 1 else 10)
            raise ValueError("first")
        finally:
            ended.append(number)

    with pytest.raises(ValueError, match="first"):
        asyncio.run(all_of([work(i) for i in range(3)]))
    assert sorted(ended) == [0, 1, 2]


async def count(name: str, to: int, ended: list[str]) -> AsyncGenerator[str, None]:
    try:
        for i in range(to):
            await asyncio.sleep(0)
            yield f"{name}{i}"
        if name == "x":
            raise ValueError("x failed")
    finally:
        ended.append(name)


def test_interleave_gives_every_item() -> None:
    async def collect() -> list[str]:
        return [item async for item in interleave([count("a", 3, ended), count("b", 2, ended), count("c", 0, ended)])]

    ended: list[str] = []
    found = asyncio.run(collect())
    assert sorted(found) == ["a0", "a1", "a2", "b0", "b1"]
    assert [item for item in found if item[0] == "a"] == ["a0", "a1", "a2"]
    assert sorted(ended) == ["a", "b", "c"]


@pytest.mark.parametrize("names", [["a", "x", "b"], ["x"]])
def test_interleave_ends_all_at_the_first_error(names: list[str]) -> None:
    async def collect() -> None:
        async for _ in interleave([count(name, 1 if name == "x" else 10**9, ended) for name in names]):
            pass

    ended: list[str] = []
    with pytest.raises(ValueError, match="x failed"):
        asyncio.run(collect())
    assert sorted(ended) == sorted(names)
