"""Routers of another deployment that our replicas join; this deployment has no routers of its own.

Owns the join file, our pass, and their last reports about our replicas. Starts and ends no router.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from orchestrator.auth.keyring import JoinPass, read_pass
from orchestrator.config.deployment_file import Config
from orchestrator.control.host.deployment_plan import RouterEndpoints, ServedModel
from orchestrator.control.host.join_file import JoinFile, fingerprint
from orchestrator.control.host.router_poller import RouterPoller, ask
from orchestrator.files import make_private, write_private
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.messages import PROTOCOL
from workers.protocol.specs import RouterAddress
from workers.protocol.status import RouterStatus

#: Longest wait of a start for a router that answers, seconds.
REACH_S = 20.0
_INSTANCE = re.compile(r"[0-9a-f]{6}")


def read_join(path: Path) -> JoinFile:
    """Raises :class:`ConfigError`."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=JoinFile)
    except OSError as error:
        raise ConfigError(
            f"cannot read the join file {path}", error.strerror or str(error), "trireme router writes it when it is ready"
        ) from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no join file", str(error), "trireme router writes it") from None
    if not file.routers or not file.rpc:
        raise ConfigError(
            f"{path} names no routers", "it needs back sockets (routers) and client sockets (rpc)", "trireme router writes it"
        )
    return file


class ExternalRouters:
    """The routers that ``config.join`` names. Raises :class:`ConfigError` for a configuration that can never work there.

    ``endpoints``: how our replicas reach them, with names that are unique to this run folder, so that two jobs made from one file never
    fence each other. ``key_file``: the pass's client key pair, for RPC clients of this host.
    """

    def __init__(self, config: Config) -> None:
        self._file = read_join(Path(config.join.file).expanduser())
        join_pass = read_pass(Path(config.join.key_file).expanduser())
        _check(config, self._file, join_pass)
        home = make_private(config.home)
        prefix = f"{join_pass.name}/{config.name}-{_instance(home)}/"
        self.endpoints = RouterEndpoints(
            addresses=self._file.routers, secured=True, prefix=prefix, key=msgspec.json.encode(join_pass.replica).decode()
        )
        self.key_file = make_private(home / "keys") / "client-join.json"
        write_private(self.key_file, msgspec.json.encode(join_pass.client))
        self._key = join_pass.client
        self._reports = RouterPoller(lambda: [(address.endpoint, address) for address in self._file.rpc], join_pass.client, prefix=prefix)

    @property
    def name(self) -> str:
        """Name of the deployment that they belong to."""
        return self._file.name

    def reach(self, check_stop: Callable[[], None]) -> None:
        """Wait until one of them answers. ``check_stop`` is called between tries and may raise to end the wait.

        Raises :class:`EnvironmentFault` when none answers within :data:`REACH_S`, :class:`ConfigError` when none knows the pass.
        """
        deadline = time.monotonic() + REACH_S
        context: zmq.Context[Any] = zmq.Context()
        try:
            while time.monotonic() < deadline:
                if self._answers(context):
                    return
                check_stop()
        finally:
            context.destroy(linger=0)
        raise EnvironmentFault(
            f"no router of {self._file.name} answers",
            f"asked {', '.join(address.endpoint for address in self._file.rpc)} for {REACH_S:.0f} s",
            "is it up (trireme router), and can this host reach it?",
        )

    def _answers(self, context: zmq.Context[Any]) -> bool:
        refusals = []
        for address in self._file.rpc:
            try:
                if ask(context, address, self._key) is not None:
                    return True
            except ConfigError as refusal:
                refusals.append(refusal)
        if len(refusals) == len(self._file.rpc):
            raise refusals[0]
        return False

    def check_tokenizers(self, models: Sequence[ServedModel]) -> None:
        """Raises :class:`ConfigError` if the routers' tokenizer differs from that of a model of ours."""
        for model in models:
            if fingerprint(Path(model.tokenizer)) != self._file.models[model.config.name]:
                raise ConfigError(
                    f"{model.config.name} has another tokenizer than the routers of {self._file.name}",
                    f"{model.tokenizer}/tokenizer.json differs from theirs",
                    "name another model, or serve it under another name",
                )

    def start(self) -> None:
        self._reports.start()

    def tick(self) -> None:
        """No-op: external routers are supervised by their own deployment."""

    def ready(self) -> bool:
        return bool(self._reports.fresh())

    def url(self) -> str:
        return self._file.http

    def addresses(self) -> tuple[RouterAddress, ...]:
        """The addresses of the RPC servers."""
        return self._file.rpc

    def pids(self) -> dict[str, int]:
        return {}

    def reports(self) -> list[RouterStatus]:
        """Reports of the last seconds about our replicas, and only ours."""
        return self._reports.fresh()

    def hung(self, ready: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        """As :meth:`RouterPoller.hung`."""
        return self._reports.hung(ready, routers=len(self._file.rpc))

    def stop(self, grace_s: float) -> None:
        """Stop polling; external routers keep running."""
        self._reports.close()
        self._reports.join()


def _check(config: Config, file: JoinFile, join_pass: JoinPass) -> None:
    if any(address.server_key != join_pass.server for address in (*file.routers, *file.rpc)):
        raise ConfigError(
            f"the pass of {join_pass.name} is for other routers than those of {file.name}",
            f"{config.join.file} names another public key",
            "take both files from the same deployment",
        )
    if file.protocol != PROTOCOL:
        raise ConfigError(
            f"the routers of {file.name} speak protocol {file.protocol}, this version {PROTOCOL}", "", "use the same version on both sides"
        )
    if file.replica_timeout_s <= 2 * config.heartbeat_s:
        raise ConfigError(
            f"heartbeat_s: {config.heartbeat_s} is too long",
            f"the routers of {file.name} give a replica up after {file.replica_timeout_s} s of silence (replica_timeout_s)",
            "make it less than half of that",
        )
    for model in config.models:
        if model.name not in file.models:
            raise ConfigError(
                f"the routers of {file.name} do not serve {model.name}", f"they serve {', '.join(file.models)}", "name it in their file"
            )
        if join_pass.models is not None and model.name not in join_pass.models:
            raise ConfigError(
                f"the pass of {join_pass.name} does not cover {model.name}",
                f"it is for {', '.join(join_pass.models)}",
                f"trireme keys join {join_pass.name} --models ..., at the routers",
            )


def _instance(home: Path) -> str:
    """A random name that separates this run folder's replicas from those of another run folder with the same file; made once."""
    path = home / "instance"
    if path.exists() and _INSTANCE.fullmatch(text := path.read_text()):
        return text
    made = secrets.token_hex(3)
    write_private(path, made.encode())
    return made
