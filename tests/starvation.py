"""python -m tests.starvation [--requests 100000]: does any request starve? In virtual time; prints JSON.

Eight interactive clients keep the device busy for ever, four standard and four background ones want their share too.
Each client waits for its reply before it asks again, so a fair service answers all of them in bounded time. Some
prompts need nearly all of the KV pool, which is small; a quarter of the apps state deadlines, weights differ, clients
leave early, and steps are given up. The scheduler is the real one; only the computing is made up.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import random
import time
from dataclasses import dataclass, field

from hob.config import SchedulerConfig
from hob.engine.fake import CostModel
from hob.errors import Overloaded
from hob.request import Request, Sampled, SamplingParams, ServiceClass
from hob.scheduler.scheduler import ChunkResult, Plan, Scheduler

NUM_BLOCKS = 80
LONGEST = 1000
"""Tokens of the longest prompt; the pool has 1,280."""
BOUND_S = 400.0
"""The longest prompt takes half a second of compute. The floor gives the least class some 70 ms a second, of which the
app of least weight has a twelfth: 90 s, as much again for what it still owes, and twice that for bad luck."""
EASY_BOUND_S = 60.0
"""With equal weights and short prompts."""
CLIENTS = {ServiceClass.INTERACTIVE: 8, ServiceClass.STANDARD: 4, ServiceClass.BACKGROUND: 4}
COST = CostModel()


@dataclass
class Result:
    """What came of it."""

    num_requests: int
    bound_s: float
    num_ended: int = 0
    num_refused: int = 0
    num_cancelled: int = 0
    num_steps: int = 0
    num_abandoned: int = 0
    num_preemptions: int = 0
    virtual_s: float = 0.0
    longest_wait_s: float = 0.0
    """From arrival to end, of whatever request took longest."""
    longest_by_class: dict[str, float] = field(default_factory=dict)


@dataclass(order=True)
class Call:
    """A client asks, or leaves."""

    at: float
    client: int
    leaves: str = field(default="", compare=False)


class Simulation:
    """Clients, the scheduler, and a clock that only steps move."""

    def __init__(self, num_requests: int, seed: int, has_floor: bool, is_hard: bool) -> None:
        self.rng = random.Random(seed)
        self.is_hard = is_hard
        self.result = Result(num_requests, BOUND_S if is_hard else EASY_BOUND_S)
        self.scheduler = Scheduler(SchedulerConfig(max_running=12), NUM_BLOCKS, 8192, 1000)
        if not has_floor:
            self.scheduler.order.at = lambda now, sequences: None  # type: ignore[method-assign]
        self.now = 0.0
        self.classes = [c for c, count in CLIENTS.items() for _ in range(count)]
        self.calls = [Call(0.01 * i, i) for i in range(len(self.classes))]
        self.owner: dict[str, tuple[int, float]] = {}
        self.num_asked = 0

    def run(self) -> Result:
        """Until all requests have been asked and answered."""
        result = self.result
        while self.calls or self.owner:
            while self.calls and self.calls[0].at <= self.now:
                self._call(heapq.heappop(self.calls))
            plan = self.scheduler.schedule(self.now)
            if plan is None:
                self.now = self.calls[0].at if self.calls else self.now
                continue
            self._step(plan)
            result.num_steps += 1
            if result.num_steps % 1000 == 0:
                self.scheduler.check()
            if self.now > 20 * BOUND_S + result.num_requests:
                break  # whoever is left has starved
        for client, arrived in self.owner.values():
            self._note(client, arrived)
        stats = self.scheduler.stats()
        result.num_preemptions, result.num_abandoned = stats.num_preemptions, stats.num_abandoned
        result.virtual_s = self.now
        return result

    def _call(self, call: Call) -> None:
        if call.leaves:
            if call.leaves in self.owner:
                self.scheduler.cancel(call.leaves, self.now)
                self.result.num_cancelled += 1
                self._end(call.leaves)
            return
        if self.num_asked == self.result.num_requests:
            return
        self.num_asked += 1
        name, rng = f"r{self.num_asked}", self.rng
        is_long = self.is_hard and rng.random() < 0.02
        request = Request(
            name,
            f"app{call.client}",
            [0] * (rng.randrange(LONGEST // 2, LONGEST) if is_long else rng.randrange(1, 120)),
            sampling=SamplingParams(max_tokens=rng.randrange(1, 9)),
            service_class=self.classes[call.client],
            weight=(0.5, 1.0, 4.0)[call.client % 3] if self.is_hard else 1.0,
            ttft_deadline_s=rng.choice([0.2, 2.0]) if call.client % 4 == 1 else None,
            tpot_limit_s=0.05 if call.client % 8 == 2 else None,
        )
        request.token_ids[0] = self.num_asked % 1000  # no two share a prefix for long
        self.owner[name] = (call.client, self.now)
        try:
            self.scheduler.add(request, self.now)
        except Overloaded:
            self.result.num_refused += 1
            self._end(name)
            return
        if rng.random() < 0.02:
            heapq.heappush(self.calls, Call(self.now + rng.uniform(0, 0.3), call.client, leaves=name))

    def _step(self, plan: Plan) -> None:
        rows = plan.work
        seconds = COST.step + COST.row * rows.num_rows + COST.row_context * rows.context
        seconds *= self.rng.uniform(0.9, 1.3)
        step = self.scheduler.under_way(plan, self.now)
        for call in self.calls[:1]:
            is_urgent = not call.leaves and self.classes[call.client] is ServiceClass.INTERACTIVE
            if is_urgent and call.at < self.now + seconds and step.should_stop(call.at):
                self.scheduler.abandon(call.at - self.now)
                self.now = call.at
                return
        self.now += seconds
        ends = [chunk.end - len(chunk.drafts) == chunk.sequence.num_tokens for chunk in plan.chunks]
        results = [
            ChunkResult(drawn=[Sampled(1)] * (1 + len(chunk.drafts)) if is_end else [])  # it says 1 only: guesses hold
            for chunk, is_end in zip(plan.chunks, ends, strict=True)
        ]
        for output in self.scheduler.postprocess(plan, results, seconds, self.now):
            if output.finish_reason is not None:
                self._end(output.request_id)

    def _end(self, name: str) -> None:
        client, arrived = self.owner.pop(name)
        self.result.num_ended += 1
        self._note(client, arrived)
        heapq.heappush(self.calls, Call(self.now + self.rng.uniform(0.0, 0.02), client))

    def _note(self, client: int, arrived: float) -> None:
        wait_s = self.now - arrived
        self.result.longest_wait_s = max(self.result.longest_wait_s, wait_s)
        name = self.classes[client].name.lower()
        longest = self.result.longest_by_class
        longest[name] = round(max(longest.get(name, 0.0), wait_s), 3)


def simulate(num_requests: int, seed: int = 0, *, has_floor: bool = True, is_hard: bool = True) -> Result:
    """Run it. is_hard: with long prompts that need most of the pool, and weights between 0.5 and 4."""
    return Simulation(num_requests, seed, has_floor, is_hard).run()


def main() -> int:
    """Exit status 1 if a request starved, or if the control without the floor did not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    result = simulate(given.requests, given.seed)
    control = simulate(given.requests, given.seed, has_floor=False)
    report = {**dataclasses.asdict(result), "took_s": round(time.perf_counter() - start, 1)}
    print(json.dumps({**report, "control_longest_wait_s": round(control.longest_wait_s, 1)}))
    is_right = result.num_ended == result.num_requests and result.longest_wait_s < BOUND_S
    return 0 if is_right and control.longest_wait_s > BOUND_S else 1


if __name__ == "__main__":
    raise SystemExit(main())
