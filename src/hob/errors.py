"""The exceptions of Hob. Each one names what happened, the value, what was expected and the next command.

    HobError
    ├── UserError                   the caller can mend it (HTTP 4xx; exit status 2 at the command line)
    │   ├── InvalidRequest      400 a field is wrong, unknown or contradicts another
    │   │   └── ContextLengthExceeded  the prompt does not fit the model's context
    │   ├── Unauthorized        401 an API key is wrong
    │   ├── PermissionDenied    403 policy forbids it
    │   ├── NotFound            404 no such model, context, request
    │   ├── Conflict            409 a context is busy with another turn
    │   ├── RequestTooLarge     413 the body is over the limit
    │   ├── RateLimited         429 the app's own limit is used up
    │   ├── ConfigError         400 hob.toml, an environment variable or a flag
    │   ├── ModelTooLarge       400 a model does not fit the memory budget
    │   └── ModelFileError      400 a model file is truncated, hostile or not supported
    └── ServiceError                the service cannot do it now (HTTP 5xx; exit status 1)
        ├── Overloaded          503 memory or queue is full; says when to come back
        ├── EngineUnavailable   503 the engine process died or is starting
        ├── DaemonUnreachable   503 no daemon answers on the socket
        ├── StorageError        507 a disk is full or refuses to be written
        └── InternalError       500 an invariant of ours is broken

One HTTP status and one OpenAI `code` belong to each, so the API and the command line translate at one place each.
"""

from __future__ import annotations


class HobError(Exception):
    """Base of all errors of Hob. `param` names the request field at fault, `retry_after_s` when to come back."""

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.policy: dict[str, object] | None = None
        """Of a refusal by policy: the rule, the table it is in, the limit, the use so far."""
        self.room_bytes = 0
        """With ModelTooLarge: what a model may take."""


class UserError(HobError):
    """The caller can mend it."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidRequest(UserError):
    """A field of the request is wrong, unknown, or contradicts another."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the tokens asked for do not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorized(UserError):
    """An API key of ours that is not, or no longer, one."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class PermissionDenied(UserError):
    """Policy forbids it."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class NotFound(UserError):
    """No such model, context or request."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No model of that name is in the catalogue or on disk."""

    code = "model_not_found"


class Conflict(UserError):
    """Another request is changing the same thing."""

    status = 409
    code = "conflict"


class RequestTooLarge(UserError):
    """The body is larger than the service accepts."""

    status = 413
    code = "request_too_large"


class RateLimited(UserError):
    """The app's own limit is used up."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class ConfigError(UserError):
    """A setting in hob.toml, the environment or a flag is wrong."""

    code = "config_error"


class ModelTooLarge(UserError):
    """A model does not fit the memory budget, whatever else is unloaded."""

    code = "model_too_large"


class ModelFileError(UserError):
    """A model file is truncated, hostile or of a kind that is not supported."""

    code = "model_file_error"


class ServiceError(HobError):
    """The service cannot do it now."""

    status = 503
    code = "service_unavailable"


class Overloaded(ServiceError):
    """Memory or queue is full."""

    code = "overloaded"


class EngineUnavailable(ServiceError):
    """The engine process died, or is still starting."""

    code = "engine_unavailable"


class DaemonUnreachable(ServiceError):
    """No daemon answers on the socket."""

    code = "daemon_unreachable"


class StorageError(ServiceError):
    """A disk is full or refuses to be written."""

    status = 507
    code = "storage_error"


class InternalError(ServiceError):
    """An invariant of ours is broken: a bug."""

    status = 500
    code = "internal_error"


def _tree(cls: type[HobError]) -> dict[str, type[HobError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _tree(child)
    return found


def error_from_name(name: str, message: str, retry_after_s: float | None = None, param: str | None = None) -> HobError:
    """Rebuild an error that crossed a process boundary by name. An unknown name becomes InternalError."""
    cls = _tree(HobError).get(name, InternalError)
    return cls(message, retry_after_s=retry_after_s, param=param)
