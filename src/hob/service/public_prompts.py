"""Prompts that the owner made public: system prompts and tool lists whose computed prefix all apps share.

    <home>/public.json      {"prompts": {NAME: {"model", "token_ids", "messages", "tools", "prompt", "created"}}}, 0600

Kept as the tokens that the model's template made of them when they were published; whole blocks of 16 are shared.
Written by the daemon only, whole, so that a reader sees the old file or the new one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from hob.durable import write_whole
from hob.errors import InvalidRequest, NotFound, RateLimited, StorageError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAX_PROMPTS = 256


class PublicPrompt(msgspec.Struct, frozen=True):
    """One prompt: messages with tools, or a plain text, and the tokens of it."""

    model: str
    """Name of the model whose tokens these are."""
    token_ids: list[int]
    created: float
    """Unix time."""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    prompt: str | None = None


class _File(msgspec.Struct):
    prompts: dict[str, PublicPrompt] = {}


class PublicPrompts:
    """The list, in memory and on disk."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError if the file is there and cannot be read."""
        self._path = path
        self.by_name: dict[str, PublicPrompt] = {}
        try:
            self.by_name = msgspec.json.decode(path.read_bytes(), type=_File).prompts
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(f"cannot read the public prompts in '{path}': {error}. Mend or remove it.") from error

    def token_ids(self, model: str) -> list[list[int]]:
        """Of all prompts of a model."""
        return [prompt.token_ids for prompt in self.by_name.values() if prompt.model == model]

    def by_model(self) -> dict[str, list[list[int]]]:
        """Tokens of all prompts."""
        return {model: self.token_ids(model) for model in {prompt.model for prompt in self.by_name.values()}}

    def put(self, name: str, prompt: PublicPrompt) -> None:
        """Add or replace one. Raises InvalidRequest, RateLimited, StorageError."""
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"the name '{name[:80]}' of a public prompt is not one. Expected 1 to 64 of: lower-case letters, "
                "digits, '.', '_', '-', beginning with a letter or digit.",
                param="name",
            )
        if name not in self.by_name and len(self.by_name) >= MAX_PROMPTS:
            raise RateLimited(f"there are {len(self.by_name)} public prompts, which is the limit. Remove one first.")
        self._save({**self.by_name, name: prompt})

    def remove(self, name: str) -> PublicPrompt:
        """Raises NotFound, StorageError."""
        if name not in self.by_name:
            known = ", ".join(self.by_name) or "none"
            raise NotFound(f"there is no public prompt '{name[:80]}'. Known: {known}.", param="name")
        removed = self.by_name[name]
        self._save({known: prompt for known, prompt in self.by_name.items() if known != name})
        return removed

    def _save(self, prompts: dict[str, PublicPrompt]) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path, msgspec.json.encode(_File(prompts)) + b"\n")
        except OSError as error:
            raise StorageError(f"cannot write the public prompts to '{self._path}': {error.strerror}") from error
        self.by_name = prompts
