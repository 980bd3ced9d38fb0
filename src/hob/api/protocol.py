"""uvicorn's HTTP protocol, knowing its caller: identity is taken from the socket when the connection is made.

`scope["state"]["caller"]` is a `Caller`, or the error that every request of the connection is answered with.
`scope["state"]["writer"]` is the reply's `BodyWriter`. The protocol also sends a reply's head together with the first
part of its body: one system call and one packet less.
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
        self.transport = _HeadJoiner(transport, self.loop)  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            # asyncio does this only for sockets made with an explicit IPPROTO_TCP. Without it a token waits up to
            # 40 ms for the acknowledgement of the one before it (Nagle's algorithm).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app_state = {**self.app_state, "caller": _identify(sock, self.app_state.get("socket_app"))}

    def on_headers_complete(self) -> None:
        """Begin a request."""
        super().on_headers_complete()
        self.scope["state"]["writer"] = BodyWriter(self.cycle)


class BodyWriter:
    """Writes parts of one chunked reply at once: what `send` does with them, without a coroutine for each.

    Only while `is_free`; otherwise `send` is the way, which waits for the client or learns that it is gone.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_free(self) -> bool:
        """Whether the head is out, the end is not, and the client reads fast enough."""
        cycle = self._cycle
        is_open = cycle.chunked_encoding and not cycle.response_complete and not cycle.disconnected
        return bool(is_open) and not cycle.flow.write_paused

    def write(self, body: bytes) -> None:
        """Send a part, not empty."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class _HeadJoiner:
    """A transport that keeps the head of a reply until the next write, or until the loop comes round."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""

    def write(self, data: bytes) -> None:
        """Write, or keep if it is a head."""
        if self._held:
            data, self._held = self._held + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._held = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        """Close once all is written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
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
