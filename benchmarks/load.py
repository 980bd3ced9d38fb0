"""Many clients at once: whether any is dropped, and what the service costs beyond its engine.

python benchmarks/load.py --model smollm2-135m [--clients 200] [--seconds 300] [--json]

So many programs stream chat replies without pause, each over a connection of its own that it keeps, as OpenAI's clients
do (--close: a new one for each request); a request is dropped when its stream does not end as it should, with a finish
reason and [DONE]. The CPU time is that of the API process; the engine is another process. Two loads tell requests and
tokens apart: replies of --tokens tokens for most of the time, then of a quarter of that. With r seconds a request and t
a token,  cpu = r x requests + t x tokens  in both. Both loads stream: between two steps of many streams the engine
empties all caches, and a request that is handled then costs more than one among replies of a single token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import command
import machine
from service import NO_STOP, Daemon, cpu_s

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Tally:
    """What clients saw of one load."""

    requests: int = 0
    tokens: int = 0
    dropped: int = 0
    fault: str = ""
    """Of the first that was dropped."""


async def one(connection: Connection, index: int, max_tokens: int, tally: Tally) -> None:
    """One streamed reply, read to its end."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"Tell me of hob number {index}."}],
        "max_tokens": max_tokens,
        "stream": True,
        "logit_bias": NO_STOP,
    }
    payload = json.dumps(body).encode()
    reader, writer = connection
    writer.write(f"{HEAD}X-Hob-App: load{index % 8}\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
    data = bytearray()
    while not data.endswith(b"0\r\n\r\n") and (piece := await reader.read(65536)):
        data += piece
    tally.requests += 1
    if b" 200 OK" not in data[:20] or b'"finish_reason":"length"' not in data or b"data: [DONE]" not in data:
        tally.dropped += 1
        tally.fault = tally.fault or bytes(data[-400:]).decode("utf-8", "replace")
    else:
        tally.tokens += max_tokens  # some add no text: half a character


async def load(socket: str, clients: int, seconds: float, max_tokens: int, is_kept: bool = True) -> Tally:
    """All clients until the time is up; a request that has begun then is waited for. is_kept: their connections are."""
    tally, end = Tally(), time.perf_counter() + seconds

    async def client(index: int) -> None:
        connection = None
        while time.perf_counter() < end:
            try:
                connection = connection or await asyncio.open_unix_connection(socket)
                await one(connection, index, max_tokens, tally)
            except OSError as error:
                tally.dropped += 1
                tally.fault = tally.fault or repr(error)
                connection = None
            if connection is not None and (not is_kept or time.perf_counter() >= end):
                connection[1].close()
                connection = None

    await asyncio.gather(*(client(i) for i in range(clients)))
    return tally


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both loads on one daemon."""
    before = machine.CpuTimes.now()
    daemon = Daemon(args.model, speculation="auto")
    await daemon.first_token_s()
    await load(daemon.socket, 8, 2, 8)  # what is done once is not counted
    figures = []
    for seconds, max_tokens in ((args.seconds * 0.7, args.tokens), (args.seconds * 0.3, args.tokens // 4)):
        start = cpu_s(daemon.pids[0])
        tally = await load(daemon.socket, args.clients, seconds, max_tokens, not args.close)
        figures.append((tally, cpu_s(daemon.pids[0]) - start))
    daemon.close()
    (long, long_s), (short, short_s) = figures
    per_token_s = (long_s / long.requests - short_s / short.requests) / (
        long.tokens / long.requests - short.tokens / short.requests
    )
    per_request_s = short_s / short.requests - per_token_s * short.tokens / short.requests
    return {
        "ours": {
            "dropped": long.dropped + short.dropped,
            "cpu_ms_per_request": round(1e3 * per_request_s, 3),
            "cpu_us_per_token": round(1e6 * per_token_s, 1),
        },
        "requests": [long.requests, short.requests],
        "tokens": [long.tokens, short.tokens],
        "fault": long.fault or short.fault,
        "steal": round(before.steal_share_since(), 4),
        "machine": machine.describe(),
    }


def show(result: dict[str, Any]) -> None:
    """For people."""
    for key, value in {**result.pop("ours"), **result}.items():
        print(f"{key:20} {value}")


def main() -> None:
    """Parse, run, print."""
    parser = command.parser_of(__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tokens", type=int, default=64, help="of a reply in the first load")
    parser.add_argument("--close", action="store_true", help="a new connection for each request")
    command.execute(parser, run, show)


if __name__ == "__main__":
    main()
