"""Quality of service in virtual time: pace of streams, time to first token, fairness, starvation."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from hob.config import SchedulerConfig
from hob.engine.fake import CostModel as FakeCost
from hob.engine.fake import FakeClock, FakeEngine
from hob.request import Request, SamplingParams, ServiceClass
from hob.scheduler.cost import CostModel, Work
from hob.scheduler.scheduler import Scheduler
from hob.service.step import run_step

INTERACTIVE, BACKGROUND = ServiceClass.INTERACTIVE, ServiceClass.BACKGROUND


@dataclass
class Device:
    """A service in virtual time that notes when each token came."""

    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_blocks: int = 2048

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.engine = FakeEngine(cost=FakeCost(), sleep=self.clock.sleep)
        self.engine.open_pool(self.num_blocks)
        self.scheduler = Scheduler(self.scheduler_config, self.num_blocks, 8192, 1000)
        self.times: dict[str, list[float]] = {}
        self.arrivals: dict[str, float] = {}
        self.done: set[str] = set()
        self.rng = random.Random(0)

    def add(self, name: str, num_prompt: int, max_tokens: int, service_class: ServiceClass, app: str = "app") -> None:
        tokens = self.rng.choices(range(1000), k=num_prompt)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = Request(name, app, tokens, sampling=sampling, service_class=service_class)
        self.scheduler.add(request, self.clock())
        self.arrivals[name] = self.clock()

    def step(self) -> None:
        outputs = run_step(self.engine, self.scheduler, self.clock)
        if outputs is None:
            self.clock.sleep(0.001)
        for output in outputs or []:
            if output.token_ids:
                self.times.setdefault(output.request_id, []).append(self.clock())
            if output.finish_reason:
                self.done.add(output.request_id)

    def run_until(self, *names: str) -> None:
        for _ in range(100_000):
            if self.done.issuperset(names):
                return
            self.step()
        raise AssertionError(f"{set(names) - self.done} did not end")

    def gaps(self, name: str) -> list[float]:
        times = self.times[name]
        return sorted(b - a for a, b in pairwise(times))

    def ttft(self, name: str) -> float:
        return self.times[name][0] - self.arrivals[name]


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


@pytest.mark.parametrize("truth", [FakeCost(), FakeCost(0.02, 0.002, 1e-6), FakeCost(0.001, 0.0001, 1e-8)])
def test_the_cost_model_learns_the_machine(truth: FakeCost) -> None:
    rng, cost = random.Random(1), CostModel()
    for _ in range(400):
        rows, start = rng.choice([1, 4, 16, 100]), rng.randrange(2000)
        work = Work().plus(start, rows)
        seconds = truth.step + truth.row * rows + truth.row_context * work.context
        if rng.random() < 0.05:
            seconds *= 10  # a core was taken away
        cost.observe(work, seconds * rng.uniform(0.95, 1.05))
    for rows, start in ((1, 100), (64, 0), (200, 1000)):
        work = Work().plus(start, rows)
        assert cost.step_s(work) == pytest.approx(
            truth.step + truth.row * rows + truth.row_context * work.context, rel=0.25
        )
        budget = truth.row * 50
        assert cost.rows_within(budget, 0, 512) == pytest.approx(50, rel=0.3)


def test_a_stream_keeps_its_pace_while_a_long_prompt_is_read() -> None:
    alone, beside = Device(), Device()
    for device in (alone, beside):
        device.add("warm", 500, 50, INTERACTIVE)
        device.run_until("warm")
        device.add("chat", 30, 200, INTERACTIVE)
        for _ in range(10):
            device.step()
    beside.add("long", 4000, 10, BACKGROUND, "other")
    alone.run_until("chat")
    beside.run_until("chat", "long")
    assert p95(beside.gaps("chat")) <= 2 * p95(alone.gaps("chat"))


def test_without_the_budget_the_stream_would_stall() -> None:
    """The control of the test above: the detector cries when the budget is off."""
    device = Device(SchedulerConfig(max_step_s=10.0, urgent_stretch=1000.0))
    device.add("chat", 30, 200, INTERACTIVE)
    for _ in range(10):
        device.step()
    device.add("long", 4000, 10, BACKGROUND, "other")
    device.run_until("chat", "long")
    assert device.gaps("chat")[-1] > 10 * device.gaps("chat")[0]


def test_a_newcomer_waits_for_one_step_at_most() -> None:
    device = Device()
    for i in range(4):
        for j in range(3):
            device.add(f"bg{i}.{j}", 1500, 64, BACKGROUND, f"app{i}")
    waits = []
    for i in range(20):
        for _ in range(5):
            device.step()
        device.add(f"chat{i}", 30, 8, INTERACTIVE, "chat")
        device.run_until(f"chat{i}")
        waits.append(device.ttft(f"chat{i}"))
    assert p95(waits) < 0.1


def test_backlogged_apps_get_equal_time_in_every_window() -> None:
    device = Device()
    apps = ["a", "b", "c", "d"]
    rng = random.Random(2)
    count = 0

    def refill() -> None:
        nonlocal count
        backlog = {app.app: app.num_waiting + app.num_running for app in device.scheduler.stats().apps}
        for app in apps:
            while backlog.get(app, 0) < 3:
                device.add(f"{app}{count}", rng.randrange(50, 2000), 32, ServiceClass.STANDARD, app)
                backlog[app] = backlog.get(app, 0) + 1
                count += 1

    def compute() -> list[float]:
        return [stats.compute_s for stats in sorted(device.scheduler.stats().apps, key=lambda s: s.app)]

    refill()
    before = compute()
    for _ in range(6):
        end = device.clock() + 5.0
        while device.clock() < end:
            refill()
            device.step()
        now = compute()
        shares = [b - a for a, b in zip(before, now, strict=True)]
        before = now
        assert sum(shares) ** 2 / (4 * sum(s * s for s in shares)) >= 0.95, shares


def test_the_least_class_is_not_starved() -> None:
    device = Device()
    device.add("low", 64, 4, BACKGROUND, "low")
    for i in range(300):
        device.add(f"high{i}", 400, 8, INTERACTIVE, "high")
    device.run_until("low")
    assert len(device.done) < 300
    assert device.clock() < 10
