"""What a grammar costs: tokens per second of constrained streams beside free ones, through the Unix socket.

python benchmarks/structured.py --model smollm2-135m [--json]

Free and constrained rounds by turns on one daemon, greedy, the same prompts and as many tokens. Constrained output is
JSON by a schema with two open strings and a number; a reply that ends is followed by the next until the round is full.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import command
import machine
from lean_client import stream_completion
from service import NO_STOP, Daemon

NUM_OUT = 128
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "text": {"type": "string"},
            "n": {"type": "number"},
        },
        "required": ["name", "text", "n"],
        "additionalProperties": False,
    },
    "minItems": 50,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMA}}


async def stream(socket: str, index: int, fields: dict[str, Any]) -> list[float]:
    """Times of the tokens of one stream."""
    body = {"model": "", "prompt": f"Item {index}. A list in JSON:", "max_tokens": NUM_OUT, "stream": True}
    times: list[float] = []
    await stream_completion(
        socket,
        body | {"temperature": 0.8, "seed": index, "logit_bias": NO_STOP} | fields,
        {"X-Hob-App": "bench"},
        lambda count, now: times.extend([now] * count),
    )
    return times


async def speed(socket: str, num_streams: int, fields: dict[str, Any]) -> float:
    """Tokens per second while all streams run."""
    streams = await asyncio.gather(*(stream(socket, i, fields) for i in range(num_streams)))
    begin, end = max(s[0] for s in streams), min(s[-1] for s in streams)
    return sum(sum(begin < t <= end for t in s) for s in streams) / (end - begin)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    before = machine.CpuTimes.now()
    daemon = Daemon(args.model)
    await daemon.first_token_s()
    start = time.perf_counter()
    await stream(daemon.socket, 0, {"response_format": FORMAT, "max_tokens": 1})
    first_s = time.perf_counter() - start
    result: dict[str, Any] = {"first_grammar_s": round(first_s, 3)}
    for num_streams in (1, 16):
        free, constrained = [], []
        for _ in range(args.rounds):
            free.append(await speed(daemon.socket, num_streams, {}))
            constrained.append(await speed(daemon.socket, num_streams, {"response_format": FORMAT}))
        result[f"free_{num_streams}"] = round(statistics.median(free), 1)
        result[f"constrained_{num_streams}"] = round(statistics.median(constrained), 1)
        ratios = [c / f for c, f in zip(constrained, free, strict=True)]
        result[f"share_{num_streams}"] = round(statistics.median(ratios), 3)
    daemon.close()
    return result | {"steal": round(before.steal_share_since(), 4), "machine": machine.describe()}


def show(result: dict[str, Any]) -> None:
    """For people."""
    for key, value in result.items():
        print(f"{key:18} {value}")


def main() -> None:
    """Parse, run, print."""
    parser = command.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    command.execute(parser, run, show)


if __name__ == "__main__":
    main()
