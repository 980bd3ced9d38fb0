"""Quality of service: an interactive app beside four that never pause, on our service and on llama.cpp's server.

    python benchmarks/qos.py --model M.gguf --llama-server PATH --llama-file M.Q4_0.gguf [--json]

The interactive app sends 30 tokens, reads 64, thinks for a second. Each background app prefills 1,500 tokens and reads
64, without pause. Prompts are random ids from a fixed seed, so no cache helps anyone. Phases: interactive alone,
background alone, both; then, ours only, four equal apps with prompts of 50 to 2,000 tokens, for Jain's index of the
compute time that the service attributes to them in each window of 5 s.

    ttft_p95_ratio   p95 time to first token beside the others, over the same alone
    itl_p95_ratio    the same of the gaps between tokens
    background_share background tokens per second with the interactive app, over without
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

import machine
from lean_client import stream_completion

VOCAB_SIZE = 49152
NUM_APPS = 4
NUM_IN, NUM_OUT, THINK_S = 30, 64, 1.0
BACKGROUND_IN, BACKGROUND_OUT = 1500, 64
WARM_UP_S = 5.0
NO_STOP = {"0": -100, "1": -100, "2": -100}
"""Bias against the end tokens: every reply has its full length."""


@dataclass
class Load:
    """What one app saw."""

    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    """Prompt and output tokens; a prompt counts when its first token comes."""


async def stream(address: str, app: str, klass: str, prompt: list[int], num_out: int, load: Load) -> None:
    """One streamed completion."""
    body = {"model": "", "prompt": prompt, "max_tokens": num_out, "stream": True, "temperature": 0}
    last = start = time.perf_counter()
    is_first = True

    def note(count: int, now: float) -> None:
        nonlocal last, is_first
        if is_first:
            load.ttft_s.append(now - start)
            load.num_tokens += len(prompt)
            is_first = False
        else:
            load.gaps_s.append(now - last)
        load.num_tokens += count
        last = now

    headers = {"X-Hob-App": app, "X-Hob-Class": klass}
    await stream_completion(address, body | {"logit_bias": NO_STOP}, headers, note)


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Ids clear of the special ones."""
    return rng.choices(range(100, VOCAB_SIZE - 1000), k=num_tokens)


async def interactive(address: str, num_samples: int, max_s: float) -> Load:
    """The person: ask, read, think."""
    rng, load, end = random.Random(1), Load(), time.perf_counter() + max_s
    while len(load.ttft_s) < num_samples and time.perf_counter() < end:
        await stream(address, "chat", "interactive", random_prompt(rng, NUM_IN), NUM_OUT, load)
        await asyncio.sleep(THINK_S)
    return load


async def saturate(address: str, app: int, load: Load, length: Callable[[random.Random], int]) -> None:
    """One background app, until cancelled."""
    rng = random.Random(100 + app)
    while True:
        prompt = random_prompt(rng, length(rng))
        await stream(address, f"batch{app}", "background", prompt, BACKGROUND_OUT, load)


@asynccontextmanager
async def background(address: str, length: Callable[[random.Random], int], each: int = 1) -> AsyncIterator[list[Load]]:
    """Four apps at work inside the block, warmed up; `each` requests of each at a time."""
    loads = [Load() for _ in range(NUM_APPS)]
    tasks = [
        asyncio.create_task(saturate(address, i % NUM_APPS, loads[i % NUM_APPS], length))
        for i in range(NUM_APPS * each)
    ]
    await asyncio.sleep(WARM_UP_S)
    try:
        yield loads
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[min(int(0.95 * len(values)), len(values) - 1)]


async def measure(address: str, num_samples: int, max_s: float, alone_s: float) -> dict[str, Any]:
    """The three phases on one server."""
    await interactive(address, 3, 30)
    alone = await interactive(address, max(num_samples // 4, 20), max_s)
    async with background(address, lambda rng: BACKGROUND_IN) as loads:
        before, start = sum(load.num_tokens for load in loads), time.perf_counter()
        await asyncio.sleep(alone_s)
        undisturbed = (sum(load.num_tokens for load in loads) - before) / (time.perf_counter() - start)
    await asyncio.sleep(2)
    async with background(address, lambda rng: BACKGROUND_IN) as loads:
        before, start = sum(load.num_tokens for load in loads), time.perf_counter()
        beside = await interactive(address, num_samples, max_s)
        disturbed = (sum(load.num_tokens for load in loads) - before) / (time.perf_counter() - start)
    return {
        "num_samples": len(beside.ttft_s),
        "ttft_p95_ms": round(p95(beside.ttft_s) * 1e3, 1),
        "ttft_alone_p95_ms": round(p95(alone.ttft_s) * 1e3, 1),
        "ttft_p95_ratio": round(p95(beside.ttft_s) / p95(alone.ttft_s), 3),
        "itl_p95_ms": round(p95(beside.gaps_s) * 1e3, 2),
        "itl_alone_p95_ms": round(p95(alone.gaps_s) * 1e3, 2),
        "itl_p95_ratio": round(p95(beside.gaps_s) / p95(alone.gaps_s), 3),
        "background_tok_s": round(undisturbed, 1),
        "background_share": round(disturbed / undisturbed, 3),
    }


async def jain(address: str, seconds: float) -> float:
    """The worst window's index: (sum x)^2 / (n sum x^2) of compute seconds; 1 is equal."""

    async def compute() -> list[float]:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            stats = (await client.get("/hob/v1/stats")).json()["stats"]
        return [app["compute_s"] for app in sorted(stats["apps"], key=lambda a: a["app"]) if "batch" in app["app"]]

    worst = 1.0
    async with background(address, lambda rng: rng.randrange(50, 2000), each=3):
        before, end = await compute(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            await asyncio.sleep(5)
            now = await compute()
            shares = [b - a for a, b in zip(before, now, strict=True)]
            worst = min(worst, sum(shares) ** 2 / (len(shares) * sum(s * s for s in shares)))
            before = now
    return round(worst, 4)


@asynccontextmanager
async def server(command: list[str], address: str, env: dict[str, str] | None = None) -> AsyncIterator[None]:
    """A server process, up inside the block."""
    process = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            for _ in range(600):
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended with status {process.returncode}")
                try:
                    if (await client.get("/health")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(20)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ours, then the peer."""
    result: dict[str, Any] = {"machine": machine.describe(), "peer": {}}
    before = machine.CpuTimes.now()
    with tempfile.TemporaryDirectory() as runtime:
        address = "127.0.0.1:11499"
        hob = [sys.executable, "-m", "hob.cli.main", "serve", "--model", args.model, "--port", "11499"]
        async with server([*hob, "--socket", f"{runtime}/hob.sock"], address):
            result["ours"] = await measure(address, args.samples, args.max_s, args.alone_s)
            result["ours"]["jain"] = await jain(address, args.alone_s)
    if args.llama_server:
        for n_batch in args.llama_batches:
            command = [args.llama_server, "-m", args.llama_file or args.model, "-np", "8", "-c", str(8 * 4096)]
            command += ["-b", str(n_batch), "-ub", str(min(n_batch, 512)), "-t", "2", "--port", "11498", "--no-webui"]
            async with server(command, "127.0.0.1:11498"):
                peer = await measure("127.0.0.1:11498", args.samples, args.peer_s, args.alone_s)
            if not result["peer"] or peer["ttft_p95_ms"] < result["peer"]["ttft_p95_ms"]:
                result["peer"] = {"n_batch": n_batch, **peer}
    result["steal"] = round(before.steal_share_since(), 4)
    return result


def print_table(result: dict[str, Any]) -> None:
    """For people."""
    table = Table(title=f"{result['machine']['cpu']}, {result['machine']['cores']} cores, steal {result['steal']:.1%}")
    for column in ("figure", "ours", "llama.cpp server"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for key in result["ours"]:
        table.add_row(key, str(result["ours"][key]), str(result["peer"].get(key, "-")))
    Console().print(table)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF file or catalogue name for ours")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, built natively; left out: ours alone")
    parser.add_argument("--llama-file", help="GGUF file for it")
    parser.add_argument(
        "--llama-batches", type=int, nargs="*", default=[64, 256, 2048], help="n_batch; the best counts"
    )
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max-s", type=float, default=900.0, help="most seconds of one interactive phase")
    parser.add_argument("--peer-s", type=float, default=240.0, help="the same for the peer")
    parser.add_argument("--alone-s", type=float, default=60.0, help="seconds of the background phase and of Jain's")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    print(json.dumps(result)) if args.json else print_table(result)


if __name__ == "__main__":
    main()
