"""`hob serve`, `hob stop`, `hob ps`."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

STOP_TIMEOUT_S = 15.0


def serve(
    model: Annotated[str | None, typer.Option(help="Catalogue name or path of a GGUF file.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port on 127.0.0.1. 0: any free one.")] = None,
    socket: Annotated[str | None, typer.Option(help="Path of the Unix socket.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads. 0: one per available core.")] = None,
    isa: Annotated[str | None, typer.Option(help="auto, portable, avx2, avx512 or amx.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log one JSON object a line.")] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground/--background", help="Stay here and log to stderr, or detach.")
    ] = True,
) -> None:
    """Start the daemon.

    \b
    hob serve                          here, until Ctrl-C
    hob serve --background             detached; logs to <home>/logs/hob.log
    hob serve --model ./my.gguf --port 0

    All settings: `hob config`.
    """
    flags = {"model": model, "port": port, "socket": socket, "threads": threads, "isa": isa, "log_json": log_json}
    from hob.config import load_config

    config, _ = load_config(flags)
    if not foreground:
        from hob.cli.background import describe, start_daemon

        print(describe(start_daemon(config, flags)))
        return
    import asyncio
    import logging

    from hob import logs
    from hob.daemon import Daemon

    logs.set_up(config.server.log_json)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    daemon = Daemon(config)
    asyncio.run(daemon.run())
    daemon.execute_anew()


def stop() -> None:
    """Stop the daemon: requests in flight get a few seconds to finish.

    \b
    hob stop
    """
    import signal

    from hob.config import load_config
    from hob.errors import ServiceError
    from hob.rundir import RunDir

    config, _ = load_config()
    rundir = RunDir(config.socket_path)
    pid = rundir.holder()
    if pid is None:
        print(f"no daemon runs on {config.socket_path}")
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pid = None
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while rundir.holder() is not None:
        if time.monotonic() > deadline:
            raise ServiceError(f"pid {pid} did not stop within {STOP_TIMEOUT_S:.0f} s. Use `kill -9 {pid}`.")
        time.sleep(0.05)
    print(f"stopped (pid {pid})")


def ps(json: Json = False) -> None:
    """Show the daemon, its memory and the apps that use it.

    \b
    hob ps
    hob ps --json | jq .apps
    """
    from hob.cli.output import print_json, print_memory, print_table
    from hob.client import Client
    from hob.config import load_config
    from hob.errors import DaemonUnreachable
    from hob.memory import processes_below
    from hob.rundir import RunDir

    config, _ = load_config()
    state = RunDir(config.socket_path).read_state()
    if state is None:
        raise DaemonUnreachable(f"no daemon runs on '{config.socket_path}'. Start one with `hob serve`.")
    with Client(config.socket_path) as client:
        answer = client.stats()
    processes = processes_below(state.pid)
    report: dict[str, Any] = {
        "pid": state.pid,
        "model": answer["model"]["name"],
        "socket": state.socket,
        "base_url": state.base_url,
        "uptime_s": answer["uptime_s"],
        "pss_bytes": sum(process.pss_bytes for process in processes),
        "processes": [{"pid": p.pid, "role": p.role, "pss_bytes": p.pss_bytes} for p in processes],
        **answer["stats"],
    }
    if json:
        print_json(report)
        return
    held = report["num_blocks"] - report["num_free_blocks"]
    print(f"{report['model']}  pid {state.pid}  up {report['uptime_s']:.0f} s  {state.base_url}  {state.socket}")
    parts = "  ".join(f"{p.role} {p.pss_bytes / 1e6:.0f} MB" for p in processes)
    print(f"memory {report['pss_bytes'] / 1e6:.0f} MB PSS ({parts})  KV blocks {held}/{report['num_blocks']} held")
    print_memory(report["memory"])
    rows = [
        [
            app["app"],
            app["num_running"],
            app["num_waiting"],
            app["num_requests"],
            f"{app['num_prompt_tokens']:,}",
            f"{app['num_cached_tokens']:,}",
            f"{app['num_output_tokens']:,}",
            f"{app['compute_s']:.1f}",
            f"{app['last_ttft_s'] * 1000:.0f}",
            f"{app['wait_s']:.1f}" if app["num_waiting"] else "",
        ]
        for app in report["apps"]
    ]
    print_table(
        [
            "app",
            "running",
            "waiting",
            "requests",
            "prompt tok",
            "cached",
            "output tok",
            "compute s",
            "TTFT ms",
            "wait s",
        ],
        rows,
    )
