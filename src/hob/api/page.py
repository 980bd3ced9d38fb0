"""The page at `/`: three static files, the one-time link that lets a browser in, and what is said to one without.

No build step and no request to anywhere else; the content security policy holds it to that.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from hob.api.call import Call
from hob.api.overview import check_owner
from hob.api.replies import json_reply
from hob.api.sessions import cookie_of

FOLDER = Path(__file__).parent / "dashboard"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
}
ENTER = "/enter/"
LINK = "/hob/v1/dashboard"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_LOCKED = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Hob</title><link rel="icon" href="data:,">
<p>This page is for the owner of this device. Run <code>hob dashboard</code> in a terminal; it opens a link that works
once.</p></html>"""


async def page(request: Request) -> Response:
    """One of the files."""
    name, media_type = FILES[request.url.path]
    return Response((FOLDER / name).read_bytes(), headers={**HEADERS, "content-type": media_type})


async def enter(request: Request) -> Response:
    """Follow a one-time link."""
    session = request.app.services.sessions.enter(request.path_params["secret"])
    if session is None:
        return locked()
    return RedirectResponse("/", 303, headers={**HEADERS, "set-cookie": cookie_of(session)})


def locked() -> Response:
    """For a browser without a session that asks for the page."""
    return HTMLResponse(_LOCKED, 403, headers=HEADERS)


async def make_link(call: Call, raw: bytes) -> Response:
    """The path of a one-time link; the caller knows the address."""
    check_owner(call)
    return json_reply({"path": ENTER + call.services.sessions.link()})
