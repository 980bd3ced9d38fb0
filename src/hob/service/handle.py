"""The engine process as the API process holds it: start it, talk to it, replace it when it dies.

    starting --Ready--> serving --dies--> starting ...      a process that fails before Ready is not retried at once

Requests in flight when it dies end with EngineUnavailable; requests that come while it starts wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from hob.errors import EngineUnavailable, HobError, InternalError, error_from_name
from hob.messages import (
    Answer,
    AskContexts,
    Cancel,
    ContextKv,
    DropContext,
    Failed,
    ForkContext,
    FromEngine,
    Lease,
    LeasesEnded,
    LoadModel,
    ModelInfo,
    ModelSpec,
    Need,
    Publish,
    Ready,
    Report,
    SetBudget,
    SetLease,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    ToModels,
    Unloaded,
    UnloadModel,
    Vocabulary,
)
from hob.request import Request
from hob.service.connection import EngineConnection
from hob.service.ledger import Ledger
from hob.service.loop import EngineSpec
from hob.service.outputs import Outputs
from hob.service.public_prompts import PublicPrompts
from hob.service.watchdog import HUNG_STATUS

log = logging.getLogger("hob.service")

START_TIMEOUT_S = 120.0
SHUTDOWN_TIMEOUT_S = 5.0
RESTART_DELAYS_S = (0.0, 0.5, 2.0, 10.0)
"""Pause before each restart in a row; a process that became ready starts the row anew."""


class EngineHandle:
    """Backend over an engine process. All methods on one event loop."""

    def __init__(self, spec: EngineSpec, public_prompts: PublicPrompts | None = None) -> None:
        """public_prompts: what all apps share; each process is told before its first request. None: nothing."""
        self.spec = spec
        self.public_prompts = public_prompts
        self.vocabulary: Callable[[str], Vocabulary] | None = None
        """What grammars of a model (empty: the default) are about, made when the first one comes."""
        self._known_vocabularies: set[str] = set()
        """Of which models the present process was told."""
        self.num_restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: EngineConnection | None = None
        self._outputs: dict[str, Outputs] = {}
        self._ready: Ready | None = None
        self._model: ModelInfo | None = None
        self._is_ready = asyncio.Event()
        self._failure: HobError | None = None
        self._reported: HobError | None = None
        """What the present process said it failed with."""
        self._stats = Stats()
        self._loaded: dict[str, ModelInfo] = {}
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._call_ids = itertools.count(1)
        self.on_unloaded: Callable[[str], None] = lambda name: None
        """Told the name of each model whose memory was given back."""
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def model(self) -> ModelInfo:
        """The loaded model; its context is no longer than the KV pool. Raises EngineUnavailable while none is.

        It stays known while a dead process is replaced: requests that come then wait rather than fail.
        """
        if self._failure is not None or self._model is None:
            raise self._failure or EngineUnavailable("the engine is starting", retry_after_s=1.0)
        return self._model

    @property
    def stats(self) -> Stats:
        """The latest report of the engine process."""
        return self._stats

    @property
    def pid(self) -> int | None:
        """Process id of the engine, None while there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises the HobError it failed with."""
        self._supervisor = asyncio.create_task(self._supervise())
        await self._wait_ready()

    async def stop(self) -> None:
        """End the process: politely, then not."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        process = self._process
        if process is None or process.poll() is not None:
            return
        with contextlib.suppress(OSError, RuntimeError, EngineUnavailable):  # it may not have come so far
            self._send(Shutdown())
        try:
            await asyncio.to_thread(process.wait, SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        self._close()

    def end_requests(self, error: HobError) -> None:
        """End all requests in flight with an error."""
        for outputs in self._outputs.values():
            outputs.put(error)

    def submit(self, request: Request) -> Outputs:
        """See `backend.Backend.submit`."""
        return Outputs(request, self._begin, self._end)

    async def load(self, spec: ModelSpec, need: Need) -> ModelInfo:
        """See `backend.Backend`."""
        if spec.name not in self._loaded:
            answer = await self._call(lambda call_id: LoadModel(call_id, spec, need))
            assert answer.model is not None
            self._loaded[spec.name] = answer.model
            if spec not in self.spec.others:
                self.spec.others.append(spec)  # the next engine process knows it from the start
        return self._loaded[spec.name]

    async def unload(self, name: str) -> None:
        """See `backend.Backend`."""
        await self._call(lambda call_id: UnloadModel(call_id, name))

    async def set_lease(self, app: str, name: str, lease: Lease | None) -> None:
        """See `backend.Backend`. It holds for the engine processes to come, too."""
        await self._call(lambda call_id: SetLease(call_id, app, name, lease))
        self._note_lease(app, name, lease)

    async def set_budget(self, budget_bytes: int) -> None:
        """See `backend.Backend`. It holds for the engine processes to come, too."""
        if self._failure is None:
            await self._call(lambda call_id: SetBudget(call_id, budget_bytes))
        else:
            Ledger(budget_bytes)  # raises; the old budget may be what keeps a process from starting
        self.spec.budget_bytes = budget_bytes

    def fork_context(self, app: str, parent_id: str, child_id: str) -> None:
        """See `backend.Backend`. An engine that is starting may have read the histories before: it is told as well."""
        if self._connection is not None:
            self._send(ForkContext(app, parent_id, child_id))

    def drop_context(self, app: str, context_id: str) -> None:
        """See `backend.Backend`. An engine that is starting is told as well."""
        if self._connection is not None:
            self._send(DropContext(app, context_id))

    async def context_kv(self, app: str, context_ids: list[str]) -> dict[str, ContextKv]:
        """See `backend.Backend`."""
        if self._ready is None or not context_ids:
            return {}
        return (await self._call(lambda call_id: AskContexts(call_id, app, context_ids))).contexts

    def publish(self, model: str, prompts: list[list[int]]) -> None:
        """See `backend.Backend`. An engine that is starting is told of all when it is ready."""
        if self._ready is not None:
            self._send(Publish(model, prompts))

    def _note_lease(self, app: str, name: str, lease: Lease | None) -> None:
        if lease is None:
            self.spec.leases.get(name, {}).pop(app, None)
        else:
            self.spec.leases.setdefault(name, {})[app] = lease

    # ---- requests ----

    async def _begin(self, outputs: Outputs) -> None:
        await self._wait_ready()
        if outputs.request.grammar is not None and outputs.request.model not in self._known_vocabularies:
            await self._tell_vocabulary(outputs.request.model)
        self._outputs[outputs.request.request_id] = outputs
        self._send(Submit(outputs.request))

    async def _tell_vocabulary(self, model: str) -> None:
        if self.vocabulary is None:
            raise InternalError("this daemon has no vocabulary to check a grammar against")
        connection, vocabulary = self._connection, await asyncio.to_thread(self.vocabulary, model)
        await self._wait_ready()
        if connection is self._connection and model not in self._known_vocabularies:
            self._known_vocabularies.add(model)
            self._send(vocabulary)
        elif model not in self._known_vocabularies:
            await self._tell_vocabulary(model)  # the process died meanwhile: its successor knows nothing

    def _end(self, outputs: Outputs, is_complete: bool) -> None:
        was_sent = self._outputs.pop(outputs.request.request_id, None) is not None
        if was_sent and not is_complete and self._connection is not None:
            self._send(Cancel(outputs.request.request_id, outputs.num_kept))

    async def _call(self, message_of: Callable[[int], ToModels]) -> Answer:
        """Ask the engine process and wait for its answer. Raises the error it answers with."""
        await self._wait_ready()
        call_id = next(self._call_ids)
        self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(message_of(call_id))
            answer = await self._calls[call_id]
        finally:
            del self._calls[call_id]
        if answer.error is not None:
            told = answer.error
            error = error_from_name(told.name, told.message, told.retry_after_s, told.param)
            error.room_bytes = answer.room_bytes
            raise error
        return answer

    # ---- the process ----

    async def _wait_ready(self) -> None:
        if not self._is_ready.is_set():  # it nearly always is, and a wait with a limit makes a task and a timer
            try:
                await asyncio.wait_for(self._is_ready.wait(), START_TIMEOUT_S)
            except TimeoutError:
                raise EngineUnavailable(f"the engine was not ready after {START_TIMEOUT_S:.0f} s") from None
        if self._failure is not None:
            raise self._failure

    async def _supervise(self) -> None:
        """Keep one process alive. Ends with cancellation, or if the first one says that it cannot be.

        Later ones are tried again for ever, however they fail: files, memory or the budget may be other ones by then.
        """
        num_failures, has_served = 0, False
        while True:
            await asyncio.sleep(RESTART_DELAYS_S[min(num_failures, len(RESTART_DELAYS_S) - 1)])
            was_ready, error = await self._run_one()
            has_served = has_served or was_ready
            num_failures = 0 if was_ready else num_failures + 1
            is_clear = not was_ready and not isinstance(error, EngineUnavailable)  # the process said itself why not
            if is_clear or num_failures >= len(RESTART_DELAYS_S):
                self._failure = error  # requests are told at once; until then they wait for the next process
                self._is_ready.set()
                if not has_served:
                    return
            self.num_restarts += 1

    async def _run_one(self) -> tuple[bool, HobError]:
        """Start a process and see it end. Returns whether it was ready, and what its requests were told."""
        self._reported = None
        try:
            connection = await self._spawn()
        except OSError as why:
            failed = EngineUnavailable(f"no engine process can be started: {why.strerror}", retry_after_s=10.0)
            log.error("%s", failed)
            return False, failed
        await connection.closed()
        was_ready, process = self._ready is not None, self._process
        assert process is not None
        self._close()
        returncode = await asyncio.to_thread(process.wait)
        error = self._reported or EngineUnavailable(
            f"the engine process (pid {process.pid}) died: {_describe(returncode)}. A new one is starting.",
            retry_after_s=1.0,
        )
        log.error("%s", error)
        self.end_requests(error)
        self._end_calls(error)
        return was_ready, error

    async def _spawn(self) -> EngineConnection:
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                self._process = self._start_process(theirs)
            connection = EngineConnection(self._deliver)
            await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=ours)
            undo.pop_all()
        self._connection = connection
        self._known_vocabularies = set()
        return connection

    def _start_process(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        # One heap for all its threads (glibc). With one each, what lives on pins what is free: 5 MB more after 30
        # loads of models, and slowly more with each.
        return subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "hob.service.loop",
                str(theirs.fileno()),
                msgspec.json.encode(self.spec).decode(),
            ],
            pass_fds=[theirs.fileno()],
            env={"MALLOC_ARENA_MAX": "1"} | os.environ,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C at a terminal is for the daemon; it ends the engine in order
        )

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, Report):
            for output in message.outputs:
                if outputs := self._outputs.get(output.request_id):
                    outputs.put(output)
            if message.stats is not None:
                self._stats = message.stats
        elif isinstance(message, Ready):
            self._ready, info = message, message.model
            context_length = min(info.context_length, message.num_blocks * message.block_size)
            self._model = msgspec.structs.replace(info, context_length=context_length)
            for model, prompts in (self.public_prompts.by_model() if self.public_prompts else {}).items():
                self._send(Publish(model, prompts))
            self._failure = None
            self._is_ready.set()
            log.info("engine pid %s ready in %.2f s", self.pid, message.load_s)
        elif isinstance(message, Answer):
            if (waiter := self._calls.get(message.call_id)) and not waiter.done():
                waiter.set_result(message)
        elif isinstance(message, Unloaded):
            self._loaded.pop(message.name, None)
            self._known_vocabularies.discard(message.name)  # its file may be another one when it comes back
            self.on_unloaded(message.name)
        elif isinstance(message, LeasesEnded):
            for app in message.apps:
                self._note_lease(app, message.name, None)
        elif isinstance(message, Failed):
            self._reported = error_from_name(message.name, message.message)

    def _end_calls(self, error: HobError) -> None:
        for waiter in self._calls.values():
            if not waiter.done():
                waiter.set_exception(error)
        for name in list(self._loaded):
            del self._loaded[name]
            self.on_unloaded(name)

    def _send(self, message: ToEngine) -> None:
        if self._connection is None:
            raise EngineUnavailable("the engine is restarting", retry_after_s=1.0)
        self._connection.send(message)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.transport.close()
        self._connection, self._ready = None, None
        self._is_ready.clear()


def _describe(returncode: int) -> str:
    if returncode == HUNG_STATUS:
        return "a step hung"
    if returncode >= 0:
        return f"exit status {returncode}"
    return f"signal {-returncode} ({signal.Signals(-returncode).name})"
