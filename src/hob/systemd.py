"""What a service and systemd say to each other: sockets that were passed, readiness, the watchdog. And the same sockets
from a daemon to its successor.

    LISTEN_FDS, LISTEN_PID         sockets that systemd opened: descriptors 3 and up (sd_listen_fds(3))
    HOB_HANDOVER                   whose socket it is, and the descriptors of lock and sockets that a daemon had before
                                   it executed itself anew
    NOTIFY_SOCKET, WATCHDOG_USEC   where to say READY=1, and how often to say WATCHDOG=1 (sd_notify(3))

No library: the protocols are three environment variables and one datagram.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass, field

FIRST_FD = 3
HANDOVER = "HOB_HANDOVER"


@dataclass
class Inherited:
    """What was passed on."""

    unix: socket.socket | None = None
    tcp: socket.socket | None = None
    lock_fd: int | None = None
    """Of a predecessor."""
    is_own: bool = False
    """The predecessor made the Unix socket itself, so it goes when the service ends."""
    rest: list[socket.socket] = field(default_factory=list)
    """All after the first of each kind: of a predecessor, the sockets of single apps."""


def inherit(environ: MutableMapping[str, str] = os.environ, pid: int | None = None) -> Inherited:
    """Take what was passed to this process, and the variables away, so that no child takes it too."""
    handover = environ.pop(HANDOVER, "")
    words = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    found = Inherited()
    if handover:
        made_by, *numbers = handover.split(":")
        lock, *descriptors = map(int, numbers)
        found.lock_fd, found.is_own = lock, made_by == "own"
        os.set_inheritable(lock, False)
    elif words[0] == str(os.getpid() if pid is None else pid) and words[1].isdigit():
        descriptors = list(range(FIRST_FD, FIRST_FD + int(words[1])))
    else:
        return found
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
        passed = socket.socket(fileno=descriptor)
        if passed.family == socket.AF_UNIX and found.unix is None:
            found.unix = passed
        elif passed.family in (socket.AF_INET, socket.AF_INET6) and found.tcp is None:
            found.tcp = passed
        else:
            found.rest.append(passed)
    return found


def hand_over(
    lock_fd: int, sockets: list[socket.socket], is_own: bool, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Keep these open for the program that this process executes next."""
    descriptors = [lock_fd, *(each.fileno() for each in sockets)]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    environ[HANDOVER] = ":".join(["own" if is_own else "passed", *map(str, descriptors)])


def notify(*lines: str) -> None:
    """Tell systemd, if it listens. Never fails: a service that cannot tell serves all the same."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto("\n".join(lines).encode(), address)


def watchdog_s() -> float | None:
    """How often systemd wants to hear of us at least. None: it does not watch."""
    text = os.environ.get("WATCHDOG_USEC", "")
    wanted = os.environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    return int(text) / 1e6 if text.isdigit() and int(text) > 0 and wanted else None
