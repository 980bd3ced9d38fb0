"""Clients that are many, or that do not read: the others are served, and every request ends in a clear state."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter

from hob.client import Client
from tests.daemons import Daemon, running, until

NUM_CONNECTIONS = 500


def request_of(max_tokens: int, **fields: object) -> bytes:
    body = json.dumps({"model": "fake", "prompt": [7, 8, 9], "max_tokens": max_tokens, "temperature": 0, **fields})
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def ask(path: str, gate: asyncio.Event) -> int:
    """The status of one request on a connection of its own, sent when all are connected."""
    reader, writer = await asyncio.open_unix_connection(path)
    await gate.wait()
    writer.write(request_of(2))
    reply = await reader.read()
    writer.close()
    status = int(reply.split(b" ", 2)[1])
    assert status == 200 or b'"error"' in reply
    return status


async def ask_all(path: str) -> Counter[int]:
    gate = asyncio.Event()
    tasks = [asyncio.create_task(ask(path, gate)) for _ in range(NUM_CONNECTIONS)]
    await asyncio.sleep(0.5)
    gate.set()
    return Counter(await asyncio.gather(*tasks))


def is_idle(client: Client) -> bool:
    stats = client.stats()["stats"]
    return stats["num_running"] == stats["num_waiting"] == 0 and stats["num_free_blocks"] == stats["num_blocks"] > 0


def test_five_hundred_connections_are_all_answered() -> None:
    with running(max_waiting=600) as daemon, daemon.client() as client:
        statuses = asyncio.run(ask_all(str(daemon.rundir.socket_path)))
        assert statuses == {200: NUM_CONNECTIONS}
        until(lambda: is_idle(client), "all blocks to be free")


def test_what_the_queue_does_not_hold_is_refused_at_once_and_the_rest_is_answered() -> None:
    with running(max_waiting=100, max_running=8) as daemon, daemon.client() as client:
        statuses = asyncio.run(ask_all(str(daemon.rundir.socket_path)))
        assert statuses[200] >= 80  # of one app: the rest of the queue is for others
        assert statuses[503] > 0
        assert statuses.total() == statuses[200] + statuses[503]
        until(lambda: is_idle(client), "all blocks to be free")


def silent_stream(daemon: Daemon, max_tokens: int) -> socket.socket:
    """A stream whose client reads nothing."""
    client = socket.socket(socket.AF_UNIX)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(str(daemon.rundir.socket_path))
    client.sendall(request_of(max_tokens, stream=True))
    return client


def test_clients_that_do_not_read_hold_up_nobody() -> None:
    with running(model="fake:2") as daemon, daemon.client() as client:
        silent = [silent_stream(daemon, 4000) for _ in range(8)]
        until(lambda: client.stats()["stats"]["num_running"] == 8, "the silent ones to run")
        done = threading.Event()

        def answer() -> None:
            with daemon.client() as other:
                assert other.chat("hello", max_tokens=20)["usage"]["completion_tokens"] == 20
                done.set()

        thread = threading.Thread(target=answer)
        thread.start()
        thread.join(20)
        assert done.is_set()
        for connection in silent:
            connection.close()
        until(lambda: is_idle(client), "all blocks to be free")
