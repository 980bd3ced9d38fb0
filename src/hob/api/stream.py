"""Replies on the wire: server-sent events, and work that ends when its client leaves. Plain ASGI per token.

data: {first chunk} ... data: [DONE]      an error after the first byte is an event of its own and the last one
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hob.api.protocol import BodyWriter
from hob.api.replies import error_object, unexpected
from hob.errors import HobError
from hob.request import SequenceOutput
from hob.service.outputs import Outputs

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` unless the client leaves first: then cancel it, wait for its cleaning up, and raise ClientGone.

    The body must have been read: the next message of `receive` is the disconnect.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(watch)
        await _cancel(task)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A way past the generator of events, for outputs that come while it waits for them."""

    outputs: Outputs
    """What the generator reads."""
    event_of: Callable[[SequenceOutput], bytes]
    """What the generator would make of an output. Empty: nothing."""

    def take(self, writer: BodyWriter) -> None:
        """From now on, write events where the outputs arrive: no task switch and no generator for each token."""
        event_of = self.event_of

        def write(output: SequenceOutput) -> bool:
            if not writer.is_free:
                return False
            if event := event_of(output):
                writer.write(event)
            return True

        self.outputs.divert(write)


class EventStream(Response):
    """Server-sent events from an async generator of whole events, and from its `shortcut` if there is one.

    The first event is awaited before the status line is sent, so an error until then still gets its own status.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], shortcut: Shortcut | None = None) -> None:
        self._events = events
        self._shortcut = shortcut
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop when the client leaves."""
        await until_gone(receive, self._send(send, scope["state"]["writer"]))

    async def _send(self, send: Send, writer: BodyWriter) -> None:
        async with contextlib.aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            if self._shortcut is not None:
                self._shortcut.take(writer)
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                last = DONE
            except HobError as error:
                last = _error_event(error)
            except Exception as error:
                last = _error_event(unexpected(error))
            await send({"type": "http.response.body", "body": last, "more_body": False})


def _error_event(error: HobError) -> bytes:
    return b"data: " + msgspec.json.encode(error_object(error)) + b"\n\n"
