"""How benchmarks/engine.py talks to an engine under test: one JSON line in, one out, until standard input ends.

    {"figure": "prefill", "n": 512}              -> {"tok_s": 1234.5}
    {"figure": "decode", "n": 16, "context": 80} -> {"tok_s": 1234.5}

A worker keeps its model loaded, so that rounds of several engines can take turns. Needs the standard library only:
peers run in an environment of their own.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable

DECODE_STEPS = 32
"""Steps of one decode measurement; the context named is the one at its middle."""

SETTLE_S = 0.3
"""Pause before a measurement: thread pools of the engine before may spin for a while after their work."""
LEAST_S = 0.5
"""A measurement is repeated for this long and its median counts: 128 tokens alone take some 60 ms."""


def prompt(num_tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Random ids, clear of the special tokens at the vocabulary's start."""
    return random.Random(seed).choices(range(100, vocab_size - 1000), k=num_tokens)


def serve(measure: Callable[[str, int, int, int], float]) -> None:
    """Answer measurements with `measure(figure, n, context, seed) -> tok/s`.

    The seed is a new one each time: an engine that caches prefixes must not find the last prompt again.
    """
    seed = 0
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        time.sleep(SETTLE_S)
        samples, end = [], time.perf_counter() + LEAST_S
        while not samples or time.perf_counter() < end:
            seed += 1000
            samples.append(measure(task["figure"], task["n"], task.get("context", 0), seed))
        print(json.dumps({"tok_s": statistics.median(samples)}), flush=True)
