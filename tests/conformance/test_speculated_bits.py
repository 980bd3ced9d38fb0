"""The compute core with speculation and without: equal to the last bit, in every way of drawing, under preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.needs import needs
from tests.tiny import TinyShape, write_tiny_gguf

from hob import native
from hob.config import EngineConfig, SchedulerConfig
from hob.engine.grammar import Grammars, Masks
from hob.engine.local import LocalEngine
from hob.models.pack import ensure_packed
from hob.request import Grammar, Request, SamplingParams, SequenceOutput
from hob.scheduler.scheduler import Scheduler
from hob.scheduler.speculation import Speculation
from hob.service.step import run_step

needs("llguidance")

VOCAB_SIZE = 259
NUM_BLOCKS = 24
"""Half of what the sequences take."""
PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 3, 4, 5, 6, 7]
WAYS = [
    SamplingParams(max_tokens=60, temperature=0.0, logprobs=2),
    SamplingParams(max_tokens=60, temperature=0.4, seed=1, logprobs=0),
    SamplingParams(max_tokens=60, temperature=0.0, repetition_penalty=1.02, logprobs=0),
    SamplingParams(max_tokens=60, temperature=0.5, frequency_penalty=0.01, presence_penalty=0.1, top_k=8, seed=2),
    SamplingParams(max_tokens=60, temperature=0.3, top_p=0.9, min_p=0.01, logit_bias={5: 1.0}, logprobs=3, seed=3),
]


@pytest.fixture(params=[f"{isa}-{kv}" for isa in native.available_isas() for kv in ("f16", "q8")])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalEngine]:
    isa, kv_type = request.param.split("-")
    shape = TinyShape(hidden_size=128, num_heads=2, num_kv_heads=1)
    packed = ensure_packed(write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_1", shape=shape))
    made = LocalEngine("tiny", packed, EngineConfig(isa=isa, threads=2, kv_type=kv_type), 512)
    made.open_pool(NUM_BLOCKS)
    yield made
    made.close()


def generate(engine: LocalEngine, speculation: str) -> tuple[dict[str, list[object]], int, int]:
    """What each request brought, true guesses, and wrong ones."""
    scheduler = Scheduler(SchedulerConfig(speculation=speculation), NUM_BLOCKS, 2048, VOCAB_SIZE)
    grammar = Grammars([bytes([i % 256]) for i in range(VOCAB_SIZE)], []).compile(
        Grammar("start: /([a-d]{2}[e-h]){8,}/", "regex")
    )
    said: dict[str, list[object]] = {}

    def take(outputs: list[SequenceOutput] | None) -> None:
        for output in outputs or []:
            assert output.error is None
            said.setdefault(output.request_id, []).extend(output.token_ids)
            said.setdefault(f"{output.request_id}, log p", []).extend(output.logprobs)
            said.setdefault(f"{output.request_id}, likeliest", []).extend(output.tops)

    masks = Masks(VOCAB_SIZE)
    for i, params in enumerate(WAYS):
        for name, matchers in ((f"free{i}", []), (f"bound{i}", [grammar.result().fork()])):
            scheduler.add(Request(name, "app", PROMPT[i:] + [20 + i] * 3, sampling=params), 0.0, matchers)
            take(run_step(engine, scheduler, lambda: 0.0, masks=masks))
    while scheduler.has_work:
        take(run_step(engine, scheduler, lambda: 0.0, masks=masks))
        scheduler.check()
    stats = scheduler.stats()
    assert stats.num_preemptions > 0
    return said, stats.num_accepted_tokens, stats.num_drafted_tokens - stats.num_accepted_tokens


def test_the_same_bits(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    off, *none = generate(engine, "off")
    assert none == [0, 0]
    monkeypatch.setattr(Speculation, "num_rows", lambda *_: 5)
    auto, num_accepted, num_rejected = generate(engine, "auto")
    assert auto == off
    assert num_accepted > 20
    assert num_rejected > 20
