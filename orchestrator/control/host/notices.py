"""Notices for a user who waits for a deployment. Owns the list of notices that were already sent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from orchestrator.control.host.control_socket import DeploymentStatus
from workers.epoch import started_at
from workers.protocol.messages import Capacity

log = logging.getLogger("trireme.deployment")


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """An event. ``seconds``: its duration."""

    kind: Literal["settings", "model", "ray", "router", "replica", "join", "ready", "update", "warning", "stopping", "stopped"]
    subject: str
    text: str
    seconds: float = 0.0
    capacity: Capacity | None = None


Notify: TypeAlias = Callable[[Notice], None]


def log_notice(notice: Notice) -> None:
    """Write a notice to the log, for a host without other output."""
    log.info("%s %s: %s", notice.kind, notice.subject, notice.text)


class ReplicaNotices:
    """Turns each change of a replica's state into a notice, once."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._said: set[tuple[str, int, str]] = set()

    def follow(self, status: DeploymentStatus) -> None:
        for row in (row for model in status.models for row in model.replicas):
            key = (row.name, row.epoch, row.state)
            if key in self._said:
                continue
            self._said.add(key)
            if row.state == "READY":
                seconds = time.time() - started_at(row.epoch)
                text = f"tp={row.tp} pp={row.pp} ready"
                self._notify(Notice(kind="replica", subject=row.name, text=text, seconds=seconds, capacity=row.capacity))
            elif row.cause and row.state in ("BACKOFF", "FAILED", "PLACING", "QUARANTINED"):
                self._notify(Notice(kind="warning", subject=row.name, text=f"{row.state}: {row.cause}"))
