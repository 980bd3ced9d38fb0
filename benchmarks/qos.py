"""Quality of service: an interactive app beside four that never pause, on our service and on llama.cpp's server.

    python benchmarks/qos.py --model M.gguf --llama-server PATH --llama-file M.Q4_0.gguf [--json]

The interactive app sends 30 tokens, reads 64, thinks for a second. Each background app prefills 1,500 tokens and reads
64, without pause. Prompts are random ids from a fixed seed, so no cache helps anyone. A round is: interactive alone,
background alone, both; several rounds, so that a machine whose speed drifts drifts in all three. Then, ours only, four
equal apps with prompts of 50 to 2,000 tokens, for Jain's index of the compute time that the service attributes to them,
in the worst window of 5 s. The peer runs at its best n_batch, found by a short trial of each, for a bounded time.

    ttft_p95_ratio   p95 time to first token beside the others, over the same alone
    itl_p95_ratio    the same of the gaps between tokens
    background_share background tokens per second with the interactive app, over without

With --json exactly these are printed; without it a table of all that was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import os
import random
import statistics
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
ROUNDS = 4
JAIN_EACH = 8
"""Requests of each app at a time where its share is measured: a prompt must wait to be read at any time, because those
that are being answered take a row a step and could not use an equal share."""
CLOSING_S = 30.0
"""Longest wait for the first token of a prompt that is being read when a window ends."""
JSON_KEYS = ("ttft_p95_ms", "ttft_p95_ratio", "itl_p95_ratio", "background_share", "jain")
NO_STOP = {"0": -100, "1": -100, "2": -100}
"""Bias against the end tokens: every reply has its full length."""


@dataclass
class Load:
    """What one app saw."""

    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    marks: list[tuple[float, int]] = field(default_factory=list)
    """(when, tokens so far), prompt and output: at each submission, at each token, in order."""

    def add(self, now: float, num_tokens: int) -> None:
        """So many more tokens are through."""
        self.marks.append((now, (self.marks[-1][1] if self.marks else 0) + num_tokens))

    def tokens_at(self, when: float) -> float:
        """Tokens until then; a prompt is taken to be read evenly between its submission and its first token."""
        after = bisect.bisect_left(self.marks, (when, 0))
        if after in (0, len(self.marks)):
            return float(self.marks[after - 1][1]) if after else 0.0
        (a, low), (b, high) = self.marks[after - 1], self.marks[after]
        return low + (high - low) * (when - a) / max(b - a, 1e-9)


@dataclass
class Window:
    """Background tokens over a stretch of time."""

    num_tokens: float = 0.0
    seconds: float = 0.0

    async def take(self, loads: list[Load], start: float, end: float) -> None:
        """Add what the apps got between two moments."""
        last = time.perf_counter() + CLOSING_S
        while min(load.marks[-1][0] if load.marks else 0.0 for load in loads) < end and time.perf_counter() < last:
            await asyncio.sleep(0.05)
        self.num_tokens += sum(load.tokens_at(end) - load.tokens_at(start) for load in loads)
        self.seconds += end - start

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


async def stream(address: str, app: str, klass: str, prompt: list[int], num_out: int, load: Load) -> None:
    """One streamed completion."""
    body = {"model": "", "prompt": prompt, "max_tokens": num_out, "stream": True, "temperature": 0}
    last = start = time.perf_counter()
    is_first, num_seen = True, 0
    load.add(start, 0)

    def note(count: int, now: float) -> None:
        nonlocal last, is_first, num_seen
        if is_first:
            load.ttft_s.append(now - start)
            load.add(now, len(prompt))
            is_first = False
        else:
            load.gaps_s.append(now - last)
        load.add(now, count)
        num_seen += count
        last = now

    headers = {"X-Hob-App": app, "X-Hob-Class": klass}
    await stream_completion(address, body | {"logit_bias": NO_STOP}, headers, note)
    load.add(last, num_out - num_seen)  # a true guess ahead puts several tokens into one event


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Ids clear of the special ones."""
    return rng.choices(range(100, VOCAB_SIZE - 1000), k=num_tokens)


async def interactive(address: str, load: Load, rng: random.Random, num_samples: int, max_s: float) -> None:
    """The person: ask, read, think; for so many replies or so long, whatever comes first."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max_s):
            for _ in range(num_samples):
                await stream(address, "chat", "interactive", random_prompt(rng, NUM_IN), NUM_OUT, load)
                await asyncio.sleep(THINK_S)


async def saturate(address: str, index: int, load: Load, length: Callable[[random.Random], int]) -> None:
    """One request after the other of a background app, until cancelled."""
    app, rng = index % NUM_APPS, random.Random(100 + index)
    while True:
        prompt = random_prompt(rng, length(rng))
        await stream(address, f"batch{app}", "background", prompt, BACKGROUND_OUT, load)


@asynccontextmanager
async def background(address: str, length: Callable[[random.Random], int], each: int = 1) -> AsyncIterator[list[Load]]:
    """Four apps at work inside the block, warmed up; `each` requests of each at a time."""
    loads = [Load() for _ in range(NUM_APPS)]
    tasks = [asyncio.create_task(saturate(address, i, loads[i % NUM_APPS], length)) for i in range(NUM_APPS * each)]
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


async def measure(address: str, num_samples: int, max_s: float, alone_s: float, rounds: int) -> dict[str, Any]:
    """Interactive alone, background alone, both, in rounds on one server. max_s: for the phases with both."""
    rng = random.Random(1)
    await interactive(address, Load(), rng, 2, 30)
    alone, beside, undisturbed, disturbed = Load(), Load(), Window(), Window()
    for _ in range(rounds):
        await interactive(address, alone, rng, max(num_samples // 4, 20) // rounds, max_s / rounds)
        async with background(address, lambda rng: BACKGROUND_IN) as loads:
            start = time.perf_counter()
            await asyncio.sleep(alone_s / rounds)
            await undisturbed.take(loads, start, start + alone_s / rounds)
            start = time.perf_counter()
            await interactive(address, beside, rng, num_samples // rounds, max_s / rounds)
            await disturbed.take(loads, start, time.perf_counter() - 0.001)
        await asyncio.sleep(1)
    return {
        "num_samples": len(beside.ttft_s),
        "ttft_p95_ms": round(p95(beside.ttft_s) * 1e3, 1),
        "ttft_p50_ms": round(statistics.median(beside.ttft_s) * 1e3, 1),
        "ttft_alone_p95_ms": round(p95(alone.ttft_s) * 1e3, 1),
        "ttft_p95_ratio": round(p95(beside.ttft_s) / p95(alone.ttft_s), 3),
        "itl_p95_ms": round(p95(beside.gaps_s) * 1e3, 2),
        "itl_p50_ms": round(statistics.median(beside.gaps_s) * 1e3, 2),
        "itl_alone_p95_ms": round(p95(alone.gaps_s) * 1e3, 2),
        "itl_alone_p50_ms": round(statistics.median(alone.gaps_s) * 1e3, 2),
        "itl_p95_ratio": round(p95(beside.gaps_s) / p95(alone.gaps_s), 3),
        "background_tok_s": round(undisturbed.speed, 1),
        "background_share": round(disturbed.speed / undisturbed.speed, 3),
    }


async def jain(address: str, seconds: float) -> float:
    """The worst window's index: (sum x)^2 / (n sum x^2) of compute seconds; 1 is equal."""

    async def compute() -> list[float]:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            stats = (await client.get("/hob/v1/stats")).json()["stats"]
        return [app["compute_s"] for app in sorted(stats["apps"], key=lambda a: a["app"]) if "batch" in app["app"]]

    worst = 1.0
    async with background(address, lambda rng: rng.randrange(50, 2000), each=JAIN_EACH):
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


async def peer(
    args: argparse.Namespace, n_batch: int, num_samples: int, max_s: float, alone_s: float, rounds: int
) -> dict[str, Any]:
    """One measurement of llama.cpp's server."""
    command = [args.llama_server, "-m", args.llama_file or args.model, "-np", "8", "-c", str(8 * 4096)]
    command += ["-b", str(n_batch), "-ub", str(min(n_batch, 512)), "-t", "2", "--port", "11498", "--no-webui"]
    async with server(command, "127.0.0.1:11498"):
        return await measure("127.0.0.1:11498", num_samples, max_s, alone_s, rounds)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ours, then the peer."""
    result: dict[str, Any] = {"machine": machine.describe(), "peer": {}}
    before = machine.CpuTimes.now()
    with tempfile.TemporaryDirectory() as runtime:
        address = "127.0.0.1:11499"
        hob = [sys.executable, "-m", "hob.cli.main", "serve", "--model", args.model, "--port", "11499"]
        async with server([*hob, "--socket", f"{runtime}/hob.sock"], address):
            result["ours"] = await measure(address, args.samples, args.max_s, args.alone_s, args.rounds)
            result["ours"]["jain"] = await jain(address, args.alone_s)
    if args.llama_server:
        trials = {n_batch: await peer(args, n_batch, 20, args.trial_s, 10, 1) for n_batch in args.llama_batches}
        best = min(trials, key=lambda n_batch: float(trials[n_batch]["itl_p95_ms"]))
        measured = await peer(args, best, args.samples, args.peer_s, args.alone_s, 1)
        result["peer"] = {"n_batch": best, **measured}
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
    parser.add_argument("--max-s", type=float, default=900.0, help="most seconds of the phase with both")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peer-s", type=float, default=240.0, help="most seconds of the peer's phase with both")
    parser.add_argument("--trial-s", type=float, default=30.0, help="the same in the trial of each n_batch")
    parser.add_argument("--alone-s", type=float, default=60.0, help="seconds of background alone, and of Jain's")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    if args.json:
        print(json.dumps({who: {k: v for k, v in result[who].items() if k in JSON_KEYS} for who in ("ours", "peer")}))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
