"""The update of a running deployment to another configuration: what may change in place, the gangs to run, and the progress.

Owns one update from the order to its last move. :mod:`orchestrator.control.rollout` decides when each move happens, and the controller
acts. Routers keep the settings that they were started with; a file with other router settings is refused, and the error names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from orchestrator.auth.keyring import KeyRing
from orchestrator.config.deployment_file import Config, ModelConfig, Resolved
from orchestrator.config.engine_settings import AUTO
from orchestrator.config.router_spec import JoinSpec, ModelCard
from orchestrator.control.host import deployment_plan
from orchestrator.control.host.control_socket import UpdateCommand, UpdateReport
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.reconciler import ReplicaView
from orchestrator.control.rollout import Rollout, RolloutBounds, RolloutTarget, plan
from orchestrator.planner.automatic import ClusterHardware
from workers.artifacts.convert import Progress
from workers.artifacts.hf import tokenizer_paths
from workers.protocol.errors import ConfigError

#: Free memory that a spare on this host needs, as a multiple of its artifact's size.
_ROOM_FACTOR = 3
_HINT = "trireme down, then trireme up; or leave it as it is"


def merge(current: Config, order: UpdateCommand) -> Config:
    """The running configuration with the order's models. Raises :class:`ConfigError` naming every setting that cannot be changed in place.

    Settings that the order does not contain stay as they are, whatever their defaults.
    """
    if found := [*_changed_settings(current, order), *_changed_models(current.models, order.config.models)]:
        raise ConfigError("this cannot be changed in place: " + ", ".join(found), "the routers were started with it", _HINT)
    return msgspec.structs.replace(current, models=order.config.models)


def _changed_settings(current: Config, order: UpdateCommand) -> Iterator[str]:
    """Settings outside of the models that the order changes; an automatic setting in the order accepts the running value."""
    before, after = _settings(current), _settings(order.config)
    # An order's paths are absolute, because the command and the host may have different working folders.
    before |= {"run_dir": str(current.home.parent), "http.api_keys_file": str(current.api_keys_file or "")}
    before |= {"join.file": _absolute(current.join.file), "join.key_file": _absolute(current.join.key_file)}
    for path in before:
        if path in order.said and after[path] not in (before[path], AUTO):
            yield f"{path} ({before[path]} runs, {after[path]} is wanted)"


def _settings(config: Config) -> dict[str, object]:
    """Path -> value of every setting outside of the models."""
    return {row.path: row.value for row in Resolved(config=config, sources={}).rows() if not row.path.startswith("models")}


def _changed_models(current: Sequence[ModelConfig], wanted: Sequence[ModelConfig]) -> Iterator[str]:
    """Changes of the models that routers know: their number and names, aliases, context and chat templates."""
    running = {model.name: model for model in current}
    if running.keys() != {model.name for model in wanted}:
        yield f"models ({', '.join(running)} run, {', '.join(model.name for model in wanted)} are wanted)"
    for new in wanted:
        if (old := running.get(new.name)) is None:
            continue
        if old.aliases != new.aliases:
            yield f"aliases of {new.name} ({old.aliases} runs, {new.aliases} is wanted)"
        if (limit := old.settings.max_seq_len) != new.settings.max_seq_len:
            yield f"max_seq_len of {new.name} ({limit} runs, {new.settings.max_seq_len} is wanted)"
        if _absolute(old.chat_template) != _absolute(new.chat_template):
            yield f"chat_template of {new.name} ({old.chat_template or 'its own'} runs, {new.chat_template or 'its own'} is wanted)"


def prepare(config: Config, hardware: ClusterHardware, progress: Progress) -> Config:
    """Fetch and convert everything that the new replicas load, and return it with absolute paths. Raises what
    :func:`orchestrator.control.host.deployment_plan.prepare_models` raises."""
    deployment_plan.prepare_models(config.models, hardware, config.cache, progress)
    return msgspec.structs.replace(
        config,
        models=tuple(map(_rooted, config.models)),
        run_dir=str(config.home.parent),
        http=msgspec.structs.replace(config.http, api_keys_file=str(config.api_keys_file or "")),
        join=JoinSpec(file=_absolute(config.join.file), key_file=_absolute(config.join.key_file)),
    )


def _rooted(model: ModelConfig) -> ModelConfig:
    rows = model.replicas
    if not isinstance(rows, int):
        rows = tuple(msgspec.structs.replace(row, path=_absolute(row.path)) for row in rows)
    paths = {"path": model.path or model.name, "tokenizer": model.tokenizer, "chat_template": model.chat_template}
    return msgspec.structs.replace(model, replicas=rows, **{key: _absolute(path) for key, path in paths.items()})


def _absolute(source: str) -> str:
    """The absolute form of an existing path; a model's name unchanged."""
    path = Path(source).expanduser()
    return str(path.absolute()) if source and path.exists() else source


class Update:
    """The update from the running configuration to another one. ``gangs``: the running gangs; ``cards``: the models as routers know them.
    Raises
    :class:`ConfigError`. It changes nothing by itself: :class:`~orchestrator.control.host.desired_state.DesiredState` does.

    ``config`` is the configuration for the status table: the new one, unless the update is being rolled back.
    """

    def __init__(
        self, current: Config, order: UpdateCommand, gangs: Sequence[GangSpec], cards: Sequence[ModelCard], views: Sequence[ReplicaView],
        *, endpoints: deployment_plan.RouterEndpoints, keys: KeyRing, hardware: ClusterHardware, now: float, progress: Progress,
    ) -> None:  # fmt: skip
        self._old, self._new = current, merge(current, order)
        models = deployment_plan.prepare_models(self._new.models, hardware, self._new.cache, progress)
        for model in models:
            _check_tokenizer(model, cards)
        self._keys, self._endpoints = keys, endpoints
        after = deployment_plan.gangs(self._new, models, endpoints, self._keys)
        spares = self._spares(gangs, after)
        self._specs = {gang.revision: gang for gang in (*gangs, *after, *spares)}
        self._before, self._after = list(gangs), after
        ready = frozenset(view.name for view in views if view.phase == "ready")
        moves = plan(_targets(gangs), _targets(after), _targets(spares), ready=ready)
        self.moves = tuple(map(str, moves))
        move_s = 2 * current.start_timeout_s + current.drain_grace_s
        self._rollout = Rollout(_targets(gangs), moves, RolloutBounds(move_s=move_s), now)
        self._begun, self._ended = now, now

    def _spares(self, gangs: Sequence[GangSpec], after: Sequence[GangSpec]) -> list[GangSpec]:
        """One more replica of each model, if there is room for it."""
        names = {gang.replica.name for gang in (*gangs, *after)}
        spares = []
        for model in self._new.models:
            first = next(gang for gang in after if gang.replica.model == model.name)
            name = f"{first.replica.name[:34]}-spare"
            spare = deployment_plan.renamed(first, name, self._endpoints, self._keys)
            if name not in names and (self._new.launcher == "ray" or _has_room(gangs, spare)):
                spares.append(spare)
        return spares

    @property
    def over(self) -> bool:
        return self._rollout.over

    @property
    def config(self) -> Config:
        return self._old if self._rollout.error else self._new

    @property
    def gangs(self) -> list[GangSpec]:
        """The gangs after the update."""
        return self._before if self._rollout.error else self._after

    @property
    def all_gangs(self) -> list[GangSpec]:
        """Every gang that may have processes before the update is over."""
        return list(self._specs.values())

    def wanted(self) -> list[GangSpec]:
        """The currently wanted gangs."""
        return [self._specs[want.revision] for want in self._rollout.wants()]

    def step(self, now: float, views: Sequence[ReplicaView]) -> bool:
        """Advance the update; True if :meth:`wanted` has changed."""
        changed = self._rollout.step(now, {view.name: view for view in views})
        if not self.over:
            self._ended = now
        return changed

    def report(self) -> UpdateReport:
        rollout = self._rollout
        return UpdateReport(
            phase=rollout.phase,
            moves=self.moves,
            steps=tuple((step.text, step.seconds) for step in rollout.steps),
            doing=rollout.doing,
            left=rollout.left,
            error=rollout.error,
            seconds=self._ended - self._begun,
        )


def _targets(gangs: Sequence[GangSpec]) -> list[RolloutTarget]:
    return [RolloutTarget(name=gang.replica.name, model=gang.replica.model, revision=gang.revision) for gang in gangs]


def _check_tokenizer(model: deployment_plan.ServedModel, cards: Sequence[ModelCard]) -> None:
    """Routers keep the tokenizer files that they were started with. Raises :class:`ConfigError` if the new files differ."""
    card = next(card for card in cards if card.name == model.config.name)
    old, new = tokenizer_paths(Path(card.tokenizer)), tokenizer_paths(Path(model.tokenizer))
    if other := [name for name in sorted(old.keys() | new.keys()) if _content(old.get(name)) != _content(new.get(name))]:
        raise ConfigError(
            f"this cannot be changed in place: path of {model.config.name} (others than before: {', '.join(other)})",
            "the routers were started with the old ones",
            _HINT,
        )


def _content(path: Path | None) -> bytes:
    return b"" if path is None else path.read_bytes()


def _has_room(gangs: Sequence[GangSpec], spare: GangSpec) -> bool:
    """Whether this host has room for one more gang: a CPU share for each rank of all gangs, and memory for its files and converted
    weights."""
    if spare.replica.engine.device == "cuda":
        return False  # this launcher counts no GPUs
    shares = sum(gang.share.cpus * gang.replica.parallel.world for gang in (*gangs, spare))
    size = sum(file.stat().st_size for file in Path(spare.replica.artifact).rglob("*") if file.is_file())
    return shares <= len(os.sched_getaffinity(0)) and size * _ROOM_FACTOR < psutil.virtual_memory().available
