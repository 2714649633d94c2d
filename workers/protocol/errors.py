"""The errors that processes exchange, each with what happened, why, and what to do.

    TriremeError
    ├── Rejected            the caller's fault; the same request fails anywhere   HTTP 400, exit 2
    │   ├── NotFound        no such model, request or file                        HTTP 404
    │   ├── TooLong         prompt (+ max_tokens) does not fit the context        HTTP 400
    │   ├── TooLarge        a body over the byte limit                            HTTP 413
    │   ├── Unsupported     a media type or feature that is not offered           HTTP 415
    │   └── Unauthorized    missing or wrong credentials                          HTTP 401
    ├── Overloaded          retry later or elsewhere                              HTTP 429
    │   ├── TenantLimit     the caller's tenant holds its share; others go on     HTTP 429
    │   ├── RateLimited     a limit of the caller's API key is reached            HTTP 429
    │   └── Unavailable     no replica is ready                                   HTTP 503
    ├── DeadlineExceeded    the request's own deadline passed                     HTTP 504
    ├── Cancelled           the caller left or cancelled                          HTTP 499
    ├── ReplicaLost         a gang died or hung; the router continues elsewhere   HTTP 503, exit 5
    ├── EngineFault         an engine failed one request (NaN logits, ...)        HTTP 500, exit 5
    ├── ConfigError         a deployment file or flag cannot mean anything        exit 3
    ├── ArtifactError       a model folder is missing, corrupt or does not fit    exit 3
    └── EnvironmentFault    MPI, Ray, a port or a device is not as needed         exit 4

``code`` travels on the wire (``wire.Failed``) and in OpenAI's error JSON; :func:`from_code` makes the error again at the other end.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class TriremeError(Exception):
    """Root of the tree.

    Args:
        what: one line, what happened.
        why: one line, the cause; may be empty.
        hint: one line, what to do; may be empty.
        code: machine-readable name; the class's default when not given.
        param: the request field at fault, if one is.
        retry_after: seconds after which a retry makes sense, if known.
    """

    code = "internal_error"
    status = 500
    exit_code = 1
    #: Id of the request that ended with this error; a client sets it.
    request = ""

    def __init__(
        self,
        what: str,
        why: str = "",
        hint: str = "",
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.why, self.hint = what, why, hint
        self.param, self.retry_after = param, retry_after
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what

    def lines(self) -> str:
        """The text for a terminal: ``error:``, ``why:``, ``hint:``, one line each."""
        rows = [("error", self.what), ("why", self.why), ("hint", self.hint)]
        return "\n".join(f"{label}: {text}" for label, text in rows if text)


class Rejected(TriremeError):
    code, status, exit_code = "invalid_request", 400, 2


class NotFound(Rejected):
    code, status = "not_found", 404


class TooLong(Rejected):
    code = "context_length_exceeded"


class TooLarge(Rejected):
    code, status = "body_too_large", 413


class Unsupported(Rejected):
    code, status = "unsupported", 415


class Unauthorized(Rejected):
    code, status = "authentication_error", 401


class Overloaded(TriremeError):
    code, status, exit_code = "overloaded", 429, 5


class TenantLimit(Overloaded):
    code = "tenant_limit"


class RateLimited(Overloaded):
    """``kind``: what the limit is of. ``retry_after`` None: the same request will never be taken."""

    code = "rate_limit_exceeded"

    def __init__(
        self, what: str, why: str = "", hint: str = "", *, kind: str = "requests", code: str | None = None, param: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(what, why, hint, code=code, param=param, retry_after=retry_after)
        self.kind = kind


class Unavailable(Overloaded):
    code, status = "unavailable", 503


class DeadlineExceeded(TriremeError):
    code, status = "deadline_exceeded", 504


class Cancelled(TriremeError):
    code, status = "cancelled", 499


class ReplicaLost(TriremeError):
    code, status, exit_code = "replica_lost", 503, 5


class EngineFault(TriremeError):
    code, status, exit_code = "engine_fault", 500, 5


class ConfigError(TriremeError):
    code, exit_code = "config_error", 3


class ArtifactError(TriremeError):
    code, exit_code = "artifact_error", 3


class EnvironmentFault(TriremeError):
    code, exit_code = "environment_fault", 4


def printable(text: str) -> str:
    """``text`` from outside with unprintable characters escaped, so that it cannot control a terminal or forge a log line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_CLASSES = (
    NotFound, TooLong, TooLarge, Unsupported, Unauthorized, Overloaded, TenantLimit, RateLimited, Unavailable, DeadlineExceeded,
    Cancelled, ReplicaLost, EngineFault, ConfigError, ArtifactError, EnvironmentFault, Rejected,
)  # fmt: skip
_BY_CODE: Mapping[str, type[TriremeError]] = {c.code: c for c in _CLASSES} | {
    "model_not_found": NotFound,
    "nan_logits": EngineFault,
    "replica_limit": ReplicaLost,
    "invalid_schema": Rejected,
}


def from_code(code: str, message: str, *, retry_after: float | None = None) -> TriremeError:
    """The error for a ``code`` that arrived over the wire; an unknown code is an :class:`EngineFault`."""
    return _BY_CODE.get(code, EngineFault)(message, code=code, retry_after=retry_after)


class ErrorReport(msgspec.Struct, frozen=True, kw_only=True):
    """A :class:`TriremeError` as data."""

    code: str
    what: str
    why: str = ""
    hint: str = ""
    exit_code: int = 1

    @classmethod
    def of(cls, error: TriremeError) -> ErrorReport:
        return cls(code=error.code, what=error.what, why=error.why, hint=error.hint, exit_code=error.exit_code)

    def error(self) -> TriremeError:
        """The error again."""
        error = from_code(self.code, self.what)
        error.why, error.hint = self.why, self.hint
        return error
