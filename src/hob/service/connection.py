"""The API process's end of the socket to one engine process: frames in, frames out, no task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hob.messages import FromEngine, ToEngine, decode_from_engine, encode_frame
from hob.service.frames import FrameSplitter


class EngineConnection(asyncio.Protocol):
    """Gives each message to `deliver` within the callback that read it."""

    transport: asyncio.Transport

    def __init__(self, deliver: Callable[[FromEngine], None]) -> None:
        self._deliver = deliver
        self._splitter = FrameSplitter()
        self._is_lost = asyncio.Event()

    def send(self, message: ToEngine) -> None:
        """Send one message; it waits in memory while the engine is in a step."""
        self.transport.write(encode_frame(message))

    async def closed(self) -> None:
        """Wait until the engine process has closed its end, by dying or otherwise."""
        await self._is_lost.wait()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        for body in self._splitter.feed(data):
            self._deliver(decode_from_engine(body))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._is_lost.set()
