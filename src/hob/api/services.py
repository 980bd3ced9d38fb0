"""What the API is given by the daemon: the backend, the text helpers and the settings. No HTTP here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hob.api.app_sockets import AppSockets
from hob.api.sessions import Sessions
from hob.config import Config
from hob.energy import Meter
from hob.errors import ModelNotFound
from hob.kvcache.contexts import ContextStore
from hob.messages import ModelInfo, Need
from hob.service.apps import Apps
from hob.service.audit import AuditLog
from hob.service.backend import Backend
from hob.service.conditions import Conditions
from hob.service.policy import Policy
from hob.service.public_prompts import PublicPrompts

if TYPE_CHECKING:
    from hob.api.observe import Observer


class TextCodec(Protocol):
    """What the API needs of a tokenizer; `models.tokenizer.Tokenizer` is one."""

    @property
    def stop_token_ids(self) -> Sequence[int]:
        """Tokens that end a reply."""
        ...

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text. Empty for tokens that are not text."""
        ...

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary writes it, e.g. '<|im_end|>'."""
        ...


class ChatCodec(Protocol):
    """What the API needs of a chat template; `models.chat.ChatEncoder` is one."""

    def encode(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation, ready for the assistant's turn. Raises InvalidRequest."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """One entry of /v1/models."""

    name: str
    created: int
    """Unix time."""
    owned_by: str = "hob"
    num_bytes: int = 0
    """Of its file. 0: not known."""


@dataclass(frozen=True)
class OpenModel:
    """A loaded model as routes use it."""

    info: ModelInfo
    tokenizer: TextCodec
    chat: ChatCodec


class BoundBackend:
    """A Backend whose `model` is another than the default. What is not said here goes through."""

    def __init__(self, backend: Backend, model: ModelInfo) -> None:
        self.model = model
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class Shelf(Protocol):
    """The installed models; `shelf.ModelShelf` is one."""

    def installed(self) -> list[ServedModel]:
        """What can be asked for by name, the default first."""
        ...

    def opened(self, name: str) -> OpenModel | None:
        """A model that is open, by its name in the catalogue."""
        ...

    async def open(self, name: str, need: Need) -> OpenModel:
        """Load a model, unless it is, and its text side. Raises ModelNotFound, ModelTooLarge, Overloaded."""
        ...


@dataclass(frozen=True)
class Services:
    """All the routes use; tokenizer and template are the default model's until a call is bound to another."""

    backend: Backend
    tokenizer: TextCodec
    chat: ChatCodec
    config: Config
    started_at: float
    """Unix time at which the daemon started."""
    models: list[ServedModel] = field(default_factory=list)
    """What can be asked for by name. The first is the default."""
    contexts: ContextStore | None = None
    """Persistent contexts. None: they cannot be kept."""
    apps: Apps | None = None
    """Apps with a key or a socket. None: there are none."""
    app_sockets: AppSockets | None = None
    public_prompts: PublicPrompts | None = None
    """Prompts that all apps share. None: there are none."""
    policy: Policy = field(default_factory=lambda: Policy(Path(os.devnull)))
    conditions: Conditions | None = None
    """When background work waits. None: never."""
    audit: AuditLog | None = None
    shelf: Shelf | None = None
    """Models beside the default one. None: there are no others."""
    model: str = ""
    """The model that `tokenizer` and `chat` belong to. Empty: the default."""
    sessions: Sessions = field(default_factory=Sessions)
    """Browsers that were let in."""

    @cached_property
    def observer(self) -> Observer:
        """What requests do."""
        from hob.api.observe import Observer

        return Observer(lambda: self.backend.stats)

    sha256_of: Callable[[str], str | None] = lambda name: None
    """SHA-256 of a model's file. None: not known, or not yet."""
    meter: Meter | None = None
    """The processor's energy. None: not measured here."""

    async def bound_to(self, name: str, need: Need) -> tuple[Services, ModelInfo]:
        """These services with the text side of the model of that name, and what it is. Loads it if need be."""
        default = self.models[0].name if self.models else ""
        if self.shelf is None or name in ("", "default", default):
            return self, self._default(name)
        opened = await self.shelf.open(name, need)
        backend = BoundBackend(self.backend, opened.info)
        bound = replace(self, backend=backend, model=opened.info.name, tokenizer=opened.tokenizer, chat=opened.chat)
        bound.__dict__["observer"] = self.observer  # one for all calls
        return bound, opened.info

    def loaded_name(self, name: str) -> str:
        """The name that the engine process knows a model by, which need not be installed any more."""
        return self.backend.model.name if name in ("", "default") else name

    @property
    def served(self) -> list[ServedModel]:
        """What can be asked for by name, the default first."""
        return self.models if self.shelf is None else self.shelf.installed()

    def info_of(self, name: str) -> ModelInfo | None:
        """What a model that is in memory is. None: it is not, or is known under another name."""
        if name == self.backend.model.name:
            return self.backend.model
        opened = None if self.shelf is None else self.shelf.opened(name)
        return None if opened is None else opened.info

    def _default(self, name: str) -> ModelInfo:
        """The default model, if `name` means it. Raises ModelNotFound, and EngineUnavailable while no engine runs."""
        info = self.backend.model
        names = [model.name for model in self.models] or [info.name]
        if name in ("", "default") or name in names:
            return info
        raise ModelNotFound(
            f"model '{name}' is not served. Expected one of: {', '.join(names)} (or 'default'). "
            "See `hob list` and `hob pull`.",
            param="model",
        )
