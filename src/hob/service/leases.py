"""Which apps hold which models: how long a model stays for them, at which rank, and whether it may go at all.

The owner's limits are checked where a lease is made; what pinned models take is the caller's to know. No clock.
"""

from __future__ import annotations

from hob.errors import PermissionDenied
from hob.messages import Lease


class Leases:
    """By model and app."""

    def __init__(self, keep_alive_s: float, max_keep_alive_s: float, max_rank: int) -> None:
        """keep_alive_s: of a model that nobody holds. The others: most that a lease may ask for."""
        self._keep_alive_s = keep_alive_s
        self._max_keep_alive_s = max_keep_alive_s
        self._max_rank = max_rank
        self._by_model: dict[str, dict[str, Lease]] = {}

    def check(self, lease: Lease) -> None:
        """Raises PermissionDenied above the owner's limits."""
        if lease.rank > self._max_rank or (lease.keep_alive_s or 0) > self._max_keep_alive_s:
            raise PermissionDenied(
                f"a lease of rank {lease.rank} that keeps for {lease.keep_alive_s} s is asked for. The owner allows "
                f"rank {self._max_rank} and {self._max_keep_alive_s:.0f} s."
            )

    def put(self, app: str, model: str, lease: Lease) -> None:
        """Make or change an app's lease."""
        self._by_model.setdefault(model, {})[app] = lease

    def end(self, app: str, model: str) -> None:
        """End it. None there: nothing."""
        self._by_model.get(model, {}).pop(app, None)

    def forget(self, model: str) -> list[str]:
        """The model is gone, and its leases with it. Returns whose they were."""
        return list(self._by_model.pop(model, {}))

    def apps(self, model: str) -> list[str]:
        """Who holds it."""
        return list(self._by_model.get(model, {}))

    def is_pinned(self, model: str) -> bool:
        """Whether it may not go."""
        return any(lease.is_pinned for lease in self._of(model))

    def pinned_by(self, app: str) -> set[str]:
        """The models that an app pins."""
        return {model for model, by_app in self._by_model.items() if app in by_app and by_app[app].is_pinned}

    def pins(self) -> list[tuple[int, str, str]]:
        """Rank, model and app of each pin, the lowest first."""
        return sorted(
            (lease.rank, model, app)
            for model, by_app in self._by_model.items()
            for app, lease in by_app.items()
            if lease.is_pinned
        )

    def rank(self, model: str) -> int:
        """The highest that anybody gives it."""
        return max((lease.rank for lease in self._of(model)), default=0)

    def keep_alive_s(self, model: str) -> float:
        """How long it stays idle: the longest that anybody asks for. A pin without a time stays as long as it may."""
        times = [
            lease.keep_alive_s
            if lease.keep_alive_s is not None
            else (self._max_keep_alive_s if lease.is_pinned else self._keep_alive_s)
            for lease in self._of(model)
        ]
        return max([*times, self._keep_alive_s])

    def _of(self, model: str) -> list[Lease]:
        return list(self._by_model.get(model, {}).values())
