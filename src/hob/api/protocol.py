"""uvicorn's HTTP protocol, knowing its caller: identity is taken from the socket when the connection is made.

`scope["state"]["caller"]` is a `Caller`, or the error that every request of the connection is answered with.
`scope["state"]["writer"]` is the reply's `BodyWriter`, `scope["state"]["gone"]` is done once the client has left. What
is written in one round of the loop goes out together: fewer system calls and packets.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hob.errors import HobError, PermissionDenied
from hob.service.identity import Caller, identify_tcp, identify_unix


class HobProtocol(HttpToolsProtocol):
    """Pass the class to `uvicorn.Config(http=HobProtocol)`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Identify the peer once per connection: what it executes later does not change who connected."""
        super().connection_made(transport)
        self._joiner = _Joiner(transport, self.loop)
        self.transport = self._joiner  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            # asyncio does this only for sockets made with an explicit IPPROTO_TCP. Without it a token waits up to
            # 40 ms for the acknowledgement of the one before it (Nagle's algorithm).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._gone: asyncio.Future[None] = self.loop.create_future()
        caller = _identify(sock, self.app_state.get("socket_app"))
        self.app_state = {**self.app_state, "caller": caller, "gone": self._gone}

    def connection_lost(self, exc: Exception | None) -> None:
        """Let whoever works for the client know."""
        super().connection_lost(exc)
        if not self._gone.done():
            self._gone.set_result(None)

    def on_headers_complete(self) -> None:
        """Begin a request."""
        super().on_headers_complete()
        self.scope["state"]["writer"] = BodyWriter(self.cycle, self._joiner)


class BodyWriter:
    """Writes parts of one chunked reply at once: what `send` does with them, without a coroutine for each.

    Only while `is_free`; otherwise `send` is the way, which waits for the client or learns that it is gone.
    """

    def __init__(self, cycle: RequestResponseCycle, transport: _Joiner) -> None:
        self._cycle = cycle
        self._transport = transport

    @property
    def is_free(self) -> bool:
        """Whether the head is out, the end is not, and the client reads fast enough."""
        cycle = self._cycle
        is_open = cycle.chunked_encoding and not cycle.response_complete and not cycle.disconnected
        return bool(is_open) and not cycle.flow.write_paused

    def write(self, body: bytes) -> None:
        """Send a part, not empty."""
        self._transport.write_now(b"%x\r\n%b\r\n" % (len(body), body))


class _Joiner:
    """A transport that keeps what is written until the loop comes round.

    One system call for a head and its body, or for the last event of a stream and its end.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Write soon."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def write_now(self, data: bytes) -> None:
        """Write, after what is kept."""
        self._flush()
        self._transport.write(data)

    def close(self) -> None:
        """Close once all is written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data, self._held = b"".join(self._held), []
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _identify(sock: Any, socket_app: str | None) -> Caller | HobError:
    """socket_app: the app whose own socket this came through."""
    try:
        if socket_app is not None:
            return identify_unix(sock).through_socket(socket_app)
        if sock.family == socket.AF_UNIX:
            return identify_unix(sock)
        return identify_tcp(sock.getpeername()[:2], sock.getsockname()[:2])
    except HobError as error:
        return error
    except OSError as error:  # the peer left before it was asked for
        return PermissionDenied(f"the connection cannot be identified: {error}")
