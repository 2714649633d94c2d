"""The default model on several layouts against transformers in fp32: 20 prompts, prefill and 64 forced steps, logits and choices; and in
bf16 and with quantized weights, by how far its distributions are from those in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.mpi.world import run
from tests.reference.default_model import artifact, transformers_model
from tests.reference.engine import request, serve
from workers.artifacts.artifact import open_artifact
from workers.distributed.rank_groups import split
from workers.engines.portable import PortableEngine, build
from workers.kernels.reference import attention_layout
from workers.protocol.errors import ConfigError
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import Parallel, PortableOptions, PortableSpec, ReplicaSpec
from workers.runner.bring_up import bring_up
from workers.runner.kv_cache import KvCache

pytestmark = [pytest.mark.model, pytest.mark.mpi, pytest.mark.timeout(900)]
STEPS = 64
TEXTS = (
    "The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n", "Water boils at",
    "The three laws of motion say that", "Q: What is 17 times 3?\nA:", "Dear Sir or Madam,", "In 1969, the first man",
    "SELECT name FROM users WHERE", "A haiku about rivers:\n", "The mitochondria is", "To be, or not to be,", "Ingredients: flour, eggs,",
    "import numpy as np\n", "The quick brown fox", "Breaking news:", "Le chat est", "1, 1, 2, 3, 5, 8,", "She opened the door and",
    "A ship with three rows of oars is called",
)  # fmt: skip


#: Layouts with a checkpoint of their own; the others read their slices of the whole one.
CONVERTED = (Parallel(), Parallel(tp=2), Parallel(pp=2))
Truth = tuple[list[list[int]], list[list[int]], Path]


def settings(parallel: Parallel, **engine: object) -> ReplicaSpec:
    chosen = {"kv_tokens": 4096, "max_batch_size": 32, "max_seq_len": 1024} | engine
    folder = artifact(parallel if parallel in CONVERTED else None)
    return ReplicaSpec(name="r", model="m", artifact=str(folder), parallel=parallel, engine=PortableSpec(**chosen))  # type: ignore[arg-type]


def reference_logits(prompts: list[list[int]], forced: list[list[int]]) -> np.ndarray:
    """transformers' logits [prompts, STEPS + 1, vocab] at each prompt's end and after each forced token, a few rows a forward."""
    model = transformers_model()
    logits = np.empty((len(prompts), STEPS + 1, model.config.vocab_size), np.float32)
    rows = [prompt + rest for prompt, rest in zip(prompts, forced, strict=True)]
    with torch.inference_mode():
        for first in range(0, len(rows), 5):
            some = rows[first : first + 5]
            width = max(len(row) for row in some)
            # What pads a row comes after all that is read of it, and attention is causal.
            hidden = model.model(torch.tensor([row + [0] * (width - len(row)) for row in some])).last_hidden_state
            for i, row in enumerate(some):
                logits[first + i] = model.lm_head(hidden[i, len(row) - STEPS - 1 : len(row)]).numpy()
    return logits


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """(prompts, 64 forced tokens each, file of transformers' logits [20, 65, vocab]). The forced tokens are our own greedy ones."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(open_artifact(artifact()).tokenizer_dir / "tokenizer.json"))  # type: ignore[operator]
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    engine = build(settings(Parallel()), None)
    assert isinstance(engine, PortableEngine)
    greedy = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    forced = [stream.tokens for stream in serve(engine, [request(p, greedy, id=i) for i, p in enumerate(prompts)])]
    logits = reference_logits(prompts, forced)
    for i in range(0, len(prompts), 10):
        alone = serve(engine, [request(prompts[i], greedy)])[0].tokens
        parted = next((at for at, (a, b) in enumerate(zip(alone, forced[i], strict=True)) if a != b), None)
        if parted is not None:
            best = np.sort(logits[i, parted])[-2:]
            assert best[1] - best[0] < 1e-3, "batch mates are invisible"
    file = tmp_path_factory.mktemp("truth") / "logits.npy"
    np.save(file, logits)
    return prompts, forced, file


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_layout_is_what_transformers_computes(truth: Truth, tmp_path: Path, tp: int, pp: int) -> None:
    prompts, forced, file = truth
    report = tmp_path / "report.json"
    arguments = {"spec": msgspec.to_builtins(settings(Parallel(tp=tp, pp=pp))), "prompts": prompts, "forced": forced, "logits": str(file)}
    run(tp * pp, "tests.mpi.forced_program", report, arguments, bound_s=400)
    found = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(tp)]
    delta, scale = max(f["delta"] for f in found), max(f["scale"] for f in found)
    chosen = np.array(found[0]["steps"]).T  # [prompts, STEPS + 1]
    assert all(f["steps"] == found[0]["steps"] for f in found)
    top = torch.from_numpy(np.load(file)).topk(2, -1)
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


def test_bf16_is_near_fp32(truth: Truth) -> None:
    """Distributions at 65 positions of 5 prompts, as prompt log-probabilities: near in the mean, equal choices where they are clear."""
    try:
        engine = build(settings(Parallel(), dtype="bf16", max_num_tokens=512), None)
    except ConfigError as error:
        pytest.skip(str(error))
    assert isinstance(engine, PortableEngine)
    prompts, forced, file = truth
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=20)
    few = range(0, len(prompts), 4)
    streams = serve(engine, [request(prompts[i] + forced[i], params, id=i) for i in few])
    logits = torch.from_numpy(np.array(np.load(file, mmap_mode="r")[few])).double()
    expected = torch.log_softmax(logits, -1)
    divergence, agreed, clear = [], 0, 0
    for row, (i, stream) in enumerate(zip(few, streams, strict=True)):
        assert stream.prompt_logprobs is not None
        for at, entry in enumerate(stream.prompt_logprobs[len(prompts[i]) :]):
            ours, theirs = torch.tensor(entry.top_logprobs), expected[row, at]
            divergence.append(float((ours.exp() * (ours - theirs[entry.top_ids])).sum()))
            best = theirs.topk(2)
            if best.values[0] - best.values[1] > 0.5:
                clear += 1
                agreed += entry.top_ids[0] == int(best.indices[0])
    mean, worst = float(np.mean(divergence)), max(divergence)
    print(f"bf16: KL over the best 20, mean {mean:.1e}, worst {worst:.1e}; {agreed} of {clear} clear choices equal")
    assert mean < 0.01 and worst < 0.2
    assert agreed == clear > 100


#: Bounds of the mean and the worst divergence, and of the share of equal best tokens: about 1.5 times what is measured.
QUANTIZED = [("int8", 0.006, 0.15, 0.96), ("int4", 0.4, 5.0, 0.70), ("fp8", 0.05, 2.0, 0.90)]


@pytest.mark.parametrize(("form", "mean", "worst", "share"), QUANTIZED)
def test_quantized_weights_are_near_fp32(truth: Truth, form: str, mean: float, worst: float, share: float) -> None:
    """All 65 positions of all 20 prompts: divergence of whole distributions, and how often the best token is the same."""
    prompts, forced, file = truth
    spec = settings(Parallel(), options=PortableOptions(quant=form))
    stage = bring_up(spec, split(spec, None)).runner.stage
    cache = KvCache(stage.model, stage.shard, blocks=16, block_size=16, dtype=stage.dtype, device=stage.device)
    tables = np.arange(cache.blocks, dtype=np.int32)[None, :]
    logits = np.load(file, mmap_mode="r")
    divergence, same = [], []
    with torch.inference_mode():
        for row, (prompt, rest) in enumerate(zip(prompts, forced, strict=True)):
            ids = torch.tensor(prompt + rest)
            layout = attention_layout(np.zeros(1, np.int32), np.array([len(ids)], np.int32), tables, cache.block_size)
            hidden = stage.forward(stage.embed(ids), layout, cache.layers)
            ours = torch.log_softmax(stage.logits(hidden[-STEPS - 1 :]), -1)
            theirs = torch.log_softmax(torch.from_numpy(np.array(logits[row])), -1)
            divergence += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
            same += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
    found = f"{form}: KL mean {np.mean(divergence):.1e}, worst {max(divergence):.1e}; {np.mean(same):.1%} of {len(same)} best tokens equal"
    print(found)
    assert np.mean(divergence) < mean and max(divergence) < worst and np.mean(same) > share
