"""The models of this machine: which there are, where they come from, fetching and removing them.

    <models>/NAME.gguf           a model, whole and checked
    <models>/NAME.gguf.hobpack   made from it (pack.py); removed with it
    <models>/catalog.json        what the user added (known.py)
    <models>/.NAME.part          an unfinished fetch, with .NAME.part.json and .NAME.work/; the next pull goes on
    <models>/.NAME.lock          held while NAME is fetched or removed

A GGUF file put there by hand is a model too, under the name of its file.
"""

from __future__ import annotations

import builtins
import difflib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hob.durable import sync_folder
from hob.errors import InvalidRequest, ModelFileError, ModelNotFound, StorageError, UserError
from hob.models.download import state_path
from hob.models.fetch import fetch
from hob.models.gguf import open_gguf
from hob.models.known import BUILT_IN, Entry, check_name, check_sha256, read_added, write_added
from hob.models.sources import PathSource, looks_like_source, name_for, parse_source
from hob.models.spool import Progress, put_in_place, sha256_of, storage_errors

log = logging.getLogger(__name__)

PACKED_SUFFIX = ".hobpack"


@dataclass(frozen=True)
class ModelRecord:
    """One line of `hob list`."""

    name: str
    path: str | None
    """Where the file lies. None: not fetched."""
    size_bytes: int
    """Of the file; of the file to come if it is not fetched (0: not known)."""
    installed: bool
    source: str
    """Empty for a file that was put there by hand."""
    sha256: str | None
    aliases: tuple[str, ...] = ()


class Catalog:
    """The models under one folder. Holds no state: every call looks at the disk, so several processes may use it."""

    def __init__(self, models_dir: Path) -> None:
        self._folder = Path(models_dir)

    def resolve(self, name: str) -> Path:
        """The file of a name, of an alias, of a source that was pulled, or of a path.

        Raises ModelNotFound naming the next command, and ModelFileError if the file has not the size it should.
        """
        if looks_like_source(name):
            source = parse_source(name)
            for entry in read_added(self._folder).values():
                if entry.source == source and self._is_whole(entry):
                    return self._path(entry.name)
            if isinstance(source, PathSource):
                if source.path.is_file():
                    return source.path
                raise ModelNotFound(f"there is no file {source.path}. Expected a GGUF file.", param="model")
            raise ModelNotFound(f"{source} is not on this machine. Run `hob pull {name}`.", param="model")
        if (known := self._find(name)) is not None:
            if self._is_whole(known):
                return self._path(known.name)
            raise ModelNotFound(f"model '{name}' is not on this machine yet. Run `hob pull {name}`.", param="model")
        if self._is_put_by_hand(name):
            return self._path(name)
        raise self._unknown(name)

    def pull(
        self, name: str, on_progress: Progress | None = None, *, save_as: str | None = None, sha256: str | None = None
    ) -> Path:
        """Fetch a model unless it is here, and give its file. Waits if another process is fetching it.

        `name` is a catalogue name or a source (`sources.py`), which then gets the name `save_as`, else one made of
        the file's. `sha256` is what a source's file must be; without it, the first fetch decides.
        Raises ModelNotFound, ModelFileError (not the right file: removed), ServiceError (network: run it again to go
        on), StorageError (disk full: nothing is left behind), InvalidRequest (name taken or not allowed).
        """
        report = on_progress or (lambda done, total, stage: None)
        entry = self._entry_to_pull(name, save_as, sha256)
        if entry is None:  # put there by hand: nothing to fetch it from
            return self._path(name)
        with storage_errors(self._folder, 0):
            self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked(entry.name):
            entry = self._latest(entry)
            if not self._is_whole(entry):
                self._fetch(entry, report)
        return self._path(entry.name)

    def remove(self, name: str) -> Path:
        """Delete a model's file and all that was made of it; a name the user added is forgotten too.

        Gives the path that was freed. Raises ModelNotFound if there is none.
        """
        found = self._find(name)
        if found is None and (looks_like_source(name) or not self._is_put_by_hand(name)):
            raise self._unknown(name)
        plain = found.name if found else name
        path = self._path(plain)
        if not path.exists() and not self._part(plain).exists() and plain not in read_added(self._folder):
            raise ModelNotFound(f"model '{name}' is not on this machine: nothing to remove.", param="model")
        with self._locked(plain):
            with storage_errors(self._folder, 0):
                for victim in (path, path.with_name(path.name + PACKED_SUFFIX)):
                    victim.unlink(missing_ok=True)
                self._clean(plain)
                sync_folder(self._folder)
            with self._locked("catalog.json"):
                added = read_added(self._folder)
                if added.pop(plain, None) is not None:
                    write_added(self._folder, added)
        return path

    def list(self) -> builtins.list[ModelRecord]:
        """All names: known, added, put there by hand. Raises ConfigError if catalog.json cannot be used."""
        entries = self._entries()
        records = [self._record(entry) for entry in entries.values()]
        for path in sorted(self._folder.glob("*.gguf")):
            if path.stem not in entries and self._is_put_by_hand(path.stem):
                records.append(ModelRecord(path.stem, str(path), path.stat().st_size, True, "", None))
        return records

    def _record(self, entry: Entry) -> ModelRecord:
        path = self._path(entry.name)
        is_here = path.is_file()
        size = path.stat().st_size if is_here else entry.size_bytes
        where = str(path) if is_here else None
        return ModelRecord(entry.name, where, size, is_here, str(entry.source), entry.sha256, entry.aliases)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.gguf"

    def _entries(self) -> dict[str, Entry]:
        """By name. A name of ours cannot be taken by the user's."""
        return {entry.name: entry for entry in BUILT_IN} | {
            name: entry for name, entry in read_added(self._folder).items() if name not in _taken()
        }

    def _find(self, name: str) -> Entry | None:
        """By name or alias."""
        for entry in BUILT_IN:
            if name in entry.aliases:
                return entry
        return self._entries().get(name)

    def _is_put_by_hand(self, name: str) -> bool:
        try:
            return self._path(check_name(name)).is_file()
        except InvalidRequest:
            return False

    def _is_whole(self, entry: Entry) -> bool:
        """Whether its file is there. Raises ModelFileError if it is there with a wrong size."""
        path = self._path(entry.name)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if entry.size_bytes and size != entry.size_bytes:
            raise ModelFileError(
                f"{path} has {size:,} bytes, expected {entry.size_bytes:,}: it was changed or cut short. "
                f"Run `hob rm {entry.name}` and `hob pull {entry.name}`."
            )
        return True

    def _unknown(self, name: str) -> ModelNotFound:
        entries = self._entries()
        names = [*entries, *(alias for entry in entries.values() for alias in entry.aliases)]
        close = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f" Did you mean '{close[0]}'? Run `hob pull {close[0]}`." if close else ""
        return ModelNotFound(
            f"no model '{name[:120]}'. Known: {', '.join(entries)}.{hint} "
            "Others: `hob pull hf:OWNER/REPO/FILE.gguf`, an https address or a path.",
            param="model",
        )

    def _entry_to_pull(self, name: str, save_as: str | None, sha256: str | None) -> Entry | None:
        """What to fetch. None: a file put there by hand has that name."""
        if not looks_like_source(name):
            if save_as is not None or sha256 is not None:
                raise InvalidRequest(f"'{name}' is a catalogue name: its name and SHA-256 are set.", param="model")
            if (found := self._find(name)) is not None:
                return found
            if self._is_put_by_hand(name):
                return None
            raise self._unknown(name)
        source = parse_source(name)
        entry = Entry(check_name(save_as or name_for(source)), source, sha256=check_sha256(sha256) if sha256 else None)
        return self._latest(entry)

    def _latest(self, entry: Entry) -> Entry:
        """The same entry as it was saved, if it was. Raises InvalidRequest if the name means another file."""
        saved = self._find(entry.name)
        if saved is None:
            if self._path(entry.name).exists():
                raise self._name_taken(entry, f"the file {self._path(entry.name)}")
            return entry
        if saved.source != entry.source or (entry.sha256 and entry.sha256 != saved.sha256):
            raise self._name_taken(entry, f"{saved.source} (SHA-256 {saved.sha256})")
        return saved

    def _name_taken(self, entry: Entry, by: str) -> InvalidRequest:
        return InvalidRequest(
            f"the name '{entry.name}' is taken by {by}. "
            f"Run `hob rm {entry.name}`, or give {entry.source} another name.",
            param="model",
        )

    def _fetch(self, entry: Entry, report: Progress) -> None:
        """Fetch, check and put in place. The caller holds the lock."""
        part, path = self._part(entry.name), self._path(entry.name)
        try:
            fetch(entry.source, part, self._work(entry.name), entry.fetched_bytes, report)
            entry = _check(part, entry, report)
            if entry.name not in {known.name for known in BUILT_IN}:
                with self._locked("catalog.json"):
                    write_added(self._folder, read_added(self._folder) | {entry.name: entry})
            put_in_place(part, path)
        except (StorageError, UserError):  # going on would lead nowhere
            self._clean(entry.name)
            raise
        self._clean(entry.name)
        log.info("model '%s' is at %s, SHA-256 %s", entry.name, path, entry.sha256)

    def _part(self, name: str) -> Path:
        return self._folder / f".{name}.part"

    def _work(self, name: str) -> Path:
        return self._folder / f".{name}.work"

    def _clean(self, name: str) -> None:
        """Remove what an unfinished fetch left."""
        self._part(name).unlink(missing_ok=True)
        state_path(self._part(name)).unlink(missing_ok=True)
        shutil.rmtree(self._work(name), ignore_errors=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a name's lock; wait while another process has it."""
        path = self._folder / f".{name}.lock"
        with storage_errors(path, 0):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process is at work on '%s': waiting for it", name)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _check(part: Path, entry: Entry, report: Progress) -> Entry:
    """Whether the fetched file is the right one; the entry with what is now known of it. Raises ModelFileError."""
    size = part.stat().st_size
    if entry.size_bytes and size != entry.size_bytes:
        raise ModelFileError(
            f"{entry.source} gave {size:,} bytes, expected {entry.size_bytes:,}. It was removed; run `hob pull "
            f"{entry.name}` again."
        )
    sha256 = sha256_of(part, report)
    if entry.sha256 and sha256 != entry.sha256:
        raise ModelFileError(
            f"{entry.source} gave a file with SHA-256 {sha256}, expected {entry.sha256}: not the model that was meant. "
            f"It was removed; run `hob pull {entry.name}` again, and if that does not help, do not trust the source."
        )
    open_gguf(part).close()  # a web page, or a file whose end is missing, is no model
    return replace(entry, sha256=sha256, size_bytes=size)


def _taken() -> set[str]:
    return {name for entry in BUILT_IN for name in (entry.name, *entry.aliases)}
