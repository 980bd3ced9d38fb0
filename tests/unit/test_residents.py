"""Models that come and go in virtual time: loading on demand, who makes room, leases, budget, refusals, faults."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.models_world import BLOCK_BYTES, BUDGET, KV_TOKENS, MB, VOCAB, House, solo

from hob.config import SchedulerConfig
from hob.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, Overloaded, PermissionDenied
from hob.kvcache.keys import KeyRing
from hob.kvcache.pool import BLOCK_SIZE
from hob.kvcache.store import BlockStore
from hob.kvcache.swap import Swap
from hob.messages import Lease, ModelSpec, Need
from hob.request import ServiceClass
from hob.scheduler.scheduler import Scheduler
from hob.service import residents
from hob.service.resident import MIN_STAY_S, PAUSE_S, Opened
from hob.service.residents import DRAIN_AFTER_S, PATIENCE_S, TIE_S, ResidencyConfig


def house_of(*names: str, size: int = 6 * MB, **fields: object) -> House:
    return House(dict.fromkeys(names, size), **fields)  # type: ignore[arg-type]


def test_a_request_waits_for_its_model_and_gets_its_solo_reply() -> None:
    house = house_of("a", "b")
    for name in ("a", "b"):
        house.ask(name, name)
    house.ask("default", "")
    house.run()
    assert house.tokens("a") == house.tokens("b") == house.tokens("default") == solo(40, 8)
    assert house.loaded == {"a", "b"}
    with pytest.raises(ModelNotFound, match="'c' is not known here. Known: a, b"):
        house.ask("c", "c")


def test_room_for_a_third_is_made_by_the_least_recently_used_and_never_by_the_default_first() -> None:
    house = house_of("a", "b", "c", "d")
    for name in ("a", "b", "c"):
        house.ask(name, name)
        house.run()
        house.clock.sleep(1)
    assert house.loaded == {"a", "b", "c"}
    house.ask("d", "d")
    house.run()
    assert house.loaded == {"a", "c", "d"}
    assert house.unloaded == ["b"]
    assert house.tokens("d") == solo(40, 8)
    assert house.peak_bytes <= BUDGET


def test_a_rank_outlasts_recency_and_a_pin_outlasts_all() -> None:
    house = house_of("a", "b", "c", "d", "e", limits=ResidencyConfig(kv_tokens=KV_TOKENS, max_rank=3))
    for name in ("a", "b", "c"):
        house.ask(name, name)
        house.run()
        house.clock.sleep(1)
    house.residents.set_lease("app", "b", Lease(rank=2), house.clock.now)
    house.ask("d", "d")
    house.run()
    assert house.loaded == {"a", "b", "d"}
    house.residents.set_lease("app", "b", Lease(is_pinned=True), house.clock.now)
    with pytest.raises(PermissionDenied, match="would pin .* with 'd'. The owner allows 10,000,000"):
        house.residents.set_lease("app", "d", Lease(is_pinned=True), house.clock.now)
    house.residents.set_lease("other", "d", Lease(is_pinned=True), house.clock.now)
    house.ask("e", "e")
    house.run()
    assert house.loaded == {"b", "d", "e"}  # even the default goes before a pinned one
    with pytest.raises(Conflict, match="pinned by app"):
        house.residents.unload("b", house.clock.now)
    house.residents.set_lease("app", "b", None, house.clock.now)
    house.residents.unload("b", house.clock.now)
    house.run()
    assert house.loaded == {"d", "e"}
    with pytest.raises(NotFound, match="'b' is not loaded. Loaded: "):
        house.residents.unload("b", house.clock.now)
    with pytest.raises(NotFound, match="'x' is not loaded"):
        house.residents.set_lease("app", "x", Lease(), house.clock.now)
    house.residents.set_lease("app", "b", Lease(rank=3), house.clock.now)
    house.run()
    assert "b" in house.loaded


def test_a_lease_is_held_to_the_owners_caps() -> None:
    house = house_of("a", limits=ResidencyConfig(max_rank=3, max_keep_alive_s=60))
    house.ask("a", "a")
    house.run()
    for lease in (Lease(rank=4), Lease(keep_alive_s=61)):
        with pytest.raises(PermissionDenied, match="The owner allows rank 3 and 60 s"):
            house.residents.set_lease("app", "a", lease, house.clock.now)
    house.residents.set_lease("app", "a", Lease(rank=3, keep_alive_s=60), house.clock.now)
    assert house.residents.stats(0.0).models[0].leases == ["app"]


def test_idle_models_go_in_their_time_and_the_default_stays() -> None:
    house = house_of("a", "b", "c", limits=ResidencyConfig(keep_alive_s=300))
    for name in ("a", "b", "c"):
        house.ask(name, name)
    house.run()
    house.residents.set_lease("app", "c", Lease(keep_alive_s=1000), house.clock.now)
    assert house.residents.next_due_s(house.clock.now) == pytest.approx(300, abs=5)
    house.clock.sleep(301)
    house.run()
    assert house.loaded == {"a", "c"}
    house.clock.sleep(700)
    house.run()
    assert house.loaded == {"a"}
    assert house.residents.next_due_s(house.clock.now) is None
    house.ask("again", "b")
    house.run()
    assert house.tokens("again") == solo(40, 8)


def test_what_happens_to_contexts_while_a_model_is_loaded_reaches_its_disk(tmp_path: Path) -> None:
    house, told = house_of("a", "b"), list[Swap]()

    def prepare(name: str, opened: Opened) -> None:
        ring = KeyRing(tmp_path / "keys", {})
        store = BlockStore(tmp_path / name, "fake", opened.engine.block_bytes, ring, MB)
        opened.swap = Swap(store, is_threaded=False)
        house.residents.change_disk(told.append)

    house.opener.prepare = prepare
    for name in ("a", "b"):
        house.ask(name, name)
        house.run()
    swaps = {resident.name: resident.swap for resident in house.residents}
    assert told == [swaps["a"], swaps["a"], swaps["b"]]
    house.residents.close()


def test_a_busy_model_is_drained_for_one_that_waits_and_no_request_is_lost() -> None:
    house = house_of("a", "b", size=12 * MB)
    house.ask("long", "a", max_tokens=1500)
    while house.clock.now < MIN_STAY_S:
        house.step()
    house.ask("other", "b")
    while house.clock.now < MIN_STAY_S + DRAIN_AFTER_S + 0.2:
        house.step()
    assert not house.is_done("long")
    assert house.residents.stats(house.clock.now).models[0].state == "draining"
    house.ask("late", "a")  # behind the one that waits
    house.run(120)
    assert house.tokens("long") == solo(40, 1500)
    assert house.tokens("other") == house.tokens("late") == solo(40, 8)
    assert house.unloaded == ["a", "b"]
    assert house.peak_bytes <= BUDGET


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    house = house_of("a", "b", size=12 * MB)
    house.opener.sizes["b"] = 21 * MB
    house.residents.load(1, ModelSpec("b", ""), house.clock.now, Need())
    house.ask("r", "b")
    house.run()
    error = house.answers[1].error
    assert error is not None
    assert error.name == "ModelTooLarge"
    assert "needs 21,004,096 bytes (weights 21,000,000, kv 4,096, that is 512 tokens)" in error.message
    assert "the memory budget is 20,000,000" in error.message
    assert house.answers[1].room_bytes == BUDGET - 4096
    assert house.error("r") == "ModelTooLarge"


def test_what_does_not_fit_beside_pinned_ones_is_refused_and_names_them() -> None:
    house = house_of("a", "b", size=12 * MB, limits=ResidencyConfig(max_pinned_share=1.0))
    house.ask("a", "a")
    house.run()
    house.residents.set_lease("app", "a", Lease(is_pinned=True), house.clock.now)
    house.ask("b", "b")
    house.run()
    assert house.error("b") == "Overloaded"
    assert "pinned for a" in str(house.outputs["b"][0].error)


def test_a_model_that_does_not_load_is_told_to_all_and_leaves_nothing() -> None:
    house = house_of("a", "b")
    house.opener.broken.add("b")
    house.residents.load(7, ModelSpec("b", ""), 0.0, Need())
    house.ask("one", "b")
    house.ask("two", "b")
    house.ask("three", "b")
    house.residents.cancel("three", 0.0)
    house.run()
    assert house.error("one") == house.error("two") == "ModelFileError"
    assert "three" not in house.outputs
    error = house.answers[7].error
    assert error is not None
    assert error.name == "ModelFileError"
    assert house.ledger.reserved_bytes == 0
    house.opener.broken.clear()
    house.ask("again", "b")
    house.run()
    assert house.tokens("again") == solo(40, 8)


def test_every_reservation_may_fail() -> None:
    n, num_failed = 0, 0
    while n < 60:
        n += 1
        house = house_of("a", "b")
        house.ledger.fail_at = n
        for name in ("a", "b"):
            house.ask(name, name, num_prompt=700, max_tokens=100)
        house.run()
        for name in ("a", "b"):
            assert house.is_done(name), f"reservation {n} failed and request {name} never ended"
            assert house.error(name) is not None or house.tokens(name) == solo(700, 100)
            num_failed += house.error(name) is not None
        if house.ledger._num_asked < n:
            break
    assert 3 < n < 60
    assert num_failed >= 3


def test_kv_grows_with_what_is_wanted_and_is_given_back() -> None:
    house = house_of("a", "b", size=MB)
    house.ask("small", "a")
    house.run()
    least = house.ledger.held_by("a")["kv"]
    house.ask("large", "a", num_prompt=3000)
    house.run()
    most = house.ledger.held_by("a")["kv"]
    assert least < 3000 * 8 <= most
    assert house.residents.room.relieve(1) >= most - least
    assert "kv" not in house.ledger.held_by("a")
    house.ask("again", "a", num_prompt=3000)
    house.run()
    assert house.tokens("again") == solo(3000, 8)


def test_one_models_cache_makes_room_for_anothers_sequences() -> None:
    size = (17 << 20) // 2
    kv = 300 * BLOCK_BYTES
    house = house_of("a", "b", size=size, budget=2 * size + kv)
    house.ask("a", "a", num_prompt=3500)
    house.run()
    house.ask("b", "b", num_prompt=3500)
    house.run()
    assert house.tokens("a") == house.tokens("b") == solo(3500, 8)
    assert house.loaded == {"a", "b"}
    assert house.peak_bytes <= 2 * size + kv
    assert house.ledger.held_by("a").get("kv", 0) < house.ledger.held_by("b")["kv"]


def test_both_models_want_more_than_there_is_and_both_end() -> None:
    size = (17 << 20) // 2
    house = house_of("a", "b", size=size, budget=2 * size + 260 * BLOCK_BYTES)
    for i in range(3):
        for name in ("a", "b"):
            house.ask(f"{name}{i}", name, num_prompt=1500 + i, max_tokens=400)
    house.run(300)
    for i in range(3):
        for name in ("a", "b"):
            assert house.tokens(f"{name}{i}") == solo(1500 + i, 400)
    assert house.peak_bytes <= house.ledger.budget_bytes


def test_models_whose_sequences_fit_only_alone_take_turns() -> None:
    size = (17 << 20) // 2
    house = house_of("a", "b", size=size, budget=2 * size + 150 * BLOCK_BYTES)
    for name in ("a", "b"):
        house.ask(name, name)
    house.run()
    for name in ("a", "b"):
        house.ask(f"{name}-long", name, num_prompt=3500)
    house.run(120)
    assert house.tokens("a-long") == house.tokens("b-long") == solo(3500, 8)


def two_long_replies(*pinned: str, class_of_b: ServiceClass = ServiceClass.STANDARD) -> House:
    """Two models with a long reply each, which has begun; together they do not fit."""
    size = (17 << 20) // 2
    limits = ResidencyConfig(kv_tokens=KV_TOKENS, max_pinned_share=1.0)
    house = house_of("a", "b", size=size, budget=2 * size + 70 * BLOCK_BYTES, limits=limits)
    for name, service_class in (("a", ServiceClass.STANDARD), ("b", class_of_b)):
        house.ask(name, name, num_prompt=300, max_tokens=1000, service_class=service_class)
    while not (house.tokens("a") and house.tokens("b")):
        house.step()
    for name in pinned:  # as if granted before the budget shrank: such a pin is refused while the replies run
        house.residents.room.leases.put("app", name, Lease(is_pinned=True))
    house.residents.room.set_limits()
    return house


def tied_house() -> House:
    """As above, when it shows that they do not fit."""
    house = two_long_replies()
    while house.loaded == {"a", "b"} or not house.tokens("b"):
        house.step() or house.clock.sleep(0.05)
    return house


def test_a_reply_that_has_begun_goes_on_after_its_model_gave_way() -> None:
    house = tied_house()
    assert 0 < len(house.tokens("a")) < 1000, "the control: it was not done when a model gave way"
    assert 0 < len(house.tokens("b")) < 1000
    house.run(120)
    assert house.tokens("a") == house.tokens("b") == solo(300, 1000)
    assert house.residents.num_loads >= 3
    assert not house.residents.fairness._num_busy


def test_who_gives_way_keeps_its_leases() -> None:
    house = two_long_replies()
    for name in ("a", "b"):
        house.residents.set_lease("app", name, Lease(), house.clock.now)
    while not house.unloaded:
        house.step() or house.clock.sleep(0.05)
    (gone,) = house.unloaded
    assert house.residents.room.leases.apps(gone) == ["app"]
    assert house.ended == []


def test_of_several_that_do_not_fit_a_pinned_one_stays() -> None:
    size = (17 << 20) // 2
    limits = ResidencyConfig(kv_tokens=KV_TOKENS, max_pinned_share=1.0)
    house = house_of("a", "b", "c", size=size, budget=3 * size + 70 * BLOCK_BYTES, limits=limits)
    for name in "abc":
        house.ask(name, name)
    house.run()
    house.residents.set_lease("app", "b", Lease(is_pinned=True), house.clock.now)
    for name in "abc":
        house.ask(f"{name}-long", name, num_prompt=1200)
    house.run(120)
    assert [house.tokens(f"{name}-long") for name in "abc"] == [solo(1200, 8)] * 3
    assert house.unloaded
    assert "b" not in house.unloaded
    assert house.residents.room.is_pinned("b")


def test_a_pinned_model_does_not_give_way() -> None:
    house = two_long_replies("b")
    house.run(120)
    assert "b" not in house.unloaded
    assert house.tokens("b") == solo(300, 1000)
    assert house.residents.room.is_pinned("b")
    assert house.error("a") == "Overloaded"
    assert "and what is pinned leave" in str(house.outputs["a"][-1].error)


def test_of_two_pinned_models_neither_goes_and_what_does_not_fit_beside_both_is_ended() -> None:
    house = two_long_replies("a", "b")
    house.run(120)
    assert house.unloaded == []
    assert house.error("a") == house.error("b") == "Overloaded"
    house.ask("short", "a", num_prompt=300)
    house.run()
    assert house.tokens("short") == solo(300, 8)


def test_a_request_whose_model_gave_way_can_be_cancelled_and_is_told_if_its_model_cannot_come_back() -> None:
    house, other = tied_house(), tied_house()
    gone = ({"a", "b"} - house.loaded).pop()
    house.residents.cancel(gone, house.clock.now)
    house.run(120)
    assert not house.is_done(gone)
    assert gone not in house.loaded, "nobody wants it any more"
    other.opener.broken.add(gone)
    other.run(120)
    assert other.error(gone) == "ModelFileError"
    for each in (house, other):
        assert each.tokens("b" if gone == "a" else "a") == solo(300, 1000)
        assert not each.residents.fairness._num_busy


def test_a_reply_that_fits_no_longer_is_told_and_holds_up_nobody() -> None:
    """Its model has more blocks free than it may have, so nothing is lacking but the right to them."""
    size = 17 * MB
    house = house_of("a", size=size, budget=size + 240 * BLOCK_BYTES)
    house.ask("long", "a", num_prompt=900, max_tokens=2500)
    while len(house.tokens("long")) < 700:
        house.step()
    house.residents.set_budget(size + 90 * BLOCK_BYTES)
    house.ask("short", "a", num_prompt=100)
    house.run(60)
    assert house.error("long") == "Overloaded"
    assert house.tokens("short") == solo(100, 8)


def test_a_pin_ends_nobodys_reply_and_takes_no_more_than_there_is() -> None:
    size = 9 * MB
    limits = ResidencyConfig(kv_tokens=KV_TOKENS, max_pinned_share=1.0)
    house = house_of("a", "b", "c", size=size, budget=2 * size + 200 * BLOCK_BYTES, limits=limits)
    house.ask("b", "b")
    house.run()
    house.ask("long", "a", num_prompt=900, max_tokens=2500)
    while len(house.tokens("long")) < 10:
        house.step()
    pin = Lease(is_pinned=True)
    with pytest.raises(
        Overloaded, match="with 'b' pinned, a request that runs or waits on 'a' could not end: .* 3,400"
    ):
        house.residents.set_lease("app", "b", pin, house.clock.now)
    house.run(60)
    assert house.tokens("long") == solo(900, 2500)
    house.residents.set_lease("app", "b", pin, house.clock.now)
    house.residents.set_lease("other", "a", pin, house.clock.now)
    with pytest.raises(Overloaded, match="'c' and what is pinned already take 27,"):
        house.residents.set_lease("third", "c", pin, house.clock.now)


def test_the_end_of_a_lease_gives_others_their_room_back() -> None:
    size = 9 * MB
    limits = ResidencyConfig(kv_tokens=KV_TOKENS, max_pinned_share=1.0)
    house = house_of("a", "b", size=size, budget=2 * size + 200 * BLOCK_BYTES, limits=limits)
    for name in ("a", "b"):
        house.ask(name, name)
    house.run()
    a = house.residents.get("a")
    assert a is not None
    before = a.pool.max_blocks
    house.residents.set_lease("app", "b", Lease(is_pinned=True), house.clock.now)
    assert a.pool.max_blocks < before, "the control"
    house.residents.set_lease("app", "b", None, house.clock.now)
    assert a.pool.max_blocks == before


def test_the_budget_can_shrink_and_grow_while_running() -> None:
    house = house_of("a", "b", size=9 * MB)
    for name in ("a", "b"):
        house.ask(name, name, num_prompt=2000)
    house.run()
    house.residents.set_budget(17 * MB)
    house.run()
    assert house.ledger.reserved_bytes <= 17 * MB
    assert house.loaded == {"a"}
    a = house.residents.get("a")
    assert a is not None
    house.opener.sizes["a"] = 0
    with pytest.raises(InvalidRequest, match="the memory budget is 1,000 bytes. Expected at least 16,777,216"):
        house.residents.set_budget(1000)
    house.residents.set_budget(BUDGET)
    house.ask("again", "b", num_prompt=2000)
    house.run()
    assert house.loaded == {"a", "b"}


@pytest.mark.parametrize(("share", "held"), [(1.0, {"c"}), (0.5, set())])
def test_the_owners_budget_goes_before_an_apps_pin(share: float, held: set[str]) -> None:
    """9 MB each: both are too much for 17, and one of them is more than half of it."""
    house = house_of("a", "b", "c", size=9 * MB, limits=ResidencyConfig(kv_tokens=KV_TOKENS, max_pinned_share=share))
    for rank, name in enumerate("bc"):
        house.residents.set_lease(f"app-{name}", name, Lease(rank, is_pinned=True), house.clock.now)
        house.run()
    assert house.loaded == {"b", "c"}
    assert house.ended == []
    house.residents.set_budget(17 * MB)
    house.run()
    assert {name for name in "bc" if house.residents.room.is_pinned(name)} == held
    assert house.ended == [(f"app-{name}", name) for name in "bc" if name not in held]
    assert house.ledger.reserved_bytes <= 17 * MB


def test_busy_models_give_back_what_is_over_a_shrunk_budget() -> None:
    house = house_of("a", "b", size=9 * MB)
    asked = []
    for i in range(200):
        asked += [(f"{name}{i}", name) for name in "ab"]
        for name, model in asked[-2:]:
            house.ask(name, model, max_tokens=60)
        if i == 20:
            assert house.loaded == {"a", "b"}
            house.residents.set_budget(17 * MB)
        house.step()
        house.clock.sleep(0.01)
    assert house.ledger.reserved_bytes <= 17 * MB, "though neither was ever idle"
    house.run(200)
    assert all(house.tokens(name) == solo(40, 60) for name, _ in asked)


def test_what_the_api_process_keeps_of_the_default_model_stays_reserved() -> None:
    house = house_of("a", "b")
    for name in ("a", "b"):
        house.residents.know(ModelSpec(name, "", text_bytes=MB))
    for _ in range(2):
        for name in ("a", "b"):
            house.ask(name, name)
        house.run()
        assert house.ledger.held_by("a")["text"] == house.ledger.held_by("b")["text"] == MB
        for name in ("a", "b"):
            house.residents.unload(name, house.clock.now)
        house.run()
        assert house.loaded == set()
        assert house.ledger.held_by("a") == {"text": MB}
        assert house.ledger.held_by("b") == {}
        stats = house.residents.stats(house.clock.now)
        assert [(model.name, model.state, model.num_bytes) for model in stats.models] == [("a", "unloaded", MB)]


def test_a_shrunk_budget_lets_running_requests_end_and_refuses_what_no_longer_fits() -> None:
    size = (16 << 20) + 5 * 4096
    house = house_of("a", size=size, budget=size + 200 * BLOCK_BYTES)
    house.ask("running", "a", num_prompt=1000, max_tokens=200)
    while not house.tokens("running"):
        house.step()
    for i in range(2):
        house.ask(f"waiting{i}", "a", num_prompt=2500 + i)
    house.step()
    house.residents.set_budget(size + 100 * BLOCK_BYTES)
    house.run()
    assert house.tokens("running") == solo(1000, 200)
    assert [house.error(f"waiting{i}") for i in range(2)] == ["Overloaded"] * 2
    assert f"the memory budget, {house.ledger.budget_bytes:,} bytes now" in str(house.outputs["waiting0"][-1].error)
    assert house.ledger.reserved_bytes <= house.ledger.budget_bytes
    a = house.residents.get("a")
    assert a is not None
    assert house.residents.room.info_of(a).context_length == a.pool.max_blocks * BLOCK_SIZE < 1700


@pytest.mark.timeout(60)
def test_the_end_waits_for_no_model_whose_disk_tier_has_ended(tmp_path: Path) -> None:
    """Its writer takes nothing more: what is handed to it is never done."""
    house = house_of("a", "b")

    def with_disk(name: str, opened: Opened) -> None:
        ring = KeyRing(tmp_path / "keys", {})
        store = BlockStore(tmp_path / name, name, opened.engine.block_bytes, ring, 1 << 30)
        opened.swap = Swap(store)

    house.opener.prepare = with_disk
    for name in ("a", "b"):
        house.ask(name, name)
    house.run()
    house.residents.unload("b", house.clock.now)
    house.residents.tick(house.clock.now)  # its writer ends here: these workers have no threads
    assert [resident.is_freed for resident in house.residents.room.closing.values()] == [True]
    house.residents.close()


def test_random_days_keep_the_ledger_under_the_budget() -> None:
    rng = random.Random(4)
    sizes = {name: rng.randrange(1, 9) * MB for name in "abcdef"}
    house = House(sizes)
    asked: dict[str, tuple[int, int]] = {}
    for i in range(150):
        name, model = f"r{i}", rng.choice("abcdef")
        shape = rng.randrange(1, 900), rng.randrange(1, 40)
        house.ask(name, model, *shape, app=rng.choice("xyz"))
        asked[name] = shape
        for _ in range(rng.randrange(6)):
            house.step()
        if rng.random() < 0.1:
            house.clock.sleep(rng.choice((1, 10, 400)))
        if rng.random() < 0.05:
            house.residents.room.relieve(rng.randrange(1, 4))
    house.run(1000)
    for name, shape in asked.items():
        assert house.tokens(name) == solo(*shape), name
    assert house.peak_bytes <= BUDGET
    assert house.residents.room.num_unloads > 4


def test_a_block_that_is_given_back_while_it_counts_changes_replies() -> None:
    """Positive control of the tests above: what discards too much does not stay unseen."""
    house = house_of("a", size=MB)
    house.ask("first", "a", num_prompt=1000)
    house.run()
    engine, a = house.opener.engines["a"], house.residents.get("a")
    assert a is not None
    engine.discard(0, engine.page_bytes * (a.pool.num_blocks // 4))
    house.ask("again", "a", num_prompt=1000)
    house.run()
    assert house.tokens("again") != solo(1000, 8)


def test_a_ledger_that_grants_everything_goes_over_the_budget() -> None:
    """Positive control of `peak_bytes`."""
    house = house_of("a", "b", "c", "d", size=8 * MB)
    house.ledger.budget_bytes = 1 << 40
    for name in "abcd":
        house.ask(name, name)
        house.run()
    assert house.peak_bytes > BUDGET


# ---- classes across models ----

INTERACTIVE, STANDARD, BACKGROUND = ServiceClass.INTERACTIVE, ServiceClass.STANDARD, ServiceClass.BACKGROUND
LOAD_S = 1.0


def one_at_a_time() -> House:
    """Models of which one fits at a time and each takes a second to load."""
    house = house_of("a", "b", "c", size=12 * MB)
    house.opener.prepare = lambda name, opened: house.clock.sleep(LOAD_S)
    return house


def play(house: House, seconds: float) -> None:
    end = house.clock.now + seconds
    while house.clock.now < end:
        house.step() or house.clock.sleep(0.05)


def talk(house: House, turns: int, every_s: float = 10.0) -> list[float]:
    """A chat on model b. Returns how long each turn waited for its first token."""
    waits = []
    for _ in range(turns):
        start = house.clock.now
        house.ask(f"turn{start}", "b", service_class=INTERACTIVE, app="chat")
        play(house, every_s)
        waits.append(house.times[f"turn{start}"][0] - start)
    return waits


def test_a_background_job_does_not_take_the_model_of_a_chat_and_comes_in_the_end() -> None:
    house = one_at_a_time()
    talk(house, 1)
    house.ask("job", "c", service_class=BACKGROUND)
    assert max(talk(house, 5)) < 0.5, "no turn waited for a model"
    assert not house.is_done("job")
    assert sum(wait > 0.5 for wait in talk(house, 5)) <= 1
    assert house.tokens("job") == solo(40, 8)


def test_a_standard_request_does_not_wait_for_a_chat_that_pauses() -> None:
    house = one_at_a_time()
    talk(house, 1)
    house.ask("other", "c", service_class=ServiceClass.STANDARD)
    play(house, LOAD_S + 1)
    assert house.tokens("other") == solo(40, 8)


def test_a_background_job_has_its_turn_when_the_chat_is_over() -> None:
    house = one_at_a_time()
    talk(house, 1)
    house.ask("job", "c", service_class=BACKGROUND)
    play(house, PAUSE_S - 5)
    assert house.tokens("job") == solo(40, 8)
    assert PAUSE_S < PATIENCE_S, "the control: it was not patience that did it"


def test_a_chat_does_not_wait_for_the_end_of_a_background_reply_on_another_model() -> None:
    house = one_at_a_time()
    house.ask("job", "a", max_tokens=3000, service_class=BACKGROUND)
    play(house, 5)
    assert 0 < len(house.tokens("job")) < 2000, "the control: it was under way"
    assert max(talk(house, 2)) < LOAD_S + 0.5
    house.run(200)
    assert house.tokens("job") == solo(40, 3000)
    assert not house.residents.fairness._num_busy


def test_a_long_background_job_ends_though_another_model_is_never_without_urgent_work() -> None:
    house = one_at_a_time()
    talk(house, 1)
    loads = house.residents.num_loads
    house.ask("job", "c", num_prompt=1000, max_tokens=1200, service_class=BACKGROUND)
    waits = talk(house, 60, 5.0)
    assert house.tokens("job") == solo(1000, 1200)
    assert house.residents.num_loads - loads > 3, "the control: one stay was not enough"
    assert sum(wait > 0.5 for wait in waits) <= 2 * 300 / PATIENCE_S


@pytest.mark.parametrize("class_of_b", [INTERACTIVE, BACKGROUND])
def test_of_two_that_do_not_fit_the_less_urgent_gives_way(class_of_b: ServiceClass) -> None:
    house = two_long_replies(class_of_b=class_of_b)
    house.run(120)
    assert house.unloaded[0] == ("a" if class_of_b is INTERACTIVE else "b")
    assert house.tokens("a") == house.tokens("b") == solo(300, 1000)


def test_the_more_urgent_of_two_wanted_models_comes_first() -> None:
    house = one_at_a_time()
    house.ask("job", "c", service_class=BACKGROUND)
    house.ask("turn", "b", service_class=INTERACTIVE)
    house.residents.load(1, ModelSpec("a", ""), house.clock.now, Need(STANDARD))
    house.run(120)
    assert house.times["turn"][0] < house.times["job"][0]
    assert house.answers[1].model is not None
    assert house.tokens("job") == house.tokens("turn") == solo(40, 8)


def test_a_model_that_is_drained_for_lesser_work_takes_urgent_requests() -> None:
    house = one_at_a_time()
    house.ask("long", "b", max_tokens=3000)
    play(house, LOAD_S + MIN_STAY_S + 0.5)
    house.ask("other", "c")
    play(house, DRAIN_AFTER_S + 0.2)
    b = house.residents.get("b")
    assert b is not None
    assert b.is_draining
    start = house.clock.now
    house.ask("equal", "b")
    house.ask("turn", "b", service_class=INTERACTIVE)
    play(house, 1)
    assert house.times["turn"][0] - start < 0.5
    house.run(300)
    for name in ("other", "equal", "turn"):
        assert house.tokens(name) == solo(40, 8), name


@pytest.mark.parametrize("has_disk", [False, True])
def test_a_chat_has_the_kv_that_background_work_on_another_model_holds(tmp_path: Path, has_disk: bool) -> None:
    size = (17 << 20) // 2
    house = house_of("a", "b", size=size, budget=2 * size + 70 * BLOCK_BYTES)

    def prepare(name: str, opened: Opened) -> None:
        if has_disk:
            ring = KeyRing(tmp_path / "keys", {})
            store = BlockStore(tmp_path / name, name, opened.engine.block_bytes, ring, MB)
            opened.swap = Swap(store, is_threaded=False)
            opened.scheduler = Scheduler(
                SchedulerConfig(), opened.scheduler.placement.pool.num_blocks, 8192, VOCAB, opened.swap
            )

    house.opener.prepare = prepare
    talk(house, 1, 5.0)
    house.ask("job", "a", num_prompt=400, max_tokens=600, service_class=BACKGROUND)
    while len(house.tokens("job")) < 500:
        house.step()
    start = house.clock.now
    house.ask("turn", "b", num_prompt=800, service_class=INTERACTIVE, app="chat")
    while not house.tokens("turn"):
        house.step() or house.clock.sleep(0.05)
    assert len(house.tokens("job")) < 600, "it did not have to end first"
    assert house.clock.now - start < TIE_S + 1.0
    house.run(60)
    assert house.tokens("job") == solo(400, 600)
    assert house.unloaded == []
    a = house.residents.get("a")
    assert a is not None
    if a.swap is not None:
        assert min(a.swap.num_written, a.swap.num_read) > 20, "the control: it was kept on disk"
        house.residents.close()


def test_background_work_has_its_kv_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model's urgent streams leave too little, one beginning before the other ends."""
    monkeypatch.setattr(residents, "PATIENCE_S", 6.0)
    size = (17 << 20) // 2
    house = house_of("a", "b", size=size, budget=2 * size + 70 * BLOCK_BYTES)
    for name in ("a", "b"):
        house.ask(name, name)
    house.run()
    start, done_at = 0.0, []
    for i in range(30):
        house.ask(f"urgent{i}", "b", num_prompt=200, max_tokens=100, service_class=INTERACTIVE)
        play(house, 0.4)
        if i == 2:
            house.ask("job", "a", num_prompt=1000, service_class=BACKGROUND)
            start = house.clock.now
        done_at += [house.clock.now - start] * house.is_done("job")
    assert done_at
    assert 6 < done_at[0] < 9
    house.run(60)
    assert house.tokens("job") == solo(1000, 8)
    assert all(house.tokens(f"urgent{i}") == solo(200, 100) for i in range(30))


# ---- deadlines while a model is not there ----


def test_the_time_that_a_model_took_to_come_counts_in_a_deadline() -> None:
    house = one_at_a_time()
    house.ask("a", "a")
    house.run()
    house.ask("late", "b", deadline_s=0.5)  # nobody knows yet how long it takes
    house.run()
    assert house.error("late") == "Overloaded"
    assert "wanted within 0.500 s, but is expected after 2." in str(house.outputs["late"][-1].error)
    house.ask("a2", "a")
    house.run()
    assert house.loaded == {"a"}
    refused = "due in 0.500 s, but model 'b' is not in memory, and to load it takes 1.0"
    with pytest.raises(Overloaded, match=refused):
        house.ask("again", "b", deadline_s=0.5)
    house.residents.load(1, ModelSpec("b", ""), house.clock.now, Need(due_s=house.clock.now + 0.5))
    house.run()
    assert refused in str(house.answers[1].error)
    assert house.loaded == {"a"}, "what is refused loads nothing"
    house.ask("in-time", "b", deadline_s=5.0)
    house.run()
    usage = house.outputs["in-time"][-1].usage
    assert usage is not None
    assert usage.is_ttft_met


def test_a_request_that_waits_on_when_its_model_is_there_is_told_its_place() -> None:
    house = house_of("a", "b")
    for i in range(200):
        house.ask(f"r{i}", "b")
    house.run(1.0)
    places = [output.place for outputs in house.outputs.values() for output in outputs if output.place is not None]
    assert places
    assert max(place.num_ahead for place in places) > 10
