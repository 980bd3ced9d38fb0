"""Speculation over the fake engine: nothing lost, rejected drafts leave no trace, and it is on only where it pays."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hob.config import SchedulerConfig
from hob.engine import batching
from hob.engine.base import Sampled
from hob.engine.fake import CostModel, FakeClock, FakeEngine
from hob.engine.grammar import Grammars, Masks
from hob.request import Drafts, FinishReason, Grammar, Request, SamplingParams, Sequence, ServiceClass, Usage
from hob.scheduler.scheduler import Scheduler
from hob.scheduler.speculation import MAX_DRAFT, TRY_EVERY, Speculation, look_up
from hob.service.step import run_step

VOCAB_SIZE = 4
"""So few that three of them are often found again, and followed by the same one in a quarter of the cases."""
Script = Callable[[list[int], int], int]


@dataclass
class Got:
    """All of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def content(self) -> tuple[object, ...]:
        """What must not depend on speculation."""
        return self.token_ids, self.logprobs, self.tops, self.finish_reason


class World:
    """Engine, scheduler and virtual clock, with or without speculation."""

    def __init__(
        self,
        speculation: str,
        script: Script | None = None,
        vocab_size: int = VOCAB_SIZE,
        num_blocks: int = 256,
        masks: Masks | None = None,
        **config: float,
    ) -> None:
        self.clock = FakeClock()
        self.engine = FakeEngine(vocab_size, cost=CostModel(), sleep=self.clock.sleep, script=script)
        self.engine.open_pool(num_blocks)
        limits = SchedulerConfig(speculation=speculation, **config)  # type: ignore[arg-type]
        self.scheduler = Scheduler(limits, num_blocks, 8192, vocab_size)
        self.got: dict[tuple[str, int], Got] = {}
        self.steps_s: list[float] = []
        self._masks = masks

    def step(self) -> None:
        before = self.clock()
        for output in run_step(self.engine, self.scheduler, self.clock, masks=self._masks) or []:
            got = self.got.setdefault((output.request_id, output.index), Got())
            assert got.finish_reason is None, "more after the end"
            got.token_ids += output.token_ids
            got.logprobs += output.logprobs
            got.tops += output.tops
            got.finish_reason = output.finish_reason
            got.usage = output.usage
        self.steps_s.append(self.clock() - before)
        self.scheduler.check()
        for sequence in self.scheduler.running:
            assert sequence.num_computed_tokens <= sequence.num_tokens
            assert len(sequence.block_keys) <= sequence.num_tokens // 16, "a block is known by tokens that are not"

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()

    @property
    def contents(self) -> dict[tuple[str, int], tuple[object, ...]]:
        return {key: got.content for key, got in self.got.items()}


def traffic(rng: random.Random) -> list[Request]:
    requests = []
    for i in range(8):
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 120),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(100),
            stop_token_ids=[rng.randrange(VOCAB_SIZE)] if rng.random() < 0.2 else [],
            logprobs=rng.choice([None, 0, 2]),
        )
        request = Request(
            f"r{i}",
            rng.choice("ab"),
            rng.choices(range(VOCAB_SIZE), k=rng.randrange(1, 80)),
            adapter=rng.choice(["", "twin@0"]),
            sampling=sampling,
            num_samples=rng.choice([1, 1, 3]),
            service_class=rng.choice(list(ServiceClass)),
            prompt_logprobs=rng.choice([None, None, 1]),
        )
        requests.append(request)
    return requests


def run_traffic(seed: int, speculation: str, script: Script | None = None) -> World:
    rng = random.Random(seed)
    config = {"max_step_tokens": rng.choice([16, 512]), "max_running": rng.choice([4, 64])}
    world = World(speculation, script, num_blocks=rng.choice([20, 40, 256]), **config)
    for request in traffic(rng):
        world.scheduler.add(request, world.clock())
        for _ in range(rng.randrange(4)):
            world.step()
    world.run()
    pool = world.scheduler.placement.pool
    assert pool.num_free == pool.num_blocks, "all blocks are back"
    return world


def repetitive(token_ids: list[int], sample_index: int) -> int:
    """Of the last tokens and of how often they were there, as penalties are: mostly what was said before."""
    count = token_ids.count(token_ids[-1])
    return (token_ids[-1] + token_ids[-2 if len(token_ids) > 1 else -1] + (count % 7 == 0) + sample_index) % VOCAB_SIZE


@pytest.mark.parametrize("script", [None, repetitive])
@pytest.mark.parametrize("seed", range(12))
def test_the_output_is_the_same_with_it_and_without(seed: int, script: Script | None) -> None:
    off, auto = run_traffic(seed, "off", script), run_traffic(seed, "auto", script)
    assert auto.contents == off.contents
    assert off.scheduler.stats().num_drafted_tokens == 0


def test_the_traffic_drafts_accepts_rejects_and_preempts() -> None:
    stats = [run_traffic(seed, "auto", script).scheduler.stats() for seed in range(8) for script in (None, repetitive)]
    assert sum(s.num_accepted_tokens for s in stats) > 100
    assert sum(s.num_drafted_tokens - s.num_accepted_tokens for s in stats) > 100
    assert sum(s.num_preemptions for s in stats) > 10


def test_drafts_that_are_always_accepted_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(drafts: list[int], drawn: list[Sampled]) -> list[Sampled]:
        return [Sampled(d, s.logprob, s.tops) for d, s in zip(drafts, drawn, strict=False)] + drawn[len(drafts) :]

    monkeypatch.setattr(batching, "true_ones", all_of_them)
    assert any(run_traffic(seed, "auto").contents != run_traffic(seed, "off").contents for seed in range(5))


def test_blocks_of_rejected_drafts_that_enter_the_prefix_cache_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = World("off").scheduler.placement.__class__.advance

    def too_far(self: object, sequence: Sequence, start: int, end: int) -> None:
        advance(self, sequence, start, end + 3 if start and end - start == 1 else end)  # type: ignore[arg-type]

    monkeypatch.setattr("hob.scheduler.placement.Placement.advance", too_far)
    with pytest.raises(AssertionError):
        run_traffic(1, "auto")


def test_the_prefix_cache_has_only_tokens_that_were_said() -> None:
    """Later requests that begin like the reply of an earlier one find its blocks, and go on as without them."""
    for seed in range(3):
        prompt = random.Random(seed).choices(range(VOCAB_SIZE), k=40)
        replies = {}
        for speculation in ("off", "auto"):
            world = World(speculation)
            sampling = SamplingParams(max_tokens=100, temperature=0.0)
            world.scheduler.add(Request("first", "app", prompt, sampling=sampling), 0.0)
            world.run()
            history = prompt + world.got["first", 0].token_ids
            for cut in (50, 100, 137):
                world.scheduler.add(Request(f"r{cut}", "app", history[:cut], sampling=sampling), world.clock())
                world.run()
                usage = world.got[f"r{cut}", 0].usage
                assert usage is not None
                assert usage.num_cached_tokens >= (cut - 1) // 16 * 16
            replies[speculation] = world.contents
        assert replies["auto"] == replies["off"]


def test_cancelled_in_the_middle_it_gives_all_back() -> None:
    for num_steps in range(1, 30):
        world = World("auto")
        world.scheduler.add(Request("r", "app", [0, 1, 2, 3] * 8, sampling=SamplingParams(max_tokens=200)), 0.0)
        for _ in range(num_steps):
            world.step()
        world.scheduler.cancel("r", world.clock())
        world.scheduler.check()
        assert world.scheduler.placement.pool.num_free == 256


# ---- grammars ----

TOKENS = [bytes([byte]) for byte in b"abcdefghijklmnop"]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENS, [])


@pytest.mark.parametrize("regex", ["(ab|cd){5,40}p", "([a-d]{3}n){1,30}", "a*b*c*d{8}p", "(abc){20}"])
def test_what_a_grammar_allows_is_the_same(grammars: Grammars, regex: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "num_rows", lambda *_: 5)
    matcher = grammars.compile(Grammar(f"start: /{regex}/", "regex")).result()
    contents, num_accepted = [], 0
    for speculation in ("off", "auto"):
        world = World(speculation, vocab_size=len(TOKENS), masks=Masks(len(TOKENS)))
        for i in range(6):
            request = Request(f"r{i}", "app", [i, 3, 2], sampling=SamplingParams(max_tokens=150, seed=i))
            world.scheduler.add(request, world.clock(), [matcher.fork()] if i != 3 else ())
            world.step()
        world.run()
        contents.append(world.contents)
        num_accepted = world.scheduler.stats().num_accepted_tokens
    assert contents[0] == contents[1]
    assert any(got.finish_reason is FinishReason.STOP for got in world.got.values())
    assert num_accepted > 5


# ---- when it pays ----


def copying(token_ids: list[int], sample_index: int) -> int:
    """Says the first 200 tokens again and again, as who edits a text does. After fewer: nothing twice."""
    return token_ids[len(token_ids) % 200] if len(token_ids) >= 200 and token_ids[0] != 1 else len(token_ids) % 1000


def chatting(token_ids: list[int], sample_index: int) -> int:
    """Repeats short phrases, and goes on differently each time."""
    phrase, place = divmod(len(token_ids), 4)
    return 900 + place if place else random.Random(phrase).randrange(900)


def one_stream(speculation: str, script: Script, max_tokens: int = 400) -> World:
    world = World(speculation, script, vocab_size=1000)
    prompt = random.Random(0).sample(range(1000), k=200)
    world.scheduler.add(Request("r", "app", prompt, sampling=SamplingParams(max_tokens=max_tokens)), 0.0)
    world.run()
    return world


def test_a_copied_text_takes_a_fraction_of_the_steps_and_of_the_time() -> None:
    off, auto = one_stream("off", copying), one_stream("auto", copying)
    assert len(auto.steps_s) < len(off.steps_s) / 5
    assert auto.clock() < off.clock() / 2.5
    usage = auto.got["r", 0].usage
    assert usage is not None
    assert usage.num_accepted_tokens > 300
    assert usage.num_drafted_tokens < 420


def test_where_guesses_fail_it_stops_and_costs_next_to_nothing() -> None:
    off, auto = one_stream("off", chatting, 2000), one_stream("auto", chatting, 2000)
    assert auto.clock() < 1.02 * off.clock()
    stats = auto.scheduler.stats()
    assert 0 < stats.num_drafted_tokens < 2000 / 20


def test_it_begins_again_when_guesses_come_true() -> None:
    speculation, drafts = Speculation(), Drafts()
    sequence = Sequence(Request("r", "app", [1]), 0, [1], 0.0, drafts=drafts)
    for _ in range(20):
        speculation.note(sequence, 4, 0)
    rows = [speculation.num_rows(drafts, token_s=0.003, row_s=0.001) for _ in range(2 * TRY_EVERY)]
    assert rows.count(1) == 2, "a try now and then"
    assert sum(rows) == 2
    for _ in range(20):
        speculation.note(sequence, 1, 1)
    assert speculation.num_rows(drafts, token_s=0.003, row_s=0.001) > MAX_DRAFT // 2


def test_dear_rows_and_shared_steps_make_drafts_short() -> None:
    speculation, drafts = Speculation(), Drafts(accepted=9.0, rejected=3.0)
    rows = [speculation.num_rows(drafts, token_s=0.003, row_s=row_s) for row_s in (0.0002, 0.001, 0.002, 0.0028)]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 4
    assert rows[-1] == 0


def test_a_lesser_streams_drafts_do_not_stretch_the_steps_of_an_interactive_one() -> None:
    world = World("auto", copying, vocab_size=1000, urgent_stretch=1.45, lend_every=0)
    prompt = random.Random(0).sample(range(1000), k=200)
    sampling = SamplingParams(max_tokens=600)
    world.scheduler.add(Request("lesser", "a", prompt, sampling=sampling, service_class=ServiceClass.BACKGROUND), 0.0)
    for _ in range(40):
        world.step()
    fast = Request("urgent", "b", [1] * 8, sampling=sampling, service_class=ServiceClass.INTERACTIVE)
    world.scheduler.add(fast, world.clock())
    for _ in range(20):
        world.step()
    before = world.scheduler.stats().num_drafted_tokens
    alone_s = world.scheduler.cost.step_s(world.scheduler.schedule(world.clock()).urgent)  # type: ignore[union-attr]
    for _ in range(40):
        world.step()
        assert world.steps_s[-1] <= 1.5 * alone_s
    assert world.scheduler.stats().num_drafted_tokens > before, "it drafts all the same"


def test_a_limit_on_the_time_per_token_bounds_drafts() -> None:
    world = World("auto", copying, vocab_size=1000)
    prompt = random.Random(0).sample(range(1000), k=200)
    request = Request("r", "a", prompt, sampling=SamplingParams(max_tokens=300), tpot_limit_s=0.0075)
    world.scheduler.add(request, 0.0)
    world.run()
    assert world.scheduler.stats().num_accepted_tokens > 100
    assert max(world.steps_s[20:]) < 0.0075


# ---- looking up ----


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2, 3, 4]),
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], [5, 1, 2, 3, 5, 1]),
        ([7, 7, 7, 7], [7] * 6),
        ([1, 2, 3, 1, 2], []),
        ([1, 2], []),
        ([1], []),
        ([3, 256, 0, 0, 1, 0, 256, 0, 1], []),
        ([256, 256, 256, 9, 1, 1, 256, 256, 256], [9, 1, 1, 256, 256, 256]),
    ],
)
def test_what_followed_the_last_tokens_before(tokens: list[int], draft: list[int]) -> None:
    sequence = Sequence(Request("r", "app", tokens), 0, tokens, 0.0)
    assert look_up(sequence, 6) == draft
    sequence.token_ids = [*tokens, 400, 401, 402]
    assert look_up(sequence, 6) == [], "what came since is searched too"


def test_looking_up_equals_a_plain_search() -> None:
    rng = random.Random(1)
    for _ in range(300):
        tokens = rng.choices([0, 1, 256, 65536], k=rng.randrange(3, 40))
        starts = [i for i in range(len(tokens) - 3) if tokens[i : i + 3] == tokens[-3:]]
        expected = []
        if starts:
            expected = list(tokens)
            while len(expected) < len(tokens) + 5:
                expected.append(expected[len(expected) - len(tokens) + starts[-1] + 3])
            expected = expected[len(tokens) :]
        assert look_up(Sequence(Request("r", "app", tokens), 0, tokens, 0.0), 5) == expected
