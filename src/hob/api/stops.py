"""Stop strings over text that arrives in pieces: found across any border, and never let out in part.

push("...text") -> what is safe to show      held back: the longest tail that may still grow into a stop string
"""

from __future__ import annotations


class StopFinder:
    """Finds the first of some stop strings. Without any it passes text through."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._starts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """Take in more text, give back what can be shown. After `is_found` all text before the stop is out."""
        if not self._stops:
            return text
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return held[: min(found)]
        keep = self._num_possible(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _num_possible(self, text: str) -> int:
        """Length of the longest tail of `text` with which a stop string begins."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._starts and any(stop.startswith(text[start:]) for stop in self._stops):
                return len(text) - start
        return 0
