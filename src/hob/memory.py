"""A daemon's processes as /proc shows them: which there are, and what they take.

PSS counts a page shared by n processes as 1/n in each of them.

Two sources: `smaps_rollup` for the sum, the parent links in /proc/PID/stat for who belongs to whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessMemory:
    """One process."""

    pid: int
    role: str
    """'engine', 'api', or the name of the program."""
    pss_bytes: int


def processes_below(pid: int) -> list[ProcessMemory]:
    """A process and all its descendants, those that are still there."""
    found = []
    for each in [pid, *_descendants(pid)]:
        pss = pss_bytes(each)
        if pss is not None:
            found.append(ProcessMemory(each, _role(each, is_root=each == pid), pss))
    return found


def pss_bytes(pid: int) -> int | None:
    """Proportional set size. None: the process is gone, or not ours to look at."""
    return rollup_bytes(pid, "Pss")


def rollup_bytes(pid: int, entry: str) -> int | None:
    """An entry of smaps_rollup. None: the process is gone, or not ours to look at."""
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended. One that nobody has waited for yet (a zombie) has ended."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            # the name, in parentheses, may hold spaces and parentheses itself
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(after_name[1]), []).append(int(folder.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return sorted(found)


def _role(pid: int, is_root: bool) -> str:
    try:
        command = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return "gone"
    if b"hob.service.loop" in command:
        return "engine"
    return "api" if is_root else "helper"
