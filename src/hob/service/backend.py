"""What the API needs from below: a place to submit requests to. The daemon passes in the real one (`handle.py`)."""

from __future__ import annotations

from typing import Protocol

from hob.messages import ContextKv, Lease, ModelInfo, ModelSpec, Need, Stats
from hob.request import Request
from hob.service.outputs import Outputs


class Backend(Protocol):
    """The engine process as the API sees it. All on one event loop."""

    @property
    def model(self) -> ModelInfo:
        """The loaded model. Raises EngineUnavailable while none is."""
        ...

    async def load(self, spec: ModelSpec, need: Need) -> ModelInfo:
        """Have another model loaded, unless it is. Raises ModelTooLarge, Overloaded, ModelFileError."""
        ...

    async def unload(self, name: str) -> None:
        """Have a model unloaded once its requests have ended. Raises NotFound, and Conflict if it is pinned."""
        ...

    async def set_lease(self, app: str, name: str, lease: Lease | None) -> None:
        """Make, change or end (None) an app's lease on a loaded model. Raises NotFound, RateLimited at the cap."""
        ...

    async def set_budget(self, budget_bytes: int) -> None:
        """Change what the service may take. Raises InvalidRequest."""
        ...

    @property
    def stats(self) -> Stats:
        """The latest state of the engine process."""
        ...

    def submit(self, request: Request) -> Outputs:
        """Outputs of the request's sequences, interleaved, until each has had one with a `finish_reason`.

        Nothing is sent before the iteration begins. Closing the iterator early (aclose, or the task being cancelled)
        cancels the request. It raises the HobError with which admission refused the request or the engine failed.
        """
        ...

    async def context_kv(self, app: str, context_ids: list[str]) -> dict[str, ContextKv]:
        """What is on disk of an app's contexts, as far as an engine that runs has their models loaded."""
        ...

    def publish(self, model: str, prompts: list[list[int]]) -> None:
        """Share these prompts of a model, and no others of it, among all apps. Holds for requests that come later."""
        ...

    def fork_context(self, app: str, parent_id: str, child_id: str) -> None:
        """A context was copied: let the copy share what is on disk of it. Never waits, never fails."""
        ...

    def drop_context(self, app: str, context_id: str) -> None:
        """A context was deleted: free what is on disk of it. Never waits, never fails."""
        ...
