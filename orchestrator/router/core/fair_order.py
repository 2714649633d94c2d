"""Whose turn it is: the order between the tenants that wait for one model, by weighted token counters and strict priorities.

The rule is VTC of Sheng et al. (OSDI 2024, arXiv 2401.00588). Each tenant has a counter of the service that it got: a prompt token costs
:data:`PROMPT_PRICE`, one that a prefix cache held :data:`CACHED_PRICE`, an output token :data:`OUTPUT_PRICE`, all divided by the tenant's
weight. Of the tenants that wait, the one with the smallest counter is next; equal ones take turns. A tenant that comes back to wait is
lifted to the smallest counter of those that wait, so nobody saves service up. Two tenants that both wait all the time therefore differ by
at most what the prompts and answers of the choices cost that are at replicas at once, however long they wait.

A **band** holds the choices of one priority, and a smaller number goes first. A band that waits is passed over by more urgent ones for at
most :data:`AGING_S`: then one of its choices goes before all others. So the k-th choice in the order of its band is sent after k times that
bound at the latest, as far as places come free at all.

Owns the accounts of the tenants and who waits in which band. It knows choices by their ids alone. Pure; time is an argument. A choice costs
O(log tenants).
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter
from typing import TypeAlias

import msgspec

#: What a token costs.
PROMPT_PRICE, CACHED_PRICE, OUTPUT_PRICE = 1.0, 0.1, 2.0
#: Most and least urgent band; priorities beyond them count as these.
MOST_URGENT, LEAST_URGENT = -9, 9
#: Seconds for which a band that waits is passed over by more urgent ones before one of its choices goes first.
AGING_S = 5.0
#: Tenants without a choice whose counters are remembered.
MAX_IDLE = 1024
#: Entries of a heap that may be out of date, beside as many as there are valid ones.
_SPARE = 64


class AccountSnapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The whole state of a :class:`TenantAccount` but who waits or is paused. ``credit``: what the next charges are reduced by."""

    tenant: str
    serial: int
    service: float
    credit: float = 0.0
    turn: int = 0
    weight: float = 1.0
    held: bool = False


class FairOrderSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a :class:`FairOrder` but who waits. ``idle``: tenants without a choice, in the order in which they ended. ``passed``:
    since when a band is passed over."""

    accounts: list[AccountSnapshot]
    idle: list[str]
    floor: float
    turns: int
    serial: int
    passed: dict[int, float]


class TenantAccount:
    """What one tenant got of one model. ``service``: its counter. ``turn``: the number of its last choice that was sent; the greater, the
    later its turn among equals. ``open_choices``: its choices that have not ended; of these, ``waiting`` are in the queue with prompts of
    ``waiting_tokens`` together, and the clients of ``paused`` at replicas take no tokens now. ``held``: its new choices have no turn.
    Written by its own methods and by :class:`FairOrder`."""

    __slots__ = (
        "credit", "held", "lanes", "open_choices", "paused", "serial", "service", "tenant", "turn", "waiting", "waiting_tokens", "weight",
    )  # fmt: skip

    def __init__(self, tenant: str, serial: int) -> None:
        self.tenant, self.serial = tenant, serial
        self.service = self.credit = 0.0
        self.turn = self.open_choices = 0
        self.weight = 1.0
        self.waiting = self.waiting_tokens = self.paused = 0
        self.held = False
        #: Who waits, by band.
        self.lanes: dict[int, _Lane] = {}

    def charge(self, cost: float) -> None:
        """It got service that costs so much."""
        cost /= self.weight
        if self.credit:
            free = min(self.credit, cost)
            self.credit -= free
            cost -= free
        self.service += cost

    def charge_output(self, tokens: int) -> None:
        """It got so many output tokens. On the path of every message of tokens."""
        self.charge(OUTPUT_PRICE * tokens)

    def find_cached(self, tokens: int) -> None:
        """So many tokens of a prompt that was charged whole were in a prefix cache. A counter never falls: the next charges are reduced."""
        self.credit += (PROMPT_PRICE - CACHED_PRICE) * tokens / self.weight

    def wait(self, prompt_tokens: int) -> None:
        """A choice of it has entered the queue."""
        self.waiting += 1
        self.waiting_tokens += prompt_tokens

    def stop_waiting(self, prompt_tokens: int) -> None:
        """A choice of it has left the queue."""
        self.waiting -= 1
        self.waiting_tokens -= prompt_tokens

    def pause(self, paused: bool) -> None:
        """The client of one of its choices at a replica takes nothing more for now (True), or takes tokens again or is gone (False)."""
        self.paused += 1 if paused else -1

    def waits(self) -> bool:
        return any(lane.ids for lane in self.lanes.values())

    def snapshot(self) -> AccountSnapshot:
        return AccountSnapshot(
            tenant=self.tenant, serial=self.serial, service=self.service, credit=self.credit, turn=self.turn, weight=self.weight,
            held=self.held,
        )  # fmt: skip

    @classmethod
    def restored(cls, found: AccountSnapshot) -> TenantAccount:
        """The account that ``found`` was taken of; nobody waits yet."""
        account = cls(found.tenant, found.serial)
        account.service, account.credit, account.turn, account.weight = found.service, found.credit, found.turn, found.weight
        account.held = found.held
        return account


class _Lane:
    """The choices of one tenant in one band, in the order of their arrival. ``entered``: the band's heap has an entry for it."""

    __slots__ = ("entered", "ids")

    def __init__(self) -> None:
        self.ids: OrderedDict[int, None] = OrderedDict()
        self.entered = False


#: (service, turn, serial, account): the first three as they were when the entry was made. Counters only grow, so an entry that is out of
#: date stands too early and never too late.
_Entry: TypeAlias = tuple[float, int, int, TenantAccount]


class _Band:
    """The tenants that wait with one priority. ``passed_since``: since when more urgent bands go first; None = they do not."""

    __slots__ = ("heap", "lanes", "passed_since", "priority")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.heap: list[_Entry] = []
        #: Tenants that wait here.
        self.lanes = 0
        self.passed_since: float | None = None

    def enter(self, account: TenantAccount, lane: _Lane) -> None:
        if lane.entered:
            return
        lane.entered = True
        if len(self.heap) > 2 * self.lanes + _SPARE:
            self._rebuild()
        heappush(self.heap, (account.service, account.turn, account.serial, account))

    def first(self) -> TenantAccount | None:
        """The tenant whose turn it is. None: all that wait here are held."""
        heap = self.heap
        while heap:
            service, turn, _, account = heap[0]
            lane = account.lanes[self.priority]
            if not lane.ids or account.held:
                lane.entered = False
                heappop(heap)
            elif service != account.service or turn != account.turn:
                heapreplace(heap, (account.service, account.turn, account.serial, account))
            else:
                return account
        return None

    def _rebuild(self) -> None:
        kept: list[_Entry] = []
        for entry in self.heap:
            lane = entry[3].lanes[self.priority]
            lane.entered = bool(lane.ids)
            if lane.ids:
                kept.append(entry)
        heapify(kept)
        self.heap = kept


class FairOrder:
    """The order of one model's queue. ``found``: a snapshot to start from; then everything that waits is pushed again, in its order."""

    def __init__(self, found: FairOrderSnapshot | None = None) -> None:
        self._bands: list[_Band] = []
        self._accounts: dict[str, TenantAccount] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        #: The counter of the tenant whose choice was sent last: where nobody waits, a tenant that comes back is lifted to it.
        self._floor = 0.0
        self._turns = self._serial = 0
        self._restored_passes: dict[int, float] = {}
        self._held: list[TenantAccount] = []
        if found is not None:
            self._accounts = {one.tenant: TenantAccount.restored(one) for one in found.accounts}
            self._idle = OrderedDict.fromkeys(found.idle)
            self._held = [account for account in self._accounts.values() if account.held]
            self._floor, self._turns, self._serial = found.floor, found.turns, found.serial
            self._restored_passes = dict(found.passed)

    # --- accounts

    def open(self, tenant: str, weight: float, choices: int) -> TenantAccount:
        """The tenant's account, for a request of so many choices, each of which :meth:`close` is called for at its end. The weight of the
        latest request is that of the tenant."""
        account = self._accounts.get(tenant)
        if account is None:
            self._serial += 1
            account = self._accounts[tenant] = TenantAccount(tenant, self._serial)
        account.weight = weight
        self._idle.pop(tenant, None)
        account.open_choices += choices
        return account

    def restore(self, tenant: str, choices: int) -> TenantAccount:
        """:meth:`open` for a request of a snapshot."""
        account = self._accounts[tenant]
        account.open_choices += choices
        return account

    def find(self, tenant: str) -> TenantAccount | None:
        """The tenant's account; None where it has none yet."""
        return self._accounts.get(tenant)

    def has_others(self, tenant: str) -> bool:
        """Whether another tenant has choices that have not ended."""
        account = self._accounts.get(tenant)
        return len(self._accounts) - len(self._idle) > (account is not None and account.open_choices > 0)

    def close(self, account: TenantAccount) -> None:
        """One of its choices has ended."""
        account.open_choices -= 1
        if not account.open_choices:
            self._idle[account.tenant] = None
            self.release(account)
            if len(self._idle) > MAX_IDLE:
                del self._accounts[self._idle.popitem(last=False)[0]]

    # --- who has no turn

    def hold(self, account: TenantAccount) -> None:
        """Its choices that wait have no turn until :meth:`release`; those of others have."""
        account.held = True
        self._held.append(account)

    def release(self, account: TenantAccount) -> None:
        """Its choices have turns again, as those of a tenant that comes back. Nothing where it is not held."""
        if not account.held:
            return
        account.held = False
        self._held.remove(account)
        for priority, lane in account.lanes.items():
            if lane.ids:
                band = self._band(priority)
                self._lift(account, band)
                band.enter(account, lane)

    @property
    def held(self) -> list[TenantAccount]:
        return self._held

    # --- who waits

    def push(self, account: TenantAccount, id: int, priority: int) -> None:
        """A choice waits from now on, behind the tenant's others of its priority."""
        band = self._band(priority)
        lane = account.lanes.get(band.priority)
        if lane is None:
            lane = account.lanes[band.priority] = _Lane()
        if not lane.ids:
            if not account.waits():
                self._lift(account, band)
            band.lanes += 1
        lane.ids[id] = None
        band.enter(account, lane)

    def _lift(self, account: TenantAccount, band: _Band) -> None:
        """A tenant that comes back did not save service up."""
        least = band.first()
        account.service = max(account.service, self._floor if least is None else least.service)

    def push_again(self, account: TenantAccount, id: int, priority: int) -> None:
        """:meth:`push` for a choice of a snapshot: its tenant was lifted before."""
        band = self._band(priority)
        lane = account.lanes.setdefault(band.priority, _Lane())
        band.lanes += not lane.ids
        band.passed_since = self._restored_passes.get(band.priority)
        lane.ids[id] = None
        band.enter(account, lane)

    def first(self, now: float) -> int | None:
        """The choice whose turn it is. None: nobody waits who is not held."""
        if not self._bands:
            return None
        due = self._due(now)
        for band in (due, *self._bands):
            account = band.first()
            if account is not None:
                return next(iter(account.lanes[band.priority].ids))
        return None

    def remove(self, account: TenantAccount, id: int, priority: int) -> None:
        """A choice waits no longer. Raises KeyError where it did not."""
        band = self._band(priority)
        lane = account.lanes[band.priority]
        del lane.ids[id]
        if not lane.ids:
            band.lanes -= 1
            if not band.lanes:
                self._bands.remove(band)
                for _, _, _, other in band.heap:
                    other.lanes[band.priority].entered = False

    def note_sent(self, account: TenantAccount, priority: int, tokens: int, now: float) -> None:
        """The choice that was :meth:`first` has left for a replica, with so many tokens to compute."""
        sent = _clamp(priority)
        for band in self._bands:
            if band.priority > sent and band.passed_since is None:
                band.passed_since = now
            elif band.priority == sent:
                band.passed_since = None
        self._turns += 1
        account.turn = self._turns
        self._floor = max(self._floor, account.service)
        account.charge(PROMPT_PRICE * tokens)

    def _due(self, now: float) -> _Band:
        """The most urgent band, or the one that was passed over longest, for too long."""
        bands = self._bands
        if len(bands) > 1:
            since = [(band.passed_since, band) for band in bands if band.passed_since is not None]
            if since:
                longest, band = min(since, key=lambda one: one[0])
                if now - longest >= AGING_S:
                    return band
        return bands[0]

    def _band(self, priority: int) -> _Band:
        wanted = _clamp(priority)
        for band in self._bands:
            if band.priority == wanted:
                return band
        made = _Band(wanted)
        self._bands.append(made)
        self._bands.sort(key=attrgetter("priority"))
        return made

    # --- snapshots

    def snapshot(self) -> FairOrderSnapshot:
        return FairOrderSnapshot(
            accounts=[account.snapshot() for account in self._accounts.values()], idle=list(self._idle), floor=self._floor,
            turns=self._turns, serial=self._serial,
            passed={band.priority: band.passed_since for band in self._bands if band.passed_since is not None},
        )  # fmt: skip

    def check(self, waiting: int) -> None:
        """Assert that ``waiting`` choices wait, each once, and that no tenant is missing in the heap of a band where it waits."""
        lanes = [(account, priority, lane) for account in self._accounts.values() for priority, lane in account.lanes.items() if lane.ids]
        assert sum(len(lane.ids) for _, _, lane in lanes) == waiting, "a choice waits in no lane or in two"
        assert [band.lanes for band in self._bands] == [
            sum(priority == band.priority for _, priority, _ in lanes) for band in self._bands
        ], "lanes of a band"
        for band in self._bands:
            heap = [account for _, _, _, account in band.heap]
            assert len(set(map(id, heap))) == len(heap), "a tenant stands twice in a heap"
            in_turn = {id(account) for account, priority, _ in lanes if priority == band.priority and not account.held}
            assert in_turn <= set(map(id, heap)), "not in a heap"
        assert self._held == [account for account in self._held if account.held], "held or not"
        for account in self._accounts.values():
            assert account.held == (account in self._held)
            assert (account.tenant in self._idle) == (not account.open_choices), f"{account.tenant}: idle or not"


def _clamp(priority: int) -> int:
    return min(max(priority, MOST_URGENT), LEAST_URGENT)
