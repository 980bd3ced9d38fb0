"""The mailbox of a request: order between its two ways out, ends, errors, leaving early."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from hob.errors import EngineUnavailable, InvalidRequest
from hob.request import FinishReason, OutputError, Request, SequenceOutput
from hob.service.outputs import Outputs

Body = Callable[[Outputs], Awaitable[None]]


def run(body: Body, **fields: int) -> list[bool]:
    """Run `body` with the outputs of a new request. Returns what `end` was called with."""
    ends: list[bool] = []

    async def begin(outputs: Outputs) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        outputs = Outputs(
            Request("r", "app", [1], **fields), begin, lambda outputs, is_complete: ends.append(is_complete)
        )  # type: ignore[arg-type]
        await asyncio.wait_for(body(outputs), 10)

    asyncio.run(main())
    return ends


def token(token_id: int, finish: FinishReason | None = None, index: int = 0) -> SequenceOutput:
    return SequenceOutput("r", index, [token_id], finish_reason=finish)


def test_all_comes_in_order_until_each_sequence_has_ended() -> None:
    async def body(outputs: Outputs) -> None:
        for output in (token(1), token(2, index=1), token(3, FinishReason.STOP), token(4, FinishReason.LENGTH, 1)):
            outputs.put(output)
        assert [output.token_ids async for output in outputs] == [[1], [2], [3], [4]]
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)

    assert run(body, num_samples=2) == [True]


def test_a_sink_gets_what_comes_while_the_reader_waits_and_never_overtakes_it() -> None:
    seen: list[tuple[str, int]] = []
    is_free = True

    def sink(output: SequenceOutput) -> bool:
        if is_free:
            seen.append(("sink", output.token_ids[0]))
        return is_free

    async def read(outputs: Outputs) -> None:
        async for output in outputs:
            seen.append(("reader", output.token_ids[0]))
            await asyncio.sleep(0)  # at work: what comes now must wait behind this one

    async def body(outputs: Outputs) -> None:
        nonlocal is_free
        outputs.put(token(0))
        outputs.divert(sink)
        reader = asyncio.ensure_future(read(outputs))
        await asyncio.sleep(0.01)
        outputs.put(token(1))
        outputs.put(token(2))
        is_free = False
        outputs.put(token(3))
        is_free = True
        outputs.put(token(4))  # the sink is free again, but 3 is not read yet
        await asyncio.sleep(0.01)
        outputs.put(token(5))
        outputs.put(token(6, FinishReason.STOP))
        await reader

    assert run(body) == [True]
    assert [number for _, number in seen] == list(range(7))
    assert [who for who, _ in seen] == ["reader", "sink", "sink", "reader", "reader", "sink", "reader"]


def test_leaving_early_and_being_cancelled_say_that_it_is_not_complete() -> None:
    async def leave(outputs: Outputs) -> None:
        outputs.put(token(1))
        await anext(outputs)
        await outputs.aclose()
        await outputs.aclose()

    async def be_cancelled(outputs: Outputs) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(outputs), 0.01)

    async def never_begin(outputs: Outputs) -> None:
        await outputs.aclose()

    assert run(leave) == [False]
    assert run(be_cancelled) == [False]
    assert run(never_begin) == []


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (EngineUnavailable("it died"), EngineUnavailable),
        (SequenceOutput("r", error=OutputError("InvalidRequest", "no")), InvalidRequest),
        (SequenceOutput("r", finish_reason=FinishReason.CANCELLED), EngineUnavailable),
    ],
)
def test_errors_are_raised_after_what_came_before_them(
    item: SequenceOutput | Exception, expected: type[Exception]
) -> None:
    async def body(outputs: Outputs) -> None:
        outputs.divert(lambda output: True)
        outputs.put(token(1))
        outputs.put(item)
        assert (await anext(outputs)).token_ids == [1]
        with pytest.raises(expected):
            await anext(outputs)

    assert run(body) == [False]


def test_a_bug_of_the_sink_is_raised_where_the_outputs_are_read() -> None:
    def sink(output: SequenceOutput) -> bool:
        raise ZeroDivisionError

    async def body(outputs: Outputs) -> None:
        outputs.divert(sink)
        reader = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0.01)
        outputs.put(token(1))
        with pytest.raises(ZeroDivisionError):
            await reader

    assert run(body) == [False]
