"""The outermost layer: which requests get in at all, in what shape errors leave, and the log line. Plain ASGI.

Host allow-list (DNS rebinding) -> no foreign Origin -> of browsers, those that `hob dashboard` let in -> identified
caller -> JSON body within the limit -> policy -> routes
"""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hob.api.call import Record
from hob.api.page import ENTER, locked
from hob.api.replies import error_reply, unexpected
from hob.api.services import Services
from hob.api.stream import ClientGone
from hob.errors import HobError, InternalError, InvalidRequest, PermissionDenied, RequestTooLarge, Unauthorized
from hob.service.apps import KEY_PREFIX
from hob.service.audit import Entry
from hob.service.identity import Caller

log = logging.getLogger("hob.api")

ALLOWED_HOSTS = ("localhost", "127.0.0.1", "[::1]")
CLIENT_GONE = 499
"""Status in the log of a request whose client left before the reply."""
FROM_BROWSERS = {b"origin", b"referer", b"sec-fetch-site", b"sec-fetch-mode", b"cookie"}
"""Headers of which a browser sends one at least with what a page makes it post."""


class NoSession(PermissionDenied):
    """A browser that no link has let in."""


class Edge:
    """Wraps the application. Puts a `Record` and the app's name into the request's state."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._max_body_bytes = services.config.server.max_body_bytes
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Every error becomes a reply here, or the end of the reply if one has begun."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = ENTER + "..." if scope["path"].startswith(ENTER) else scope["path"]  # a secret belongs in no log
        record = Record(app="-", endpoint=f"{scope['method']} {path}")
        status, refusal = 0, None
        observer = self._services.observer

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            length = self._admit(scope, record)
            scope["state"]["record"] = record
            observer.begin(record)
            await self._app(scope, self._limited(receive, length), watched_send)
        except (ClientGone, ClientDisconnect):
            status = CLIENT_GONE
        except Exception as error:
            if status:
                raise  # the reply has begun: only closing the connection can say that it is not whole
            refusal = error if isinstance(error, HobError) else unexpected(error)
            is_page = isinstance(error, NoSession) and scope["path"] == "/"
            reply = locked() if is_page else error_reply(refusal, scope["path"])
            await reply(scope, receive, watched_send)
        finally:
            self._services.policy.leave(record.app, record.totals, time.monotonic())
            observer.end(record, _route_of(scope), status, refusal)
            _log(record, status, refusal)
            self._note(record, status, refusal)

    def _admit(self, scope: Scope, record: Record) -> int:
        """Check all that can be told from the head. Returns the body's announced length, 0 if none is announced."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name == b"host" and name in headers:
                raise InvalidRequest("there are two Host headers. Expected one.", param="Host")
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1").lower()
        server = scope.get("server")
        if server is not None and server[1] is not None and not _is_allowed(host):
            raise PermissionDenied(
                f"header Host is '{host[:80]}'. Expected one of: {', '.join(ALLOWED_HOSTS)}.", param="Host"
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            raise PermissionDenied(
                f"header Origin is '{origin[:80]}'. Web pages may not use this service.", param="Origin"
            )
        self._check_browser(scope["path"], headers)
        caller = scope["state"].get("caller")
        if isinstance(caller, HobError):
            raise caller
        if not isinstance(caller, Caller):
            raise InternalError("the connection was not identified. Run the app with http=HobProtocol.")
        caller = record.caller = self._known(caller, headers.get(b"authorization", b"").decode("latin-1"))
        declared = headers.get(b"x-hob-app")
        record.app = caller.app(None if declared is None else declared.decode("latin-1"))
        length = self._check_body(scope["method"], scope["path"], headers)
        record.grant = self._services.policy.enter(
            record.app, scope["path"], record.totals, time.monotonic(), is_counted=scope["method"] == "POST"
        )
        return length

    def _known(self, caller: Caller, authorization: str) -> Caller:
        """The caller as the owner named it: by the key it shows, or by the socket it came through."""
        apps = self._services.apps
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "bearer" and key.startswith(KEY_PREFIX):
            if apps is None or (name := apps.app_of_key(key)) is None:
                raise Unauthorized(
                    "the API key is not, or no longer, one of this service. Make one with `hob app add NAME`; without "
                    "a key of ours any other word will do.",
                    param="Authorization",
                )
            return caller.with_key(name)
        kind, _, name = caller.boundary.partition(":")
        if kind == "socket" and (apps is None or name not in apps.file.sockets):
            raise PermissionDenied(f"app '{name}' has no socket any more. Its owner took it back.")
        return caller

    def _note(self, record: Record, status: int, refusal: HobError | None) -> None:
        """Into the audit log."""
        if (audit := self._services.audit) is None:
            return
        caller, totals = record.caller, record.totals
        audit.note(
            Entry(
                time=time.time(),
                app=record.app,
                uid=caller.uid if caller else None,
                pid=caller.pid if caller else None,
                endpoint=record.endpoint,
                status=status,
                code=refusal.code if refusal else None,
                service_class=record.service_class,
                prompt_tokens=totals.num_prompt_tokens,
                cached_tokens=totals.num_cached_tokens,
                output_tokens=totals.num_output_tokens,
                ms=round(1e3 * (time.perf_counter() - record.started_s), 1),
                body=record.body,
            )
        )

    def _check_browser(self, path: str, headers: dict[bytes, bytes]) -> None:
        """A browser says where its request comes from. Ours comes from our page, and has the cookie of its link."""
        site = headers.get(b"sec-fetch-site")
        if site is None and b"origin" not in headers:
            return
        if site not in (None, b"same-origin", b"none"):
            raise PermissionDenied(
                f"header Sec-Fetch-Site is '{site.decode('latin-1')[:80]}'. Web pages may not use this service.",
                param="Sec-Fetch-Site",
            )
        cookie = headers.get(b"cookie", b"").decode("latin-1")
        if not path.startswith(ENTER) and not self._services.sessions.knows(cookie):
            raise NoSession("this browser has no session. Open the page with `hob dashboard`.", param="Cookie")

    def _check_body(self, method: str, path: str, headers: dict[bytes, bytes]) -> int:
        if method in ("GET", "HEAD", "DELETE"):
            return 0
        media_type = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        # Some of Ollama's clients send no type at all; no browser sends such a request without one of these headers.
        is_untyped = b"content-type" not in headers and path.startswith("/api/") and not FROM_BROWSERS & headers.keys()
        if media_type != "application/json" and not is_untyped:
            raise InvalidRequest(
                f"header Content-Type is '{media_type[:80]}'. Expected application/json.", param="Content-Type"
            )
        length = int(headers.get(b"content-length", b"0"))
        if length > self._max_body_bytes:
            raise self._too_large(length)
        return length

    def _limited(self, receive: Receive, length: int) -> Receive:
        """`receive` that counts. An announced length is held by the HTTP parser; only chunked bodies need counting."""
        if length:
            return receive
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large(num_bytes)
            return message

        return counted

    def _too_large(self, num_bytes: int) -> RequestTooLarge:
        return RequestTooLarge(
            f"the body has {num_bytes:,} bytes or more. Expected at most {self._max_body_bytes:,} "
            "(setting 'max_body_bytes')."
        )


def _route_of(scope: Scope) -> str:
    """The path as its route is written, so that there are few of them: '/v1/models/{name}'. 'none': no route."""
    if "endpoint" not in scope:
        return "none"
    path: str = scope["path"]
    for name, value in scope.get("path_params", {}).items():
        path = path.replace(str(value), f"{{{name}}}")
    return path


def _is_allowed(host: str) -> bool:
    """Whether a Host header names this machine's loopback, with any port."""
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:
        name, port = host, ""
    return name in ALLOWED_HOSTS and (not port or port.isdigit())


def _log(record: Record, status: int, refusal: HobError | None) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    now = time.perf_counter()
    totals = record.totals
    fields: dict[str, Any] = {"app": record.app, "endpoint": record.endpoint, "status": status}
    line = f"{record.app} {record.endpoint} {status}"
    if totals.num_prompt_tokens:
        cached = totals.num_cached_tokens
        known = "?" if cached is None else cached
        new = "?" if cached is None else totals.num_prompt_tokens - cached
        line += f" prompt {known}+{new} output {totals.num_output_tokens}"
        fields |= {
            "prompt_tokens": totals.num_prompt_tokens,
            "cached_tokens": cached,
            "output_tokens": totals.num_output_tokens,
        }
    if record.service_class is not None:
        fields["class"] = record.service_class
    if record.first_output_s is not None:
        fields["ttft_ms"] = round(1e3 * (record.first_output_s - record.started_s), 1)
        line += f" ttft {fields['ttft_ms']:.1f} ms"
        decode_s = now - record.first_output_s
        if totals.num_output_tokens > 1 and decode_s > 0:
            fields["tok_s"] = round((totals.num_output_tokens - 1) / decode_s, 1)
            line += f" {fields['tok_s']:.1f} tok/s"
    if refusal is not None:
        fields["code"] = refusal.code
    fields["ms"] = round(1e3 * (now - record.started_s), 1)
    log.info("%s %.1f ms", line, fields["ms"], extra={"fields": fields})
