"""Replies on the wire: streams of events, and work that ends when its client leaves. Plain ASGI per token.

data: {first chunk} ... data: [DONE]      server-sent events, as OpenAI has them
{first line} ...                          newline-delimited JSON, as Ollama has it

An error after the first byte is an event of its own and the last one.
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


@dataclass(frozen=True, slots=True)
class Framing:
    """How a stream's events look."""

    media_type: str
    done: bytes
    """After the last event."""
    error: Callable[[HobError], bytes]


def _sse_error(error: HobError) -> bytes:
    return b"data: " + msgspec.json.encode(error_object(error)) + b"\n\n"


def _line_error(error: HobError) -> bytes:
    return msgspec.json.encode({"error": error.message}) + b"\n"


SSE = Framing("text/event-stream", b"data: [DONE]\n\n", _sse_error)
NDJSON = Framing("application/x-ndjson", b"", _line_error)


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
    """Whole events from an async generator, and from its `shortcut` if there is one.

    The first event is awaited before the status line is sent, so an error until then still gets its own status.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], shortcut: Shortcut | None = None, framing: Framing = SSE
    ) -> None:
        self._events = events
        self._shortcut = shortcut
        self._framing = framing
        super().__init__(
            media_type=framing.media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
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
                last = self._framing.done
            except HobError as error:
                last = self._framing.error(error)
            except Exception as error:
                last = self._framing.error(unexpected(error))
            await send({"type": "http.response.body", "body": last, "more_body": False})
