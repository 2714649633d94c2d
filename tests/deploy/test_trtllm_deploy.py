"""What is shipped for TensorRT-LLM hosts means what it says: the example file, and the files that the image is made from."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.config import deployment_file
from orchestrator.planner.placement import NodeResources, RankShare, placement_request
from tests.support.hardware import decided
from workers.protocol.specs import Parallel, TrtllmSpec

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "deploy" / "docker" / "tensorrt-llm.Dockerfile"


def test_the_example_puts_each_stage_on_a_node_of_its_own() -> None:
    model = deployment_file.load(ROOT / "deploy" / "examples" / "tensorrt-llm.yaml").config.models[0]
    assert (model.engine, model.settings.device) == ("trtllm", "cuda") and isinstance(decided(model)[0].engine, TrtllmSpec)
    [gang] = model.gangs()
    assert gang.layout == Parallel(tp=4, pp=2)
    nodes = [NodeResources(address=f"10.0.0.{index}", cpus=32, gpus=4) for index in (1, 2)]
    placement = placement_request(gang.name, gang.layout, RankShare(cpus=model.cpus_per_rank, gpus=1.0), nodes, spread=model.spread)
    assert placement.ranks == (4, 4) and placement.strategy == "STRICT_SPREAD"


def test_the_image_is_made_from_what_exists() -> None:
    text = IMAGE.read_text()
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied), copied
    # The first rule leaves everything out, so what is copied must be let in again.
    rules = [line for line in IMAGE.with_name(IMAGE.name + ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*" and {f"!{source}" for source in copied} <= set(rules)
    # A second torch, MPI or NCCL beside the image's own is what pre-flight refuses.
    extras = re.search(r"'\.\[(.+)\]'", text)
    assert extras is not None and not {"torch", "mpich", "openmpi", "gpu", "all"} & set(extras[1].split(","))
