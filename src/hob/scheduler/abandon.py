"""Whether a step that runs is given up because somebody urgent has come. Pure: asked from another thread.

A step that is stopped between two layers has computed nothing that counts: its sequences stay where they were. So it is
stopped only while less is lost than the newcomer gains, only if no interactive sequence is in it, and never twice
without such a step having ended in between: of the time of lesser classes a third at most is lost, and all get on.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_GAIN_S = 0.025
"""Less than this is not worth it: whoever waits for a first token hardly notices."""


@dataclass(frozen=True, slots=True)
class StepUnderWay:
    """What is known of a step while it runs."""

    started_s: float
    estimate_s: float
    may_stop: bool

    def should_stop(self, now: float) -> bool:
        """Whether an urgent request that comes now is served better by stopping it."""
        elapsed_s = now - self.started_s
        left_s = self.estimate_s - elapsed_s
        return self.may_stop and left_s > MIN_GAIN_S and elapsed_s < left_s
