"""Which models apps may pin, and whose pin ends when the owner's budget shrinks.

A pin takes memory from everybody else for as long as it lasts. So it is held to the app's share of the budget, all of
them together to the budget, and none is granted that would keep a request from its end. Who holds what is in
`leases.py`. No clock.
"""

from __future__ import annotations

from collections.abc import Callable

from hob.errors import Overloaded, PermissionDenied
from hob.service.room import Room


class Pins:
    """See the module."""

    def __init__(self, room: Room, size_of: Callable[[str], int], max_share: float) -> None:
        """size_of: what a model takes, or would, for as long as it is there. max_share: of the budget, for one app."""
        self._room = room
        self._size_of_one = size_of
        self._max_share = max_share

    def check(self, app: str, name: str) -> None:
        """Raise PermissionDenied above the owner's cap, Overloaded where there is no room now."""
        room, budget = self._room, self._room.ledger.budget_bytes
        num_bytes, cap = self._size_of(room.leases.pinned_by(app) | {name}), int(self._max_share * budget)
        if num_bytes > cap:
            raise PermissionDenied(
                f"app '{app}' would pin {num_bytes:,} bytes with '{name}'. The owner allows {cap:,} "
                f"({self._max_share:.0%} of the memory budget, setting 'max_pinned_share')."
            )
        pinned = self._all() | {name}
        if (total := self._size_of(pinned)) > budget:
            raise Overloaded(
                f"'{name}' and what is pinned already take {total:,} bytes, more than the memory budget of {budget:,}. "
                "Wait until another lease ends.",
                retry_after_s=30.0,
            )
        for resident in room:
            left, num_tokens = budget - self._size_of(pinned - {resident.name}), resident.promised_tokens()
            if left - resident.bytes_beside_kv < resident.footprint.kv_bytes(num_tokens):
                raise Overloaded(
                    f"with '{name}' pinned, a request that runs or waits on '{resident.name}' could not end: it may "
                    f"need {num_tokens:,} tokens of KV. Come back when it has.",
                    retry_after_s=10.0,
                )

    def end_excess(self) -> None:
        """The owner's budget goes before an app's pin: those that are too much now end, the lowest rank first."""
        room, budget = self._room, self._room.ledger.budget_bytes
        for _, name, app in room.leases.pins():
            is_over_cap = self._size_of(room.leases.pinned_by(app)) > self._max_share * budget
            if is_over_cap or self._size_of(self._all()) > budget:
                room.end_lease(app, name, f"the memory budget is {budget:,} bytes now")

    def _all(self) -> set[str]:
        return {name for _, name, _ in self._room.leases.pins()}

    def _size_of(self, names: set[str]) -> int:
        return sum(map(self._size_of_one, names))
