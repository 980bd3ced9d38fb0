"""Whether an app can tell by the time to a first token what another has asked: a probe of the prefix cache.

python benchmarks/timing_probe.py --model smollm2-135m [--json]

A victim asks COUNT prompts. The prober asks the same ones (hits, if the cache were shared) and as many new ones, in
random order, each once. AUC: the probability that one of the first kind is answered sooner than one of the second,
ties half. 0.5 is chance, 1 is certainty. `other_app` is the leak; `same_app`, where the victim is the prober, is the
control: without it a probe that measures nothing would look like safety.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.metrics import roc_auc_score

import command
import machine
from lean_client import stream_completion
from service import Daemon
from workers.protocol import prompt

VOCAB_SIZE = 49152
NUM_IN = 64
TURN = 50
"""Prompts of each kind at a time: 150 of 64 tokens stay in the cache."""


async def ttft_s(socket: str, app: str, token_ids: list[int]) -> float:
    """Seconds to the end of a reply of one token."""
    body = {"model": "", "prompt": token_ids, "max_tokens": 1, "stream": True, "temperature": 0}
    start = time.perf_counter()
    await stream_completion(socket, body, {"X-Hob-App": app}, lambda _count, _now: None)
    return time.perf_counter() - start


async def probe(socket: str, victim: str, prober: str, count: int, seed: int, progress: Progress) -> dict[str, float]:
    """One probe. Every prompt is new to the daemon; seed: which ones. In turns, so that none is evicted meanwhile."""
    kinds, times = list[bool](), list[float]()
    task = progress.add_task(f"{prober} probes {victim}", total=count)
    for first in range(0, count, TURN):
        turn = range(first, min(first + TURN, count))
        known, new = ([prompt(NUM_IN, VOCAB_SIZE, seed + 2 * i + kind) for i in turn] for kind in (0, 1))
        for token_ids in known:
            await ttft_s(socket, victim, token_ids)
        asked = [(token_ids, True) for token_ids in known] + [(token_ids, False) for token_ids in new]
        random.Random(seed + first).shuffle(asked)
        for token_ids, is_known in asked:
            kinds.append(is_known)
            times.append(await ttft_s(socket, prober, token_ids))
        progress.advance(task, len(turn))
    is_hit, taken = np.array(kinds), np.array(times)
    return {
        "auc": round(float(roc_auc_score(is_hit, -taken)), 3),
        "hit_ms": round(float(np.median(taken[is_hit])) * 1e3, 2),
        "miss_ms": round(float(np.median(taken[~is_hit])) * 1e3, 2),
    }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both probes on one daemon, the control last."""
    daemon = Daemon(args.model)
    await daemon.first_token_s()
    with Progress(console=Console(stderr=True)) as progress:
        other = await probe(daemon.socket, "victim", "other", args.count, 1_000_000, progress)
        same = await probe(daemon.socket, "victim", "victim", args.count, 2_000_000, progress)
    daemon.close()
    return {"other_app": other, "same_app": same, "count": args.count, "machine": machine.describe()}


def show(result: dict[str, Any]) -> None:
    """For people."""
    title = f"{result['count']} prompts of {NUM_IN} tokens of each kind"
    table = Table("prober", "AUC", "known, ms", "new, ms", title=title)
    for who in ("other_app", "same_app"):
        table.add_row(who, *(str(result[who][key]) for key in ("auc", "hit_ms", "miss_ms")))
    Console().print(table)


def main() -> None:
    """Parse, run, print."""
    parser = command.parser_of(__doc__)
    parser.add_argument("--count", type=int, default=500, help="prompts of each kind")
    command.execute(parser, run, show)


if __name__ == "__main__":
    main()
