"""Leaks planted on purpose: a block of one app is put where another app's (or another place's) is expected.

With the checks on, each is refused, computed again, and raises the alarm. With them off, the oracle must see it: that
shows both that the checks are what stops a leak and that the soak would notice one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from hob.kvcache.compression import EXACT
from hob.kvcache.store import Entry
from tests.soak.sessions import Session, Sessions

KINDS = ("memory", "slot", "bytes")
"""The index in memory names another app's block, the index on disk another slot, or another app's bytes lie there."""


@dataclass
class Planted:
    """How one leak went."""

    kind: str
    is_wrong: bool
    """The oracle saw another reply."""
    num_alarms: int


def plant(folder: Path, seed: int, kind: str, is_checking: bool) -> Planted:
    """One leak, one turn over it."""
    rng = random.Random(seed)
    world = Sessions(folder, seed)
    victim, other = (_grown(world, app, rng) for app in ("a", "b"))
    world.swap.drain(world.engine, world.prefixes.find)
    if kind != "memory":
        world.shut(is_polite=True)
        world.open()
    world.prefixes.is_checking = world.swap.store.is_checking = is_checking
    {"memory": _in_memory, "slot": _slot, "bytes": _bytes}[kind](world, victim, other, rng)
    world.tally.num_wrong = world.tally.num_alarms = 0
    world.begin(victim, rng.choices(range(1000), k=5), 8)
    while world.scheduler.has_work:
        world.step()
    world.shut(is_polite=True)
    return Planted(kind, world.tally.num_wrong > 0, world.tally.num_alarms)


def _grown(world: Sessions, app: str, rng: random.Random) -> Session:
    session = world.create(app)
    world.begin(session, rng.choices(range(1000), k=rng.randrange(60, 160)), 8)
    while world.scheduler.has_work:
        world.step()
    return session


def _keys(world: Sessions, session: Session) -> list[bytes]:
    keys: list[bytes] = []
    world.prefixes.extend_keys(session.app, session.history, keys, len(session.history) - 1)
    return keys


def _in_memory(world: Sessions, victim: Session, other: Session, rng: random.Random) -> None:
    index = world.prefixes._key_to_block
    mine = rng.choice([key for key in _keys(world, victim) if key in index])
    theirs = rng.choice([key for key in _keys(world, other) if key in index])
    index[mine] = index[theirs]


def _slot(world: Sessions, victim: Session, other: Session, rng: random.Random) -> None:
    entries = world.swap.store._shelves[victim.app].entries
    one, two = rng.sample([key for key in _keys(world, victim) if key in entries], 2)
    entries[one] = Entry(entries[two].slot, entries[two].nonce)


def _bytes(world: Sessions, victim: Session, other: Session, rng: random.Random) -> None:
    mine, theirs = (world.swap.store._shelves[session.app] for session in (victim, other))
    key = rng.choice([key for key in _keys(world, victim) if key in mine.entries])
    source = rng.choice(list(theirs.entries.values())).slot
    stolen = bytes(theirs.drawers[EXACT].slab.read(source, 1))
    mine.drawers[EXACT].slab.write(mine.entries[key].slot, [stolen])
    mine.drawers[EXACT].slab.sync()
