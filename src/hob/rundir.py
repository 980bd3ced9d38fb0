"""Where a running daemon can be found: the socket's folder, the lock, the state file, the port.

    <folder, 0700>/hob.sock    the service's Unix socket (0600)
                  /hob.lock    flock held for as long as the daemon lives, whatever kills it
                  /hob.json    DaemonState: what `hob ps` and `hob stop` read

The lock is the truth: who holds it owns the socket's path. A socket file without a held lock is a leftover and is
removed, but only by a holder of the lock, so two daemons that start together cannot remove each other's.
It knows nothing of HTTP or of models.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import msgspec

from hob.errors import ConfigError, StorageError, UserError

BACKLOG = 128
"""Connections that may wait to be accepted."""
MAX_SOCKET_PATH_BYTES = 107
"""sun_path of Linux is 108 bytes with its terminator."""


class AlreadyRunning(UserError):
    """Another daemon holds the lock or the port."""

    code = "already_running"


class DaemonState(msgspec.Struct, frozen=True):
    """What is written down of a running daemon."""

    pid: int
    socket: str
    host: str
    port: int
    model: str
    started: float
    """Unix time."""
    version: str

    @property
    def base_url(self) -> str:
        """Where an OpenAI client finds it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"


@dataclass
class RunDir:
    """The files beside one socket path."""

    socket_path: Path

    def __post_init__(self) -> None:
        self._lock_fd: int | None = None
        self.is_own_socket = True
        """False: somebody else made the socket, and will listen on it after us."""

    @property
    def lock_path(self) -> Path:
        """hob.sock -> hob.lock"""
        return self.socket_path.with_suffix(".lock")

    @property
    def state_path(self) -> Path:
        """hob.sock -> hob.json"""
        return self.socket_path.with_suffix(".json")

    def prepare(self) -> None:
        """Make the folder, for this user alone. Raises ConfigError if it is open to others or the path is too long."""
        if len(os.fsencode(self.socket_path)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"socket path '{self.socket_path}' has {len(os.fsencode(self.socket_path))} bytes. Linux allows "
                f"{MAX_SOCKET_PATH_BYTES}. Choose a shorter one with --socket or HOB_SOCKET."
            )
        folder = self.socket_path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.stat()
        except OSError as error:
            raise StorageError(f"cannot make the folder '{folder}' for the socket: {error.strerror}") from error
        mode = stat.S_IMODE(info.st_mode)
        if info.st_uid != os.geteuid() or mode & 0o077:
            raise ConfigError(
                f"the socket's folder '{folder}' has mode {mode:04o} and owner {info.st_uid}. Expected one that only "
                f"uid {os.geteuid()} can enter: `chmod 700 {folder}`, or another --socket."
            )

    @property
    def lock_fd(self) -> int:
        """The held lock, for a successor."""
        assert self._lock_fd is not None, "the lock is not held"
        return self._lock_fd

    def adopt(self, lock_fd: int | None, is_own_socket: bool) -> None:
        """Become the daemon of this path with a socket that was passed, and with the predecessor's lock if it was too.

        Raises AlreadyRunning.
        """
        self.is_own_socket = is_own_socket
        if lock_fd is None:
            self.lock()
        else:
            self._lock_fd = lock_fd

    def lock(self) -> None:
        """Become the daemon of this path, or raise AlreadyRunning naming the one that is. Removes a leftover socket."""
        descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _try_lock(descriptor):
            pid = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise already_running(self.socket_path, pid)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = descriptor
        if self.is_own_socket:
            self.socket_path.unlink(missing_ok=True)
        self.state_path.unlink(missing_ok=True)

    def bind(self) -> socket.socket:
        """The Unix socket, mode 0600, listening: who connects early waits. Call with the lock held."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.socket_path))
            self.socket_path.chmod(0o600)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise StorageError(f"cannot make the socket '{self.socket_path}': {error.strerror}") from error
        return listener

    def write_state(self, state: DaemonState) -> None:
        """Write hob.json whole: a reader sees the old one or the new one."""
        partial = self.state_path.with_suffix(".json.tmp")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
        partial.chmod(0o600)
        partial.rename(self.state_path)

    def read_state(self) -> DaemonState | None:
        """State of the daemon that holds the lock. None if none runs, or it has not come so far."""
        if self.holder() is None:
            return None
        try:
            return msgspec.json.decode(self.state_path.read_bytes(), type=DaemonState)
        except (OSError, msgspec.DecodeError):
            return None

    def holder(self) -> int | None:
        """Process id of the daemon that holds the lock, None if nobody does."""
        try:
            descriptor = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(descriptor, 32).decode("ascii", "replace").strip()
            return int(text) if text.isdigit() else None
        else:
            return None
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Remove what was made and give the lock up. The lock file itself stays: removing it would race."""
        if self._lock_fd is None:
            return
        for path in (self.socket_path, self.state_path) if self.is_own_socket else (self.state_path,):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        os.ftruncate(self._lock_fd, 0)
        os.close(self._lock_fd)
        self._lock_fd = None


def already_running(socket_path: Path, pid: int | str) -> AlreadyRunning:
    """The error that names the daemon of a path."""
    return AlreadyRunning(
        f"a daemon is already running on '{socket_path}' (pid {pid}). Use `hob stop`, or another --socket."
    )


def _try_lock(descriptor: int) -> bool:
    """Take the lock. Tries for half a second, because `holder` takes it for an instant to look."""
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def bind_tcp(host: str, port: int) -> socket.socket:
    """A loopback TCP socket, listening: who connects early waits. Raises AlreadyRunning naming port and owner."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # Linux lets two sockets bind one port with SO_REUSEADDR; only listening settles it
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyRunning(f"cannot start on {host}:{port}: {_held_by(port)}") from None
        raise ConfigError(f"cannot start on {host}:{port}: {error.strerror}. Choose another --port.") from error
    return listener


def check_loopback(listener: socket.socket) -> None:
    """Raises ConfigError for a socket, made here or passed, that others than this machine could reach."""
    host = listener.getsockname()[0]
    if not ip_address(host.split("%")[0]).is_loopback:
        raise ConfigError(
            f"a socket on '{host}' would be open to other machines. Expected 127.0.0.1 or ::1: there is no encryption "
            "and no password between machines. Use ssh -L, or mend the ListenStream of hob.socket."
        )


@dataclass(frozen=True)
class PortOwner:
    """The process that listens on a TCP port, as far as /proc tells us."""

    pid: int
    socket_path: Path | None
    """Of the daemon that it is. None: it is another program."""

    def __str__(self) -> str:
        """'pid 4121 (hob serve)'"""
        return f"pid {self.pid} ({command_of(self.pid)})"


def _held_by(port: int) -> str:
    """Who has a port, and what to do: for the end of an error."""
    owner = owner_of_port(port)
    if owner is None or owner.socket_path is None:
        return (
            f"the port is in use by {owner or 'another program'}. End that program, or set HOB_PORT=0 for a free port."
        )
    return (
        f"the port is held by another daemon, {owner}, on '{owner.socket_path}'. Use that one with "
        f"HOB_SOCKET={owner.socket_path}, end it with `HOB_SOCKET={owner.socket_path} hob stop`, or set HOB_PORT=0 for "
        "a free port."
    )


def owner_of_port(port: int) -> PortOwner | None:
    """None if nobody listens there, or one whom we cannot look into."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and int(columns[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue  # another user's, or gone
        if links & inodes:
            return PortOwner(int(process.name), _daemon_of(int(process.name), links))
    return None


def _daemon_of(pid: int, links: set[str]) -> Path | None:
    """The Unix socket of the daemon that a process is: of those that it listens on, the one whose lock it holds."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            columns = line.split(maxsplit=7)
            if len(columns) == 8 and f"socket:[{columns[6]}]" in links and RunDir(Path(columns[7])).holder() == pid:
                return Path(columns[7])
    return None


def command_of(pid: int) -> str:
    """A process's command line, short; the interpreter's part of ours left out."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1]
    except OSError:
        return "unknown"
    if "hob" in words[:4] and "-m" in words:
        words = words[words.index("hob") :]
    text = " ".join(words)
    return text if len(text) <= 60 else text[:57] + "..."
