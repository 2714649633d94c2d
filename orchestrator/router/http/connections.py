"""How many connections one HTTP server holds: in all, and of one address.

Owns the counts. A process that has no descriptor left cannot open a file or a socket, and libzmq ends it, so idle connections of one peer
must never take them all.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Sequence

from orchestrator.router.http.client_address import Network, address_of, is_trusted, tenant_address
from workers.protocol.errors import EnvironmentFault

#: Fewest descriptors that a router can work with, and the most that it reckons with: each connection costs memory too.
LEAST, MOST = 256, 65536


def raise_descriptor_limit() -> int:
    """Raise this process's limit of descriptors to the hard one, and return it. Raises EnvironmentFault where that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < LEAST:
        raise EnvironmentFault(
            f"only {hard} descriptors are allowed", f"connections and files of a router need at least {LEAST}", f"ulimit -Hn {16 * LEAST}"
        )
    return hard


class Connections:
    """``most``: in all. ``most_of_one``: of one address (of IPv6, of one network of 64 bits); not of ``trusted`` proxies, which bring the
    requests of many."""

    def __init__(self, most: int, most_of_one: int, trusted: Sequence[Network] = ()) -> None:
        self.most, self.most_of_one, self._trusted = most, most_of_one, trusted
        self._open: Counter[str] = Counter()

    @classmethod
    def of_this_process(cls, trusted: Sequence[Network] = ()) -> Connections:
        """Half of the descriptors in all, a quarter for one address; the rest is for replicas, RPC clients and files."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = MOST if soft == resource.RLIM_INFINITY else min(soft, MOST)
        return cls(descriptors // 2, descriptors // 4, trusted)

    def enter(self, address: str) -> str:
        """Count a connection. Returns why it must be refused; empty: it may stay. :meth:`leave` is due either way."""
        key = tenant_address(address)
        self._open[key] += 1
        if self._open.total() > self.most:
            return f"{self.most} connections are open here"
        if self._open[key] > self.most_of_one and not is_trusted(address_of(address), self._trusted):
            return f"{self.most_of_one} connections of this address are open here"
        return ""

    def leave(self, address: str) -> None:
        key = tenant_address(address)
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]
