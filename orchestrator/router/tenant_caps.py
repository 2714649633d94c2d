"""What one tenant may have under way at a router: requests that have not ended, and the bytes of their bodies.

Owns the counts, which both frontends share. A tenant is the name of a key, or an address where there are no keys; over RPC without keys, a
connection. All tenants together may hold the totals of the deployment file, and one tenant its share of each, but always one request. So a
client that opens requests and never ends them does not block other tenants.

    (new) --enter--> under way --leave--> over
    enter, add: refused where the tenant's share, or the total, is used up
"""

from __future__ import annotations

from orchestrator.config.router_spec import AdmissionSpec
from workers.protocol.errors import Overloaded, TenantLimit

#: Seconds after which a refused tenant may ask again.
RETRY_S = 1.0


class _Account:
    """What one tenant has under way."""

    __slots__ = ("bytes", "requests")

    def __init__(self) -> None:
        self.requests = self.bytes = 0


class Place:
    """One request under way. :meth:`leave` is due at its end, and does nothing when it is called again."""

    __slots__ = ("_bytes", "_caps", "_open", "_tenant")

    def __init__(self, caps: TenantCaps, tenant: str) -> None:
        self._caps, self._tenant, self._bytes, self._open = caps, tenant, 0, True

    def add(self, size: int) -> None:
        """``size`` more bytes of its body are here. Raises TenantLimit, Overloaded."""
        self._caps.add(self._tenant, size)
        self._bytes += size

    def leave(self) -> None:
        if self._open:
            self._open = False
            self._caps.leave(self._tenant, self._bytes)


class TenantCaps:
    """The counts of one router, by the bounds of ``spec``."""

    def __init__(self, spec: AdmissionSpec) -> None:
        self._spec = spec
        self._tenants: dict[str, _Account] = {}
        self.requests = self.bytes = 0

    def enter(self, tenant: str) -> Place:
        """Begin a request of ``tenant``. Raises TenantLimit, Overloaded."""
        spec, account = self._spec, self._tenants.get(tenant)
        held = account.requests if account is not None else 0
        if held >= (most := max(1, spec.share_of(spec.max_requests))):
            raise _at_share(f"{held} requests of this tenant are under way", f"one tenant may have {most} of {spec.max_requests}")
        if self.requests >= spec.max_requests:
            raise Overloaded(f"{self.requests} requests are under way here", retry_after=RETRY_S)
        if account is None:
            account = self._tenants[tenant] = _Account()
        account.requests += 1
        self.requests += 1
        return Place(self, tenant)

    def add(self, tenant: str, size: int) -> None:
        """A request of ``tenant`` that has entered holds ``size`` more bytes. A lone body always fits. Raises TenantLimit, Overloaded."""
        spec, account = self._spec, self._tenants[tenant]
        if account.requests > 1 and account.bytes + size > (most := spec.share_of(spec.max_bytes)):
            raise _at_share(f"requests of this tenant hold {account.bytes} bytes", f"one tenant may hold {most} of {spec.max_bytes}")
        if len(self._tenants) > 1 and self.bytes + size > spec.max_bytes:
            raise Overloaded(f"requests under way hold {self.bytes} bytes", retry_after=RETRY_S)
        account.bytes += size
        self.bytes += size

    def leave(self, tenant: str, size: int) -> None:
        """A request of ``tenant`` is over, which had added ``size`` bytes."""
        account = self._tenants[tenant]
        account.requests -= 1
        account.bytes -= size
        self.requests -= 1
        self.bytes -= size
        if not account.requests:
            del self._tenants[tenant]


def _at_share(what: str, why: str) -> TenantLimit:
    return TenantLimit(what, why, "end some of them, or retry later", retry_after=RETRY_S)
