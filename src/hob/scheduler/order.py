"""Who runs next: near deadlines, then class, then the app that has had least compute for its weight, then arrival.

A deadline counts while it can still be met, once the time left is little more than what the work needs. It pulls
forward only what the app is owed anyway: an app that is `MAX_LEAD_S` of compute ahead of the one that has had least
goes by its class, so that nobody runs first by stating deadlines.

Within a class a sequence that is kept (see placement.py) goes first, so that it ends soon and another can be.

Strict classes could starve the least of them; so a class that has had no row for `STARVED_AFTER_S` while it had work
goes first once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hob.request import Sequence, ServiceClass
from hob.scheduler.fairness import VirtualTime

STARVED_AFTER_S = 1.0
DUE_FACTOR = 2.0
"""A deadline counts from this many times the time that is needed before it on."""
MAX_LEAD_S = 1.0

Key = tuple[bool, float, int, bool, float, float, int]
NOT_DUE = float("inf")


class Order:
    """Sorts sequences for one step. `at` sets the moment; the sort itself reads no clock.

    need_s(sequence): seconds from now to its first token if it ran at once, in steps that others fill.
    """

    def __init__(self, need_s: Callable[[Sequence], float]) -> None:
        self.fairness = VirtualTime()
        self._need_s = need_s
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

    def has_waited(self, sequence: Sequence) -> bool:
        """Whether it has been there for so long that others have to stand back."""
        return self._now - sequence.arrival_s > STARVED_AFTER_S

    def may_preempt(self, newcomer: Sequence, holder: Sequence) -> bool:
        """Whether the newcomer may take the holder's blocks. Equals never do, and nobody those of a starved class."""
        if holder.is_kept:
            return False
        if self.is_starved(newcomer):
            return not self.is_starved(holder)
        return newcomer.request.service_class < holder.request.service_class

    def __call__(self, sequences: list[Sequence]) -> list[Sequence]:
        """The one to run first comes first."""
        return sorted(sequences, key=self._key)

    def before(self, sequence: Sequence, others: list[Sequence]) -> list[Sequence]:
        """Those of the others, who were there first, that go before it once its deadline counts if it has one."""
        key = self._key(sequence, is_pressing=True)
        return [other for other in others if self._key(other) <= key]

    def _key(self, sequence: Sequence, is_pressing: bool = False) -> Key:
        request = sequence.request
        return (
            not self.is_starved(sequence),
            NOT_DUE if request.ttft_deadline_s is None else self._due(sequence, request.ttft_deadline_s, is_pressing),
            request.service_class,
            not sequence.is_kept,
            self.fairness.clock(request.app),
            sequence.arrival_s,
            sequence.index,
        )

    def _due(self, sequence: Sequence, deadline_s: float, is_pressing: bool) -> float:
        """When the first token is due, if that counts now."""
        left_s = sequence.arrival_s + deadline_s - self._now
        is_over = sequence.first_token_s is not None or left_s < 0
        if is_over or self.fairness.lead(sequence.request.app) > MAX_LEAD_S:
            return NOT_DUE
        if not is_pressing and left_s > DUE_FACTOR * self._need_s(sequence):
            return NOT_DUE
        return sequence.arrival_s + deadline_s
