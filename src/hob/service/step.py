"""One step: plan -> batch -> forward -> sample -> results. The only place where scheduler and engine meet."""

from __future__ import annotations

from collections.abc import Callable

from hob.engine.base import Engine
from hob.engine.batching import build_batch, collect, draws_of, wants_token
from hob.engine.grammar import Masks, Matcher
from hob.errors import HobError, InternalError
from hob.kvcache.swap import Swap
from hob.request import OutputError, Sequence, SequenceOutput
from hob.scheduler.abandon import StepUnderWay
from hob.scheduler.scheduler import ChunkResult, Plan, Scheduler


def run_step(
    engine: Engine,
    scheduler: Scheduler,
    clock: Callable[[], float],
    swap: Swap | None = None,
    watch: Callable[[StepUnderWay | None], None] = lambda step: None,
    masks: Masks | None = None,
) -> list[SequenceOutput] | None:
    """Schedule and compute one step. Returns what the clients are to be told; None if there was nothing to compute.

    A step that raises ends its sequences with the error and leaves all others as they were. `watch` is told when the
    computing begins, and with None that it has ended; whoever watches may call `engine.stop`.
    """
    start = clock()
    if swap is not None:
        pump(engine, scheduler, swap)
    plan = scheduler.schedule(start)
    if swap is not None:
        for leave in scheduler.placement.take_leaves():
            swap.leave(engine, leave)
        for load in scheduler.placement.take_loads():
            swap.begin(engine, load)
    if plan is None:
        return None
    try:
        watch(scheduler.under_way(plan, clock()))
        results = compute(engine, plan, masks)
    except (HobError, RuntimeError, ValueError, MemoryError) as error:
        name = type(error).__name__ if isinstance(error, HobError) else InternalError.__name__
        return scheduler.fail(plan, OutputError(name, f"the step failed: {error}"), clock())
    finally:
        watch(None)
    now = clock()
    step_s = max(now - start, 0.0)  # a clock that is set back must not hand out time
    if results is None:
        scheduler.abandon(step_s)
        return []
    return scheduler.postprocess(plan, results, step_s, now)


def pump(engine: Engine, scheduler: Scheduler, swap: Swap) -> None:
    """Move blocks between memory and disk, between two steps."""
    finished = swap.pump(engine, scheduler.placement.prefixes.find, is_idle=not scheduler.has_work)
    for load in finished:
        scheduler.placement.loaded(load)


def compute(engine: Engine, plan: Plan, masks: Masks | None = None) -> list[ChunkResult] | None:
    """Run a plan's rows. None: the step was abandoned and nothing it wrote counts.

    masks: of the sequences that have a grammar, made while the rows are computed.
    """
    for copy in plan.copies:
        engine.copy_block(copy.source, copy.destination, copy.num_tokens)
    batch = build_batch(plan.chunks, engine.info.num_layers, engine.adapters)
    drawing = [i for i, chunk in enumerate(plan.chunks) if wants_token(chunk)]
    matchers = [_matcher_of(plan.chunks[i].sequence) for i in drawing]
    filling = None
    if masks is not None and any(matchers):
        filling = masks.begin(matchers, [plan.chunks[i].drafts for i in drawing])
    if not engine.forward(batch).is_done:
        return None
    draws = draws_of(plan.chunks)
    sampled = engine.sample(draws, filling.result() if filling is not None else None) if draws else []
    results = [ChunkResult() for _ in plan.chunks]
    collect(engine, plan.chunks, batch, sampled, results)
    if masks is not None and filling is not None:
        ends = masks.accept(matchers, [[token.token_id for token in results[i].drawn] for i in drawing])
        for i, ended in zip(drawing, ends, strict=True):
            if ended is None:
                continue
            del results[i].drawn[ended.at + 1 :]
            results[i].is_complete = ended.error is None
            results[i].error = OutputError.of(ended.error) if ended.error is not None else None
    return results


def _matcher_of(sequence: Sequence) -> Matcher | None:
    matcher = sequence.matcher
    assert matcher is None or isinstance(matcher, Matcher)
    return matcher
