"""What a daemon is made of: model, engine process, text side, HTTP server. Built here, run by daemon.py.

Imports are inside the functions: the engine process must be on its way before the web framework is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hob.config import Config
from hob.errors import ConfigError, EngineUnavailable, HobError, ModelNotFound
from hob.messages import ModelSpec

if TYPE_CHECKING:
    import uvicorn

    from hob.api.app_sockets import AppSockets
    from hob.api.services import ChatCodec, TextCodec
    from hob.api.shelf import Installed, Library
    from hob.kvcache.contexts import ContextStore
    from hob.messages import Vocabulary
    from hob.service.handle import EngineHandle
    from hob.service.policy import Policy

log = logging.getLogger("hob.daemon")

TEXT_BYTES_PER_HEADER_BYTE = 20
"""Memory of tokenizer and template over the GGUF header they are read from: 28 MB from SmolLM2's 1.7 MB."""
FAKE_MODEL = "fake"
"""Serves the fake engine, for tests: 'fake', or 'fake:20' for steps of 20 ms."""


@dataclass(frozen=True)
class Chosen:
    """The model to serve."""

    name: str
    gguf: Path | None
    """None: the fake engine."""
    packed: Path | None
    step_s: float = 0.0
    """Fake engine: seconds of a step."""


def choose_model(config: Config) -> Chosen:
    """Find the model that `config.engine.model` names and pack it if that was not done yet (some seconds, once).

    Raises ModelNotFound, ModelFileError or StorageError.
    """
    name = config.engine.model
    if is_fake(name):
        return _choose_fake(name)
    from hob.models.catalog import Catalog
    from hob.models.pack import ensure_packed

    gguf = Catalog(config.models_dir).resolve(name)
    return Chosen(Path(name).stem if "/" in name else name, gguf, ensure_packed(gguf, _log_progress("packing")))


def is_fake(model: str) -> bool:
    """Whether a model's name means the fake engine."""
    return model == FAKE_MODEL or model.startswith(f"{FAKE_MODEL}:")


def _choose_fake(name: str) -> Chosen:
    step_ms = name.partition(":")[2] or "0"
    if not step_ms.isdigit():
        raise ConfigError(f"setting 'model' is '{name}'. Expected 'fake', or 'fake:20' for steps of 20 ms.")
    return Chosen(FAKE_MODEL, None, None, int(step_ms) / 1000)


def _log_progress(what: str) -> Callable[[int, int], None]:
    """A callback (done, total) that logs every tenth."""
    shown = -1

    def report(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)
        if tenth > shown:
            shown = tenth
            log.info("%s the model: %d %%", what, 10 * tenth)

    return report


def make_engine(config: Config, chosen: Chosen) -> EngineHandle:
    """The engine process as yet unstarted."""
    from hob.models.byte_text import VOCAB_SIZE
    from hob.service.disk import DiskSpec
    from hob.service.handle import EngineHandle
    from hob.service.loop import EngineSpec
    from hob.service.pressure import memory_bytes
    from hob.service.public_prompts import PublicPrompts

    return EngineHandle(
        EngineSpec(
            model_name=chosen.name,
            packed_path=str(chosen.packed or ""),
            engine=replace(config.engine, adapters=str(config.adapters_dir)),
            scheduler=config.scheduler,
            kv_tokens=config.memory.kv_tokens,
            text_bytes=text_bytes_of(chosen.gguf),
            budget_bytes=config.memory.budget_bytes or memory_bytes() // 2,
            keep_alive_s=config.memory.keep_alive_s,
            max_keep_alive_s=config.memory.max_keep_alive_s,
            max_pinned_share=config.memory.max_pinned_share,
            fake_step_s=chosen.step_s,
            fake_vocab_size=VOCAB_SIZE,
            disk=DiskSpec(str(config.contexts_dir), str(config.keys_dir), config.contexts.context_disk_bytes),
        ),
        PublicPrompts(config.public_prompts_path),
    )


def _load_text(gguf_path: Path | None) -> tuple[TextCodec, ChatCodec]:
    """Tokenizer and chat template as the model file carries them. None: the fake engine's."""
    if gguf_path is None:
        from hob.models.byte_text import ByteChat, ByteTokenizer

        return ByteTokenizer(), ByteChat()
    from hob.models.chat import ChatEncoder, read_template
    from hob.models.gguf import open_gguf
    from hob.models.tokenizer import Tokenizer

    with open_gguf(gguf_path) as gguf:
        tokenizer = Tokenizer(gguf.metadata)
        return tokenizer, ChatEncoder(read_template(gguf.metadata), tokenizer)


def _vocabulary(tokenizer: TextCodec, vocab_size: int, model: str) -> Vocabulary:
    from hob.messages import Vocabulary

    tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
    return Vocabulary(tokens, list(tokenizer.stop_token_ids), model)


def _hashes(config: Config, chosen: Chosen) -> Callable[[str], str | None]:
    """SHA-256 by model: as the catalogue knows it, else computed aside, which takes a second for two gigabytes."""
    from hob.models.catalog import Catalog
    from hob.models.spool import sha256_of

    found: dict[str, str | None] = {}
    if (gguf := chosen.gguf) is not None:
        found = {record.name: record.sha256 for record in Catalog(config.models_dir).list()}
        if found.get(chosen.name) is None:

            def compute() -> None:
                with contextlib.suppress(OSError):  # the file is gone: so is what its hash would say
                    found[chosen.name] = sha256_of(gguf, lambda done, total, stage: None)

            threading.Thread(target=compute, name="hob-hash", daemon=True).start()
    return found.get


def text_bytes_of(gguf_path: Path | None) -> int:
    """What tokenizer and template will take, by the length of the vocabulary and merges in the file's header."""
    if gguf_path is None:
        return 0
    from hob.models.gguf import open_gguf

    with open_gguf(gguf_path) as gguf:
        return TEXT_BYTES_PER_HEADER_BYTE * gguf.data_offset


def _library(config: Config) -> Library:
    """The models on this machine, for those that requests name."""
    from hob.api.shelf import Installed, Library
    from hob.models.catalog import Catalog
    from hob.models.pack import ensure_packed

    catalog = Catalog(config.models_dir)

    def installed() -> list[Installed]:
        return [
            Installed(record.name, record.size_bytes, int(Path(record.path).stat().st_mtime))
            for record in catalog.list()
            if record.path is not None
        ]

    def resolve(name: str) -> str:
        if looks_like_path(name):
            raise not_installed(name, installed())
        try:
            return catalog.resolve(name).stem
        except ModelNotFound:
            raise not_installed(name, installed()) from None

    def prepare(name: str) -> ModelSpec:
        gguf = catalog.resolve(name)
        return ModelSpec(name, str(ensure_packed(gguf, _log_progress("packing"))), text_bytes_of(gguf))

    return Library(installed, resolve, prepare, lambda name: _load_text(catalog.resolve(name)))


def looks_like_path(name: str) -> bool:
    """Requests name models, never files or addresses: what is served is the owner's choice."""
    return "/" in name or ":" in name


def not_installed(name: str, models: list[Installed]) -> ModelNotFound:
    """The error for a name that is not on this machine."""
    names = ", ".join(model.name for model in models) or "none"
    return ModelNotFound(
        f"model '{name[:120]}' is not installed. Installed: {names} (or 'default'). See `hob pull`.", param="model"
    )


def _open_contexts(config: Config, policy: Policy) -> ContextStore | None:
    """The apps' persistent contexts. A service that cannot keep any still answers everything else."""
    from hob.kvcache.contexts import ContextStore
    from hob.kvcache.keys import KeyRing

    def limit(app: str) -> int:
        said = policy.grant(app).rules.max_contexts
        return config.contexts.max_contexts if said is None else said

    try:
        return ContextStore(config.contexts_dir, KeyRing(config.keys_dir), limit)
    except HobError as error:
        log.error("no persistent contexts: %s", error)
        return None


def make_server(
    config: Config,
    handle: EngineHandle,
    chosen: Chosen,
    created: int,
    grace_s: int,
    tick: Callable[[float], None],
    passed: list[socket.socket],
) -> tuple[uvicorn.Server, AppSockets]:
    """Import and build the API, which takes most of a second: meant for a thread while the engine process loads.

    created: Unix time of the daemon's start. grace_s: how long it waits for requests when it is told to stop.
    tick: called about once a second with how many seconds nobody has asked for anything. passed: sockets of single
    apps from a predecessor.
    """
    import uvicorn

    from hob.api.app import create_app
    from hob.api.app_sockets import AppSockets
    from hob.api.protocol import HobProtocol
    from hob.api.services import ServedModel, Services
    from hob.api.shelf import ModelShelf
    from hob.energy import open_meter
    from hob.service.apps import Apps
    from hob.service.audit import AuditLog
    from hob.service.conditions import Conditions
    from hob.service.gate import GatedBackend
    from hob.service.policy import Policy

    class Server(uvicorn.Server):
        """Leaves the signals alone: the daemon has them, from before uvicorn was imported."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def on_tick(self, counter: int) -> bool:
            """See uvicorn, which calls it ten times a second."""
            if counter % 10 == 0:
                observer = services.observer
                tick(0.0 if observer.in_flight else time.monotonic() - observer.last_active)
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """See uvicorn. Streams that go on for ever end first: nobody needs to wait for them."""
            services.observer.is_stopping = True
            app_sockets.close_all()
            await super().shutdown(sockets)
            audit.close()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """See uvicorn; then the sockets of single apps."""
            await super().startup(sockets)
            await app_sockets.open_all(apps.file.sockets)

        def make_protocol(self, app: str) -> asyncio.Protocol:
            """For a connection through an app's own socket."""
            state = {**self.lifespan.state, "socket_app": app}
            return HobProtocol(config=self.config, server_state=self.server_state, app_state=state)

    tokenizer, chat = _load_text(chosen.gguf)
    default = ServedModel(chosen.name, created)

    def vocabulary_of(model: str) -> Vocabulary:
        if model in ("", default.name):
            return _vocabulary(tokenizer, handle.model.vocab_size, model)
        if (opened := shelf.opened(model)) is None:
            raise EngineUnavailable(f"model '{model}' was unloaded while the request waited", retry_after_s=1.0)
        return _vocabulary(opened.tokenizer, opened.info.vocab_size, model)

    shelf = ModelShelf(handle, _library(config), default)
    handle.on_unloaded = shelf.forget
    handle.vocabulary = vocabulary_of
    policy = Policy(config.policy_path)
    conditions = Conditions(lambda: policy.file.background)
    contexts = _open_contexts(config, policy)
    apps = Apps(config.paths.home / "apps.json")
    app_sockets = AppSockets(config.app_sockets_dir, lambda app: server.make_protocol(app), passed)
    audit = AuditLog(config.audit_dir, lambda: policy.file.audit)
    services = Services(
        GatedBackend(handle, policy, conditions, contexts),
        tokenizer,
        chat,
        config,
        started_at=created,
        models=[default],
        contexts=contexts,
        shelf=shelf,
        apps=apps,
        app_sockets=app_sockets,
        public_prompts=handle.public_prompts,
        policy=policy,
        conditions=conditions,
        audit=audit,
        sha256_of=_hashes(config, chosen),
        meter=open_meter(),
    )
    server = Server(
        uvicorn.Config(
            create_app(services),
            http=HobProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=grace_s,
        )
    )
    return server, app_sockets
