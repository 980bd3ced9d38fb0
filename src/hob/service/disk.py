"""The disk tier of an engine process: opens keys, store and swap, and brings the store up to date with the histories.

A disk that cannot be used costs the service its fast resume, not its life: it goes on without, loudly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec

from hob import __version__
from hob.engine.base import Engine
from hob.errors import HobError
from hob.kvcache.compression import Codec
from hob.kvcache.contexts import live_contexts
from hob.kvcache.keys import KeyRing
from hob.kvcache.store import BlockStore, last_use, remove_store
from hob.kvcache.swap import MAX_QUEUED_BYTES, Swap

log = logging.getLogger("hob.engine")

STALE_S = 30 * 86400.0
"""Blocks of a model (or version) that was not loaded for so long, while others were, are removed."""


class DiskSpec(msgspec.Struct):
    """Where and how much."""

    contexts_dir: str
    keys_dir: str
    max_bytes: int


@dataclass(slots=True)
class Disk:
    """An open disk tier."""

    swap: Swap
    salt_of: Callable[[str], bytes]


def open_disk(
    spec: DiskSpec, engine: Engine, packed_path: str, max_queued_bytes: int = MAX_QUEUED_BYTES
) -> Disk | None:
    """The disk tier for this engine; None, logged, if it cannot be had or is switched off."""
    if spec.max_bytes == 0:
        log.info("context_disk_bytes is 0: contexts are computed again when they are resumed")
        return None
    folder = Path(spec.contexts_dir)
    try:
        keys = KeyRing(Path(spec.keys_dir))
        fingerprint = fingerprint_of(engine, packed_path)
        _remove_stale(folder, fingerprint)
        where = folder / f"kv-{fingerprint}"
        store = BlockStore(where, fingerprint, engine.block_bytes, keys, spec.max_bytes, codec=Codec(engine.kv_shape))
        try:
            store.reconcile(live_contexts(folder))
        except BaseException:
            store.close()
            raise
    except (HobError, OSError) as error:
        log.error("no disk tier: %s. Contexts stay, their KV will be computed again.", error)
        return None
    return Disk(Swap(store, max_queued_bytes=max_queued_bytes), keys.salt)


def fingerprint_of(engine: Engine, packed_path: str) -> str:
    """Names what must be equal for KV to have the same bits: weights, KV format, arithmetic.

    Arithmetic: rows are bit-equal within one instruction set and one version of the kernels only.
    """
    info = engine.info
    facts = [
        info.architecture,
        info.num_layers,
        info.kv_type,
        info.kv_bytes_per_token,
        info.vocab_size,
        info.isa,
        __version__,
    ]
    digest = blake2b(repr(facts).encode(), digest_size=12, person=b"hob-model")
    if packed_path:
        from hob.models.packed_file import open_packed

        # The header holds every tensor's CRC, so equal headers mean equal weights.
        with Path(packed_path).open("rb") as file:
            digest.update(file.read(open_packed(Path(packed_path)).data_offset))
    else:
        digest.update(info.name.encode())
    return digest.hexdigest()


def _remove_stale(folder: Path, fingerprint: str) -> None:
    """Remove stores that were left alone while others were used.

    Not by the clock alone: after it jumped ahead, or after a month without power, all would seem to be.
    """
    uses = {path: last_use(path) for path in folder.glob("kv-*")}
    newest = min(time.time(), max(uses.values(), default=0.0))
    for path, used in uses.items():
        if path.name != f"kv-{fingerprint}" and newest - used > STALE_S and remove_store(path):
            log.info("removed KV of a model that was not loaded for %d days: '%s'", (newest - used) // 86400, path)
