"""Who runs next: near deadlines, then class, then the app that has had least compute for its weight, then arrival.

Strict classes could starve the least of them; so a class that has had no row for `STARVED_AFTER_S` while it had work
goes first once.
"""

from __future__ import annotations

from collections.abc import Iterable

from hob.request import Sequence, ServiceClass
from hob.scheduler.fairness import VirtualTime

STARVED_AFTER_S = 1.0


class Order:
    """Sorts sequences for one step. `at` sets the moment; the sort itself reads no clock."""

    def __init__(self) -> None:
        self.fairness = VirtualTime()
        self._now = 0.0
        self._last_served: dict[ServiceClass, float] = {}
        self._starved: ServiceClass | None = None

    def at(self, now: float, sequences: Iterable[Sequence]) -> None:
        """A new step begins; `sequences` is all that could run."""
        self._now = now
        present = {sequence.request.service_class for sequence in sequences}
        self._last_served = {c: self._last_served.get(c, now) for c in present}
        starved = [c for c in present if now - self._last_served[c] > STARVED_AFTER_S]
        self._starved = min(starved, key=lambda c: self._last_served[c], default=None)

    def served(self, service_class: ServiceClass) -> None:
        """A sequence of this class has rows in the step."""
        self._last_served[service_class] = self._now
        if self._starved is service_class:
            self._starved = None

    def is_starved(self, sequence: Sequence) -> bool:
        """Whether its class is owed a turn in this step."""
        return sequence.request.service_class is self._starved

    def may_preempt(self, newcomer: Sequence, holder: Sequence) -> bool:
        """Whether the newcomer may take the holder's blocks. Equals never do."""
        if self.is_starved(newcomer):
            return not self.is_starved(holder)
        return newcomer.request.service_class < holder.request.service_class

    def __call__(self, sequences: list[Sequence]) -> list[Sequence]:
        """The one to run first comes first."""
        return sorted(sequences, key=self._key)

    def _key(self, sequence: Sequence) -> tuple[bool, bool, int, float, float, int]:
        request = sequence.request
        return (
            not self.is_starved(sequence),
            not self._is_due(sequence),
            request.service_class,
            self.fairness.clock(request.app),
            sequence.arrival_s,
            sequence.index,
        )

    def _is_due(self, sequence: Sequence) -> bool:
        """Whether more than half of the time to its deadline for the first token has gone."""
        deadline_s = sequence.request.ttft_deadline_s
        if deadline_s is None or sequence.first_token_s is not None:
            return False
        return self._now - sequence.arrival_s > deadline_s / 2
