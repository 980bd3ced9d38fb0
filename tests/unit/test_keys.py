"""Secrets of the apps: stable, separate, wrapped by the device's key."""

from __future__ import annotations

from pathlib import Path

import pytest

from hob.errors import ConfigError, StorageError
from hob.kvcache.keys import CREDENTIAL, KeyRing


def test_secrets_last_and_differ_by_app_and_purpose(tmp_path: Path) -> None:
    ring, again = KeyRing(tmp_path, {}), KeyRing(tmp_path, {})
    assert ring.salt("a") == again.salt("a")
    assert len({ring.salt("a"), ring.salt("b"), again.salt("b")}) == 2
    sealed = ring.cipher("a", "kv").encrypt(bytes(12), b"text", None)
    assert again.cipher("a", "kv").decrypt(bytes(12), sealed, None) == b"text"
    assert ring.cipher("a", "tokens").encrypt(bytes(12), b"text", None) != sealed


def test_an_app_that_keeps_nothing_on_disk_takes_no_file(tmp_path: Path) -> None:
    """Its salt is needed by its first request, in the engine's loop, and anybody can make up names."""
    ring = KeyRing(tmp_path, {})
    assert len({ring.salt(f"app{i}") for i in range(100)}) == 100
    assert [file.name for file in tmp_path.iterdir()] == ["device.key"]


def test_files_are_for_this_user_alone_and_hold_no_app_name(tmp_path: Path) -> None:
    KeyRing(tmp_path, {}).cipher("1000/secret-app", "kv")
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert not any("secret" in file.name for file in files)


def test_copied_files_are_worth_nothing_without_the_device_key(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "one", {})
    ring.cipher("a", "kv")
    (tmp_path / "two").mkdir()
    for file in (tmp_path / "one").glob("*.key"):
        if file.name != "device.key":
            (tmp_path / "two" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(StorageError, match="was not wrapped by this device key"):
        KeyRing(tmp_path / "two", {}).cipher("a", "kv")
    assert KeyRing(tmp_path / "two", {}).salt("a") != ring.salt("a")


def test_the_systemd_credential_comes_first(tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / CREDENTIAL).write_bytes(b"k" * 32)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    ring = KeyRing(tmp_path / "keys", environ)
    ring.cipher("a", "kv")
    assert not (tmp_path / "keys" / "device.key").exists()
    assert KeyRing(tmp_path / "keys", environ).salt("a") == ring.salt("a")
    with pytest.raises(StorageError):
        KeyRing(tmp_path / "keys", {}).cipher("a", "kv")


def test_bad_device_keys_are_refused(tmp_path: Path) -> None:
    KeyRing(tmp_path, {})
    (tmp_path / "device.key").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644. Expected 0600"):
        KeyRing(tmp_path, {})
    (tmp_path / "device.key").chmod(0o600)
    (tmp_path / "device.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes. Expected at least 32"):
        KeyRing(tmp_path, {})


def test_a_damaged_app_key_is_refused_not_replaced(tmp_path: Path) -> None:
    KeyRing(tmp_path, {}).cipher("a", "kv")
    (file,) = (f for f in tmp_path.glob("*.key") if f.name != "device.key")
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(StorageError, match="app 'a'"):
        KeyRing(tmp_path, {}).cipher("a", "kv")
    assert file.read_bytes() == damaged
