"""Limits of API keys: requests and tokens in any minute, and requests at once; what each key has used.

A request reserves its prompt and its longest answer when it is admitted, and settles with what it used when it ends: so requests at once
cannot overrun a limit that each of them alone keeps. All routers of a deployment keep one limit without speaking to each other. Each tells
its leaders its totals a key, a leader's heartbeats say what the others have taken (:mod:`workers.serving.key_sums`), and what came since
the last heartbeat is entered into this router's minute as if it had been taken here.

    --admit--> reserved, counted in the slice of now --settle--> what was not used is given back to that slice
    a slice leaves the sum a minute after its end

Totals only grow, so the same news by several leaders, late or twice, changes nothing: of what they say the lower median counts, and one
leader that says too much is not believed while others differ. Owns all accounts. Pure; time is an argument (seconds).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from operator import attrgetter
from typing import Literal, TypeAlias

import msgspec

from orchestrator.auth.api_keys import KeyLimits
from workers.protocol.errors import RateLimited
from workers.protocol.messages import MAX_KEYS, KeyUse

#: Limits are for any time of this length, seconds. It is counted in slices of so many seconds, and one leaves as a whole, when its end is a
#: minute old: no minute ever holds more than the limit.
MINUTE_S, SLICE_S = 60.0, 0.25
#: Keys that are remembered; those that were not used for longest are forgotten first, unless they are in use.
MAX_ACCOUNTS = 4096
#: A leader that was not heard for so long is not asked any more, seconds.
LEADER_S = 5.0

#: Requests, tokens reserved, tokens given back: totals since a start.
Totals: TypeAlias = tuple[int, int, int]
NOTHING: Totals = (0, 0, 0)
Reason: TypeAlias = Literal["requests", "tokens", "concurrency"]


class _Slice:
    """What was taken in one slice of time."""

    __slots__ = ("requests", "start", "tokens")

    def __init__(self, start: float) -> None:
        self.start, self.requests, self.tokens = start, 0, 0


class MinuteWindow:
    """Requests and tokens of the last minute, by slices."""

    __slots__ = ("_slices", "requests", "tokens")

    def __init__(self) -> None:
        self._slices: deque[_Slice] = deque()
        self.requests = self.tokens = 0

    def expire(self, now: float) -> None:
        while self._slices and self._slices[0].start + SLICE_S <= now - MINUTE_S:
            gone = self._slices.popleft()
            self.requests -= gone.requests
            self.tokens -= gone.tokens

    def add(self, requests: int, tokens: int, now: float) -> _Slice:
        """Count in the slice of now, and return that slice."""
        self.expire(now)
        start = now // SLICE_S * SLICE_S
        if not self._slices or self._slices[-1].start != start:
            self._slices.append(_Slice(start))
        slice = self._slices[-1]
        slice.requests += requests
        slice.tokens += tokens
        self.requests += requests
        self.tokens += tokens
        return slice

    def give_back(self, slice: _Slice, requests: int, tokens: int, now: float) -> None:
        """Take back what was counted in ``slice``, unless the minute has passed."""
        self.expire(now)
        if self._slices and slice.start >= self._slices[0].start:
            slice.requests -= requests
            slice.tokens -= tokens
            self.requests -= requests
            self.tokens -= tokens

    def give_back_latest(self, tokens: int, now: float) -> None:
        """Take back tokens of which the slice is not known: from the latest ones, as far as they have some."""
        self.expire(now)
        for slice in reversed(self._slices):
            part = min(tokens, slice.tokens)
            slice.tokens -= part
            self.tokens -= part
            tokens -= part
            if not tokens:
                return

    def free_in(self, requests: int, tokens: int, now: float) -> float:
        """Seconds until so many requests and tokens of those that are counted have left; 0 where that is none."""
        until = now
        for slice in self._slices:
            if requests <= 0 and tokens <= 0:
                break
            requests -= slice.requests
            tokens -= slice.tokens
            until = slice.start + SLICE_S + MINUTE_S
        return max(0.0, until - now)

    @property
    def idle(self) -> bool:
        return not self._slices


class _Leader:
    """What one leader says of one key: its totals, and what to add to make them comparable with the account's."""

    __slots__ = ("offset", "running", "totals")

    def __init__(self, offset: Totals) -> None:
        self.offset, self.totals, self.running = offset, NOTHING, 0

    @property
    def estimate(self) -> Totals:
        return _plus(self.offset, self.totals)


class KeyAccount:
    """One key. ``own``: what this router has taken for it, ``base`` of it before the key last came into use; ``others``: what other
    routers have taken, as far as leaders have said."""

    def __init__(self, key: str, number: int) -> None:
        self.key, self.tenant, self.number = key, "", number
        self.limits = KeyLimits()
        self.window = MinuteWindow()
        self.own = self.base = self.others = NOTHING
        self.leaders: dict[str, _Leader] = {}
        self.running = self.others_running = 0
        self.prompt_tokens = self.output_tokens = 0
        self.refused: dict[Reason, int] = {"requests": 0, "tokens": 0, "concurrency": 0}


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """What one admitted request holds, until :meth:`KeyLimiter.settle`."""

    account: KeyAccount
    slice: _Slice
    tokens: int


class KeyUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a key has used at one router since the router's start, and in the last minute at all routers as far as it knows. Tokens of the
    minute are those reserved or used."""

    key: str
    tenant: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    refused: dict[str, int]
    running: int
    minute_requests: int
    minute_tokens: int
    limits: KeyLimits


class KeyLimiter:
    """All accounts of one router."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[str, KeyAccount] = OrderedDict()
        self._numbers = 0
        #: When each leader process was last heard, and the keys that it named then.
        self._leaders: dict[str, tuple[float, frozenset[str]]] = {}

    # --- what frontends do

    def check(self, key: str, tenant: str, limits: KeyLimits, now: float) -> None:
        """Refuse, before a request costs anything, what cannot be admitted whatever it asks for. Raises :class:`RateLimited`."""
        account = self._account(key)
        account.tenant, account.limits = tenant, limits
        account.window.expire(now)
        self._judge(account, 1, now)

    def admit(self, key: str, tokens: int, now: float) -> Reservation:
        """Reserve ``tokens`` for one request, which :meth:`check` has let through. Raises :class:`RateLimited`."""
        account = self._account(key)
        account.window.expire(now)
        self._judge(account, tokens, now)
        account.running += 1
        requests, reserved, returned = account.own
        account.own = (requests + 1, reserved + tokens, returned)
        return Reservation(account, account.window.add(1, tokens, now), tokens)

    def settle(self, reservation: Reservation, prompt: int, output: int, now: float) -> None:
        """The request has ended after so many tokens; what else it had reserved is free again."""
        account = reservation.account
        account.running -= 1
        account.prompt_tokens += prompt
        account.output_tokens += output
        unused = reservation.tokens - prompt - output
        requests, reserved, returned = account.own
        if unused >= 0:
            account.own = (requests, reserved, returned + unused)
            account.window.give_back(reservation.slice, 0, unused, now)
        else:  # no limit was asked for, and the answer was longer than was reserved
            account.own = (requests, reserved - unused, returned)
            account.window.add(0, -unused, now)

    def headers(self, key: str, now: float) -> dict[str, str]:
        """OpenAI's headers about the limits that the key has."""
        account = self._account(key)
        window, limits = account.window, account.limits
        window.expire(now)
        found: dict[str, str] = {}
        for name, limit, used, free in (
            ("requests", limits.rpm, window.requests, window.free_in(window.requests, 0, now)),
            ("tokens", limits.tpm, window.tokens, window.free_in(0, window.tokens, now)),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{name}"] = str(limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                found[f"x-ratelimit-reset-{name}"] = duration(free)
        return found

    def _judge(self, account: KeyAccount, tokens: int, now: float) -> None:
        limits, window = account.limits, account.window
        running = account.running + account.others_running
        if limits.concurrency is not None and running >= limits.concurrency:
            self._refuse(account, "concurrency", f"{running} requests of this key run, its limit is {limits.concurrency} at once", 1.0)
        if limits.rpm is not None and window.requests >= limits.rpm:
            why = f"{window.requests} requests in the last minute, its limit is {limits.rpm}"
            self._refuse(account, "requests", why, window.free_in(window.requests + 1 - limits.rpm, 0, now))
        if limits.tpm is None:
            return
        if tokens > limits.tpm:
            self._refuse(account, "tokens", f"the request alone may take {tokens} tokens, its limit is {limits.tpm} a minute", None)
        if window.tokens + tokens > limits.tpm:
            why = f"{window.tokens} tokens used or reserved in the last minute and {tokens} asked for, its limit is {limits.tpm}"
            self._refuse(account, "tokens", why, window.free_in(0, window.tokens + tokens - limits.tpm, now))

    def _refuse(self, account: KeyAccount, reason: Reason, why: str, retry_after: float | None) -> None:
        account.refused[reason] += 1
        hint = "retry later" if retry_after is not None else "ask for fewer tokens"
        raise RateLimited(f"the limit of this API key is reached ({reason})", why, hint, kind=reason, retry_after=retry_after)

    def _account(self, key: str) -> KeyAccount:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = KeyAccount(key, self._numbers)
            self._numbers += 1
            if len(self._accounts) > MAX_ACCOUNTS:
                self._forget_one(key)
        self._accounts.move_to_end(key)
        return account

    def _forget_one(self, kept: str) -> None:
        for key, account in self._accounts.items():
            if key != kept and not account.running and account.window.idle:
                del self._accounts[key]
                return

    # --- what leaders hear and say

    def report(self, now: float) -> list[KeyUse]:
        """This router's totals of the keys with a limit that are in use, the most active first. They begin anew with each time of use."""
        active: list[tuple[int, KeyUse]] = []
        for account in self._accounts.values():
            window = account.window
            window.expire(now)
            if window.idle and not account.running:
                account.base = account.own
            elif account.limits.shared and account.own != account.base:
                totals = _minus(account.own, account.base)
                active.append((window.requests + window.tokens, KeyUse(account.key, *totals, account.running)))
        active.sort(key=lambda one: one[0], reverse=True)
        return [use for _, use in active[:MAX_KEYS]]

    def hear(self, leader: str, uses: Sequence[KeyUse], now: float) -> None:
        """The leader process with this nonce says what all other routers have taken."""
        for gone in [boot for boot, (heard, _) in self._leaders.items() if now - heard > LEADER_S]:
            self._forget_leader(gone)
        said = {use.key: use for use in uses}
        before = self._leaders.get(leader)
        self._leaders[leader] = (now, frozenset(said))
        if before is None:
            # Its sums began with its own life: from here on, only what is added to them counts.
            for key, use in said.items():
                self._account(key).leaders[leader] = _Leader(_minus(self._account(key).others, _totals(use)))
            for key, account in self._accounts.items():
                if key not in said:
                    account.leaders[leader] = _Leader(account.others)
        for key, use in said.items():
            account = self._account(key)
            view = account.leaders.get(leader)
            if view is None:  # the key is new here, and this leader's sum for it began after the leader was first heard
                view = account.leaders[leader] = _Leader(NOTHING)
            if view.totals != _totals(use) or view.running != use.running:
                view.totals, view.running = _totals(use), use.running
                self._learn(account, now)
        for key in before[1] - said.keys() if before is not None else ():
            account = self._account(key)
            if (view := account.leaders.get(leader)) is not None and view.running:
                view.running = 0
                self._learn(account, now)

    def _forget_leader(self, boot: str) -> None:
        del self._leaders[boot]
        for account in self._accounts.values():
            account.leaders.pop(boot, None)

    def _learn(self, account: KeyAccount, now: float) -> None:
        """Enter what others have taken since the last time: the lower median of what all leaders say, silence included."""
        views = [account.leaders.get(leader) for leader in self._leaders]
        account.others_running = _lower_median([view.running if view is not None else 0 for view in views])
        columns = zip(*(view.estimate if view is not None else NOTHING for view in views), strict=True)
        found = [max(before, _lower_median(list(column))) for before, column in zip(account.others, columns, strict=True)]
        requests, reserved, returned = (new - old for new, old in zip(found, account.others, strict=True))
        account.others = (found[0], found[1], found[2])
        if requests or reserved:
            account.window.add(requests, reserved, now)
        if returned:
            account.window.give_back_latest(returned, now)

    # --- what is known

    def usage(self, now: float) -> list[KeyUsage]:
        """Every key that was used here and is remembered, in the order of their first use."""
        found: list[KeyUsage] = []
        for account in sorted(self._accounts.values(), key=attrgetter("number")):
            account.window.expire(now)
            if account.own[0] or any(account.refused.values()):
                found.append(
                    KeyUsage(
                        key=account.key, tenant=account.tenant, requests=account.own[0], prompt_tokens=account.prompt_tokens,
                        output_tokens=account.output_tokens, refused=dict(account.refused.items()), running=account.running,
                        minute_requests=account.window.requests, minute_tokens=account.window.tokens, limits=account.limits,
                    )
                )  # fmt: skip
        return found


def duration(seconds: float) -> str:
    """As OpenAI's headers write it: ``12ms``, ``8.64s``, ``6m0s``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    shown = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{shown}s" if minutes else f"{shown}s"


def _totals(use: KeyUse) -> Totals:
    return use.requests, use.reserved, use.returned


def _plus(one: Totals, other: Totals) -> Totals:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _minus(one: Totals, other: Totals) -> Totals:
    return one[0] - other[0], one[1] - other[1], one[2] - other[2]


def _lower_median(values: list[int]) -> int:
    return sorted(values)[(len(values) - 1) // 2] if values else 0
