"""What one app can learn of another's prompts: nothing by time. What the owner publishes is shared by all."""

from __future__ import annotations

from tests.unit.test_scheduler import prompt, solo

from hob.config import SchedulerConfig
from hob.engine.fake import CostModel, FakeClock, FakeEngine
from hob.kvcache.prefix import PrefixCache
from hob.request import Request, SamplingParams
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
        self.num_requests += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.scheduler.add(Request(f"r{self.num_requests}", app, token_ids, sampling=sampling), self.clock())
        tokens, num_cached = list[int](), 0
        while self.scheduler.has_work:
            for output in run_step(self.engine, self.scheduler, self.clock) or []:
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
    service.scheduler.placement.prefixes.publish(public)
    tokens, num_cached = service.ask("a", public + secret)
    assert num_cached == 0
    assert service.ask("b", public + secret) == (tokens, 64), "the public blocks of another app's request"
    assert service.ask("a", public + secret) == (tokens, 96), "all its own full blocks"
    assert tokens == solo(public + secret, 1).tokens["solo", 0]
    assert service.scheduler.placement.prefixes.num_alarms == 0


def test_only_whole_leading_blocks_of_a_published_prompt_are_public() -> None:
    cache = PrefixCache(8)
    cache.publish(prompt(40, 1))
    keys: dict[str, list[bytes]] = {"a": [], "b": []}
    for app in keys:
        cache.extend_keys(app, prompt(40, 1) + prompt(24, 2), keys[app], 64)
    assert keys["a"][:2] == keys["b"][:2]
    assert not set(keys["a"][2:]) & set(keys["b"][2:])
    shifted: list[bytes] = []
    cache.extend_keys("a", prompt(16, 3) + prompt(40, 1), shifted, 48)
    assert not set(shifted) & set(keys["a"]), "elsewhere than at the start it is not public"
