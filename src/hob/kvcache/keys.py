"""Secrets of the apps: one random key each, wrapped by the device's key. All else is derived from them.

    device key --wraps--> app secret (random, 32 bytes) --derives--> key of the KV blocks, key of the tokens
               --derives--> cache salt of each app, which takes no file

What it protects: files that are copied away (a backup, a stolen disk) without the device key. What it does not: a
process of the same uid can read the device key as we do. See docs/contexts.md.

The device key is the systemd credential `hob-device-key` where there is one ($CREDENTIALS_DIRECTORY), else a 0600 file
made on first use. Several processes may use a folder at once: files appear whole (link(2)) and never change.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hob.durable import sync_folder
from hob.errors import ConfigError, StorageError

CREDENTIAL = "hob-device-key"
NONCE_BYTES = 12
TAG_BYTES = 16
SECRET_BYTES = 32


class KeyRing:
    """The secrets of all apps that have one, in a folder. Thread-safe."""

    def __init__(self, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        """Raises ConfigError if the device key is too short or open to others, StorageError if it cannot be made."""
        self._folder = folder
        self._secrets: dict[str, bytes] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._device_key = _device_key(folder, environ)
            self._device = AESGCM(self._device_key)
        except OSError as error:
            raise StorageError(f"cannot keep keys in '{folder}': {error.strerror}") from error

    def salt(self, app: str) -> bytes:
        """16 bytes that make the app's prefix-cache keys its own, the same after a restart."""
        return blake2b(app.encode(), key=self._device_key, digest_size=16, person=b"hob-app-salt").digest()

    def cipher(self, app: str, purpose: str) -> AESGCM:
        """AES-256-GCM under a key of this app and purpose ('kv', 'tokens')."""
        return AESGCM(self._derive(app, purpose.encode()))

    def _derive(self, app: str, purpose: bytes) -> bytes:
        return blake2b(purpose, key=self._secret(app), digest_size=32, person=b"hob-app-key").digest()

    def _secret(self, app: str) -> bytes:
        """Read or make the app's secret. Raises StorageError, also when another device key wrapped it."""
        with self._lock:
            if app not in self._secrets:
                path = self._folder / f"{blake2b(app.encode(), digest_size=16).hexdigest()}.key"
                try:
                    if not path.exists():
                        nonce = secrets.token_bytes(NONCE_BYTES)
                        fresh = secrets.token_bytes(SECRET_BYTES)
                        _create(path, nonce + self._device.encrypt(nonce, fresh, app.encode()))
                    wrapped = path.read_bytes()
                except OSError as error:
                    raise StorageError(f"cannot read or make the key file '{path}': {error.strerror}") from error
                self._secrets[app] = self._unwrap(app, path, wrapped)
            return self._secrets[app]

    def _unwrap(self, app: str, path: Path, wrapped: bytes) -> bytes:
        try:
            return self._device.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], app.encode())
        except (InvalidTag, ValueError):
            raise StorageError(
                f"the key of app '{app}' ('{path}') was not wrapped by this device key, or is damaged. Expected the "
                f"credential '{CREDENTIAL}' it was made with. Removing the file gives its contexts up."
            ) from None


def _device_key(folder: Path, environ: Mapping[str, str]) -> bytes:
    """32 bytes, from the credential or from the file."""
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    source = Path(credentials) / CREDENTIAL if credentials else None
    if source is None or not source.exists():
        source = folder / "device.key"
        if not source.exists():
            _create(source, secrets.token_bytes(SECRET_BYTES))
        mode = stat.S_IMODE(source.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(f"the device key '{source}' has mode {mode:04o}. Expected 0600: `chmod 600 {source}`.")
    raw = source.read_bytes()
    if len(raw) < SECRET_BYTES:
        raise ConfigError(f"the device key '{source}' has {len(raw)} bytes. Expected at least {SECRET_BYTES}.")
    return blake2b(raw, digest_size=32, person=b"hob-device-key").digest()


def _create(path: Path, data: bytes) -> None:
    """Make a file whole or not at all, durable, 0600. If another process was first, its file stays."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink()
    sync_folder(path.parent)
