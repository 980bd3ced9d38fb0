"""Who is at the other end of a connection, as far as the operating system knows it.

    Unix socket     SO_PEERCRED: uid and pid at connect time     boundary: the uid
    loopback TCP    the uid of the peer's socket in the kernel's table; any uid but ours is refused

The uid separates; the executable's name and a self-declared name are labels for accounting, not a boundary: a process
of the same uid can take any of them. A peer in another namespace (pid 0 or uid 65534) is unknown. No HTTP here.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hob.errors import InvalidRequest, PermissionDenied
from hob.service.tcp_owner import End, socket_uid

OVERFLOW_UID = 65534
"""What the kernel says of a uid that has no name in our user namespace."""
_CREDENTIALS = struct.Struct("iII")
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NOT_LABEL = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Caller:
    """An identified peer."""

    uid: int | None
    """None: unknown, of another namespace."""
    pid: int | None
    label: str
    """Name of its executable; 'tcp' over TCP, where no process is known."""

    @property
    def is_owner(self) -> bool:
        """Whether this is the user the service runs for. Being uid 0 grants nothing by itself."""
        return self.uid is not None and self.uid == os.getuid()

    def app(self, declared: str | None = None) -> str:
        """'<uid>/<label>': the key of fairness and accounting. `declared` replaces the label.

        Raises InvalidRequest when `declared` is not 1 to 64 letters, digits, dots, dashes and underscores.
        """
        if declared is not None and not _LABEL.fullmatch(declared):
            raise InvalidRequest(
                f"header X-Hob-App is '{declared[:80]}'. Expected 1 to 64 of: letters, digits, '.', '_', '-'.",
                param="X-Hob-App",
            )
        return f"{'unknown' if self.uid is None else self.uid}/{declared or self.label}"


class Peer(Protocol):
    """The part of a socket that is needed here; asyncio's TransportSocket has it too."""

    @property
    def family(self) -> int: ...
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def identify_unix(sock: Peer, proc: Path = Path("/proc")) -> Caller:
    """The process that connected. `proc` is replaced by tests."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if pid == 0 or uid == OVERFLOW_UID:
        return Caller(None, None, "unknown")
    return Caller(uid, pid, _executable(proc / str(pid) / "exe"))


def identify_tcp(peer: End, local: End, find_uid: Callable[[End, End], int | None] = socket_uid) -> Caller:
    """The user whose socket is at the other end of a loopback connection.

    peer, local: address and port of the two ends, as we see them. Raises PermissionDenied unless the kernel's table
    has the peer's socket and its uid is ours. `find_uid` is replaced by tests.
    """
    uid = find_uid(peer, local)
    if uid is None:
        raise PermissionDenied(
            f"the other end of {peer[0]}:{peer[1]} is no socket of this machine's socket table. Use the Unix socket."
        )
    if uid != os.getuid():
        raise PermissionDenied(
            f"the service belongs to uid {os.getuid()}, the connection to uid {uid}. Start your own with `hob serve`."
        )
    return Caller(uid, None, "tcp")


def peer_uid(sock: Peer) -> int | None:
    """The uid behind a connected Unix socket, for a client that checks its server. None: unknown."""
    return identify_unix(sock).uid


def _executable(link: Path) -> str:
    try:
        name = os.readlink(link).removesuffix(" (deleted)").rsplit("/", 1)[-1]
    except OSError:  # another user's process, or gone already
        return "unknown"
    return _NOT_LABEL.sub("_", name)[:64] or "unknown"
