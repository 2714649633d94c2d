"""What all routers take for each API key, as one leader hears it from them and tells each of them about the others.

Each router's heartbeat has its totals of the keys that are in use there. A leader adds up by how much they grew since it first heard that
router process, and answers each router with the sums over the others. So the sums only grow while the leader lives, whatever routers do.
Owns the sums. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from workers.protocol.messages import MAX_KEYS, KeyUse

#: Router processes that are remembered, and keys of each.
MAX_BOOTS, MAX_KEPT = 128, 4096


class _RouterUses:
    """One router process. ``said``: its totals as it last gave them; ``taken``: by how much they grew since it was first heard."""

    __slots__ = ("running", "said", "taken")

    def __init__(self) -> None:
        self.said: dict[str, KeyUse] = {}
        self.taken: dict[str, KeyUse] = {}
        self.running: dict[str, int] = {}


class KeySums:
    """The sums of every router process, by its boot nonce."""

    def __init__(self) -> None:
        self._routers: OrderedDict[str, _RouterUses] = OrderedDict()
        #: Of router processes that are no longer remembered.
        self._retired = _RouterUses()
        #: Keys in the order in which anything was last added to them.
        self._changed: OrderedDict[str, None] = OrderedDict()

    def report(self, boot: str, uses: Sequence[KeyUse]) -> None:
        """A router's heartbeat. What it says first is where the count of it begins. Nothing runs for a key that it does not name."""
        router = self._routers.get(boot)
        if router is None:
            # An answer to Hello says nothing of keys, so the first list is whole.
            router = self._routers[boot] = _RouterUses()
            router.said = {use.key: use for use in uses}
            self._retire()
        self._routers.move_to_end(boot)
        for use in reversed(uses):  # the most active one is the last to be moved to the end
            before = router.said.get(use.key)
            if before is None and len(router.said) >= MAX_KEPT:
                continue
            # A router begins a key's totals anew when nothing was taken for a minute.
            grown = use if before is None or not use.follows(before) else use.less(before)
            router.said[use.key] = use
            if grown.requests or grown.reserved or grown.returned or use.running != router.running.get(use.key, 0):
                taken = router.taken.get(use.key)
                router.taken[use.key] = grown if taken is None else taken.plus(grown)
                self._changed[use.key] = None
                self._changed.move_to_end(use.key)
        router.running = {use.key: use.running for use in uses if use.running}
        while len(self._changed) > MAX_KEPT:
            self._changed.popitem(last=False)

    def gone(self, boot: str) -> None:
        """The router is gone, and nothing of it runs. Where it was only cut off, its next heartbeat goes on from what it said last."""
        if boot in self._routers:
            self._routers[boot].running = {}

    def others(self, boot: str) -> list[KeyUse]:
        """For each key, the sums over all routers but this one; the keys that changed last first, so many as a message holds."""
        others = [router for other, router in self._routers.items() if other != boot]
        found: list[KeyUse] = []
        for key in reversed(self._changed):
            if len(found) == MAX_KEYS:
                break
            total = self._retired.taken.get(key, KeyUse(key, 0, 0, 0))
            for router in others:
                if (taken := router.taken.get(key)) is not None:
                    total = total.plus(taken)
            running = sum(router.running.get(key, 0) for router in others)
            if running or total.reserved or total.requests:
                found.append(KeyUse(key, total.requests, total.reserved, total.returned, running))
        return found

    def _retire(self) -> None:
        """Forget the router process that was not heard for longest, but not what it took."""
        if len(self._routers) > MAX_BOOTS:
            _, oldest = self._routers.popitem(last=False)
            for key, taken in oldest.taken.items():
                before = self._retired.taken.get(key)
                if before is not None or len(self._retired.taken) < MAX_KEPT:
                    self._retired.taken[key] = taken if before is None else before.plus(taken)
