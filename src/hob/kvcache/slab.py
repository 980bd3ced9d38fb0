"""A file of equal slots: where KV blocks lie on disk. Knows bytes and offsets, nothing of keys, apps or encryption.

Slots are whole pages, so that a run of neighbours is one big O_DIRECT read past the page cache: the bytes go once over
the bus, and resuming a context does not push the owner's files out of memory. Freed slots are punched out of the file,
so the disk has them back at once.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

log = logging.getLogger("hob.store")

PAGE = 4096
_PUNCH_KEEP_SIZE = 0x02 | 0x01
_libc = ctypes.CDLL(None, use_errno=True)
_buffers = threading.local()
"""One for each thread that reads, whatever number of files it reads: each app has its own."""

Write = Callable[[int, "Sequence[bytes | memoryview]", int], int]
"""os.pwritev; tests put one in that fails."""


def slot_bytes_for(num_bytes: int) -> int:
    """Bytes of a slot: whole pages. 368,640 stay 368,640; 128 take 4,096."""
    return -(-num_bytes // PAGE) * PAGE


class SlotMap:
    """Which slots are free. Hands out neighbours where it can."""

    def __init__(self, used: Iterable[int]) -> None:
        self._free: list[tuple[int, int]] = []  # (first, one past the last), ascending, never touching
        self.end = 0
        for slot in sorted(used):
            if slot > self.end:
                self._free.append((self.end, slot))
            self.end = slot + 1

    @property
    def num_used(self) -> int:
        """How many are taken."""
        return self.end - sum(last - first for first, last in self._free)

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Free stretches below the end."""
        return list(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` slots, ascending: the tightest stretch that holds them all, else new ones at the end."""
        fitting = [hole for hole in self._free if hole[1] - hole[0] >= count]
        if fitting:
            hole = min(fitting, key=lambda h: h[1] - h[0])
            i = self._free.index(hole)
            rest = (hole[0] + count, hole[1])
            self._free[i : i + 1] = [rest] if rest[0] < rest[1] else []
            return list(range(hole[0], rest[0]))
        first, self.end = self.end, self.end + count
        return list(range(first, self.end))

    def free(self, slots: Iterable[int]) -> None:
        """Take slots back; neighbours become one stretch, and one at the end shortens the file."""
        for slot in sorted(slots):
            i = bisect.bisect(self._free, (slot, slot))
            first, last = slot, slot + 1
            if i < len(self._free) and self._free[i][0] == last:
                last = self._free.pop(i)[1]
            if i and self._free[i - 1][1] == first:
                i -= 1
                first = self._free.pop(i)[0]
            self._free.insert(i, (first, last))
        if self._free and self._free[-1][1] == self.end:
            self.end = self._free.pop()[0]


def runs(places: Sequence[tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Cut a list of (file, slot) into (index of the first, count) of consecutive ones, none longer than `longest`."""
    found: list[tuple[int, int]] = []
    for i, (file, slot) in enumerate(places):
        if found and found[-1][1] < longest and places[i - 1] == (file, slot - 1):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((i, 1))
    return found


class Slab:
    """One file of slots. Reads may run in several threads at once; writes come from one."""

    def __init__(self, path: Path, slot_bytes: int, write: Write = os.pwritev) -> None:
        """Opens or makes the file. Raises OSError."""
        self.path = path
        self.slot_bytes = slot_bytes
        self._write = write
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._read_fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            log.warning("'%s': this file system has no O_DIRECT; reads go through the page cache", path)
            self._read_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, first: int, count: int) -> memoryview:
        """Bytes of neighbouring slots, valid until this thread reads again; short at the file's end. Raises OSError."""
        wanted = count * self.slot_bytes
        buffer: mmap.mmap | None = getattr(_buffers, "buffer", None)
        if buffer is None or len(buffer) < wanted:
            buffer = _buffers.buffer = mmap.mmap(-1, wanted)  # anonymous maps are page-aligned, as O_DIRECT wants
        view = memoryview(buffer)[:wanted]
        done = 0
        while done < wanted:
            got = os.preadv(self._read_fd, [view[done:]], first * self.slot_bytes + done)
            if got == 0:
                break
            done += got
        return view[:done]

    def write(self, first: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write neighbouring slots, one part each, padded. Not durable before `sync`. Raises OSError."""
        padded: list[bytes | memoryview] = []
        for part in parts:
            padded.append(part)
            if missing := self.slot_bytes - len(part):
                padded.append(bytes(missing))
        offset = first * self.slot_bytes
        while padded:
            written = self._write(self._fd, padded[:512], offset)  # IOV_MAX is 1,024
            offset += written
            while padded and written >= len(padded[0]):
                written -= len(padded.pop(0))
            if written:
                padded[0] = memoryview(padded[0])[written:]

    def sync(self) -> None:
        """Make what was written durable and let the page cache forget it. Raises OSError."""
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def punch(self, stretches: Iterable[tuple[int, int]], end: int) -> None:
        """Give the bytes of free stretches, and all from slot `end` on, back to the file system. Raises OSError."""
        if os.fstat(self._fd).st_size > end * self.slot_bytes:
            os.ftruncate(self._fd, end * self.slot_bytes)
        for first, last in stretches:
            offset, length = first * self.slot_bytes, (last - first) * self.slot_bytes
            if _libc.fallocate(self._fd, _PUNCH_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)):
                number = ctypes.get_errno()
                if number != errno.EOPNOTSUPP:
                    raise OSError(number, os.strerror(number), str(self.path))
                log.warning("'%s': this file system cannot punch holes; freed bytes are only reused", self.path)
                return

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
        os.close(self._read_fd)
