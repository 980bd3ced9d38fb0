"""Sockets of single apps: each is a folder to be mounted into a sandbox, and whoever reaches it is that app.

    <socket's folder>/apps (0700)/NAME (0755)/hob.sock (0666)

On the host only the owner can enter `apps`; inside a sandbox the mounted folder is open to whatever uid runs there.
The folder is mounted rather than the socket, so that a daemon that starts again is found through the same mount.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from hob.errors import StorageError

log = logging.getLogger("hob.api")

MAX_SOCKET_PATH_BYTES = 107


class AppSockets:
    """Those that listen. `make_protocol` gives a connection's protocol for an app's name. On the event loop.

    passed: sockets of a predecessor that was executed anew; they are used on, so that nobody is refused meanwhile.
    """

    def __init__(
        self, folder: Path, make_protocol: Callable[[str], asyncio.Protocol], passed: Iterable[socket.socket] = ()
    ) -> None:
        self._folder = folder
        self._make_protocol = make_protocol
        self._passed = {str(each.getsockname()): each for each in passed}
        self._listeners: dict[str, socket.socket] = {}
        self._servers: dict[str, asyncio.Server] = {}

    @property
    def listeners(self) -> list[socket.socket]:
        """To be passed to a successor: open until the process ends, whatever happens to the servers."""
        return list(self._listeners.values())

    def path_of(self, name: str) -> Path:
        """Where an app's socket is, or would be."""
        return self._folder / name / "hob.sock"

    async def open(self, name: str) -> Path:
        """Listen. Raises StorageError."""
        path = self.path_of(name)
        listener = self._passed.pop(str(path), None) or self._made(path)
        self._listeners[name] = listener.dup()
        loop = asyncio.get_running_loop()
        self._servers[name] = await loop.create_server(lambda: self._make_protocol(name), sock=listener)
        return path

    def _made(self, path: Path) -> socket.socket:
        """A new socket, its folder made too."""
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise StorageError(f"socket path '{path}' is longer than the {MAX_SOCKET_PATH_BYTES} bytes Linux allows")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(exist_ok=True)
            path.parent.chmod(0o755)
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(0o666)
        except OSError as error:
            listener.close()
            raise StorageError(f"cannot make the socket '{path}': {error.strerror}") from error
        return listener

    async def open_all(self, names: Iterable[str]) -> None:
        """Listen for each; one that cannot is told in the log."""
        for name in names:
            try:
                await self.open(name)
            except StorageError as error:
                log.error("app '%s' cannot be reached: %s", name, error)

    def close(self, name: str) -> None:
        """Stop listening and remove the folder."""
        if (server := self._servers.pop(name, None)) is not None:
            server.close()
            self._listeners.pop(name).close()
        with contextlib.suppress(OSError):
            self.path_of(name).unlink(missing_ok=True)
            self.path_of(name).parent.rmdir()

    def close_all(self) -> None:
        """Accept no more. Folders and sockets stay: a sandbox may have them mounted, a successor may take them over."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()
