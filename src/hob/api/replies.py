"""JSON replies and the one shape of errors, OpenAI's: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import secrets
from typing import Any

import msgspec
from starlette.responses import Response

from hob.errors import HobError, InternalError

log = logging.getLogger("hob.api")
_encode = msgspec.json.Encoder().encode


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Any value msgspec can encode, as JSON."""
    return Response(_encode(content), status, headers, "application/json")


def error_object(error: HobError) -> dict[str, Any]:
    """The body of an error reply."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": fields if error.policy is None else {**fields, "policy": error.policy}}


def error_reply(error: HobError, path: str = "") -> Response:
    """An error with its status, and Retry-After where it says when to come back. Under /api/ in Ollama's shape."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    body = {"error": error.message} if path.startswith("/api/") else error_object(error)
    return json_reply(body, error.status, headers)


def unexpected(error: Exception) -> InternalError:
    """A bug of ours: the log gets the stack under a short id, the client only the id."""
    bug_id = secrets.token_hex(4)
    log.error("bug %s", bug_id, exc_info=error)
    return InternalError(f"the service made a mistake (bug {bug_id}). The log of `hob serve` has the details.")
