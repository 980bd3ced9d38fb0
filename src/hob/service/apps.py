"""Apps that the owner named: those with an API key, and those with a Unix socket of their own.

    <home>/apps.json      {"keys": {NAME: {"sha256", "created"}}, "sockets": {NAME: {"created"}}}, 0600

A key is 256 random bits, shown once and kept as its hash; hashing such a key needs no slow function. Written by the
daemon only, whole, so that a reader sees the old file or the new one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from pathlib import Path

import msgspec

from hob.durable import write_whole
from hob.errors import Conflict, InvalidRequest, NotFound, StorageError

KEY_PREFIX = "hob_"
"""Bearer tokens that begin so are ours. OpenAI clients send any other where none is needed."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")


class KeyFacts(msgspec.Struct, frozen=True):
    """A key, but for the key itself."""

    sha256: str
    created: float


class SocketFacts(msgspec.Struct, frozen=True):
    """A per-app socket."""

    created: float


class AppsFile(msgspec.Struct):
    """apps.json."""

    keys: dict[str, KeyFacts] = {}
    sockets: dict[str, SocketFacts] = {}


class Apps:
    """The registry."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError if the file is there and cannot be read."""
        self._path = path
        self.file = AppsFile()
        try:
            self.file = msgspec.json.decode(path.read_bytes(), type=AppsFile)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(f"cannot read the apps in '{path}': {error}. Mend or remove the file.") from error
        self._by_hash = {facts.sha256: name for name, facts in self.file.keys.items()}

    def add_key(self, name: str) -> str:
        """A new key for a new app; only its hash is kept. Raises InvalidRequest, Conflict, StorageError."""
        self._check_new(name, self.file.keys, "key")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        facts = KeyFacts(_digest(key), time.time())
        self._save(AppsFile({**self.file.keys, name: facts}, self.file.sockets))
        return key

    def app_of_key(self, key: str) -> str | None:
        """Whose key it is."""
        return self._by_hash.get(_digest(key))

    def remove_key(self, name: str) -> None:
        """Raises NotFound, StorageError."""
        if name not in self.file.keys:
            raise NotFound(f"no app '{name}' has a key. Known: {', '.join(self.file.keys) or 'none'}.", param="name")
        self._save(AppsFile({k: v for k, v in self.file.keys.items() if k != name}, self.file.sockets))

    def add_socket(self, name: str) -> None:
        """Raises InvalidRequest, Conflict, StorageError."""
        self._check_new(name, self.file.sockets, "socket")
        self._save(AppsFile(self.file.keys, {**self.file.sockets, name: SocketFacts(time.time())}))

    def remove_socket(self, name: str) -> None:
        """Raises NotFound, StorageError."""
        if name not in self.file.sockets:
            known = ", ".join(self.file.sockets) or "none"
            raise NotFound(f"no app '{name}' has a socket. Known: {known}.", param="name")
        self._save(AppsFile(self.file.keys, {k: v for k, v in self.file.sockets.items() if k != name}))

    def _check_new(self, name: str, present: object, what: str) -> None:
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"field 'name' is '{name[:80]}'. Expected 1 to 32 of: lower-case letters, digits, '.', '_', '-', "
                "beginning with a letter or digit.",
                param="name",
            )
        assert isinstance(present, dict)
        if name in present:
            raise Conflict(f"app '{name}' has a {what} already. Remove it first: `hob app rm {name}`.", param="name")

    def _save(self, file: AppsFile) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path, msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
        except OSError as error:
            raise StorageError(f"cannot write the apps to '{self._path}': {error.strerror}") from error
        self.file = file
        self._by_hash = {facts.sha256: name for name, facts in file.keys.items()}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
