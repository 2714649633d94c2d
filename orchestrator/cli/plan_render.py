"""A plan as a job: the script and manifests of `deploy/`, with the sizes of one deployment filled in.

Owns which field is a size. The script belongs to `orchestrator.slurm`, the manifests to `deploy/`: nothing here repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from orchestrator.files import SHIPPED
from orchestrator.planner.cluster import PlannedCluster
from orchestrator.planner.planner import Subject, occupied
from workers.protocol.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config.deployment_file import Config

#: CPUs of a node in addition to its ranks': routers, controller, agents.
SPARE_CPUS = 2
GPU = "nvidia.com/gpu"
#: Says where the files of `deploy/` come from, which the job needs.
WRITES = "# trireme config examples writes deploy/ where there is no repository.\n"


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """``nodes`` equal nodes; ``gpus`` and ``cpus``: what the fullest node needs."""

    nodes: int
    gpus: int
    cpus: int


def job(kind: str, file: Path, settings: Config, subjects: Sequence[Subject], cluster: PlannedCluster) -> str:
    """The job of ``kind`` (one of ``KINDS``) that runs ``file``. Raises :class:`ConfigError` for a file that such a job cannot run."""
    ranks = occupied(subjects, cluster)
    share = max(subject.cpus_per_rank for subject in subjects)
    gpus = max(ranks) if subjects[0].engine.device == "cuda" else 0
    return KINDS[kind](file, settings, Sizes(nodes=len(ranks), gpus=gpus, cpus=ceil(max(ranks) * share) + SPARE_CPUS))


def _slurm(file: Path, settings: Config, sizes: Sizes) -> str:
    from orchestrator.slurm import job_script

    wanted = job_script.SlurmJob(
        name=settings.name,
        jobs=str(Path("trireme-jobs").absolute()),
        nodes=sizes.nodes,
        gpus_per_node=sizes.gpus,
        cpus_per_task=sizes.cpus,
    )
    return job_script.render(wanted, job_script.TEMPLATE.read_text())


def _ray(file: Path, settings: Config, sizes: Sizes) -> str:
    """A ConfigMap with the file, and `deploy/ray/kuberay/rayjob.yaml` with as many workers as there are nodes."""
    wanted = _manifest("ray/kuberay/rayjob.yaml")
    group = wanted["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group |= {"replicas": sizes.nodes, "maxReplicas": sizes.nodes}
    resources = group["template"]["spec"]["containers"][0]["resources"]
    group["template"]["spec"]["containers"][0]["resources"] = _resources(resources, sizes)
    data = {"deployment.yaml": file.read_text()}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "trireme-ray"}, "data": data}
    head = f"# trireme plan {file} --render ray | kubectl apply -f -, after service.yaml and network.yaml of deploy/ray/kuberay.\n"
    head += WRITES
    return head + _dump(config, wanted)


def _kubernetes(file: Path, settings: Config, sizes: Sizes) -> str:
    """A kustomization of its own over `deploy/kubernetes`: one pod is one whole deployment."""
    if sizes.nodes > 1:
        raise ConfigError(
            f"{file} needs {sizes.nodes} nodes", "a pod of deploy/kubernetes is a whole deployment on one node", "use --render ray"
        )
    template = _manifest(f"kubernetes/{'overlays/gpu' if sizes.gpus else 'base'}/statefulset.yaml")["spec"]["template"]["spec"]
    container = next(each for each in template["containers"] if each["name"] == "trireme")
    patch = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "trireme"},
        "spec": {"template": {"spec": {"containers": [{"name": "trireme", "resources": _resources(container["resources"], sizes)}]}}},
    }
    wanted = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../{'gpu' if sizes.gpus else '../base'}"],
        "configMapGenerator": [{"name": "trireme", "behavior": "replace", "files": [f"deployment.yaml={file.name}"]}],
        "patches": [{"patch": yaml.safe_dump(patch, sort_keys=False)}],
    }
    folder = f"deploy/kubernetes/overlays/{settings.name}"
    return f"# To be {folder}/kustomization.yaml, with {file.name} beside it; then kubectl apply -k {folder}.\n{WRITES}{_dump(wanted)}"


#: Words of ``--render``.
KINDS: dict[str, Callable[[Path, Config, Sizes], str]] = {"slurm": _slurm, "ray": _ray, "kubernetes": _kubernetes}


def _resources(given: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The manifest's resources, scaled to the needed GPUs and CPUs: memory grows with the GPUs, or with the CPUs if there are no GPUs."""
    gpus, cpus = given["limits"].get(GPU, 0), float(given["requests"]["cpu"])
    grown = ceil(int(given["limits"]["memory"].removesuffix("Gi")) * (sizes.gpus / gpus if gpus else sizes.cpus / cpus))
    limits = {"memory": f"{grown}Gi"} | ({GPU: sizes.gpus} if sizes.gpus else {})
    return {"requests": {"cpu": str(sizes.cpus), "memory": f"{grown}Gi"}, "limits": limits}


def _manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((SHIPPED / name).read_text())
    return found


class _Plain(yaml.SafeDumper):
    """Dumps YAML without anchors: generated anchors have names without a meaning."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)


def _dump(*documents: dict[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=140)
