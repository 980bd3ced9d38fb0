"""What requests do, kept for whoever looks: those in flight, counts since start, the last two minutes, refusals.

    Edge --begin, end--> Observer --> overview (the page, `hob top`), metrics (/metrics)

A sample is taken once a second while a request is in flight or somebody watches; an idle service takes none and wakes
for nothing. It knows no wire format.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hob.api.call import Record
from hob.errors import HobError
from hob.messages import Stats

SAMPLE_S = 1.0
WINDOW_S = 120
"""How far the series reach back."""
MAX_REFUSALS = 50
TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DURATION_BOUNDS_S = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REFUSED = (401, 403, 413, 429, 503)
"""Statuses that say no to a request which was well formed."""


@dataclass(slots=True)
class Refusal:
    """A request that was not served, and why."""

    time: float
    """Unix time."""
    app: str
    endpoint: str
    status: int
    code: str
    message: str


@dataclass(slots=True)
class Sample:
    """The service at one second."""

    time: float
    """Unix time."""
    num_prompt_tokens: int
    """Since start, those of requests in flight included."""
    num_output_tokens: int
    num_running: int
    num_waiting: int
    ttfts_s: list[float]
    """Of the requests whose first output came since the sample before."""
    compute_s: dict[str, float]
    """App -> engine time since start."""


@dataclass(slots=True)
class Buckets:
    """A histogram: how many values were at most each bound."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    """One more than bounds: the last is what lies above all."""
    total: float = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Observer:
    """All of it. On the event loop's thread."""

    def __init__(self, stats_of: Callable[[], Stats]) -> None:
        self._stats_of = stats_of
        self.in_flight: dict[int, Record] = {}
        self.num_by_status: Counter[tuple[str, int]] = Counter()
        """(endpoint, status) -> requests."""
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.ttft = Buckets(TTFT_BOUNDS_S)
        self.duration = Buckets(DURATION_BOUNDS_S)
        self.samples: deque[Sample] = deque(maxlen=WINDOW_S + 1)
        self.refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self.num_refusals = 0
        self.last_active = time.monotonic()
        """When a request last began or ended."""
        self.is_stopping = False
        """Set when the service ends: streams that would go on for ever end too."""
        self._new_ttfts: list[float] = []
        self._num_watchers = 0
        self._sampler: asyncio.Task[None] | None = None

    def begin(self, record: Record) -> None:
        """A request was let in."""
        self.in_flight[id(record)] = record
        self.last_active = time.monotonic()
        self._wake()

    def end(self, record: Record, endpoint: str, status: int, error: HobError | None) -> None:
        """A request ended, or was not let in. `endpoint`: one of a bounded set, for the counts."""
        self.in_flight.pop(id(record), None)
        self.last_active = time.monotonic()
        self.num_by_status[endpoint, status] += 1
        self.duration.add(time.perf_counter() - record.started_s)
        totals = record.totals
        self.num_prompt_tokens += totals.num_prompt_tokens
        self.num_cached_tokens += totals.num_cached_tokens or 0
        self.num_output_tokens += totals.num_output_tokens
        if record.first_output_s is not None:
            self.ttft.add(record.first_output_s - record.started_s)
            self._new_ttfts.append(record.first_output_s - record.started_s)
        if error is not None and status in REFUSED:
            self.num_refusals += 1
            self.refusals.append(Refusal(time.time(), record.app, record.endpoint, status, error.code, error.message))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Samples are taken meanwhile, whether there are requests or not."""
        self._num_watchers += 1
        self._wake()
        try:
            yield
        finally:
            self._num_watchers -= 1

    def _wake(self) -> None:
        if self._sampler is None or self._sampler.done():
            self._sampler = asyncio.get_running_loop().create_task(self._sample_while_busy())

    async def _sample_while_busy(self) -> None:
        while True:
            self._take_sample()
            if not self.in_flight and not self._num_watchers:
                return
            await asyncio.sleep(SAMPLE_S)

    def _take_sample(self) -> None:
        stats, records = self._stats_of(), self.in_flight.values()
        ttfts, self._new_ttfts = self._new_ttfts, []
        sample = Sample(
            time=time.time(),
            num_prompt_tokens=self.num_prompt_tokens + sum(r.totals.num_prompt_tokens for r in records),
            num_output_tokens=self.num_output_tokens + sum(r.totals.num_output_tokens for r in records),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            ttfts_s=ttfts,
            compute_s={app.app: app.compute_s for app in stats.apps},
        )
        if self.samples and sample.time - self.samples[-1].time < SAMPLE_S / 2:
            return self._merge(sample)
        self.samples.append(sample)
        return None

    def _merge(self, sample: Sample) -> None:
        """Two samples of one second: the later one counts, with the first outputs of both."""
        sample.ttfts_s = self.samples[-1].ttfts_s + sample.ttfts_s
        sample.time = self.samples[-1].time
        self.samples[-1] = sample
