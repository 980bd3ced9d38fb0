"""Write a large file so that it is there whole or not at all: lock, reserve, write, rename.

The unfinished file lies in the same folder under the name `<destination>.part`. Its lock makes a second writer wait;
a part left by a killed process is taken over. Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hob.durable import sync_folder
from hob.errors import StorageError


@contextmanager
def locked_part(destination: Path) -> Iterator[tuple[Path, int]]:
    """The unfinished file, open and ours alone; removed at the end unless it was renamed."""
    part = destination.with_name(destination.name + ".part")
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same_file(part, descriptor):
            break
        os.close(descriptor)  # its last owner renamed or removed it while we waited
    try:
        yield part, descriptor
    finally:
        if _is_same_file(part, descriptor):
            part.unlink()
        os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def reserve(part: Path, descriptor: int, total_bytes: int) -> None:
    """Take the disk space now: then writing cannot run out of it half-way."""
    os.ftruncate(descriptor, 0)
    free = shutil.disk_usage(part.parent).free
    if free < total_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(descriptor, 0, total_bytes)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at a place in the file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def finish(part: Path, descriptor: int, destination: Path) -> None:
    """Put the whole file in its place, durably."""
    os.fsync(descriptor)
    part.replace(destination)
    sync_folder(destination.parent)


@contextmanager
def storage_errors(destination: Path, total_bytes: int) -> Iterator[None]:
    """OSErrors inside become StorageError with the bytes needed and free."""
    try:
        yield
    except OSError as error:
        folder = destination.parent
        free = shutil.disk_usage(folder).free
        raise StorageError(
            f"cannot write {destination}: {error.strerror}. It needs {total_bytes:,} bytes; {folder} has {free:,} "
            "free. Make room, or move the model to a folder that can be written."
        ) from error
