"""The wanted state of a deployment: its configuration and its gangs, and the update that changes them.

Owns all three: no other module writes them. The host passes the gangs to the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.auth.keyring import KeyRing
from orchestrator.config.deployment_file import Config
from orchestrator.config.router_spec import ModelCard
from orchestrator.control.host.control_socket import UpdateCommand, UpdateReport
from orchestrator.control.host.deployment_plan import RouterEndpoints, admit
from orchestrator.control.host.update import Update
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.reconciler import ReplicaView
from orchestrator.planner.automatic import ClusterHardware
from workers.artifacts.convert import silent
from workers.protocol.errors import Rejected


class DesiredState:
    """``config`` and ``gangs`` are in force: during an update the new configuration, and every gang that may have processes; after a
    rollback the old ones again.

    ``model_cards``: the models as the routers know them; ``endpoints``: how replicas reach the routers; ``hardware``: the hardware of the
    replicas before the first one used some of it.
    """

    def __init__(
        self, config: Config, gangs: list[GangSpec], model_cards: Sequence[ModelCard], endpoints: RouterEndpoints, keys: KeyRing,
        hardware: ClusterHardware,
    ) -> None:  # fmt: skip
        self.config, self.gangs, self.model_cards, self.endpoints = config, gangs, tuple(model_cards), endpoints
        self.hardware = hardware
        self._keys = keys
        self._update: Update | None = None
        # Whether the controller has the gangs that the update currently wants.
        self._applied = True

    def begin_update(self, order: UpdateCommand, views: Sequence[ReplicaView], now: float) -> UpdateReport:
        """Start an update, or only return its plan (``dry_run``). Raises :class:`Rejected` while another update runs, :class:`ConfigError`
        for what cannot be changed in place. Called in the control socket's thread."""
        if self._update is not None and self._updating:
            raise Rejected("an update is under way", self._update.report().doing, "trireme status tells how far it is")
        update = Update(
            self.config, order, self.gangs, self.model_cards, views, endpoints=self.endpoints, keys=self._keys, hardware=self.hardware,
            now=now, progress=silent,
        )  # fmt: skip
        if not order.dry_run:
            admit(self._keys, update.all_gangs, self.endpoints)  # the keys of new replicas
            self._update = update
        return update.report()

    def step(self, now: float, views: Sequence[ReplicaView], apply: Callable[[list[GangSpec]], None]) -> UpdateReport | None:
        """Make the next move of an update, if it is due; returns a report if something changed.

        ``apply`` gets the gangs that are wanted from now on. If it raises, it is called again in the next step.
        """
        update = self._update
        if update is None or not self._updating:
            return None
        moved = update.step(now, views)
        self._applied &= not moved
        if not self._applied:
            apply(update.wanted())
            self._applied = True
        self.config = update.config
        self.gangs = update.gangs if update.over else update.all_gangs
        if update.over:
            admit(self._keys, self.gangs, self.endpoints)
        return update.report() if moved or update.over else None

    @property
    def _updating(self) -> bool:
        return self._update is not None and not (self._update.over and self._applied)

    def report(self) -> UpdateReport | None:
        """The progress of the last update; None before the first."""
        return self._update.report() if self._update is not None else None
