"""Who runs next: class first, then the app that has had the least compute time for its weight, then arrival.

Weighted virtual time (Parekh and Gallager 1993): an app's clock advances by seconds of compute over its weight; the
app with the lowest clock goes first. An app that comes back from idling starts at the lowest clock of the busy ones,
so it can neither save up idle time nor be punished for work that nobody waited for.
"""

from __future__ import annotations


class VirtualTime:
    """One clock per app."""

    def __init__(self) -> None:
        self._clocks: dict[str, float] = {}
        self._num_busy: dict[str, int] = {}

    def enter(self, app: str) -> None:
        """A sequence of the app wants to run."""
        if not self._num_busy.get(app):
            floor = min((self._clocks[a] for a in self._num_busy), default=0.0)
            self._clocks[app] = max(self._clocks.get(app, 0.0), floor)
        self._num_busy[app] = self._num_busy.get(app, 0) + 1

    def leave(self, app: str) -> None:
        """A sequence of the app has ended."""
        self._num_busy[app] -= 1
        if not self._num_busy[app]:
            del self._num_busy[app]
            if not self._num_busy:
                self._clocks.clear()  # nobody waits: nobody owes

    def charge(self, app: str, seconds: float, weight: float) -> None:
        """The app was given this much compute time."""
        self._clocks[app] = self._clocks.get(app, 0.0) + seconds / weight

    def lead(self, app: str) -> float:
        """Seconds by which the app is ahead of the one that has had least, of those that want to run."""
        return self.clock(app) - min((self._clocks[a] for a in self._num_busy), default=self.clock(app))

    def clock(self, app: str) -> float:
        """The app's virtual time; lower runs sooner."""
        return self._clocks.get(app, 0.0)
