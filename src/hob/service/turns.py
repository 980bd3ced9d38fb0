"""Which of several resident models steps next. Pure: time and costs are passed in.

One step has all cores, so models take turns, by the rules that hold within one: urgent classes first, then the app
that has had the least compute (all schedulers share one virtual time), then the model whose turn is longest ago.

An interactive stream on one model must not stop the background of another for ever, nor wait for its 45 ms steps. So
each step with interactive rows earns the others `urgent_stretch` - 1 times what it took; they step when they have
credit, for no longer than it lasts. If the urgent model has less urgent rows itself, these and the other models have
every second gap of its streams in turn. A stream then keeps its pace as if all ran on one model. A model that waits
longer than STARVED_AFTER_S goes first once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hob.request import ServiceClass
from hob.scheduler.order import STARVED_AFTER_S

MIN_TURN_S = 0.002
"""A shorter step would do little but read the weights."""
MAX_DEBT_S = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A model that has work."""

    name: str
    service_class: ServiceClass
    """The most urgent it has."""
    clock: float
    """Lowest virtual time of the apps that wait in that class."""
    is_mixed: bool = False
    """Whether it has work of other classes too."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A model that may step now, and how long the step may take at most. None: as long as its scheduler says."""

    name: str
    max_step_s: float | None = None
    urgent_stretch: float | None = None


class Turns:
    """Remembers who had a turn when, and what less urgent models are owed."""

    def __init__(self, urgent_stretch: float, max_step_s: float) -> None:
        self._stretch = urgent_stretch
        self._max_step_s = max_step_s
        self._credit_s = 0.0
        self._was_other = False
        """The last step was a less urgent model's: the urgent one's next is not stretched as well."""
        self._last: dict[str, float] = {}

    def order(self, now: float, claims: Sequence[Claim]) -> list[Turn]:
        """All claims, the one to step first comes first."""
        self._last = {claim.name: self._last.get(claim.name, now) for claim in claims}
        if len(claims) == 1:
            self._credit_s = 0.0
            return [Turn(claims[0].name)]
        urgent = [c for c in claims if c.service_class is ServiceClass.INTERACTIVE]
        others = [c for c in claims if c.service_class is not ServiceClass.INTERACTIVE]
        ranked = sorted(urgent, key=self._key) + sorted(others, key=self._key)
        starved = [c for c in others if now - self._last[c.name] > STARVED_AFTER_S]
        if not urgent or not others:
            first = min(starved, key=lambda c: self._last[c.name], default=ranked[0])
            return [Turn(c.name) for c in sorted(ranked, key=lambda c: c is not first)]
        if starved or self._credit_s > 0:
            first = min(starved or others, key=self._key)
            ranked.sort(key=lambda c: c is not first)
        limit_s = max(self._credit_s, MIN_TURN_S)
        own = 1.0 if self._was_other else None
        return [Turn(c.name, None, own) if c in urgent else Turn(c.name, limit_s) for c in ranked]

    def took(self, claim: Claim, seconds: float, now: float, *, is_contended: bool) -> None:
        """A step was made. is_contended: both urgent and less urgent models had work."""
        self._last[claim.name] = now
        if not is_contended:
            return
        if claim.service_class is not ServiceClass.INTERACTIVE:
            self._credit_s = max(self._credit_s - seconds, -MAX_DEBT_S)
        elif not claim.is_mixed:
            self._credit_s = min(self._credit_s + (self._stretch - 1) * seconds, self._max_step_s)
        elif not self._was_other:  # its own less urgent rows had their part of this step: the others' comes next
            self._credit_s = min(self._credit_s + (1 - 1 / self._stretch) * seconds, self._max_step_s)
        self._was_other = claim.service_class is not ServiceClass.INTERACTIVE

    def _key(self, claim: Claim) -> tuple[ServiceClass, float, float]:
        return claim.service_class, claim.clock, self._last[claim.name]
