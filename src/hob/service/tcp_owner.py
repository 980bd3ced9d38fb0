"""Whose socket is at the other end of a loopback connection: the kernel's socket table, asked for one row.

    sock_diag (netlink)     one exact look-up: 18 us
    /proc/net/tcp{,6}       where the kernel or a sandbox has no sock_diag: 3.7 ms, the kernel walks its whole table

Addresses are (address, port) as the accepting side sees them: `peer` is the other end, `local` is ours.
A socket that its process has closed stays for a while with uid 0 and inode 0: that uid is nobody's, so it counts as
not found. Knows nothing of what the answer is for.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

End = tuple[str, int]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_ANY_COOKIE = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port."""
_REQUEST = struct.Struct("=BBBxI")
"""inet_diag_req_v2 up to its socket id: family, protocol, extensions, states."""
_PORTS = struct.Struct("!HH")
_SOCKET_ID_BYTES = 48
_OWNER = struct.Struct("=II")
"""uid, inode."""
_OWNER_AT = _HEADER.size + 4 + _SOCKET_ID_BYTES + 12
"""After nlmsghdr: family, state, timer, retransmits; the socket id; expires, receive queue, send queue."""


def socket_uid(peer: End, local: End) -> int | None:
    """uid of the socket whose own end is `peer` and whose other end is `local`. None: there is none."""
    try:
        return uid_by_diag(peer, local)
    except OSError:
        return uid_by_proc(peer, local)


def listener_uid(address: End) -> int | None:
    """uid of the socket that listens on an address, as a connection to it would find it. None: there is none.

    For a client that checks its server: a connection that waits to be accepted has no process behind it yet.
    """
    family = socket.AF_INET if _address(address[0]).version == 4 else socket.AF_INET6
    nobody = ("0.0.0.0", 0) if family == socket.AF_INET else ("::", 0)
    try:
        reply = _ask(family, address, nobody)
    except OSError:
        reply = None
    if reply is None:
        return next((uid for kind in ("tcp", "tcp6") if (uid := _listener_in(kind, address)) is not None), None)
    uid, inode = _OWNER.unpack_from(reply, _OWNER_AT)
    return uid if inode else None


def uid_by_diag(peer: End, local: End) -> int | None:
    """The same through sock_diag(7). Raises OSError where that is not to be had."""
    family = socket.AF_INET if _address(peer[0]).version == 4 else socket.AF_INET6
    reply = _ask(family, peer, local)
    if reply is None:
        return uid_by_proc(peer, local)  # no such socket, or a kernel without tcp_diag; the table tells which
    # Where no connection matches, the kernel answers with a listener on the peer's port: not what was asked for.
    ends = _ends(peer, local)
    if reply[_HEADER.size + 4 :][: len(ends)] != ends:
        return None
    uid, inode = _OWNER.unpack_from(reply, _OWNER_AT)
    return uid if inode else None


def _ends(own: End, other: End) -> bytes:
    addresses = (_address(end[0]).packed.ljust(16, b"\0") for end in (own, other))
    return _PORTS.pack(own[1], other[1]) + b"".join(addresses)


def _ask(family: int, own: End, other: End) -> bytes | None:
    """The kernel's row of the socket with these ends, as a whole reply. None: it has none. Raises OSError."""
    socket_id = _ends(own, other) + struct.pack("=III", 0, _ANY_COOKIE, _ANY_COOKIE)
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + socket_id
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        length = _HEADER.size + len(request)
        netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
        reply = netlink.recv(4096)
    return reply if _HEADER.unpack_from(reply)[1] == _SOCK_DIAG_BY_FAMILY else None


def uid_by_proc(peer: End, local: End, proc: Path = Path("/proc")) -> int | None:
    """The same from the text tables. Their text comes in pieces between which rows can move, so it is read twice."""
    for _ in range(2):
        for kind in ("tcp", "tcp6"):
            uid = _uid_in(proc / "net" / kind, f"{_in_table(peer, kind)} {_in_table(local, kind)} ")
            if uid is not None:
                return uid
    return None


def _uid_in(table: Path, ends: str) -> int | None:
    try:
        text = table.read_text()
    except OSError:
        return None
    at = text.find(ends)
    if at < 0:
        return None
    # after the ends: state, tx:rx queues, timer:when, retransmits, uid, timeout, inode
    fields = text[at + len(ends) :].split(maxsplit=7)
    return int(fields[4]) if fields[6] != "0" else None


def _listener_in(kind: str, address: End, proc: Path = Path("/proc")) -> int | None:
    """The same from a text table: the address itself before the wildcard."""
    try:
        rows = [line.split() for line in (proc / "net" / kind).read_text().splitlines()[1:]]
    except OSError:
        return None
    listening = {row[1]: int(row[7]) for row in rows if row[3] == "0A"}
    anywhere = ("0.0.0.0" if kind == "tcp" else "::", address[1])
    ours = _in_table(address, kind)
    return listening.get(ours, listening.get(_in_table(anywhere, kind)))


def _address(text: str) -> IPv4Address | IPv6Address:
    """An IPv4 address that an IPv6 socket sees is an IPv4 address."""
    address = ip_address(text.split("%")[0])
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _in_table(end: End, kind: str) -> str:
    """As the table writes it: 32-bit words in host byte order, a colon, the port, all in hex."""
    packed = _address(end[0]).packed
    if kind == "tcp6" and len(packed) == 4:
        packed = b"\0" * 10 + b"\xff\xff" + packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{end[1]:04X}"
