"""Who may look at the page: one-time links, and the sessions of the browsers that followed one.

    `hob dashboard` --Unix socket--> link (60 s, once) --browser--> session (12 h, a SameSite=Strict, HttpOnly cookie)

Kept in memory only: a restart ends all sessions. A cookie does not know ports, so another local server that the browser
visits may see it; it is of no use there, because the service refuses connections of other users whatever they send.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

COOKIE = "hob_session"
LINK_S = 60.0
SESSION_S = 12 * 3600.0


class Sessions:
    """Links and sessions by their secret, each until its time. `clock` is replaced by tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._links: dict[str, float] = {}
        self._sessions: dict[str, float] = {}

    def link(self) -> str:
        """A secret that opens one session."""
        return self._add(self._links, LINK_S)

    def enter(self, secret: str) -> str | None:
        """Use a link up: the session's secret, or None if there is no such link any more."""
        self._drop_old(self._links)
        return self._add(self._sessions, SESSION_S) if self._links.pop(secret, None) is not None else None

    def knows(self, cookie_header: str) -> bool:
        """Whether a Cookie header holds a session."""
        try:
            morsel = SimpleCookie(cookie_header).get(COOKIE)
        except CookieError:
            return False
        self._drop_old(self._sessions)
        return morsel is not None and morsel.value in self._sessions

    def _add(self, secrets_: dict[str, float], seconds: float) -> str:
        self._drop_old(secrets_)
        secret = secrets.token_urlsafe(32)
        secrets_[secret] = self._clock() + seconds
        return secret

    def _drop_old(self, secrets_: dict[str, float]) -> None:
        now = self._clock()
        for secret in [secret for secret, end in secrets_.items() if end <= now]:
            del secrets_[secret]


def cookie_of(session: str) -> str:
    """The Set-Cookie header of a session."""
    return f"{COOKIE}={session}; Path=/; Max-Age={SESSION_S:.0f}; HttpOnly; SameSite=Strict"
