"""When a request would have its first token, by what steps are known to take: the answer given at admission.

    seconds = until there is room + work that goes before it / the share of a step that streams leave for it

An estimate, not a promise: it knows neither who will come nor how early others stop. It errs on the late side: what
waits is not cached, and replies run to their full length.
"""

from __future__ import annotations

from hob.config import SchedulerConfig
from hob.kvcache.pool import num_blocks_for
from hob.request import Kind, Place, Sequence, ServiceClass
from hob.scheduler.cost import CostModel, Work
from hob.scheduler.order import Order
from hob.scheduler.placement import Placement

WORTH_WAITING = 4.0
"""Background work waits for a step that is so many times as long as those of an interactive stream: of 24 steps of 3 ms
a lent one gives it 42 ms in one piece, and the others could give 2.4 ms each, most of which its keys would take. Of 24
steps of 10 ms a lent one gives 35 ms, the others 8 each."""
LEAST_SHARE = 0.1
"""Of a step that is taken to be left for work that is not streaming, however many streams there are."""


class Forecast:
    """Looks at the scheduler's state and changes none of it."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, order: Order, placement: Placement) -> None:
        self._config = config
        self._cost = cost
        self._order = order
        self._placement = placement

    def place(self, sequence: Sequence, num_cached: int) -> Place:
        """Where a new sequence, which is not among the waiting ones yet, would stand; so much of it is cached."""
        running = self._placement.running
        waiting = self._order.before(sequence, [s for s in self._placement.waiting if s.leader is None])
        reading = self._order.before(sequence, [s for s in running if lack_of(s) > 1])
        step_s, streams_s = self._pace(sequence, [s for s in running if lack_of(s) == 1])
        reading_s, waiting_s = sum(map(self.need_s, reading)), sum(map(self.need_s, waiting))
        room_s = self._room_s([*waiting, sequence], step_s, streams_s, reading_s)
        work_s = max(reading_s - room_s, 0.0) + waiting_s + self.need_s(sequence, num_cached)
        return Place(len(waiting), room_s + work_s * step_s / (step_s - streams_s))

    def waits_s(self) -> dict[str, float]:
        """For each app that waits: seconds until the last of its waiting sequences has its first token."""
        waits: dict[str, float] = {}
        order = self._order([s for s in self._placement.running if lack_of(s) > 1] + self._placement.waiting)
        streams = [s for s in self._placement.running if lack_of(s) == 1]
        work_s = 0.0
        for sequence in order:
            work_s += self.need_s(sequence)
            waits[sequence.request.app] = work_s
        if order:
            step_s, streams_s = self._pace(order[-1], streams)
            newcomers = [s for s in order if not s.block_table]
            room_s = self._room_s(newcomers, step_s, streams_s, work_s) if newcomers else 0.0
            share = 1 - streams_s / step_s
            waits = {app: room_s * wait_s / work_s + wait_s / share for app, wait_s in waits.items()}
        return waits

    def fits_now(self, sequence: Sequence) -> bool:
        """Whether it starts with the next step: nobody waits before it, and there is room."""
        return not self._order.before(sequence, self._placement.waiting) and self._missing([sequence]) == (0, 0)

    def need_s(self, sequence: Sequence, num_cached: int = 0) -> float:
        """Seconds of steps of its own until its first token."""
        start = max(sequence.num_computed_tokens, num_cached)
        rest_s = self._cost.prompt_s(start, max(sequence.num_needed_tokens - start, 1))
        return rest_s + self._cost.step_s(Work())

    def filled_s(self, sequence: Sequence) -> float:
        """The same in steps that others fill: the last rows of a prompt take as long as the step that they are in."""
        return self.need_s(sequence) + long_step_s(self._config, self._cost, Work())

    def retry_after_s(self, num_excess: int) -> float:
        """Seconds until so many of the waiting sequences will have started."""
        started = self._order(self._placement.waiting)[:num_excess]
        if not started:
            return 1.0
        step_s, streams_s = self._pace(started[0], [s for s in self._placement.running if lack_of(s) == 1])
        work_s = sum(map(self.need_s, started))
        return min(max(self._room_s(started, step_s, streams_s, work_s) + work_s, 1.0), 60.0)

    def stream_s(self, sequence: Sequence) -> float:
        """Seconds between its tokens beside those that run and must have a row in each step."""
        work = Work().plus(sequence.num_tokens, 1)
        for other in self._placement.running:
            if is_paced(other) and lack_of(other) == 1:
                work = work.plus(other.num_tokens, 1)
        return self._cost.step_s(work)

    def _pace(self, sequence: Sequence, streams: list[Sequence]) -> tuple[float, float]:
        """Most seconds of a step while it is read, and the part of them that reading the weights and streams take."""
        every, urgent, paced = Work(), Work(), Work()
        for stream in streams:
            every = every.plus(stream.num_tokens, 1)
            if stream.request.service_class is ServiceClass.INTERACTIVE:
                urgent = urgent.plus(stream.num_tokens, 1)
            if is_paced(stream):
                paced = paced.plus(stream.num_tokens, 1)
        step_s, every_s = long_step_s(self._config, self._cost, paced), self._cost.step_s(every)
        if urgent.num_rows and sequence.request.service_class is not ServiceClass.INTERACTIVE:
            urgent_s = self._cost.step_s(urgent)
            short_s = self._config.urgent_stretch * urgent_s
            if is_patient(sequence) and is_waiting_worth_it(self._config, step_s, short_s):
                lent_s = max(step_s - every_s, LEAST_SHARE * step_s) / self._config.lend_every
                return min(every_s, short_s) + lent_s, min(every_s, short_s)
            step_s, every_s = min(step_s, short_s), urgent_s  # others' streams stand back first
        return step_s, min(every_s, (1 - LEAST_SHARE) * step_s)

    def _room_s(self, newcomers: list[Sequence], step_s: float, streams_s: float, reading_s: float) -> float:
        """Seconds until those that run have left enough sequences and blocks to hold all newcomers.

        Steps are filled, up to `step_s`, while there are `reading_s` of other work; then they take `streams_s`.
        """
        num_sequences, num_blocks = self._missing(newcomers)
        seconds = 0.0
        leaving = sorted((self._num_more(s), len(s.block_table)) for s in self._placement.running)
        for num_more, held in leaving:
            if num_sequences <= 0 and num_blocks <= 0:
                break
            seconds = num_more * streams_s + min(num_more * (step_s - streams_s), reading_s)
            num_sequences -= 1
            num_blocks -= held
        return seconds

    def _missing(self, newcomers: list[Sequence]) -> tuple[int, int]:
        """Sequences and blocks that they need beyond what is free or can be taken from lesser ones."""
        can_take = [s for s in self._placement.running if self._order.may_preempt(newcomers[-1], s)]
        num_free = (
            self._placement.pool.num_free + self._placement.pool.num_bare + sum(len(s.block_table) for s in can_take)
        )
        num_left = self._config.max_running - len(self._placement.running) + len(can_take)
        num_blocks = sum(num_blocks_for(s.num_needed_tokens) for s in newcomers)
        return max(len(newcomers) - num_left, 0), max(num_blocks - num_free, 0)

    def _num_more(self, sequence: Sequence) -> int:
        """Steps until a running sequence ends, if it goes on to its limit."""
        if sequence.request.kind is not Kind.GENERATE:
            return 1
        return sequence.request.sampling.max_tokens - sequence.num_generated


def long_step_s(config: SchedulerConfig, cost: CostModel, paced: Work) -> float:
    """Most seconds of a step: `max_step_s`, or `urgent_stretch` times what its streams take, if that is more.

    paced: rows of streams that must be in it. Example: with one stream of a model of 150 ms a step it is 270 ms, of
    which 120 are for others.
    """
    return max(config.max_step_s, config.urgent_stretch * cost.step_s(paced))


def is_waiting_worth_it(config: SchedulerConfig, long_s: float, short_s: float) -> bool:
    """Whether steps are lent, and last so long beside those of a stream that lesser prompts should wait for them."""
    return config.lend_every > 0 and long_s >= WORTH_WAITING * short_s


def lack_of(sequence: Sequence) -> int:
    """Rows that it could have now."""
    return sequence.num_needed_tokens - sequence.num_computed_tokens


def is_paced(sequence: Sequence) -> bool:
    """Whether it must have a row in each step once it streams."""
    request = sequence.request
    return request.service_class is ServiceClass.INTERACTIVE or request.tpot_limit_s is not None


def is_patient(sequence: Sequence) -> bool:
    """Whether its prompt is read in the long steps that interactive streams lend, not in their own."""
    request = sequence.request
    return request.service_class is ServiceClass.BACKGROUND and request.ttft_deadline_s is None
