"""The limits of one request's API key, from its admission to its end.

Owns one request's reservation. :class:`~orchestrator.router.key_limits.KeyLimiter` owns everything else.
"""

from __future__ import annotations

import time

from starlette.types import Scope

from orchestrator.auth.api_keys import Tenant
from orchestrator.router.http.middleware import note_limits
from orchestrator.router.key_limits import KeyLimiter, Reservation
from workers.protocol.errors import RateLimited


class KeyQuota:
    """Of the request with this ASGI ``scope``; a tenant without an API key has no limits, and nothing is counted for it."""

    def __init__(self, limiter: KeyLimiter, tenant: Tenant, scope: Scope) -> None:
        self._limiter, self._tenant, self._scope = limiter, tenant, scope
        self._reservation: Reservation | None = None

    def check(self) -> None:
        """Refuse a request that cannot be admitted, before it is prepared. Raises :class:`RateLimited`."""
        tenant = self._tenant
        if not tenant.key:
            return
        try:
            self._limiter.check(tenant.key, tenant.name, tenant.terms.limits, time.monotonic())
        except RateLimited:
            self._note()
            raise

    def admit(self, tokens: int) -> None:
        """Reserve what the request may take. Raises :class:`RateLimited`."""
        if not self._tenant.key:
            return
        try:
            self._reservation = self._limiter.admit(self._tenant.key, tokens, time.monotonic())
        finally:
            self._note()

    def settle(self, prompt: int, output: int) -> None:
        """The request has ended after so many tokens. Further calls do nothing."""
        if self._reservation is not None:
            reservation, self._reservation = self._reservation, None
            self._limiter.settle(reservation, prompt, output, time.monotonic())

    def _note(self) -> None:
        note_limits(self._scope, self._limiter.headers(self._tenant.key, time.monotonic()))
