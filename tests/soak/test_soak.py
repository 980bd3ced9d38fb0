"""The short form of the soak, for every run of the tests. The long one: python -m tests.soak --rounds 10000."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hob.kvcache.block_index import HolderRow
from hob.kvcache.store import BlockStore
from hob.request import Request, SamplingParams
from tests.soak.leaks import KINDS, plant
from tests.soak.sessions import PROMPTS, Sessions, Tally, oracle


def has_done_all(tally: Tally) -> bool:
    """The soak must do what it is for."""
    often = min(tally.num_forks, tally.num_deleted, tally.num_cancelled) > 2
    is_disk_used = min(tally.num_blocks_read, tally.num_blocks_written) > 20
    num_polite = tally.num_restarts - tally.num_kills
    rare = (tally.num_stopped, num_polite, tally.num_half_written, tally.num_preemptions, tally.num_evictions)
    return often and is_disk_used and min(rare) >= 1


@pytest.mark.parametrize(("seed", "is_threaded"), [(1, False), (2, False), (3, True)])
def test_every_reply_is_that_of_a_solo_run(tmp_path: Path, seed: int, is_threaded: bool) -> None:
    tally = Sessions(tmp_path, seed, is_threaded, restarts=0.015).run(150, has_done_all)
    assert tally.num_wrong == 0, tally.wrong
    assert tally.num_alarms == 0
    assert has_done_all(tally)


def test_a_store_that_names_slots_before_they_are_written_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positive control of the kills."""
    world = Sessions(tmp_path, 5, restarts=0.05)
    write_slots = BlockStore._write_slots

    def too_early(store: BlockStore, app: str, *rest: Any) -> None:
        owner = next(session.context_id for session in world.sessions.values() if session.app == app)
        places = rest[1]
        store._index.end_turn(HolderRow(owner, app, 0), places, list(places), [], [])
        write_slots(store, app, *rest)

    monkeypatch.setattr(BlockStore, "_write_slots", too_early)
    tally = world.run(20, lambda tally: tally.num_alarms > 0)
    assert tally.num_half_written > 0
    assert tally.num_wrong == 0, "refused and computed again"


def test_the_oracle_is_the_engine_alone(tmp_path: Path) -> None:
    world = Sessions(tmp_path, 0)
    sampling = SamplingParams(max_tokens=9, temperature=0.0)
    world.scheduler.add(Request("solo", "a", PROMPTS[0], sampling=sampling), 0.0)
    world.in_flight["solo"] = (world.create(), PROMPTS[0], 9, [])
    while world.scheduler.has_work:
        world.step()
    assert world.tally.num_rounds == 1
    assert world.tally.num_wrong == 0
    assert len(set(oracle(PROMPTS[0], 9))) > 3
    world.shut(is_polite=True)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_leaks_are_refused_and_alarmed(tmp_path: Path, kind: str) -> None:
    for seed in range(8):
        planted = plant(tmp_path / str(seed), seed, kind, is_checking=True)
        assert not planted.is_wrong
        assert planted.num_alarms == 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_checks_the_soak_catches_planted_leaks(tmp_path: Path, kind: str) -> None:
    """The positive control."""
    caught = [plant(tmp_path / str(seed), seed, kind, is_checking=False).is_wrong for seed in range(12)]
    assert sum(caught) >= 0.95 * len(caught)
