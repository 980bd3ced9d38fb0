"""The unfinished file of a fetch: bytes are appended to it, checked, and it is renamed when it is right.

It outlives a cut connection and a killed process, so that the next try goes on from there; a full disk removes it, so
that it does not stay full. Writing is by the operating system's calls alone: what they refuse becomes StorageError
with the bytes needed and free. This module knows nothing of sources.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from hob.durable import sync_folder
from hob.errors import StorageError

CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in total (0: unknown) and the stage: 'download', 'extract', 'copy' or 'check'."""


class Spool:
    """One unfinished file, open for appending. A context manager."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it. Raises StorageError if the folder cannot be written."""
        self.path = path
        with storage_errors(path, 0):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o644)
        self.size = os.fstat(self._descriptor).st_size
        """Bytes that are there."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._descriptor)

    def restart(self) -> None:
        """Drop what is there."""
        with storage_errors(self.path, 0):
            os.ftruncate(self._descriptor, 0)
        self.size = 0

    def write(self, data: bytes, total_bytes: int) -> None:
        """Append. Raises StorageError and removes the file if the disk is full. `total_bytes` is for the message."""
        with storage_errors(self.path, total_bytes):
            view = memoryview(data)
            while view:
                written = os.write(self._descriptor, view)
                self.size += written
                view = view[written:]

    def sync(self) -> None:
        """Wait until the bytes are on the disk. Raises StorageError and removes the file if they cannot be."""
        with storage_errors(self.path, self.size):
            os.fsync(self._descriptor)


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises StorageError if the disk has less than that free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"{what} needs {needed_bytes:,} bytes of disk, {folder} has {free:,} free. "
            "Make room there, or set HOB_HOME to a folder on a larger disk."
        )


@contextmanager
def storage_errors(path: Path, total_bytes: int) -> Iterator[None]:
    """OSErrors inside become StorageError with numbers; `path` is removed if the disk is full."""
    try:
        yield
    except OSError as error:
        done = path.stat().st_size if path.exists() else 0
        if error.errno in _FULL:
            path.unlink(missing_ok=True)
        folder = path.parent
        free = (
            f"{shutil.disk_usage(folder).free:,} bytes are free there" if folder.exists() else "there is no such folder"
        )
        needs = f" It has {done:,} of {total_bytes:,} bytes" if total_bytes else f" It has {done:,} bytes"
        raise StorageError(
            f"cannot write {path}: {error.strerror}.{needs}; {free}. "
            "Make room, or set HOB_HOME to a folder that can be written and has room."
        ) from error


def sha256_of(path: Path, on_progress: Progress) -> str:
    """SHA-256 of a file, hexadecimal, with progress. Raises StorageError if it cannot be read."""
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with storage_errors(path, total), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_progress(done, total, "check")
    return digest.hexdigest()


def put_in_place(part: Path, destination: Path) -> None:
    """Rename, durably: after a power cut there is the whole file or none. Raises StorageError."""
    with storage_errors(part, 0):
        part.replace(destination)
        sync_folder(destination.parent)
