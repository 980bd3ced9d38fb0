"""What runs in the next step, and what its results mean. Pure policy: no clock, no engine, no locks.

    add(request) -> waiting --schedule--> running --postprocess--> finished        (`placement.py` has the blocks)

There is no prefill phase and no decode phase: `schedule` shares out a budget, first to running sequences that lack one
row (they stream), then to all others in order. Chunked prefill, continuous batching and recompute after preemption all
follow from "compute some of num_needed_tokens - num_computed_tokens".

The budget is milliseconds, from the cost model: a step that carries interactive rows may take `urgent_stretch` times
what it would with them alone, any other at most `max_step_s`, so that whoever comes next waits no longer; of a model
whose steps take longer than that anyway, `urgent_stretch` times what its streams take. A stream with a limit on its
time per token bounds its steps in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hob.config import SchedulerConfig
from hob.kvcache.pool import BLOCK_SIZE
from hob.kvcache.second_level import SecondLevel
from hob.messages import MAX_APPS, AppStats, Stats
from hob.pooling import Pooled
from hob.request import (
    FinishReason,
    Kind,
    OutputError,
    Place,
    Request,
    Sampled,
    Sequence,
    SequenceOutput,
    ServiceClass,
    Top,
    Usage,
)
from hob.scheduler.abandon import StepUnderWay
from hob.scheduler.admission import check_limits, check_request, sequences_of
from hob.scheduler.cost import CostModel, Work
from hob.scheduler.forecast import Forecast, is_paced, is_patient, is_waiting_worth_it, lack_of, long_step_s
from hob.scheduler.order import Order
from hob.scheduler.placement import Copy, Placement
from hob.scheduler.speculation import MARGIN, Speculation, look_up, may_draft

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACE_MARGIN = 0.9
"""Of a limit on the time per token, what a step may take: the rest is for what comes after it."""
LEAST_PART = 4
"""Rows of a prompt for which a stream's step is made longer."""


@dataclass(slots=True)
class Chunk:
    """Rows of one sequence in a step: tokens [start, start + num_rows), the last ones guessed."""

    sequence: Sequence
    start: int
    num_rows: int
    drafts: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """One past the last token computed."""
        return self.start + self.num_rows


@dataclass(slots=True)
class Plan:
    """One step."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    urgent: Work = field(default_factory=Work)
    """The part of interactive sequences: what the step would be without the others."""
    num_urgent: int = 0
    """Interactive sequences in it."""
    paced: Work = field(default_factory=Work)
    """The part of streams that must have a row in each step."""
    pace_s: float = float("inf")
    """Most seconds that a stream in it allows by its limit."""
    planned: set[int] = field(default_factory=set)
    """Identities of the sequences that have their rows: they may not be preempted any more."""
    is_held: bool = False
    """One that has waited long finds no room: nobody behind it starts before it."""

    def add(self, sequence: Sequence, num_rows: int) -> None:
        """Give a sequence its next rows."""
        start = sequence.num_computed_tokens
        self.chunks.append(Chunk(sequence, start, num_rows))
        self.planned.add(id(sequence))
        self.work = self.work.plus(start, num_rows)
        if sequence.request.service_class is ServiceClass.INTERACTIVE:
            self.urgent = self.urgent.plus(start, num_rows)
            self.num_urgent += 1
        if num_rows == 1 and is_paced(sequence):
            self.paced = self.paced.plus(start, 1)
        if sequence.request.tpot_limit_s is not None and sequence.first_token_s is not None:
            self.pace_s = min(self.pace_s, PACE_MARGIN * sequence.request.tpot_limit_s)

    def draft(self, chunk: Chunk, tokens: list[int]) -> None:
        """Give a stream rows for guessed tokens. They are no part of `urgent`: nobody's step may be longer for them.

        In the step's work each counts as MARGIN rows.
        """
        self.work = self.work.longer(chunk.end, int(MARGIN * len(tokens)))
        chunk.num_rows += len(tokens)
        chunk.drafts = tokens


@dataclass(slots=True)
class ChunkResult:
    """What the engine computed for one chunk, in the order of the plan."""

    drawn: list[Sampled] = field(default_factory=list)
    """Tokens that hold: the one drawn after the last known one, if it was wanted, and those after true guesses."""
    scores: list[float] = field(default_factory=list)
    score_tops: list[list[Top]] = field(default_factory=list)
    states: NDArray[np.float32] | None = None
    """(n, layers, hidden_size) wanted hidden states, of rows from `first_state` on."""
    first_state: int = 0
    density: list[float] | None = None
    """Attention that the last row paid to each block, if it was measured."""
    is_complete: bool = False
    """The last token ends what its grammar allows."""
    error: OutputError | None = None
    """The sequence cannot go on; the last token does not count."""


class Scheduler:
    """Owns all sequences from arrival to end. Time is passed in, in seconds of any one clock."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_blocks: int,
        context_length: int,
        vocab_size: int,
        second: SecondLevel | None = None,
        salt_of: Callable[[str], bytes] | None = None,
    ) -> None:
        """`second`: the disk tier of the prefix cache; `salt_of`: an app's lasting salt. Both optional."""
        self.config = config
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.cost = CostModel()
        self.order = Order(lambda sequence: self.forecast.filled_s(sequence))
        self.placement = Placement(num_blocks, config.max_running, config.prefix_cache, self.order, second, salt_of)
        self.forecast = Forecast(config, self.cost, self.order, self.placement)
        self.speculation = Speculation()
        self._requests: dict[str, list[Sequence]] = {}
        self._apps: dict[str, AppStats] = {}
        self._stats = Stats(num_blocks=num_blocks)
        self._num_short = 0
        """Steps of interactive streams since the last that lent its time to lesser classes."""
        self._is_spared = False
        """A step was abandoned: the next one without interactive rows runs to its end."""

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without blocks."""
        return self.placement.waiting

    @property
    def running(self) -> list[Sequence]:
        """Sequences with blocks."""
        return self.placement.running

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would find something to do."""
        return bool(self.waiting or self.running)

    def add(self, request: Request, now: float, matchers: Many[object] = ()) -> Place | None:
        """Admit a request at once. Returns its place if it has to wait, None if it starts with the next step.

        Raises InvalidRequest, ContextLengthExceeded, or Overloaded (with retry-after): the queue is full, or a
        deadline or limit of the request cannot be met.

        matchers: where each of its samples stands in the grammar, if there is one.
        """
        check_request(
            request,
            self._requests,
            vocab_size=self.vocab_size,
            context_length=min(self.context_length, self.placement.pool.max_blocks * BLOCK_SIZE),
            num_waiting=len(self.waiting),
            num_own=sum(sequence.request.app == request.app for sequence in self.waiting),
            max_waiting=self.config.max_waiting,
            retry_after_s=self.forecast.retry_after_s,
        )
        sequences = sequences_of(request, now if request.arrived_s is None else min(request.arrived_s, now))
        for sequence, matcher in zip(sequences, matchers, strict=False):
            sequence.matcher = matcher
        self.order.at(now, self.running + self.waiting + sequences)
        self.order.fairness.enter(request.app)
        try:
            place = self._place(sequences[0], now)
        finally:
            self.order.fairness.leave(request.app)
        self._requests[request.request_id] = sequences
        self.placement.waiting += sequences
        app = self._app(request.app)
        app.num_requests += 1
        app.num_prompt_tokens += len(request.token_ids)
        for sequence in sequences:
            sequence.usage.num_prompt_tokens = len(request.token_ids)
            self.order.fairness.enter(request.app)
        return place

    def _place(self, sequence: Sequence, now: float) -> Place | None:
        """Where a new sequence stands. Raises Overloaded if that breaks a deadline or limit of its request."""
        request = sequence.request
        is_in = self.forecast.fits_now(sequence)
        if is_in and request.ttft_deadline_s is None and request.tpot_limit_s is None:
            return None
        num_cached = self.placement.num_cached(sequence) if request.ttft_deadline_s is not None else 0
        place = self.forecast.place(sequence, num_cached)
        stream_s = self.forecast.stream_s(sequence) if request.tpot_limit_s is not None else 0.0
        check_limits(request, place, stream_s, waited_s=now - sequence.arrival_s)
        return None if is_in else place

    def cancel(self, request_id: str, now: float, num_kept: int | None = None) -> None:
        """End all sequences of a request and free their blocks. A request that is gone already is no error.

        num_kept: a context's turn has ended, with so many tokens of the sequence in its history. None: a turn of a
        context was given up.
        """
        for sequence in self._requests.get(request_id, []):
            if not sequence.is_finished:
                if num_kept is not None:
                    self.placement.keep_context(sequence, num_kept)
                self._finish(sequence, FinishReason.CANCELLED, now)

    def push_out(self) -> None:
        """Have all running sequences wait, but those that keep their blocks: another model's memory is wanted."""
        for sequence in list(self.running):
            if not sequence.is_kept:
                self.placement.preempt(sequence)

    def park(self) -> list[list[Sequence]]:
        """Give up all requests, between two steps: `resume` has them go on where they are.

        Returns the sequences of each.
        """
        for sequence in list(self.running):
            self.placement.preempt(sequence)
        parked, self._requests = list(self._requests.values()), {}
        for sequence in list(self.waiting):
            self.placement.remove(sequence)
            self.order.fairness.leave(sequence.request.app)
            sequence.block_keys, sequence.is_left = [], False  # both are of this cache and its disk tier
        return parked

    def resume(self, parked: list[list[Sequence]]) -> None:
        """Take in what another scheduler of the same model has parked."""
        for sequences in parked:
            self._requests[sequences[0].request.request_id] = sequences
            self._app(sequences[0].request.app)
            for sequence in sequences:
                if not sequence.is_finished:
                    self.placement.waiting.append(sequence)
                    self.order.fairness.enter(sequence.request.app)

    def schedule(self, now: float) -> Plan | None:
        """The next step, or None when there is nothing to compute. Blocks for all its rows are held when it returns."""
        self.order.at(now, self.running + self.waiting)
        plan = Plan()
        self._start_urgent(plan)
        self._plan_streams(plan)
        self._plan_others(plan)
        self._plan_drafts(plan)
        if not plan.chunks:
            return None
        self._count_short(plan)
        for chunk in plan.chunks:
            self.order.served(chunk.sequence.request.service_class)
            if chunk.sequence.first_step_s is None:
                chunk.sequence.first_step_s = now
                chunk.sequence.usage.queued_s = now - chunk.sequence.arrival_s
                self._app(chunk.sequence.request.app).num_cached_tokens += chunk.sequence.usage.num_cached_tokens
        plan.copies = self.placement.take_copies()
        return plan

    def under_way(self, plan: Plan, now: float) -> StepUnderWay:
        """The step begins: what is to be known of it by whoever might stop it."""
        may_stop = not plan.urgent.num_rows and not self._is_spared
        return StepUnderWay(now, self.cost.step_s(plan.work), may_stop)

    def abandon(self, step_s: float) -> None:
        """The step was stopped: its sequences stay where they were."""
        self._is_spared = True
        self._stats.num_abandoned += 1
        self._stats.abandoned_s += step_s

    def postprocess(self, plan: Plan, results: list[ChunkResult], step_s: float, now: float) -> list[SequenceOutput]:
        """Take in a step's results: advance, finish, fork. Returns what the clients are to be told."""
        self._stats.num_steps += 1
        self._stats.num_rows += sum(chunk.num_rows for chunk in plan.chunks)
        self._stats.step_s += step_s
        if not all(chunk.sequence.is_shallow for chunk in plan.chunks):
            self.cost.observe(plan.work, step_s)  # else it may have left out layers
        self._is_spared = self._is_spared and plan.urgent.num_rows > 0
        outputs = []
        shares = [self.cost.share(chunk.start, chunk.num_rows, len(plan.chunks)) for chunk in plan.chunks]
        scale = step_s / sum(shares)
        for chunk, result, share in zip(plan.chunks, results, shares, strict=True):
            sequence = chunk.sequence
            self._charge(chunk, share * scale)
            self.placement.advance(sequence, chunk.start, chunk.end - len(chunk.drafts))
            if result.density is not None:
                sequence.density.add(result.density, chunk.end)
            if sequence.leader is None:
                self.placement.fork(sequence, self._requests[sequence.request.request_id])
            output = self._take(chunk, result, now)
            if output is not None:
                outputs.append(output)
            if not sequence.is_finished:
                sequence.num_reached = max(sequence.num_reached, sequence.num_computed_tokens)
                if chunk.drafts:
                    self.placement.trim(sequence)
        return outputs

    def fail(self, plan: Plan, error: OutputError, now: float) -> list[SequenceOutput]:
        """A step raised: end its sequences and their siblings with the error."""
        outputs = []
        for sequence in {id(s): s for c in plan.chunks for s in self._requests[c.sequence.request.request_id]}.values():
            if not sequence.is_finished:
                output = self._finish(sequence, FinishReason.ERROR, now)
                output.error = error
                outputs.append(output)
        return outputs

    def stats(self) -> Stats:
        """State now, per app too."""
        for app in self._apps.values():
            app.num_running = app.num_waiting = 0
        waits = self.forecast.waits_s() if self.waiting else {}
        for sequence in self.running:
            self._apps[sequence.request.app].num_running += 1
        for sequence in self.waiting:
            self._apps[sequence.request.app].num_waiting += 1
        for app in self._apps.values():
            app.wait_s = waits.get(app.app, 0.0) if app.num_waiting else 0.0
        self._stats.num_drafted_tokens = self.speculation.num_drafted
        self._stats.num_accepted_tokens = self.speculation.num_accepted
        self._stats.num_running = len(self.running)
        self._stats.num_waiting = len(self.waiting)
        self._stats.num_preemptions = self.placement.num_preemptions
        self._stats.num_free_blocks = self.placement.pool.num_free
        self._stats.num_cached_blocks = self.placement.pool.num_cached
        self._stats.apps = list(self._apps.values())
        return self._stats

    def check(self) -> None:
        """Raise unless pool and block tables agree."""
        self.placement.check()

    # ---- who and how much ----

    def _start_urgent(self, plan: Plan) -> None:
        """Start what is more urgent than something that runs, before streams of lesser classes get their rows."""
        least_urgent = max((s.request.service_class for s in self.running), default=ServiceClass.INTERACTIVE)
        for sequence in self.order([s for s in self.waiting if s.request.service_class < least_urgent]):
            self._start(sequence, plan)

    def _start(self, sequence: Sequence, plan: Plan) -> bool:
        """Let a waiting sequence hold blocks, if there are any and nobody has waited for them too long."""
        if plan.is_held:
            return False
        if self.placement.start(sequence, plan.planned):
            return True
        is_led = sequence.leader is not None and not sequence.leader.is_finished
        plan.is_held = not is_led and self.order.has_waited(sequence)
        return False

    def _plan_streams(self, plan: Plan) -> None:
        """One row for each running sequence that lacks just one: paced ones always, others within the budget."""
        for sequence in sorted(self.order(self.running), key=lambda s: not is_paced(s)):
            if sequence not in self.running or sequence.is_loading or lack_of(sequence) != 1:
                continue  # preempted by one before it, or not a stream
            if not is_paced(sequence) and plan.chunks and self._rows_left(plan, sequence) < 1:
                continue
            if len(plan.chunks) < self.config.max_running and self.placement.grow(sequence, 1, plan.planned):
                plan.add(sequence, 1)

    def _plan_others(self, plan: Plan) -> None:
        """Rows for sequences that lack several, running or waiting, as long as the budget lasts."""
        candidates = [s for s in self.running if id(s) not in plan.planned and not s.is_loading] + self.waiting
        is_full = False  # for lesser classes: the pace of interactive streams bounds them alone
        for sequence in self.order(candidates):
            is_urgent = sequence.request.service_class is ServiceClass.INTERACTIVE
            if is_full and not is_urgent:
                continue
            if self._rows_left(plan, sequence) < 1:
                if is_urgent:
                    break
                is_full = True
                continue
            if sequence not in self.running and not self._start(sequence, plan):
                continue
            if sequence.is_loading:
                continue
            num_rows = min(self._rows_left(plan, sequence), lack_of(sequence))
            if num_rows < lack_of(sequence) and self._waits_for_lent(plan, sequence, num_rows):
                continue
            if num_rows > 0 and self.placement.grow(sequence, num_rows, plan.planned):
                plan.add(sequence, num_rows)

    def _plan_drafts(self, plan: Plan) -> None:
        """Rows for guesses at what streams say next, where they pay, of what is left when all others have theirs."""
        if self.config.speculation == "off":
            return
        streams = [chunk for chunk in plan.chunks if chunk.num_rows == 1 and may_draft(chunk.sequence)]
        streams = [chunk for chunk in streams if chunk.end == chunk.sequence.num_tokens]
        if not streams:
            return
        work = Work()
        for chunk in streams:
            work = work.plus(chunk.start, 1)
        token_s = self.cost.step_s(work) / len(streams)
        budget_s = min(self._long_s(plan), plan.pace_s, self._short_s(plan))
        most = self.config.max_running - len(plan.chunks)
        for chunk in streams:
            sequence, row_s = chunk.sequence, MARGIN * self.cost.row_s(chunk.end)
            most = min(most, self.config.max_step_tokens - plan.work.num_rows)
            num_fit = min(most, int((budget_s - self.cost.step_s(plan.work)) / row_s), self._num_wanted(sequence) - 1)
            num_rows = min(num_fit, self.speculation.num_rows(sequence.drafts, token_s, row_s)) if num_fit > 0 else 0
            if num_rows < 1 or not (tokens := look_up(sequence, num_rows)):
                continue
            end = self.placement.stretch(sequence, chunk.end + len(tokens))
            if end > chunk.end:
                tokens = tokens[: end - chunk.end]
                plan.draft(chunk, tokens)
                most -= len(tokens)

    def _num_wanted(self, sequence: Sequence) -> int:
        """Tokens that a stream may generate yet."""
        rest = sequence.request.sampling.max_tokens - sequence.num_generated
        return min(rest, self.context_length - sequence.num_tokens)

    def _rows_left(self, plan: Plan, sequence: Sequence) -> int:
        """Rows that the sequence may have in this step; at least one in a step that has none yet."""
        if len(plan.chunks) >= self.config.max_running:
            return 0
        spent_s = self.cost.step_s(plan.work)
        budget_s = self._long_s(plan)
        if self.order.is_starved(sequence):
            budget_s += spent_s  # once a second; less than one gap in twenty of a stream
        else:
            if sequence.request.service_class is not ServiceClass.INTERACTIVE and not self._lends(plan):
                budget_s = min(budget_s, self._short_s(plan))
            budget_s = min(budget_s, plan.pace_s)
        max_rows = self.config.max_step_tokens - plan.work.num_rows
        num_rows = self.cost.rows_within(budget_s - spent_s, sequence.num_computed_tokens, max_rows)
        return max(num_rows, 0 if plan.chunks else 1)

    def _waits_for_lent(self, plan: Plan, sequence: Sequence, num_rows: int) -> bool:
        """Whether a part of its prompt had better wait for a long step: one of background work, or of a few rows.

        A stream's step has time for few rows beside it, and each part of a prompt reads the keys before it anew: the
        stream would be slowed for next to nothing. A lent step comes soon. Rows that end a prompt do not wait.
        """
        if not plan.num_urgent or self._lends(plan) or self.order.is_starved(sequence):
            return False
        if not is_waiting_worth_it(self.config, self._long_s(plan), self._short_s(plan)):
            return False
        request = sequence.request
        is_bound = request.service_class is ServiceClass.INTERACTIVE or request.ttft_deadline_s is not None
        return is_patient(sequence) or (num_rows < LEAST_PART and not is_bound)

    def _short_s(self, plan: Plan) -> float:
        """Most seconds of a step for the sake of its interactive rows."""
        return self.config.urgent_stretch * self.cost.step_s(plan.urgent) if plan.num_urgent else float("inf")

    def _long_s(self, plan: Plan) -> float:
        """Most seconds of a step that is held back by nobody's pace."""
        return long_step_s(self.config, self.cost, plan.paced)

    def _lends(self, plan: Plan) -> bool:
        """Whether the step is the one of `lend_every` whose time lesser classes may use. A first token never waits."""
        is_turn = 0 < self.config.lend_every <= self._num_short + 1
        return is_turn and plan.urgent.num_rows == plan.num_urgent

    def _count_short(self, plan: Plan) -> None:
        is_short = plan.num_urgent and self.cost.step_s(plan.work) <= self._short_s(plan)
        self._num_short = self._num_short + 1 if is_short else 0

    # ---- what it meant ----

    def _take(self, chunk: Chunk, result: ChunkResult, now: float) -> SequenceOutput | None:
        """Add one chunk's results to its sequence. Returns what to tell the client, if anything."""
        sequence = chunk.sequence
        sequence.scores += result.scores
        sequence.score_tops += result.score_tops
        request = sequence.request
        if result.states is not None:
            sequence.pooled = sequence.pooled or Pooled(request.pools, sequence.num_tokens)
            sequence.pooled.add(result.first_state, result.states)
        if request.kind is not Kind.GENERATE:
            return self._finish(sequence, FinishReason.STOP, now) if lack_of(sequence) <= 0 else None
        if chunk.drafts:
            self.speculation.note(sequence, len(chunk.drafts), max(len(result.drawn) - 1, 0))
        output, known_end = None, chunk.end - len(chunk.drafts)
        for i, token in enumerate(result.drawn):
            if i:  # the row of the guess before it, which is true
                self.placement.advance(sequence, known_end + i - 1, known_end + i)
            is_last = i == len(result.drawn) - 1
            output = _joined(output, self._take_token(sequence, token, result if is_last else None, now))
            if sequence.is_finished:
                break
        return output

    def _take_token(self, sequence: Sequence, token: Sampled, last: ChunkResult | None, now: float) -> SequenceOutput:
        """Add one token, and what is known of the output's end if it is the chunk's last."""
        request = sequence.request
        if last is not None and last.error is not None:
            failed = self._finish(sequence, FinishReason.ERROR, now)
            failed.error = last.error
            return failed
        is_first = sequence.first_token_s is None
        if is_first:
            sequence.first_token_s = now
            if request.ttft_deadline_s is not None:
                sequence.usage.is_ttft_met = now - sequence.arrival_s <= request.ttft_deadline_s
            self._app(request.app).last_ttft_s = now - sequence.arrival_s
        sampling = request.sampling
        if token.token_id in sampling.stop_token_ids:
            stopped = self._finish(sequence, FinishReason.STOP, now)
            stopped.end = None if sampling.logprobs is None else token
            return stopped
        sequence.token_ids.append(token.token_id)
        self._app(request.app).num_output_tokens += 1
        is_full = sequence.num_generated >= sampling.max_tokens or sequence.num_tokens >= self.context_length
        if last is not None and last.is_complete:
            output = self._finish(sequence, FinishReason.STOP, now)
        elif is_full:
            output = self._finish(sequence, FinishReason.LENGTH, now)
        else:
            output = SequenceOutput(request.request_id, sequence.index)
        output.token_ids = [token.token_id]
        if is_first and output.usage is None:
            output.usage = replace(sequence.usage, prefill_s=now - (sequence.first_step_s or now))
        if sampling.logprobs is not None:
            output.logprobs, output.tops = [token.logprob], [token.tops]
        return output

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float) -> SequenceOutput:
        """End a sequence: free its blocks, close its receipt."""
        sequence.finish_reason = reason
        output = SequenceOutput(sequence.request.request_id, sequence.index, finish_reason=reason)
        output.usage = self._close_usage(sequence, now)
        if reason is FinishReason.STOP or reason is FinishReason.LENGTH:
            output.scores, output.score_tops = sequence.scores, sequence.score_tops
            if sequence.pooled:
                output.embedding = sequence.pooled.vector().tobytes()
            self.placement.keep_context(sequence, sequence.num_tokens)
        self.placement.remove(sequence)
        self.order.fairness.leave(sequence.request.app)
        siblings = self._requests[sequence.request.request_id]
        if all(sibling.is_finished for sibling in siblings):
            del self._requests[sequence.request.request_id]
        return output

    def _close_usage(self, sequence: Sequence, now: float) -> Usage:
        usage = sequence.usage
        usage.num_output_tokens = sequence.num_generated
        if sequence.first_step_s is None:
            usage.queued_s = now - sequence.arrival_s
        else:
            first_token_s = now if sequence.first_token_s is None else sequence.first_token_s
            usage.prefill_s = first_token_s - sequence.first_step_s
            usage.decode_s = now - first_token_s
        self._judge(sequence)
        return usage

    def _judge(self, sequence: Sequence) -> None:
        """Say in the receipt whether deadline and limit were met."""
        request, usage = sequence.request, sequence.usage
        if request.ttft_deadline_s is not None:
            usage.is_ttft_met = bool(usage.is_ttft_met)
            self._stats.num_deadlines += 1
            self._stats.num_deadlines_missed += not usage.is_ttft_met
        if request.tpot_limit_s is not None:
            usage.is_tpot_met = usage.decode_s <= request.tpot_limit_s * max(sequence.num_generated - 1, 0)

    def _charge(self, chunk: Chunk, seconds: float) -> None:
        """Book a chunk's time. What is computed again because memory was taken away sets its app back no further."""
        sequence, request = chunk.sequence, chunk.sequence.request
        sequence.usage.compute_s += seconds
        self._app(request.app).compute_s += seconds
        num_new = max(chunk.end - max(chunk.start, sequence.num_reached), 0)
        self.order.fairness.charge(request.app, seconds * num_new / chunk.num_rows, request.weight)

    def _app(self, app: str) -> AppStats:
        if app not in self._apps:
            if len(self._apps) >= MAX_APPS:
                busy = {sequence.request.app for sequence in self.running + self.waiting}
                if (idle := next((name for name in self._apps if name not in busy), None)) is not None:
                    del self._apps[idle]
            self._apps[app] = AppStats(app)
        return self._apps[app]


def _joined(earlier: SequenceOutput | None, output: SequenceOutput) -> SequenceOutput:
    """One output of a sequence that brings what two would."""
    if earlier is not None:
        output.token_ids = earlier.token_ids + output.token_ids
        output.logprobs = earlier.logprobs + output.logprobs
        output.tops = earlier.tops + output.tops
        output.usage = output.usage or earlier.usage
    return output
