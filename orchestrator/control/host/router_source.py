"""A deployment's interface to its routers: its own (:mod:`.own_routers`), or those of another deployment (:mod:`.external_routers`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from workers.protocol.specs import RouterAddress
from workers.protocol.status import RouterStatus


class RouterSource(Protocol):
    """The routers of one deployment. ``key_file``: the key file for RPC clients on this host."""

    key_file: Path

    def start(self) -> None: ...

    def tick(self) -> None:
        """Keep own routers running; external ones are not touched."""

    def ready(self) -> bool: ...

    def url(self) -> str:
        """The HTTP address, empty while there is none."""

    def addresses(self) -> tuple[RouterAddress, ...]:
        """The addresses of the RPC servers."""

    def pids(self) -> dict[str, int]: ...

    def reports(self) -> list[RouterStatus]:
        """Reports of living routers from the last seconds."""

    def hung(self, ready: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        """As :meth:`~orchestrator.control.host.router_poller.RouterPoller.hung`."""

    def stop(self, grace_s: float) -> None: ...
