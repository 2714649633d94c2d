"""Authentication of the HTTP API: the API key is checked before anything else of a request.

Owns the list of paths that are open to all. It comes before the routes, so that a caller without a key cannot find out which paths exist.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.auth.api_keys import EVERYONE, ApiKeys, Tenant
from orchestrator.router import request_context
from orchestrator.router.http.client_address import forwarded
from workers.protocol.errors import Unauthorized

#: Probes, and the status page, which is the same in every deployment and contains nothing of this one; `/` leads to it.
OPEN = frozenset(("/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready", "/", "/ui"))
#: Paths that are open to callers on this host.
LOCAL = frozenset(("/metrics", "/ui/data"))
_TENANT = "trireme.tenant"


class ApiKeyMiddleware:
    """ASGI middleware. ``refuse`` makes the response to a request without a valid key, which is always the same one."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, refuse: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app, self._keys, self._refuse = app, keys, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in OPEN or (path in LOCAL and _is_local(scope)):
            await self._app(scope, receive, send)
            return
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        tenant = self._keys.tenant(sent[0].decode("latin-1")) if len(sent) == 1 else None
        if tenant is None:
            error = Unauthorized("no valid API key", hint="send Authorization: Bearer KEY")
            await (await self._refuse(Request(scope), error))(scope, receive, send)
            return
        scope.setdefault("state", {})[_TENANT] = tenant
        request_context.identify(tenant.name)
        await self._app(scope, receive, send)


def tenant_of(http: Request) -> Tenant:
    """The tenant of the request's key; EVERYONE if the router has no keys."""
    tenant: Tenant = http.scope.get("state", {}).get(_TENANT, EVERYONE)
    return tenant


def _is_local(scope: Scope) -> bool:
    """Whether the caller is on this host; what comes by way of a proxy is not, whoever the proxy is."""
    client = scope.get("client")
    try:
        return client is not None and not forwarded(scope["headers"]) and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
