"""What the system says of its memory: pressure stall information and control group limits.

    /proc/pressure/memory              how long tasks waited for memory; a trigger on it wakes the loop (poll, POLLPRI)
    cgroup v2: memory.max, .high, .current, .stat      v1: memory.limit_in_bytes, .usage_in_bytes, .stat
                                       of our own group and of all above it

Page cache that nobody writes to (inactive_file) does not count as used: the kernel takes it back by itself. All paths
are under `root`, which tests replace. It reads and judges; what is done about it is `room.relieve`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("hob.engine")

TRIGGER = b"some 150000 2000000"
"""Tasks waited 150 ms of 2 s. Windows of whole 2 s are open to every user."""
SOME_AVG10, HIGH_AVG10 = 5.0, 20.0
"""Per cent of the last ten seconds in which tasks waited for memory."""
SOME_SHARE, HIGH_SHARE = 0.90, 0.97
"""Share of a control group's limit in use."""
UNLIMITED = 1 << 60
"""cgroup v1 writes a number near 2^63 for no limit."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the system."""

    level: str
    """'none', 'some' or 'high'."""
    why: str = ""


class PressureMonitor:
    """One process's view. `read` takes 0.1 ms."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._psi = root / "proc/pressure/memory"
        self._groups = own_groups(root)
        self._trigger_fd: int | None = None

    @property
    def has_limit(self) -> bool:
        """Whether a control group bounds us: its use must be looked at, no trigger tells of it."""
        return any(group.limit() is not None for group in self._groups)

    def arm(self) -> int | None:
        """Set the trigger; give the file to poll for POLLPRI. None: this system has none."""
        try:
            self._trigger_fd = os.open(self._psi, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            os.write(self._trigger_fd, TRIGGER)
        except OSError as error:
            log.info("no memory pressure trigger (%s); pressure is looked at every few seconds", error.strerror)
            self.close()
        return self._trigger_fd

    def close(self) -> None:
        """Remove the trigger."""
        if self._trigger_fd is not None:
            os.close(self._trigger_fd)
        self._trigger_fd = None

    def read(self) -> Reading:
        """The worst of all signs."""
        signs = [self._stall(), *(_usage(group) for group in self._groups)]
        return max(signs, key=lambda reading: ("none", "some", "high").index(reading.level))

    def _stall(self) -> Reading:
        try:
            some = self._psi.read_text().splitlines()[0]
            avg10 = float(dict(part.split("=") for part in some.split()[1:])["avg10"])
        except (OSError, ValueError, KeyError, IndexError):
            return Reading("none")
        return _judged(avg10, SOME_AVG10, HIGH_AVG10, f"tasks waited for memory {avg10:.0f} % of the last 10 s")


@dataclass(frozen=True, slots=True)
class Group:
    """A control group with the names of its files."""

    path: Path
    limits: tuple[str, ...]
    usage: str

    def limit(self) -> int | None:
        """The least of its limits in bytes. None: it has none."""
        found = [value for name in self.limits if (value := _number(self.path / name)) is not None]
        return min((value for value in found if value < UNLIMITED), default=None)

    def used(self) -> int | None:
        """Bytes in use, without page cache that can go."""
        usage = _number(self.path / self.usage)
        return None if usage is None else max(usage - _inactive_file(self.path / "memory.stat"), 0)


def own_groups(root: Path) -> list[Group]:
    """Our control groups of memory, and those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[Group] = []
    limits: tuple[str, ...]
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        if controllers:
            top, limits, usage = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"
        else:
            top, limits, usage = root / "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current"
        folder = top / inside.lstrip("/")
        for path in (folder, *folder.parents):
            if (path / usage).exists():
                groups.append(Group(path, limits, usage))
            if path == top:
                break
    return groups


def memory_bytes(root: Path = Path("/")) -> int:
    """What this process may ever have: the machine's memory, or a control group's limit if that is less."""
    limits = [limit for group in own_groups(root) if (limit := group.limit()) is not None]
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    return min(limits)


def _usage(group: Group) -> Reading:
    limit, used = group.limit(), group.used()
    if not limit or used is None:
        return Reading("none")
    return _judged(used / limit, SOME_SHARE, HIGH_SHARE, f"{used:,} of the {limit:,} bytes of '{group.path}' are used")


def _judged(value: float, some: float, high: float, why: str) -> Reading:
    if value < some:
        return Reading("none")
    return Reading("high" if value >= high else "some", why)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # 'max', or gone
        return None


def _inactive_file(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
