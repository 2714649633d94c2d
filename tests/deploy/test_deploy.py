"""What lies in `deploy/` is what its readers take: Kubernetes' schemas, KubeRay's fields, Ray's schema, systemd, and our own configuration.

Offline. What a tool of others validates (kubectl for kustomize, kubernetes-validate, systemd-analyze) is skipped where it is not there;
`make test-manifests` installs kubernetes-validate.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from orchestrator.cli.main import app
from orchestrator.config.deployment_file import Config, load
from orchestrator.planner.placement import NodeResources, RankShare, placement_request
from workers.protocol.specs import Parallel

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
#: The oldest release that the manifests are for, and the newest that the package knows.
VERSIONS = ("1.30", "1.37")
#: Farewells, kills and their proof after a grace, seconds: `orchestrator.control.host.deployment`.
FAREWELL_S = 15.0
#: KubeRay 1.6's API reference, ray.io/v1, field by field: no package carries its schemas. Pod templates go to Kubernetes' own.
KUBERAY = json.loads((ROOT / "tests" / "contracts" / "kuberay.json").read_text())


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def rendered(folder: Path) -> list[dict[str, Any]]:
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", str(folder)]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", str(folder)]
    else:
        pytest.skip("neither kubectl nor kustomize is here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate carries Kubernetes' schemas")
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def one(found: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    (match,) = [document for document in found if document["kind"] == kind and name in ("", document["metadata"]["name"])]
    return match


def pods(document: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification in a document, whatever its kind."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def configured(found: list[dict[str, Any]], tmp_path: Path) -> Config:
    """The deployment file in a rendered config map, as `trireme up` reads it."""
    file = tmp_path / "deployment.yaml"
    file.write_text(one(found, "ConfigMap")["data"]["deployment.yaml"])
    return load(file).config


KUSTOMIZATIONS = ("kubernetes/base", "kubernetes/overlays/gpu", "ray/kuberay")
RAY_KINDS = ("raycluster", "rayjob", "rayservice")


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_kubernetes_takes_what_kustomize_renders(folder: str) -> None:
    for document in rendered(DEPLOY / folder):
        if document["kind"] != "PodMonitor":
            validate(document)


@pytest.mark.parametrize("file", sorted(path.name for path in (DEPLOY / "kubernetes/base").glob("*.yaml")))
def test_kubernetes_takes_each_file_of_the_base(file: str) -> None:
    if file not in ("kustomization.yaml", "deployment.yaml"):
        for document in documents((DEPLOY / "kubernetes/base" / file).read_text()):
            validate(document)


def test_a_wrong_field_is_seen() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate carries Kubernetes' schemas")
    document = one(documents((DEPLOY / "kubernetes/base/statefulset.yaml").read_text()), "StatefulSet")
    document["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(document)


def test_a_pod_monitor_has_the_fields_of_the_prometheus_operator() -> None:
    """By its API reference, monitoring.coreos.com/v1: no package carries its schema."""
    spec = one(documents((DEPLOY / "kubernetes/components/podmonitor/podmonitor.yaml").read_text()), "PodMonitor")["spec"]
    assert set(spec) == {"selector", "podMetricsEndpoints"}
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] == "http" and endpoint["authorization"]["credentials"].keys() == {"name", "key"}
    assert set(endpoint) == {"port", "path", "interval", "authorization"}


@pytest.mark.parametrize("folder", KUSTOMIZATIONS[:2])
def test_a_pod_serves_drains_and_ends_in_time(folder: str, tmp_path: Path) -> None:
    found = rendered(DEPLOY / folder)
    config = configured(found, tmp_path)
    workload = one(found, "StatefulSet")
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    grace = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + config.drain_grace_s + FAREWELL_S
    assert pod["terminationGracePeriodSeconds"] > grace
    assert config.drain_grace_s >= config.admission.request_timeout_s, "the longest request is cut"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > config.start_timeout_s
    assert [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")] == [
        "/ready",
        "/ready",
        "/health",
    ]
    assert container["ports"] == [{"name": "http", "containerPort": config.http.port}]
    assert config.launcher == "local" and config.http.exposed and config.http.api_keys_file
    labels = workload["spec"]["template"]["metadata"]["labels"].items()
    selecting = [one(found, "Service", name)["spec"]["selector"] for name in ("trireme", "trireme-pods")]
    selecting += [one(found, kind, "trireme")["spec"]["selector"]["matchLabels"] for kind in ("StatefulSet", "PodDisruptionBudget")]
    selecting += [document["spec"]["podSelector"]["matchLabels"] for document in found if document["kind"] == "NetworkPolicy"]
    assert all(selector.items() <= labels for selector in selecting)
    assert workload["spec"]["serviceName"] == "trireme-pods"
    world = sum(gang.layout.world for model in config.models for gang in model.gangs() if gang.layout)
    limits = container["resources"]["limits"]
    assert config.models[0].settings.device != "cuda" or limits["nvidia.com/gpu"] == world
    shm = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["medium"] == "Memory" and container["resources"]["requests"]["memory"]


def every_pod() -> list[tuple[str, dict[str, Any]]]:
    files = [DEPLOY / "kubernetes/base/statefulset.yaml", *(DEPLOY / f"ray/kuberay/{kind}.yaml" for kind in RAY_KINDS)]
    return [(f"{file.stem} {index}", pod) for file in files for index, pod in enumerate(pods(documents(file.read_text())))]


@pytest.mark.parametrize(("where", "pod"), every_pod(), ids=[where for where, _ in every_pod()])
def test_a_pod_is_confined_and_its_secrets_are_files(where: str, pod: dict[str, Any]) -> None:
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod})
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 1000
    volumes = {volume["name"] for volume in pod["volumes"]} | ({"models"} if where.startswith("statefulset") else set())
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"} and "memory" in container["resources"]["limits"]
        assert "secretKeyRef" not in json.dumps(container) and "secretRef" not in json.dumps(container)
    assert sum(mount["mountPath"] == "/dev/shm" for mount in pod["containers"][0]["volumeMounts"]) == (where[-1] == "1" or "state" in where)


def fields(value: Any, kind: str, where: str) -> list[str]:
    """What KubeRay's reference does not know, or misses, in ``value`` of type ``kind``."""
    table = KUBERAY.get(kind)
    if table is None:
        return (
            [] if isinstance(value, {"string": str, "boolean": bool, "integer": int}.get(kind, (dict, list))) else [f"{where}: not {kind}"]
        )
    found = [f"{where}.{name}: unknown" for name in value if name not in table["fields"]]
    found += [f"{where}.{name}: missing" for name in table["required"] if name not in value]
    for name, kind in table["fields"].items():
        items = [] if name not in value else value[name] if kind.startswith("[]") else [value[name]]
        for item in items:
            found += fields(item, kind.removeprefix("[]"), f"{where}.{name}")
    return found


@pytest.mark.parametrize("name", RAY_KINDS)
def test_kuberay_knows_every_field(name: str) -> None:
    (document,) = documents((DEPLOY / f"ray/kuberay/{name}.yaml").read_text())
    assert document["apiVersion"] == "ray.io/v1" and document["kind"].lower() == name
    assert fields(document["spec"], f"{document['kind']}Spec", "spec") == []
    assert fields({**document["spec"], "entryPoint": "x"}, f"{document['kind']}Spec", "spec") == ["spec.entryPoint: unknown"]


def ray_cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    key = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}[document["kind"]]
    cluster: dict[str, Any] = spec[key] if key else spec
    return cluster


@pytest.mark.parametrize("name", RAY_KINDS)
def test_the_gangs_fit_on_the_workers_of_a_ray_cluster(name: str) -> None:
    config = load(DEPLOY / "ray/kuberay/deployment.yaml").config
    (document,) = documents((DEPLOY / f"ray/kuberay/{name}.yaml").read_text())
    (group,) = ray_cluster(document)["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    cpus, gpus = float(resources["requests"]["cpu"]), float(resources["limits"]["nvidia.com/gpu"])
    nodes = [NodeResources(address=f"10.0.0.{i}", cpus=cpus, gpus=gpus) for i in range(group["replicas"])]
    (model,) = config.models
    share = RankShare(cpus=model.cpus_per_rank, gpus=1.0)
    (layout,) = {gang.layout for gang in model.gangs()}
    assert layout == Parallel(tp=2, pp=2)
    placed = placement_request("r", layout, share, nodes, spread=model.spread)
    assert placed.strategy == "STRICT_SPREAD" and len(placed.ranks) * len(model.gangs()) == len(nodes)
    head = ray_cluster(document)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert {"name": "http", "containerPort": config.http.port} in head["template"]["spec"]["containers"][0]["ports"]


def test_a_ray_job_has_time_to_drain() -> None:
    config = load(DEPLOY / "ray/kuberay/deployment.yaml").config
    (job,) = documents((DEPLOY / "ray/kuberay/rayjob.yaml").read_text())
    wait = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert float(wait) >= config.drain_grace_s + FAREWELL_S


def test_what_a_ray_service_imports_is_there() -> None:
    (service,) = documents((DEPLOY / "ray/kuberay/rayservice.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name)) and set(application["args"]) == {"file"}


def test_ray_up_takes_the_cluster_file() -> None:
    checks = pytest.importorskip("ray.autoscaler._private.util", reason="Ray brings the schema")
    cluster = yaml.safe_load((DEPLOY / "ray/cluster.yaml").read_text())
    checks.validate_config(checks.prepare_config(copy.deepcopy(cluster)))
    with pytest.raises(pytest.importorskip("jsonschema").ValidationError):
        checks.validate_config(checks.prepare_config(cluster | {"max_worker": 2}))
    starts = [line for key in ("head", "worker") for line in cluster[f"{key}_start_ray_commands"] if "ray start" in line]
    (token,) = cluster["file_mounts"]
    assert len(starts) == 2 and all(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} " in line for line in starts)


UNITS = ("trireme@.service", "trireme-router@.service")


def directives(unit: str) -> dict[str, str]:
    lines = [line for line in (DEPLOY / "systemd" / unit).read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_the_unit(unit: str, tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not here")
    text = (DEPLOY / "systemd" / unit).read_text()

    def complaints(text: str) -> str:
        file = tmp_path / unit
        # It looks for the program.
        file.write_text(text.replace("/opt/trireme/bin/trireme", sys.executable))
        done = subprocess.run([analyze, "verify", "--man=no", str(file)], capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    assert complaints(text) == ""
    assert "WatchdogSeconds" in complaints(text.replace("WatchdogSec=", "WatchdogSeconds="))


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_says_when_it_is_ready_and_gives_it_time_to_drain(unit: str) -> None:
    said = directives(unit)
    assert (said["Type"], said["KillSignal"], said["KillMode"]) == ("notify", "SIGTERM", "mixed")
    default = load({"models": [{"name": "m"}]}).config
    assert float(said["TimeoutStopSec"]) > default.drain_grace_s + FAREWELL_S
    assert said["StateDirectoryMode"] == "0700" and said["NoNewPrivileges"] == "yes"


@pytest.mark.parametrize(("unit", "directive"), [(UNITS[0], "ExecStart"), (UNITS[0], "ExecReload"), (UNITS[1], "ExecStart")])
def test_a_unit_s_command_line_is_ours(unit: str, directive: str) -> None:
    program, *words = directives(unit)[directive].split()
    assert program == "/opt/trireme/bin/trireme"
    words = words[2:] if words[0] == "--log-format" else words
    verb, file, *flags = words
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert file == "/etc/trireme/%i.yaml" and {flag for flag in flags if flag.startswith("--")} <= known


DOCKERFILES = ("portable.Dockerfile", "router.Dockerfile")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_made_of_what_is_there(name: str) -> None:
    text = (DEPLOY / "docker" / name).read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    sources = [word for key, rest in lines if key == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    allowed = [line[1:] for line in (DEPLOY / "docker" / f"{name}.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(sources) == set(allowed) and all(any(fnmatch(source, rule) for rule in allowed) for source in sources)
    assert sum(key == "FROM" for key, _ in lines) == 2
    assert [rest for key, rest in lines if key == "USER"] == ["10001:10001"] and lines[-2][0] == "ENTRYPOINT"
    assert not re.search(r"(ARG|ENV)\b.*(TOKEN|SECRET|PASSWORD|API_KEY)", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra for found in re.findall(r"EXTRAS=([a-z,]+)", text) for extra in found.split(",")}
    assert extras <= project["optional-dependencies"].keys()
    command = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert json.loads(lines[-1][1])[0] in command
