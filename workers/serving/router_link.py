"""The state of a leader's connection to one router: it tracks Hello, the router's answers, and the loss of the router.

    closed --tick, after a pause--> connecting --connected--> greeted (Hello was sent) --heard--> live (the router's boot nonce is known)
    connecting, greeted, live --broken | silence--> closed
    live --heard, with another boot nonce--> live: the old router is lost, and Hello is sent again

Pure: the I/O thread reports events with the time and carries out the actions; must never touch a socket or a clock.

One rule covers every way to lose a router (disconnect, a send that would block, silence, Bye): its boot nonce is reported lost once, the
socket is closed, and a new one is opened after a pause, which doubles while the router does not answer.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

#: Seconds of silence after which a router counts as lost, and bounds of the pause before a new connection.
SILENCE_S = 2.0
PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 1.0


class SendHello(msgspec.Struct, frozen=True):
    """Send Hello."""


class RouterLost(msgspec.Struct, frozen=True):
    """The router with this boot nonce is lost: its sequences are orphans."""

    boot: str


class CloseSocket(msgspec.Struct, frozen=True):
    """Drop the socket and all that is queued in it."""


class OpenSocket(msgspec.Struct, frozen=True):
    """Make a new socket and connect."""


LinkAction: TypeAlias = SendHello | RouterLost | CloseSocket | OpenSocket


class RouterLink:
    """One router address. Times are seconds of one monotonic clock; a new link opens at its first :meth:`tick`."""

    def __init__(self, *, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self.state: Literal["closed", "connecting", "greeted", "live"] = "closed"
        #: The router's nonce; empty unless live.
        self.boot = ""
        self._heard = self._open_at = 0.0
        self._pause = PAUSE_MIN_S

    @property
    def up(self) -> bool:
        """Whether messages may be sent: only after Hello, which must be the first message on a connection."""
        return self.state in ("greeted", "live")

    def connected(self, now: float) -> list[LinkAction]:
        """The transport's handshake succeeded."""
        if self.state != "connecting":  # the socket reconnected by itself: messages of the old connection may be lost
            return self.broken(now)
        self.state, self._heard = "greeted", now
        return [SendHello()]

    def heard(self, boot: str, now: float) -> list[LinkAction]:
        """A well-formed message of the router with nonce ``boot`` has arrived."""
        if not self.up or not boot:
            return []
        self._heard, self._pause = now, PAUSE_MIN_S
        if self.state == "greeted":
            self.state, self.boot = "live", boot
            return []
        if boot == self.boot:
            return []
        old, self.boot = self.boot, boot
        return [RouterLost(old), SendHello()]

    def broken(self, now: float) -> list[LinkAction]:
        """The connection is lost: disconnect, a send that would block, or Bye."""
        if self.state == "closed":
            return []
        actions: list[LinkAction] = [RouterLost(self.boot)] if self.boot else []
        self.state, self.boot = "closed", ""
        self._open_at = now + self._pause
        self._pause = min(2 * self._pause, PAUSE_MAX_S)
        return [*actions, CloseSocket()]

    def tick(self, now: float) -> list[LinkAction]:
        """Act on the passage of time."""
        if self.state == "closed" and now >= self._open_at:
            self.state = "connecting"
            return [OpenSocket()]
        if self.up and now - self._heard > self._silence_s:
            return self.broken(now)
        return []
