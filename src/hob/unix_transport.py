"""HTTP over a Unix socket whose server is known: connects, asks the kernel who listens, and only then sends.

A thin layer under httpx; knows nothing of what is asked.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

from hob.errors import PermissionDenied
from hob.service.identity import peer_uid


class UnixTransport(httpx.HTTPTransport):
    """httpx's transport over a pool whose connections are checked."""

    def __init__(self, path: str) -> None:
        super().__init__(uds=path)
        assert hasattr(self, "_pool"), "httpx.HTTPTransport has no _pool: the server's uid would go unchecked"
        self._pool = httpcore.ConnectionPool(uds=path, network_backend=_CheckedBackend())


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to Unix sockets that are served by our own uid or root."""

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        """Raises PermissionDenied before anything is sent, if somebody else listens there."""
        stream = _Stream(socket.socket(socket.AF_UNIX))
        try:
            with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError):
                stream.socket.settimeout(timeout)
                stream.socket.connect(path)
            uid = peer_uid(stream.socket)
            if uid not in (0, os.getuid()):
                raise PermissionDenied(
                    f"the socket {path} is served by uid {uid if uid is not None else 'unknown'}, expected "
                    f"{os.getuid()} or root. Nothing was sent. Remove the socket, or name another with HOB_SOCKET."
                )
        except BaseException:
            stream.close()
            raise
        return stream


class _Stream(httpcore.NetworkStream):
    """A connected socket as httpcore uses it."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError):
            self.socket.settimeout(timeout)
            return self.socket.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _mapped(httpcore.WriteTimeout, httpcore.WriteError):
            self.socket.settimeout(timeout)
            self.socket.sendall(buffer)

    def close(self) -> None:
        self.socket.close()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # the pool asks before it reuses an idle connection: readable means closed
            return _is_readable(self.socket)
        return self.socket if info == "socket" else None


def _is_readable(connected: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))


@contextmanager
def _mapped(timeout: type[Exception], error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except TimeoutError as caught:
        raise timeout(caught) from caught
    except OSError as caught:
        raise error(caught) from caught
