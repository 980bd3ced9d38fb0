"""The engine process over its socket: streams, cancels, refusals, deaths. Real processes, the fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hob.config import EngineConfig, SchedulerConfig
from hob.errors import EngineUnavailable, HobError, InvalidRequest, ModelFileError
from hob.kvcache.contexts import ContextStore, Facts
from hob.kvcache.keys import KeyRing
from hob.request import FinishReason, Request, SamplingParams
from hob.service.disk import DiskSpec
from hob.service.handle import EngineHandle
from hob.service.loop import EngineSpec


def spec(step_s: float = 0.0, **scheduler: int) -> EngineSpec:
    return EngineSpec("fake", "", EngineConfig(), SchedulerConfig(**scheduler), kv_tokens=4096, fake_step_s=step_s)


def with_engine(engine_spec: EngineSpec, body: Callable[[EngineHandle], Awaitable[None]]) -> None:
    async def main() -> None:
        handle = EngineHandle(engine_spec)
        try:
            await handle.start()
            await asyncio.wait_for(body(handle), 30)
        finally:
            await handle.stop()
        assert handle.pid is None

    asyncio.run(main())


def request(request_id: str, max_tokens: int = 5, prompt: int = 20, **fields: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(request_id, "app", list(range(prompt)), sampling=sampling, **fields)  # type: ignore[arg-type]


async def tokens_of(handle: EngineHandle, asked: Request) -> list[int]:
    tokens: list[int] = []
    async for output in handle.submit(asked):
        tokens += output.token_ids
    return tokens


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"waited 10 s for {what}"
        await asyncio.sleep(0.01)


def test_requests_run_side_by_side() -> None:
    async def body(handle: EngineHandle) -> None:
        assert handle.model.context_length == 4096
        one = await tokens_of(handle, request("one"))
        many = await asyncio.gather(*(tokens_of(handle, request(f"r{i}")) for i in range(8)))
        assert len(one) == 5
        assert many == [one] * 8

    with_engine(spec(), body)


def test_the_last_output_carries_the_receipt() -> None:
    async def body(handle: EngineHandle) -> None:
        last = [output async for output in handle.submit(request("r"))][-1]
        assert last.finish_reason is FinishReason.LENGTH
        assert last.usage is not None
        assert last.usage.num_output_tokens == 5

    with_engine(spec(), body)


def test_leaving_early_frees_the_blocks() -> None:
    async def body(handle: EngineHandle) -> None:
        stream = handle.submit(request("r", max_tokens=2000))
        await anext(stream)
        await until(lambda: handle.stats.num_running == 1, "the request to run")
        await stream.aclose()
        await until(lambda: handle.stats.num_running == 0, "the request to go")
        assert handle.stats.num_free_blocks == handle.stats.num_blocks

    with_engine(spec(step_s=0.002), body)


def test_a_refusal_comes_back_as_its_exception() -> None:
    async def body(handle: EngineHandle) -> None:
        with pytest.raises(InvalidRequest, match="prompt has 20 tokens and max_tokens is 5,000"):
            await tokens_of(handle, request("long", max_tokens=5000))
        assert len(await tokens_of(handle, request("short"))) == 5

    with_engine(spec(), body)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dying_engine_ends_its_requests_and_is_replaced(signal_number: int) -> None:
    async def body(handle: EngineHandle) -> None:
        before = await tokens_of(handle, request("before"))
        stream = handle.submit(request("during", max_tokens=4000))
        await anext(stream)
        pid = handle.pid
        assert pid is not None
        os.kill(pid, signal_number)
        with pytest.raises(EngineUnavailable, match=f"pid {pid}.*signal {int(signal_number)}") as caught:
            async for _ in stream:
                pass
        assert caught.value.retry_after_s
        assert await tokens_of(handle, request("after")) == before
        assert handle.pid != pid
        assert handle.num_restarts == 1

    with_engine(spec(step_s=0.002), body)


def test_a_context_deleted_while_an_engine_starts_is_gone_from_its_disk(tmp_path: Path) -> None:
    """The engine may have read the histories before: here they still name the context."""
    kept = ContextStore(tmp_path / "contexts", KeyRing(tmp_path / "keys", {}), 10)
    contexts = [kept.create("app", "fake", Facts()).context_id for _ in range(2)]
    engine_spec = spec()
    engine_spec.disk = DiskSpec(str(tmp_path / "contexts"), str(tmp_path / "keys"), 1 << 30)

    async def body(handle: EngineHandle) -> None:
        for i, context_id in enumerate(contexts):
            await tokens_of(handle, request(f"r{i}", prompt=100 + i, context_id=context_id))
        while len(await handle.context_kv("app", contexts)) < 2:
            await asyncio.sleep(0.01)
        pid = handle.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: handle._ready is None and handle._connection is not None, "an engine that starts")
        handle.drop_context("app", contexts[0])
        await tokens_of(handle, request("after"))
        while len(left := await handle.context_kv("app", contexts)) == 2:
            await asyncio.sleep(0.01)
        assert list(left) == contexts[1:]

    with_engine(engine_spec, body)
    kept.close()


def test_an_engine_that_cannot_start_says_why_and_is_not_retried() -> None:
    async def main() -> HobError:
        broken = spec()
        broken.packed_path = "/nonexistent/model.hobpack"
        handle = EngineHandle(broken)
        try:
            with pytest.raises(HobError) as caught:
                await handle.start()
            with pytest.raises(HobError):
                await tokens_of(handle, request("r"))
            return caught.value
        finally:
            await handle.stop()

    error = asyncio.run(main())
    assert isinstance(error, ModelFileError), error
    assert "/nonexistent/model.hobpack" in error.message


@pytest.mark.parametrize("fault", ["it says that it cannot", "no process can be started"])
def test_once_an_engine_has_served_a_new_one_is_tried_until_it_can(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(handle: EngineHandle) -> None:
        before, pid = await tokens_of(handle, request("before")), handle.pid
        assert pid is not None
        with monkeypatch.context() as broken:
            if fault == "no process can be started":
                broken.setattr("hob.service.handle.RESTART_DELAYS_S", (0.0, 0.1))
                broken.setattr("sys.executable", "/nonexistent/python")
            else:
                broken.setattr(handle.spec, "packed_path", "/nonexistent/model.hobpack")
            os.kill(pid, signal.SIGKILL)
            await until(lambda: handle._failure is not None, "the new process to fail")
            with pytest.raises(HobError, match="/nonexistent/model|no engine process can be started"):
                await tokens_of(handle, request("during"))
            with pytest.raises(InvalidRequest, match="Expected at least"):
                await handle.set_budget(1)
            await handle.set_budget(handle.spec.budget_bytes + 1)
        await until(lambda: handle._failure is None, "one that can")
        assert await tokens_of(handle, request("after")) == before

    with_engine(spec(), body)


def test_the_engine_exits_when_the_api_process_vanishes() -> None:
    async def body(handle: EngineHandle) -> None:
        process = handle._process
        assert process is not None
        assert handle._connection is not None
        handle._connection.transport.abort()  # what the kernel does to the sockets of a killed process
        await until(lambda: process.poll() is not None, "the engine to exit")
        assert process.returncode == 0

    with_engine(spec(), body)
