"""The daemon: wires the engine process, the API and the sockets together.

    startup     take the lock and the ports; find and pack the model; start the engine process first, because loading
                weights takes longest, and import and load the text side while it does
    main_loop   uvicorn serves one app on the Unix socket and on loopback TCP
    shutdown    stop accepting; let requests finish for a few seconds; end the engine; remove what was made,
                or (SIGUSR2) keep lock and sockets and execute the program anew: clients wait meanwhile, none is refused

An engine process that dies is replaced by `service.handle`; the daemon goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hob import __version__, systemd
from hob.assembly import choose_model, make_engine, make_server
from hob.config import Config
from hob.errors import EngineUnavailable
from hob.rundir import DaemonState, RunDir, bind_tcp, check_loopback

if TYPE_CHECKING:
    import uvicorn

    from hob.api.app_sockets import AppSockets
    from hob.service.handle import EngineHandle

log = logging.getLogger("hob.daemon")

GRACE_S = 5
"""Seconds that requests in flight have to finish after SIGTERM."""
FAREWELL_S = 3
"""Seconds that the error of those that did not finish has to reach their clients."""


class Daemon:
    """One daemon, from startup to shutdown. `run` is all a caller needs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rundir = RunDir(config.socket_path)
        self.started = time.time()
        self._sockets: list[socket.socket] = []
        self._handle: EngineHandle | None = None
        self._server: uvicorn.Server | None = None
        self._starting: asyncio.Task[uvicorn.Server] | None = None
        self._app_sockets: AppSockets | None = None
        self._passed: list[socket.socket] = []
        """Sockets of single apps that a predecessor had."""
        self._is_restarting = False
        self._watchdog_due = 0.0

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises the HobError that keeps it from starting."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._request_stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, self._request_restart)
        # A token that arrives must not push a compute thread off its core in the middle of a layer: batch threads wait
        # for an idle moment or the next tick. Not passed on to the engine process.
        os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        try:
            self._claim()
            self._starting = asyncio.create_task(self._startup())
            with contextlib.suppress(asyncio.CancelledError):
                self._server = await self._starting
                systemd.notify("READY=1", f"STATUS=serving {self.config.engine.model}")
                await self._server.serve(sockets=[each.dup() for each in self._sockets])  # its main loop
        finally:
            await self._shutdown()

    def _claim(self) -> None:
        """Take lock and sockets. From here on nobody else starts on them, and early clients wait."""
        inherited = systemd.inherit()
        if inherited.unix is not None:
            self.rundir = RunDir(Path(inherited.unix.getsockname()))
        self.rundir.prepare()
        if inherited.unix is not None:
            self.rundir.adopt(inherited.lock_fd, inherited.is_own)
        else:
            self.rundir.lock()
        self._sockets.append(inherited.unix or self.rundir.bind())
        self._passed = inherited.rest
        tcp = inherited.tcp or bind_tcp(self.config.server.host, self.config.server.port)
        check_loopback(tcp)
        self._sockets.append(tcp)
        host, port = tcp.getsockname()[:2]
        self.rundir.write_state(
            DaemonState(
                pid=os.getpid(),
                socket=str(self.rundir.socket_path),
                host=host,
                port=port,
                model=self.config.engine.model,
                started=self.started,
                version=__version__,
            )
        )

    async def _startup(self) -> uvicorn.Server:
        """Model, then engine process and text side, side by side."""
        chosen = await asyncio.to_thread(choose_model, self.config)
        self._handle = handle = make_engine(self.config, chosen)
        engine = asyncio.create_task(handle.start())
        try:
            grace_s = GRACE_S + FAREWELL_S
            server, self._app_sockets = await asyncio.to_thread(
                make_server, self.config, handle, chosen, int(self.started), grace_s, self._tick, self._passed
            )
            await engine
        finally:
            engine.cancel()
        gc.freeze()  # what startup made stays: no pass over all of it in the middle of everyone's streams
        host, port = self._sockets[1].getsockname()[:2]
        log.info("serving %s on %s and http://%s:%d/v1", chosen.name, self.rundir.socket_path, host, port)
        log.info("ready after %.2f s", time.time() - self.started)
        return server

    async def _shutdown(self) -> None:
        if self._handle is not None:
            await self._handle.stop()
        if self._is_restarting:
            return
        for listener in self._sockets:
            listener.close()
        self.rundir.release()
        if self._handle is not None:
            log.info("stopped")

    def execute_anew(self) -> None:
        """After `run`: if a restart was asked for, become the program as it is installed now, with lock and sockets."""
        if self._is_restarting:
            passed = self._sockets + (self._app_sockets.listeners if self._app_sockets else [])
            systemd.hand_over(self.rundir.lock_fd, passed, self.rundir.is_own_socket)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _tick(self, idle_s: float) -> None:
        """About once a second: tell the watchdog that the loop turns, and end if nobody has asked for long enough."""
        every_s, now = systemd.watchdog_s(), time.monotonic()
        if every_s is not None and now >= self._watchdog_due:
            self._watchdog_due = now + every_s / 2 - 1.0
            systemd.notify("WATCHDOG=1")
        if 0 < self.config.server.idle_exit_s <= idle_s and self._server is not None and not self._server.should_exit:
            log.info("nobody has asked for %.0f s: ending", idle_s)
            self._request_stop()

    def _request_restart(self) -> None:
        if self._server is None or self._server.should_exit:
            return  # it has only just begun, or is on its way out
        log.info("restarting: lock and sockets are kept")
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._is_restarting = True
        self._request_stop()

    def _request_stop(self) -> None:
        if not self._is_restarting:
            systemd.notify("STOPPING=1")
        if self._server is not None:
            self._server.force_exit = self._server.should_exit  # the second time: at once
            self._server.should_exit = True
            asyncio.get_running_loop().call_later(GRACE_S, self._end_requests)
        elif self._starting is not None:
            self._starting.cancel()

    def _end_requests(self) -> None:
        assert self._handle is not None
        self._handle.end_requests(EngineUnavailable(f"the daemon is stopping and gave this request {GRACE_S} s to end"))
