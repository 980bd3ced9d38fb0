"""What the API is given by the daemon: the backend, the text helpers and the settings. No HTTP here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hob.api.app_sockets import AppSockets
from hob.api.sessions import Sessions
from hob.config import Config
from hob.energy import Meter
from hob.errors import ModelNotFound
from hob.kvcache.contexts import ContextStore
from hob.messages import ModelInfo
from hob.service.apps import Apps
from hob.service.audit import AuditLog
from hob.service.backend import Backend
from hob.service.conditions import Conditions
from hob.service.policy import Policy

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


@dataclass(frozen=True)
class Services:
    """All the routes use."""

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
    policy: Policy = field(default_factory=lambda: Policy(Path(os.devnull)))
    conditions: Conditions | None = None
    """When background work waits. None: never."""
    audit: AuditLog | None = None
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

    def resolve_model(self, name: str) -> ModelInfo:
        """The loaded model, if `name` means it: its name, 'default' or nothing.

        Raises ModelNotFound, and EngineUnavailable while no engine runs.
        """
        info = self.backend.model
        names = [model.name for model in self.models] or [info.name]
        if name in ("", "default") or name in names:
            return info
        raise ModelNotFound(
            f"model '{name}' is not served. Expected one of: {', '.join(names)} (or 'default'). "
            "See `hob list` and `hob serve --model`.",
            param="model",
        )
