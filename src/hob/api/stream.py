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
from hob.request import Place, SequenceOutput
from hob.service.outputs import Outputs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Framing:
    """How a stream's events look."""

    media_type: bytes
    done: bytes
    """After the last event."""
    error: Callable[[HobError], bytes]


def _sse_error(error: HobError) -> bytes:
    return b"data: " + msgspec.json.encode(error_object(error)) + b"\n\n"


def _line_error(error: HobError) -> bytes:
    return msgspec.json.encode({"error": error.message}) + b"\n"


SSE = Framing(b"text/event-stream; charset=utf-8", b"data: [DONE]\n\n", _sse_error)
NDJSON = Framing(b"application/x-ndjson", b"", _line_error)


_HEADERS = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


async def until_gone(gone: asyncio.Future[None], work: Coroutine[Any, Any, T]) -> T:
    """Run `work` unless the client leaves first: then cancel it, wait for its cleaning up, and raise ClientGone.

    No task is made: it is cancelled as `asyncio.timeout` does it.
    """
    task = asyncio.current_task()
    assert task is not None
    if gone.done():
        work.close()
        raise ClientGone
    is_gone = False

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal is_gone
        is_gone = True
        task.cancel()

    gone.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if is_gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        gone.remove_done_callback(leave)


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

    The first event is awaited before the status line is sent, so an error until then still gets its own status. Only
    where `outputs` say that the request has to wait, its place is sent at once, as a comment that clients pass over:

        : waiting, 3 ahead, first token in about 1.2 s
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        shortcut: Shortcut | None = None,
        framing: Framing = SSE,
        outputs: Outputs | None = None,
    ) -> None:
        self._events = events
        self._shortcut = shortcut
        self._framing = framing
        self._outputs = outputs
        self.status_code = 200
        self.raw_headers = [(b"content-type", framing.media_type), *_HEADERS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop when the client leaves."""
        await until_gone(scope["state"]["gone"], self._send(send, scope["state"]["writer"]))

    async def _send(self, send: Send, writer: BodyWriter) -> None:
        async with contextlib.aclosing(self._events) as events:
            try:
                await self._send_events(events, send, writer)
            finally:
                if self._outputs is not None:
                    self._outputs.close()  # they may have begun before the first event was asked for

    async def _send_events(self, events: AsyncGenerator[bytes, None], send: Send, writer: BodyWriter) -> None:
        async def part(body: bytes, is_last: bool = False) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})

        place = None if self._outputs is None else await self._outputs.opening()
        opening = await anext(events) if place is None else _comment(place)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await part(opening)
        try:
            if place is not None:
                await part(await anext(events))
            if self._shortcut is not None:
                self._shortcut.take(writer)
            async for event in events:
                await part(event)
            last = self._framing.done
        except HobError as error:
            last = self._framing.error(error)
        except Exception as error:
            last = self._framing.error(unexpected(error))
        await part(last, is_last=True)


def _comment(place: Place) -> bytes:
    return b": waiting, %d ahead, first token in about %.1f s\n\n" % (place.num_ahead, place.first_token_s)
