"""The installed models as routes see them: found by name, loaded on demand, each with its tokenizer and template.

    open(name) --> catalogue: which file --> pack --> engine process: load, or wait for room --> text side --> OpenModel

The engine process decides what stays; the text side of a model that it unloads goes too. Calls for a model that is
just being opened wait for the one that opens it, unless they need it sooner: the engine process is told of each need.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from hob.api.services import ChatCodec, OpenModel, ServedModel, TextCodec
from hob.errors import ModelTooLarge
from hob.messages import ModelSpec, Need
from hob.service.backend import Backend

log = logging.getLogger("hob.models")


@dataclass(frozen=True)
class Installed:
    """A model on this machine."""

    name: str
    num_bytes: int
    """Of its file: near what its weights take."""
    created: int
    """Unix time."""


@dataclass(frozen=True)
class Library:
    """How models are found and read: given by the daemon, so that this file knows no catalogue."""

    installed: Callable[[], list[Installed]]
    resolve: Callable[[str], str]
    """Name, alias or source -> the name in the catalogue. Raises ModelNotFound naming the installed ones."""
    prepare: Callable[[str], ModelSpec]
    """Pack the file if need be. May take long. Raises ModelFileError, StorageError."""
    read_text: Callable[[str], tuple[TextCodec, ChatCodec]]


class ModelShelf:
    """Opens models. All on one event loop."""

    def __init__(self, backend: Backend, library: Library, default: ServedModel) -> None:
        self._backend = backend
        self._library = library
        self._default = default
        self._opened: dict[str, OpenModel] = {}
        """By the names they were asked for."""
        self._opening: dict[tuple[str, Need], asyncio.Task[OpenModel]] = {}
        self._reading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By name: a file is packed once and read once, however many want it."""

    def installed(self) -> list[ServedModel]:
        """See `services.Shelf`."""
        others = [m for m in self._library.installed() if m.name != self._default.name]
        return [self._default, *(ServedModel(m.name, m.created, num_bytes=m.num_bytes) for m in others)]

    async def open(self, name: str, need: Need) -> OpenModel:
        """See `services.Shelf`."""
        if name in self._opened:
            return self._opened[name]
        asked, name = name, await asyncio.to_thread(self._library.resolve, name)
        key = name, need
        opening = self._opening.get(key)
        if opening is None:
            opening = self._opening[key] = asyncio.create_task(self._open(name, need))
            opening.add_done_callback(lambda task: self._opening.pop(key))
        opened = await asyncio.shield(opening)  # one caller that leaves ends nobody else's wait
        self._opened[asked] = opened
        return opened

    async def _open(self, name: str, need: Need) -> OpenModel:
        async with self._reading[name]:
            spec = await asyncio.to_thread(self._library.prepare, name)
        try:
            info = await self._backend.load(spec, need)
        except ModelTooLarge as error:
            raise self._with_hint(error) from None
        async with self._reading[name]:
            if name not in self._opened:
                self._opened[name] = OpenModel(info, *await asyncio.to_thread(self._library.read_text, name))
            return self._opened[name]

    def opened(self, name: str) -> OpenModel | None:
        """See `services.Shelf`."""
        return next((opened for opened in self._opened.values() if opened.info.name == name), None)

    def forget(self, name: str) -> None:
        """A model was unloaded: drop its text side. Calls in flight keep theirs."""
        self._opened = {asked: opened for asked, opened in self._opened.items() if opened.info.name != name}

    def _with_hint(self, error: ModelTooLarge) -> ModelTooLarge:
        fitting = [model for model in self._library.installed() if model.num_bytes <= error.room_bytes]
        largest = max(fitting, key=lambda model: model.num_bytes, default=None)
        hint = f"The largest installed model that would: '{largest.name}'." if largest else "No installed model would."
        return ModelTooLarge(f"{error.message} {hint}", param="model")
