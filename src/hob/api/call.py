"""One call of one app: who asks, at which class, what its log line will say. Made at the edge, used by all routes."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hob.api.adapters import split_name, with_adapter
from hob.api.generate import Totals
from hob.api.params import limit_s, service_class
from hob.api.schema import Sampling
from hob.api.services import Services
from hob.api.stream import until_gone
from hob.messages import ModelInfo, Need
from hob.request import Kind, Request, ServiceClass
from hob.service.identity import Caller
from hob.service.policy import Grant

T = TypeVar("T")


@dataclass(slots=True)
class Record:
    """What a request's log line says."""

    app: str
    endpoint: str
    started_s: float = field(default_factory=time.perf_counter)
    first_output_s: float | None = None
    """When the first output was there, on the clock of `started_s`."""
    totals: Totals = field(default_factory=Totals)
    caller: Caller | None = None
    grant: Grant | None = None
    """What the app may do."""
    service_class: str | None = None
    """Once it is known."""
    body: str | None = None
    """What was sent, if the owner wants it in the audit log."""
    has_grammar: bool = False
    joules_before: float | None = None
    """Of the processor when the call began, where it is measured."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self.started_s

    def note_output(self) -> None:
        """Call at the first output; later calls change nothing."""
        if self.first_output_s is None:
            self.first_output_s = time.perf_counter()


@dataclass(slots=True)
class Call:
    """What a route gets beside its body."""

    services: Services
    app: str
    class_header: str | None
    record: Record
    gone: asyncio.Future[None]
    """Done when the client has left."""
    ttft_deadline_s: float | None = None
    tpot_limit_s: float | None = None
    """Of its requests, where the body has any."""
    adapter: str = ""
    """Of the model in use, as the engine calls it. Empty: none."""

    async def use_model(self, name: str, class_field: str | None = None) -> ModelInfo:
        """Bind the call to the model of that name, loading it if it must be: its tokenizer and template are used now.

        'MODEL:ADAPTER' is a model with one of its adapters. It is loaded as urgently as the call's class and its
        deadline say. Raises ModelNotFound naming the installed ones, ModelTooLarge, Overloaded.
        """
        name, adapter = split_name(name)
        if (grant := self.record.grant) is not None and name not in ("", "default"):
            grant.check_model(name)
        due_s = None if self.ttft_deadline_s is None else self._arrived_s + self.ttft_deadline_s
        self.services, base = await self.services.bound_to(name, Need(self._class_of(class_field), due_s))
        model, self.adapter = with_adapter(base, adapter)
        return model

    def request(self, token_ids: list[int], kind: Kind, class_field: str | None, **fields: Any) -> Request:
        """A Request of this app. The call's receipt tells of its class and grammar."""
        self.record.has_grammar |= fields.get("grammar") is not None
        grant = self.record.grant
        return Request(
            request_id=secrets.token_hex(12),
            app=self.app,
            token_ids=token_ids,
            kind=kind,
            model=self.services.model,
            adapter=self.adapter,
            service_class=self.class_of(class_field),
            weight=1.0 if grant is None else grant.weight,
            ttft_deadline_s=self.ttft_deadline_s,
            arrived_s=None if self.ttft_deadline_s is None else self._arrived_s,
            tpot_limit_s=self.tpot_limit_s,
            **fields,
        )

    @property
    def _arrived_s(self) -> float:
        """When the call began, on the clock that the engine process reads too."""
        return time.monotonic() - self.record.elapsed_s

    def take_limits(self, body: Sampling) -> None:
        """Let the body's deadline and limit hold for the requests to come."""
        self.ttft_deadline_s = limit_s(body, "ttft_deadline_ms")
        self.tpot_limit_s = limit_s(body, "tpot_limit_ms")

    def class_of(self, class_field: str | None) -> ServiceClass:
        """The class asked for by field or header, which the log line says. Raises InvalidRequest."""
        found = self._class_of(class_field)
        self.record.service_class = found.name.lower()
        return found

    def _class_of(self, class_field: str | None) -> ServiceClass:
        asked = service_class(class_field, self.class_header)
        is_asked = class_field is not None or self.class_header is not None
        grant = self.record.grant
        return asked if grant is None else grant.service_class(asked if is_asked else None)

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work that ends when the client leaves."""
        return await until_gone(self.gone, work)
