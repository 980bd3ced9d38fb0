"""How a call's work shares the event loop: long work aside, several requests at once, all ended when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")

SMALL_BYTES = 32 << 10
"""Bodies up to this size are tokenised on the event loop: a few milliseconds at most."""

MAX_TOGETHER = 32
"""Requests of one call in flight; the rest wait here, so that one call cannot fill the service's queue."""


async def aside(num_bytes: int, work: Callable[[], T]) -> T:
    """Run the synchronous `work` on a body of `num_bytes`: in a thread where it would hold up everyone's streams."""
    return work() if num_bytes <= SMALL_BYTES else await asyncio.to_thread(work)


async def all_of(works: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in the order of `works`. The first error ends all."""
    gate = asyncio.Semaphore(MAX_TOGETHER)

    async def one(work: Coroutine[Any, Any, T]) -> T:
        try:
            async with gate:
                return await work
        finally:
            work.close()  # of one that never began: else Python warns that it was not awaited

    tasks = [asyncio.ensure_future(one(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


def interleave(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all streams as they come. The first error ends all."""
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    items: asyncio.Queue[T | None] = asyncio.Queue()
    gate = asyncio.Semaphore(MAX_TOGETHER)

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with gate, aclosing(stream) as opened:
                async for item in opened:
                    items.put_nowait(item)
        finally:
            items.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        num_left = len(tasks)
        while num_left:
            found = await items.get()
            if found is not None:
                yield found
                continue
            num_left -= 1
            for task in tasks:
                if task.done():
                    task.result()
        await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
