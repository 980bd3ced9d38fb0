"""HTTP to a server that is known: connects, asks the kernel whose the other end is, and only then sends.

    Unix socket     the credentials of who listens there        loopback TCP     the owner of the connection's other end

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
from hob.service.tcp_owner import listener_uid, socket_uid


class LoopbackTransport(httpx.HTTPTransport):
    """The same over loopback TCP."""

    def __init__(self) -> None:
        super().__init__()
        assert hasattr(self, "_pool"), "httpx.HTTPTransport has no _pool: the server's uid would go unchecked"
        self._pool = httpcore.ConnectionPool(network_backend=_CheckedBackend())


class UnixTransport(httpx.HTTPTransport):
    """httpx's transport over a pool whose connections are checked."""

    def __init__(self, path: str) -> None:
        super().__init__(uds=path)
        assert hasattr(self, "_pool"), "httpx.HTTPTransport has no _pool: the server's uid would go unchecked"
        self._pool = httpcore.ConnectionPool(uds=path, network_backend=_CheckedBackend())


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to sockets that are served by our own uid or root."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Raises PermissionDenied before anything is sent, if somebody else listens there."""
        with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError):
            stream = _Stream(socket.create_connection((host, port), timeout))
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            server, ours = stream.socket.getpeername()[:2], stream.socket.getsockname()[:2]
            uid = socket_uid(server, ours)
            _check_server(listener_uid(server) if uid is None else uid, f"{host}:{port}", "name another address")
        except BaseException:
            stream.close()
            raise
        return stream

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        """Raises PermissionDenied before anything is sent, if somebody else listens there."""
        stream = _Stream(socket.socket(socket.AF_UNIX))
        try:
            with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError):
                stream.socket.settimeout(timeout)
                stream.socket.connect(path)
            _check_server(
                peer_uid(stream.socket), f"the socket {path}", "remove the socket, or name another with HOB_SOCKET"
            )
        except BaseException:
            stream.close()
            raise
        return stream


def _check_server(uid: int | None, where: str, then: str) -> None:
    if uid not in (0, os.getuid()):
        raise PermissionDenied(
            f"{where} is served by uid {uid if uid is not None else 'unknown'}, expected {os.getuid()} or root. "
            f"Nothing was sent. To go on, {then}."
        )


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
