"""The disk tier under the scheduler: restored == computed, whatever happens on the way. Fake engine, real files."""

from __future__ import annotations

import select
from pathlib import Path

import pytest
from tests.unit.test_scheduler import prompt, solo

from hob.config import SchedulerConfig
from hob.engine.fake import CostModel, FakeClock, FakeEngine
from hob.kvcache.compression import EXACT, Codec
from hob.kvcache.keys import KeyRing
from hob.kvcache.second_level import Load
from hob.kvcache.store import BlockStore
from hob.kvcache.swap import Swap
from hob.request import Request, SamplingParams, SequenceOutput, ServiceClass
from hob.scheduler.scheduler import Scheduler
from hob.service.step import run_step


class World:
    """An engine process that can be restarted: what is on disk stays."""

    def __init__(self, folder: Path, num_blocks: int = 64, is_threaded: bool = False, **fields: object) -> None:
        self.folder, self.num_blocks, self.is_threaded = folder, num_blocks, is_threaded
        self.fields = fields
        self.clock = FakeClock()
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, SequenceOutput] = {}
        self.start()

    def start(self) -> None:
        ring = KeyRing(self.folder / "keys", {})
        self.engine = FakeEngine(cost=CostModel(), sleep=self.clock.sleep)
        self.engine.open_pool(self.num_blocks)
        codec = Codec(self.engine.kv_shape)
        store = BlockStore(self.folder / "kv", "fake", self.engine.block_bytes, ring, 1 << 30, codec=codec)
        self.swap = Swap(store, is_threaded=self.is_threaded)
        config = SchedulerConfig(**self.fields)  # type: ignore[arg-type]
        self.scheduler = Scheduler(config, self.num_blocks, 8192, 1000, self.swap, ring.salt)

    def restart(self) -> None:
        self.swap.close()
        self.start()

    def add(self, name: str, token_ids: list[int], max_tokens: int = 8, app: str = "app", context: str = "c") -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.scheduler.add(Request(name, app, token_ids, sampling=sampling, context_id=context), self.clock())

    def step(self) -> None:
        outputs = run_step(self.engine, self.scheduler, self.clock, self.swap)
        if outputs is None and self.scheduler.has_work and self.is_threaded:
            assert select.select([self.swap], [], [], 5)[0], "nothing happens"
        for output in outputs or []:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                self.last[output.request_id] = output
        self.scheduler.check()

    def run(self, drain: bool = True) -> None:
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        if drain:
            self.swap.drain(self.engine, self.scheduler.placement.prefixes.find)

    def turn(self, name: str, token_ids: list[int], max_tokens: int = 8, **who: str) -> SequenceOutput:
        self.add(name, token_ids, max_tokens, **who)
        self.run()
        return self.last[name]


def restored(output: SequenceOutput) -> int:
    assert output.usage is not None
    return output.usage.num_restored_tokens


@pytest.mark.parametrize("is_threaded", [False, True])
def test_a_context_goes_on_after_a_restart_with_the_same_tokens(tmp_path: Path, is_threaded: bool) -> None:
    world = World(tmp_path, is_threaded=is_threaded)
    first = prompt(100, 1)
    assert restored(world.turn("one", first)) == 0
    history = first + world.tokens["one"] + prompt(9, 2)
    world.restart()
    last = world.turn("two", history)
    assert restored(last) == 107, "all that was computed: the last of 108 tokens was not"
    assert last.usage is not None
    assert last.usage.num_cached_tokens == 107
    assert world.tokens["two"] == solo(history).tokens["solo", 0]
    assert world.engine.num_steps <= 9, "the rest of the prompt in one step"
    world.swap.close()


def test_memory_first_then_disk(tmp_path: Path) -> None:
    world = World(tmp_path)
    tokens = prompt(160, 3)
    world.turn("one", tokens)
    world.restart()
    world.turn("short", tokens[:65], context="fork")
    assert restored(world.turn("long", tokens)) == 144 - 64
    assert world.tokens["long"] == solo(tokens).tokens["solo", 0]
    world.swap.close()


def test_contexts_larger_than_memory_take_turns(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=16)
    histories = {f"c{i}": prompt(100, i) for i in range(8)}
    for round_ in range(3):
        for name, history in histories.items():
            world.turn(f"{name}-{round_}", history, context=name)
            assert world.tokens[f"{name}-{round_}"] == solo(history).tokens["solo", 0]
            history += [*world.tokens[f"{name}-{round_}"], *prompt(5, round_)]
    assert world.swap.num_read > 100
    assert world.swap.num_lost == 0
    world.swap.close()


def test_other_apps_and_other_salts_find_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.turn("mine", prompt(100, 1))
    world.restart()
    assert restored(world.turn("theirs", prompt(100, 1), app="other")) == 0
    assert world.tokens["mine"] == world.tokens["theirs"]
    world.swap.close()


def test_requests_without_a_context_write_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    world.scheduler.add(Request("plain", "app", prompt(100, 1), sampling=sampling), 0.0)
    world.run()
    assert world.swap.store.num_bytes == 0
    world.swap.close()


def test_cancelling_while_it_loads_gives_the_blocks_back(tmp_path: Path) -> None:
    world = World(tmp_path, is_threaded=True)
    world.turn("one", prompt(300, 1))
    world.restart()
    world.add("two", prompt(300, 1))
    assert run_step(world.engine, world.scheduler, world.clock, world.swap) is None, "it loads"
    assert world.scheduler.running[0].is_loading
    world.scheduler.cancel("two", 0.0)
    world.scheduler.check()
    assert world.scheduler.placement.pool.num_free == 64
    world.turn("other", prompt(900, 7), context="d")  # over the same blocks, while pieces still arrive
    assert world.tokens["other"] == solo(prompt(900, 7)).tokens["solo", 0]
    world.swap.close()


def test_a_cancelled_load_writes_nothing_into_what_is_somebody_elses() -> None:
    memory, data = FakeEngine(), memoryview(bytes(range(128)))
    memory.open_pool(2)
    load = Load("app", [b"a", b"b"], [0, 1], is_written=[False, False])
    load.put(memory, 0, data)
    load.cancel()
    load.put(memory, 1, data)
    assert memory.read_block(0) == data
    assert memory.read_block(1) != data
    assert load.is_written == [True, False]


def test_others_run_while_one_loads(tmp_path: Path) -> None:
    world = World(tmp_path, is_threaded=True)
    world.turn("one", prompt(300, 1))
    world.restart()
    world.add("stream", prompt(10, 2), 50, context="d")
    world.step()
    world.add("two", prompt(300, 1))
    before = len(world.tokens["stream"])
    world.step()
    assert len(world.tokens["stream"]) == before + 1
    world.run()
    assert world.tokens["two"] == solo(prompt(300, 1)).tokens["solo", 0]
    world.swap.close()


@pytest.mark.parametrize("which", [0, 3, 5])
def test_a_damaged_block_is_computed_again_with_the_same_result(tmp_path: Path, which: int) -> None:
    world = World(tmp_path)
    world.turn("one", prompt(100, 1))
    world.swap.close()
    (path,) = (tmp_path / "kv").glob("*.slab")
    with path.open("r+b") as file:
        file.seek(which * 4096 + 7)
        file.write(b"\xff\x00\xff")
    world.start()
    assert restored(world.turn("two", prompt(100, 1))) == 16 * which
    assert world.tokens["two"] == world.tokens["one"]
    assert world.swap.store.num_alarms == 1
    world.swap.close()


def test_reading_is_left_out_where_computing_is_faster(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.turn("one", prompt(100, 1))
    world.restart()
    world.swap.recompute_s = lambda start, n: 1e-9 * n
    assert restored(world.turn("two", prompt(100, 1))) == 0
    world.restart()
    world.swap.recompute_s = lambda start, n: 1e-3 * n
    assert restored(world.turn("three", prompt(100, 1))) == 96
    world.swap.close()


def test_blocks_evicted_before_they_were_copied_are_only_lost(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=16)
    world.add("one", prompt(100, 1))
    world.run(drain=False)
    keys = list(world.scheduler.placement.prefixes._key_to_block)
    world.scheduler.placement.pool.allocate(14)  # all but two of the cached blocks are lent anew
    world.swap.drain(world.engine, world.scheduler.placement.prefixes.find)
    assert world.swap.num_lost > 0
    assert world.swap.num_written == len(keys) - 1 - world.swap.num_lost, "the unfinished block went first"
    world.restart()
    world.turn("two", prompt(100, 1))
    assert world.tokens["two"] == world.tokens["one"]
    world.swap.close()


def test_a_failing_disk_does_not_reach_the_requests(tmp_path: Path) -> None:
    world = World(tmp_path)

    def full(fd: int, parts: object, offset: int) -> int:
        raise OSError(28, "No space left on device")

    world.swap.store._write = full
    world.turn("one", prompt(100, 1))
    assert world.tokens["one"] == solo(prompt(100, 1)).tokens["solo", 0]
    assert world.swap.num_write_errors == 1
    world.turn("two", prompt(100, 1))
    world.swap.close()


def test_the_queue_of_copies_is_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, is_threaded=True)
    world.swap._max_queued_bytes = 3 * world.engine.block_bytes
    world.turn("one", prompt(400, 1))
    assert world.swap.num_written == 26, "25 full ones and the unfinished one"
    world.restart()
    assert restored(world.turn("two", prompt(400, 1))) == 384
    assert world.tokens["two"] == world.tokens["one"]
    world.swap.close()


def test_a_context_deleted_while_it_is_copied_leaves_its_place_in_the_queue(tmp_path: Path) -> None:
    world = World(tmp_path)
    find = world.scheduler.placement.prefixes.find
    for i in range(3):
        world.add(f"r{i}", prompt(100, i), context=f"c{i}")
        world.run(drain=False)
        world.swap._copy_one(world.engine, find)  # what a short pause between two steps has time for
        assert world.swap._queued_bytes == world.engine.block_bytes
        world.swap.drop("app", f"c{i}")
        assert world.swap._queued_bytes == 0
    world.swap.close()


def test_the_unfinished_block_is_taken_over_in_memory_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.turn("one", prompt(100, 1))
    history = prompt(100, 1) + world.tokens["one"]
    world.swap.store.drop("app", ["c"])  # memory alone
    first = world.turn("two", [*history, 5])
    assert first.usage is not None
    assert first.usage.num_cached_tokens == 107, "96 in full blocks, 11 in the unfinished one"
    second = world.turn("three", [*history, 6], context="fork")
    assert second.usage is not None
    assert second.usage.num_cached_tokens == 96, "the other turn wrote on in the unfinished one"
    assert world.tokens["two"] == solo([*history, 5]).tokens["solo", 0]
    assert world.tokens["three"] == solo([*history, 6]).tokens["solo", 0]
    world.swap.close()


def test_each_turn_replaces_the_unfinished_block_on_disk(tmp_path: Path) -> None:
    world = World(tmp_path)
    history = prompt(100, 1)
    for i in range(5):
        world.turn(str(i), history, max_tokens=3)
        history = history + world.tokens[str(i)]
    num_blocks = world.swap.store.num_bytes // world.swap.store.slot_bytes
    assert num_blocks == -(-(len(history) - 1) // 16), "no copies of what was unfinished earlier"
    world.swap.close()


# ---- turns that do not end by themselves ----


def begin(world: World, name: str, token_ids: list[int], num_tokens: int) -> None:
    """A turn that has so many tokens of its reply and would have more."""
    world.add(name, token_ids, 100)
    while len(world.tokens.get(name, [])) < num_tokens:
        world.step()


def drain(world: World) -> None:
    world.swap.drain(world.engine, world.scheduler.placement.prefixes.find)


def test_turns_that_are_given_up_leave_no_trace(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.turn("one", prompt(100, 1))
    history = prompt(100, 1) + world.tokens["one"]
    before = world.swap.store.kept("app", "c")
    for i in range(4):
        begin(world, f"left {i}", history + prompt(40, 10 + i), 30)
        world.scheduler.cancel(f"left {i}", world.clock())
        drain(world)
        assert world.swap.store.kept("app", "c") == before
    last = world.turn("two", [*history, 5])
    assert last.usage is not None
    assert last.usage.num_cached_tokens == 107, "the unfinished block comes from disk: in memory others wrote on in it"
    assert world.tokens["two"] == solo([*history, 5]).tokens["solo", 0]
    world.swap.close()


def test_a_given_up_turn_that_the_engine_had_finished_goes_with_the_next(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.turn("one", prompt(100, 1))
    history = prompt(100, 1) + world.tokens["one"]
    for i in range(4):
        world.turn(f"left {i}", history + prompt(40, 10 + i))
        kept = world.swap.store.kept("app", "c")
        assert kept is not None
        assert kept.num_blocks == {EXACT: 10}, "155 tokens"
    world.swap.close()


@pytest.mark.parametrize(("num_tokens", "num_restored"), [(22, 120), (40, 112)])
def test_a_turn_that_ends_at_a_stop_string_is_kept_up_to_there(
    tmp_path: Path, num_tokens: int, num_restored: int
) -> None:
    """The unfinished block too, unless the engine has filled it meanwhile."""
    world = World(tmp_path)
    begin(world, "one", prompt(100, 1), num_tokens)
    world.scheduler.cancel("one", world.clock(), num_kept=120)
    drain(world)
    kept = world.swap.store.kept("app", "c")
    assert kept is not None
    assert kept.num_blocks == {EXACT: -(-num_restored // 16)}
    world.restart()
    history = [*prompt(100, 1), *world.tokens["one"][:20], 5]
    assert restored(world.turn("two", history)) == num_restored
    assert world.tokens["two"] == solo(history).tokens["solo", 0]
    world.swap.close()


def test_a_turn_that_ends_while_its_blocks_are_gone_takes_nothing_from_the_one_before(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.turn("one", prompt(100, 1))
    before = world.swap.store.kept("app", "c")
    begin(world, "two", prompt(100, 1) + world.tokens["one"], 20)
    (sequence,) = world.scheduler.running
    world.scheduler.placement.preempt(sequence)
    world.scheduler.placement.take_leaves()
    world.scheduler.cancel("two", world.clock(), num_kept=120)
    drain(world)
    assert world.swap.store.kept("app", "c") == before
    world.swap.close()


# ---- preemption ----


def preempted(world: World) -> None:
    """A sequence of 120 tokens loses its blocks to an urgent one, which overwrites them, and comes back."""
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    low = Request("low", "app", prompt(120, 1), sampling=sampling, service_class=ServiceClass.BACKGROUND)
    world.scheduler.add(low, world.clock())
    world.step()
    world.step()
    urgent = Request("urgent", "chat", prompt(120, 2), sampling=sampling, service_class=ServiceClass.INTERACTIVE)
    world.scheduler.add(urgent, world.clock())
    world.run()
    assert world.scheduler.stats().num_preemptions == 1
    assert world.tokens["low"] == solo(prompt(120, 1)).tokens["solo", 0]
    assert world.tokens["urgent"] == solo(prompt(120, 2)).tokens["solo", 0]


def test_a_preempted_sequence_is_read_back_where_that_is_cheaper(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=9)
    world.swap.recompute_s = lambda start, num_tokens: 1.0
    preempted(world)
    assert world.swap.num_read == 6, "one of the seven was never overwritten"
    assert world.scheduler.stats().num_rows < 2 * (120 + 7) + 16, "at most an unfinished block is computed again"
    assert world.swap.store.num_bytes == 0, "forgotten when it ended"
    world.swap.close()


def test_a_preempted_sequence_is_computed_again_where_that_is_cheaper(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=9)
    world.swap.recompute_s = lambda start, num_tokens: 1e-9
    preempted(world)
    assert (world.swap.num_read, world.swap.num_written) == (0, 0)
    world.swap.close()


def test_a_full_writers_queue_is_not_waited_for(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=9)
    world.swap._max_queued_bytes = 5 * world.engine.block_bytes
    world.swap.recompute_s = lambda start, num_tokens: 1.0
    preempted(world)
    assert world.swap.num_written == 0
    world.swap.close()


def test_two_that_are_preempted_at_once_share_the_writers_queue(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=18)
    world.swap._max_queued_bytes = 12 * world.engine.block_bytes
    world.swap.recompute_s = lambda start, num_tokens: 1.0
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    for name in ("one", "two"):
        low = Request(name, "app", prompt(120, ord(name[0])), sampling=sampling, service_class=ServiceClass.BACKGROUND)
        world.scheduler.add(low, world.clock())
    while world.scheduler.waiting or any(s.num_computed_tokens < 120 for s in world.scheduler.running):
        world.step()
    urgent = Request("urgent", "chat", prompt(250, 2), sampling=sampling, service_class=ServiceClass.INTERACTIVE)
    world.scheduler.add(urgent, world.clock())
    plan = world.scheduler.schedule(world.clock())
    assert plan is not None
    assert world.scheduler.stats().num_preemptions == 2
    (leave,) = world.scheduler.placement.take_leaves()
    assert world.swap._queued_bytes == len(leave.keys) * world.engine.block_bytes
    world.swap.leave(world.engine, leave)
    assert world.swap._queued_bytes == 0, "written"
    world.swap.close()


def test_blocks_left_behind_do_not_outlive_the_engine(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=9)
    world.swap.recompute_s = lambda start, num_tokens: 1.0
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    for name, app, klass in (("low", "app", ServiceClass.BACKGROUND), ("urgent", "chat", ServiceClass.INTERACTIVE)):
        request = Request(name, app, prompt(120, 1), sampling=sampling, service_class=klass)
        world.scheduler.add(request, world.clock())
        world.step()
    assert world.swap.store.num_bytes > 0
    world.restart()
    world.swap.store.reconcile({})
    assert world.swap.store.num_bytes == 0
    world.swap.close()
