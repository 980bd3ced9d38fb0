"""The scheduler over the fake engine, whose digests make any mistake of blocks, order or recompute visible."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest

from hob.config import SchedulerConfig
from hob.engine.fake import CostModel, FakeClock, FakeEngine
from hob.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from hob.messages import MAX_APPS
from hob.request import FinishReason, Kind, Pool, Request, SamplingParams, SequenceOutput, ServiceClass
from hob.scheduler.scheduler import Scheduler
from hob.service.step import run_step


class World:
    """An engine, a scheduler and a clock; outputs gathered by (request, index)."""

    def __init__(self, num_blocks: int = 64, **config: object) -> None:
        self.clock = FakeClock()
        self.engine = FakeEngine(cost=CostModel(), sleep=self.clock.sleep)
        self.engine.open_pool(num_blocks)
        self.scheduler = Scheduler(SchedulerConfig(**config), num_blocks, 8192, 1000)  # type: ignore[arg-type]
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.last: dict[tuple[str, int], SequenceOutput] = {}

    def add(self, request_id: str, token_ids: list[int], max_tokens: int = 8, **fields: object) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = Request(request_id, str(fields.pop("app", "app")), token_ids, sampling=sampling, **fields)  # type: ignore[arg-type]
        self.scheduler.add(request, self.clock())

    def step(self) -> None:
        for output in run_step(self.engine, self.scheduler, self.clock) or []:
            key = (output.request_id, output.index)
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason:
                assert key not in self.last, "a sequence ended twice"
                self.last[key] = output
        self.scheduler.check()

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("work is left")


def solo(token_ids: list[int], max_tokens: int = 8, **fields: object) -> World:
    world = World(num_blocks=512, prefix_cache=False, max_step_tokens=4096, max_step_s=100.0)
    world.add("solo", token_ids, max_tokens, **fields)
    world.run()
    return world


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def test_one_request() -> None:
    world = solo(prompt(20, 0))
    assert len(world.tokens["solo", 0]) == 8
    assert world.last["solo", 0].finish_reason is FinishReason.LENGTH
    usage = world.last["solo", 0].usage
    assert usage is not None
    assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens) == (20, 0, 8)


@pytest.mark.parametrize("seed", range(20))
def test_interleaved_equals_solo_under_memory_pressure(seed: int) -> None:
    rng = random.Random(seed)
    world = World(num_blocks=rng.choice([14, 20, 40]), max_step_tokens=rng.choice([16, 64, 512]), max_step_s=0.01)
    shared = prompt(40, 99)
    expected = {}
    for i in range(12):
        tokens = (shared[: rng.randrange(41)] if rng.random() < 0.5 else []) + prompt(
            rng.randrange(1, 60), 1000 * seed + i
        )
        count = rng.randrange(1, 30)
        world.add(f"r{i}", tokens, count, app=rng.choice("ab"), service_class=rng.choice(list(ServiceClass)))
        expected[f"r{i}", 0] = solo(tokens, count).tokens["solo", 0]
        for _ in range(rng.randrange(4)):
            world.step()
    world.run()
    assert world.tokens == expected
    assert world.scheduler.placement.pool.num_free == world.scheduler.placement.pool.num_blocks


def test_memory_pressure_does_preempt() -> None:
    world = World(num_blocks=10)
    for i in range(4):
        world.add(f"r{i}", prompt(30, i), 40)
    world.run()
    assert world.scheduler.stats().num_preemptions > 0
    for i in range(4):
        assert world.tokens[f"r{i}", 0] == solo(prompt(30, i), 40).tokens["solo", 0]


def test_samples_share_the_prompt() -> None:
    world = World()
    world.add("n", prompt(39, 1), 4, num_samples=5)
    world.run()
    rows = world.scheduler.stats().num_rows
    assert rows == 39 + 4 + 5 * 3, "the prompt once, its last row per sample, then the outputs"
    assert dict(world.tokens.items()) == dict.fromkeys(
        [("n", i) for i in range(5)], solo(prompt(39, 1), 4).tokens["solo", 0]
    )


def test_continuations_are_scored_as_if_alone() -> None:
    tokens, continuations = prompt(35, 2), [prompt(n, n) for n in (1, 3, 2, 7)]
    world = World()
    world.add("c", tokens, kind=Kind.SCORE, continuations=continuations)
    world.run()
    for i, continuation in enumerate(continuations):
        alone = solo(tokens + continuation, kind=Kind.SCORE, prompt_logprobs=0)
        assert world.last["c", i].scores == alone.last["solo", 0].scores[-len(continuation) :]


@pytest.mark.parametrize("num_blocks", [8, 9, 12, 40])
def test_many_continuations_in_little_memory(num_blocks: int) -> None:
    tokens, continuations = prompt(70, 3), [prompt(5 + n % 20, n) for n in range(30)]
    world = World(num_blocks=num_blocks, max_running=6)
    world.add("c", tokens, kind=Kind.SCORE, continuations=continuations)
    world.run()
    for i, continuation in enumerate(continuations):
        alone = solo(tokens + continuation, kind=Kind.SCORE, prompt_logprobs=0)
        assert world.last["c", i].scores == alone.last["solo", 0].scores[-len(continuation) :]


def test_echo_scores_survive_chunks_and_preemption() -> None:
    world = World(num_blocks=9, max_step_tokens=16)
    for i in range(3):
        world.add(f"e{i}", prompt(100, i), kind=Kind.SCORE, prompt_logprobs=2, service_class=ServiceClass(i))
        world.step()
    world.run()
    for i in range(3):
        alone = solo(prompt(100, i), kind=Kind.SCORE, prompt_logprobs=2).last["solo", 0]
        assert len(alone.scores) == 99
        assert world.last[f"e{i}", 0].scores == alone.scores
        assert world.last[f"e{i}", 0].score_tops == alone.score_tops


def test_echo_and_generate() -> None:
    world = solo(prompt(33, 4), 5, prompt_logprobs=0)
    assert len(world.last["solo", 0].scores) == 32
    assert world.tokens["solo", 0] == solo(prompt(33, 4), 5).tokens["solo", 0]


POOLS = [Pool(), Pool("max", 10, 40), Pool("last", 3, 18), Pool("mean", 17, 18)]


@pytest.mark.parametrize("config", [{"max_step_tokens": 16}, {"max_step_tokens": 7, "num_blocks": 8}])
def test_pooled_states_have_the_same_bits_in_chunks_and_after_preemption(config: dict[str, int]) -> None:
    chunked = World(**config)  # type: ignore[arg-type]
    for i in range(3):
        chunked.add(f"e{i}", prompt(50, i), kind=Kind.EMBED, pools=POOLS, layers=[0, 1], service_class=ServiceClass(i))
        chunked.add(f"g{i}", prompt(20, i), 40)
        chunked.step()
    chunked.run()
    for i in range(3):
        alone = solo(prompt(50, i), kind=Kind.EMBED, pools=POOLS, layers=[0, 1])
        assert chunked.last[f"e{i}", 0].embedding == alone.last["solo", 0].embedding


def test_what_the_pools_are() -> None:
    def states(how: str, start: int, end: int) -> np.ndarray:
        found = solo(prompt(50, 5), kind=Kind.EMBED, pools=[Pool(how, start, end)], layers=[0, 1])
        return np.frombuffer(found.last["solo", 0].embedding, np.float32).reshape(2, 8)

    rows = np.stack([states("last", i, i + 1) for i in range(50)])
    assert np.allclose(states("mean", 10, 40), rows[10:40].mean(axis=0), rtol=1e-6)
    assert np.array_equal(states("max", 10, 40), rows[10:40].max(axis=0))
    assert np.array_equal(states("last", 10, 40), rows[39])
    assert np.allclose((rows[:, 0] ** 2).mean(axis=1), 1.0, atol=1e-3), "states below the last are scaled"


def test_the_last_token_alone_lets_the_prefix_come_from_the_cache() -> None:
    world = World()
    for name in ("cold", "warm"):
        world.add(name, prompt(64, 6), kind=Kind.EMBED, pools=[Pool("last")])
        world.run()
    usage = world.last["warm", 0].usage
    assert usage is not None
    assert usage.num_cached_tokens == 48
    assert world.last["warm", 0].embedding == world.last["cold", 0].embedding


def test_blocks_of_which_layers_may_be_missing_are_not_shared() -> None:
    world = World()
    for name in ("cold", "warm"):
        world.add(name, prompt(64, 6), kind=Kind.EMBED, pools=[Pool("last")], layers=[0])
        world.run()
    usage = world.last["warm", 0].usage
    assert usage is not None
    assert usage.num_cached_tokens == 0


@pytest.mark.parametrize("pool", [Pool("sum"), Pool("mean", 5, 5), Pool("mean", 0, 51), Pool("last", 0, 0)])
def test_pools_outside_the_prompt_are_refused(pool: Pool) -> None:
    with pytest.raises(InvalidRequest, match="pool"):
        World().add("e", prompt(50, 5), kind=Kind.EMBED, pools=[pool])


def test_one_token_prompts() -> None:
    assert solo([7], kind=Kind.SCORE, prompt_logprobs=0).last["solo", 0].scores == []
    assert len(solo([7], kind=Kind.EMBED).last["solo", 0].embedding) == 8 * 4
    assert len(solo([7], 3).tokens["solo", 0]) == 3


def test_prefix_cache_hits_within_an_app_only() -> None:
    world = World()
    tokens = prompt(64, 6)
    for request_id, app in (("cold", "a"), ("warm", "a"), ("other", "b")):
        world.add(request_id, tokens, app=app)
        world.run()
    cached = {key[0]: output.usage.num_cached_tokens for key, output in world.last.items() if output.usage}
    assert cached == {"cold": 0, "warm": 48, "other": 0}
    assert world.tokens["cold", 0] == world.tokens["warm", 0] == world.tokens["other", 0]


def test_urgent_classes_go_first() -> None:
    world = World(num_blocks=512, max_step_tokens=64)
    world.add("slow", prompt(2000, 7), 2, service_class=ServiceClass.BACKGROUND)
    world.step()
    world.add("fast", prompt(30, 8), 2, service_class=ServiceClass.INTERACTIVE)
    world.step()
    assert len(world.tokens["fast", 0]) == 1
    assert not world.tokens.get(("slow", 0))


def test_an_urgent_request_takes_blocks_from_a_lesser_class() -> None:
    world = World(num_blocks=8)
    world.add("slow", prompt(100, 9), 20, service_class=ServiceClass.BACKGROUND)
    world.step()
    world.add("fast", prompt(60, 10), 2, service_class=ServiceClass.INTERACTIVE)
    world.step()
    assert len(world.tokens["fast", 0]) == 1
    world.run()
    assert world.tokens["slow", 0] == solo(prompt(100, 9), 20).tokens["solo", 0]


def test_apps_share_the_time_evenly() -> None:
    world = World(num_blocks=512, max_step_tokens=64, max_running=8)
    for i in range(12):
        world.add(f"many{i}", prompt(300, i), 4, app="many")
    for i in range(3):
        world.add(f"few{i}", prompt(300, 100 + i), 4, app="few")
    while ("few2", 0) not in world.last:
        world.step()
    apps = {app.app: app.compute_s for app in world.scheduler.stats().apps}
    assert apps["few"] / apps["many"] == pytest.approx(1.0, rel=0.25)


def test_numbers_are_kept_of_so_many_apps_and_of_all_that_are_busy() -> None:
    world = World(num_blocks=512)
    world.add("busy", prompt(20, 0), 400, app="busy")
    for i in range(MAX_APPS + 20):
        world.add(f"r{i}", prompt(20, 1), 1, app=f"app{i}")
        while (f"r{i}", 0) not in world.last:
            world.step()
    names = [app.app for app in world.scheduler.stats().apps]
    assert names == ["busy", *(f"app{i}" for i in range(21, MAX_APPS + 20))]
    world.run()
    assert len(world.tokens["busy", 0]) == 400


def test_cancel_frees_everything_before_the_next_step() -> None:
    world = World()
    world.add("gone", prompt(50, 11), 100, num_samples=3)
    world.step()
    world.step()
    world.scheduler.cancel("gone", world.clock())
    world.scheduler.check()
    assert not world.scheduler.has_work
    assert world.scheduler.placement.pool.num_free == world.scheduler.placement.pool.num_blocks


@pytest.mark.parametrize("num_steps", range(12))
def test_cancelling_the_leader_at_any_time_leaves_the_others_right(num_steps: int) -> None:
    world = World(num_blocks=20, max_step_tokens=16)
    world.add("a", prompt(50, 12), 6, num_samples=3)
    world.add("b", prompt(50, 13), 6)
    for _ in range(num_steps):
        world.step()
    world.scheduler.cancel("a", world.clock())
    world.run()
    assert world.tokens["b", 0] == solo(prompt(50, 13), 6).tokens["solo", 0]


@pytest.mark.parametrize("step", range(1, 8))
def test_a_step_that_raises_ends_its_own_sequences_only(step: int) -> None:
    world = World(num_blocks=40, max_step_tokens=32)
    world.engine.fail_at_step = step
    for i in range(3):
        world.add(f"r{i}", prompt(40, i), 4)
        world.step()
    world.run()
    failed = {key for key, output in world.last.items() if output.finish_reason is FinishReason.ERROR}
    assert failed
    assert len(world.last) == 3
    for i in range(3):
        if (f"r{i}", 0) not in failed:
            assert world.tokens[f"r{i}", 0] == solo(prompt(40, i), 4).tokens["solo", 0]
    assert world.scheduler.placement.pool.num_free == 40


def test_stop_tokens_end_a_sequence_and_stay_out_of_it() -> None:
    tokens = solo(prompt(20, 14)).tokens["solo", 0]
    world = World()
    sampling = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=[tokens[3]])
    world.scheduler.add(Request("s", "app", prompt(20, 14), sampling=sampling), 0.0)
    world.run()
    assert world.tokens["s", 0] == tokens[:3]
    assert world.last["s", 0].finish_reason is FinishReason.STOP


def test_one_app_does_not_fill_the_queue() -> None:
    world = World(num_blocks=4, max_waiting=100)

    def held_by(app: str) -> int:
        with suppress(Overloaded):
            for i in range(100):
                world.add(f"{app}{i}", [1], app=app)
        return sum(sequence.request.app == app for sequence in world.scheduler.waiting)

    assert held_by("greedy") == 89
    assert 5 < held_by("second") < 11
    world.add("modest", [1], app="modest")
    world.scheduler.cancel("modest", 0.0)
    with pytest.raises(Overloaded, match="89 sequences of this app wait; the 1 places left of 100 are for others"):
        world.add("more", [1], app="greedy")


def test_refusals_name_the_numbers() -> None:
    world = World(num_blocks=4, max_waiting=2)
    with pytest.raises(ContextLengthExceeded, match="prompt has 60 tokens and max_tokens is 8: 68 in all.*64"):
        world.add("long", prompt(60, 0))
    with pytest.raises(InvalidRequest, match="token ids span 0 to 1000. Expected 0 to 999"):
        world.add("token", [0, 1000])
    with pytest.raises(InvalidRequest, match="0 tokens"):
        world.add("empty", [])
    world.add("a", [1])
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        world.add("a", [1])
    world.add("b", [1])
    with pytest.raises(Overloaded, match="the queue is full: 2 sequences wait") as caught:
        world.add("c", [1])
    assert caught.value.retry_after_s
