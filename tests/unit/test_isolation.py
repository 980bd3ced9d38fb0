"""What one app can learn of another's prompts: nothing by time. What the owner publishes is shared by all."""

from __future__ import annotations

from tests.unit.test_scheduler import prompt, solo

from hob.config import SchedulerConfig
from hob.engine.fake import CostModel, FakeClock, FakeEngine
from hob.kvcache.prefix import PrefixCache
from hob.request import Request, SamplingParams, SequenceOutput
from hob.scheduler.scheduler import Scheduler
from hob.service.step import run_step

NUM_PROBES = 500


class Service:
    """One engine on a virtual clock: time to the first token without any noise to hide in."""

    def __init__(self, num_blocks: int = 8192) -> None:
        self.clock = FakeClock()
        self.engine = FakeEngine(cost=CostModel(), sleep=self.clock.sleep)
        self.engine.open_pool(num_blocks)
        self.scheduler = Scheduler(SchedulerConfig(), num_blocks, 8192, 1000)
        self.num_requests = 0

    def ttft(self, app: str, token_ids: list[int]) -> float:
        start = self.clock()
        self.ask(app, token_ids)
        return round(self.clock() - start, 9)  # the clock is a sum of floats

    def ask(self, app: str, token_ids: list[int], max_tokens: int = 1) -> tuple[list[int], int]:
        """The reply, and how many tokens of the prompt were cached."""
        self.start(app, token_ids, max_tokens)
        return self.run()

    def start(self, app: str, token_ids: list[int], max_tokens: int = 1) -> None:
        """A request, not a step of it yet."""
        self.num_requests += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.scheduler.add(Request(f"r{self.num_requests}", app, token_ids, sampling=sampling), self.clock())

    def step(self) -> list[SequenceOutput]:
        """One step."""
        return run_step(self.engine, self.scheduler, self.clock) or []

    def run(self) -> tuple[list[int], int]:
        """To the end of all: see `ask`."""
        tokens, num_cached = list[int](), 0
        while self.scheduler.has_work:
            for output in self.step():
                tokens += output.token_ids
                num_cached = output.usage.num_cached_tokens if output.usage else num_cached
        return tokens, num_cached


def auc(hits: list[float], misses: list[float]) -> float:
    """Probability that a hit is faster than a miss; ties count half."""
    faster = sum((hit < miss) + 0.5 * (hit == miss) for hit in hits for miss in misses)
    return faster / (len(hits) * len(misses))


def probe(prober: str) -> float:
    """AUC of telling the victim's prompts from others by the time they take."""
    service = Service()
    for i in range(NUM_PROBES):
        service.ask("victim", prompt(64, i))
    hits = [service.ttft(prober, prompt(64, i)) for i in range(NUM_PROBES)]
    misses = [service.ttft(prober, prompt(64, NUM_PROBES + i)) for i in range(NUM_PROBES)]
    return auc(hits, misses)


def test_another_app_cannot_tell_hit_from_miss() -> None:
    assert 0.45 <= probe("attacker") <= 0.55


def test_the_same_app_can() -> None:
    """The positive control: the probe does measure the cache."""
    assert probe("victim") >= 0.95


def test_published_prompts_are_shared_and_what_follows_is_not() -> None:
    service = Service()
    public, secret = prompt(64, 1), prompt(48, 2)
    service.scheduler.placement.prefixes.publish([public])
    tokens, num_cached = service.ask("a", public + secret)
    assert num_cached == 0
    assert service.ask("b", public + secret) == (tokens, 64), "the public blocks of another app's request"
    assert service.ask("a", public + secret) == (tokens, 96), "all its own full blocks"
    assert tokens == solo(public + secret, 1).tokens["solo", 0]
    assert service.scheduler.placement.prefixes.num_alarms == 0


def probe_behind_public(prober: str) -> float:
    """AUC of telling the victim's suffixes of a public prompt from others."""
    service, public = Service(), prompt(64, 10_000)
    service.scheduler.placement.prefixes.publish([public])
    for i in range(NUM_PROBES):
        service.ask("victim", public + prompt(48, i))
    hits = [service.ttft(prober, public + prompt(48, i)) for i in range(NUM_PROBES)]
    misses = [service.ttft(prober, public + prompt(48, NUM_PROBES + i)) for i in range(NUM_PROBES)]
    return auc(hits, misses)


def test_what_follows_a_public_prompt_cannot_be_told_by_another_app() -> None:
    assert 0.45 <= probe_behind_public("attacker") <= 0.55
    assert probe_behind_public("victim") >= 0.95, "the positive control"


def test_a_public_prompt_is_a_hit_from_every_app() -> None:
    """And by time, too: this is what its owner gives away."""
    service, public = Service(), [prompt(64, i) for i in range(20)]
    service.scheduler.placement.prefixes.publish(public)
    for tokens in public:
        service.ask("first", tokens + prompt(16, 99))
    for app in ("a", "b", "c"):
        assert [service.ask(app, tokens + prompt(20, 98))[1] for tokens in public] == [64] * 20
    hits = [service.ttft("d", tokens + prompt(20, 97)) for tokens in public]
    misses = [service.ttft("d", prompt(64, 100 + i) + prompt(20, 97)) for i in range(20)]
    assert auc(hits, misses) >= 0.95


def test_a_prompt_that_is_public_no_more_is_private_at_once() -> None:
    """Also what a sequence adds that began while it was public."""
    service, public, secret = Service(), prompt(64, 1), prompt(48, 2)
    prefixes = service.scheduler.placement.prefixes
    prefixes.publish([public])
    service.start("a", public + secret)
    service.step()
    prefixes.publish([])
    service.run()
    assert service.ask("b", public + secret) == (solo(public + secret, 1).tokens["solo", 0], 0)
    prefixes.publish([public])
    assert service.ask("c", public + secret)[1] == 64, "its blocks are still there when it is public again"
    assert service.ask("a", public + secret)[1] == 96, "and so is what its own app added meanwhile"
    assert prefixes.num_alarms == 0


def test_only_whole_leading_blocks_of_a_published_prompt_are_public() -> None:
    cache = PrefixCache(8)
    cache.publish([prompt(40, 1)])
    keys: dict[str, list[bytes]] = {"a": [], "b": []}
    for app in keys:
        cache.extend_keys(app, prompt(40, 1) + prompt(24, 2), keys[app], 64)
    assert keys["a"][:2] == keys["b"][:2]
    assert not set(keys["a"][2:]) & set(keys["b"][2:])
    shifted: list[bytes] = []
    cache.extend_keys("a", prompt(16, 3) + prompt(40, 1), shifted, 48)
    assert not set(shifted) & set(keys["a"]), "elsewhere than at the start it is not public"
