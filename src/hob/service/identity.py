"""Who is at the other end of a connection, as far as the operating system knows it.

    what separates one app from another (a boundary)                  what only names it (a label)
    ------------------------------------------------                  ----------------------------
    uid               SO_PEERCRED, or the kernel's socket table       executable, systemd unit, Flatpak or Snap id,
    security label    SO_PEERSEC, where it is not ours                X-Hob-App: a process of the same uid can take
    per-app socket    whoever reaches it is that app                  any of them
    API key           whoever has it is that app

An app is '<boundary>/<label>', so no label reaches over a boundary. A program of the owner's own user may name itself;
behind any other boundary the name that it declares counts for nothing, else each name would have limits, a share of the
time and contexts of its own. A peer in another namespace (pid 0 or uid 65534) is unknown and gets the least; uid 0
grants nothing by itself. docs/security.md says what this cannot do. No HTTP here.
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from hob.errors import InvalidRequest, PermissionDenied
from hob.service.tcp_owner import End, socket_uid

OVERFLOW_UID = 65534
"""What the kernel says of a uid that has no name in our user namespace."""
_CREDENTIALS = struct.Struct("iII")
_SO_PEERPIDFD = 77
"""Linux 6.5 and newer; the socket module does not name it."""
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NOT_LABEL = re.compile(r"[^A-Za-z0-9._-]+")
_FLATPAK = re.compile(r"app-flatpak-(.+)-\d+\.scope")
_SNAP = re.compile(r"snap\.([^.]+)\..*")


@dataclass(frozen=True, slots=True)
class Caller:
    """An identified peer."""

    uid: int | None
    """None: unknown, of another namespace."""
    pid: int | None
    label: str
    """What it is called for accounting; 'tcp' over TCP, where no process is known."""
    boundary: str = ""
    """What separates it beside the uid: 'socket:NAME', 'key:NAME', '<uid>+<security label>'. Empty: the uid alone."""

    @property
    def is_owner(self) -> bool:
        """Whether this is the user the service runs for, outside of any boundary. Being uid 0 grants nothing."""
        return self.uid is not None and self.uid == os.getuid() and not self.boundary

    def app(self, declared: str | None = None) -> str:
        """'<boundary>/<label>': the key of fairness, policy and accounting. `declared` replaces the owner's label.

        Raises InvalidRequest when `declared` is not 1 to 64 letters, digits, dots, dashes and underscores.
        """
        if declared is not None and not _LABEL.fullmatch(declared):
            raise InvalidRequest(
                f"header X-Hob-App is '{declared[:80]}'. Expected 1 to 64 of: letters, digits, '.', '_', '-'.",
                param="X-Hob-App",
            )
        if self.uid is None or self.boundary:
            return f"{self.boundary or 'unknown'}/{self.label}"
        return f"{self.uid}/{declared or self.label}"

    def through_socket(self, name: str) -> Caller:
        """The same peer, having come through the socket of an app."""
        return replace(self, boundary=f"socket:{name}", label="app")

    def with_key(self, name: str) -> Caller:
        """The same peer, having shown the key of an app."""
        return replace(self, boundary=f"key:{name}", label="app")


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
    confined = _confinement(sock, proc)
    boundary = f"{uid}+{confined}" if confined else ""
    return Caller(uid, pid, _label_of(sock, pid, proc), boundary)


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
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return None if pid == 0 or uid == OVERFLOW_UID else uid


# ---- the security label ----


def _confinement(sock: Peer, proc: Path) -> str | None:
    """A name for the peer's security label where it confines the peer and is not our own. None: it does not."""
    try:
        theirs = _text(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERSEC, 4096))
    except OSError:  # no security module that labels sockets
        return None
    try:
        ours = _text((proc / "self/attr/current").read_bytes())
    except OSError:
        ours = ""
    name = _domain(theirs)
    return None if name is None or name == _domain(ours) else _NOT_LABEL.sub("_", name)[:64] or "unnamed"


def _domain(label: str) -> str | None:
    """'snap.x.y (enforce)' -> 'snap.x.y', 'u:r:t:s0' -> 't'. None where nothing is enforced."""
    if label.count(":") >= 3:
        kind = label.split(":")[2]
        return None if kind == "unconfined_t" else kind
    if label in ("", "unconfined") or label.endswith(("(complain)", "(unconfined)")):
        return None
    return label.removesuffix(" (enforce)")


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0\n").decode("utf-8", "replace")


# ---- the label ----


def _label_of(sock: Peer, pid: int, proc: Path) -> str:
    """What the process is called: sandbox id, unit or executable. 'unknown' once the process has ended.

    The kernel's handle of the peer says whether the process still lives after /proc was read: only then was it not read
    of another process that got its number.
    """
    handle = _process_handle(sock)
    try:
        label = _sandbox_or_unit(proc / str(pid) / "cgroup") or _executable(proc / str(pid) / "exe")
        if handle is not None and _has_ended(handle):
            return "unknown"
        return label
    finally:
        if handle is not None:
            os.close(handle)


def _process_handle(sock: Peer) -> int | None:
    """A pidfd of the process that connected. None: the kernel is older than that."""
    try:
        (handle,) = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))
    except (OSError, struct.error):
        return None
    return int(handle)


def _has_ended(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


def _sandbox_or_unit(path: Path) -> str | None:
    """Flatpak and Snap apps and systemd services have a control group named after them."""
    try:
        name = path.read_text().strip().rpartition("/")[2]
    except (OSError, UnicodeDecodeError):
        return None
    for kind, pattern in (("flatpak", _FLATPAK), ("snap", _SNAP)):
        if found := pattern.fullmatch(name):
            return _NOT_LABEL.sub("_", f"{kind}.{found[1]}")[:64]
    if name.endswith(".service") and not name.startswith("user@"):
        return _NOT_LABEL.sub("_", name)[:64]
    return None


def _executable(link: Path) -> str:
    try:
        name = os.readlink(link).removesuffix(" (deleted)").rsplit("/", 1)[-1]
    except OSError:  # another user's process, or gone already
        return "unknown"
    return _NOT_LABEL.sub("_", name)[:64] or "unknown"
