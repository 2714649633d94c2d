"""Replicas at routers of another deployment: passes and what they allow, the join file, and the two status tables. The whole: tests/e2e."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.auth.curve_acl import CurveAcl
from orchestrator.auth.keyring import JoinPass, KeyRing, read_pass
from orchestrator.client import Client, ClientKeys
from orchestrator.config.deployment_file import Config, load
from orchestrator.control.host import deployment_plan, external_routers, join_file
from orchestrator.control.host.external_routers import ExternalRouters
from orchestrator.control.host.join_file import JoinFile
from orchestrator.control.host.status_table import HostFacts, describe, describe_routers_only
from orchestrator.control.reconciler import GangStatus, ReplicaView
from tests.support.gang import short_folder, wait_for
from tests.support.impostor import Impostor, dealer
from tests.support.router_process import RouterRun
from tests.support.tiny_models import tiny_tokenizer
from workers.protocol.errors import ConfigError, EnvironmentFault, NotFound, Rejected
from workers.protocol.messages import PROTOCOL, Bye, RouterHeartbeat
from workers.protocol.specs import PortableSpec, RouterAddress
from workers.protocol.status import ReplicaStatus, RouterStatus, RoutingState

KEY = "a" * 40


def ring_with(folder: Path, *members: str) -> KeyRing:
    ring = KeyRing(folder / "keys")
    ring.allow([("router", "all"), ("client", "local"), *(("replica", name) for name in members)])
    return ring


def test_a_pass_holds_for_a_family_of_names_and_its_models(tmp_path: Path) -> None:
    ring = ring_with(tmp_path, "a")
    path = ring.admit_replicas("slurm", ["m"])
    held = read_pass(path)
    assert path.stat().st_mode & 0o777 == 0o600 and (held.name, held.models) == ("slurm", ("m",))
    gate = CurveAcl(ring.grants())
    replica, client = held.replica.public, held.client.public
    assert gate.may_be(replica, "slurm/job-1/a", "m") and not gate.may_be(replica, "slurm/job-1/a", "n")
    for name in ("a", "slurm", "slurmer/job/a", "other/slurm/a", ""):
        assert not gate.may_be(replica, name, "m"), name
    assert not gate.admits(replica, "client") and not gate.admits(client, "replica")
    assert gate.tenant(client).sees_all and gate.tenant(client).models == ("m",)
    assert not gate.may_be(ring.pair("replica", "a").public, "slurm/job-1/a", "m"), "a key for one name is none for a family"


def test_passes_outlast_the_deployments_own_list_until_they_are_taken_back(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys")
    before = read_pass(ring.admit_replicas("slurm", ["m"]))  # before the routers were ever started
    ring.allow([("router", "all"), ("client", "local")])
    ring.admit_client("slurm", [])
    after = read_pass(ring.admit_replicas("slurm", ["m", "n"]))
    assert after.replica == before.replica and after.models == ("m", "n"), "jobs that run keep their keys"
    assert CurveAcl(ring.grants()).may_be(before.replica.public, "slurm/x/a", "n")
    ring.remove_pass("slurm")
    gate = CurveAcl(ring.grants())
    assert not gate.admits(before.replica.public, "replica") and not gate.admits(before.client.public, "client")
    assert gate.admits(ring.pair("client", "slurm").public, "client"), "a client of the same name is another one"
    assert not ring.path("pass", "slurm").exists()
    with pytest.raises(NotFound):
        ring.remove_pass("slurm")
    with pytest.raises(Rejected):
        ring.admit_replicas("../x", [])


def job(folder: Path, **more: Any) -> Config:
    tree = {"name": "job", "run_dir": str(folder / "run"), "models": [{"name": "m", "engine": "fake"}]}
    return load(tree | {"join": {"file": str(folder / "join.json"), "key_file": str(folder / "pass.json")}} | more).config


def write(folder: Path, bound: tuple[str, ...] | None = None, **changes: Any) -> None:
    """A join file and a pass that fit :func:`job`, but for the ``changes``."""
    ring = KeyRing(folder / "keys")
    address = RouterAddress(endpoint="tcp://127.0.0.1:9", server_key=ring.pair("router", "all").public)
    file = JoinFile(protocol=PROTOCOL, name="front", routers=(address,), rpc=(address,), models={"m": ""})
    (folder / "join.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(file, **changes)))
    server = ring.pair("router", "all").public
    made = JoinPass(name="slurm", server=server, models=bound, replica=ring.pair("replica", "x"), client=ring.pair("client", "x"))
    (folder / "pass.json").write_bytes(msgspec.json.encode(made))
    (folder / "pass.json").chmod(0o600)


def test_names_are_the_run_folders_own(tmp_path: Path) -> None:
    """Two jobs of one file never fence each other; one that comes back does, by its newer epoch."""
    write(tmp_path)
    first, again = ExternalRouters(job(tmp_path)), ExternalRouters(job(tmp_path))
    other = ExternalRouters(job(tmp_path, run_dir=str(tmp_path / "other")))
    assert first.endpoints.prefix == again.endpoints.prefix != other.endpoints.prefix
    assert first.endpoints.prefix.startswith("slurm/job-") and first.endpoints.prefix.endswith("/")
    assert first.key_file.stat().st_mode & 0o777 == 0o600
    keys = KeyRing(tmp_path / "run" / "job" / "keys")
    model = deployment_plan.ServedModel(
        config=job(tmp_path).models[0],
        source="m",
        tokenizer="",
        gangs=(deployment_plan.GangArtifact(name="m-0", parallel=deployment_plan.Parallel(), artifact="", engine=PortableSpec()),),
    )
    plan = deployment_plan.plan(job(tmp_path), [model], keys, first.endpoints)
    assert plan.routers == [] and not keys.allowed_file.exists()
    (gang,) = plan.gangs
    assert (gang.replica.name, gang.replica.announced) == ("m-0", f"{first.endpoints.prefix}m-0") and gang.key == first.endpoints.key
    assert deployment_plan.renamed(gang, "m-0-spare", first.endpoints, keys).replica.announced == f"{first.endpoints.prefix}m-0-spare"


@pytest.mark.parametrize(
    ("bound", "changes", "more", "said"),
    [
        (None, {"protocol": PROTOCOL + 1}, {}, "speak protocol"),
        (None, {"models": {"n": ""}}, {}, "do not serve m"),
        (("n",), {}, {}, "does not cover m"),
        (None, {"replica_timeout_s": 1.0}, {"heartbeat_s": 0.5}, "heartbeat_s"),
        (None, {"routers": ()}, {}, "names no routers"),
        (None, {"rpc": (RouterAddress(endpoint="tcp://127.0.0.1:9", server_key=KEY),)}, {}, "is for other routers"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    tmp_path: Path, bound: tuple[str, ...] | None, changes: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    write(tmp_path, bound, **changes)
    with pytest.raises(ConfigError, match=said):
        ExternalRouters(job(tmp_path, **more))


def test_files_that_are_none_are_named_and_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the join file"):
        ExternalRouters(job(tmp_path))
    write(tmp_path)
    (tmp_path / "pass.json").write_text('{"name": "planted"}')
    with pytest.raises(ConfigError) as caught:
        ExternalRouters(job(tmp_path))
    assert "pass.json is no pass" in caught.value.what and "planted" not in caught.value.lines()
    (tmp_path / "pass.json").chmod(0o644)
    with pytest.raises(ConfigError, match="readable by others"):
        ExternalRouters(job(tmp_path))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    theirs, ours = tiny_tokenizer(tmp_path / "theirs"), tiny_tokenizer(tmp_path / "ours")
    write(tmp_path, models={"m": join_file.fingerprint(theirs)})
    routers = ExternalRouters(job(tmp_path))
    model = deployment_plan.ServedModel(config=job(tmp_path).models[0], source="m", tokenizer=str(ours), gangs=())
    routers.check_tokenizers([model])
    (ours / "tokenizer.json").write_text((ours / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ConfigError, match="another tokenizer"):
        routers.check_tokenizers([model])


def standing_config(**more: Any) -> Config:
    back, rpc = {"host": "0.0.0.0", "advertise": "front.example", "port": 8200}, {"host": "0.0.0.0", "port": 8100}
    return load({"name": "front", "back": back, "rpc": rpc, "routers": 2, "models": [{"name": "m"}]} | more).config


def test_a_join_file_names_what_others_can_reach(tmp_path: Path) -> None:
    config = standing_config(run_dir=str(tmp_path), http={"host": "0.0.0.0", "api_keys_file": "k"}, insecure_http_without_tls=True)
    keys = KeyRing(config.home / "keys")
    back = deployment_plan.own_endpoints(config, keys, "")
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    model = deployment_plan.ServedModel(config=config.models[0], source="m", tokenizer=str(tokenizer), gangs=())
    plan = deployment_plan.plan(config, [model], keys, back)
    assert [router.back for router in plan.routers] == ["tcp://0.0.0.0:8200", "tcp://0.0.0.0:8201"]
    assert all(router.peers == back.addresses and router.allowed_file for router in plan.routers)
    path = join_file.publish(
        config, back.addresses, keys.pair("router", "all").public, deployment_plan.model_cards([model]), "http://0.0.0.0:8000"
    )
    file = external_routers.read_join(path)
    assert [address.endpoint for address in file.routers] == ["tcp://front.example:8200", "tcp://front.example:8201"]
    assert [address.endpoint for address in file.rpc] == ["tcp://front.example:8100", "tcp://front.example:8101"]
    assert file.http == "http://front.example:8000" and file.models == {"m": join_file.fingerprint(tokenizer)}
    assert keys.pair("router", "all").secret not in path.read_text()


@pytest.mark.parametrize(("back", "said"), [({"host": "0.0.0.0"}, "back.advertise"), ({"host": "10.0.0.5", "port": 0}, "back.port")])
def test_an_address_that_nobody_can_use_is_refused(back: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        standing_config(back=back)


@pytest.mark.parametrize("missing", ["back", "rpc"])
def test_routers_that_nobody_could_join_do_not_start(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing}.host: is missing"):
        join_file.check(standing_config(**{missing: {}}))


class Told:
    """Routers that say what a test has them say."""

    key_file = Path("client.json")

    def __init__(self, *reports: RouterStatus) -> None:
        self._reports = list(reports)

    def start(self) -> None: ...

    def tick(self) -> None: ...

    def stop(self, grace_s: float) -> None: ...

    def ready(self) -> bool:
        return bool(self._reports)

    def url(self) -> str:
        return "http://front:8000"

    def addresses(self) -> tuple[RouterAddress, ...]:
        return ()

    def pids(self) -> dict[str, int]:
        return {}

    def reports(self) -> list[RouterStatus]:
        return self._reports

    def hung(self, ready: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        return frozenset()


def row(name: str, state: RoutingState = "ready", epoch: int = 7, **more: Any) -> ReplicaStatus:
    return ReplicaStatus(name=name, state=state, epoch=epoch, model="m", **more)


def report(*rows: ReplicaStatus) -> RouterStatus:
    return RouterStatus(router="router0", replicas=rows)


@pytest.mark.parametrize(
    ("reports", "state"),
    [
        ([], "JOINING"),
        ([report()], "JOINING"),
        ([report(row("m-0", epoch=6))], "JOINING"),
        ([report(row("m-0")), report()], "JOINING"),
        ([report(row("m-0"))], "READY"),
        ([report(row("m-0")), report(row("m-0"))], "READY"),
    ],
)
def test_ready_means_accepted_by_every_router_that_answers(tmp_path: Path, reports: list[RouterStatus], state: str) -> None:
    gang = GangStatus(name="m-0", epoch=7, revision="", phase="ready", since=time.time())
    view = ReplicaView(name="m-0", phase="ready", epoch=7, since=gang.since, failures=0, due=0.0, cause="", hint="", gang=gang)
    host = HostFacts(started_at=time.time(), stopping=False, was_ready=False)
    found = describe(job(tmp_path), [view], {}, Told(*reports), host)
    assert found.models[0].replicas[0].state == state
    assert found.state == ("READY" if state == "READY" else "STARTING")
    assert bool(found.error) == (state == "JOINING")


def test_standing_routers_show_who_joined() -> None:
    host = HostFacts(started_at=time.time(), stopping=False, was_ready=True)
    one = report(row("slurm/a/m-0", "lost", reason="silent for 2.1 s"), row("slurm/b/m-0", tp=2, pp=1))
    other = report(row("slurm/a/m-0"), row("slurm/b/m-0", "draining", epoch=6))
    found = describe_routers_only(standing_config(), Told(one, other), host)
    (model,) = found.models
    assert (found.state, model.state, model.wanted, model.ready) == ("READY", "READY", 2, 2)
    assert [(row.name, row.state) for row in model.replicas] == [("slurm/a/m-0", "READY"), ("slurm/b/m-0", "READY")]
    gone = describe_routers_only(standing_config(), Told(report(row("slurm/a/m-0", "lost", reason="silent"))), host)
    assert (gone.state, gone.models[0].state, gone.models[0].wanted) == ("READY", "DEGRADED", 0)
    assert gone.models[0].replicas[0].cause == "silent"


def test_a_router_believes_a_pass_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over real CURVE: who is reached, who is turned away in words, what a key may say Hello as, and that it ends with its pass."""
    with short_folder() as folder:
        ring = ring_with(folder)
        ring.admit_replicas("slurm", ["m"])
        ring.admit_replicas("other", ["n"])
        with RouterRun(
            folder, back="tcp://127.0.0.1:*", rpc="tcp://127.0.0.1:*", key_file=str(ring.path("router", "all")),
            allowed_file=str(ring.allowed_file), salt_file=str(ring.salt_file),
        ) as router:  # fmt: skip
            bound = router.wait_serving()
            server = ring.pair("router", "all").public
            back, rpc = (RouterAddress(endpoint=endpoint, server_key=server) for endpoint in (bound.back, bound.rpc))
            write(folder, routers=(back,), rpc=(rpc,))
            (folder / "pass.json").write_bytes(ring.path("pass", "slurm").read_bytes())
            ExternalRouters(job(folder)).reach(lambda: None)

            write(folder, routers=(back,), rpc=(rpc,))  # a pass of its own making
            with pytest.raises(ConfigError, match="does not know this key"):
                ExternalRouters(job(folder)).reach(lambda: None)

            held = read_pass(ring.path("pass", "slurm"))
            with dealer(back.endpoint, server, held.replica.public, held.replica.secret) as socket:
                replica = Impostor(socket, "boot-1")
                for name, model in (("slurm/job-1/a", "n"), ("other/job-1/a", "m"), ("a", "m")):
                    replica.hello(name, model=model)
                    assert replica.hear(Bye).reason == "denied"
                replica.hello("slurm/job-1/a", model="m")
                replica.hear(RouterHeartbeat)
            with Client([rpc], keys=ClientKeys(public=held.client.public, secret=held.client.secret)) as client:
                assert [found["name"] for found in client.status()["replicas"]] == ["slurm/job-1/a"]
                assert [found["id"] for found in client.models()] == ["m"]
            ring.remove_pass("slurm")
            write(folder, routers=(back,), rpc=(rpc,))
            (folder / "pass.json").write_bytes(msgspec.json.encode(held))
            (folder / "pass.json").chmod(0o600)

            def refused() -> bool:
                try:
                    ExternalRouters(job(folder)).reach(lambda: None)
                except ConfigError:
                    return True
                return False

            wait_for(refused, what="the end of the pass")
        monkeypatch.setattr(external_routers, "REACH_S", 0.5)
        with pytest.raises(EnvironmentFault, match="no router of front answers"):
            ExternalRouters(job(folder)).reach(lambda: None)


def test_the_examples_fit_each_other() -> None:
    examples = Path(__file__).resolve().parents[4] / "deploy" / "examples"
    front, jobs = load(examples / "router.yaml").config, load(examples / "join.yaml").config
    join_file.check(front)
    assert jobs.join.file and jobs.join.key_file and {model.name for model in jobs.models} <= {model.name for model in front.models}
    with pytest.raises(ConfigError, match=r"back.host: is missing"):
        join_file.check(jobs)
