"""`hob serve` with the engine's loop in a thread of the daemon: what two processes are measured against.

    python benchmarks/one_process.py --model smollm2-135m --socket /tmp/x.sock --port 0

The same loop and the same messages over the same kind of socket pair; only the process is one. `benchmarks/service.py`
runs it in turn with the real daemon. Not for use: an engine that crashes takes the daemon along.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading

from hob.cli.main import main
from hob.service import loop
from hob.service.connection import EngineConnection
from hob.service.handle import EngineHandle


async def spawn_thread(handle: EngineHandle) -> EngineConnection:
    """In place of `EngineHandle._spawn`. A child that sleeps stands for the process that the handle supervises."""
    ours, theirs = socket.socketpair()
    handle._process = subprocess.Popen(["sleep", "1000"])
    threading.Thread(target=loop.main, args=(theirs.detach(), handle.spec), daemon=True).start()
    connection = EngineConnection(handle._deliver)
    await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=ours)
    handle._connection = connection
    return connection


if __name__ == "__main__":
    EngineHandle._spawn = spawn_thread  # type: ignore[method-assign]
    sys.argv[1:1] = ["serve"]
    main()
