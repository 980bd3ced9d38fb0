"""A bare streaming client: it shares our two cores with the server it measures, so it does nothing but count tokens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any


async def stream_completion(
    address: str, body: Mapping[str, Any], headers: Mapping[str, str], on_tokens: Callable[[int, float], None]
) -> None:
    """POST /v1/completions; call `on_tokens(count, now)` for the token events of each read, `now` from perf_counter.

    address: 'host:port', or the path of a Unix socket. An event without text (a finish, usage) is no token. Raises
    SystemExit with the reply if the server refuses.
    """
    if "/" in address:
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    payload = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    lines += [f"Content-Length: {len(payload)}", *(f"{key}: {value}" for key, value in headers.items())]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)
    is_first = True
    try:
        while data := await reader.read(65536):
            if is_first and b" 200 OK" not in data[:20]:
                raise SystemExit(f"the server answers: {data.decode()}")
            is_first = False
            if count := data.count(b"data: {") - data.count(b'"text":""'):
                on_tokens(count, time.perf_counter())
    finally:
        writer.close()
