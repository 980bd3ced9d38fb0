"""The default model, whole: what its file says, and perplexity and distance from float32 on real text.

The guard of all that a test with files of its own could get wrong on both sides: the order of Q and K rows, RoPE,
block formats, the tied head.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hob.config import SchedulerConfig, load_config
from hob.engine.base import Out
from hob.engine.local import LocalEngine
from hob.models.gguf import open_gguf
from hob.models.pack import Packed, ensure_packed, open_packed
from hob.models.tokenizer import Tokenizer
from hob.native import reference
from hob.request import Request, SamplingParams
from hob.scheduler.scheduler import Scheduler
from hob.scheduler.speculation import Speculation
from hob.service.step import run_step
from tests.model.runners import batch_of

pytestmark = pytest.mark.weights

WINDOW = 512
NUM_TOKENS = 20_000
LLAMA_CPP_PERPLEXITY = 28.911
"""Of the same file, ids and windows, by benchmarks/quality.py with llama-cpp-python 0.3.36."""
MAX_RATIO = 1.01


@pytest.fixture(scope="module")
def packed(default_gguf: Path) -> Packed:
    return open_packed(ensure_packed(default_gguf), verify=True)


@pytest.fixture(scope="module")
def engine(packed: Packed) -> LocalEngine:
    config, _ = load_config()
    engine = LocalEngine("smollm2-135m", packed.path, config.engine, max_rows=WINDOW)
    engine.open_pool(WINDOW // 16)
    return engine


@pytest.fixture(scope="module")
def text_ids(default_gguf: Path, shared_data: Path) -> list[int]:
    with open_gguf(default_gguf) as file:
        tokenizer = Tokenizer(file.metadata)
    text = (shared_data / "wikitext2_test_raw.txt").read_text(encoding="utf-8")
    return tokenizer.encode(text, add_bos=False)[:NUM_TOKENS]


def window_batch(ids: list[int], out: Out) -> reference.Batch:
    """All but the last id: nothing follows it that could be scored."""
    batch = batch_of(ids, out=out, blocks=list(range(WINDOW // 16)))
    batch.out[-1] = Out.NONE
    return batch


def test_what_the_file_says(packed: Packed) -> None:
    network = packed.network
    assert (network.architecture, network.num_layers, network.hidden_size, network.ffn_size) == ("llama", 30, 576, 1536)
    assert (network.num_heads, network.num_kv_heads, network.head_dim) == (9, 3, 64)
    assert (network.vocab_size, network.context_length, network.tied_head) == (49152, 8192, True)
    assert (network.rope_theta, network.rope_dim) == (100000.0, 64)
    assert packed.quantisation == "Q4_1"
    assert network.kv_bytes_per_token() == 23_040
    assert network.kv_bytes_per_token("q8") == 11_880


@pytest.mark.slow
def test_perplexity_is_that_of_llama_cpp(engine: LocalEngine, text_ids: list[int]) -> None:
    scores: list[NDArray[np.float32]] = []
    for start in range(0, len(text_ids) - WINDOW + 1, WINDOW):
        assert engine.forward(window_batch(text_ids[start : start + WINDOW], Out.SCORE)).is_done
        scores.append(engine.scores().logprob)
    perplexity = math.exp(-float(np.concatenate(scores).mean(dtype=np.float64)))
    assert perplexity == pytest.approx(LLAMA_CPP_PERPLEXITY, rel=MAX_RATIO - 1)


def test_distance_from_the_same_weights_in_float32(packed: Packed, engine: LocalEngine, text_ids: list[int]) -> None:
    """The float32 side is the NumPy reference on dequantised weights: no code of the engine's is in it."""
    model = reference.Model(packed)
    model.weights = {
        name: weight.dequantise() if isinstance(weight, reference.Codes) else weight
        for name, weight in model.weights.items()
    }
    ids = text_ids[:256]
    batch = window_batch(ids, Out.LOGITS)
    base = reference.log_softmax(model.forward(reference.KvPool(packed.network, WINDOW // 16), batch).logits)
    assert engine.forward(batch).is_done
    ours = reference.log_softmax(engine.logits())
    kl = np.einsum("rv,rv->r", np.exp(base), base - ours)
    assert kl.mean() < 0.01
    assert np.mean(ours.argmax(axis=1) == base.argmax(axis=1)) > 0.9


def test_it_goes_on_in_english(engine: LocalEngine, default_gguf: Path) -> None:
    with open_gguf(default_gguf) as file:
        tokenizer = Tokenizer(file.metadata)
    ids = tokenizer.encode("The capital of France is", add_bos=False)
    assert engine.forward(batch_of(ids, blocks=list(range(WINDOW // 16)))).is_done
    likeliest = tokenizer.decode([int(engine.logits()[-1].argmax())])
    assert likeliest == " Paris"


CODE = """def largest(items):
    found = items[0]
    for item in items:
        if item > found:
            found = item
    return found


def smallest(items):
    found = items[0]
    for item in items:
"""


def replies(engine: LocalEngine, speculation: str, prompt: list[int]) -> tuple[dict[str, list[int]], int, int]:
    """Greedy and drawn ones side by side, true guesses, and wrong ones."""
    info = engine.info
    scheduler = Scheduler(SchedulerConfig(speculation=speculation), WINDOW // 16, info.context_length, info.vocab_size)
    for name, temperature in (("greedy", 0.0), ("drawn", 0.7)):
        sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=1)
        scheduler.add(Request(name, "app", prompt, sampling=sampling), 0.0)
    said: dict[str, list[int]] = {"greedy": [], "drawn": []}
    while (outputs := run_step(engine, scheduler, lambda: 0.0)) is not None:
        for output in outputs:
            assert output.error is None
            said[output.request_id] += output.token_ids
    stats = scheduler.stats()
    return said, stats.num_accepted_tokens, stats.num_drafted_tokens - stats.num_accepted_tokens


def test_speculation_changes_no_token(engine: LocalEngine, default_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_gguf(default_gguf) as file:
        prompt = Tokenizer(file.metadata).encode(CODE, add_bos=False)
    off, *none = replies(engine, "off", prompt)
    assert none == [0, 0]
    monkeypatch.setattr(Speculation, "num_rows", lambda *_: 5)
    auto, num_accepted, num_rejected = replies(engine, "auto", prompt)
    assert auto == off
    assert num_accepted > 5
    assert num_rejected > 5
