"""The default model on several layouts against transformers in fp32: 20 prompts, prefill and 64 forced steps, logits and choices."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.mpi.world import run
from tests.reference.default_model import artifact, transformers_model
from tests.reference.engine import margin_violations, request, serve
from workers.artifacts.artifact import open_artifact
from workers.portable import PortableEngine, build
from workers.spec import EngineSpec, Parallel, ReplicaSpec
from workers.wire import SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.mpi, pytest.mark.timeout(900)]
STEPS = 64
TEXTS = (
    "The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n", "Water boils at",
    "The three laws of motion say that", "Q: What is 17 times 3?\nA:", "Dear Sir or Madam,", "In 1969, the first man",
    "SELECT name FROM users WHERE", "A haiku about rivers:\n", "The mitochondria is", "To be, or not to be,", "Ingredients: flour, eggs,",
    "import numpy as np\n", "The quick brown fox", "Breaking news:", "Le chat est", "1, 1, 2, 3, 5, 8,", "She opened the door and",
    "A ship with three rows of oars is called",
)  # fmt: skip


def settings(parallel: Parallel, **engine: object) -> ReplicaSpec:
    chosen = {"kv_tokens": 4096, "max_batch_size": 32, "max_seq_len": 1024} | engine
    return ReplicaSpec(name="r", model="m", artifact=str(artifact(parallel)), parallel=parallel, engine=EngineSpec(**chosen))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], list[list[int]], Path]:
    """(prompts, 64 forced tokens each, file of transformers' logits [20, 65, vocab]). The forced tokens are our own greedy ones."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(open_artifact(artifact()).tokenizer_dir / "tokenizer.json"))  # type: ignore[operator]
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    engine = build(settings(Parallel()), None)
    assert isinstance(engine, PortableEngine)
    greedy = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, logprobs=2)
    streams = serve(engine, [request(p, greedy, id=i) for i, p in enumerate(prompts)])
    few = range(0, len(prompts), 5)
    alone = [serve(engine, [request(prompts[i], greedy)])[0] for i in few]
    assert not any(margin_violations(streams[i], mine, 1e-3) for i, mine in zip(few, alone, strict=True)), "batch mates are invisible"
    forced = [stream.tokens for stream in streams]
    model = transformers_model()
    logits = np.empty((len(prompts), STEPS + 1, 49152), np.float32)
    with torch.inference_mode():
        for row, (prompt, rest) in enumerate(zip(prompts, forced, strict=True)):
            logits[row] = model(torch.tensor([prompt + rest]), logits_to_keep=STEPS + 1).logits[0].numpy()
    file = tmp_path_factory.mktemp("truth") / "logits.npy"
    np.save(file, logits)
    return prompts, forced, file


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_layout_is_what_transformers_computes(
    truth: tuple[list[list[int]], list[list[int]], Path], tmp_path: Path, tp: int, pp: int
) -> None:
    prompts, forced, file = truth
    report = tmp_path / "report.json"
    arguments = {"spec": msgspec.to_builtins(settings(Parallel(tp=tp, pp=pp))), "prompts": prompts, "forced": forced, "logits": str(file)}
    run(tp * pp, "tests.mpi.forced_program", report, arguments, bound_s=400)
    found = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(tp)]
    delta, scale = max(f["delta"] for f in found), max(f["scale"] for f in found)
    chosen = np.array([found[0]["first"], *found[0]["steps"]]).T  # [prompts, steps + 1]
    assert all(f["steps"] == found[0]["steps"] for f in found)
    best = np.load(file, mmap_mode="r")
    top = torch.from_numpy(np.array(best)).topk(2, -1)
    gap = (top.values[..., 0] - top.values[..., 1]).numpy()
    same = chosen == top.indices[..., 0].numpy()
    below = int((gap <= 10 * delta).sum())
    print(
        f"tp={tp} pp={pp}: max |delta| {delta:.2e} of {scale:.1f}, {int(same.sum())}/{same.size} equal, {below} positions below the margin"
    )
    for row, at in np.argwhere(~same):
        print(f"  parted at prompt {row} step {at}: gap {gap[row, at]:.2e}")
    assert delta <= 1e-4 * scale
    assert same[gap > 10 * delta].all()
