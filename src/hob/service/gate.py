"""A backend with the policy before it: each request is checked, weighed and, if it is background work, may wait.

The one place where what a request asks of the engine meets what its app may have; no route can forget it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hob.kvcache.compression import stored_share
from hob.kvcache.contexts import ContextStore
from hob.request import Request, ServiceClass
from hob.service.backend import Backend
from hob.service.conditions import Conditions
from hob.service.outputs import Outputs
from hob.service.policy import Policy


class GatedBackend:
    """A Backend. What is not said here goes through."""

    def __init__(
        self, backend: Backend, policy: Policy, conditions: Conditions, contexts: ContextStore | None = None
    ) -> None:
        self._backend = backend
        self._policy = policy
        self._conditions = conditions
        self._contexts = contexts

    def submit(self, request: Request) -> Outputs:
        """See `Backend`. Refusals come when the iteration begins, before anything is sent."""
        return self._backend.submit(request).after(self._pass)

    async def _pass(self, request: Request) -> None:
        grant = self._policy.grant(request.app)
        grant.check_model(request.model or self._backend.model.name)
        if request.adapter:
            grant.check_adapter(request.adapter.partition("@")[0])
        request.weight = grant.weight
        if request.context_id is not None and self._contexts is not None and grant.rules.context_bytes is not None:
            records = await asyncio.to_thread(self._contexts.records, request.app)
            model = self._backend.model
            num_exact = sum(r.num_tokens * stored_share(r.facts.kv_bits, model.kv_type) for r in records)
            grant.check_context_bytes(int(num_exact * model.kv_bytes_per_token))
        if request.service_class is ServiceClass.BACKGROUND:
            await self._conditions.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)
